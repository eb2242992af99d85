"""Another search with a tighter limit, where the simulator finds that a plan misses one.

The cost model predicts TTFT by averages, which is too little where few, long iterations with a chunk take most of the
time (`docs/cost-model.md`, "What is approximated"). The simulator sees that. So `place` plans again for a tighter
limit, and shows the plan that serves most within the limits that were asked for.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace

from hetis.planner.use_cases.surviving import bounded_by
from hetis.planner.use_cases.verify import TTFT, VERIFICATION, limited_latencies, verification_of, verified
from hetis.simulator.running import Report
from hetis.solver.errors import InfeasibleError, NoPlanFoundError
from hetis.solver.plan import Objective, Plan, SolveResult, Status
from hetis.solver.problem import PlacementProblem

TIGHTENED = "tightened"  # entry of `Plan.inputs`
SEARCHES = 2  # besides the first
LEAST_STEP = 0.8  # of a limit: near saturation latencies grow so steeply that their ratio would take it too far
LITTLE = 0.05  # of a rate: so much is given up for a plan that keeps its limits at its own, without fewer arrivals

Find = Callable[[PlacementProblem], Plan]  # raises InfeasibleError, NoPlanFoundError


@dataclass(frozen=True, slots=True, kw_only=True)
class Tightening:
    """A limit by the name that plans show, and the tighter one that was planned for."""

    name: str
    asked_s: float
    planned_s: float

    def of(self, objective: Objective) -> Objective:
        """Return the objective with the tighter limit."""
        if self.name == TTFT:
            return replace(objective, ttft_limit_s=self.planned_s)
        return replace(objective, tpot_limit_s=self.planned_s)


def verified_plan(
    plan: Plan, problem: PlacementProblem, find: Find | None, *, seed: int, cancelled: threading.Event, report: Report
) -> Plan:
    """Return the plan as `verified` does, or a better one where it misses a limit at its planned rate.

    ``find`` then searches again with the missed limit tightened (None: it does not). The first step is planned over
    simulated latency, but at most 20%. The next is as much again if a limit is still missed, and half of the first if
    none is or if there is no such plan. Returned is the plan that serves most within the limits of the problem; one
    that keeps them at its own rate may serve a little less. Its bound is that of the problem, as a tighter limit only
    takes plans away.
    """
    first = verified(plan, problem, seed=seed, cancelled=cancelled, report=report)
    limit = None if find is None else _missed(first)
    if find is None or limit is None:
        return first
    best, step = first, limit.planned_s / limit.asked_s
    share, planned_s = step, _planned_s(first, limit)
    for _ in range(SEARCHES):
        tried = replace(limit, planned_s=share * planned_s)
        again = None if cancelled.is_set() else _found(find, replace(problem, objective=tried.of(problem.objective)))
        if again is not None:
            again = _answering(first, problem, again, tried)
            known_rps = _kept_rps(best) if problem.objective.maximises else 0.0
            again = verified(
                again, problem, seed=seed, cancelled=cancelled, report=report, at_least_rps=known_rps
            )  # fmt: skip
            best = max(best, again, key=_worth)
        still_missed = again is not None and _missed(again) is not None
        share *= step if still_missed else step**-0.5
    return best


def tightening_of(plan: Plan) -> Tightening | None:
    """Return the limit that was tightened for a plan; None: none, or it is not readable."""
    found = plan.inputs.get(TIGHTENED)
    try:
        return Tightening(**found) if isinstance(found, Mapping) else None
    except TypeError:
        return None


def _missed(plan: Plan) -> Tightening | None:
    """Return the limit that a simulated plan misses most and the first step, from the limit; None: it misses none."""
    found = verification_of(plan)
    if found is None or found.kept:
        return None
    limited = limited_latencies(found, plan.objective)
    over = [(reached_s / limit_s, name, limit_s) for name, reached_s, limit_s in limited]
    ratio, name, limit_s = max(over)  # a plan without limits is not verified
    if found.steady is False or not math.isfinite(ratio):  # however long requests wait in the end
        ratio, name, limit_s = math.inf, *over[0][1:]
    return Tightening(name=name, asked_s=limit_s, planned_s=limit_s * min(1.0, max(LEAST_STEP, 1.0 / ratio)))


def _planned_s(plan: Plan, limit: Tightening) -> float:
    """Return the latency that the model gives the replica closest to the limit."""
    of_replicas = [replica.ttft_s if limit.name == TTFT else replica.tpot_s for replica in plan.replicas]
    return min(limit.asked_s, max(of_replicas))


def _found(find: Find, problem: PlacementProblem) -> Plan | None:
    try:
        plan = find(problem)
    except (InfeasibleError, NoPlanFoundError):
        return None
    return plan if plan.replicas else None


def _answering(first: Plan, problem: PlacementProblem, again: Plan, tried: Tightening) -> Plan:
    """Return the plan for a tightened limit as one for the problem, with the first plan's bound and inputs."""
    inputs = {key: value for key, value in first.inputs.items() if key != VERIFICATION}
    return replace(
        again,
        objective=problem.objective,
        result=_bounded(again.result, first.result, maximises=problem.objective.maximises),
        notes=(*again.notes, _sentence(first, tried)),
        inputs={**inputs, TIGHTENED: asdict(tried)},
    )


def _bounded(result: SolveResult, first: SolveResult, *, maximises: bool) -> SolveResult:
    found = bounded_by(result, max(first.bound, result.value) if maximises else min(first.bound, result.value))
    status = Status.INTERRUPTED if Status.INTERRUPTED in (result.status, first.status) else found.status
    return replace(found, status=status, solve_s=first.solve_s + result.solve_s)


def _sentence(first: Plan, tried: Tightening) -> str:
    found = verification_of(first)
    assert found is not None, "it misses a limit"
    until = "no rate that was tried" if found.kept_rps is None else f"{found.kept_rps:.4g} requests/s at most"
    return (
        f"planned for a {tried.name} of {tried.planned_s:.3g} s where {tried.asked_s:.3g} s are asked for: simulated, "
        f"the best plan for {tried.asked_s:.3g} s by the model ({first.result.value:.4g} {first.result.unit}) keeps "
        f"the limits at {until}; the bound is that for {tried.asked_s:.3g} s"
    )


def _worth(plan: Plan) -> tuple[bool, float]:
    """Return what plans are compared by: the rate within the limits, or at a demanded rate the cost."""
    found = verification_of(plan)
    kept = found is not None and found.kept
    if plan.objective.maximises:
        return True, _kept_rps(plan) * (1.0 + LITTLE if kept else 1.0)
    return kept, -plan.result.value if kept else _kept_rps(plan)


def _kept_rps(plan: Plan) -> float:
    found = verification_of(plan)
    return 0.0 if found is None or found.kept_rps is None else found.kept_rps
