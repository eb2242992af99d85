"""The part of a large plan that is simulated: which replicas it has, and what load each of them gets."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetis.planner.use_cases.simulation.representative import BALANCED, MIXED, representative_part
from hetis.planner.use_cases.simulation.simulate import seats_of
from hetis.solver.cluster import Link, Network
from hetis.solver.plan import KvRoute, Plan, ReplicaPlan, Role, StagePlan
from hetis.solver.problem import PlacementProblem
from tests.planner.plans import replica
from tests.simulator.small_plans import plan_of
from tests.solver.instances import make_node, make_problem, make_profile

ZONES = ("east", "west")
SLOW = Link(bytes_per_s=1e9, latency_s=1e-3)


def fleet(nodes: int) -> PlacementProblem:
    """Return a problem with so many nodes of one GPU in each of two zones."""
    return make_problem(
        [make_node(zone, "big", nodes=nodes, zone=zone) for zone in ZONES],
        profiles={"big": make_profile("big")},
        network=Network(default=SLOW, between_zones={frozenset(ZONES): SLOW}),
    )


PROBLEM = fleet(2)


def some(
    count: int, rate: float, role: Role = Role.UNIFIED, *, zone: str = "east", seats: int = 8
) -> list[ReplicaPlan]:
    """Return equal replicas; it does not matter that they share their device."""
    stage = StagePlan(
        gpu="big", tp=1, copies=1, first_layer=0, num_layers=6, devices=(f"{zone}-0/0",), kv_head_groups_kept=4
    )
    one = replace(replica(stage, rate=rate), role=role, micro_batch=seats, in_flight=1)
    if role is Role.PREFILL:
        one = replace(one, micro_batch=0, kv_zones=ZONES, in_flight=4)
    return [one] * count


def filled_in_turn(senders: Iterable[int], receivers: Iterable[int], replicas: Sequence[ReplicaPlan]) -> list[KvRoute]:
    """Return routes that carry all that both sides can, the first replicas first."""
    left, routes = {number: one.rate for number, one in enumerate(replicas)}, list[KvRoute]()
    for sender in senders:
        for receiver in receivers:
            rate = min(left[sender], left[receiver])
            if rate > 1e-9:
                routes.append(KvRoute(prefill=sender, decode=receiver, rate=rate))
                left[sender] -= rate
                left[receiver] -= rate
    return routes


def split(prefill: Sequence[ReplicaPlan], decode: Sequence[ReplicaPlan], unified: Sequence[ReplicaPlan] = ()) -> Plan:
    replicas = [*prefill, *decode, *unified]
    middle = len(prefill) + len(decode)
    routes = filled_in_turn(range(len(prefill)), range(len(prefill), middle), replicas)
    return plan_of(*replicas, routes=tuple(routes))


def loads(plan: Plan) -> dict[tuple[Role, float, str], list[float]]:
    """Return the saturated load of each replica, by its group: a request to the plan goes to one in proportion."""
    carried = defaultdict[int, float](float)
    for route in plan.kv_routes:
        carried[route.prefill] += route.rate
        carried[route.decode] += route.rate
    found = defaultdict[tuple[Role, float, str], list[float]](list)
    for number, one in enumerate(plan.replicas):
        zone = one.stages[0].devices[0].split("-")[0]
        found[one.role, one.rate, zone].append(one.rate if one.role is Role.UNIFIED else carried[number])
    return found


# Replicas in each group: unlike ones that prefill, that decode, that do both, and a zone that exchanges its own KV.
SIZES = st.fixed_dictionaries({
    "prefill": st.tuples(st.integers(1, 60), st.integers(0, 3)),
    "decode": st.tuples(st.integers(1, 60), st.integers(0, 20)),
    "unified": st.tuples(st.integers(0, 60), st.integers(0, 60)),
    "west": st.none() | st.tuples(st.integers(1, 60), st.integers(1, 60)),
})  # fmt: skip
Sizes = dict[str, tuple[int, int]]


def plan_with(sizes: Sizes) -> Plan:
    def groups(name: str, rates: tuple[float, float], role: Role) -> list[ReplicaPlan]:
        return [one for count, rate in zip(sizes[name], rates, strict=True) for one in some(count, rate, role)]

    prefill, decode = groups("prefill", (3.0, 2.0), Role.PREFILL), groups("decode", (2.5, 1.25), Role.DECODE)
    whole = split(prefill, decode, groups("unified", (1.0, 7.0), Role.UNIFIED))
    if not sizes["west"]:
        return whole
    prefill, decode = (
        some(count, rate, role, zone="west")
        for count, rate, role in zip(sizes["west"], (3.0, 0.5), (Role.PREFILL, Role.DECODE), strict=True)
    )
    west, shift = split(prefill, decode), len(whole.replicas)
    routes = [replace(one, prefill=one.prefill + shift, decode=one.decode + shift) for one in west.kv_routes]
    return plan_of(*whole.replicas, *west.replicas, routes=(*whole.kv_routes, *routes))


@given(SIZES, st.floats(0.02, 1.0))
@settings(max_examples=30, deadline=None)
def test_each_replica_gets_the_load_that_it_has_in_the_whole_plan(sizes: Sizes, few: float) -> None:
    whole = plan_with(sizes)
    part = representative_part(whole, PROBLEM, few_seats=round(few * seats_of(whole)), most_seats=seats_of(whole))
    assert part.share == pytest.approx(part.plan.served_rate() / whole.served_rate())
    before, after = loads(whole), loads(part.plan)
    assert before.keys() == after.keys(), "at least one of each"
    for group, planned in before.items():
        kept = after[group]
        assert len(kept) <= len(planned)
        # Arrivals are scaled by the share of the saturated rate, so that these loads are those at any rate.
        assert max(kept) <= max(planned) * (1 + 1e-6)
        mean, planned_mean = sum(kept) / len(kept), sum(planned) / len(planned)
        assert mean <= planned_mean * (1 + 1e-6)
        assert mean >= planned_mean * (1 - BALANCED - 1e-6)
    assert few * seats_of(whole) - 1 <= seats_of(part.plan) <= seats_of(whole)
    for side in (Role.PREFILL, Role.DECODE):
        counted = [
            {group: sum(one) for group, one in found.items() if group[0] in (side, Role.UNIFIED)}
            for found in (before, after)
        ]
        shares = [{group: value / sum(one.values()) for group, value in one.items()} for one in counted]
        assert sum(abs(shares[0][group] - shares[1][group]) for group in shares[0]) / 2 <= MIXED + 1e-6


@given(SIZES, st.integers(1, 2000))
@settings(max_examples=30, deadline=None)
def test_no_replica_is_loaded_more_than_planned_however_few_seats_there_may_be(sizes: Sizes, most: int) -> None:
    whole = plan_with(sizes)
    part = representative_part(whole, PROBLEM, few_seats=min(most, 100), most_seats=most)
    before, after = loads(whole), loads(part.plan)
    assert before.keys() == after.keys()
    for group, planned in before.items():
        assert max(after[group]) <= max(planned) * (1 + 1e-6)
        assert sum(after[group]) / len(after[group]) <= sum(planned) / len(planned) * (1 + 1e-6)
    fewest = sum(8 if one.micro_batch else 4 for one in {id(one): one for one in whole.replicas}.values())
    assert seats_of(part.plan) <= max(most, fewest)


def test_every_tenth_of_a_thousand_equal_replicas_gets_a_tenth_of_the_traffic() -> None:
    replicas = [
        replace(one, stages=(replace(one.stages[0], devices=(f"east-{number}/0",)),))
        for number, one in enumerate(some(1000, 2.0))
    ]
    part = representative_part(plan_of(*replicas), fleet(1000), few_seats=800, most_seats=4000)
    names = [int(one.stages[0].devices[0].split("-")[1].split("/")[0]) for one in part.plan.replicas]
    assert len(names) in range(100, 111)  # steps of k are 10%
    assert part.share == pytest.approx(len(names) / 1000)
    assert {b - a for a, b in itertools.pairwise(names)} <= {9, 10}


def test_both_sides_keep_their_ratio_although_one_prefill_replica_is_unlike_the_others() -> None:
    """The plan of 1,000 nodes with 8 H100: of 719 that decode, every 46th would be 16, for 14 or 15 that prefill."""
    whole = split(
        [*some(639, 33.5, Role.PREFILL), *some(1, 24.34, Role.PREFILL)], some(719, 29.81, Role.DECODE, seats=320)
    )
    part = representative_part(whole, PROBLEM, few_seats=5000, most_seats=50_000)
    kept = {group: (len(one), sum(one)) for group, one in loads(part.plan).items()}
    assert 5000 <= seats_of(part.plan) <= 20_000
    assert kept[Role.PREFILL, 24.34, "east"][1] == pytest.approx(24.34, rel=BALANCED)
    num_prefill, num_decode = kept[Role.PREFILL, 33.5, "east"][0], kept[Role.DECODE, 29.81, "east"][0]
    capacity = num_prefill * 33.5 + 24.34, num_decode * 29.81
    assert capacity[0] == pytest.approx(capacity[1], rel=1.5 * BALANCED)
    assert len(part.plan.kv_routes) < num_prefill + 1 + num_decode, "filled in turn"


def test_sides_are_in_balance_where_many_unlike_replicas_have_to_stay() -> None:
    """Ten that prefill are one of a kind: too many of a part, which has fewer of the others instead."""
    unlike = [one for number in range(10) for one in some(1, 2.0 + 0.1 * number, Role.PREFILL)]
    whole = split([*some(600, 3.0, Role.PREFILL), *unlike], some(1824, 1.0, Role.DECODE))
    part = representative_part(whole, PROBLEM, few_seats=100, most_seats=1000)
    before, after = loads(whole), loads(part.plan)
    assert seats_of(part.plan) <= 1000
    for group, planned in before.items():
        mean = sum(after[group]) / len(after[group])
        assert mean == pytest.approx(sum(planned) / len(planned), rel=2 * BALANCED)


def test_replicas_that_all_exchange_kv_still_do() -> None:
    senders, receivers = range(40), range(40, 100)
    replicas = [*some(40, 3.0, Role.PREFILL), *some(60, 2.0, Role.DECODE)]
    routes = tuple(KvRoute(prefill=i, decode=j, rate=0.05) for i in senders for j in receivers)
    part = representative_part(plan_of(*replicas, routes=routes), PROBLEM, few_seats=100, most_seats=500)
    numbers = [sum(one.role is role for one in part.plan.replicas) for role in (Role.PREFILL, Role.DECODE)]
    assert len(part.plan.kv_routes) == numbers[0] * numbers[1]
    assert max(route.rate for route in part.plan.kv_routes) == min(route.rate for route in part.plan.kv_routes)
    assert part.plan.served_rate() == pytest.approx(min(3.0 * numbers[0], 2.0 * numbers[1]))
    assert numbers[0] / numbers[1] == pytest.approx(40 / 60, rel=0.01)


def test_equal_replicas_of_two_zones_are_two_groups() -> None:
    whole = plan_of(*some(90, 1.0), *some(30, 1.0, zone="west"))
    part = representative_part(whole, PROBLEM, few_seats=64, most_seats=800)
    kept = {group[2]: len(one) for group, one in loads(part.plan).items()}
    assert kept["east"] / kept["west"] == pytest.approx(3, rel=0.1)


def test_one_of_each_is_the_least_that_stands_for_a_plan() -> None:
    whole = plan_of(*some(50, 1.0), *some(20, 3.0))
    part = representative_part(whole, PROBLEM, few_seats=1, most_seats=3)
    assert [one.rate for one in part.plan.replicas] == [1.0, 3.0]
    assert part.share == pytest.approx(4.0 / 110.0)
