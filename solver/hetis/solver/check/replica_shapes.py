"""The devices of a cluster by name, the links between those that a plan uses, and the shapes of its replicas.

A shape determines a replica's numbers, without device names: equal shapes have equal numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce

from hetis.solver.cluster import Cluster, Device, Link, NodeGroup, node_of
from hetis.solver.constraints import Constraints, Exclude, Selected, Selection
from hetis.solver.plan import AttentionWorkerPool, Plan, ReplicaPlan, Role, StagePlan
from hetis.solver.problem import PlacementProblem


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolShape:
    """The attention workers of one copy of a stage: p ``cards`` with k ``head_groups`` of every TP rank."""

    gpu: str
    cards: int
    head_groups: int
    link: Link  # link between the stage and the pool
    reserved_bytes: int = 0  # most memory of a card that others hold


@dataclass(frozen=True, slots=True, kw_only=True)
class StageShape:
    """A stage: TP size n, copies c, repeated ``layers`` l (without the prefix layers of the first stage)."""

    gpu: str
    tp: int
    copies: int
    layers: int
    intra_link: Link  # link between the GPUs of a TP group
    hop_link: Link  # the link charged for every hop into the stage
    pool: PoolShape | None = None
    kv_link: Link | None = None  # the slowest link over which a prefill replica's KV may leave
    arrival_link: Link | None = None  # the slowest link over which a decode replica's KV arrives; None: ``hop_link``
    reserved_bytes: int = 0  # most memory of a rank's GPU that others hold


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaShape:
    """A replica: its stages in order, b ``micro_batch``, M ``in_flight``, C ``chunk_tokens``.

    If ``attention_dp`` exceeds 1, it is the number of copies of the single stage, which share experts and iterate
    together. ``shared_by`` has an entry for every set of stages that one card serves: their positions.
    """

    micro_batch: int
    in_flight: int
    chunk_tokens: int
    stages: tuple[StageShape, ...]
    role: Role = Role.UNIFIED
    attention_dp: int = 1
    shared_by: tuple[tuple[int, ...], ...] = ()
    slowest_link: Link | None = None  # slowest link in the cluster; None for a decode replica

    def pool_of(self, position: int) -> PoolShape:
        """Return the attention workers of a stage that has them."""
        pool = self.stages[position].pool
        assert pool is not None
        return pool


def is_in(gpus: Selection | Selected, device: Device) -> bool:
    """Return whether a device is in a selection."""
    return gpus.takes(device=device.name, node=device.node, gpu=device.gpu, zone=device.group.zone)


def left_out_by(constraints: Constraints) -> Callable[[Device], bool]:
    """Return a predicate that is true of forbidden devices."""
    out = Selected(each.gpus for each in constraints if isinstance(each, Exclude))
    return lambda device: is_in(out, device)


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """A cluster with its devices by name."""

    cluster: Cluster
    devices: Mapping[str, Device]

    @staticmethod
    def of(cluster: Cluster) -> Fleet:
        return Fleet(cluster=cluster, devices={device.name: device for device in cluster.devices()})

    def without_left_out(self, constraints: Constraints) -> Fleet:
        """Return the fleet without forbidden GPUs."""
        is_out = left_out_by(constraints)
        return replace(self, devices={name: device for name, device in self.devices.items() if not is_out(device)})

    def leaves_out(self, name: str) -> bool:
        """Return whether the cluster has a device of this name that is not among ``devices``."""
        groups, node = self.cluster.node_groups, node_of(name)
        found = ((group, index) for group in groups if (index := group.index_of(node)) is not None)
        there = any(device.name == name for group, index in found for device in group.devices(index))
        return there and name not in self.devices

    @cached_property
    def zones(self) -> tuple[str, ...]:
        """Return the zones that have devices, in order of appearance."""
        left = {device.group.zone for device in self.devices.values()}
        return tuple(zone for zone in self.cluster.zones() if zone in left)

    @property
    def has_uneven_links(self) -> bool:
        """Return whether links depend on a device's location: its zone, or its node if nodes have explicit links.

        A search that charges a class of devices its worst link may then claim less than a plan's devices can deliver.
        """
        return len(self.cluster.zones()) > 1 or bool(self.cluster.network.between_nodes)

    def usd_per_hour(self, name: str) -> float:
        """Return the price of a device, counted through its node's slots in order; 0 if it does not exist."""
        device = self.devices.get(name)
        if device is None:
            return 0.0
        indices = device.group.indices
        place = indices.index(device.index) if indices else device.index
        for slots in device.group.gpus:
            if place < slots.count:
                return self.cluster.price_of(slots) or 0.0
            place -= slots.count
        raise AssertionError(f"{name} is beyond the GPUs of its node")

    def groups_of(self, names: Iterable[str]) -> tuple[NodeGroup, ...]:
        """Return the node groups of these devices, each once."""
        return tuple({self.devices[name].group.name: self.devices[name].group for name in names}.values())

    def nodes_of(self, names: Iterable[str]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.devices[name].node for name in names))

    def zones_of(self, names: Iterable[str]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(group.zone for group in self.groups_of(names)))

    def reserved_bytes(self, names: Iterable[str], gpu: str) -> int:
        """Return the most memory that others hold of any of these devices."""
        return max(group.reserved_bytes(gpu) for group in self.groups_of(names))

    def nic_links(self, names: Iterable[str]) -> list[Link]:
        return [group.nic or self.cluster.network.default for group in self.groups_of(names)]

    def intra_link(self, names: Iterable[str], gpu: str) -> Link:
        """Return the slowest link inside the nodes of these devices."""
        return slowest([group.intra_link or self.board_link(gpu) for group in self.groups_of(names)])

    def board_link(self, gpu: str) -> Link:
        board = self.cluster.gpu_types[gpu]
        return Link(bytes_per_s=board.nvlink_bytes_per_s or board.pcie_bytes_per_s, latency_s=0.0)

    def node_links(self, some: Iterable[str], others: Iterable[str]) -> list[Link]:
        """Return the explicit links between the nodes of some devices and those of others."""
        network = self.cluster.network
        if not network.between_nodes:
            return []
        there = self.nodes_of(others)
        links = [network.node_link(a, b) for a in self.nodes_of(some) for b in there if a != b]
        return [link for link in links if link is not None]

    def zone_links(self, zones: Sequence[str]) -> list[Link]:
        """Return the links inside and between some zones."""
        return [self.cluster.network.zone_link(a, b) for i, a in enumerate(zones) for b in zones[i:]]

    @cached_property
    def slowest_link(self) -> Link:
        """Return the worst bandwidth and the worst latency between any nodes of the cluster."""
        network = self.cluster.network
        links = [group.nic or network.default for group in self.cluster.node_groups]
        return slowest([*self.zone_links(self.zones), *links, *network.between_nodes.values()])


def slowest(links: list[Link]) -> Link:
    """Return the worst bandwidth and the worst latency of these links."""
    return reduce(Link.slower_of, links)


def kv_partners(plan: Plan, fleet: Fleet) -> Mapping[int, Collection[str]]:
    """Return the devices with which every replica exchanges KV by the plan's routes, where explicit links matter.

    Routes and devices that do not exist are left out: they have rules of their own.
    """
    found: defaultdict[int, dict[str, None]] = defaultdict(dict)
    numbers = range(len(plan.replicas))
    for route in plan.kv_routes if fleet.cluster.network.between_nodes else ():
        if route.prefill in numbers and route.decode in numbers:
            for own, other in ((route.prefill, route.decode), (route.decode, route.prefill)):
                devices = plan.replicas[other].devices()
                found[own] |= dict.fromkeys(name for name in devices if name in fleet.devices)
    return found


def replica_shape(
    replica: ReplicaPlan, problem: PlacementProblem, fleet: Fleet, partners: Collection[str] = ()
) -> ReplicaShape:
    """Return the shape of a replica of sound structure, with the actual links of its devices.

    KV is charged the explicit links to ``partners``, the devices with which the replica exchanges it.
    """
    pools = {pool.stage: pool for pool in replica.attention_workers}
    zones = fleet.zones_of(replica.devices())
    kv_links = [fleet.cluster.network.zone_link(zones[0], other) for other in replica.kv_zones]
    stages = []
    for position, stage in enumerate(replica.stages):
        prefix = problem.model.prefix_layers if position == 0 else 0
        others = [name for other in replica.stages if other is not stage for name in other.devices]
        explicit = fleet.node_links(stage.devices, others)
        hop_link = slowest([*fleet.nic_links(stage.devices), *fleet.zone_links(zones), *explicit])
        pool = pools.get(position)
        to_partners = slowest([hop_link, *fleet.node_links(stage.devices, partners)])
        stages.append(
            StageShape(
                gpu=stage.gpu,
                tp=stage.tp,
                copies=stage.copies,
                layers=stage.num_layers - prefix,
                intra_link=fleet.intra_link(stage.devices, stage.gpu),
                hop_link=hop_link,
                pool=None if pool is None else _pool_shape(fleet, stage, pool),
                kv_link=slowest([to_partners, *kv_links]) if replica.role is Role.PREFILL else None,
                arrival_link=to_partners if partners and replica.role is Role.DECODE else None,
                reserved_bytes=fleet.reserved_bytes(stage.devices, stage.gpu),
            )
        )
    return ReplicaShape(
        micro_batch=replica.micro_batch,
        in_flight=replica.in_flight,
        chunk_tokens=replica.chunk_tokens,
        stages=tuple(stages),
        role=replica.role,
        attention_dp=replica.attention_dp,
        shared_by=_shared_by(replica),
        slowest_link=fleet.slowest_link if replica.role is not Role.DECODE else None,
    )


def _shared_by(replica: ReplicaPlan) -> tuple[tuple[int, ...], ...]:
    """Return the distinct sets of several stages that are served by one card."""
    served: defaultdict[str, set[int]] = defaultdict(set)
    for pool in replica.attention_workers:
        for name in pool.devices:
            served[name].add(pool.stage)
    return tuple(sorted({tuple(sorted(stages)) for stages in served.values() if len(stages) > 1}))


def _pool_shape(fleet: Fleet, stage: StagePlan, pool: AttentionWorkerPool) -> PoolShape:
    (zone,) = fleet.zones_of(stage.devices)
    links = [
        *fleet.nic_links(stage.devices),
        *fleet.nic_links(pool.devices),
        fleet.cluster.network.zone_link(zone, zone),
    ]
    cards = len(pool.devices) // stage.copies
    for copy in range(stage.copies):  # a copy only communicates with its own cards
        ranks = stage.devices[copy * stage.tp : (copy + 1) * stage.tp]
        links += fleet.node_links(ranks, pool.devices[copy * cards : (copy + 1) * cards])
    return PoolShape(
        gpu=pool.gpu,
        cards=cards,
        head_groups=pool.kv_head_groups,
        link=slowest(links),
        reserved_bytes=fleet.reserved_bytes(pool.devices, pool.gpu),
    )
