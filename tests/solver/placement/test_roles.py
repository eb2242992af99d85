"""Prefill and decode replicas: plans equal those of brute force, bounds are valid, and KV respects its links."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings

from hetis.solver.check import check_plan
from hetis.solver.cluster import Link, Network
from hetis.solver.engine_rules import Family
from hetis.solver.errors import InvalidProblemError
from hetis.solver.placement.families import STRATEGIES
from hetis.solver.placement.replicas.equal_stages import uniform_templates
from hetis.solver.placement.replicas.tabulation import build_cost_tables
from hetis.solver.placement.replicas.template import interval_of, with_fewest_in_flight
from hetis.solver.placement.solve import kv_routes
from hetis.solver.plan import Objective, ObjectiveKind, Plan, Role, Status
from hetis.solver.problem import PlacementProblem
from tests.solver.instances import (
    NO_LIMITS,
    SMALL_FAMILY,
    make_node,
    make_problem,
    make_profile,
    problems,
)
from tests.solver.oracle import best_plan_value
from tests.solver.searching import plan_or_none, worth

KINDS = tuple(ObjectiveKind)
REL = 1e-6
EXAMPLES = settings().max_examples
APART = ("hexgen2", "splitwise")


def of_strategy(problem: PlacementProblem, strategy: str) -> PlacementProblem:
    return replace(problem, family=STRATEGIES[strategy].restrict(replace(SMALL_FAMILY, name=strategy)))


def solved(problem: PlacementProblem, strategy: str = "hetis") -> Plan | None:
    return plan_or_none(problem, strategy)


def value_of(problem: PlacementProblem, strategy: str = "hetis") -> float:
    return worth(solved(problem, strategy), problem)


# --- compared with brute force, with links between zones of any slowness


@pytest.mark.parametrize("strategy", APART)
@settings(max_examples=EXAMPLES // 2)
@given(problem=problems(max_gpus=4, kinds=KINDS))
def test_the_search_of_roles_finds_the_optimum_of_brute_force(strategy: str, problem: PlacementProblem) -> None:
    problem = of_strategy(problem, strategy)
    best, plan = best_plan_value(problem), solved(problem, strategy)
    if plan is None:
        assert best in (0.0, math.inf)
        return
    assert check_plan(plan, problem) == ()
    assert plan.result.value == pytest.approx(best, rel=REL)
    assert plan.result.status is Status.OPTIMAL


# --- strategies contain one another


@settings(max_examples=max(4, EXAMPLES // 8))
@given(problem=problems(max_gpus=6, kinds=KINDS, family=SMALL_FAMILY))
def test_hetis_is_never_worse_than_hexgen2_nor_hexgen2_than_splitwise(problem: PlacementProblem) -> None:
    names = ("hetis", "hexgen", "hexgen2", "splitwise")
    sign = 1.0 if problem.objective.maximises else -1.0
    hetis, hexgen, hexgen2, splitwise = (sign * value_of(problem, name) for name in names)
    assert hetis >= max(hexgen, hexgen2) - REL * abs(hetis)
    assert hexgen2 >= splitwise - REL * abs(hexgen2)


def test_splitwise_keeps_to_one_type_per_role() -> None:
    """Three types for two roles: the third stays idle, where `hexgen2` finds work for it."""
    profiles = {
        "A": make_profile("A", flops=4e12, bytes_per_s=5e9),
        "B": make_profile("B", flops=5e11, bytes_per_s=4e10),
        "C": make_profile("C", flops=5e11, bytes_per_s=2e10),
    }
    problem = make_problem([make_node(n, n, gpus=2) for n in "ABC"], profiles=profiles)
    plan = solved(problem, "splitwise")
    assert plan is not None
    types = {role: {s.gpu for r in plan.replicas if r.role is role for s in r.stages} for role in Role}
    assert [len(types[role]) for role in (Role.UNIFIED, Role.PREFILL, Role.DECODE)] == [0, 1, 1]
    assert plan.result.value < value_of(problem, "hexgen2")
    assert "each on one GPU type" in plan.family


# --- where roles pay


def split_fleet(**network: Link) -> PlacementProblem:
    """Cards that compute well in one zone, cards that read memory well in the other, and a limit on TPOT."""
    nodes = [make_node("a", "A", gpus=2, zone="east"), make_node("b", "B", gpus=2, zone="west")]
    profiles = {
        "A": make_profile("A", flops=4e12, bytes_per_s=3e9, with_step=False),
        "B": make_profile("B", flops=1e11, bytes_per_s=4e10, with_step=False),
    }
    links = Network(default=Link(bytes_per_s=5e9, latency_s=1e-5), **network)  # type: ignore[arg-type]
    return make_problem(
        nodes, profiles=profiles, network=links, objective=Objective(ttft_limit_s=None, tpot_limit_s=0.004)
    )


def test_each_role_goes_to_the_cards_that_suit_it() -> None:
    problem = split_fleet(zone_default=Link(bytes_per_s=1e12, latency_s=1e-5))
    plan = solved(problem)
    assert plan is not None
    assert check_plan(plan, problem) == ()
    roles = {(r.role, r.stages[0].gpu) for r in plan.replicas}
    assert {(Role.PREFILL, "A"), (Role.DECODE, "B")} <= roles
    assert not roles & {(Role.PREFILL, "B"), (Role.DECODE, "A")}
    assert all(r.kv_zones == ("east", "west") for r in plan.replicas if r.role is Role.PREFILL)
    unified = replace(problem, family=replace(problem.family, roles=(Role.UNIFIED,)))
    assert plan.result.value > 1.25 * value_of(unified)


@pytest.mark.parametrize("limit_s", [None, 60.0])
def test_a_prefill_replica_has_no_more_in_flight_than_its_rate_needs(limit_s: float | None) -> None:
    problem = replace(split_fleet(), objective=Objective(ttft_limit_s=limit_s, tpot_limit_s=None))
    costs = build_cost_tables(problem)
    busy = problem.family.in_flight.index(max(problem.family.in_flight))
    tried = 0
    for template in uniform_templates(costs):
        many = replace(template, in_flight_index=busy)
        many = replace(many, interval_s=interval_of(costs, many))
        few = with_fewest_in_flight(costs, many)
        if limit_s is not None or costs.mixes[template.mix].role is not Role.PREFILL:
            assert few is many
        elif len(template.stages) == 1:
            tried += 1
            assert (problem.family.in_flight[few.in_flight_index], few.rate) == (2, many.rate)  # one has no slack
            assert interval_of(costs, few) == pytest.approx(few.interval_s, rel=1e-12)
    assert tried or limit_s is not None


@pytest.mark.parametrize("bytes_per_s", [1e5, 1e7, 1e8])
def test_a_slow_link_changes_the_plan_and_is_never_overdrawn(bytes_per_s: float) -> None:
    """KV of a request is 120 tokens x 6 layers x 512 bytes: the link carries some requests, or hardly any."""
    fast = solved(split_fleet(zone_default=Link(bytes_per_s=1e12, latency_s=1e-5)))
    problem = split_fleet(zone_default=Link(bytes_per_s=bytes_per_s, latency_s=1e-5))
    slow = solved(problem)
    assert fast is not None
    assert slow is not None
    assert check_plan(slow, problem) == ()
    assert slow.result.value < fast.result.value
    zone_of = [replica.stages[0].gpu for replica in slow.replicas]
    kv_bytes = 120 * problem.model.num_layers * problem.model.head_groups * problem.model.kv_bytes_per_token_group()
    crossing = sum(route.rate for route in slow.kv_routes if zone_of[route.prefill] != zone_of[route.decode])
    assert crossing * kv_bytes <= bytes_per_s * (1 + REL)
    assert [route.rate for route in slow.kv_routes] != pytest.approx([route.rate for route in fast.kv_routes])


@settings(max_examples=max(4, EXAMPLES // 8))
@given(problem=problems(max_gpus=6, family=SMALL_FAMILY))
def test_routes_never_exceed_either_side_and_carry_what_is_served(problem: PlacementProblem) -> None:
    plan = solved(problem, "hexgen2")
    if plan is None:
        return
    sent, received = Counter[int](), Counter[int]()
    for route in plan.kv_routes:
        assert route.rate > 0
        sent[route.prefill] += route.rate  # type: ignore[assignment]
        received[route.decode] += route.rate  # type: ignore[assignment]
    for load, role in ((sent, Role.PREFILL), (received, Role.DECODE)):
        for i, rate in load.items():
            assert plan.replicas[i].role is role
            assert rate <= plan.replicas[i].rate * (1 + 1e-9)
    served = problem.assumptions.planned_utilisation * sum(route.rate for route in plan.kv_routes)
    assert plan.result.value == pytest.approx(served, rel=1e-9)


# --- bounds in closed form


def test_flows_are_split_over_replicas_without_a_rest() -> None:
    problem = split_fleet(zone_default=Link(bytes_per_s=1e12, latency_s=1e-5))
    costs = build_cost_tables(problem)
    templates = uniform_templates(costs)
    of_side = {costs.side_of(t.scope, t.mix): t for t in templates}
    afar = of_side[costs.routes.side(Role.PREFILL, 0, sends_afar=True)]
    local = of_side[costs.routes.side(Role.PREFILL, 0)]
    here, there = (of_side[costs.routes.side(Role.DECODE, zone)] for zone in (0, 1))
    flows = np.zeros((2, 2))
    flows[0, 1] = 0.5 * min(afar.rate, there.rate)
    flows[0, 0] = min(afar.rate - flows[0, 1] + local.rate, here.rate)
    found = kv_routes(costs, [afar, local, here, there], flows)
    assert sum(route.rate for route in found) == pytest.approx(flows.sum())
    assert all((route.prefill, route.decode) != (1, 3) for route in found), "a local sender does not cross zones"


# --- the family


def test_family_has_both_halves_of_a_request_or_neither() -> None:
    with pytest.raises(InvalidProblemError, match=r"^roles are unified, prefill, must be unified, or prefill and"):
        Family(roles=(Role.UNIFIED, Role.PREFILL))


def test_a_family_without_roles_has_none_in_its_plans() -> None:
    problem = split_fleet()
    unified = replace(problem, family=replace(problem.family, roles=(Role.UNIFIED,)))
    plan = solved(unified)
    assert plan is not None
    assert {replica.role for replica in plan.replicas} == {Role.UNIFIED}
    assert plan.family.endswith("every replica prefills and decodes")


@settings(max_examples=EXAMPLES // 3)
@given(problems(max_gpus=4, kinds=KINDS, family=SMALL_FAMILY))
def test_roles_never_make_the_optimum_worse(problem: PlacementProblem) -> None:
    unified = value_of(replace(problem, family=replace(SMALL_FAMILY, roles=(Role.UNIFIED,))))
    sign = 1.0 if problem.objective.maximises else -1.0
    assert sign * value_of(problem) >= sign * unified - REL * abs(unified) or math.isinf(unified)


def test_demand_is_met_by_what_is_served_end_to_end() -> None:
    """Prefill replicas alone serve no request: a demand counts requests that leave a decode replica."""
    most = value_of(split_fleet(zone_default=Link(bytes_per_s=1e12, latency_s=1e-5)))
    problem = split_fleet(zone_default=Link(bytes_per_s=1e12, latency_s=1e-5))
    demand = replace(NO_LIMITS, kind=ObjectiveKind.GPUS, tpot_limit_s=0.004, demand_rps=0.9 * most)
    problem = replace(problem, objective=demand)
    plan = solved(problem)
    assert plan is not None
    assert check_plan(plan, problem) == ()
    assert plan.result.value == 4
    beyond = replace(problem, objective=replace(demand, demand_rps=1.01 * most))
    assert solved(beyond) is None
