"""The bound from prices of several tenants is the optimum of the relaxation that they price."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.optimize import linprog

from hetis.solver.tenants.master import TenantsGoal, bound_of

PRICES, LIMITS = np.array([0.5, 2.0]), np.array([8.0, 3.0])
WORTH = 10.0


def best_sum(gains: list[float], floors: list[float], efficiency: list[float]) -> float | None:
    """Return the largest ``gains u`` with ``u >= floors`` and ``sum u / e <= W``; None: the floors cost too much."""
    bounds = [(floor, None) for floor in floors]
    found = linprog([-g for g in gains], A_ub=[[1 / e for e in efficiency]], b_ub=[WORTH], bounds=bounds)
    return -float(found.fun) if found.status == 0 else None


some = st.floats(0.1, 4.0)


@given(st.lists(st.tuples(some, st.floats(0.0, 6.0), some), min_size=1, max_size=4))
def test_gains_above_floors_are_bounded_by_their_optimum(tenants: list[tuple[float, float, float]]) -> None:
    gains, floors, efficiency = (list(column) for column in zip(*tenants, strict=True))
    needed = sum(floor / e for floor, e in zip(floors, efficiency, strict=True))
    assume(abs(needed - WORTH) > 1e-6)
    goal = TenantsGoal(gains=np.array(gains), floors=np.array(floors))
    bound = bound_of(goal, PRICES, np.array(efficiency), LIMITS)
    best = best_sum(gains, floors, efficiency)
    assert (bound is None) == (best is None) == (needed > WORTH)
    if bound is not None:
        assert bound.value == pytest.approx(best, rel=1e-6)
        # Weak duality by hand: the rows' prices, and the excess of each rate's cost over its gain.
        owed = float((bound.multipliers - goal.gains) @ goal.floors)
        assert bound.value == pytest.approx(float(bound.row_prices @ LIMITS) - owed, rel=1e-9)
        assert np.all(bound.multipliers >= goal.gains * (1 - 1e-9))


@given(st.lists(st.tuples(some, some), min_size=1, max_size=4))
def test_the_level_of_all_claims_is_bounded_by_its_optimum(tenants: list[tuple[float, float]]) -> None:
    claims, efficiency = (np.array(column) for column in zip(*tenants, strict=True))
    goal = TenantsGoal(gains=np.zeros(len(claims)), floors=np.zeros(len(claims)), claims=claims)
    bound = bound_of(goal, PRICES, efficiency, LIMITS)
    assert bound is not None
    assert bound.value == pytest.approx(WORTH / float((claims / efficiency).sum()))
    assert float(bound.multipliers @ claims) == pytest.approx(1.0)


def test_who_can_serve_nothing_cannot_keep_a_floor() -> None:
    efficiency = np.array([2.0, 0.0])
    none = TenantsGoal(gains=np.ones(2), floors=np.zeros(2))
    bound = bound_of(none, PRICES, efficiency, LIMITS)
    assert bound is not None
    assert bound.value == pytest.approx(20.0)
    assert bound_of(TenantsGoal(gains=np.ones(2), floors=np.array([0.0, 0.1])), PRICES, efficiency, LIMITS) is None
    level = TenantsGoal(gains=np.zeros(2), floors=np.zeros(2), claims=np.ones(2))
    level_bound = bound_of(level, PRICES, efficiency, LIMITS)
    assert level_bound is not None
    assert level_bound.value == 0.0


@pytest.mark.parametrize("claims", [None, np.ones(2)], ids=["sum", "level"])
def test_a_search_that_was_cut_off_at_once_proves_nothing(claims: np.ndarray | None) -> None:
    """Without time no efficiency is known, and the bound is not a number that could be mistaken for a valid one."""
    goal = TenantsGoal(gains=np.ones(2), floors=np.zeros(2), claims=claims)
    bound = bound_of(goal, PRICES, np.full(2, np.inf), LIMITS)
    assert bound is not None
    assert bound.value == np.inf
    assert not bound.multipliers.any()
