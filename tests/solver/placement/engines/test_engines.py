"""Plans for engines: the search that lists all pipelines finds the best of them, and proves it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hetis.solver.budget import Budget
from hetis.solver.check import check_plan
from hetis.solver.engine_rules import EngineRules, Family
from hetis.solver.errors import InfeasibleError, InvalidProblemError, NoPlanFoundError
from hetis.solver.model import DraftShape
from hetis.solver.placement.candidates import Evaluator, candidates_of
from hetis.solver.placement.columns import Columns
from hetis.solver.placement.families import ENGINES, STRATEGIES, run_by
from hetis.solver.placement.master import Master
from hetis.solver.placement.replicas.tables import CostTables
from hetis.solver.placement.replicas.tabulation import build_cost_tables
from hetis.solver.plan import AttentionWorkerPool, ObjectiveKind, Role
from hetis.solver.planning import solve_placement
from hetis.solver.problem import PlacementProblem
from tests.solver.instances import (
    ENGINE,
    NO_LIMITS,
    PLUGIN,
    make_model,
    make_node,
    make_problem,
    problems,
)
from tests.solver.oracle import best_plan_value
from tests.solver.placement.engines.families import (
    CHARGED,
    EXAMPLES,
    PLAIN,
    REL,
    WITH_WORKERS,
    a_plan,
    a_problem,
    value_of,
)

WITH_MORE_STAGES = run_by(
    Family(max_pool=2, tp_sizes=(1, 2), micro_batches=(4,), chunk_tokens=(64,)),
    EngineRules(name="vllm-hetis", max_stages=5),
)
SLOW = replace(PLUGIN, local_s=10.0)


@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_the_plan_found_is_the_best_that_brute_force_finds(data: st.DataObject) -> None:
    problem = a_problem(data)
    best = best_plan_value(problem)
    assert value_of(problem) == pytest.approx(best, rel=REL)


def with_twin_zone(problem: PlacementProblem) -> PlacementProblem:
    """Return the problem with every node duplicated in another zone."""
    groups = [replace(group, zone="east") for group in problem.cluster.node_groups]
    twins = [replace(group, name=f"twin-{group.name}", zone="west") for group in groups]
    return replace(problem, cluster=replace(problem.cluster, node_groups=(*groups, *twins)))


@settings(max_examples=EXAMPLES)
@given(
    problem=problems(max_gpus=4, family=WITH_WORKERS, num_zones=1),
    ttft_s=st.floats(-3.0, 1.0).map(lambda exponent: 10.0**exponent),
    shares=st.lists(st.tuples(st.floats(0.0, 1.0), st.floats(0.5, 2.0)), min_size=2, max_size=4),
)
def test_what_is_learned_of_a_replica_holds_in_every_zone_family_and_utilisation_that_share_it(
    problem: PlacementProblem, ttft_s: float, shares: list[tuple[float, float]]
) -> None:
    goal = replace(problem.objective, ttft_limit_s=ttft_s)
    problem = replace(with_twin_zone(problem), objective=goal)
    tables, apart = build_cost_tables(problem), replace(problem.family, max_pool=0, roles=tuple(Role))
    others = replace(build_cost_tables(replace(problem, family=apart)), evaluated=tables.evaluated)
    known = list[int]()
    for reserved, share in shares:
        for each in (tables, others):
            check_what_is_learned(each.at(0.9 * (1.0 - reserved), reserved=reserved), share)
            known.append(len(tables.evaluated))
    # Replicas that prefill and decode are the same ones in both families, so at most those of two roles are new.
    assert known[0] <= known[1] <= 3 * known[0]


def check_what_is_learned(costs: CostTables, share: float) -> None:
    """Check that each evaluator knows what one without earlier results finds, up to a share of the best interval."""
    without, others = candidates_of(costs)
    candidates = [*without, *others]
    assume(candidates)
    assert len({id(each.evaluator) for each in candidates}) < len(candidates) or len(costs.scopes) < 2
    for each in candidates:
        apart = replace(costs, shared={}, evaluated={})
        alone = Evaluator(apart, each.shape, each.evaluator.mixes, each.workers, 0)
        every, least_s = np.arange(len(each.fits)), alone.shortest_s.copy()
        alone.evaluate(every, np.full(len(every), np.inf))
        best_s = np.where(alone.is_known, alone.shortest_s, np.inf)
        assert np.all(best_s >= least_s * (1 - REL)), "an interval below the shortest conceivable"
        shared = each.evaluator
        shared.evaluate(every, np.where(np.isfinite(best_s), best_s * share, 1.0))
        assert np.all(shared.shortest_s <= best_s * (1 + REL)), "more is ruled out than was looked at"
        assert shared.shortest_s[shared.is_known] == pytest.approx(best_s[shared.is_known], rel=REL)
        assert np.all(shared.is_known[np.isfinite(best_s) & (best_s * share > best_s)])
        for c in np.flatnonzero(shared.is_known)[:3]:
            template = each.template(int(c))
            assert template.interval_s == pytest.approx(best_s[c], rel=1e-5)
            assert template.scope == each.shape.scope


@given(data=st.data(), num=st.integers(1, 12), num_rows=st.integers(1, 3))
def test_columns_are_left_out_only_where_another_does_as_much_with_no_more(
    data: st.DataObject, num: int, num_rows: int
) -> None:
    few = st.integers(0, 2)
    uses = np.array(
        data.draw(st.lists(st.lists(few, min_size=num_rows, max_size=num_rows), min_size=num, max_size=num))
    )
    rates = np.array(data.draw(st.lists(few.map(float), min_size=num, max_size=num)))
    sides = np.array(data.draw(st.lists(st.integers(0, 1), min_size=num, max_size=num)))
    columns = Columns(rates, uses.sum(axis=1).astype(float), uses, sides)
    kept = columns.undominated().tolist()

    def is_outdone(i: int, j: int) -> bool:
        return bool(sides[i] == sides[j] and rates[j] >= rates[i] and np.all(uses[j] <= uses[i]))

    for i in range(num):
        others = [j for j in kept if j != i and is_outdone(i, j)]
        assert (i in kept) == (not others)


@given(problem=problems(max_gpus=4, family=CHARGED))
def test_an_engine_with_workers_is_never_worse_than_without_and_pays_only_where_it_has_some(
    problem: PlacementProblem,
) -> None:
    charged, free = (value_of(replace(problem, family=family)) for family in (CHARGED, WITH_WORKERS))
    stock = value_of(replace(problem, family=PLAIN))
    assert stock * (1 - REL) <= charged <= free * (1 + REL)
    costly = replace(CHARGED, engine=replace(ENGINE, max_stages=3, max_pooled_stages=2, plugin=SLOW))
    assert value_of(replace(problem, family=costly)) == pytest.approx(stock, rel=REL, abs=0.1)


def test_the_checker_knows_what_an_engine_does_not_run() -> None:
    plan, problem = a_plan()
    assert check_plan(plan, problem) == ()
    replica = plan.replicas[0]
    broken = [
        replace(replica, in_flight=replica.in_flight % 3 + 1),
        replace(replica, stages=tuple(replace(stage, copies=2) for stage in replica.stages)),
    ]
    if replica.attention_workers:
        broken.append(replace(replica, role=Role.DECODE))
        broken.append(replace(replica, attention_workers=replica.attention_workers[:1]))
    for one in broken:
        found = check_plan(replace(plan, replicas=(one, *plan.replicas[1:])), problem)
        assert any("vllm-hetis" in violation.message for violation in found), one


def test_uneven_workers_are_not_an_engines() -> None:
    plan, problem = a_plan()
    replica = plan.replicas[0]
    pools = (
        AttentionWorkerPool(stage=0, gpu="B", devices=("b-0/0",), kv_head_groups=1),
        AttentionWorkerPool(stage=1, gpu="B", devices=("b-1/0", "b-2/0"), kv_head_groups=2),
    )
    stages = tuple(replace(replica.stages[0], devices=(f"a-{i}/0",), tp=1) for i in range(2))
    uneven = replace(replica, stages=stages, attention_workers=pools, in_flight=2)
    messages = [v.message for v in check_plan(replace(plan, replicas=(uneven,)), problem)]
    assert any("different numbers" in message for message in messages)
    assert any("different head groups" in message for message in messages)


@settings(max_examples=EXAMPLES)
@given(problem=problems(max_gpus=5, family=PLAIN), fewest=st.integers(1, 4))
def test_more_layers_to_a_stage_never_serve_more(problem: PlacementProblem, fewest: int) -> None:
    assume(not problem.model.forbidden_cuts)
    few, more = (
        replace(problem, family=replace(PLAIN, engine=EngineRules(name="vllm", max_stages=3, min_layers=layers)))
        for layers in (fewest, fewest + 1)
    )
    better = (lambda a, b: a >= b * (1 - REL)) if problem.objective.maximises else (lambda a, b: a <= b * (1 + REL))
    assert better(value_of(few), value_of(more))


@pytest.mark.parametrize("strategy", ["hetis", "uniform"])
@pytest.mark.parametrize("limit", [{"max_gpus": 2}, {"min_layers": 3}, {"max_stages": 2}])
def test_limits_of_a_replica_hold_for_every_strategy(strategy: str, limit: dict[str, int]) -> None:
    groups = [make_node("a", "A", nodes=3), make_node("b", "B", nodes=4)]
    family = STRATEGIES[strategy].restrict(Family(max_pool=2, tp_sizes=(1, 2), micro_batches=(4,), chunk_tokens=(64,)))
    rules = EngineRules(name="vllm", **limit)
    problem = make_problem(groups, model=make_model(num_layers=8), family=run_by(family, rules))
    plan = solve_placement(problem, strategy=strategy)
    assert plan.replicas
    assert check_plan(plan, problem) == ()
    nine = replace(problem, family=replace(problem.family, engine=replace(rules, min_layers=9)))
    assert any("must have at least 9" in violation.message for violation in check_plan(plan, nine))


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_says_its_rules_and_where_they_come_from(name: str) -> None:
    family = run_by(Family(), EngineRules(name=name))
    assert name in family.describe()
    assert ENGINES[name].source
    assert ENGINES[name].version


def test_vllm_hands_no_kv_over_from_several_stages_if_a_layer_drafts() -> None:
    drafting = replace(make_model(), draft=DraftShape(tokens=1, acceptance=0.5))
    for name, most in (("vllm", 1), ("sglang", 3)):
        rules = EngineRules(name=name, max_stages=3)
        assert rules.stages_of(Role.PREFILL, drafting) == most
        assert rules.stages_of(Role.PREFILL, make_model()) == 3
    assert EngineRules(name="vllm", max_stages=3).stages_of(Role.UNIFIED, drafting) == 3


def test_what_no_engine_runs_is_refused() -> None:
    with pytest.raises(InvalidProblemError, match="not one of vllm-hetis, vllm, sglang"):
        run_by(Family(), EngineRules(name="none"))
    with pytest.raises(InvalidProblemError, match="strategy hetis plans for an engine: give the family its rules"):
        solve_placement(make_problem([make_node("a", "A")], family=Family()))
    with pytest.raises(InvalidProblemError, match="one for each stage"):
        Family(engine=EngineRules(name="vllm"))
    with pytest.raises(InvalidProblemError, match="max_stages is 0"):
        EngineRules(name="vllm", max_stages=0)
    with pytest.raises(InvalidProblemError, match="min_layers is 0"):
        EngineRules(name="vllm", min_layers=0)
    with pytest.raises(InvalidProblemError, match="must be at most 64"):
        EngineRules(name="vllm", max_stages=2**31 - 1)  # no list of this length is built


def test_forbidden_cuts_are_refused_but_by_equal_stages() -> None:
    model = make_model(forbidden_cuts=frozenset({2}))
    problem = make_problem([make_node("a", "A", nodes=2)], model=model, family=PLAIN)
    with pytest.raises(InvalidProblemError, match="only strategy uniform"):
        solve_placement(problem, strategy="hetis")


def test_a_search_without_time_says_so() -> None:
    problem = make_problem([make_node("a", "A", nodes=2)], family=WITH_WORKERS)
    with pytest.raises(NoPlanFoundError):
        solve_placement(problem, strategy="hetis", budget=Budget(time_limit_s=0.0))


@pytest.mark.parametrize(("is_settled", "error"), [(False, NoPlanFoundError), (True, InfeasibleError)])
def test_whole_counts_that_found_nothing_prove_nothing_unless_they_came_to_their_end(
    monkeypatch: pytest.MonkeyPatch, is_settled: bool, error: type[Exception]
) -> None:
    """If HiGHS gave up on plans that meet the demand, "no plan exists" would be false: the relaxation has one."""
    fleet = [make_node("a", "BIG", gpus=2)]
    most = value_of(make_problem(fleet, family=PLAIN))
    objective = replace(NO_LIMITS, kind=ObjectiveKind.GPUS, demand_rps=most / 2)
    problem = make_problem(fleet, objective=objective, family=PLAIN)
    assert solve_placement(problem, strategy="hetis").replicas
    monkeypatch.setattr(Master, "solve_milp", lambda *_args, **_options: (None, is_settled))
    with pytest.raises(error):
        solve_placement(problem, strategy="hetis")
