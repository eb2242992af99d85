"""Checks across several fields of a cluster file.

These checks run on the raw data, whatever its shape, so that a file with a misspelt field *and* a duplicate node shows
both. Wrong types are reported elsewhere and ignored here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hetis.formats import catalogue
from hetis.formats.errors import did_you_mean, shown

MAX_GPUS = 10_000_000
MAX_GPUS_PER_NODE = 1024

Found = Iterator[tuple[tuple[str | int, ...], str]]


def check_cluster(data: Mapping[str, Any]) -> Found:
    """Yield problems with duplicate names, sizes, prices, and the zones and nodes of links, as (path, message)."""
    nodes = [(i, node) for i, node in enumerate(_list(data.get("nodes"))) if isinstance(node, dict)]
    yield from _check_names(nodes)
    yield from _check_gpus(nodes)
    network = _mapping(data.get("network"))
    zones, node_links = _mapping(network.get("zones")), _mapping(network.get("nodes"))
    if ("bandwidth" in zones) != ("latency" in zones):
        yield ("network", "zones"), "bandwidth and latency must be given together, or neither"
    names = _NodeNames(nodes)
    known_zones = dict.fromkeys(z for _, node in nodes if isinstance(z := node.get("zone", "default"), str))
    yield from _check_links(zones, ("network", "zones"), "zone", known_zones, known_zones)
    yield from _check_links(node_links, ("network", "nodes"), "node", names, names.suggestions())


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_GPUS else None


class _NodeNames:
    """The set of node names, without listing a million of them."""

    def __init__(self, nodes: list[tuple[int, dict[str, Any]]]) -> None:
        named = [(node["name"], node) for _, node in nodes if isinstance(node.get("name"), str)]
        self.single = {name for name, node in named if "count" not in node}
        self.counts = {name: count for name, node in named if (count := _count(node.get("count"))) is not None}

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        called = self.called(name)
        return called in self.single or self.group_of(called) is not None

    def called(self, name: str) -> str:
        """Return the cluster's name for the node: see `Cluster.node_named`."""
        return f"{name}-0" if self.counts.get(name) == 1 and self.group_of(name) is None else name

    def group_of(self, name: str) -> str | None:
        """Return the numbered group that ``name`` is a node of, or None."""
        match = re.fullmatch(r"(.+)-(0|[1-9][0-9]{0,7})", name)
        if match and int(match[2]) < self.counts.get(match[1], 0):
            return match[1]
        return None

    def suggestions(self) -> list[str]:
        some = [f"{name}-{i}" for name, count in self.counts.items() for i in range(min(count, 20))]
        return [*self.single, *some]


def _check_names(nodes: list[tuple[int, dict[str, Any]]]) -> Found:
    names, first = _NodeNames(nodes), dict[str, int]()
    for i, node in nodes:
        name = node.get("name")
        if not isinstance(name, str):
            continue
        group = names.group_of(name) if "count" not in node else None
        if name in first:
            yield ("nodes", i, "name"), f"duplicate node {shown(name)}, first at nodes[{first[name]}]"
        elif group is not None:
            yield ("nodes", i, "name"), f"duplicate node {shown(name)}: group {group!r} has a node of that name"
        first.setdefault(name, i)


def _check_gpus(nodes: list[tuple[int, dict[str, Any]]]) -> Found:
    total = 0
    for i, node in nodes:
        gpus = [g for g in _list(node.get("gpus")) if isinstance(g, dict)]
        per_node = sum(_count(g.get("count", 1)) or 0 for g in gpus)
        total += per_node * (_count(node.get("count", 1)) or 0)
        if per_node > MAX_GPUS_PER_NODE and all((_count(g.get("count", 1)) or 0) <= MAX_GPUS_PER_NODE for g in gpus):
            yield ("nodes", i, "gpus"), f"has {per_node} GPUs, a node has at most {MAX_GPUS_PER_NODE}"
        indices = [one for one in _list(node.get("indices")) if isinstance(one, int)]
        if "indices" in node and gpus and (len(indices) != per_node or len(set(indices)) < len(indices)):
            yield ("nodes", i, "indices"), f"names {len(set(indices))} different GPUs, the node has {per_node}"
        seen = set[str]()
        for j, slots in enumerate(_list(node.get("gpus"))):
            kind = slots.get("type") if isinstance(slots, dict) else None
            if isinstance(kind, str):
                name = _canonical(kind)
                if name in seen:
                    yield ("nodes", i, "gpus", j, "type"), f"{kind!r} is listed twice in one node, add up the counts"
                seen.add(name)
            if isinstance(slots, dict) and "usd_per_hour" in slots and "usd_per_hour" in node:
                message = "the node has a price already: give it per node or per GPU, not both"
                yield ("nodes", i, "gpus", j, "usd_per_hour"), message
    if total > MAX_GPUS:
        yield ("nodes",), f"has {total} GPUs, at most {MAX_GPUS} are supported"


def _canonical(gpu: str) -> str:
    """Return the catalogue's name of a GPU, so that two aliases of one type are recognised."""
    try:
        return catalogue.find_gpu(gpu).gpu.name
    except catalogue.UnknownNameError:
        return gpu


def _check_links(
    part: dict[str, Any], path: tuple[str, ...], what: str, known: Any, suggestions: Sequence[str] | dict[str, None]
) -> Found:
    """Check that names exist, no pair is given twice, and the matrix is square and symmetric."""

    def unknown(name: str) -> str:
        return f"unknown {what} {shown(name)}{did_you_mean(name, suggestions)}"

    def called(name: Any) -> Any:
        return known.called(name) if isinstance(known, _NodeNames) and isinstance(name, str) else name

    seen = dict[frozenset[str], str]()
    for i, link in enumerate(_list(part.get("links"))):
        between = [n for n in _list(_mapping(link).get("between")) if isinstance(n, str)]
        for j, name in enumerate(between):
            if name not in known:
                yield (*path, "links", i, "between", j), unknown(name)
        if len(between) != 2:
            continue
        between = [called(name) for name in between]
        if what == "node" and between[0] == between[1]:
            yield (*path, "links", i, "between"), f"links {what} {between[0]!r} with itself"
        if frozenset(between) in seen:
            yield (*path, "links", i, "between"), f"duplicate link, first at {seen[frozenset(between)]}"
        seen.setdefault(frozenset(between), f"links[{i}]")
    matrix = _mapping(part.get("matrix"))
    names = [called(name) for name in _list(matrix.get("names"))]
    first = dict[str, int]()
    for i, name in enumerate(names):
        if not isinstance(name, str):
            continue
        if name not in known:
            yield (*path, "matrix", "names", i), unknown(name)
        if first.setdefault(name, i) != i:
            yield (*path, "matrix", "names", i), f"duplicate {what} {shown(name)}"
    for pair, where in seen.items():
        if len(pair) == 2 and pair <= first.keys():
            earlier, later = sorted(pair, key=first.__getitem__)
            yield (*path, "matrix", "names", first[later]), f"{earlier} to {later} is given in {where} already"
    for field in ("bandwidth", "latency"):
        if isinstance(matrix.get(field), list):
            yield from _check_matrix(matrix[field], names, (*path, "matrix", field), diagonal=what == "zone")


def _check_matrix(rows: list[Any], names: list[Any], path: tuple[str, ...], *, diagonal: bool) -> Found:
    if len(rows) != len(names):
        yield path, f"has {len(rows)} rows, needs one for each of the {len(names)} names"
        return
    for i, row in enumerate(rows):
        if isinstance(row, list) and len(row) != len(names):
            yield (*path, i), f"has {len(row)} entries, needs one for each of the {len(names)} names"
            return
        if not isinstance(row, list):
            return
    for i, row in enumerate(rows):
        if not diagonal and row[i] is not None and row[i] != 0:
            yield (*path, i, i), f"is {shown(row[i])}, a node has no link with itself: write null"
        for j in range(i):
            if row[j] != rows[j][i]:
                back = f"{shown(rows[j][i])} the other way ({names[j]} to {names[i]})"
                message = f"is {shown(row[j])}, but {back}; must be equal"
                yield (*path, i, j), message
