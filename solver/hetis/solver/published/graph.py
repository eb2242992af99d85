"""The fleet in the partitioning of HexGen-2: a graph of GPUs, weighted by memory and bandwidth."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hetis.solver.cluster import Cluster, Device
from hetis.solver.cost import intra_link
from hetis.solver.placement.classes import DeviceClass, class_of_slots
from hetis.solver.placement.tables import Atlas

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class FleetGraph:
    """N GPUs in the order of the cluster: vertices with memory, edges with bandwidth."""

    names: tuple[str, ...]
    nodes: tuple[str, ...]  # name of each GPU's node
    zones: tuple[str, ...]  # of each GPU
    device_class: IntArray  # [N] index into the device classes
    room_bytes: FloatArray  # [N] for weights and KV
    bytes_per_s: FloatArray  # [N, N] symmetric, 0 on the diagonal

    @property
    def num_gpus(self) -> int:
        return len(self.names)

    def kind(self, gpu: int) -> tuple[int, str]:
        """Return the kind of a GPU (device class and node); GPUs of one kind are interchangeable."""
        return int(self.device_class[gpu]), self.nodes[gpu]


def graph_of(atlas: Atlas) -> FleetGraph:
    """Return the graph of a problem's fleet, with the memory that profiles give each GPU."""
    problem = atlas.problem
    rooms = [problem.profiles[c.gpu].room_bytes for c in atlas.classes]
    return fleet_graph(problem.cluster, atlas.classes, rooms)


def fleet_graph(cluster: Cluster, classes: tuple[DeviceClass, ...], room_bytes: Iterable[float]) -> FleetGraph:
    """Return the graph of a cluster; ``room_bytes`` is the memory of each class's GPUs for weights and KV."""
    devices = tuple(cluster.devices())
    class_of = class_of_slots(classes)
    device_class = np.array([class_of[d.group.name, d.gpu] for d in devices], dtype=np.int64)
    room = np.array(list(room_bytes))[device_class]
    return FleetGraph(
        names=tuple(d.name for d in devices),
        nodes=tuple(d.node for d in devices),
        zones=tuple(d.group.zone for d in devices),
        device_class=device_class,
        room_bytes=room,
        bytes_per_s=_bandwidths(cluster, devices),
    )


def _bandwidths(cluster: Cluster, devices: tuple[Device, ...]) -> FloatArray:
    """Return the bandwidth of every pair of GPUs; equal pairs of nodes are looked up once."""
    places = list(dict.fromkeys((d.node, d.gpu) for d in devices))
    first = {(d.node, d.gpu): d for d in devices}
    between = np.zeros((len(places), len(places)))
    for i, place in enumerate(places):
        for j in range(i, len(places)):
            between[i, j] = between[j, i] = _bandwidth(cluster, first[place], first[places[j]])
    index = {place: i for i, place in enumerate(places)}
    of_device = [index[d.node, d.gpu] for d in devices]
    matrix = between[np.ix_(of_device, of_device)]
    np.fill_diagonal(matrix, 0.0)
    return matrix


def _bandwidth(cluster: Cluster, a: Device, b: Device) -> float:
    """Return the bandwidth of the slower end: board to board inside a node, NIC to NIC between nodes."""
    if a.node == b.node:
        ends = [intra_link(cluster.gpu_types[d.gpu], d.group.intra_link) for d in (a, b)]
        return min(link.bytes_per_s for link in ends)
    explicit = cluster.network.node_link(a.node, b.node)
    if explicit is not None:
        return explicit.bytes_per_s
    nics = [d.group.nic or cluster.network.default for d in (a, b)]
    zone = cluster.network.zone_link(a.group.zone, b.group.zone)
    return min(link.bytes_per_s for link in (*nics, zone))
