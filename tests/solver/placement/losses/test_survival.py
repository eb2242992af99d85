"""Plans that survive a loss: no other plan leaves more than the bound, and a brute force over nodes agrees."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetis.solver.advice import worst_node, worst_zone
from hetis.solver.check import check_plan
from hetis.solver.check.losses import StatedLoss, check_losses
from hetis.solver.cluster import GpuSlots, NodeGroup
from hetis.solver.engine_rules import EngineRules, Family
from hetis.solver.errors import InfeasibleError, NoPlanFoundError
from hetis.solver.placement.families import run_by
from hetis.solver.placement.losses.survival import Survive
from hetis.solver.placement.rungs import rungs_of
from hetis.solver.plan import Objective, ObjectiveKind, Plan, Role
from hetis.solver.planning import solve_surviving
from hetis.solver.problem import PlacementProblem
from tests.solver.instances import make_problem, make_profile, problems
from tests.solver.searching import plan_or_none

SIZES = Family(max_pool=0, tp_sizes=(1, 2), micro_batches=(1, 4), chunk_tokens=(64,))
FAMILY = run_by(SIZES, EngineRules(name="vllm", max_stages=3))


def left_by(plan: Plan, problem: PlacementProblem, place: str) -> float:
    lost = (worst_zone if place == "zone" else worst_node)(plan, problem)
    share = problem.assumptions.planned_utilisation if problem.objective.kind is ObjectiveKind.GOODPUT else 1.0
    return 0.0 if lost is None else share * lost.rate


@settings(max_examples=max(10, settings().max_examples // 4))
@given(
    problem=problems(kinds=(ObjectiveKind.GOODPUT, ObjectiveKind.THROUGHPUT), max_gpus=5),
    place=st.sampled_from(("node", "zone")),
)
def test_no_plan_of_the_family_leaves_more_than_the_bound(problem: PlacementProblem, place: str) -> None:
    problem = replace(problem, family=FAMILY)
    others = list[Plan]()
    for family in rungs_of(FAMILY).values():
        try:
            found = plan_or_none(replace(problem, family=family), "hetis", gap_target=0.0)
        except NoPlanFoundError:
            continue
        others += [] if found is None else [found]
    most = max((left_by(plan, problem, place) for plan in others), default=0.0)
    try:
        plan, bound = solve_surviving(problem, Survive(place=place), gap_target=0.0)
    except InfeasibleError:
        assert most == pytest.approx(0.0, abs=1e-9)
        return
    except NoPlanFoundError:
        return
    assert bound is not None
    assert check_plan(plan, problem) == ()
    lost = (worst_zone if place == "zone" else worst_node)(plan, problem)
    assert lost is not None
    stated = StatedLoss(place=place, name=lost.name, left=lost.rate, whole=lost.whole)
    assert check_losses(plan, problem, [stated]) == ()
    assert check_losses(plan, problem, [replace(stated, left=lost.rate + 0.01 * lost.whole)])
    assert most <= bound * (1 + 1e-6)
    assert left_by(plan, problem, place) <= bound * (1 + 1e-6)


def fleet(*sizes: int, objective: Objective | None = None) -> PlacementProblem:
    """Return the problem of nodes of so many equal GPUs, on which every replica is one GPU or a TP group of two."""
    groups = [NodeGroup(name=f"n{i}", gpus=(GpuSlots(gpu="L4", count=size),), count=1) for i, size in enumerate(sizes)]
    family = run_by(replace(SIZES, roles=(Role.UNIFIED,)), EngineRules(name="vllm", max_stages=1))
    posed = make_problem(groups, profiles={"L4": make_profile("L4")}, family=family)
    return posed if objective is None else replace(posed, objective=objective)


def rates_of(problem: PlacementProblem) -> dict[int, float]:
    """Return the best rate of a replica by its GPUs."""
    found = dict[int, float]()
    for tp in (1, 2):
        plan = plan_or_none(replace(problem, family=replace(problem.family, tp_sizes=(tp,))), "hetis", gap_target=0.0)
        if plan is not None:
            found[tp] = plan.replicas[0].rate
    return found


def most_left(problem: PlacementProblem, sizes: tuple[int, ...]) -> float:
    """Return the most requests/s that are left after the loss of any node, by trying all replicas of all nodes."""
    rates = rates_of(problem)

    def on_node(size: int) -> list[float]:
        pairs = [(ones, twos) for ones in range(size + 1) for twos in range((size - ones) // 2 + 1)]
        return sorted({ones * rates.get(1, 0.0) + twos * rates.get(2, 0.0) for ones, twos in pairs})

    of_nodes = itertools.product(*map(on_node, sizes))
    return max(sum(rates_on) - max(rates_on) for rates_on in of_nodes)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1), (4, 2, 1), (3, 3), (2, 2, 2), (5, 1, 1)])
def test_the_brute_force_leaves_as_much(sizes: tuple[int, ...]) -> None:
    problem = fleet(*sizes, objective=Objective(kind=ObjectiveKind.THROUGHPUT, ttft_limit_s=None, tpot_limit_s=None))
    best = most_left(problem, sizes)
    plan, bound = solve_surviving(problem, Survive(place="node"), gap_target=0.0)
    assert bound == pytest.approx(best, rel=1e-5)
    assert left_by(plan, problem, "node") == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.6])
def test_a_share_is_left_of_the_most_that_is_served(keep: float) -> None:
    sizes = (4, 1, 1)
    problem = fleet(*sizes, objective=Objective(kind=ObjectiveKind.THROUGHPUT, ttft_limit_s=None, tpot_limit_s=None))
    plan, bound = solve_surviving(problem, Survive(place="node", keep=keep), gap_target=0.0)
    assert bound is None
    assert left_by(plan, problem, "node") >= keep * plan.result.value * (1 - 1e-6)
    rates = rates_of(problem)
    options = [
        {a * rates.get(1, 0.0) + b * rates.get(2, 0.0) for a in range(s + 1) for b in range((s - a) // 2 + 1)}
        for s in sizes
    ]
    wholes = (rates_on for rates_on in itertools.product(*options) if sum(rates_on))
    best = max(sum(one) for one in wholes if sum(one) - max(one) >= keep * sum(one) * (1 - 1e-9))
    assert plan.result.value == pytest.approx(best, rel=1e-5)
    assert best * (1 - 1e-9) <= plan.result.bound <= most_left(problem, sizes) / keep * (1 + 1e-6)
