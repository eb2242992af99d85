"""The fleet as the master sees it: device classes with the packing rows of each, and routes between replicas of zones.

Replicas are on *sides* of the master: unified ones on one side, and per zone z the prefill replicas that send to decode
replicas of z only, the prefill replicas that may send to every zone, and the decode replicas. A *route* leads from the
prefill replicas of a zone to the decode replicas of a zone; F(z, y) is its flow in requests/s.

Where the explicit links of a zone's nodes differ, sets of its nodes are *places* of their own beside the whole zone
(`places_of`): replicas of such a place exchange KV only with each other, and pay only for links between its nodes. It
has sides like a zone, and a route from itself to itself.

If replicas may be limited to some classes of requests, each *range* of classes (`PlacementProblem.ranges`) has a side
of unified replicas and places of its own, after those of all requests. KV of a single class stays in its zone.

A side has a *rate price*, the value of serving one more request/s there, which is 1 on the unified side if the rate is
maximised.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hetis.solver.cluster import Cluster, Link, NodeGroup
from hetis.solver.constraints import UNCONSTRAINED, ConstraintIndex, GpuConstraints
from hetis.solver.cost import intra_link
from hetis.solver.node_links import OTHERS, NodeLinks
from hetis.solver.plan import ClassPrice, Role
from hetis.solver.problem import PlacementProblem
from hetis.solver.workload import WorkloadMoments

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class DeviceClass:
    """GPUs that the model does not distinguish: one type, in nodes of one shape and zone, behind equal links."""

    gpu: str
    gpus_per_node: int  # GPUs of this type per node
    zone: str
    nic: Link
    intra: Link
    usd_per_hour: float | None
    reserved_bytes: int  # memory of each that others hold
    block: int  # of its nodes, see `NodeLinks`; 0 if the links of a class are those of any of its nodes
    node_links: tuple[tuple[int, Link], ...]  # the worst explicit link of its nodes to each block
    constraints: GpuConstraints
    groups: tuple[NodeGroup, ...]  # the node groups of which the class consists

    @property
    def num_nodes(self) -> int:
        return sum(group.count for group in self.groups)

    @property
    def available(self) -> int:
        return self.num_nodes * self.gpus_per_node

    def link_in(self, cluster: Cluster, part: Part) -> Link:
        """Return the slowest link that a device of this class may use in a replica that may be anywhere in a part."""
        link = self.nic
        for a, b in itertools.combinations_with_replacement(part.zones, 2):
            link = link.slower_of(cluster.network.zone_link(a, b))
        return reduce(Link.slower_of, (to for block, to in self.node_links if part.has_block(block)), link)


class Part(NamedTuple):
    """A part of the fleet: nodes in some zones, all of them or those in some blocks (`NodeLinks`)."""

    zones: tuple[str, ...]
    blocks: frozenset[int] | None = None

    def has_block(self, block: int) -> bool:
        return self.blocks is None or block in self.blocks

    def has(self, c: DeviceClass) -> bool:
        """Return whether the GPUs of a class are in this part."""
        return c.zone in self.zones and self.has_block(c.block)


def parts_of(
    cluster: Cluster, zones: tuple[str, ...], classes: Sequence[DeviceClass], links: NodeLinks | None
) -> Iterator[Part]:
    """Yield the parts of these zones in which a replica is searched, each with other links between its nodes."""
    if links is None:
        yield Part(zones)
        return
    here = [c for c in classes if c.zone in zones]
    blocks = frozenset(c.block for c in here)
    found = dict.fromkeys(some & blocks for some in links.sets)

    def is_covered(some: frozenset[int], by: frozenset[int]) -> bool:
        part, other = Part(zones, some), Part(zones, by)
        return by > some and all(c.link_in(cluster, other) == c.link_in(cluster, part) for c in here if part.has(c))

    yield from (Part(zones, some) for some in found if not any(is_covered(some, other) for other in found))


MOST_PARTS = 32  # of the places of a zone beside the whole of it: each is searched for replicas of both roles


def places_of(
    cluster: Cluster, zone: str, classes: Sequence[DeviceClass], links: NodeLinks | None
) -> list[tuple[Part, list[Part]]]:
    """Return the places of a zone beside the whole of it, each with the parts in which its replicas are searched.

    Places are the sets of nodes in which KV is not charged the slowest link of the whole zone. Those with the most GPUs
    come first, and may have too many parts together (`without_most`).
    """
    here, whole, found = [c for c in classes if c.zone == zone], Part((zone,)), list[tuple[Part, list[Part]]]()
    for place in parts_of(cluster, (zone,), here, links) if links is not None else ():
        inside = [c for c in here if place.has(c)]
        if any(c.link_in(cluster, place) != c.link_in(cluster, whole) for c in inside):
            found.append((place, list(parts_of(cluster, (zone,), inside, links))))
    return sorted(found, key=lambda one: -sum(c.available for c in here if one[0].has(c)))


def without_most(places: Sequence[tuple[Part, list[Part]]]) -> list[tuple[Part, list[Part]]]:
    """Return the first places of a zone that have `MOST_PARTS` together at most."""
    so_far = itertools.accumulate(len(parts) for _, parts in places)
    return [place for place, total in zip(places, so_far, strict=True) if total <= MOST_PARTS]


def device_classes(
    cluster: Cluster, index: ConstraintIndex | None = None, links: NodeLinks | None = None
) -> tuple[DeviceClass, ...]:
    """Return the classes of a fleet in order of appearance; ``index`` has the constraints that distinguish GPUs.

    So do explicit ``links`` whose blocks hold whole node groups. Without these, the worst link of a group counts.
    """
    worst = {} if links is not None else _worst_node_links(cluster)
    merged: dict[tuple[object, ...], list[NodeGroup]] = {}
    for group in cluster.node_groups:
        block = OTHERS if links is None else links.block_of.get(group.node_name(0), OTHERS)
        explicit = _worst_of_group(group, worst) if links is None else links.links_to(block)
        for gpu in dict.fromkeys(slots.gpu for slots in group.gpus):
            slots = [s for s in group.gpus if s.gpu == gpu]
            prices = {cluster.price_of(s) for s in slots}
            price = prices.pop() if len(prices) == 1 else _mean_price(cluster, group, gpu)
            nic = group.nic if group.nic is not None else cluster.network.default
            intra = intra_link(cluster.gpu_types[gpu], group.intra_link)
            constraints = index.of(group.name, gpu) if index is not None else UNCONSTRAINED
            reserved = group.reserved_bytes(gpu)
            key = (
                gpu, sum(s.count for s in slots), group.zone, nic, intra, price, reserved, block, explicit, constraints
            )  # fmt: skip
            merged.setdefault(key, []).append(group)
    return tuple(DeviceClass(*key, tuple(groups)) for key, groups in merged.items())  # type: ignore[call-arg,arg-type]


def _mean_price(cluster: Cluster, group: NodeGroup, gpu: str) -> float | None:
    """Return the mean price of a GPU, in case equal GPUs of a node are listed at different prices."""
    priced = [(cluster.price_of(slots), slots.count) for slots in group.gpus if slots.gpu == gpu]
    known = [price * count for price, count in priced if price is not None]
    return sum(known) / sum(count for _, count in priced) if len(known) == len(priced) else None


def _worst_node_links(cluster: Cluster) -> dict[str, Link]:
    worst: dict[str, Link] = {}
    for pair, link in cluster.network.between_nodes.items():
        for node in pair:
            worst[node] = link if node not in worst else worst[node].slower_of(link)
    return worst


def _worst_of_group(group: NodeGroup, worst: dict[str, Link]) -> tuple[tuple[int, Link], ...]:
    links = [worst[name] for name in map(group.node_name, range(group.count)) if name in worst] if worst else []
    return ((OTHERS, reduce(Link.slower_of, links)),) if links else ()


def class_of_slots(classes: Sequence[DeviceClass]) -> dict[tuple[str, str], int]:
    """Return the class of the GPUs of a type in a node group, by the names of both."""
    return {(group.name, c.gpu): i for i, c in enumerate(classes) for group in c.groups}


def class_prices(
    classes: Sequence[DeviceClass], used: Mapping[int, int], workers: Mapping[int, int], duals: Sequence[float]
) -> tuple[ClassPrice, ...]:
    """Return the table of a plan's classes, from the GPUs used, the attention workers among them, and the duals."""
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
    limits: dict[tuple[int, int], int] = {}
    for index, c in enumerate(classes):
        for p in (1, *(size for size in sorted(tp_sizes) if size > 1)):
            limit = c.num_nodes * p * (c.gpus_per_node // p)
            if p == 1 or 0 < limit < c.available:
                limits[index, p] = limit
    return Resources(tuple(limits), np.array(list(limits.values()), dtype=np.int64))


# --- prefill and decode on different replicas


FloatArray = npt.NDArray[np.float64]
UNIFIED = 0  # the side of unified replicas


@dataclass(frozen=True, slots=True, eq=False)
class Routes:
    """The sides of a problem's master and the routes between them; Z zones.

    If KV is of several kinds, each zone counts once for each, and no link carries KV from one to another. The
    places beside whole zones follow as further zones of the same name, and no link carries KV from or to them.

    Attributes:
        zones: names, in the cluster's order.
        splits_roles: whether the family has prefill and decode replicas; otherwise there is one side and no route.
        capacity: requests/s whose KV the link from zone to zone carries, shape [Z, Z]; inf inside a zone.
        beside: the places beside whole zones with their kind of KV, which are the last in ``zones``.
        num_left_out: how many further places are not searched (`MOST_PARTS`).
        num_ranges: ranges of classes; ``zones`` are those of all requests, repeated for each further range.
    """

    zones: tuple[str, ...]
    splits_roles: bool
    capacity: FloatArray
    beside: tuple[tuple[Part, int], ...] = ()
    num_left_out: int = 0
    num_ranges: int = 1

    @property
    def whole_zones(self) -> tuple[str, ...]:
        """Return the first of ``zones``: whole ones, each once for each kind of KV."""
        return self.zones[: len(self.zones) // self.num_ranges - len(self.beside)]

    def place(self, part: Part, kv: int, number: int = 0) -> int:
        """Return the number in ``zones`` of a place, kind of KV and range; a part without blocks is a whole zone."""
        first = number * (len(self.zones) // self.num_ranges)
        if part.blocks is None:
            return first + self.zones.index(part.zones[0]) + kv
        return first + len(self.whole_zones) + self.beside.index((part, kv))

    @property
    def num_sides(self) -> int:
        return self.num_ranges + (3 * len(self.zones) if self.splits_roles else 0)

    @property
    def num_flows(self) -> int:
        return len(self.zones) ** 2 if self.splits_roles else 0

    def unified(self, number: int) -> int:
        """Return the side of unified replicas of a range."""
        return UNIFIED if number == 0 else self.num_sides - self.num_ranges + number

    @property
    def ranges_of_zones(self) -> IntArray:
        """Return the range of each of ``zones``."""
        return np.repeat(np.arange(self.num_ranges), len(self.zones) // self.num_ranges)

    @property
    def ranges(self) -> IntArray:
        """Return the range of each side."""
        apart = np.tile(self.ranges_of_zones, 3) if self.splits_roles else self.ranges_of_zones[:0]
        return np.concatenate([[0], apart, np.arange(1, self.num_ranges)])

    @property
    def roles(self) -> tuple[Role, ...]:
        """Return the role of each side."""
        num = len(self.zones) if self.splits_roles else 0
        apart = [Role.PREFILL] * 2 * num + [Role.DECODE] * num
        return (Role.UNIFIED, *apart, *[Role.UNIFIED] * (self.num_ranges - 1))

    @property
    def has_links(self) -> bool:
        """Return whether KV may cross from zone to zone."""
        return self.splits_roles and len(self.zones) > 1

    def side(self, role: Role, zone: int = 0, *, sends_afar: bool = False) -> int:
        """Return the number of a side: unified, then by zone local senders, senders to all zones, receivers."""
        if role is Role.UNIFIED:
            return UNIFIED
        block = 2 if role is Role.DECODE else int(sends_afar)
        return 1 + block * len(self.zones) + zone

    def parts(self, of_sides: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Split values [sides] into those of local senders, of senders to all zones, and of receivers; [Z] each."""
        local, afar, receiving = of_sides[1 : 1 + 3 * len(self.zones)].reshape(3, len(self.zones))
        return local, afar, receiving


def routes_of(
    problem: PlacementProblem, moments: WorkloadMoments, num_kinds: int,
    places: Sequence[Part] = (), num_left_out: int = 0, num_ranges: int = 1,
) -> Routes:  # fmt: skip
    """Return the routes of a problem, which do not depend on its replicas; ``places`` are those beside whole zones."""
    network, zones, model = problem.cluster.network, problem.cluster.zones(), problem.model
    if num_kinds > 1:
        wholes = tuple(zone for zone in zones for _ in range(num_kinds))
        capacity = np.zeros((len(wholes), len(wholes)))
    else:
        wholes, num_bytes = zones, model.prompt_kv_bytes(moments.mean_prompt)
        capacity = np.array([[network.zone_link(a, b).bytes_per_s / num_bytes for b in zones] for a in zones])
    beside = tuple((place, kv) for place in places for kv in range(num_kinds))
    named = (*wholes, *(place.zones[0] for place, _ in beside)) * num_ranges
    capacity = np.pad(capacity, (0, len(named) - len(capacity)))
    np.fill_diagonal(capacity, np.inf)
    return Routes(named, problem.family.splits_roles, capacity, beside, num_left_out, num_ranges)
