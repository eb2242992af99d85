"""Plans at an engine's fixed settings: the search finds the best that keeps them, and the checker accepts no others."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hetis.solver.check import Rule, check_plan
from hetis.solver.engine_rules import ATTENTION_DP, MICRO_BATCHES, NOTHING_SET, EngineRules, EngineSettings, Family
from hetis.solver.errors import InfeasibleError, InvalidProblemError
from hetis.solver.mixes import BUSIEST
from hetis.solver.placement.families import STRATEGIES, run_by
from hetis.solver.plan import Objective, ObjectiveKind, Plan, Role, StagePlan, Status
from hetis.solver.planning import solve_placement
from hetis.solver.problem import PlacementProblem
from tests.solver.claimed_plans import claimed, derived_of, plan_of, rules, unclaimed
from tests.solver.instances import (
    FREE_FAMILY,
    SMALL_FAMILY,
    make_node,
    make_problem,
    make_profile,
    make_workload,
    problems,
)
from tests.solver.oracle import best_plan_value
from tests.solver.searching import plan_or_none, worth

REL = 1e-6
ON_AN_ENGINE = run_by(
    Family(max_pool=2, tp_sizes=(1, 2), micro_batches=(1, 4, 16), chunk_tokens=(64,)),
    EngineRules(name="vllm-hetis", max_stages=3, max_pooled_stages=2),
)
APART = replace(SMALL_FAMILY, max_pool=1, tp_sizes=(1, 2), roles=tuple(Role))
UNIFIED = replace(SMALL_FAMILY, roles=(Role.UNIFIED,))

some_settings = st.builds(
    EngineSettings,
    max_num_seqs=st.none() | st.integers(1, 40),
    chunk_tokens=st.sampled_from([(), (32,), (48, 96)]),
    kv_blocks=st.none() | st.integers(5, 400),
)


def at(problem: PlacementProblem, **given: Any) -> PlacementProblem:
    """Return the problem at an engine's settings."""
    return replace(problem, family=problem.family.at(EngineSettings(**given)))


def solved(problem: PlacementProblem) -> Plan | None:
    """Return the plan found, which the checker accepts and which is proved the best; None if there is none."""
    plan = plan_or_none(problem, strategy=problem.family.name, gap_target=0.0)
    if plan is None:
        return None
    assert check_plan(plan, problem) == ()
    assert plan.result.status is Status.OPTIMAL
    return plan


def value_of(problem: PlacementProblem) -> float:
    return worth(solved(problem), problem)


@given(data=st.data())
def test_the_plan_found_is_the_best_that_brute_force_finds(data: st.DataObject) -> None:
    family = data.draw(st.sampled_from((UNIFIED, ON_AN_ENGINE, APART)))
    most = 3 if family is UNIFIED else 4
    kinds = (ObjectiveKind.GOODPUT,) if family is APART else tuple(ObjectiveKind)
    problem = data.draw(problems(max_gpus=most, kinds=kinds, family=family))
    assume(not problem.model.forbidden_cuts)
    problem = replace(problem, family=family.at(data.draw(some_settings)))
    assert value_of(problem) == pytest.approx(best_plan_value(problem), rel=REL)


@given(data=st.data())
def test_settings_that_nothing_reaches_change_nothing(data: st.DataObject) -> None:
    family = data.draw(st.sampled_from((UNIFIED, ON_AN_ENGINE)))
    problem = data.draw(problems(max_gpus=4, family=family))
    assume(not problem.model.forbidden_cuts)
    loose = at(problem, max_num_seqs=10**6, kv_blocks=10**9)  # no card has memory for that many
    assert value_of(loose) == pytest.approx(value_of(problem), rel=REL)


ROOMY = make_problem(
    [make_node("a", "A", gpus=2, nodes=2), make_node("b", "B", nodes=2)],
    workload=make_workload((40, 120)),
    family=replace(SMALL_FAMILY, micro_batches=MICRO_BATCHES),
)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_keeps_to_the_settings(strategy: str) -> None:
    family = STRATEGIES[strategy].restrict(replace(ROOMY.family, roles=tuple(Role)))
    free = replace(ROOMY, family=family)
    kept = at(free, max_num_seqs=11, chunk_tokens=(48,), kv_blocks=90)
    plans = [solve_placement(problem, strategy=strategy, gap_target=0.0) for problem in (free, kept)]
    assert check_plan(plans[1], kept) == ()
    assert plans[1].replicas
    for replica in plans[1].replicas:
        assert max(1, replica.micro_batch) * replica.in_flight <= 11
        assert replica.chunk_tokens in (0 if replica.role is Role.DECODE else 48, 48)
        assert replica.kv_tokens <= 90 * 16
    found = {violation.rule for violation in check_plan(plans[0], kept)}
    assert {Rule.MAX_NUM_SEQS, Rule.SETTING} <= found
    if strategy not in ("splitwise-paper",):
        assert plans[1].result.value < plans[0].result.value


def test_as_many_requests_as_the_engine_runs_are_no_size_of_the_table_but_are_reached() -> None:
    problem = replace(ROOMY, family=replace(ROOMY.family, roles=(Role.UNIFIED,), tp_sizes=(1,), max_pool=0))
    assert 17 not in MICRO_BATCHES
    plan = solved(at(problem, max_num_seqs=17))
    assert plan is not None
    assert {replica.micro_batch * replica.in_flight for replica in plan.replicas} == {17}
    assert at(problem, max_num_seqs=17).family.micro_batches == (*range(1, 9), 10, 12, 14, 16, 17)
    assert at(problem, max_num_seqs=3).family.micro_batches == (1, 2, 3)


@pytest.mark.parametrize("family", [UNIFIED, ON_AN_ENGINE, APART], ids=["any engine", "an engine", "roles apart"])
@pytest.mark.parametrize("most", [2, 3, 5])
def test_micro_batches_in_flight_count_together(family: Family, most: int) -> None:
    """The model does not fit on one card, so that a replica has stages and several micro-batches in flight."""
    nodes = [make_node("a", "A", nodes=2), make_node("b", "B", nodes=2)]
    profiles = {"A": make_profile("A", usable_bytes=8_500_000), "B": make_profile("B", usable_bytes=9_500_000)}
    free = make_problem(nodes, profiles=profiles, workload=make_workload((40, 120)), family=replace(family, max_pool=0))
    kept = at(free, max_num_seqs=most)
    plan, freely = solved(kept), solved(free)
    assert plan is not None
    assert freely is not None
    assert all(max(1, replica.micro_batch) * replica.in_flight <= most for replica in plan.replicas)
    assert any(max(1, replica.micro_batch) * replica.in_flight > most for replica in freely.replicas)
    assert plan.result.value == pytest.approx(best_plan_value(kept), rel=REL)
    assert plan.result.value < freely.result.value


# --- the checker


A_STAGE = StagePlan(gpu="A", tp=1, copies=2, first_layer=0, num_layers=6, devices=("a-0/0", "a-0/1"),
                    kv_head_groups_kept=2)  # fmt: skip


def the_plan(problem: PlacementProblem) -> Plan:
    """One replica with 4 micro-batches of 4 requests, two of them on each copy of its only stage."""
    return plan_of(problem, claimed(unclaimed(A_STAGE), problem))


def test_engines_run_more_requests_than_decode_when_saturated_or_as_many() -> None:
    problem = replace(ROOMY, family=FREE_FAMILY)
    plan = the_plan(problem)
    for seats, broken in ((0, set[Rule]()), (16, {Rule.SETTING}), (17, set[Rule]())):
        more = replace(plan, replicas=(replace(plan.replicas[0], max_num_seqs=seats),))
        assert rules(more, problem) == broken
    kept = at(problem, max_num_seqs=16)
    more = replace(the_plan(kept), replicas=(replace(the_plan(kept).replicas[0], max_num_seqs=20),))
    assert rules(more, kept) == {Rule.MAX_NUM_SEQS}


def test_the_checker_counts_requests_and_blocks() -> None:
    problem = replace(ROOMY, family=FREE_FAMILY)
    assert rules(the_plan(problem), problem) == set()
    held = derived_of(the_plan(problem).replicas[0], problem).kv_held
    blocks = math.ceil(held / 16)
    for chosen, broken in (
        ({"max_num_seqs": 16}, set[Rule]()),
        ({"max_num_seqs": 15}, {Rule.MAX_NUM_SEQS}),
        ({"kv_blocks": blocks}, set()),
        ({"kv_blocks": blocks - 1}, {Rule.KV_BLOCKS}),
    ):
        kept = at(problem, **chosen)
        assert rules(the_plan(kept), kept) == broken
    messages = [str(violation) for violation in check_plan(the_plan(kept), kept)]
    assert messages == [
        f"replica 0: a stage copy must hold KV of {held:.0f} tokens, its engine's blocks hold {16 * (blocks - 1)} "
        "(kv_blocks)"
    ]
    few = at(problem, max_num_seqs=15)
    message = "replica 0: runs 16 requests at once (4 micro-batches of 4), its engine runs at most 15 (max_num_seqs)"
    assert [str(violation) for violation in check_plan(the_plan(few), few)] == [message]


def test_a_plan_claims_no_more_kv_than_its_blocks_hold() -> None:
    kept = at(replace(ROOMY, family=FREE_FAMILY), kv_blocks=100)
    plan = the_plan(kept)
    assert plan.replicas[0].kv_tokens == 2 * 100 * 16  # on two copies
    more = replace(plan, replicas=(replace(plan.replicas[0], kv_tokens=3400),))
    assert rules(more, kept) == {Rule.KV_TOKENS}


# --- descriptions and refusals


def test_the_family_names_settings_only_if_there_are_any() -> None:
    family = Family()
    assert family.at(NOTHING_SET) == family
    assert "engines started" not in family.describe()
    chosen = EngineSettings(max_num_seqs=64, chunk_tokens=(512, 1024), kv_blocks=1)
    text = "at most 64 requests at once, chunks of 512 or 1024 tokens, at most 1 KV block"
    assert family.at(chosen).describe().endswith(f"; engines started with {text}")
    assert "prefill chunks of 512 or 1024 tokens" in family.at(chosen).describe()
    assert EngineSettings(max_num_seqs=1).describe() == "at most 1 request at once"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs is 0, must be 1 to 1000000000"),
        ({"kv_blocks": 10**9 + 1}, "kv_blocks is 1000000001, must be 1 to 1000000000"),
        ({"chunk_tokens": (64, -1)}, "chunk_tokens is -1, must be 1 to 1000000000"),
        ({"chunk_tokens": (64, 32)}, "chunk_tokens are 64, 32, must be ascending, each once"),
        ({"chunk_tokens": tuple(range(1, 18))}, "chunk_tokens are 17 sizes, must be at most 16"),
    ],
)
def test_impossible_settings_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidProblemError) as refused:
        EngineSettings(**given)
    assert str(refused.value) == message


def test_numbers_of_copies_that_the_cost_model_lacks_are_refused() -> None:
    assert set(BUSIEST) == {1, *ATTENTION_DP}
    with pytest.raises(InvalidProblemError, match="attention_dp has 3, must be of 2, 4, 8, 16, 32, 64"):
        replace(SMALL_FAMILY, attention_dp=(2, 3))


def test_settings_that_leave_no_plan_are_named_as_the_reason() -> None:
    with pytest.raises(InfeasibleError) as none:
        solve_placement(at(ROOMY, kv_blocks=3), strategy="hetis")
    assert none.value.reasons == (
        "the setting of engines (at most 3 KV blocks) prevents a plan: with the best engine settings one exists",
    )
    most = solve_placement(ROOMY, strategy="hetis").result.value
    demand = Objective(kind=ObjectiveKind.GPUS, demand_rps=0.9 * most, ttft_limit_s=None, tpot_limit_s=None)
    demanding = replace(ROOMY, objective=demand)
    assert solve_placement(demanding, strategy="hetis").replicas
    with pytest.raises(InfeasibleError) as few:
        solve_placement(at(demanding, max_num_seqs=1), strategy="hetis")
    assert any("the setting of engines (at most 1 request at once)" in reason for reason in few.value.reasons)
