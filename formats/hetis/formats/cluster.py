"""Cluster files: nodes, GPUs, links. See ``examples/`` for samples."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from hetis.formats import cluster_checks, units
from hetis.formats.fields import (
    API_VERSION,
    BANDWIDTH_PATTERN,
    Bandwidth,
    DocumentPart,
    Duration,
    Flops,
    GpuName,
    Name,
    Size,
    Title,
    Usd,
)
from hetis.formats.loading import read_data, validated
from hetis.formats.positions import Text
from hetis.solver.cluster import Cluster, GpuSlots, GpuType, Link, Network, NodeGroup


class LinkPart(DocumentPart):
    """A connection; a message takes ``latency + bytes / bandwidth``."""

    bandwidth: Bandwidth
    latency: Duration

    def link(self) -> Link:
        return Link(bytes_per_s=self.bandwidth, latency_s=self.latency)


class NodeLinkPart(DocumentPart):
    """A connection of a node, or its bandwidth alone: ``400Gbps``.

    Unless given, the latency of ``nic`` is the network's, and that of ``link`` is 0.
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
    """Connections between all pairs of ``names``: symmetric, null where the default holds."""

    names: list[Name]
    bandwidth: list[list[Bandwidth | None]]
    latency: list[list[Duration | None]] | None = None


class ZonesPart(DocumentPart):
    """Links between zones: bandwidth and latency are those of a pair that is not listed."""

    bandwidth: Bandwidth | None = None
    latency: Duration | None = None
    links: list[PairPart] = Field(default_factory=list)
    matrix: MatrixPart | None = None


class NodeLinksPart(DocumentPart):
    """Links between single nodes, by their names (``r3090-0``)."""

    links: list[PairPart] = Field(default_factory=list)
    matrix: MatrixPart | None = None


class NetworkPart(LinkPart):
    """Bandwidth and latency between any two nodes of a zone, and of what differs from that."""

    zones: ZonesPart | None = None
    nodes: NodeLinksPart | None = None


class GpusPart(DocumentPart):
    """``count`` GPUs of one type in a node. ``usd_per_hour`` is the price of one, instead of the catalogue's."""

    type: GpuName
    count: Annotated[int, Field(ge=1, le=cluster_checks.MAX_GPUS_PER_NODE)] = 1
    usd_per_hour: Usd | None = None


class NodePart(DocumentPart):
    """A node, or with ``count`` so many equal nodes ``name-0``, ``name-1``, ...

    ``nic`` goes before the network's bandwidth and latency, ``link`` is GPU to GPU inside the node (default: NVLink or
    PCIe of the type), ``usd_per_hour`` the price of the whole node. ``indices`` are what the driver calls the GPUs, in
    the order of ``gpus``, if not 0, 1, ...; a plan counts from 0, its export has the driver's.
    """

    name: Name
    gpus: Annotated[list[GpusPart], Field(min_length=1)]
    count: Annotated[int, Field(ge=1, le=cluster_checks.MAX_GPUS)] | None = None
    zone: Name = "default"
    nic: NodeLinkPart | None = None
    link: NodeLinkPart | None = None
    usd_per_hour: Usd | None = None
    indices: list[Annotated[int, Field(ge=0, lt=cluster_checks.MAX_GPUS_PER_NODE)]] | None = None


class GpuTypePart(DocumentPart):
    """A GPU type that the catalogue lacks. Rates are peaks; links are one direction."""

    memory: Size
    memory_bandwidth: Bandwidth
    fp16: Flops
    fp8: Flops | None = None
    architecture: Title = "unknown"
    pcie: Bandwidth = 32e9
    nvlink: Bandwidth | None = None
    usd_per_hour: Usd | None = None


class ClusterDocument(DocumentPart):
    """A fleet of GPUs."""

    api_version: Annotated[Literal["hetis/v1"], Field(alias="apiVersion")]
    kind: Literal["Cluster"]
    name: Title
    nodes: Annotated[list[NodePart], Field(min_length=1)]
    network: NetworkPart
    gpu_types: Annotated[dict[Title, GpuTypePart], Field(default_factory=dict, max_length=1000)]


def load_cluster(path: str | os.PathLike[str]) -> Cluster:
    """Return the cluster in a YAML or JSON file (``-``: standard input). GPU aliases become catalogue names.

    Raises:
        DocumentError: with every problem of the file.
    """
    return parse_cluster(*read_data(path))


def parse_cluster(data: Any, source: Text) -> Cluster:
    """Return the cluster in a document's plain data.

    Raises:
        DocumentError: with every problem of the document.
    """
    inline = data.get("gpu_types") if isinstance(data, dict) else None
    context = {"gpu_types": inline if isinstance(inline, dict) else {}}
    return validated(
        ClusterDocument, data, source, to_value=_to_cluster, check=cluster_checks.check_cluster, context=context
    )


def cluster_to_data(cluster: Cluster, *, embed_gpu_types: bool = False) -> dict[str, Any]:
    """Return a cluster's document as plain data. Reading it again gives an equal cluster.

    Args:
        cluster: the fleet.
        embed_gpu_types: include every GPU type, so that the document means the same under another catalogue.
    """
    data: dict[str, Any] = {"apiVersion": API_VERSION, "kind": "Cluster", "name": cluster.name}
    data["nodes"] = [_node_data(group) for group in cluster.node_groups]
    data["network"] = _network_data(cluster.network)
    used = {slots.gpu for group in cluster.node_groups for slots in group.gpus}
    inline = {
        name: _gpu_type_data(gpu)
        for name, gpu in cluster.gpu_types.items()
        if embed_gpu_types or name not in used or gpu != _catalogue_gpus().get(name)
    }
    return data | ({"gpu_types": inline} if inline else {})


def _catalogue_gpus() -> dict[str, GpuType]:
    from hetis.formats import catalogue

    return {entry.gpu.name: entry.gpu for entry in catalogue.gpus()}


def _to_cluster(document: ClusterDocument) -> Cluster:
    inline = {name: _gpu_type(name, part) for name, part in document.gpu_types.items()}
    used = dict.fromkeys(gpus.type for node in document.nodes for gpus in node.gpus)
    known = _catalogue_gpus()
    cluster = Cluster(
        name=document.name,
        node_groups=tuple(_node_group(node, document.network) for node in document.nodes),
        gpu_types={name: known[name] for name in used if name not in inline} | inline,
        network=_network(document.network),
    )
    links = cluster.network.between_nodes.items()
    named = {(cluster.node_named(a), cluster.node_named(b)): link for (a, b), link in links}
    return replace(cluster, network=replace(cluster.network, between_nodes=named)) if named else cluster


def _gpu_type(name: str, part: GpuTypePart) -> GpuType:
    return GpuType(
        name=name,
        architecture=part.architecture,
        memory_bytes=part.memory,
        mem_bytes_per_s=part.memory_bandwidth,
        fp16_flops=part.fp16,
        fp8_flops=part.fp8,
        pcie_bytes_per_s=part.pcie,
        nvlink_bytes_per_s=part.nvlink,
        usd_per_hour=part.usd_per_hour,
    )


def _node_group(node: NodePart, network: NetworkPart) -> NodeGroup:
    num_gpus = sum(gpus.count for gpus in node.gpus)
    share = None if node.usd_per_hour is None else node.usd_per_hour / num_gpus
    return NodeGroup(
        name=node.name,
        gpus=tuple(
            GpuSlots(gpu=g.type, count=g.count, usd_per_hour=share if share is not None else g.usd_per_hour)
            for g in node.gpus
        ),
        count=node.count or 1,
        numbered=node.count is not None,
        zone=node.zone,
        nic=node.nic.link(network.latency) if node.nic else None,
        intra_link=node.link.link(0.0) if node.link else None,
        indices=tuple(node.indices or ()),
    )


def _network(part: NetworkPart) -> Network:
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
                yield (
                    (b, a),
                    Link(
                        bytes_per_s=default.bytes_per_s if bandwidth is None else bandwidth,
                        latency_s=default.latency_s if latency is None else latency,
                    ),
                )


def _link_data(link: Link) -> dict[str, Any]:
    return {"bandwidth": units.format_bandwidth(link.bytes_per_s), "latency": units.format_duration(link.latency_s)}


def _node_data(group: NodeGroup) -> dict[str, Any]:
    data: dict[str, Any] = {"name": group.name}
    if group.numbered:
        data["count"] = group.count
    if group.zone != "default":
        data["zone"] = group.zone
    data["gpus"] = [
        {"type": slots.gpu, "count": slots.count}
        | ({} if slots.usd_per_hour is None else {"usd_per_hour": slots.usd_per_hour})
        for slots in group.gpus
    ]
    if len(group.indices) == sum(slots.count for slots in group.gpus):
        data["indices"] = list(group.indices)
    if group.nic:
        data["nic"] = _link_data(group.nic)
    if group.intra_link:
        data["link"] = _link_data(group.intra_link)
    return data


def _network_data(network: Network) -> dict[str, Any]:
    def pairs(links: Mapping[tuple[str, str], Link]) -> dict[str, Any]:
        return {"links": [{"between": list(pair)} | _link_data(link) for pair, link in links.items()]} if links else {}

    zones = (_link_data(network.zone_default) if network.zone_default else {}) | pairs(network.between_zones)
    nodes = pairs(network.between_nodes)
    return _link_data(network.default) | ({"zones": zones} if zones else {}) | ({"nodes": nodes} if nodes else {})


def _gpu_type_data(gpu: GpuType) -> dict[str, Any]:
    data: dict[str, Any] = {
        "architecture": gpu.architecture,
        "memory": units.format_bytes(gpu.memory_bytes),
        "memory_bandwidth": units.format_bandwidth(gpu.mem_bytes_per_s),
        "fp16": units.format_flops(gpu.fp16_flops),
    }
    if gpu.fp8_flops is not None:
        data["fp8"] = units.format_flops(gpu.fp8_flops)
    data["pcie"] = units.format_bandwidth(gpu.pcie_bytes_per_s)
    if gpu.nvlink_bytes_per_s is not None:
        data["nvlink"] = units.format_bandwidth(gpu.nvlink_bytes_per_s)
    if gpu.usd_per_hour is not None:
        data["usd_per_hour"] = gpu.usd_per_hour
    return data
