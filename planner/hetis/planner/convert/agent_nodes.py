"""The inventory for a cluster file, from the nodes as their agents report them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

from hetis.formats import catalogue
from hetis.formats.discovery.found import FoundNode, Inventory, counted, grouped, inventory, parts_text, some_of
from hetis.formats.discovery.nvidia import left_out_together, memory_in_use, reserved_bytes
from hetis.formats.errors import Problem
from hetis.planner.convert.names import last_part
from hetis.solver.cluster import Cluster
from hetis.v1 import cluster_pb2, inventory_pb2, report_pb2

State = cluster_pb2.NodeState
_ABSENT: Mapping[State.ValueType, str] = {
    State.NODE_STATE_EXPECTED: "its agent has never connected",
    State.NODE_STATE_SUSPECT: "its agent does not respond",
    State.NODE_STATE_LOST: "lost: its agent is disconnected",
}


def agents_inventory(
    cluster: str, nodes: Sequence[cluster_pb2.Node], declared: Cluster, *, with_busy: bool
) -> Inventory:
    """Return the nodes of a planner's cluster.

    Args:
        cluster: ``clusters/{cluster}``.
        nodes: all nodes of the cluster, with the inventories of those whose agents were ever connected.
        declared: the cluster's document, which has the zones. Agents do not know them.
        with_busy: whether GPUs that are in use count as free.
    """
    zones = {node: group.zone for node, group in declared.nodes()}
    where = Problem(file=cluster, message="")
    found = [_node(node, zones.get(last_part(node.name), "default"), with_busy, where) for node in nodes]
    return inventory(found, [], _notes(cluster, nodes, found, with_busy=with_busy), file=cluster)


def _node(node: cluster_pb2.Node, zone: str, with_busy: bool, where: Problem) -> FoundNode:
    name, devices = last_part(node.name), sorted(node.inventory.devices, key=lambda device: device.index)
    absent = "draining" if node.draining else _ABSENT.get(node.state, "")
    if not absent and not node.HasField("inventory"):
        absent = "its agent has not yet reported its GPUs"
    if absent:
        products = f" ({some_of(map(_product, devices))})" if devices else ""
        summary = f"{counted(len(devices))}{products}: {absent}" if devices else absent
        return FoundNode(name=name, zone=zone, left_out=(summary,), where=where)
    whole = [device for device in devices if not device.mig_slice]
    reports = {report.index: report for report in node.devices}
    is_ours_or_kept = bool(node.replicas) or with_busy
    reasons = {device.index: _reason(device, reports, is_ours_or_kept) for device in whole}

    def reserved(device: inventory_pb2.GpuDevice) -> int:
        used = reports[device.index].memory_used_bytes if device.index in reports else None
        return reserved_bytes(used, with_busy=is_ours_or_kept)

    sliced = [device for device in devices if device.mig_slice]
    left_out = left_out_together((device.index, _product(device), reasons[device.index]) for device in whole)
    if sliced:
        left_out += (parts_text(len(sliced), some_of(map(_product, sliced))),)
    links = _links(whole)
    usable = [device for device in whole if not reasons[device.index]]
    return FoundNode(
        name=name,
        zone=zone,
        gpus=grouped((_product(one), one.memory_bytes or None, reserved(one)) for one in usable),
        indices=tuple(device.index for device in usable),
        left_out=left_out,
        nvlinks=0 if links and not all(links) else None,
        bridged=any(links) and not all(links),
        where=where,
    )


def _product(device: inventory_pb2.GpuDevice) -> str:
    return device.gpu_type or device.product_name or "an unknown device"


def _reason(
    device: inventory_pb2.GpuDevice, reports: Mapping[int, report_pb2.DeviceReport], is_ours_or_kept: bool
) -> str:
    """Return why a plan may not use a GPU, or an empty string if it may."""
    report = reports.get(device.index)
    if report is None:
        return ""
    if report.unhealthy:
        return f"unhealthy: {report.unhealthy}"
    held = "" if is_ours_or_kept else memory_in_use(report.memory_used_bytes, device.memory_bytes)
    return f"{held}, but not by a replica of the planner" if held else ""


def _links(devices: Sequence[inventory_pb2.GpuDevice]) -> list[bool]:
    """Return for every pair of GPUs whether NVLink connects it."""
    return [other.index in one.linked_devices for one, other in itertools.combinations(devices, 2)]


def _notes(
    cluster: str, nodes: Sequence[cluster_pb2.Node], found: Sequence[FoundNode], *, with_busy: bool
) -> Iterator[str]:
    yield (
        f"agents do not report zones, links between nodes or prices: zones are from the document of {cluster}, "
        f"which also has the others (hetis-plan get {cluster} -o yaml)"
    )
    used = {one.name: node for node, one in zip(nodes, found, strict=True) if one.gpus}
    if not with_busy and any(node.replicas for node in used.values()):
        yield "GPUs of nodes with replicas of the planner count as free, even if other processes run there"
    simulated = [name for name, node in used.items() if node.inventory.source == inventory_pb2.DEVICE_SOURCE_SIMULATED]
    if simulated:
        yield f"GPUs of {some_of(simulated)} are simulated"
    without_nvlink = {entry.gpu.name for entry in catalogue.gpus() if entry.gpu.nvlink_bytes_per_s is None}
    linked = [
        name
        for name, node in used.items()
        if any(device.linked_devices and device.gpu_type in without_nvlink for device in node.inventory.devices)
    ]
    if linked:
        yield f"NVLinks join GPUs of {some_of(linked)}; agents do not say how many, and the file has PCIe there"
