"""Cluster files: nodes, GPUs, links. See ``examples/`` for samples."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from hetis.formats import catalogue, units
from hetis.formats.errors import shown
from hetis.formats.fields import (
    API_VERSION,
    Bandwidth,
    Document,
    DocumentPart,
    Flops,
    Found,
    GpuName,
    Name,
    Reserved,
    Size,
    Title,
    Usd,
    entries,
    listed,
    mapping,
    present,
    whole,
)
from hetis.formats.kinds import Kind, validated
from hetis.formats.network import NetworkPart, NodeLinkPart, check_links, link_data, network_data, network_of
from hetis.formats.positions import Text
from hetis.solver.cluster import Cluster, GpuSlots, GpuType, NodeGroup

MAX_GPUS = 10_000_000
MAX_GPUS_PER_NODE = 1024


_RESOURCE = re.compile(r"[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?/[A-Za-z0-9]([-._A-Za-z0-9]{0,61}[A-Za-z0-9])?")


def _resource(value: str) -> str:
    if not _RESOURCE.fullmatch(value):
        raise ValueError(f"{shown(value)} is not a resource of Kubernetes, such as nvidia.com/gpu.shared")
    return value


class GpusPart(DocumentPart):
    """``count`` GPUs of one type in a node. ``usd_per_hour`` is the price of one GPU and overrides the catalogue's.
    ``reserved`` is the memory of each that others hold, such as a desktop, as bytes or a share of the type's: engines
    are planned and started beside it. Of several in a node, state the largest.
    """

    type: GpuName
    count: Annotated[int, Field(ge=1, le=MAX_GPUS_PER_NODE)] = 1
    usd_per_hour: Usd | None = None
    reserved: Reserved = 0


class NodePart(DocumentPart):
    """A node, or with ``count`` a group of equal nodes ``name-0``, ``name-1``, ...

    ``nic`` overrides the network's bandwidth and latency, ``link`` connects the GPUs inside the node (default: NVLink
    or PCIe of the type), and ``usd_per_hour`` is the price of the whole node. ``indices`` are the driver's numbers of
    the GPUs in the order of ``gpus``, if they are not 0, 1, ...; names of GPUs have them: ``gpu-1/3`` is the GPU that
    the driver of node ``gpu-1`` counts as 3. ``resource`` is the one by which pods request the GPUs in Kubernetes, if
    it is not the usual one of their vendor's device plugin: ``nvidia.com/gpu.shared``.
    """

    name: Name
    gpus: Annotated[list[GpusPart], Field(min_length=1)]
    count: Annotated[int, Field(ge=1, le=MAX_GPUS)] | None = None
    zone: Name = "default"
    nic: NodeLinkPart | None = None
    link: NodeLinkPart | None = None
    usd_per_hour: Usd | None = None
    indices: list[Annotated[int, Field(ge=0, lt=MAX_GPUS_PER_NODE)]] | None = None
    resource: Annotated[str, AfterValidator(_resource)] | None = None


class GpuTypePart(DocumentPart):
    """A GPU type that the catalogue lacks. Rates are peak rates; links are per direction. A replica of an engine, and
    the KV that it exchanges, stays on GPUs of one `vendor`. Default: the vendor that makes GPUs of this `architecture`,
    or NVIDIA.
    """

    memory: Size
    memory_bandwidth: Bandwidth
    fp16: Flops
    fp8: Flops | None = None
    architecture: Title = "unknown"
    vendor: Title | None = None
    pcie: Annotated[Bandwidth, Field(json_schema_extra={"default": "32GB/s"})] = 32e9
    nvlink: Bandwidth | None = None
    usd_per_hour: Usd | None = None


class ClusterDocument(Document):
    """A fleet of GPUs."""

    kind: Literal["Cluster"]
    name: Title
    nodes: Annotated[list[NodePart], Field(min_length=1)]
    network: NetworkPart
    gpu_types: Annotated[dict[Title, GpuTypePart], Field(default_factory=dict, max_length=1000)]


def parse_cluster(data: Any, source: Text) -> Cluster:
    """Return the cluster in plain data, GPU aliases as catalogue names. Raises DocumentError with every problem."""
    context = {"gpu_types": mapping(mapping(data).get("gpu_types"))}
    return validated(ClusterDocument, data, source, to_value=_to_cluster, check=_check, context=context)


def cluster_to_data(cluster: Cluster, *, embed_gpu_types: bool = False) -> dict[str, Any]:
    """Return a cluster's document as plain data. Reading it again gives an equal cluster.
    With ``embed_gpu_types`` it contains every GPU type, and so means the same under another catalogue.
    """
    used, known = {slots.gpu for group in cluster.node_groups for slots in group.gpus}, catalogue.gpu_types()
    inline = {
        name: _gpu_type_data(gpu)
        for name, gpu in cluster.gpu_types.items()
        if embed_gpu_types or name not in used or gpu != known.get(name)
    }
    return present(
        {
            "apiVersion": API_VERSION,
            "kind": "Cluster",
            "name": cluster.name,
            "nodes": [_node_data(group) for group in cluster.node_groups],
            "network": network_data(cluster.network),
            "gpu_types": inline or None,
        }
    )


CLUSTER = Kind(document=ClusterDocument, value=Cluster, parse=parse_cluster, to_data=cluster_to_data)
load_cluster = CLUSTER.load


def _to_cluster(document: ClusterDocument) -> Cluster:
    inline = {name: _gpu_type(name, part) for name, part in document.gpu_types.items()}
    used = dict.fromkeys(gpus.type for node in document.nodes for gpus in node.gpus)
    known = catalogue.gpu_types()
    types = {name: known[name] for name in used if name not in inline} | inline
    cluster = Cluster(
        name=document.name,
        node_groups=tuple(_node_group(node, document.network, types) for node in document.nodes),
        gpu_types=types,
        network=network_of(document.network),
    )
    links = cluster.network.between_nodes.items()
    named = {(cluster.node_named(a), cluster.node_named(b)): link for (a, b), link in links}
    return replace(cluster, network=replace(cluster.network, between_nodes=named)) if named else cluster


# Fields of a GPU type: ours, the solver's, and the text of a quantity.
_GPU_FIELDS: tuple[tuple[str, str, Callable[[Any], Any]], ...] = (
    ("architecture", "architecture", str),
    ("memory", "memory_bytes", units.format_bytes),
    ("memory_bandwidth", "mem_bytes_per_s", units.format_bandwidth),
    ("fp16", "fp16_flops", units.format_flops),
    ("fp8", "fp8_flops", units.format_flops),
    ("pcie", "pcie_bytes_per_s", units.format_bandwidth),
    ("nvlink", "nvlink_bytes_per_s", units.format_bandwidth),
    ("usd_per_hour", "usd_per_hour", lambda usd: usd),
)


def _gpu_type(name: str, part: GpuTypePart) -> GpuType:
    fields = {theirs: getattr(part, ours) for ours, theirs, _ in _GPU_FIELDS}
    fields["architecture"] = catalogue.architecture_of(name, part.architecture)
    vendor = catalogue.vendor_of(part.architecture) if part.vendor is None else catalogue.vendor_named(part.vendor)
    return GpuType(name=name, vendor=vendor, **fields)


def _gpu_type_data(gpu: GpuType) -> dict[str, Any]:
    given = ((ours, getattr(gpu, theirs), text) for ours, theirs, text in _GPU_FIELDS)
    data = {name: text(value) for name, value, text in given if value is not None}
    return data if gpu.vendor == catalogue.vendor_of(gpu.architecture) else data | {"vendor": gpu.vendor}


def _node_group(node: NodePart, network: NetworkPart, types: Mapping[str, GpuType]) -> NodeGroup:
    share = None if node.usd_per_hour is None else node.usd_per_hour / sum(gpus.count for gpus in node.gpus)
    prices = [g.usd_per_hour if share is None else share for g in node.gpus]
    slots = zip(node.gpus, prices, strict=True)
    return NodeGroup(
        name=node.name,
        gpus=tuple(
            GpuSlots(
                gpu=g.type,
                count=g.count,
                usd_per_hour=price,
                reserved_bytes=_reserved_bytes(g.reserved, types[g.type].memory_bytes),
            )
            for g, price in slots
        ),
        count=node.count or 1,
        numbered=node.count is not None,
        zone=node.zone,
        nic=node.nic.link(network.latency) if node.nic else None,
        intra_link=node.link.link(0.0) if node.link else None,
        indices=tuple(node.indices or ()),
        resource=node.resource or "",
    )


def _reserved_bytes(reserved: float, memory_bytes: int) -> int:
    return reserved if isinstance(reserved, int) else round(reserved * memory_bytes)


def _slots_data(slots: GpuSlots) -> dict[str, Any]:
    reserved = units.format_bytes(slots.reserved_bytes) if slots.reserved_bytes else None
    return present({"type": slots.gpu, "count": slots.count, "usd_per_hour": slots.usd_per_hour, "reserved": reserved})


def _node_data(group: NodeGroup) -> dict[str, Any]:
    return present(
        {
            "name": group.name,
            "count": group.count if group.numbered else None,
            "zone": group.zone if group.zone != "default" else None,
            "gpus": [_slots_data(slots) for slots in group.gpus],
            "indices": list(group.indices) or None,
            "resource": group.resource or None,
            "nic": group.nic and link_data(group.nic),
            "link": group.intra_link and link_data(group.intra_link),
        }
    )


def _check(data: Mapping[str, Any]) -> Found:
    """Yield problems with duplicate names, sizes, prices, and the zones and nodes of links, as (path, message)."""
    nodes = entries(data.get("nodes"))
    yield from _check_names(nodes)
    yield from _check_gpus(nodes)
    yield from _check_reserved(nodes, mapping(data.get("gpu_types")))
    network = mapping(data.get("network"))
    zones, node_links = mapping(network.get("zones")), mapping(network.get("nodes"))
    if ("bandwidth" in zones) != ("latency" in zones):
        yield ("network", "zones"), "bandwidth and latency must be given together, or neither"
    names = _NodeNames(nodes)
    known_zones = dict.fromkeys(z for _, node in nodes if isinstance(z := node.get("zone", "default"), str))
    yield from check_links(zones, ("network", "zones"), "zone", known_zones, known_zones)
    yield from check_links(node_links, ("network", "nodes"), "node", names, names.suggestions(), names.called)


def _count(value: object) -> int | None:
    return whole(value, most=MAX_GPUS)


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
        return match[1] if match and int(match[2]) < self.counts.get(match[1], 0) else None

    def suggestions(self) -> list[str]:
        return [*self.single, *(f"{name}-{i}" for name, count in self.counts.items() for i in range(min(count, 20)))]


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
        gpus = [g for g in listed(node.get("gpus")) if isinstance(g, dict)]
        per_node = sum(_count(g.get("count", 1)) or 0 for g in gpus)
        total += per_node * (_count(node.get("count", 1)) or 0)
        if per_node > MAX_GPUS_PER_NODE and all((_count(g.get("count", 1)) or 0) <= MAX_GPUS_PER_NODE for g in gpus):
            yield ("nodes", i, "gpus"), f"has {per_node} GPUs, a node has at most {MAX_GPUS_PER_NODE}"
        indices = [one for one in listed(node.get("indices")) if isinstance(one, int)]
        if "indices" in node and gpus and (len(indices) != per_node or len(set(indices)) < len(indices)):
            yield ("nodes", i, "indices"), f"lists {len(set(indices))} different GPUs, the node has {per_node}"
        seen = set[str]()
        for j, slots in enumerate(listed(node.get("gpus"))):
            kind = slots.get("type") if isinstance(slots, dict) else None
            if isinstance(kind, str):
                name = catalogue.gpu_name(kind)  # so that two aliases of one type are recognised
                if name in seen:
                    yield ("nodes", i, "gpus", j, "type"), f"{kind!r} is listed twice in one node, add up the counts"
                seen.add(name)
            if isinstance(slots, dict) and "usd_per_hour" in slots and "usd_per_hour" in node:
                twice = "the node already has a price: give it per node or per GPU, not both"
                yield ("nodes", i, "gpus", j, "usd_per_hour"), twice
    if total > MAX_GPUS:
        yield ("nodes",), f"has {total} GPUs, at most {MAX_GPUS} are supported"


def _check_reserved(nodes: list[tuple[int, dict[str, Any]]], own: dict[str, Any]) -> Found:
    """Yield GPUs of which others hold all memory."""
    reserved, size = TypeAdapter[float](Reserved), TypeAdapter[int](Size)
    for i, node in nodes:
        for j, slots in entries(node.get("gpus")):
            name = slots.get("type")
            if "reserved" not in slots or not isinstance(name, str):
                continue
            name = name if name in own else catalogue.gpu_name(name)
            try:
                held = reserved.validate_python(slots["reserved"])
                known = catalogue.gpu_types().get(name) if name not in own else None
                memory = known.memory_bytes if known else size.validate_python(mapping(own.get(name)).get("memory"))
            except ValidationError:  # reported where the value is
                continue
            if _reserved_bytes(held, memory) >= memory:
                text = units.format_bytes(memory)
                yield ("nodes", i, "gpus", j, "reserved"), f"is {shown(slots['reserved'])}, a {name} has {text}"
