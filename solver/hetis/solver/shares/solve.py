"""`solve_shares`: shares by any rule, chosen by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hetis.solver.shares.baselines import equal_split, max_min, trading
from hetis.solver.shares.oef import cooperative, non_cooperative
from hetis.solver.shares.problem import ShareProblem
from hetis.solver.shares.result import Rule, Shares


def solve_shares(problem: ShareProblem, rule: Rule, *, seed: int = 0) -> Shares:
    """Return shares of a fleet under a rule; the same for the same input."""
    rules: Mapping[Rule, Callable[[], Shares]] = {
        Rule.COOPERATIVE: lambda: cooperative(problem, seed=seed),
        Rule.NON_COOPERATIVE: lambda: non_cooperative(problem, seed=seed),
        Rule.MAX_MIN: lambda: max_min(problem, seed=seed),
        Rule.TRADING: lambda: trading(problem),
        Rule.EQUAL: lambda: equal_split(problem),
    }
    return rules[rule]()
