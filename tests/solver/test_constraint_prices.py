"""The checker sees broken constraints, and the prices of constraints hold the difference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings

from hetis.solver.budget import Budget, SearchSettings
from hetis.solver.check import Rule, check_plan
from hetis.solver.constraints import (
    PARTS,
    AtMost,
    Constraint,
    Duty,
    Exclude,
    Replicas,
    RestrictRole,
    Sum,
    Use,
    WithoutSharedExperts,
    WithoutTp,
    WithoutWorkers,
)
from hetis.solver.errors import BrokenProofError
from hetis.solver.plan import Objective, ObjectiveKind, Plan, Role
from hetis.solver.planning import price_constraints
from hetis.solver.problem import PlacementProblem
from tests.models import shape_of
from tests.solver.instances import (
    NO_LIMITS,
    SMALL_FAMILY,
    make_model,
    make_node,
    make_problem,
    make_profile,
)
from tests.solver.searching import plan_or_none
from tests.solver.test_constraints import EXAMPLES, best_by_brute_force, constrained, of, solved, two_types


def broken_by(plan: Plan, problem: PlacementProblem) -> set[str]:
    return {violation.where for violation in check_plan(plan, problem) if violation.rule is Rule.CONSTRAINT}


def test_the_checker_sees_every_broken_constraint() -> None:
    free = two_types()
    plan = solved(free)  # five replicas, no workers, all GPUs
    broken: list[Constraint] = [
        Exclude(gpus=of("gpu=b/0")),
        RestrictRole(gpus=of("type=B"), duty=Duty.WORKER, only=True),
        RestrictRole(gpus=of("node=a-0"), duty=Duty.UNIFIED, only=False),
        WithoutTp(tp=1),
        Replicas(least=6, most=None),
        AtMost(of=Sum.GPUS, most=5),
        AtMost(of=Sum.USD, most=5.99),
    ]
    kept: list[Constraint] = [
        Use(gpus=of("zone=default"), least=6),
        RestrictRole(gpus=of("type=A"), duty=Duty.WORKER, only=False),
        WithoutWorkers(),
        WithoutTp(tp=4),
        Replicas(least=0, most=5),
        AtMost(of=Sum.GPUS, most=6),
        AtMost(of=Sum.USD, most=6),
    ]
    assert broken_by(plan, replace(free, constraints=(*broken, *kept))) == set(map(str, broken))
    idle = solved(two_types(Exclude(gpus=of("type=B"))))
    assert broken_by(idle, replace(free, constraints=(Use(gpus=of("type=B"), least=1),))) == {"--pin type=B:use=1"}
    attended = solved(
        two_types(RestrictRole(gpus=of("type=B"), duty=Duty.WORKER, only=True), Use(gpus=of("type=B"), least=2))
    )
    forbidden: Iterator[Constraint] = iter(
        (WithoutWorkers(), RestrictRole(gpus=of("type=B"), duty=Duty.PRIMARY, only=True))
    )
    for constraint in forbidden:
        assert broken_by(attended, replace(free, constraints=(constraint,))) == {str(constraint)}


def test_duties_are_of_two_kinds() -> None:
    assert Duty.WORKER.others == {Duty.PRIMARY}
    assert Duty.PREFILL.others == {Duty.UNIFIED, Duty.DECODE}
    assert {Duty.PRIMARY, Duty.WORKER} == PARTS


# --- prices


@settings(max_examples=EXAMPLES // 3)
@given(constrained())
def test_prices_of_constraints_hold_the_difference(problem: PlacementProblem) -> None:
    plan = plan_or_none(problem)
    if plan is None:
        return
    sign = 1.0 if problem.objective.maximises else -1.0
    best = best_by_brute_force(problem)
    for price in price_constraints(problem, plan, SearchSettings()):
        assert price.is_solved
        rest = tuple(each for each in problem.constraints if each not in price.constraints)
        gain = sign * (best_by_brute_force(replace(problem, constraints=rest)) - best)
        room = 1e-4 * max(best, 1.0)
        assert price.least - room <= gain <= price.most + room


def test_prices_that_nobody_had_time_for_are_bounds() -> None:
    for objective in (NO_LIMITS, Objective(kind=ObjectiveKind.GPUS, demand_rps=50.0)):
        problem = two_types(Exclude(gpus=of("node=a-0")), objective=objective)
        plan = solved(problem)
        spent = Budget()
        spent.cancelled.set()
        (price,) = price_constraints(problem, plan, SearchSettings(budget=spent))
        (true,) = price_constraints(problem, plan, SearchSettings())
        assert not price.is_solved
        assert price.least == 0.0
        assert price.most >= true.most * (1 - 1e-9)


def test_a_bound_that_a_constrained_plan_exceeds_is_a_broken_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = two_types(Exclude(gpus=of("node=a-0")))
    plan = solved(problem)
    worse = replace(plan, result=replace(plan.result, value=0.9 * plan.result.value, bound=0.9 * plan.result.value))
    monkeypatch.setattr("hetis.solver.planning.solve_placement", lambda *_, **__: worse)
    with pytest.raises(BrokenProofError, match="contradicts the bound"):
        price_constraints(problem, plan, SearchSettings())


def test_copies_share_experts_unless_that_is_forbidden() -> None:
    experts = shape_of(num_experts=8, active_experts=1, expert_intermediate=512)
    problem = make_problem(
        [make_node("a", "A", gpus=2)],
        profiles={"A": make_profile("A", usable_bytes=25_000_000)},
        model=make_model(kv_heads=1, moe=experts),
        family=replace(SMALL_FAMILY, roles=(Role.UNIFIED,)),
    )
    free, constraint = solved(problem), WithoutSharedExperts()
    without = solved(replace(problem, constraints=(constraint,)))
    assert [replica.expert_parallel for replica in free.replicas] == [True]
    assert not any(replica.expert_parallel for replica in without.replicas)
    assert without.result.value < free.result.value
    assert broken_by(free, replace(problem, constraints=(constraint,))) == {"--forbid shared-experts"}
