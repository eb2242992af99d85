"""Nodes as ``scontrol show nodes --json`` and ``sinfo --json`` print them, in any version of their parser."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from hetis.formats.discovery.found import (
    FoundGpus,
    FoundNode,
    Inventory,
    counted,
    inventory,
    listed,
    mapping,
    parts_text,
    some_of,
    text,
    whole_number,
)
from hetis.formats.errors import Problem, single_problem
from hetis.formats.positions import Text

UNTYPED = "gpu"
"""The product name of GPUs to which gres.conf gives no type."""

# States and flags in which nothing can start (slurm.schedmd.com/scontrol.html, "State").
_UNUSABLE = {
    *("DOWN", "DRAIN", "DRAINED", "DRAINING", "ERROR", "FAIL", "FAILING", "FUTURE", "INVAL", "INVALID_REG", "MAINT"),
    *("MAINTENANCE", "NOT_RESPONDING", "NO_RESPOND", "PERFCTRS", "POWERED_DOWN", "POWERING_DOWN", "POWER_DOWN"),
    *("REBOOT_ISSUED", "REBOOT_REQUESTED", "RESERVED", "UNKNOWN", "BLOCKED"),
}
_GRES = re.compile(r"gpu(?::([^:()]+))??(?::(\d{1,9}))?(?:\([^()]*\))?")
_MIG = re.compile(r"\d+g\.\d+gb|(?:^|_)\dg(?:_|$)", re.IGNORECASE)


def read_slurm(data: Any, source: Text, *, with_busy: bool = False) -> Inventory:
    """Return what the output says about nodes. With ``with_busy``, GPUs of running jobs count as free.

    Raises:
        DocumentError: it has no list of nodes, or has wrong counts.
    """
    nodes = mapping(data).get("nodes")
    if not isinstance(nodes, list):
        keys = ", ".join(list(mapping(data))[:12]) or "nothing"
        raise single_problem(source.file, f"has no list of nodes, but {keys}: scontrol show nodes --json")
    problems: list[Problem] = []
    found = [
        _node(node, ("nodes", i), source, problems, with_busy) for i, node in enumerate(nodes) if isinstance(node, dict)
    ]
    return inventory(found, problems, ["Slurm does not say in which zone a node is"])


def _node(
    node: dict[str, Any], path: tuple[str | int, ...], source: Text, problems: list[Problem], with_busy: bool
) -> FoundNode:
    name = text(node.get("name")) or text(node.get("hostname"))
    if not name:
        problems.append(source.problem((*path, "name"), "is missing: a node has a name"))
    had = dict(_gres(node, "gres", path, source, problems))
    used = {} if with_busy else dict(_gres(node, "gres_used", path, source, problems))
    gpus, left_out = list[FoundGpus](), list[str]()
    unusable = _unusable(node)
    hints = tuple(sorted({*_words(node.get("features")), *_words(node.get("active_features"))}))[:32]
    # GPUs of jobs that asked for any type are counted without one; on a node with a single type it is clear which it
    # is.
    if UNTYPED in used and UNTYPED not in had and len(had) == 1:
        used[next(iter(had))] = used.get(next(iter(had)), 0) + used.pop(UNTYPED)
    if used.get(UNTYPED) and UNTYPED not in had and had:
        unusable = unusable or f"{used[UNTYPED]} are in use, and it does not say of which type"
    for product, count in had.items():
        busy = min(count, used.get(product, 0))
        if not count:
            continue
        if _MIG.search(product):
            left_out.append(parts_text(count, product))
            continue
        if busy:
            left_out.append(f"{counted(busy)} ({product}): in use by jobs")
        if count > busy and unusable:
            left_out.append(f"{counted(count - busy)} ({product}): {unusable}")
        elif count > busy:
            gpus.append(FoundGpus(product=product, count=count - busy, hints=hints))
    return FoundNode(name=name, gpus=tuple(gpus), left_out=tuple(left_out), where=source.problem(path, ""))


def _words(value: object) -> list[str]:
    """Return the features, which are a list now and were comma-separated text in earlier versions."""
    words = value.split(",") if isinstance(value, str) else [text(one) for one in listed(value)]
    return [word.strip()[:80] for word in words if word.strip()]


def _states(node: Mapping[str, Any]) -> set[str]:
    state = node.get("state")
    words = re.split(r"[+,\s]+", state) if isinstance(state, str) else [text(one) for one in listed(state)]
    return {word.strip("*~#!%$@^-").upper() for word in [*words, *map(text, listed(node.get("state_flags")))] if word}


def _unusable(node: Mapping[str, Any]) -> str:
    states = _states(node)
    wrong = sorted(states & _UNUSABLE)
    reason = " ".join(text(node.get("reason")).split())[:120]
    if wrong:
        return f"{some_of(wrong)}{f' ({reason})' if reason else ''}"
    return "ALLOCATED: none of its CPUs is free" if states & {"ALLOCATED", "ALLOC"} and "IDLE" not in states else ""


def _gres(
    node: Mapping[str, Any], which: str, path: tuple[str | int, ...], source: Text, problems: list[Problem]
) -> Iterator[tuple[str, int]]:
    """Yield type and count of all GPUs in ``gpu:a100:4(S:0-1),gpu:a40:2``, each type once."""
    counts: dict[str, int] = {}
    said = text(node.get(which))[:10_000].replace(":(null)", "")  # written for jobs that asked for any type
    for one in re.split(r",(?![^()]*\))", said):
        if not one.strip().startswith("gpu"):
            continue
        found = _GRES.fullmatch(one.strip())
        if found is None:
            problems.append(source.problem((*path, which), f"is {one.strip()[:60]!r}, expected gpu:TYPE:COUNT"))
            continue
        kind, number = found[1] or UNTYPED, found[2] or ("1" if which == "gres" else "0")
        counts[kind] = counts.get(kind, 0) + whole_number(number, (*path, which), source, problems)
    yield from counts.items()
