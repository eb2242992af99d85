"""The plan that is shown once traffic was simulated: the one that was found or, if it misses a limit, a better one.

Engines may have more seats, stages may be equal, or another search may have a tighter limit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from typing import NamedTuple

from hetis.planner.use_cases.grouping import shapes_of
from hetis.planner.use_cases.record.forms import Tightening, Verification
from hetis.planner.use_cases.record.parts import EqualStages, Requested, Verified
from hetis.planner.use_cases.service_level import Latency
from hetis.planner.use_cases.simulation.engine_settings import with_more_seats
from hetis.planner.use_cases.simulation.simulate import seats_of
from hetis.planner.use_cases.surviving import bounded_by
from hetis.planner.use_cases.verification import equal_stages
from hetis.planner.use_cases.verification.outcome import MISSES_AT, in_seconds, limited_latencies, misses, promising
from hetis.planner.use_cases.verification.rates import (
    AtPlannedRate,
    RunReport,
    likely_rate,
    needs_verifying,
    simulate_at_planned_rate,
)
from hetis.solver.budget import Budget
from hetis.solver.errors import InfeasibleError, NoPlanFoundError
from hetis.solver.plan import Objective, ObjectiveKind, Plan, Role, SolveResult, Status
from hetis.solver.problem import PlacementProblem

TTFT, TPOT = "TTFT p95", "TPOT mean"  # as shown in plans
MORE_SEATS = (1.5, 2.0, 3.0, math.inf)  # times the planned seats, which are tried in turn if requests wait for them
LESS_EXCESS = 0.98  # times what a latency is over its limit: at least so much better with more seats
AT_ALL = 0.8  # share of the planned rate that must be kept by the queue model for more seats to keep all of it
SEARCHES = 2  # in addition to the first one
LEAST_STEP = 0.8  # share of a limit: near saturation latencies are so steep that their ratio is too large a step
LITTLE = 0.05  # share of a rate given up for a plan that keeps its limits at its own rate, not at a lower one
TO_SEARCH = 0.5  # share of the time left for another search: the rest is for the simulation of its plan
SHORT_TIME = 20.0  # times what the first plan's simulation took, about as long as a search for a lower rate may take
STOPPED_EARLY = "stopped before its simulation ended: it is not known at which rate traffic keeps the limits"
OUT_OF_TIME = "the limit on simulations ended its own: it is not known at which rate traffic keeps the limits"
SEARCH_OUT_OF_TIME = (
    "the limit on simulations ended the search for a plan that keeps its limits at its planned rate; --time-limit 1min "
    "allows more"
)

Find = Callable[[PlacementProblem], Plan]  # raises InfeasibleError, NoPlanFoundError


@dataclass(frozen=True, slots=True, kw_only=True)
class Again:
    """How to look for another plan than the first one."""

    search: Callable[[PlacementProblem, Budget], Plan]  # raises InfeasibleError, NoPlanFoundError
    describe: Callable[[Plan], Plan]  # adds inputs and notes to a plan that was found
    time_limit_s: float  # of all further searches together
    is_cut_short: bool  # whether the first search used up its time, as another one may
    equal_stages: bool  # whether plans of equal stages answer the same request


def kept_plan(
    plan: Plan, problem: PlacementProblem, again: Again | None, *, seed: int, budget: Budget, report: RunReport
) -> Plan:
    """Simulate a plan and, if it misses a limit, return the plan that keeps most (`verified_plan`).

    A plan that maximises its rate is simulated at that rate, whatever rate is demanded of it.

    Without ``again``, there is no other search. Once the budget, that of simulations and further searches, is spent,
    the plan is returned as far as it was verified, with a note if that is not at all, or if time ended the other
    search.
    """
    spent_s = 0.0

    def find(posed: PlacementProblem) -> Plan:
        assert again is not None
        nonlocal spent_s
        left_s = min(again.time_limit_s - spent_s, TO_SEARCH * budget.remaining_s())
        rest = Budget(time_limit_s=left_s, clock=budget.clock, cancelled=budget.cancelled, explains=False)
        try:
            return again.describe(again.search(posed, rest))
        finally:
            spent_s += rest.elapsed_s()

    def of_equal_stages() -> Plan | None:
        if again is None or not again.equal_stages:
            return None
        equal = equal_stages.other_plan(plan, problem, seed, budget)
        return None if equal is None else again.describe(equal)

    def is_short() -> bool:
        """Return whether another search may use up the time that is left, as this one has used up its own."""
        if again is not None and again.is_cut_short:
            return True  # the clock decides only if work is not limited: results must not depend on the machine
        return math.isinf(budget.work_limit) and budget.remaining_s() < SHORT_TIME * budget.elapsed_s()

    demanded, plan = plan.objective, promising(plan)
    problem = replace(problem, objective=plan.objective)  # its demand is larger if a loss must be survived
    found = verified_plan(
        plan, problem, None if again is None else find, seed=seed, budget=budget, report=report, is_short=is_short,
        equal_stages=of_equal_stages,
    )  # fmt: skip
    found = noted_if_stopped(replace(found, objective=demanded), budget)
    record = Verified.of(found)
    missed = record.verification is not None and not record.verification.kept
    if again is not None and missed and budget.is_spent() and not budget.cancelled.is_set():
        found = replace(found, notes=(*found.notes, SEARCH_OUT_OF_TIME))
    return replace(record, model_value=plan.result.value).on(found) if record.is_other_than_best else found


def noted_if_stopped(plan: Plan, budget: Budget) -> Plan:
    """Return the plan with a note if it was to be simulated and was not, since that was cancelled or time ran out."""
    if not budget.is_spent() or not needs_verifying(plan) or Verified.of(plan).verification is not None:
        return plan
    return replace(plan, notes=(*plan.notes, STOPPED_EARLY if budget.cancelled.is_set() else OUT_OF_TIME))


class StoppedSimulation(NamedTuple):
    """A simulation that ended before it decided: why, and the note about the rate that misses limits; empty: none."""

    why: str
    missed: str


def stopped_simulation_of(plan: Plan) -> StoppedSimulation | None:
    """Return what is known of a plan's stopped simulation; None: there is none, or it was not stopped."""
    why = next((note for note in (STOPPED_EARLY, OUT_OF_TIME) if note in plan.notes), None)
    if why is None or Verified.of(plan).verification is not None:
        return None
    return StoppedSimulation(why, next((note for note in plan.notes if note.startswith(MISSES_AT)), ""))


def missed(plan: Plan, allowed_gap: float) -> list[str]:
    """Return the requirements of ``--strict`` that the plan does not meet."""
    result, found = plan.result, []
    if result.gap == float("inf"):
        found.append("the search stopped before it found a bound, so no gap is proven")
    elif result.gap > allowed_gap + 1e-9:
        found.append(f"the gap is {result.gap:.3%}, the target is {allowed_gap:.3%}")
    demand = plan.objective.demand_rps
    if plan.objective.maximises and demand is not None and result.value < demand * (1 - 1e-9):
        found.append(f"the plan serves {result.value:.4g} requests/s, {demand:.4g} are demanded")
    simulated = Verified.of(plan).verification
    if simulated is None and OUT_OF_TIME in plan.notes:
        found += [note for note in plan.notes if note == OUT_OF_TIME or note.startswith(MISSES_AT)]
    if simulated is not None and not simulated.kept:
        found.append(f"simulated at {simulated.rate_rps:.4g} requests/s: {', '.join(misses(simulated, plan))}")
    return found


def with_rate_of_equal_stages(
    plan: Plan, problem: PlacementProblem, *, seed: int, budget: Budget, report: RunReport
) -> Plan:
    """Return a simulated plan with the rate that equal stages keep in simulation, if it promises less than the model.

    Then the model may promise too much of equal stages, too. They are simulated like plans that are not searched again
    (`verified_plan`), with the same traffic. Once the budget is spent, the plan is returned as it is.
    """
    alone, record = EqualStages.of(plan).best, Verified.of(plan)
    simulated = record.verification
    if plan.objective.kind is not ObjectiveKind.GOODPUT or Role.UNIFIED not in problem.family.roles:
        return plan
    if simulated is None or (simulated.kept and not record.is_other_than_best) or alone is None or not alone.value:
        return plan
    equal = plan if record.equal_stages_chosen else equal_stages.plan_of(plan, problem, seed, budget)
    if equal is None:
        return plan
    kept_rps = record.kept_rps
    is_best = record.model_value is not None and math.isclose(equal.result.value, record.model_value)
    if is_best and not record.equal_stages_chosen:
        return replace(record, equal_stages_chosen=False).on(plan)  # they are the best by the model, which keeps less
    if shapes_of(equal) != shapes_of(plan):
        problem = replace(problem, objective=equal.objective)
        equal = verified_plan(equal, problem, None, seed=seed, budget=budget, report=report)
        if Verified.of(equal).verification is None or budget.is_spent():
            return plan
        kept_rps = Verified.of(equal).kept_rps
    return replace(record, equal_stages_kept_rps=min(equal.result.value, kept_rps)).on(plan)


def _tightened(objective: Objective, limit: Tightening) -> Objective:
    """Return the objective with the tighter limit."""
    if limit.name == TTFT:
        return replace(objective, ttft_limit_s=limit.planned_s)
    return replace(objective, tpot_limit_s=limit.planned_s)


def verified_plan(
    plan: Plan, problem: PlacementProblem, find: Find | None, *, seed: int, budget: Budget,
    report: RunReport, is_short: Callable[[], bool] = lambda: False,
    equal_stages: Callable[[], Plan | None] = lambda: None,
) -> Plan:  # fmt: skip
    """Return the plan as `verified` does or, if it misses a limit at its planned rate, a better one.

    The cost model predicts TTFT by averages, which is too low if a few long iterations with a chunk take most of the
    time (`docs/cost-model.md`, "What is approximated"). The simulator takes that into account.

    If requests wait for seats, engines that may run more of them at once are simulated first (`with_more_seats`).

    ``equal_stages`` returns the best plan of equal stages, if there is one; it is simulated next. It serves a little
    less by the model, often from simpler replicas, whose latencies the model predicts better.

    ``find`` then searches again with the missed limit tightened (None: there is no other search). The first step is the
    ratio of the planned to the simulated latency, but at most 20%. The next is another step of this size if a limit is
    still missed, and half of it in the other direction if none is missed or there is no such plan. The result is the
    plan that serves most within the limits of the problem; one that keeps them at its own rate may serve a little less.
    Its bound is that of the problem, since a tighter limit can only exclude plans.

    Lower rates of plans that miss a limit are simulated last, and only those at which such a plan would be the result.
    Those of the first plan, and of equal stages, are simulated before another search if ``is_short`` says then that it
    may use up the time that is left: no rate would be known to keep the limits.
    """
    simulated = partial(_with_seats, problem=problem, seed=seed, budget=budget, report=report)
    first = simulated(plan)
    if first is None:
        return plan
    limit = None if find is None else _missed(first.found, plan)
    if find is None or limit is None:
        return _with_seats_noted(first.decided())
    equal = None if budget.is_spent() else equal_stages()
    other = None if equal is None else simulated(_answering(plan, problem, equal, Verified(equal_stages_chosen=True)))
    tried = [one for one in (first, other) if one is not None]
    if is_short():
        tried = _with_lower_rates(tried)
    step = limit.planned_s / limit.asked_s
    share, planned_s = step, _planned_s(plan, limit)
    for _ in range(SEARCHES):
        tightened = replace(limit, planned_s=share * planned_s)
        posed = replace(problem, objective=_tightened(problem.objective, tightened))
        is_late = budget.is_spent() or budget.work > TO_SEARCH * budget.work_limit  # the rest is for lower rates
        again = None if is_late else _found(find, posed)
        if again is not None and any(shapes_of(again) == shapes_of(one.plan) for one in tried):
            share *= step  # simulated before
            continue
        other = None if again is None else simulated(_answering(plan, problem, again, Verified(tightened=tightened)))
        tried += [] if other is None else [other]
        still_missed = other is not None and not other.found.kept
        share *= step if still_missed else step**-0.5
    return _with_seats_noted(_best(tried))


def _with_seats(
    plan: Plan, problem: PlacementProblem, *, seed: int, budget: Budget, report: RunReport
) -> AtPlannedRate | None:
    """Simulate a plan at its rate and, if TTFT is missed, with engines that may run more requests at once.

    A plan has as many seats as keep the limit on TPOT when all are taken. At lower rates fewer are, so that more of
    them spare requests the wait for a seat without TPOT being missed. If all numbers miss the limits, the one that
    keeps most by the queue model remains. None: as `simulate_at_planned_rate`.
    """
    simulated = partial(simulate_at_planned_rate, problem=problem, seed=seed, budget=budget, report=report)
    best = simulated(plan)
    if best is None or best.found.kept or not _waits(best.found, plan):
        return best
    wider = {seats_of(one): one for one in (with_more_seats(plan, problem, factor) for factor in MORE_SEATS)}
    if not (wider := {seats: one for seats, one in wider.items() if seats != seats_of(plan)}):
        return best
    likely_rps, most = max(((likely_rate(one, problem), one) for one in (plan, *wider.values())), key=itemgetter(0))
    if likely_rps < AT_ALL * best.found.rate_rps:  # no number of seats keeps the planned rate
        return best if most is plan else simulated(most) or best
    for one in wider.values():
        other = simulated(one)
        if other is None or not (other.found.kept or _excess(other) < LESS_EXCESS * _excess(best)):
            break
        best = other
        if best.found.kept or not _waits(best.found, plan):
            break
    return best


def _waits(found: Verification, plan: Plan) -> bool:
    """Return whether TTFT is over its limit, by more than TPOT."""
    worst = max(limited_latencies(found, plan), key=lambda one: one.value_s / one.limit_s)
    return worst.latency is Latency.TTFT and worst.value_s > worst.limit_s


def _excess(tried: AtPlannedRate) -> float:
    """Return the worst latency of a plan over its limit, or the share of requests that miss a limit."""
    if Requested.of(tried.plan).service_level.attainment is not None:
        return 1.0 - tried.found.attainment
    return max(one.value_s / one.limit_s for one in limited_latencies(tried.found, tried.plan))


def _with_seats_noted(plan: Plan) -> Plan:
    """Return the plan with a note if its engines may run more requests at once than decode in the saturated plan."""
    planned, most = sum(one.planned_seats for one in plan.replicas), sum(one.seats for one in plan.replicas)
    if planned == most:
        return plan
    note = (
        f"engines may run {most:,} requests at once (--max-num-seqs), of which {planned:,} decode within the limit on "
        "TPOT when all seats are taken: with more, fewer requests wait for a seat, but above the simulated rate TPOT "
        "may exceed its limit"
    )
    return replace(plan, notes=(*plan.notes, note))


def _best(tried: Sequence[AtPlannedRate]) -> Plan:
    """Return the plan that serves most within the limits, with a note if that is not the first one, which misses them.

    If several serve as much, it is the first of them.
    """
    best = max((one.decided() for one in tried if one.found.kept), key=worth_of, default=None)
    missed = () if best is not None and not best.objective.maximises else [one for one in tried if not one.found.kept]
    undecided = list[AtPlannedRate]()
    below_rps = None  # rate at and above which the first plan misses the limits, if that is known
    for one in reversed(missed):
        least_rps = 0.0 if best is None else worth_of(best)[1]
        decided = one.decided(least_rps)
        best = decided if best is None else max(decided, best, key=worth_of)
        if Verified.of(decided).verification is None:
            undecided.append(one)
        below_rps = None if one in undecided else min(least_rps, one.found.rate_rps)
    assert best is not None, "each plan keeps or misses the limits"
    record, decided_ones = Verified.of(best), (one for one in tried if one not in undecided)
    if any(Verified.of(one.plan).equal_stages_chosen for one in decided_ones) and not record.equal_stages_chosen:
        best = replace(record, equal_stages_chosen=False).on(best)
    if not record.is_other_than_best:
        return best
    return replace(best, notes=(*best.notes, _sentence(tried[0], best, below_rps)))


def _with_lower_rates(tried: Sequence[AtPlannedRate]) -> list[AtPlannedRate]:
    """Return simulated plans with the lower rates of those that miss a limit, as far as they matter."""
    least_rps = max((worth_of(one.decided())[1] for one in tried if one.found.kept), default=0.0)
    found = list[AtPlannedRate]()
    for one in tried:
        found.append(one.with_lower_rates(least_rps))
        least_rps = max(least_rps, Verified.of(found[-1].decided(least_rps)).kept_rps)
    return found


def _missed(found: Verification, plan: Plan) -> Tightening | None:
    """Return the limit that a simulated plan misses most, and the first step from this limit.

    None if it misses none.
    """
    if found.kept:
        return None
    limited = limited_latencies(found, plan)  # a plan without limits is not verified
    if Requested.of(plan).service_level.attainment is None:
        worst = max(limited, key=lambda one: one.value_s / one.limit_s)
        ratio = worst.value_s / worst.limit_s
    else:  # the excess over a limit does not show how many requests exceed it
        missed = {Latency.TTFT: found.ttft_missed or 0.0, Latency.TPOT: found.tpot_missed or 0.0}
        worst, ratio = max(limited, key=lambda one: missed[one.latency]), 1.0 / LEAST_STEP
    if found.steady is False or not math.isfinite(ratio):  # however long requests wait in the end
        worst, ratio = limited[0], math.inf
    planned_s = worst.limit_s * min(1.0, max(LEAST_STEP, 1.0 / ratio))
    name = TTFT if worst.latency is Latency.TTFT else TPOT
    return Tightening(name=name, asked_s=worst.limit_s, planned_s=planned_s)


def _planned_s(plan: Plan, limit: Tightening) -> float:
    """Return the latency that the model predicts for the replica closest to the limit."""
    of_replicas = [replica.ttft_s if limit.name == TTFT else replica.tpot_s for replica in plan.replicas]
    return min(limit.asked_s, max(of_replicas))


def _found(find: Find, problem: PlacementProblem) -> Plan | None:
    try:
        plan = find(problem)
    except (InfeasibleError, NoPlanFoundError):
        return None
    return plan if plan.replicas else None


def _answering(first: Plan, problem: PlacementProblem, again: Plan, why: Verified) -> Plan:
    """Return another plan as one for the problem, with the first's family, bound and inputs, and why it was found."""
    answering = replace(
        again,
        strategy=first.strategy,
        family=first.family,
        objective=problem.objective,
        result=_bounded(again.result, first.result, maximises=problem.objective.maximises),
        inputs=first.inputs,
    )
    return why.on(answering)


def _bounded(result: SolveResult, first: SolveResult, *, maximises: bool) -> SolveResult:
    found = bounded_by(result, max(first.bound, result.value) if maximises else min(first.bound, result.value))
    status = Status.INTERRUPTED if Status.INTERRUPTED in (result.status, first.status) else found.status
    return replace(found, status=status, solve_s=first.solve_s + result.solve_s)


def _sentence(first: AtPlannedRate, best: Plan, below_rps: float | None) -> str:
    """Return why a plan is shown instead of the first one."""
    value = f"{first.plan.result.value:.4g} {first.plan.result.unit}"
    this = "misses the limits" if below_rps is None else f"keeps the limits at less than {below_rps:.4g} requests/s"
    tried = Verified.of(best).tightened
    if tried is None:
        return (
            f"of equal stages: simulated, the best plan by the model ({value}) {this}; the bound is that of all plans"
        )
    requested = in_seconds(tried.asked_s)
    return (
        f"planned for a {tried.name} of {in_seconds(tried.planned_s)} where {requested} are asked for: simulated, "
        f"the best plan for {requested} by the model ({value}) {this}; the bound is that for {requested}"
    )


def worth_of(plan: Plan) -> tuple[bool, float]:
    """Return the key by which plans are compared: the rate within the limits or, if a rate is demanded, the cost."""
    found = Verified.of(plan).verification
    kept = found is not None and found.kept
    if plan.objective.maximises:
        return True, Verified.of(plan).kept_rps * (1.0 + LITTLE if kept else 1.0)
    return kept, -plan.result.value if kept else Verified.of(plan).kept_rps
