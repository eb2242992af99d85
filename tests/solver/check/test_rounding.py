"""Claims within the checker's rounding are sound, and those just beyond it are not."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from hetis.solver.check import Rule, check_plan, memory
from hetis.solver.check.rederive import MemoryUse, Rederivation
from hetis.solver.check.replica_shapes import PoolShape, StageShape
from hetis.solver.cluster import Link
from hetis.solver.constraints import AtMost, Sum
from hetis.solver.plan import KvRoute, ObjectiveKind, Plan, ReplicaPlan, Role, StagePlan, Status
from hetis.solver.problem import PlacementProblem
from tests.solver.claimed_plans import claimed, derived_of, plan_of, rules, unclaimed
from tests.solver.instances import FREE_FAMILY, NO_LIMITS, make_node, make_problem, make_profile

WITHIN, BEYOND = 0.9e-6, 1.1e-6  # just within and beyond the millionth by which claims may differ
STAGE = StagePlan(gpu="A", tp=1, copies=1, first_layer=0, num_layers=6, devices=("a-0/0",), kv_head_groups_kept=2)
PROBLEM = make_problem([make_node("a", "A", gpus=2, nodes=2)], family=FREE_FAMILY)
REPLICA = claimed(unclaimed(STAGE), PROBLEM)


def found(replica: ReplicaPlan, problem: PlacementProblem = PROBLEM) -> set[Rule]:
    return rules(plan_of(problem, replica), problem)


@pytest.mark.parametrize(("name", "rule"), [("rate", Rule.RATE), ("tpot_s", Rule.TPOT), ("ttft_s", Rule.TTFT)])
def test_a_claim_may_differ_by_a_millionth(name: str, rule: Rule) -> None:
    value = getattr(REPLICA, name)
    assert found(REPLICA) == set()
    for sign in (-1, 1):
        assert found(replace(REPLICA, **{name: value * (1 + sign * WITHIN)})) == set()
        beyond = found(replace(REPLICA, **{name: value * (1 + sign * BEYOND)}))
        assert beyond - {Rule.VALUE} == {rule}  # the value is that of the rates


def test_room_for_tokens_may_differ_by_one_or_a_millionth() -> None:
    tokens = derived_of(REPLICA, PROBLEM).kv_tokens
    assert tokens < 1e6
    for sign in (-1, 1):
        assert found(replace(REPLICA, kv_tokens=math.floor(tokens) + sign)) == set()
        assert found(replace(REPLICA, kv_tokens=math.floor(tokens) + 2 * sign)) == {Rule.KV_TOKENS}
    huge = replace(PROBLEM, profiles={"A": make_profile("A", usable_bytes=10**13)})
    room = derived_of(REPLICA, huge).kv_tokens
    assert room > 1e8
    for share, expected in ((WITHIN, set[Rule]()), (BEYOND, {Rule.KV_TOKENS})):
        assert found(replace(claimed(REPLICA, huge), kv_tokens=math.floor(room * (1 + share))), huge) == expected


@pytest.mark.parametrize(("name", "rule"), [("tpot", Rule.TPOT_LIMIT), ("ttft", Rule.TTFT_LIMIT)])
def test_a_latency_may_exceed_its_limit_by_a_millionth(name: str, rule: Rule) -> None:
    latency_s = getattr(REPLICA, f"{name}_s")
    for share, expected in ((WITHIN, set[Rule]()), (BEYOND, {rule})):
        limits = {f"{name}_limit_s": latency_s / (1 + share)}
        limited = replace(PROBLEM, objective=replace(NO_LIMITS, **limits))
        assert found(REPLICA, limited) == expected


def test_bytes_may_exceed_the_memory_by_a_thousand_millionth() -> None:
    use = MemoryUse(where="here", rule=Rule.RANK_MEMORY, num_bytes=0.0, usable_bytes=10**12)
    assert replace(use, num_bytes=1e12 + 900).fits
    assert not replace(use, num_bytes=1e12 + 1100).fits


def result_with(plan: Plan, *, value: float, bound: float, gap: float, status: Status = Status.FEASIBLE) -> set[Rule]:
    result = replace(plan.result, value=value, bound=bound, gap=gap, status=status)
    return rules(replace(plan, result=result), PROBLEM)


def test_value_bound_gap_and_status_are_rounded() -> None:
    plan = plan_of(PROBLEM, REPLICA)
    value = plan.result.value
    for sign in (-1, 1):
        for share, expected in ((WITHIN, set[Rule]()), (BEYOND, {Rule.VALUE})):
            claim = value * (1 + sign * share)
            assert result_with(plan, value=claim, bound=1.5 * claim, gap=0.5) == expected
        for share, expected in ((WITHIN, set[Rule]()), (BEYOND, {Rule.GAP})):
            assert result_with(plan, value=value, bound=1.5 * value, gap=0.5 * (1 + sign * share)) == expected
    for share, expected in ((0.9e-9, set[Rule]()), (1.1e-9, {Rule.BOUND})):
        assert result_with(plan, value=value, bound=value * (1 - share), gap=0.0) == expected
    for gap, expected in ((0.99e-6, set[Rule]()), (1.01e-6, {Rule.STATUS})):
        claim = result_with(plan, value=value, bound=value * (1 + gap), gap=gap, status=Status.OPTIMAL)
        assert claim == expected
    assert result_with(plan, value=value, bound=value * (1 + 5e-8), gap=5e-8 + 0.9e-9) == set()
    assert result_with(plan, value=value, bound=value * (1 + 5e-8), gap=5e-8 + 1.1e-9) == {Rule.GAP}


def test_a_plan_of_nothing_has_no_value_and_no_gap() -> None:
    plan = plan_of(PROBLEM)
    assert plan.result.value == 0.0
    assert result_with(plan, value=0.0, bound=0.0, gap=0.0) == set()
    assert result_with(plan, value=0.9e-12, bound=0.9e-12, gap=0.0) == set()
    assert result_with(plan, value=1.1e-12, bound=1.1e-12, gap=0.0) == {Rule.VALUE}
    assert result_with(plan, value=0.0, bound=1.0, gap=1.0) == {Rule.GAP}


@pytest.mark.parametrize("kind", [ObjectiveKind.COST, ObjectiveKind.GPUS])
def test_a_demand_is_met_but_for_rounding(kind: ObjectiveKind) -> None:
    for share, expected in ((0.9e-9, set[Rule]()), (1.1e-9, {Rule.DEMAND})):
        demand = 0.9 * REPLICA.rate * (1 + share)
        wanted = replace(PROBLEM, objective=replace(NO_LIMITS, kind=kind, demand_rps=demand))
        assert found(REPLICA, wanted) == expected


def test_a_sum_may_exceed_its_most_by_a_millionth() -> None:
    plan = plan_of(PROBLEM, REPLICA)
    for share, num_broken in ((WITHIN, 0), (BEYOND, 1)):
        for of in (Sum.GPUS, Sum.USD):
            asked = replace(PROBLEM, constraints=(AtMost(of=of, most=1 / (1 + share)),))
            assert len([v for v in check_plan(plan, asked) if v.rule is Rule.CONSTRAINT]) == num_broken


def test_routes_may_exceed_a_rate_by_a_millionth() -> None:
    zone = PROBLEM.cluster.zones()[0]
    prefill = claimed(unclaimed(STAGE, role=Role.PREFILL, kv_zones=(zone,)), PROBLEM)
    decode = claimed(unclaimed(replace(STAGE, devices=("a-1/0",)), role=Role.DECODE), PROBLEM)
    least = min(prefill.rate, decode.rate)
    for share, is_beyond in ((WITHIN, False), (BEYOND, True)):
        route = KvRoute(prefill=0, decode=1, rate=least * (1 + share))
        assert (Rule.ROUTE_RATE in rules(plan_of(PROBLEM, prefill, decode, routes=(route,)), PROBLEM)) == is_beyond


def test_a_rank_that_does_not_hold_its_weights_has_no_room_for_kv_either() -> None:
    """The rank's attention workers hold all KV, so its own memory only decides whether there is any room at all."""
    link = Link(bytes_per_s=1e9, latency_s=0.0)
    pool = PoolShape(gpu="B", cards=1, head_groups=2, link=link)
    stage = StageShape(gpu="A", tp=1, copies=1, layers=6, intra_link=link, hop_link=link, pool=pool)
    rooms = []
    for usable_bytes in (2_000_000, 10**9):
        profiles = {"A": make_profile("A", usable_bytes=usable_bytes), "B": make_profile("B")}
        problem = make_problem([make_node("a", "A"), make_node("b", "B")], profiles=profiles)
        setting = Rederivation(problem).setting(micro_batch=4, in_flight=1, chunk_tokens=64)
        rooms.append(memory.kv_room_of_a_copy(setting, stage, is_first=True, is_last=True))
    assert rooms[0] == 0.0
    assert 0 < rooms[1] < math.inf
