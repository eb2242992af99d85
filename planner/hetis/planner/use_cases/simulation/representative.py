"""The part of a large plan that stands for all of it in a simulation: every k-th of its equal replicas.

A run of some 100,000 requests cannot fill hundreds of thousands of seats, and with empty seats latencies look too good.
Equal replicas under equal load behave alike, so that a part of them, with as much of the traffic, shows what all do.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product

from hetis.planner.use_cases.grouping import group_replicas
from hetis.solver.cluster import Device
from hetis.solver.plan import KvRoute, Plan, ReplicaPlan, Role
from hetis.solver.problem import PlacementProblem

BALANCED = 0.01  # by which a kept replica may be loaded less than planned
MIXED = 0.05  # share of the traffic that other groups of replicas may serve than in the whole plan
STEP = 1.1  # ratio of successive values of k
TRIED = 32  # counts of a pool's largest group that are tried for each k, until both sides are in balance
ROUNDS = 30  # of the fit of flows, most of which take a few
DUST = 1e-12  # share of a flow that rounding may leave
EQUAL = 1e-9  # relative difference of equal flows

Counts = tuple[int, ...]  # replicas kept of each group of a pool


@dataclass(frozen=True, slots=True, kw_only=True)
class RepresentativePart:
    """Some replicas of a plan as a plan, and the share of the whole plan's rate that is their load.

    At that share of any rate, each of them gets the load that it has in the whole plan.
    """

    plan: Plan
    share: float


def representative_part(
    plan: Plan, problem: PlacementProblem, *, few_seats: int, most_seats: int
) -> RepresentativePart:
    """Return the smallest part with ``few_seats`` or more, and ``most_seats`` at most, that is like the plan.

    It has every k-th replica, but at least one, of each group of replicas that are equal but for their devices, in the
    same zones and on the same network. None is loaded more than planned. It is like the plan if none is loaded less by
    more than `BALANCED`, as prefill replicas are when those that decode are too few, and no more than `MIXED` of the
    traffic is served by other groups than in the whole plan. If there is no such part, this returns the one with
    ``most_seats`` at most that comes closest, or else the one with the fewest seats.

    A link between zones gets only the traffic of the part.
    """
    pools = _pools(plan, problem)
    found = dict[tuple[Counts, ...], tuple[int, float]]()  # seats and deviation
    for counts in _candidates(pools):
        num_seats = sum(pool.seats_of(kept) for pool, kept in zip(pools, counts, strict=True))
        found[counts] = num_seats, _deviation(pools, counts)
    small = {counts: one for counts, one in found.items() if one[0] <= most_seats}
    alike = {counts: one for counts, one in small.items() if one[0] >= few_seats and one[1] <= 1.0}
    if alike:
        chosen = min(alike, key=lambda counts: alike[counts][0])
    elif small:
        chosen = min(small, key=lambda counts: (small[counts][1], -small[counts][0]))
    else:
        chosen = min(found, key=lambda counts: found[counts][0])
    part = _part(plan, pools, chosen)
    return RepresentativePart(plan=part, share=part.served_rate() / plan.served_rate())


@dataclass(frozen=True, kw_only=True)
class _Pool:
    """Groups that exchange KV, directly or indirectly, or a single group that exchanges none.

    ``members`` are the numbers of each group's replicas, ``seats`` those of each of them, and ``rates`` the saturated
    requests/s of each group. ``flows`` are the requests/s between groups, by their positions.
    """

    members: tuple[tuple[int, ...], ...]
    roles: tuple[Role, ...]
    seats: tuple[int, ...]
    rates: tuple[float, ...]
    flows: Mapping[tuple[int, int], float]
    known: dict[Counts, list[float]] = field(default_factory=dict)  # results of `served`

    @cached_property
    def sizes(self) -> Counts:
        return tuple(map(len, self.members))

    def seats_of(self, counts: Counts) -> int:
        return sum(count * seats for count, seats in zip(counts, self.seats, strict=True))

    def planned(self, counts: Counts) -> list[float]:
        """Return the rate of each group if its kept replicas have the load that they have in the whole plan."""
        return [rate * count / size for rate, count, size in zip(self.rates, counts, self.sizes, strict=True)]

    def carried(self, counts: Counts) -> dict[tuple[int, int], float]:
        """Return the flows between the kept replicas: no group is loaded more than planned, and the mix is as planned.

        Flows are scaled to what the groups send and to what they receive, in turn, until both hold as far as they can.
        """
        flows, planned = dict(self.flows), self.planned(counts)
        for _ in range(ROUNDS):
            before = dict(flows)
            for side in (0, 1):
                through = _through(flows, side)
                flows = {pair: flow * planned[pair[side]] / through[pair[side]] for pair, flow in flows.items()}
            if all(abs(flows[pair] - flow) <= EQUAL * flow for pair, flow in before.items()):
                break
        for side in (0, 1):
            through = _through(flows, side)
            flows = {pair: flow * min(1.0, planned[pair[side]] / through[pair[side]]) for pair, flow in flows.items()}
        return flows

    def served(self, counts: Counts) -> list[float]:
        """Return the rate of each group in the part."""
        if not self.flows:
            return self.planned(counts)
        if counts not in self.known:
            flows = self.carried(counts)
            through = _through(flows, 0) | _through(flows, 1)
            self.known[counts] = [through.get(group, 0.0) for group in range(len(self.members))]
        return self.known[counts]

    def imbalance(self, counts: Counts) -> float:
        """Return by how much the replicas of a group at most are loaded less than planned."""
        pairs = zip(self.served(counts), self.planned(counts), strict=True)
        return max((1.0 - served / planned for served, planned in pairs if planned), default=0.0)

    def totals(self, counts: Counts) -> list[float]:
        """Return the rates of all that prefills and of all that decodes, as far as they exchange KV."""
        planned = self.planned(counts)
        return [
            sum(rate for rate, role in zip(planned, self.roles, strict=True) if role is side)
            for side in (Role.PREFILL, Role.DECODE)
        ]


def _through(flows: Mapping[tuple[int, int], float], side: int) -> dict[int, float]:
    """Return the total flow of each group that sends (side 0) or receives (side 1)."""
    found = defaultdict[int, float](float)
    for pair, flow in flows.items():
        found[pair[side]] += flow
    return dict(found)


def _pools(plan: Plan, problem: PlacementProblem) -> list[_Pool]:
    groups = _groups(plan, problem)
    group_of = {number: group for group, members in enumerate(groups) for number in members}
    flows = defaultdict[tuple[int, int], float](float)
    for route in plan.kv_routes:
        flows[group_of[route.prefill], group_of[route.decode]] += route.rate
    pool_of = {group: [group] for group in range(len(groups))}
    for here, there in flows:
        one, other = pool_of[here], pool_of[there]
        if one is not other:
            one += other
            pool_of |= dict.fromkeys(other, one)
    return [_pool(plan, groups, pool, flows) for pool in {id(pool): pool for pool in pool_of.values()}.values()]


def _pool(
    plan: Plan, groups: Sequence[tuple[int, ...]], pool: Sequence[int], flows: Mapping[tuple[int, int], float]
) -> _Pool:
    position = {group: place for place, group in enumerate(pool)}
    within = {(position[here], position[there]): flow for (here, there), flow in flows.items() if here in position}
    first = [plan.replicas[groups[group][0]] for group in pool]
    exchanged = _through(within, 0) | _through(within, 1)
    rates = [
        sum(plan.replicas[number].rate for number in groups[group])
        if one.role is Role.UNIFIED
        else exchanged.get(i, 0.0)
        for i, (group, one) in enumerate(zip(pool, first, strict=True))
    ]
    return _Pool(
        members=tuple(groups[group] for group in pool),
        roles=tuple(one.role for one in first),
        seats=tuple(replica.seats for replica in first),
        rates=tuple(rates),
        flows=within,
    )


def _groups(plan: Plan, problem: PlacementProblem) -> list[tuple[int, ...]]:
    """Return the numbers of the replicas in each group of equal ones."""
    devices = {device.name: device for device in problem.cluster.devices()}
    found = list[tuple[int, ...]]()
    for group in group_replicas(plan.replicas):
        places = defaultdict[object, list[int]](list)
        for number in group.numbers:
            places[_place(plan.replicas[number], devices)].append(number)
        found += map(tuple, places.values())
    return found


def _place(replica: ReplicaPlan, devices: Mapping[str, Device]) -> object:
    """Return the zones and links of a replica's nodes; the simulator refuses devices that do not exist."""
    groups = (devices[name].group for name in replica.devices() if name in devices)
    return frozenset((group.zone, group.nic, group.intra_link) for group in groups)


# --- how many are kept


def _candidates(pools: Sequence[_Pool]) -> Iterator[tuple[Counts, ...]]:
    """Yield the counts to keep for every k from 1 to the size of the largest group."""
    every, largest = 1.0, max(size for pool in pools for size in pool.sizes)
    while every < STEP * largest:
        yield tuple(_balanced(pool, every) for pool in pools)
        every *= STEP
    yield tuple((1,) * len(pool.members) for pool in pools)


def _balanced(pool: _Pool, every: float) -> Counts:
    """Return counts of about every k-th replica whose sides are in balance, or as nearly as any of those tried."""
    most = max(pool.sizes)
    fewest = max(1, round(most / every))
    tried = list[tuple[float, Counts]]()
    for count in range(fewest, min(most, fewest + TRIED) + 1):
        counts = _matched(pool, count / most)
        totals = pool.totals(counts)
        off = 1.0 - min(totals) / max(totals) if pool.flows else 0.0  # some group is loaded less by that at least
        off = pool.imbalance(counts) if off <= BALANCED else off
        if off <= BALANCED:
            return counts
        tried.append((off, counts))
    return min(tried)[1]


def _matched(pool: _Pool, share: float) -> Counts:
    """Return this share of each group, at least one, where the side with too much capacity has less of its largest."""
    counts = [max(1, round(size * share)) for size in pool.sizes]
    if pool.flows:
        planned, totals = pool.planned(tuple(counts)), pool.totals(tuple(counts))
        larger = Role.PREFILL if totals[0] > totals[1] else Role.DECODE
        group = max((i for i, role in enumerate(pool.roles) if role is larger), key=planned.__getitem__)
        each = planned[group] / counts[group]
        counts[group] = max(1, counts[group] - round(abs(totals[0] - totals[1]) / each))
    return tuple(counts)


def _deviation(pools: Sequence[_Pool], counts: Sequence[Counts]) -> float:
    """Return the worst imbalance, or the share of the traffic that other groups serve, as a multiple of its limit."""
    worst = max(pool.imbalance(kept) for pool, kept in zip(pools, counts, strict=True)) / BALANCED
    for side in (Role.PREFILL, Role.DECODE):
        whole, left = list[float](), list[float]()
        for pool, kept in zip(pools, counts, strict=True):
            of_side = [i for i, role in enumerate(pool.roles) if role in (side, Role.UNIFIED)]
            served = pool.served(kept)
            whole += (pool.rates[i] for i in of_side)
            left += (served[i] for i in of_side)
        moved = sum(abs(a / sum(whole) - b / sum(left)) for a, b in zip(whole, left, strict=True))
        worst = max(worst, moved / 2.0 / MIXED)
    return worst


# --- the part as a plan


def _part(plan: Plan, pools: Sequence[_Pool], counts: Sequence[Counts]) -> Plan:
    routes, numbers, busiest = dict[tuple[int, int], float](), list[int](), _loads(plan)
    first = {number: members[0] for pool in pools for members in pool.members for number in members}
    between = defaultdict[tuple[int, int], dict[tuple[int, int], float]](dict)
    for route in plan.kv_routes:
        between[first[route.prefill], first[route.decode]][route.prefill, route.decode] = route.rate
    for pool, of_pool in zip(pools, counts, strict=True):
        kept = [
            [members[i * len(members) // count] for i in range(count)]
            for members, count in zip(pool.members, of_pool, strict=True)
        ]
        numbers += (number for some in kept for number in some)
        most = [max(busiest[number] for number in members) for members in pool.members]
        left = {number: most[group] for group, some in enumerate(kept) for number in some}
        for (here, there), flow in pool.carried(of_pool).items():
            whole = between[pool.members[here][0], pool.members[there][0]]
            found = _routes(whole, flow, kept[here], kept[there], left, pool.sizes[here] * pool.sizes[there])
            routes |= found
            for (sender, receiver), rate in found.items():
                left[sender] -= rate
                left[receiver] -= rate
    position = {number: place for place, number in enumerate(sorted(numbers))}
    return replace(
        plan,
        replicas=tuple(plan.replicas[number] for number in position),
        kv_routes=tuple(
            KvRoute(prefill=position[sender], decode=position[receiver], rate=rate)
            for (sender, receiver), rate in sorted(routes.items())
        ),
    )


def _loads(plan: Plan) -> defaultdict[int, float]:
    """Return the saturated requests/s that each replica sends or receives."""
    loads = defaultdict[int, float](float)
    for route in plan.kv_routes:
        loads[route.prefill] += route.rate
        loads[route.decode] += route.rate
    return loads


def _routes(
    whole: Mapping[tuple[int, int], float], flow: float, senders: Sequence[int], receivers: Sequence[int],
    left: Mapping[int, float], num_pairs: int,
) -> Mapping[tuple[int, int], float]:  # fmt: skip
    """Return routes that carry a flow between the kept replicas of two groups, whose routes in the plan are ``whole``.

    Those stay if they carry just that. If each sends to each at one rate, so do the kept ones. Otherwise, replicas are
    filled in turn up to what is ``left`` of the load of the busiest of their group, as the search fills them.
    """
    everyone = len(senders) * len(receivers)
    if everyone == num_pairs and abs(flow - sum(whole.values())) <= EQUAL * flow:
        return whole
    if len(whole) == num_pairs and max(whole.values()) <= min(whole.values()) * (1.0 + EQUAL):
        return dict.fromkeys(product(senders, receivers), flow / everyone)
    found, rest, dust = dict[tuple[int, int], float](), dict(left), DUST * flow
    send, receive = iter(senders), iter(receivers)
    i, j = next(send, -1), next(receive, -1)
    while flow > dust and i >= 0 and j >= 0:
        rate = min(flow, rest[i], rest[j])
        if rate > dust:
            found[i, j] = rate
        flow, rest[i], rest[j] = flow - rate, rest[i] - rate, rest[j] - rate
        i = next(send, -1) if rest[i] <= dust else i
        j = next(receive, -1) if rest[j] <= dust else j
    return found
