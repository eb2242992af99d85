"""Runs at one rate: what is chance, and what any traffic shows."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis.planner.use_cases.simulation.simulate import default_rate
from hetis.planner.use_cases.verification import rates
from hetis.planner.use_cases.verification.rates import simulated_at, utilisation_at
from hetis.planner.use_cases.verification.tried_rate import hardly_grows
from hetis.simulator.metrics import Summary
from hetis.simulator.running import silent
from hetis.simulator.steadiness import Estimate
from hetis.solver.budget import Budget
from hetis.solver.check.result import MOST_UTILISATION
from hetis.solver.plan import Objective
from tests.planner.use_cases.simulation.test_simulate import no_mixed_factor
from tests.planner.use_cases.verification.verifying import Placed, at_rate, no_progress

__all__ = ["no_mixed_factor"]  # for every test here, too


@pytest.mark.parametrize(
    ("steady", "growth_s", "calm"),
    [
        (True, (0.0, 0.5), True),  # seconds of wait per second, and the half width
        (True, (0.03, 0.0), False),
        (False, (0.0, 0.0), False),
        (None, (0.005, 0.01), True),  # short, and clear nevertheless
        (None, (0.005, 0.02), False),
        (None, (0.0, math.nan), False),  # an unknown interval
    ],
)
def test_a_wait_that_grows_by_chance_at_most_is_calm(
    one_run: Summary, steady: bool | None, growth_s: tuple[float, float], calm: bool
) -> None:
    value, half_width = growth_s
    summary = replace(one_run, steady=steady, growth=Estimate(value=value, half_width=half_width))
    assert hardly_grows(summary) is calm


@pytest.mark.parametrize("latency", ["ttft", "tpot"])
def test_a_plan_that_misses_a_limit_by_a_tenth_is_found_out_by_any_traffic(pair: Placed, latency: str) -> None:
    plan, problem = at_rate(*pair, 0.85), pair[1]  # at 98% of what is served at most, waits take hours to settle
    rate_rps, unlimited = default_rate(plan, problem), Objective(ttft_limit_s=None, tpot_limit_s=None)
    options: dict[str, Any] = {"budget": Budget(), "report": silent, "lengths": (20_000,)}
    in_truth = simulated_at(plan, problem, rate_rps, unlimited, seed=99, **options)
    assert in_truth is not None
    seconds = in_truth.summary.ttft_p95_s.value if latency == "ttft" else in_truth.summary.mean_tpot_s.value

    def kept_at(limit_s: float) -> list[bool]:
        limits = replace(plan.objective, **{"ttft_limit_s": None, "tpot_limit_s": None, f"{latency}_limit_s": limit_s})
        limited = replace(plan, objective=limits)
        budgets = [Budget(work_limit=rates.ITERATIONS) for _ in range(8)]
        return [
            rates._Runs(limited, problem, seed, budget, no_progress, rates.NGINX)._planned().kept
            for seed, budget in enumerate(budgets)
        ]

    assert not any(kept_at(seconds / 1.1))
    assert all(kept_at(seconds * 1.15))


@given(saturated_rps=st.floats(1e-3, 1e6))
def test_the_highest_rate_is_no_utilisation_that_the_checker_refuses(saturated_rps: float) -> None:
    """A rate divided by what it is a share of may be above that share by rounding."""
    assert utilisation_at(MOST_UTILISATION * saturated_rps, saturated_rps) <= MOST_UTILISATION
    assert utilisation_at(0.5 * saturated_rps, saturated_rps) == pytest.approx(0.5)
