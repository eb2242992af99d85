"""The network in a cluster file: links between nodes and zones."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from hetis.formats import units
from hetis.formats.errors import did_you_mean, shown
from hetis.formats.fields import BANDWIDTH_PATTERN, Bandwidth, DocumentPart, Duration, Found, Name, listed, mapping
from hetis.solver.cluster import Link, Network


class LinkPart(DocumentPart):
    """A connection; a message takes ``latency + bytes / bandwidth``."""

    bandwidth: Bandwidth
    latency: Duration

    def link(self) -> Link:
        return Link(bytes_per_s=self.bandwidth, latency_s=self.latency)


class NodeLinkPart(DocumentPart):
    """A connection of a node, or only its bandwidth: ``400Gbps``.

    The default latency of ``nic`` is that of the network, the default latency of ``link`` is 0.
    """

    bandwidth: Bandwidth
    latency: Duration | None = None

    @model_validator(mode="before")
    @classmethod
    def _bandwidth_alone(cls, data: Any) -> Any:
        return {"bandwidth": data} if isinstance(data, str | int | float) else data

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler.resolve_ref_schema(handler(core))
        schema.update(type=["object", "string"], pattern=BANDWIDTH_PATTERN, examples=["400Gbps"])
        return schema

    def link(self, default_latency_s: float) -> Link:
        return Link(bytes_per_s=self.bandwidth, latency_s=default_latency_s if self.latency is None else self.latency)


class PairPart(LinkPart):
    """The connection between two zones or nodes, in both directions."""

    between: Annotated[list[Name], Field(min_length=2, max_length=2)]


class MatrixPart(DocumentPart):
    """Connections between all pairs of ``names``. The matrix is symmetric; null means the default."""

    names: list[Name]
    bandwidth: list[list[Bandwidth | None]]
    latency: list[list[Duration | None]] | None = None


class ZonesPart(DocumentPart):
    """Links between zones. ``bandwidth`` and ``latency`` apply to pairs that are not listed."""

    bandwidth: Bandwidth | None = None
    latency: Duration | None = None
    links: list[PairPart] = Field(default_factory=list)
    matrix: MatrixPart | None = None


class NodeLinksPart(DocumentPart):
    """Links between single nodes, by their names (``r3090-0``)."""

    links: list[PairPart] = Field(default_factory=list)
    matrix: MatrixPart | None = None


class NetworkPart(LinkPart):
    """Bandwidth and latency between any two nodes of a zone, and the exceptions to them."""

    zones: ZonesPart | None = None
    nodes: NodeLinksPart | None = None


def network_of(part: NetworkPart) -> Network:
    default, zones, nodes = part.link(), part.zones, part.nodes
    zone_default = None
    if zones and zones.bandwidth is not None and zones.latency is not None:
        zone_default = Link(bytes_per_s=zones.bandwidth, latency_s=zones.latency)
    return Network(
        default=default,
        zone_default=zone_default,
        between_zones=dict(_pairs(zones.links, zones.matrix, default, zone_default or default)) if zones else {},
        between_nodes=dict(_pairs(nodes.links, nodes.matrix, default, default)) if nodes else {},
    )


def _pairs(
    links: list[PairPart], matrix: MatrixPart | None, inside: Link, between: Link
) -> Iterator[tuple[tuple[str, str], Link]]:
    """Yield explicit pairs. Gaps in a matrix are filled from ``inside`` on its diagonal and ``between`` off it."""
    for pair in links:
        yield (pair.between[0], pair.between[1]), pair.link()
    if matrix is None:
        return
    for i, a in enumerate(matrix.names):
        for j, b in enumerate(matrix.names[: i + 1]):
            bandwidth = matrix.bandwidth[i][j]
            latency = matrix.latency[i][j] if matrix.latency else None
            default = inside if i == j else between
            if bandwidth is not None or latency is not None:
                bytes_per_s = default.bytes_per_s if bandwidth is None else bandwidth
                yield (b, a), Link(bytes_per_s=bytes_per_s, latency_s=default.latency_s if latency is None else latency)


def link_data(link: Link) -> dict[str, Any]:
    return {"bandwidth": units.format_bandwidth(link.bytes_per_s), "latency": units.format_duration(link.latency_s)}


def network_data(network: Network) -> dict[str, Any]:
    def pairs(links: Mapping[tuple[str, str], Link]) -> dict[str, Any]:
        return {"links": [{"between": list(pair)} | link_data(link) for pair, link in links.items()]} if links else {}

    zones = (link_data(network.zone_default) if network.zone_default else {}) | pairs(network.between_zones)
    nodes = pairs(network.between_nodes)
    return link_data(network.default) | ({"zones": zones} if zones else {}) | ({"nodes": nodes} if nodes else {})


def check_links(
    part: dict[str, Any], path: tuple[str, ...], what: str, known: Container[str],
    suggestions: Sequence[str] | dict[str, None], called: Callable[[str], str] = str,
) -> Found:  # fmt: skip
    """Check that names exist, no pair is given twice, and the matrix is square and symmetric. ``called`` returns the
    name that one of several spellings stands for.
    """

    def unknown(name: str) -> str:
        return f"unknown {what} {shown(name)}{did_you_mean(name, suggestions)}"

    seen = dict[frozenset[str], str]()
    for i, link in enumerate(listed(part.get("links"))):
        between = [n for n in listed(mapping(link).get("between")) if isinstance(n, str)]
        for j, name in enumerate(between):
            if name not in known:
                yield (*path, "links", i, "between", j), unknown(name)
        if len(between) != 2:
            continue
        between = [called(name) for name in between]
        if what == "node" and between[0] == between[1]:
            yield (*path, "links", i, "between"), f"links {what} {between[0]!r} to itself"
        if frozenset(between) in seen:
            yield (*path, "links", i, "between"), f"duplicate link, first at {seen[frozenset(between)]}"
        seen.setdefault(frozenset(between), f"links[{i}]")
    matrix = mapping(part.get("matrix"))
    names = [called(name) if isinstance(name, str) else name for name in listed(matrix.get("names"))]
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
            yield (*path, "matrix", "names", first[later]), f"{earlier} to {later} is already given in {where}"
    for field in ("bandwidth", "latency"):
        if isinstance(matrix.get(field), list):
            yield from _check_matrix(matrix[field], names, (*path, "matrix", field), diagonal=what == "zone")


def _check_matrix(rows: list[Any], names: list[Any], path: tuple[str, ...], *, diagonal: bool) -> Found:
    if len(rows) != len(names):
        yield path, f"has {len(rows)} rows, needs one for each of the {len(names)} names"
        return
    for i, row in enumerate(rows):
        if not isinstance(row, list):
            return
        if len(row) != len(names):
            yield (*path, i), f"has {len(row)} entries, needs one for each of the {len(names)} names"
            return
    for i, row in enumerate(rows):
        if not diagonal and row[i] is not None and row[i] != 0:
            yield (*path, i, i), f"is {shown(row[i])}, but a node has no link to itself: write null"
        for j in range(i):
            if row[j] != rows[j][i]:
                back = f"{shown(rows[j][i])} the other way ({names[j]} to {names[i]})"
                yield (*path, i, j), f"is {shown(row[j])}, but {back}; must be equal"
