"""The GPUs of a tiny fleet that are equal to the cost model, counted without the search's own classes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from hetis.solver.cluster import Cluster, Link
from hetis.solver.problem import PlacementProblem


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceClass:
    """GPUs that are equal to the cost model."""

    gpu: str
    per_node: int
    zone: str
    nic: Link
    intra_link: Link
    usd_per_hour: float
    node: str = ""  # only if the node has explicit links


def device_classes(cluster: Cluster) -> dict[DeviceClass, int]:
    """Return the classes of the cluster with the number of nodes that hold each."""
    nodes: dict[DeviceClass, int] = {}
    linked = {node for pair in cluster.network.between_nodes for node in pair}
    for group in cluster.node_groups:
        apart = [node for node in map(group.node_name, range(group.count)) if node in linked]
        for gpu in dict.fromkeys(slots.gpu for slots in group.gpus):
            mine = [slots for slots in group.gpus if slots.gpu == gpu]
            board = cluster.gpu_types[gpu]
            board_link = Link(bytes_per_s=board.nvlink_bytes_per_s or board.pcie_bytes_per_s, latency_s=0.0)
            device_class = DeviceClass(
                gpu=gpu,
                per_node=sum(slots.count for slots in mine),
                zone=group.zone,
                nic=group.nic or cluster.network.default,
                intra_link=group.intra_link or board_link,
                usd_per_hour=cluster.price_of(mine[0]) or 0.0,
            )
            if len(apart) < group.count:
                nodes[device_class] = nodes.get(device_class, 0) + group.count - len(apart)
            nodes |= {replace(device_class, node=node): 1 for node in apart}
    return nodes


def explicit_links(problem: PlacementProblem, own: DeviceClass, others: Iterable[str]) -> list[Link]:
    """Return the explicit links between a class's node and some others."""
    links = [problem.cluster.network.node_link(own.node, other) for other in others if other != own.node]
    return [link for link in links if link is not None]
