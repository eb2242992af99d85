"""The simplest of the plans that lose little: no plan of tiny fleets has fewer points than are proven."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hetis.solver.budget import SearchSettings
from hetis.solver.check import check_plan
from hetis.solver.errors import InfeasibleError, InvalidProblemError
from hetis.solver.placement.losses.survival import Survive
from hetis.solver.plan import Objective, ObjectiveKind, Plan
from hetis.solver.planning import simplify_placement, solve_placement, solve_surviving
from hetis.solver.problem import Assumptions, PlacementProblem
from tests.solver.instances import make_model, make_node, make_problem
from tests.solver.placement.losses.test_survival import left_by
from tests.solver.placement.losses.test_survival_oracle import BYTES, Whole, fleet, plans_of
from tests.solver.placement.test_nodes import UNIFIED, nodes_of, solved
from tests.solver.placement.test_utilisation import one_stage

NODES = st.lists(
    st.tuples(st.sampled_from(("fast", "slow")), st.integers(1, 2), st.just("east")), min_size=2, max_size=3
).map(tuple).filter(lambda nodes: sum(count for _, count, _ in nodes) <= 4)  # fmt: skip


def points_of(left: float, wanted: float, several: int, shapes: int) -> float:
    """Return the points as docs/cost-model.md defines them."""
    return 100.0 * max(0.0, 1.0 - left / wanted if wanted else 0.0) + 2.0 * several + 5.0 * shapes


def simplest_of(problem: PlacementProblem, within: float, *, gap_target: float = 0.001) -> Plan:
    """Return the simplest of the plans that lose no more than a share of the best."""
    best = solve_placement(problem, gap_target=gap_target)
    return simplify_placement(problem, best, within, SearchSettings(gap_target=gap_target))


def points_of_plan(plan: Plan, problem: PlacementProblem, wanted: float) -> float:
    several = sum(len({name.rpartition("/")[0] for name in one.devices()}) > 1 for one in plan.replicas)
    shapes = {tuple(sorted((stage.gpu, stage.tp) for stage in one.stages)) for one in plan.replicas}
    return points_of(left_by(plan, problem, "node"), wanted, several, len(shapes))


def stated_points(plan: Plan) -> float:
    (note,) = (note for note in plan.notes if note.startswith("the simplest plan within"))
    assert "proven: none has fewer" in note
    found = re.search(r"of ([0-9.]+) points", note)
    assert found is not None
    return float(found[1])


def counted(one: Whole, wanted: float) -> float:
    return points_of(one.left, wanted, one.several, one.shapes)


@settings(max_examples=max(10, settings().max_examples // 4))
@given(nodes=NODES, fast=BYTES, slow=BYTES, share=st.sampled_from((0.05, 0.3, 0.6)), counts_gpus=st.booleans())
def test_no_plan_within_the_limit_has_fewer_points(
    nodes: tuple[tuple[str, int, str], ...], fast: float, slow: float, share: float, counts_gpus: bool
) -> None:
    problem = fleet(nodes, fast=fast, slow=slow)
    plans = list(plans_of(problem, "node", counts_shapes=True))
    most = max(plan.rate for plan in plans)
    assume(most > 0.0)
    if counts_gpus:
        wanted = 0.6 * most
        demand = wanted * problem.assumptions.planned_utilisation
        problem = replace(problem, objective=replace(problem.objective, kind=ObjectiveKind.GPUS, demand_rps=demand))
        serving = [plan for plan in plans if plan.rate >= wanted * (1 - 1e-9)]
        fewest = min(plan.gpus for plan in serving)
        within = [plan for plan in serving if plan.gpus <= (1.0 + share) * fewest + 1e-9]
    else:
        wanted = (1.0 - share) * most
        within = [plan for plan in plans if plan.rate >= wanted * (1 - 1e-9)]
    least = min(counted(plan, wanted) for plan in within)
    plan = simplest_of(problem, share, gap_target=0.0)
    assert check_plan(plan, problem) == ()
    assert stated_points(plan) == pytest.approx(least, rel=1e-3)
    assert points_of_plan(plan, problem, wanted) == pytest.approx(least, rel=1e-4, abs=1e-4)
    if not counts_gpus:
        best = max(one.rate for one in within if counted(one, wanted) <= least + 1e-6)
        assert plan.result.value == pytest.approx(best, rel=1e-4)
        assert plan.result.bound == pytest.approx(most, rel=1e-5)


@settings(max_examples=max(10, settings().max_examples // 4))
@given(nodes=NODES, fast=BYTES, slow=BYTES, share=st.sampled_from((0.05, 0.3, 0.6)))
def test_of_plans_that_survive_none_that_leaves_as_much_has_fewer_points(
    nodes: tuple[tuple[str, int, str], ...], fast: float, slow: float, share: float
) -> None:
    problem = fleet(nodes, fast=fast, slow=slow)
    plans = list(plans_of(problem, "node", counts_shapes=True))
    most = max(plan.left for plan in plans)
    assume(most > 0.0)
    within = [plan for plan in plans if plan.left >= (1.0 - share) * most * (1 - 1e-9)]
    least = min(counted(plan, 0.0) for plan in within)
    survive = Survive(place="node", simplest_within=share)
    plan, bound = solve_surviving(problem, survive, gap_target=0.0)
    assert check_plan(plan, problem) == ()
    assert bound == pytest.approx(most, rel=1e-5)
    assert left_by(plan, problem, "node") >= (1.0 - share) * most * (1 - 1e-5)
    assert points_of_plan(plan, problem, 0.0) == pytest.approx(least, abs=1e-6)


@settings(max_examples=max(10, settings().max_examples // 4))
@given(
    nodes=NODES, fast=BYTES, slow=BYTES, share=st.sampled_from((0.05, 0.3)),
    limit_s=st.floats(-2.0, 0.0).map(lambda exponent: 10.0**exponent),
)  # fmt: skip
def test_the_simplest_plan_keeps_what_may_not_be_lost_with_its_waits(
    nodes: tuple[tuple[str, int, str], ...], fast: float, slow: float, share: float, limit_s: float
) -> None:
    goal = Objective(kind=ObjectiveKind.GOODPUT, ttft_limit_s=limit_s, tpot_limit_s=None)
    problem = replace(fleet(nodes, fast=fast, slow=slow), objective=goal, assumptions=Assumptions())
    try:
        best = solve_placement(problem)
    except InfeasibleError:
        assume(False)
    plan = simplify_placement(problem, best, share, SearchSettings())
    assert check_plan(plan, problem) == ()
    assert plan.result.value >= (1.0 - share) * best.result.value * (1.0 - 1e-9)
    assert plan.result.bound == best.result.bound
    wanted = (1.0 - share) * best.result.value / best.result.utilisation
    assert points_of_plan(plan, problem, wanted) <= points_of_plan(best, problem, wanted) + 1e-4
    if plan.replicas == best.replicas:
        return
    (note,) = (note for note in plan.notes if note.startswith("the simplest plan within"))
    assert f"gives up {1.0 - plan.result.value / best.result.value:.2%}" in note


@pytest.mark.parametrize(("limit_s", "num_gpus"), [(0.03, 2), (0.02, 3)])
def test_where_the_fastest_replicas_leave_prompts_no_time_to_wait_slower_ones_are_taken(
    limit_s: float, num_gpus: int
) -> None:
    problem = one_stage(limit_s, num_gpus, workload=2)
    best = solve_placement(problem)
    plan = simplify_placement(problem, best, 0.05, SearchSettings())
    assert check_plan(plan, problem) == ()
    assert plan.result.value >= 0.95 * best.result.value
    assert any(note.startswith("the simplest plan within 5.0%") for note in plan.notes)


def test_a_plan_inside_nodes_is_taken_where_it_loses_little_and_says_what_it_gave_up() -> None:
    groups = [make_node("a", "A", gpus=3, nodes=2)]
    problem = make_problem(groups, model=make_model(num_layers=40), family=replace(UNIFIED, tp_sizes=(1,)))
    best, simplest = solved(problem), simplest_of(problem, 0.9)
    assert best is not None
    assert nodes_of(simplest) < nodes_of(best)
    assert stated_points(simplest) > 0.0
    assert simplest.result.bound == pytest.approx(best.result.bound, rel=1e-6)
    with pytest.raises(InvalidProblemError, match="only searched for by strategies hetis, hexgen and hexgen2"):
        simplify_placement(problem, best, 0.1, SearchSettings(strategy="splitwise"))


def test_no_plan_is_no_simplest_plan() -> None:
    groups = [make_node("a", "A", gpus=1, nodes=1)]
    problem = make_problem(groups, model=make_model(num_layers=400), family=replace(UNIFIED, tp_sizes=(1,)))
    with pytest.raises(InfeasibleError):
        simplest_of(problem, 0.9)
