"""Limits of searches by time and by work."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from hetis.solver.budget import PER_NODE, Budget
from hetis.solver.placement.losses.survival import Survive
from hetis.solver.placement.master import Master, MilpSolution
from hetis.solver.planning import solve_placement, solve_surviving
from tests.solver.instances import NO_LIMITS, make_node, make_problem
from tests.solver.placement.losses.test_survival import fleet

REL = 1e-6


def test_a_share_of_a_budget_ends_before_it_and_is_cancelled_with_it() -> None:
    readings = iter([10.0, 12.0, 12.0, 13.0, 15.5])
    budget = Budget(time_limit_s=8.0, clock=lambda: next(readings))
    part = budget.share(0.5)  # at 12 s, 6 s are left; the share's own start is not read again
    assert part.elapsed_s() == 5.5
    assert part.time_limit_s == 5.0
    assert not budget.cancelled.is_set()
    budget.cancelled.set()
    assert part.cancelled.is_set()


def test_a_budget_of_its_own_ends_with_the_callers_and_not_the_other_way_round() -> None:
    callers = Budget(time_limit_s=8.0, clock=lambda: 10.0)
    own, other = callers.of_its_own(), callers.of_its_own()
    own.cancelled.set()
    assert own.is_spent()
    assert not callers.is_spent()
    assert not other.is_spent()
    callers.cancelled.set()
    assert other.is_spent()
    assert not other.cancelled.is_set()


def test_work_of_a_share_counts_as_the_whole_s_and_ends_either() -> None:
    whole = Budget(work_limit=100.0)
    part = whole.share(0.5)
    part.charge(30.0)
    assert (whole.remaining_work(), part.remaining_work(), part.nodes(1000), part.nodes(3)) == (70.0, 20.0, 5, 3)
    part.charge(20.0)
    assert part.is_spent()
    assert not whole.is_spent()
    whole.charge(50.0)
    assert whole.is_spent()
    assert whole.of_its_own().is_spent()


@pytest.mark.parametrize("work", [1.0, 30.0, 1000.0])
def test_a_search_limited_by_work_is_the_same_on_any_machine(work: float) -> None:
    now = itertools.count()
    problem = make_problem([make_node("a", "A", gpus=4), make_node("b", "B", gpus=4)], objective=NO_LIMITS)
    slow = solve_placement(problem, budget=Budget(work_limit=work, clock=lambda: float(next(now))))
    quick, best = solve_placement(problem, budget=Budget(work_limit=work)), solve_placement(problem)
    assert slow.replicas == quick.replicas
    assert (slow.result.value, slow.result.bound) == (quick.result.value, quick.result.bound)
    assert quick.result.value <= best.result.bound * (1 + REL)
    assert best.result.value <= quick.result.bound * (1 + REL)


def test_whole_counts_of_plans_that_survive_a_loss_are_work_too(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, solve, nodes = Budget(work_limit=1000.0), Master.solve_milp, list[int]()

    def solve_milp(self: Master, *args: Any, **options: Any) -> tuple[MilpSolution | None, bool]:
        nodes.append(options["nodes"])
        done = whole.work
        found = solve(self, *args, **options)
        assert whole.work > done
        return found

    monkeypatch.setattr(Master, "solve_milp", solve_milp)
    plan, _ = solve_surviving(fleet(4, 2, 1), Survive(place="node"), budget=whole)
    assert plan.replicas
    assert 0 < max(nodes) <= whole.work_limit / PER_NODE
