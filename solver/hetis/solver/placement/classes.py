"""Device classes and resources: the fleet as the master sees it, with the kinds of GPU and the number of each."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hetis.solver.cluster import Cluster, Link, NodeGroup
from hetis.solver.constraints import UNCONSTRAINED, ConstraintIndex, GpuConstraints
from hetis.solver.cost import intra_link
from hetis.solver.plan import ClassPrice

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class DeviceClass:
    """GPUs that the model does not distinguish: one type, in nodes of one shape and zone, behind equal links."""

    gpu: str
    gpus_per_node: int  # of this type
    zone: str
    nic: Link
    intra: Link
    usd_per_hour: float | None
    node_links: Link | None  # the worst explicit link of its nodes, if the cluster gives any
    constraints: GpuConstraints  # the constraints on its GPUs
    groups: tuple[NodeGroup, ...]  # the node groups that it consists of

    @property
    def num_nodes(self) -> int:
        return sum(group.count for group in self.groups)

    @property
    def available(self) -> int:
        return self.num_nodes * self.gpus_per_node

    def link_in(self, cluster: Cluster, zones: tuple[str, ...]) -> Link:
        """Return the slowest link that a device of this class may use in a replica over ``zones``."""
        link = self.nic
        for a, b in itertools.combinations_with_replacement(zones, 2):
            link = link.slower_of(cluster.network.zone_link(a, b))
        return link if self.node_links is None else link.slower_of(self.node_links)


def device_classes(cluster: Cluster, index: ConstraintIndex | None = None) -> tuple[DeviceClass, ...]:
    """Return the classes of a fleet in order of appearance; ``index`` holds constraints that distinguish GPUs."""
    worst = _worst_node_links(cluster)
    merged: dict[tuple[object, ...], list[NodeGroup]] = {}
    for group in cluster.node_groups:
        explicit = _worst_of_group(group, worst)
        for gpu in dict.fromkeys(slots.gpu for slots in group.gpus):
            slots = [s for s in group.gpus if s.gpu == gpu]
            prices = {cluster.price_of(s) for s in slots}
            price = prices.pop() if len(prices) == 1 else _mean_price(cluster, group, gpu)
            nic = group.nic if group.nic is not None else cluster.network.default
            intra = intra_link(cluster.gpu_types[gpu], group.intra_link)
            constraints = index.of(group.name, gpu) if index is not None else UNCONSTRAINED
            key = (gpu, sum(s.count for s in slots), group.zone, nic, intra, price, explicit, constraints)
            merged.setdefault(key, []).append(group)
    return tuple(DeviceClass(*key, tuple(groups)) for key, groups in merged.items())  # type: ignore[call-arg,arg-type]


def _mean_price(cluster: Cluster, group: NodeGroup, gpu: str) -> float | None:
    """Return the mean price of a GPU if equal GPUs of a node are listed at different prices."""
    total, count = 0.0, 0
    for slots in group.gpus:
        price = cluster.price_of(slots)
        if slots.gpu == gpu:
            if price is None:
                return None
            total, count = total + price * slots.count, count + slots.count
    return total / count


def _worst_node_links(cluster: Cluster) -> dict[str, Link]:
    worst: dict[str, Link] = {}
    for pair, link in cluster.network.between_nodes.items():
        for node in pair:
            worst[node] = link if node not in worst else worst[node].slower_of(link)
    return worst


def _worst_of_group(group: NodeGroup, worst: dict[str, Link]) -> Link | None:
    if not worst:
        return None
    links = [worst[name] for name in map(group.node_name, range(group.count)) if name in worst]
    result = links[0] if links else None
    for link in links[1:]:
        result = link if result is None else result.slower_of(link)
    return result


def class_of_slots(classes: Sequence[DeviceClass]) -> dict[tuple[str, str], int]:
    """Return the class of the GPUs of a type in a node group, by the names of both."""
    return {(group.name, c.gpu): i for i, c in enumerate(classes) for group in c.groups}


def class_prices(
    classes: Sequence[DeviceClass], used: Mapping[int, int], workers: Mapping[int, int], duals: Sequence[float]
) -> tuple[ClassPrice, ...]:
    """Return the table of a plan's classes from the GPUs used, the attention workers among them, and the duals."""
    return tuple(
        ClassPrice(
            gpu=c.gpu,
            zone=c.zone,
            gpus_per_node=c.gpus_per_node,
            available=c.available,
            used=used.get(g, 0),
            as_attention_workers=workers.get(g, 0),
            dual=duals[g],
        )
        for g, c in enumerate(classes)
    )


@dataclass(frozen=True, slots=True)
class Resources:
    """The packing rows of the master: how much a TP group of each size takes of each row, and how much there is.

    Row (g, p), p a power of two, reads ``sum over TP sizes q >= p of q n_q <= p sum over nodes floor(size / p)``. For
    sizes that are powers of two these rows are necessary and sufficient for TP groups to fit inside nodes. A row with
    p > 1 is kept only if it is tighter than the count of GPUs (node sizes that p does not divide).
    """

    rows: tuple[tuple[int, int], ...]  # (class index, p)
    limits: IntArray  # [rows]

    @property
    def counts_gpus(self) -> npt.NDArray[np.float64]:
        """Return 1 for rows that count GPUs and 0 for those that only TP groups need; [rows]."""
        return np.array([1.0 if p == 1 else 0.0 for _, p in self.rows])

    def of_group(self, device_class: int, tp: int) -> IntArray:
        """Return how much one TP group (or attention worker, tp = 1) takes of every row, shape [rows]."""
        return np.array([tp if g == device_class and tp >= p else 0 for g, p in self.rows], dtype=np.int64)


def resources_of(classes: tuple[DeviceClass, ...], tp_sizes: tuple[int, ...]) -> Resources:
    """Return the packing rows of a fleet: one per class, and more if node sizes require them."""
    rows: list[tuple[int, int]] = []
    limits: list[int] = []
    for index, c in enumerate(classes):
        for p in (1, *(size for size in sorted(tp_sizes) if size > 1)):
            limit = c.num_nodes * p * (c.gpus_per_node // p)
            if p == 1 or 0 < limit < c.available:
                rows.append((index, p))
                limits.append(limit)
    return Resources(tuple(rows), np.array(limits, dtype=np.int64))
