"""The simulated latencies of a plan as a function of the request rate."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from hetis.planner.use_cases.simulate import Question, answer, default_rate
from hetis.planner.use_cases.verify import AS_PLANNED, num_requests_of
from hetis.simulator.arrivals import Arrivals, Load
from hetis.simulator.metrics import Limits, Summary
from hetis.simulator.running import Report, Sweep, judged_rates
from hetis.solver.plan import Plan
from hetis.solver.problem import PlacementProblem

SHARES = (0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.05, 1.1)  # of the planned rate; above it queues grow


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """The results of a simulation at every rate, with its limits and number of requests."""

    sweep: Sweep
    limits: Limits
    num_requests: int


def latency_curve(
    plan: Plan, problem: PlacementProblem, *, seed: int = 0, cancelled: threading.Event, report: Report
) -> Curve | None:
    """Simulate Poisson arrivals at shares of the planned rate, with attention workers if the plan has them.

    Return None if the plan has no replicas, or if it was cancelled before the first rate was done.
    """
    if not plan.replicas:
        return None
    limits = Limits(ttft_s=plan.objective.ttft_limit_s, tpot_s=plan.objective.tpot_limit_s)
    planned_rps, num_requests = default_rate(plan, problem), num_requests_of(plan)
    found: dict[float, Summary] = {}
    for number, share in enumerate(SHARES):
        load = Load(
            lengths=problem.workload,
            max_position=problem.model.max_position,
            arrivals=Arrivals.DRAWN,
            rate_rps=share * planned_rps,
        )
        question = Question(load=load, num_requests=num_requests, seeds=(seed,), settings=AS_PLANNED, limits=limits)

        def told(given: int, total: int, done: int = number) -> None:
            report(done * total + given, len(SHARES) * total)

        if cancelled.is_set():
            break
        simulated = answer(plan, problem, question, processes=1, cancelled=cancelled, report=told)
        if not simulated.complete:
            break
        found[share * planned_rps] = simulated.summary
    return Curve(sweep=judged_rates(found, limits), limits=limits, num_requests=num_requests) if found else None
