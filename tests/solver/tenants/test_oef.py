"""OEF's two rules: their promises and bounds on random problems, and what they do not promise."""

from __future__ import annotations

import cvxpy
import numpy as np
import pytest

from hetis.solver.placement.replicas.tables import FloatArray
from hetis.solver.tenants.oef import OefRule, cooperative_bound, non_cooperative_bound, solve_oef

Problem = tuple[FloatArray, FloatArray, FloatArray]  # GPUs of each class, rates over the slowest class, weights


def random_problem(generator: np.random.Generator, *, most_tenants: int = 5) -> Problem:
    """Two to five tenants on two to four classes; now and then one cannot run on a class."""
    classes, tenants = int(generator.integers(2, 5)), int(generator.integers(2, most_tenants + 1))
    rates = generator.uniform(1.0, 10.0, (tenants, classes))
    rates[generator.random(rates.shape) < 0.05] = 0.0
    rates[:, 0] = np.where(rates.any(axis=1), rates[:, 0], 1.0)
    speedups = rates / np.where(rates > 0.0, rates, np.inf).min(axis=1, keepdims=True)
    return generator.integers(1, 17, classes).astype(float), speedups, generator.choice([0.5, 1.0, 1.0, 2.0], tenants)


def specified(rule: OefRule, counts: FloatArray, speedups: FloatArray, weights: FloatArray) -> float:
    """Return the value of the rule's program, stated again."""
    x = cvxpy.Variable(speedups.shape, nonneg=True)
    worth = speedups @ x.T  # of the share of i to l, [l, i]
    own = cvxpy.diag(worth) / weights
    rows = [cvxpy.sum(x, axis=0) <= counts]
    if rule is OefRule.COOPERATIVE:
        rows += [own[i] >= worth[i, :] / weights for i in range(len(weights))]
    else:
        rows.append(own == own[0])
    return float(cvxpy.Problem(cvxpy.Maximize(cvxpy.sum(cvxpy.diag(worth))), rows).solve(solver=cvxpy.HIGHS))


@pytest.mark.parametrize("rule", OefRule)
def test_shares_keep_to_the_fleet_and_their_rule_and_reach_the_specified_value(rule: OefRule) -> None:
    generator = np.random.default_rng(7)
    for number in range(100):
        counts, speedups, weights = random_problem(generator)
        found = solve_oef(rule, counts, speedups, weights)
        assert np.all(found.amounts.sum(axis=0) <= counts * (1 + 1e-9))
        worth = speedups @ found.amounts.T / weights
        own = np.diag(worth)
        if rule is OefRule.COOPERATIVE:
            assert np.all(worth <= own[:, None] * (1 + 1e-6)), "somebody envies"
            equal = speedups @ counts / weights.sum()
            assert np.all(own >= equal * (1 - 1e-6)), "sharing does not pay"
        else:
            assert own == pytest.approx(np.full(len(own), own[0]), rel=1e-6)
        assert found.value <= found.bound <= found.value * (1 + 1e-6)
        if number < 10:
            assert found.value == pytest.approx(specified(rule, counts, speedups, weights), rel=1e-6)


def test_any_multipliers_prove_a_bound() -> None:
    generator = np.random.default_rng(3)
    for _ in range(30):
        problem = random_problem(generator)
        tenants = len(problem[2])
        together, apart = (solve_oef(rule, *problem).value * (1 - 1e-9) for rule in OefRule)
        assert cooperative_bound(*problem, generator.exponential(0.3, (tenants, tenants))) >= together
        assert non_cooperative_bound(*problem, generator.normal(0.0, 0.3, tenants)) >= apart


@pytest.mark.parametrize("rule", OefRule)
def test_a_weight_of_two_is_two_clones(rule: OefRule) -> None:
    counts = np.array([6.0, 3.0])
    heavy = solve_oef(rule, counts, np.array([[1.0, 2.0], [1.0, 5.0]]), np.array([2.0, 1.0]))
    clones = solve_oef(rule, counts, np.array([[1.0, 2.0], [1.0, 2.0], [1.0, 5.0]]), np.ones(3))
    assert heavy.value == pytest.approx(clones.value)


def test_equal_value_may_leave_a_tenant_below_an_equal_split() -> None:
    counts, speedups = np.array([4.0, 4.0]), np.array([[1.0, 10.0], [1.0, 1.1]])
    found = solve_oef(OefRule.NON_COOPERATIVE, counts, speedups, np.ones(2))
    assert (speedups[0] @ found.amounts[0]) < speedups[0] @ counts / 2
