"""Nodes as ``kubectl describe nodes`` prints them, read as the objects that ``kubectl get nodes,pods -o json`` has."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_SECTION = re.compile(r"([A-Z][\w -]*):\s*(.*)")
_NODE = re.compile(r"(?m)^(?=Name:\s)")
_AMOUNT = re.compile(r"(\S+?):?\s+(\S+)(?:\s.*)?")
_NOT_ONE = ("<none>", "<unset>")


def is_described(text: str) -> bool:
    """Return whether a text describes nodes for people."""
    return all(re.search(rf"(?m)^{name}:", text) for name in ("Name", "Capacity", "Allocatable"))


def described_nodes(text: str) -> dict[str, Any]:
    """Return the nodes, and a pod on each that has what all pods of the node request."""
    items = list[dict[str, Any]]()
    for part in _NODE.split(text):
        sections = _sections(part)
        if "Capacity" not in sections:
            continue
        name = "".join(sections.get("Name", ())[:1])
        metadata = {
            "name": name,
            "labels": _pairs(sections, "Labels", "="),
            "annotations": _pairs(sections, "Annotations", ":"),
        }
        spec = {
            "unschedulable": sections.get("Unschedulable") == ["true"],
            "taints": list(map(_taint, _lines(sections, "Taints"))),
        }
        rows = (line.split() for line in _lines(sections, "Conditions"))
        conditions = [{"type": row[0], "status": row[1], "reason": _reason(row)} for row in rows if len(row) > 1]
        status = {"capacity": _amounts(sections, "Capacity"), "allocatable": _amounts(sections, "Allocatable")}
        items.append(
            {"kind": "Node", "metadata": metadata, "spec": spec, "status": status | {"conditions": conditions}}
        )
        if "Allocated resources" in sections:
            used = {"limits": _amounts(sections, "Allocated resources")}
            of_pod = {"nodeName": name, "containers": [{"resources": used}]}
            items.append({"kind": "Pod", "metadata": {"namespace": "all", "name": "pods"}, "spec": of_pod})
    return {"kind": "List", "items": items}


def _sections(part: str) -> dict[str, list[str]]:
    found, current = dict[str, list[str]](), list[str]()
    for line in part.splitlines():
        if begun := _SECTION.fullmatch(line):
            current = found.setdefault(begun[1], [])
            current += [begun[2].strip()] if begun[2] else []
        elif line[:1].isspace():
            current.append(line.strip())
    return found


def _lines(sections: Mapping[str, Sequence[str]], name: str) -> list[str]:
    return [line for line in sections.get(name, ()) if line and line not in _NOT_ONE]


def _pairs(sections: Mapping[str, Sequence[str]], name: str, sign: str) -> dict[str, str]:
    parts = (line.partition(sign) for line in _lines(sections, name))
    return {key: value.strip() for key, _, value in parts}


def _amounts(sections: Mapping[str, Sequence[str]], name: str) -> dict[str, str]:
    """Return the whole amounts of the resources of devices, whose names have the domains of vendors."""
    found = filter(None, map(_AMOUNT.fullmatch, _lines(sections, name)))
    return {one[1]: one[2] for one in found if "/" in one[1]}


def _taint(written: str) -> dict[str, str]:
    what, _, effect = written.rpartition(":")
    key, _, value = what.partition("=")
    return {"key": key, "value": value, "effect": effect}


def _reason(row: Iterable[str]) -> str:
    """Return the reason of a condition, which follows two times: the first word like ``KubeletReady``."""
    words = list(row)[2:]
    return next((word for word in words if re.fullmatch(r"(?:[A-Z][a-z]+){2,}", word)), "")
