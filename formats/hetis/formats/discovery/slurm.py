"""Nodes of Slurm: ``scontrol show nodes`` as text and as JSON, and ``sinfo -N`` with a column of GRES.

``sinfo --json`` is not read: its rows are groups of nodes.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from hetis.formats.discovery.found import (
    FoundGpus,
    FoundNode,
    Inventory,
    counted,
    inventory,
    parts_text,
    some_of,
    text,
    whole_number,
)
from hetis.formats.errors import Problem, single_problem
from hetis.formats.fields import entries, listed, mapping
from hetis.formats.positions import Text

MAX_ROWS = 100_000
UNTYPED = "gpu"
"""The product name of GPUs to which gres.conf gives no type."""

# States and flags in which nothing can start (schedmd.com/scontrol.html, "State").
_UNUSABLE = {
    *("DOWN", "DRAIN", "DRAINED", "DRAINING", "ERROR", "FAIL", "FAILING", "FUTURE", "INVAL", "INVALID_REG", "MAINT"),
    *("MAINTENANCE", "NOT_RESPONDING", "NO_RESPOND", "PERFCTRS", "POWERED_DOWN", "POWERING_DOWN", "POWER_DOWN"),
    *("REBOOT_ISSUED", "REBOOT_REQUESTED", "RESERVED", "UNKNOWN", "BLOCKED"),
}
_GRES = re.compile(r"gpu(?::([^:()]+))??(?::(\d{1,9}))?(?:\([^()]*\))?")
# NVML names a slice of a card a100_3g.20gb, or nvidia_a100_80gb_pcie_1g.10gb; an administrator perhaps 1g.10gb.
_MIG = re.compile(r"(?:(?P<card>.*?)[_-])?(?P<part>\dg(?:\.\d{1,3}gb)?(?:[.+-]\w+)*)", re.IGNORECASE)


def read_slurm(data: Any, source: Text, *, with_busy: bool = False) -> Inventory:
    """Return the nodes in the output. With ``with_busy``, GPUs of running jobs count as free. Raises DocumentError if
    it has no list of nodes, or has wrong counts.
    """
    nodes = mapping(data).get("nodes")
    if not isinstance(nodes, list):
        keys = ", ".join(list(mapping(data))[:12]) or "nothing"
        raise single_problem(source.file, f"has no list of nodes, but {keys}: scontrol show nodes --json")
    problems: list[Problem] = []
    found = [_slurm_node(node, ("nodes", i), source, problems, with_busy) for i, node in entries(nodes)]
    return inventory(found, problems, ["Slurm does not report the zone of a node"])


def is_slurm_text(written: str) -> bool:
    """Return whether a text is the output of ``scontrol show nodes`` without ``--json``, or of ``sinfo`` with GRES."""
    return written.lstrip().startswith("NodeName=") or _columns_of_sinfo(written) is not None


def slurm_nodes(written: str) -> dict[str, Any]:
    """Return the nodes of ``scontrol show nodes`` or of ``sinfo`` as ``--json`` has them.

    GPUs in use are in ``AllocTRES``, or by type in ``GresUsed``, which ``-d`` adds.
    """
    if (columns := _columns_of_sinfo(written)) is not None:
        return {"nodes": list({node["name"]: node for node in _of_sinfo(written, columns)}.values())}
    nodes = list[dict[str, Any]]()
    for record in re.split(r"(?m)^(?=NodeName=)", written.lstrip())[1 : MAX_ROWS + 1]:
        fields = dict(found.split("=", 1) for found in re.findall(r"(?:^|(?<=\s))[A-Za-z:/_]+=[^\s]*", record))
        of_jobs = re.findall(r"gres/gpu(?::([^,=]+))?=(\d+)", fields.get("AllocTRES", ""))
        typed = [f"gpu:{kind}:{count}" for kind, count in of_jobs if kind]
        used = typed or [f"gpu:{count}" for _, count in of_jobs]
        nodes.append(
            {
                "name": fields.get("NodeName"),
                "gres": fields.get("Gres", "").replace("(null)", ""),
                "gres_used": fields.get("GresUsed") or ",".join(used),
                "state": fields.get("State"),
                "features": fields.get("AvailableFeatures", "").replace("(null)", ""),
                "active_features": fields.get("ActiveFeatures", "").replace("(null)", ""),
                "reason": fields.get("Reason"),
            }
        )
    return {"nodes": nodes}


def _slurm_node(
    node: dict[str, Any], path: tuple[str | int, ...], source: Text, problems: list[Problem], with_busy: bool
) -> FoundNode:
    name = text(node.get("name")) or text(node.get("hostname"))
    if not name:
        problems.append(source.problem((*path, "name"), "is missing: every node needs a name"))
    had = dict(_gres(node, "gres", path, source, problems))
    used = {} if with_busy else dict(_gres(node, "gres_used", path, source, problems))
    gpus, left_out = list[FoundGpus](), list[str]()
    unusable = _unusable(node)
    hints = tuple(sorted({*_words(node.get("features")), *_words(node.get("active_features"))}))[:32]
    # GPUs of jobs that requested any type are counted without one; on a node with a single type it is clear which it
    # is.
    if UNTYPED in used and UNTYPED not in had and len(had) == 1:
        used[next(iter(had))] = used.get(next(iter(had)), 0) + used.pop(UNTYPED)
    if used.get(UNTYPED) and UNTYPED not in had and had:
        unusable = unusable or f"{used[UNTYPED]} are in use, but not reported by type"
    for product, count in had.items():
        busy = min(count, used.get(product, 0))
        if not count:
            continue
        part = _MIG.fullmatch(product)
        if part and "." not in part["part"]:
            left_out.append(parts_text(count, product))
            continue
        if busy:
            left_out.append(f"{counted(busy)} ({product}): in use by jobs")
        if count > busy and unusable:
            left_out.append(f"{counted(count - busy)} ({product}): {unusable}")
        elif count > busy and part:
            gpus.append(FoundGpus(product=part["card"] or UNTYPED, count=count - busy, hints=hints, part=part["part"]))
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
    said = text(node.get(which))[:10_000].replace(":(null)", "")  # written for jobs that requested any type
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


_SINFO = {
    "NODELIST": "name", "HOSTNAMES": "name", "GRES": "gres", "GRES_USED": "gres_used", "STATE": "state",
    "AVAIL_FEATURES": "features", "REASON": "reason",
}  # fmt: skip


def _columns_of_sinfo(written: str) -> list[str] | None:
    """Return the fields in the columns of the output of ``sinfo``; None if it has none of nodes or of GRES."""
    fields = [_SINFO.get(word, word) for word in re.split(r"[|\s]+", written.lstrip().partition("\n")[0].strip())]
    return fields if {"name", "gres"} <= set(fields) else None


def _of_sinfo(written: str, columns: list[str]) -> Iterator[dict[str, Any]]:
    for line in written.lstrip().splitlines()[1 : MAX_ROWS + 1]:
        found = dict(zip(columns, re.split(r"\s*\|\s*|\s+", line.strip()), strict=False))
        found = {name: "" if value == "(null)" else value for name, value in found.items()}
        state = found.get("state", "").strip("*~#!%$@^-").lower()
        for name in hosts_of(found.get("name", "")):
            yield found | {"name": name, "state": _STATES.get(state, state)}


# In sinfo's short words; a GPU may be free where all CPUs are allocated, which it does not tell apart.
_STATES = {"alloc": "MIXED", "mix": "MIXED", "maint": "MAINT", "drng": "DRAINING", "drain": "DRAINED", "comp": "IDLE"}


def hosts_of(ranges: str) -> list[str]:
    """Return the names in Slurm's list of hosts: ``gpu[01-03,7],login``."""
    found = list[str]()
    for one in re.split(r",(?![^\[]*\])", ranges):
        begin, bracket, inside = one.partition("[")
        numbers, _, end = inside.partition("]")
        for part in numbers.split(",") if bracket else ():
            low, dash, high = part.partition("-")
            if low.isdecimal() and (not dash or high.isdecimal()):
                last = min(int(high or low), int(low) + MAX_ROWS)
                found += (f"{begin}{number:0{len(low)}}{end}" for number in range(int(low), last + 1))
        found += () if bracket else (one,)
    return list(itertools.islice(found, MAX_ROWS))
