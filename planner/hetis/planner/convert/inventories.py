"""The inventory: what agents found, compared with the cluster's document."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from hetis.formats import catalogue
from hetis.formats.cluster import cluster_to_data
from hetis.planner.convert import documents
from hetis.solver.cluster import Cluster, GpuSlots, GpuType, Network, NodeGroup
from hetis.v1 import cluster_pb2, document_pb2, inventory_pb2

MAX_DIFFERENCES = 10_000  # more would not fit into one message
# Drivers reserve some memory, and cards are sold in rounded sizes: an L4 of 24 GiB shows 22.5, a T4 of 16 GiB 14.8.
_LEAST_MEMORY_RATIO = 0.9

Kind = cluster_pb2.InventoryDifferenceKind


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundNode:
    """A node whose agent is connected. ``unhealthy``: why the devices with these indices cannot be used."""

    inventory: inventory_pb2.NodeInventory
    unhealthy: Mapping[int, str]


def inventory_message(
    cluster: str, declared: Cluster, found: Mapping[str, FoundNode], *, cluster_etag: str
) -> cluster_pb2.Inventory:
    """Return the found inventory and its differences from the declared one, at most 10,000.

    Args:
        cluster: ``clusters/{cluster}``.
        declared: the content of its document.
        found: connected nodes by id.
        cluster_etag: of the cluster that has the document.
    """
    return cluster_pb2.Inventory(
        name=f"{cluster}/inventory",
        found=_found_document(declared, found),
        differences=itertools.islice(differences(declared, found), MAX_DIFFERENCES),
        cluster_etag=cluster_etag,
    )


def differences(declared: Cluster, found: Mapping[str, FoundNode]) -> Iterator[cluster_pb2.InventoryDifference]:
    """Yield every difference in the order of the document; nodes that it does not name come last."""
    known = set[str]()
    for group, node in _nodes(declared):
        if node not in found:
            yield _difference(
                Kind.INVENTORY_DIFFERENCE_KIND_NODE_MISSING, node, "is declared, but no agent of it is connected"
            )
            continue
        known.add(node)
        yield from _device_differences(node, _gpus_of(group), found[node], declared.gpu_types)
    for node in sorted(found.keys() - known):
        num_gpus = len(found[node].inventory.devices)
        message = f"is connected with {num_gpus} GPUs, but not declared"
        yield _difference(Kind.INVENTORY_DIFFERENCE_KIND_NODE_UNDECLARED, node, message)


def _device_differences(
    node: str, declared: Sequence[str], found: FoundNode, gpu_types: Mapping[str, GpuType]
) -> Iterator[cluster_pb2.InventoryDifference]:
    devices = {device.index: device for device in found.inventory.devices}
    for index in sorted(range(len(declared)) | devices.keys() if devices else range(len(declared))):
        device, gpu = devices.get(index), declared[index] if index < len(declared) else None
        if device is None:
            message = f"is declared as {gpu}, but was not found"
            yield _difference(Kind.INVENTORY_DIFFERENCE_KIND_DEVICE_MISSING, node, message, index)
        elif gpu is None:
            message = f"was found as {_title(device)}, but is not declared"
            yield _difference(Kind.INVENTORY_DIFFERENCE_KIND_DEVICE_UNDECLARED, node, message, index)
        elif device.gpu_type != gpu:
            message = f"is declared as {gpu}, but was found as {_title(device)}"
            yield _difference(Kind.INVENTORY_DIFFERENCE_KIND_DEVICE_TYPE, node, message, index)
        elif 0 < device.memory_bytes < _LEAST_MEMORY_RATIO * gpu_types[gpu].memory_bytes:
            message = f"has {device.memory_bytes} bytes of memory, a {gpu} has {gpu_types[gpu].memory_bytes}"
            yield _difference(Kind.INVENTORY_DIFFERENCE_KIND_DEVICE_MEMORY, node, message, index)
        if device is not None and (why := found.unhealthy.get(index)):
            message = f"cannot be used: {why}"
            yield _difference(Kind.INVENTORY_DIFFERENCE_KIND_DEVICE_UNHEALTHY, node, message, index)


def _difference(
    kind: Kind.ValueType, node: str, message: str, index: int | None = None
) -> cluster_pb2.InventoryDifference:
    device = "" if index is None else f"{node}/{index}"
    return cluster_pb2.InventoryDifference(kind=kind, node=node, device=device, message=f"{device or node} {message}")


def _title(device: inventory_pb2.GpuDevice) -> str:
    return device.gpu_type or device.product_name or "an unknown device"


def _nodes(cluster: Cluster) -> Iterator[tuple[NodeGroup, str]]:
    for group in cluster.node_groups:
        for index in range(group.count):
            yield group, group.node_name(index)


def _gpus_of(group: NodeGroup) -> list[str]:
    """Return the GPU types of a node by device index."""
    return [slots.gpu for slots in group.gpus for _ in range(slots.count)]


def _found_document(declared: Cluster, found: Mapping[str, FoundNode]) -> document_pb2.Document:
    types = {entry.gpu.name: entry.gpu for entry in catalogue.gpus()} | dict(declared.gpu_types)
    groups = list(_found_groups(declared, found, types))
    names = {group.node_name(index) for group in groups for index in range(group.count)}
    value = Cluster(
        name=declared.name,
        node_groups=tuple(groups),
        gpu_types={slots.gpu: types[slots.gpu] for group in groups for slots in group.gpus},
        network=_network_of(declared.network, names, {group.zone for group in groups}),
    )
    return documents.document_from_data(cluster_to_data(value, embed_gpu_types=True), "Cluster")


def _found_groups(
    declared: Cluster, found: Mapping[str, FoundNode], types: Mapping[str, GpuType]
) -> Iterator[NodeGroup]:
    """Yield the found node groups: those found as declared stay groups, other nodes form one group each."""
    known = set[str]()
    for group in declared.node_groups:
        nodes = [group.node_name(index) for index in range(group.count)]
        known.update(nodes)
        gpus = _gpus_of(group)
        if all(node in found and _types_of(found[node]) == gpus for node in nodes):
            yield group
        else:
            for node in nodes:
                if node in found and (slots := _slots(_types_of(found[node]), types, group.gpus)):
                    yield NodeGroup(name=node, gpus=slots, zone=group.zone, nic=group.nic, intra_link=group.intra_link)
    for node in sorted(found.keys() - known):
        if slots := _slots(_types_of(found[node]), types, ()):
            yield NodeGroup(name=node, gpus=slots)


def _types_of(node: FoundNode) -> list[str]:
    return [device.gpu_type for device in sorted(node.inventory.devices, key=lambda device: device.index)]


def _slots(found: Iterable[str], types: Mapping[str, GpuType], declared: Sequence[GpuSlots]) -> tuple[GpuSlots, ...]:
    """Return GPUs by type, at the document's prices; devices of unknown type are left out, as no plan can use them."""
    prices = {slots.gpu: slots.usd_per_hour for slots in declared}
    counts = dict[str, int]()
    for gpu in found:
        if gpu in types:
            counts[gpu] = counts.get(gpu, 0) + 1
    return tuple(GpuSlots(gpu=gpu, count=count, usd_per_hour=prices.get(gpu)) for gpu, count in counts.items())


def _network_of(network: Network, nodes: set[str], zones: set[str]) -> Network:
    """Return the network without links of nodes and zones that were not found."""
    return Network(
        default=network.default,
        zone_default=network.zone_default,
        between_zones={pair: link for pair, link in network.between_zones.items() if zones.issuperset(pair)},
        between_nodes={pair: link for pair, link in network.between_nodes.items() if nodes.issuperset(pair)},
    )
