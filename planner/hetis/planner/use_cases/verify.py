"""Simulation of a plan before it is shown: whether its latency limits hold at its planned rate.

The bound and the value of a plan are those of the cost model. The simulator models more: how requests queue for seats,
and how lengths vary. So `place` simulates the plan that it has found and reports both figures; if the plan misses a
limit, a lower rate is searched for (`lower_rates`), and `place` plans again with a tighter one (`tightening`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import NamedTuple

from hetis.planner.use_cases.json_values import json_value
from hetis.planner.use_cases.lower_rates import CancelledError, KeptRate, LowerRates
from hetis.planner.use_cases.representative import RepresentativePart, representative_part
from hetis.planner.use_cases.service_level import DEFAULT, Held, Latency, held, service_level_of
from hetis.planner.use_cases.simulate import NothingSimulatedError, Question, answer, default_rate, seats_of
from hetis.planner.use_cases.verification import AS_PLANNED, DISPATCHED, VERIFICATION, Verification, misses
from hetis.simulator.arrivals import Arrivals, Load
from hetis.simulator.metrics import Summary
from hetis.simulator.running import Report
from hetis.simulator.values import Settings
from hetis.solver.plan import Objective, Plan
from hetis.solver.problem import PlacementProblem

MISSES_AT = "simulated traffic misses its limits at"  # how a plan's note begins if no lower rate was decided in time
TURNS = 8  # how many times a run replaces all the requests that a plan holds at once
FEWEST = 4_000  # requests per run: with few seats, the p95 TTFT depends on the few bursts of long requests in a run
FILLS = 2  # how many times at least, if that is not too much: while most seats are empty, TPOT looks too good
UNLIMITED = Objective(ttft_limit_s=None, tpot_limit_s=None)
LONGER = 4  # factor of the requests in a run that decides where limits are close
BY_CHANCE = 0.02  # share of a limit above which an excess is no chance, however wide the interval
MORE = (1.1, 1.05)  # factors of the planned rate, which are tried if it is kept; 90% of saturation is planned
CALM = 0.02  # seconds by which the wait may grow per second at these rates
ENOUGH = 10_000  # requests of a run at these rates, unless that is more than `LONGER` times the ordinary number


@dataclass(frozen=True, slots=True, kw_only=True)
class TriedRate:
    """A simulation at one rate."""

    summary: Summary
    held: Held
    num_requests: int
    within: bool  # whether the load was carried and nothing exceeded its limit
    kept: bool  # whether the limits were kept, up to chance: a plan may well use its limits up
    sure: bool  # whether they were kept by more than chance, so that other traffic at this rate keeps them, too
    close: bool  # whether a longer run may give another result


def needs_verifying(plan: Plan) -> bool:
    """Return whether a plan promises a latency that could be missed."""
    return bool(plan.replicas) and (plan.objective.ttft_limit_s, plan.objective.tpot_limit_s) != (None, None)


# A callback for the progress of a run: its arrival rate, the requests that have arrived, and their number (zero while
# the dispatcher is compiled, once on a machine).
RunReport = Callable[[float, int, int], None]


def unheard(rate_rps: float, given: int, total: int, /) -> None:
    """Report nothing."""


def verified(
    plan: Plan, problem: PlacementProblem, *, seed: int, cancelled: threading.Event, report: RunReport
) -> Plan:
    """Return the plan with the simulator's results, or unchanged if it promises no latency or was cancelled first.

    Head groups are split as planned. If a run with this split misses a limit or is close to one, they are dispatched
    per request, as engines do, which takes twice as long to simulate: below the saturated rate a dispatcher keeps more
    of them where they are computed fastest.

    If it misses a limit, the highest rate that keeps all limits is searched for. If it has more seats than runs can
    fill, a part of its replicas gets that part of the traffic, and rates are multiplied. If it misses a limit and the
    search for a lower rate is cancelled before any run kept them, the plan gets a note only (`MISSES_AT`).
    """
    tried = at_planned_rate(plan, problem, seed=seed, cancelled=cancelled, report=report)
    return plan if tried is None else tried.decided()


class _Most(NamedTuple):
    """The most requests that a run can have within seconds.

    ``ordinary`` is for an ordinary run, ``deciding`` for one that decides where limits are close, ``to_fill`` for
    either if seats must be filled.
    """

    ordinary: int
    deciding: int
    to_fill: int


WITHOUT_WORKERS = _Most(ordinary=40_000, deciding=40_000, to_fill=100_000)
WITH_WORKERS = _Most(ordinary=8_000, deciding=16_000, to_fill=16_000)  # each request takes several times as long


def num_requests_of(plan: Plan) -> int:
    """Return the number of requests per run: enough to fill the plan several times over, within seconds."""
    most, seats = most_requests_of(plan), seats_of(plan)
    fewest = max(FEWEST, service_level_of(plan).requests(most.deciding))
    return min(max(fewest, TURNS * seats), max(most.ordinary, min(most.to_fill, FILLS * seats)))


def longest_of(plan: Plan) -> int:
    """Return the number of requests in a run that decides where limits are close."""
    num_requests = num_requests_of(plan)
    return max(num_requests, min(most_requests_of(plan).deciding, LONGER * num_requests))


def enough_of(plan: Plan) -> int:
    """Return the number of requests in a run at a rate that may be too high: queues take long to fill."""
    return max(num_requests_of(plan), min(ENOUGH, longest_of(plan)))


def simulated_part(plan: Plan, problem: PlacementProblem, most_requests: int) -> RepresentativePart:
    """Return the whole plan if so many requests fill its seats, or else a part of it."""
    if are_filled(plan, most_requests) or not plan.served_rate():
        return RepresentativePart(plan=plan, share=1.0)
    few_seats = most_requests_of(plan).ordinary // TURNS
    return representative_part(plan, problem, few_seats=few_seats, most_seats=most_requests // FILLS)


def are_filled(plan: Plan, most_requests: int) -> bool:
    return FILLS * seats_of(plan) <= most_requests


def simulated_at(
    plan: Plan, problem: PlacementProblem, rate_rps: float, limits: Objective, *, seed: int, cancelled: threading.Event,
    report: Report, lengths: tuple[int, ...] = (), settings: Settings = AS_PLANNED,
) -> TriedRate | None:  # fmt: skip
    """Simulate a plan at a rate, held to its service level; None: it was cancelled.

    ``lengths`` are the numbers of requests in the first run and in longer ones, each of which follows if the limits are
    close; empty: the ordinary numbers.
    """
    load = Load(
        lengths=problem.workload, max_position=problem.model.max_position, arrivals=Arrivals.DRAWN, rate_rps=rate_rps
    )
    outcome, level = None, service_level_of(plan)
    for num_requests in dict.fromkeys(lengths or (num_requests_of(plan), longest_of(plan))):
        question = Question(
            load=load, num_requests=num_requests, seeds=(seed,), settings=settings, limits=limits,
            keep_run=level != DEFAULT,
        )  # fmt: skip
        try:
            found = answer(plan, problem, question, processes=1, cancelled=cancelled, report=report)
        except NothingSimulatedError:
            return None
        if not found.complete:
            return None
        outcome = _judged(found.summary, held(level, found.summary, found.run, limits), num_requests)
        if not outcome.close:
            break
    return outcome


class AtPlannedRate(NamedTuple):
    """A plan that was simulated at its planned rate."""

    plan: Plan
    found: Verification  # ``kept_rps`` is None if the plan misses a limit: lower rates were not tried yet
    # Returns the highest rate found to keep the limits below the planned one, which misses them, and not below another;
    # None: none of those tried. Raises `CancelledError`.
    kept_below: Callable[[float], KeptRate | None]

    def with_lower_rates(self, at_least_rps: float) -> AtPlannedRate:
        """Return the same with lower rates searched now, if the plan misses a limit and this is not cancelled.

        Rates below ``at_least_rps`` are not of interest.
        """
        if self.found.kept:
            return self
        try:
            kept = self.kept_below(at_least_rps)
        except CancelledError:
            return self
        return self._replace(kept_below=lambda least: kept if kept is not None and kept.rate_rps >= least else None)

    def decided(self, at_least_rps: float = 0.0) -> Plan:
        """Return the plan as `verified` does; lower rates are searched from ``at_least_rps`` on."""
        found, notes = self.found, self.plan.notes
        try:
            kept = None if found.kept else self.kept_below(at_least_rps)
        except CancelledError:
            what = ", ".join(misses(found, self.plan)) or "not all of the traffic is carried"
            part = "" if found.share is None else f" (a part of its replicas at {found.share:.3g} of the rate)"
            note = f"{MISSES_AT} {found.rate_rps:.4g} requests/s: {what}{part}"
            return replace(self.plan, notes=(*notes, note))
        if kept is not None:
            found, notes = replace(found, kept_rps=kept.rate_rps), (*notes, *kept.notes())
        return replace(self.plan, inputs={**self.plan.inputs, VERIFICATION: json_value(found)}, notes=notes)


def at_planned_rate(
    plan: Plan, problem: PlacementProblem, *, seed: int, cancelled: threading.Event, report: RunReport
) -> AtPlannedRate | None:
    """Simulate a plan at its rate and, if it keeps the limits, at higher ones.

    None: it promises no latency, or this was cancelled before its own rate was decided.
    """
    if not needs_verifying(plan) or cancelled.is_set():
        return None
    planned_rps, to_fill = default_rate(plan, problem), most_requests_of(plan).to_fill
    part = simulated_part(plan, problem, to_fill)
    ordinary, long, longer = num_requests_of(part.plan), enough_of(part.plan), longest_of(part.plan)
    too_short = not are_filled(part.plan, to_fill)

    settings = AS_PLANNED

    @cache
    def simulate(settings: Settings, rate_rps: float, *lengths: int, traffic: int = seed) -> TriedRate:
        found = simulated_at(
            part.plan, problem, rate_rps * part.share, plan.objective, seed=traffic, lengths=lengths,
            cancelled=cancelled, report=partial(report, rate_rps), settings=settings,
        )  # fmt: skip
        if found is None:
            raise CancelledError
        return found

    def decided() -> TriedRate:
        """Simulate the planned rate, with other traffic, too, if that may well miss the limits."""
        found = simulate(settings, planned_rps)
        if found.kept and found.close:
            other = simulate(settings, planned_rps, longer, traffic=seed + 1)
            found = found if other.kept else other
        return found

    def is_sure(rate_rps: float) -> bool:
        """Return whether the limits are kept with other traffic, too.

        A search for the highest rate finds rates that are kept by luck.
        """
        return all(simulate(settings, rate_rps, longer, traffic=traffic).sure for traffic in (seed, seed + 1))

    def is_calm(rate_rps: float) -> bool:
        runs = (simulate(settings, rate_rps, long, longer, traffic=traffic) for traffic in (seed, seed + 1))
        return all(run.sure and _is_calm(run.summary) for run in runs)

    def kept_below(at_least_rps: float) -> KeptRate | None:
        def seems_sure(rate_rps: float) -> bool | None:
            found = simulate(settings, rate_rps, ordinary)
            return found.sure or (None if found.within else False)

        search = LowerRates(seems_sure, is_sure)
        try:
            rate_rps = search.highest(planned_rps, at_least_rps)
        except CancelledError:
            if search.likely_rps is None:
                raise
            return KeptRate(search.likely_rps, ordinary, is_confirmed=False)
        return None if rate_rps is None else KeptRate(rate_rps, longer, is_confirmed=True)

    kept_rps = None
    try:
        split = simulate(AS_PLANNED, planned_rps, ordinary) if _has_workers(plan) else None
        if split is not None and (split.close or not split.kept):
            _compile_dispatcher(lambda: report(planned_rps, 0, 0))
            settings = DISPATCHED
        at_plan = split if split is not None and settings == AS_PLANNED else decided()
    except CancelledError:
        return None
    if at_plan.kept:
        kept_rps = planned_rps
        if _may_keep_more(plan, at_plan) and not too_short:
            with suppress(CancelledError):
                higher = (factor * planned_rps for factor in MORE)
                kept_rps = next((rate_rps for rate_rps in higher if is_calm(rate_rps)), planned_rps)
    summary = at_plan.summary
    found = Verification(
        rate_rps=planned_rps,
        num_requests=at_plan.num_requests,
        kept=at_plan.kept,
        steady=summary.steady,
        ttft_p95_s=summary.ttft_p95_s.value,
        tpot_mean_s=summary.mean_tpot_s.value,
        attainment=summary.attainment,
        kept_rps=kept_rps,
        ttft_s=at_plan.held.seconds.get(Latency.TTFT),
        tpot_s=at_plan.held.seconds.get(Latency.TPOT),
        ttft_missed=at_plan.held.missed.get(Latency.TTFT),
        tpot_missed=at_plan.held.missed.get(Latency.TPOT),
        share=part.share if part.share < 1.0 else None,
        too_short=too_short or None,
        dispatched=settings.dispatch or None,
    )
    return AtPlannedRate(plan, found, kept_below)


def _compile_dispatcher(on_start: Callable[[], None]) -> None:
    """Compile what dispatches head groups, if that has not been done on this machine."""
    from hetis.planner.use_cases.dispatch import is_compiled
    from hetis.solver.dispatch.solve import compile_dispatch

    if not is_compiled():
        on_start()
        compile_dispatch()


def most_requests_of(plan: Plan) -> _Most:
    return WITH_WORKERS if _has_workers(plan) else WITHOUT_WORKERS


def _has_workers(plan: Plan) -> bool:
    return any(replica.attention_workers for replica in plan.replicas)


def _may_keep_more(plan: Plan, at_plan: TriedRate) -> bool:
    """Return whether it is useful to simulate higher rates.

    It is for a plan of the highest rate, if its runs take only seconds and its wait hardly grows.
    """
    return plan.objective.demand_rps is None and _is_calm(at_plan.summary) and not _has_workers(plan)


def _is_calm(summary: Summary) -> bool:
    """Return whether the wait hardly grows.

    In a run that is too short to tell whether the queue is steady, that must hold by more than chance.
    """
    growth = summary.growth
    if summary.steady is None:
        return growth.is_below(CALM)
    return summary.steady and growth.value <= CALM


def _judged(summary: Summary, found: Held, num_requests: int) -> TriedRate:
    """Return whether a run keeps the limits, and how sure that is.

    The queues of a busy plan need time to fill, so the tail of latencies is too low in a run that starts empty.
    """
    limited, carried = found.limited, summary.within(UNLIMITED)
    within = carried and all(one.value <= one.limit for one in limited)
    by_chance = all(one.low <= one.limit and one.value <= (1.0 + BY_CHANCE) * one.limit for one in limited)
    is_close = any(one.low <= one.limit < one.high / one.close for one in limited)
    return TriedRate(
        summary=summary,
        held=found,
        num_requests=num_requests,
        within=within,
        kept=within or (summary.steady is not False and by_chance),
        sure=within and all(one.high <= one.limit for one in limited),
        close=summary.steady is not False and is_close,
    )
