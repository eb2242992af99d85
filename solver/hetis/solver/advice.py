"""The value of another fleet: nodes added or removed, the difference that two proofs imply, and what a loss leaves.

Each solve gives a plan of value v and a bound b, and the best plan's value lies between them. The best value after the
change minus the best value before therefore lies in

    [v_after - b_before, b_after - v_before]        if the objective is maximised
    [b_after - v_before, v_after - b_before]        if it is minimised

If GPUs were only added, every earlier plan is usually still a plan; if they were only removed, every later plan was one
before. Values and bounds then hold for both sides, which narrows the interval. The caller must know that this holds
(`Change`): with several zones, for example, a replica's share of the links between them shrinks as the fleet grows
(docs/cost-model.md).

Losing any of its GPUs, including attention workers, means losing a replica. The remaining prefill and decode replicas
serve what can flow between them: inside zones up to the rates of both sides, between zones no more than the plan's
routes carried, and only between replicas of one build, since no other can read the KV. The true rate is therefore at
least as high.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple, TypeVar

from hetis.solver.cluster import Cluster, GpuSlots, GpuType, Link, Network, NodeGroup, node_of
from hetis.solver.errors import BrokenProofError, InvalidProblemError
from hetis.solver.plan import Plan, Role, served_with_classes
from hetis.solver.problem import PlacementProblem

K = TypeVar("K")
EXACT = 1e-6  # width, as a ratio to the larger value, below which an interval counts as a number
CROSSING = 1e-5  # the same ratio, up to which an interval's ends may cross, since values and bounds are rounded


class Change(StrEnum):
    """The relation between two fleets' sets of plans; a plan of both has the same value in both."""

    GROWN = "grown"  # every plan before is also one after
    SHRUNK = "shrunk"  # every plan after was also one before
    OTHER = "other"


class ChangeVerdict(StrEnum):
    BETTER = "better"
    WORSE = "worse"
    SAME = "same"
    UNDECIDED = "undecided"


@dataclass(frozen=True, slots=True, kw_only=True)
class Proven:
    """Value of the best plan found, and bound on all plans; without a plan, 0 (infinity if it is minimised)."""

    value: float
    bound: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Difference of the best plans, after minus before, in the objective's unit: between ``low`` and ``high``.

    ``found`` is the difference of the two plans that were found; None: a side has none. ``no_plan_before`` and
    ``no_plan_after`` are true if it is proven that the side has no plan; if both are, the difference is 0.
    """

    low: float
    high: float
    found: float | None
    verdict: ChangeVerdict
    no_plan_before: bool
    no_plan_after: bool


def difference(before: Proven, after: Proven, *, maximises: bool, change: Change) -> Difference:
    """Return the interval that the two proofs imply; an unknown side gives an infinite end, never NaN.

    Raises:
        BrokenProofError: the proofs and the change contradict each other, by more than rounding explains.
    """
    (low0, high0), (low1, high1) = _span(before, maximises), _span(after, maximises)
    better_after = change is (Change.GROWN if maximises else Change.SHRUNK)  # the best value cannot fall
    better_before = change is (Change.SHRUNK if maximises else Change.GROWN)  # it cannot rise
    if better_after:
        low1, high0 = max(low1, low0), min(high0, high1)
    if better_before:
        low0, high1 = max(low0, low1), min(high1, high0)
    nothing = 0.0 if maximises else math.inf
    no_plan_before, no_plan_after = low0 == high0 == nothing, low1 == high1 == nothing
    if no_plan_before and no_plan_after:
        low = high = 0.0
    else:
        low, high = _less(low1, high0, -math.inf), _less(high1, low0, math.inf)
    if better_after:
        low = max(0.0, low)
    if better_before:
        high = min(0.0, high)
    found = None if nothing in (before.value, after.value) else after.value - before.value
    scale = max((abs(v) for v in (low0, high0, low1, high1) if math.isfinite(v)), default=0.0)
    if low > high + CROSSING * scale:
        raise BrokenProofError(
            f"the difference of the best plans is at least {low:.9g} and at most {high:.9g}, which contradict each "
            "other; please report this"
        )
    low, high = min(low, high), max(low, high)
    return Difference(
        low=low, high=high, found=found, verdict=_verdict(low, high, EXACT * scale, maximises=maximises),
        no_plan_before=no_plan_before, no_plan_after=no_plan_after,
    )  # fmt: skip


def _span(side: Proven, maximises: bool) -> tuple[float, float]:
    """Return the interval of the best value."""
    return (side.value, side.bound) if maximises else (side.bound, side.value)


def _less(a: float, b: float, unknown: float) -> float:
    """Return ``a - b``, or ``unknown`` if both are the same infinity."""
    return unknown if math.isinf(a) and a == b else a - b


def _verdict(low: float, high: float, exact: float, *, maximises: bool) -> ChangeVerdict:
    if max(abs(low), abs(high)) <= exact:
        return ChangeVerdict.SAME
    if low > 0.0:
        return ChangeVerdict.BETTER if maximises else ChangeVerdict.WORSE
    if high < 0.0:
        return ChangeVerdict.WORSE if maximises else ChangeVerdict.BETTER
    return ChangeVerdict.UNDECIDED


# --- fleets with nodes added or removed; every node that stays keeps its name


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeShape:
    """The shape of the nodes in which GPUs are added.

    Attributes:
        gpus_per_node: GPUs fill nodes of this size; the last node has the rest.
        zone: zone of every added node.
        nic: link between nodes; None: the cluster network's link.
        intra_link: GPU to GPU inside a node; None: NVLink or PCIe of the GPU type.
    """

    gpus_per_node: int = 8
    zone: str
    nic: Link | None = None
    intra_link: Link | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Addition:
    """``count`` GPUs of a type."""

    gpu: GpuType
    count: int


def with_added(cluster: Cluster, additions: Sequence[Addition], shape: NodeShape) -> Cluster:
    """Return the fleet with more GPUs, in new nodes called ``added-TYPE``.

    Raises:
        InvalidProblemError: a type has the name of one of the fleet's types but differs from it.
    """
    types = dict(cluster.gpu_types)
    groups = list(cluster.node_groups)
    for addition in additions:
        known = types.setdefault(addition.gpu.name, addition.gpu)
        if replace(known, usd_per_hour=None) != replace(addition.gpu, usd_per_hour=None):
            raise InvalidProblemError(
                f"{known.name} of cluster {cluster.name} differs in its numbers from the one to add"
            )
        for count, size in _sizes(addition.count, shape.gpus_per_node):
            name = _free_name(f"added-{addition.gpu.name.lower()}", groups)
            slots = GpuSlots(gpu=addition.gpu.name, count=size)
            groups.append(
                NodeGroup(
                    name=name,
                    gpus=(slots,),
                    count=count,
                    numbered=count > 1,
                    zone=shape.zone,
                    nic=shape.nic,
                    intra_link=shape.intra_link,
                )
            )
    return replace(cluster, node_groups=tuple(groups), gpu_types=types)


def _sizes(num_gpus: int, gpus_per_node: int) -> Iterator[tuple[int, int]]:
    """Yield how many nodes there are of which size: those that are full, and the one with the rest."""
    full, rest = divmod(num_gpus, gpus_per_node)
    yield from ((count, size) for count, size in ((full, gpus_per_node), (1, rest)) if count and size)


def _free_name(wanted: str, groups: Sequence[NodeGroup]) -> str:
    number = 2
    name = wanted
    while any(_has_name(group, name) for group in groups):
        name, number = f"{wanted}-{number}", number + 1
    return name


def _has_name(group: NodeGroup, name: str) -> bool:
    """Return whether the group or one of its nodes has this name, or could be a node of a group of this name."""
    if group.name == name or group.name.startswith(f"{name}-"):
        return True
    head, _, index = name.rpartition("-")
    return group.numbered and head == group.name and index.isdecimal() and int(index) < group.count


def without(cluster: Cluster, names: Iterable[str]) -> Cluster:
    """Return the fleet without these nodes, given by name, or by the name of a group for all of its nodes.

    Raises:
        InvalidProblemError: some nodes do not exist (one message names all), or no node is left.
    """
    given = set(names)
    known = {group.name for group in cluster.node_groups} | {node for node, _ in cluster.nodes()}
    if unknown := sorted(given - known):
        raise InvalidProblemError(f"cluster {cluster.name} has no node {', '.join(unknown)}")
    left = without_nodes(cluster, given.union(node for node, group in cluster.nodes() if group.name in given))
    if not left.node_groups:
        raise InvalidProblemError(f"cluster {cluster.name} has no node left")
    return left


def without_nodes(cluster: Cluster, nodes: Collection[str]) -> Cluster:
    """Return the fleet without these nodes; the others keep their names and their links."""
    if not nodes:
        return cluster
    groups = tuple(left for group in cluster.node_groups for left in _left_of(group, nodes))
    return replace(cluster, node_groups=groups, network=network_between(cluster.network, groups))


def _left_of(group: NodeGroup, gone: Collection[str]) -> Iterator[NodeGroup]:
    """Yield what is left of a group. Groups number nodes without gaps: nodes after the first gap become groups."""
    left = [i for i in range(group.count) if group.node_name(i) not in gone]
    num_first = next((number for number, i in enumerate(left) if number != i), len(left))
    if num_first:
        yield replace(group, count=num_first)
    for i in left[num_first:]:
        yield group.node(i)


def network_between(network: Network, groups: Sequence[NodeGroup]) -> Network:
    """Return the network with links between the zones and nodes of these groups only."""
    zones = {group.zone for group in groups}
    nodes = {group.node_name(i) for group in groups for i in range(group.count)} if network.between_nodes else set()
    return replace(
        network,
        between_zones={pair: link for pair, link in network.between_zones.items() if set(pair) <= zones},
        between_nodes={pair: link for pair, link in network.between_nodes.items() if set(pair) <= nodes},
    )


def usd_per_hour_of(cluster: Cluster) -> float | None:
    """Return the price of the whole fleet, used or not, or None if a GPU has no price."""
    if cluster.without_price():
        return None
    slots_of = ((group.count, slots) for group in cluster.node_groups for slots in group.gpus)
    return sum((count * slots.count * (cluster.price_of(slots) or 0.0) for count, slots in slots_of), start=0.0)


# --- the rate that a plan still serves after the loss of a node or a zone


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """The worst loss of one place of a kind: its name, and the saturated requests/s after and before the loss."""

    name: str
    rate: float
    whole: float

    @property
    def share(self) -> float:
        """Return the rate after the loss as a share of the rate before it."""
        return self.rate / self.whole


class _Site(NamedTuple):
    """Replicas that can hand KV to one another without a link between zones: those of a zone and a build."""

    zone: str
    build: int
    classes: tuple[str, ...]  # those of the requests that they serve


@dataclass(slots=True)
class _Rates:
    """Saturated requests/s: of unified replicas, and by site of local prefill, prefill for all zones, and decode."""

    unified: dict[tuple[str, ...], float]  # by the classes that they serve
    local: dict[_Site, float]
    afar: dict[_Site, float]
    decode: dict[_Site, float]

    def served(self, routes: Mapping[tuple[_Site, _Site], float], shares: Mapping[str, float]) -> float:
        """Return the rate that the replicas serve together, with flows between sites limited to ``routes``.

        ``shares`` are those of the requests' classes.
        """
        rates = dict(self.unified)
        for classes in {site.classes for site in self.decode}:
            flow = max(self._flow(routes, classes, afar_first=first) for first in (True, False))
            rates[classes] = rates.get(classes, 0.0) + flow
        return served_with_classes(shares, rates)

    def _flow(
        self, routes: Mapping[tuple[_Site, _Site], float], classes: tuple[str, ...], *, afar_first: bool
    ) -> float:
        local, afar, total = dict(self.local), dict(self.afar), 0.0
        decode = {site: rate for site, rate in self.decode.items() if site.classes == classes}

        def inside() -> float:
            flows = 0.0
            for site, rate in decode.items():
                own = min(local.get(site, 0.0), rate)
                other = min(afar.get(site, 0.0), rate - own)
                decode[site] = rate - own - other
                afar[site] = afar.get(site, 0.0) - other
                flows += own + other
            return flows

        if not afar_first:
            total += inside()
        for (here, there), most in routes.items():
            flow = max(0.0, min(afar.get(here, 0.0), decode.get(there, 0.0), most))
            afar[here], decode[there] = afar.get(here, 0.0) - flow, decode.get(there, 0.0) - flow
            total += flow
        return total + inside() if afar_first else total


def worst_loss(plan: Plan, problem: PlacementProblem, place: str) -> Loss | None:
    """Return the loss of the ``node`` or ``zone`` whose loss costs most, as `worst_node` and `worst_zone`."""
    return (worst_zone if place == "zone" else worst_node)(plan, problem)


def worst_node(plan: Plan, problem: PlacementProblem) -> Loss | None:
    """Return the loss of the node whose loss costs most, or None if the plan serves nothing."""
    return _worst(plan, problem, lambda node, zone: node)


def worst_zone(plan: Plan, problem: PlacementProblem) -> Loss | None:
    """Return the loss of the zone whose loss costs most, or None if the fleet has one zone or nothing is served."""
    return _worst(plan, problem, lambda node, zone: zone) if len(problem.cluster.zones()) > 1 else None


def _worst(plan: Plan, problem: PlacementProblem, place_of: Callable[[str, str], str]) -> Loss | None:
    zones = {node: group.zone for node, group in problem.cluster.nodes()}
    builds = _build_numbers(plan, problem)
    on = defaultdict[str, list[int]](list)
    home = list[_Site]()
    for number, replica in enumerate(plan.replicas):
        nodes = dict.fromkeys(node_of(name) for name in replica.devices())
        home.append(_Site(zones[next(iter(nodes))], builds[replica.stages[0].gpu], replica.classes))
        for place in dict.fromkeys(place_of(node, zones[node]) for node in nodes):
            on[place].append(number)
    routes = defaultdict[tuple[_Site, _Site], float](float)
    for route in plan.kv_routes:
        if home[route.prefill] != home[route.decode]:
            routes[home[route.prefill], home[route.decode]] += route.rate
    everything = _rates(plan, home, range(len(plan.replicas)))
    whole, shares = plan.served_rate(), plan.class_shares()
    if not whole > 0.0:
        return None
    found = {place: _without(everything, plan, home, lost).served(routes, shares) for place, lost in on.items()}
    name = min(found, key=lambda place: found[place])
    return Loss(name=name, rate=min(whole, found[name]), whole=whole)


def _build_numbers(plan: Plan, problem: PlacementProblem) -> dict[str, int]:
    """Return a number for the KV of each GPU type that computes layers; types that may exchange it share it."""
    gpus = dict.fromkeys(replica.stages[0].gpu for replica in plan.replicas)
    builds = {gpu: problem.kv_of(problem.build_of(gpu)) for gpu in gpus}
    numbers = {build: number for number, build in enumerate(dict.fromkeys(builds.values()))}
    return {gpu: numbers[build] for gpu, build in builds.items()}


def _rates(plan: Plan, home: list[_Site], which: Iterable[int]) -> _Rates:
    rates = _Rates({}, {}, {}, {})
    for number in which:
        replica, site = plan.replicas[number], home[number]
        if replica.role is Role.UNIFIED:
            rates.unified[replica.classes] = rates.unified.get(replica.classes, 0.0) + replica.rate
            continue
        sends_afar = any(there != site.zone for there in replica.kv_zones)
        side = rates.decode if replica.role is Role.DECODE else rates.afar if sends_afar else rates.local
        side[site] = side.get(site, 0.0) + replica.rate
    return rates


def _without(whole: _Rates, plan: Plan, home: list[_Site], lost: list[int]) -> _Rates:
    gone = _rates(plan, home, lost)

    def rest(all_of: Mapping[K, float], less: Mapping[K, float]) -> dict[K, float]:
        return {site: max(0.0, rate - less.get(site, 0.0)) for site, rate in all_of.items()}

    return _Rates(
        rest(whole.unified, gone.unified),
        rest(whole.local, gone.local),
        rest(whole.afar, gone.afar),
        rest(whole.decode, gone.decode),
    )
