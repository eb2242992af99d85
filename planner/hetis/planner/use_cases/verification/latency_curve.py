"""Latencies of a plan as a function of the rate, by simulation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from hetis.planner.use_cases.record.parts import Verified
from hetis.planner.use_cases.simulation.simulate import default_rate
from hetis.planner.use_cases.verification.outcome import AS_PLANNED, promising, settings_of
from hetis.planner.use_cases.verification.rates import (
    are_filled,
    most_requests_of,
    num_requests_of,
    simulated_at,
    simulated_part,
)
from hetis.planner.use_cases.verification.tried_rate import TriedRate
from hetis.simulator.running import RateSweep, Report, judged_rates
from hetis.solver.budget import Budget
from hetis.solver.plan import Objective, Plan
from hetis.solver.problem import PlacementProblem

MOST_OF_CURVE = 40_000  # requests per rate
SHARES = (0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.05, 1.1)  # shares of the planned rate; above it queues grow


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """The results of a simulation at every rate, with its limits and number of requests."""

    sweep: RateSweep
    limits: Objective
    num_requests: int
    share: float | None = None  # share of each rate, at which as large a part of the replicas ran; None: all ran
    too_short: bool = False  # whether runs cannot fill even the seats of that part


def latency_curve(
    plan: Plan, problem: PlacementProblem, *, seed: int = 0, budget: Budget, report: Report
) -> Curve | None:
    """Simulate Poisson arrivals at shares of the planned rate, with attention workers if the plan has them.

    Of a plan with more seats than runs can fill, a part is simulated, as `verified` does, and head groups are
    dispatched if it did that.

    None if the plan has no replicas, or if the budget was spent before the first rate was done.
    """
    if not plan.replicas:
        return None
    limits, most_requests = plan.objective, min(MOST_OF_CURVE, most_requests_of(plan).to_fill)
    part = simulated_part(plan, problem, most_requests)
    planned_rps, num_requests = default_rate(promising(plan), problem), min(MOST_OF_CURVE, num_requests_of(part.plan))
    verification, found = Verified.of(plan).verification, dict[float, TriedRate]()
    settings = AS_PLANNED if verification is None else settings_of(verification)
    for number, share in enumerate(SHARES):

        def reported(given: int, total: int, done: int = number) -> None:
            report(done * total + given, len(SHARES) * total)

        if budget.is_spent():
            break
        tried = simulated_at(
            part.plan, problem, share * planned_rps * part.share, limits, seed=seed, budget=budget, report=reported,
            lengths=(num_requests,), settings=settings,
        )  # fmt: skip
        if tried is None:
            break
        found[share * planned_rps] = tried
    if not found:
        return None
    return Curve(
        sweep=_sweep_of(found, limits),
        limits=limits,
        num_requests=num_requests,
        share=part.share if part.share < 1.0 else None,
        too_short=not are_filled(part.plan, most_requests),
    )


def _sweep_of(found: Mapping[float, TriedRate], limits: Objective) -> RateSweep:
    """Return all rates as a sweep, judged by the plan's service level.

    For the default level that is what a sweep itself reports.
    """
    points = judged_rates({rate_rps: tried.summary for rate_rps, tried in found.items()}, limits).points
    beyond = min((rate_rps for rate_rps, tried in found.items() if not tried.within), default=None)
    return RateSweep(
        points=tuple(replace(point, within=found[point.rate_rps].within) for point in points),
        goodput_rps=max((rate_rps for rate_rps in found if beyond is None or rate_rps < beyond), default=0.0),
        beyond_rps=beyond,
    )
