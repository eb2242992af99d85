"""Simulation of a plan before it is shown: whether its latency limits hold at its planned rate.

The bound and the value of a plan are those of the cost model. The simulator models more: how requests queue for seats,
and how lengths vary. So `place` simulates the plan that it has found and reports both figures; if the plan misses a
limit, `place` plans again with a tighter one.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, partial
from typing import Any, NamedTuple

from hetis.planner.use_cases.json_values import json_value
from hetis.planner.use_cases.representative import RepresentativePart, representative_part
from hetis.planner.use_cases.service_level import (
    DEFAULT,
    Held,
    Latency,
    Statistic,
    held,
    limits_of,
    service_level_of,
    share_within,
)
from hetis.planner.use_cases.simulate import (
    NothingSimulatedError,
    Question,
    answer,
    default_rate,
    seats_of,
    with_more_seats,
)
from hetis.planner.use_cases.surviving import bounded_by
from hetis.simulator.arrivals import Arrivals, Load
from hetis.simulator.metrics import Summary
from hetis.simulator.running import RateSweep, Report, judged_rates
from hetis.simulator.values import Settings
from hetis.solver.errors import InfeasibleError, NoPlanFoundError
from hetis.solver.plan import Objective, Plan, SolveResult, Status
from hetis.solver.problem import PlacementProblem

VERIFICATION = "verification"  # entry of `Plan.inputs`
MISSES_AT = "simulated traffic misses its limits at"  # how a plan's note begins if no lower rate was decided in time
TURNS = 8  # how many times a run replaces all the requests that a plan holds at once
FEWEST = 4_000  # requests per run: with few seats, the p95 TTFT depends on the few bursts of long requests in a run
FILLS = 2  # how many times at least, if that is not too much: while most seats are empty, TPOT looks too good
UNLIMITED = Objective(ttft_limit_s=None, tpot_limit_s=None)
AS_PLANNED = Settings(dispatch=False, redispatch=False)  # heads as planned: nothing to compile, and fast
DISPATCHED = Settings(redispatch=False)  # heads of every request where the dispatcher puts them, as in engines
TTFT, TPOT = "TTFT p95", "TPOT mean"  # as shown in plans
LONGER = 4  # factor of the requests in a run that decides where limits are close
BY_CHANCE = 0.02  # share of a limit above which an excess is no chance, however wide the interval
BELOW = (0.97, 0.94, 0.88, 0.76, 0.5, 0.25, 0.125)  # shares of a rate that misses a limit, which are tried in turn
PRECISE = 1 / 64  # the search ends when a rate that misses a limit is so little above one that keeps them
LESS = (0.97, 0.94, 0.91, 0.85, 0.7, 0.5)  # shares of a rate that kept in short runs but not in long ones
COARSE = 0.07  # a larger step between two of these shares is searched for a rate in between; also the step above it
MOST_HIGHER = 5  # such steps above a rate that kept in long runs at once
MORE_SEATS = (1.5, 2.0, 3.0, math.inf)  # times the planned seats, which are tried in turn if requests wait for them
LESS_EXCESS = 0.98  # times what a latency is over its limit: at least so much better with more seats
MORE = (1.1, 1.05)  # factors of the planned rate, which are tried if it is kept; 90% of saturation is planned
CALM = 0.02  # seconds by which the wait may grow per second at these rates
ENOUGH = 10_000  # requests of a run at these rates, unless that is more than `LONGER` times the ordinary number


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """A plan's behaviour under Poisson arrivals at its planned rate."""

    rate_rps: float  # rate of the arrivals, which the plan promises
    num_requests: int  # requests per run
    kept: bool  # whether the load was carried, with no latency above its limit by more than chance
    steady: bool | None  # whether the queue did not grow; None: the run was too short to tell
    ttft_p95_s: float  # over all requests of the run, after the warm-up
    tpot_mean_s: float  # over all requests of the run, after the warm-up
    attainment: float  # share of the requests within both limits
    # The highest rate that kept the limits in a simulation. If ``kept``, ``rate_rps`` or the first of `MORE` times
    # ``rate_rps`` that kept them by more than chance, which is tried for plans of the highest rate unless runs are slow
    # (with attention workers). Otherwise a lower rate that kept them by more than chance; None: none of those tried.
    kept_rps: float | None
    # The following fields are missing in earlier plans.
    ttft_s: float | None = None  # the statistic to which the plan is held, if that is not p95
    tpot_s: float | None = None  # the statistic to which the plan is held, if that is not the mean
    # The share of the requests over each limit, if the plan is held to a share of requests; None: there is no limit
    ttft_missed: float | None = None
    tpot_missed: float | None = None
    share: float | None = None  # share of the rate, at which as large a part of the replicas ran; None: all ran
    too_short: bool | None = None  # whether runs cannot fill even the seats of that part; None: they do
    dispatched: bool | None = None  # whether heads were dispatched per request; None: they were split as planned

    @property
    def settings(self) -> Settings:
        """The settings of the simulation."""
        return DISPATCHED if self.dispatched else AS_PLANNED

    def seconds(self, latency: Latency) -> float:
        """Return the simulated latency in the statistic to which the plan is held."""
        if latency is Latency.TTFT:
            return self.ttft_p95_s if self.ttft_s is None else self.ttft_s
        return self.tpot_mean_s if self.tpot_s is None else self.tpot_s


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
    search for a lower rate is cancelled, the plan gets a note only (`MISSES_AT`).
    """
    tried = _at_planned_rate(plan, problem, seed=seed, cancelled=cancelled, report=report)
    return plan if tried is None else tried.decided()


def verification_of(plan: Plan) -> Verification | None:
    """Return what `verified` stored, or None if that is missing or unreadable."""
    found = plan.inputs.get(VERIFICATION)
    names = [field.name for field in fields(Verification)]
    optional = [field.name for field in fields(Verification) if field.default is None]
    if not isinstance(found, Mapping) or not found.keys() >= {*names}.difference(optional):
        return None
    values: dict[str, Any] = {name: found.get(name) for name in names}
    numbers = [values[name] for name in ("rate_rps", "num_requests", "ttft_p95_s", "tpot_mean_s", "attainment")]
    numbers += [values[name] or 0.0 for name in ("kept_rps", *optional)]
    if not all(isinstance(number, int | float) for number in numbers):
        return None
    shares = values["attainment"], 1.0 if values["share"] is None else values["share"]
    return Verification(**values) if 0.0 <= shares[0] <= 1.0 and 0.0 < shares[1] <= 1.0 else None


def kept_rate(plan: Plan) -> float | None:
    """Return the highest rate at which simulated traffic kept the limits, if it did not at the plan's own rate.

    None if the plan was not simulated, or kept the limits, or kept them at none of the rates tried.
    """
    found = verification_of(plan)
    return None if found is None or found.kept else found.kept_rps


def promising(plan: Plan) -> Plan:
    """Return the plan without a demand if it maximises its rate: it promises its own, whatever is demanded of it."""
    return replace(plan, objective=replace(plan.objective, demand_rps=None)) if plan.objective.maximises else plan


def rate_to_simulate(plan: Plan, problem: PlacementProblem) -> float:
    """Return the default rate to simulate: the promised demand, or else the rate known to keep the plan's limits."""
    plan = promising(plan)
    return plan.objective.demand_rps or kept_rate(plan) or default_rate(plan, problem)


class LimitedLatency(NamedTuple):
    """A latency that has a limit, as simulated, in the statistic to which the plan is held."""

    latency: Latency
    statistic: Statistic
    value_s: float
    limit_s: float

    @property
    def name(self) -> str:
        return f"{self.latency} {self.statistic}"


def limited_latencies(verification: Verification, plan: Plan) -> list[LimitedLatency]:
    """Return each latency that has a limit."""
    level, limits = service_level_of(plan), limits_of(plan.objective)
    return [
        LimitedLatency(latency, level.statistic(latency), verification.seconds(latency), limit_s)
        for latency, limit_s in limits.items()
    ]


def attained(verification: Verification, plan: Plan) -> str:
    """Return the share of the requests within all limits, beside the requested share if there is one."""
    asked = service_level_of(plan).attainment
    if asked is None:
        limits = "both" if len(limits_of(plan.objective)) == 2 else "the limit"
        return f"{verification.attainment:.0%} within {limits}"
    return (
        f"{share_within(verification.attainment, asked)} of the requests within all limits, {100 * asked:g}% asked for"
    )


def misses(verification: Verification, plan: Plan) -> list[str]:
    """Return the limits that a simulated plan misses, one clause each; empty if it keeps all."""
    if verification.kept:
        return []
    if service_level_of(plan).attainment is not None:
        over = [attained(verification, plan)]
    else:
        limited = limited_latencies(verification, plan)
        over = [
            f"{one.name} {_seconds(one.value_s)} of {_seconds(one.limit_s)}"
            for one in limited
            if one.value_s > one.limit_s
        ]
    return [*(["requests queue up without end"] if verification.steady is False else []), *over]


def _seconds(value_s: float) -> str:
    return f"{value_s:,.0f} s" if 1000 <= value_s < math.inf else f"{value_s:.3g} s"  # not 3.45e+03 s


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
    most, seats = _most_of(plan), seats_of(plan)
    fewest = max(FEWEST, service_level_of(plan).requests(most.deciding))
    return min(max(fewest, TURNS * seats), max(most.ordinary, min(most.to_fill, FILLS * seats)))


def longest_of(plan: Plan) -> int:
    """Return the number of requests in a run that decides where limits are close."""
    num_requests = num_requests_of(plan)
    return max(num_requests, min(_most_of(plan).deciding, LONGER * num_requests))


def enough_of(plan: Plan) -> int:
    """Return the number of requests in a run at a rate that may be too high: queues take long to fill."""
    return max(num_requests_of(plan), min(ENOUGH, longest_of(plan)))


def _simulated_part(plan: Plan, problem: PlacementProblem, most_requests: int) -> RepresentativePart:
    """Return the whole plan if so many requests fill its seats, or else a part of it."""
    if _are_filled(plan, most_requests) or not plan.served_rate():
        return RepresentativePart(plan=plan, share=1.0)
    few_seats = _most_of(plan).ordinary // TURNS
    return representative_part(plan, problem, few_seats=few_seats, most_seats=most_requests // FILLS)


def _are_filled(plan: Plan, most_requests: int) -> bool:
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


class _AtPlannedRate(NamedTuple):
    """A plan that was simulated at its planned rate."""

    plan: Plan
    found: Verification  # ``kept_rps`` is None if the plan misses a limit: lower rates were not tried yet
    # Returns the highest rate found to keep the limits below the planned one, which misses them, and not below another;
    # None: none of those tried. Raises `_CancelledError`.
    kept_below: Callable[[float], float | None]

    def with_lower_rates(self) -> _AtPlannedRate:
        """Return the same with lower rates searched now, if the plan misses a limit and this is not cancelled."""
        if self.found.kept:
            return self
        try:
            kept_rps = self.kept_below(0.0)
        except _CancelledError:
            return self
        return self._replace(kept_below=lambda least: kept_rps if kept_rps is not None and kept_rps >= least else None)

    def decided(self, at_least_rps: float = 0.0) -> Plan:
        """Return the plan as `verified` does; lower rates are searched from ``at_least_rps`` on."""
        found = self.found
        try:
            kept_rps = found.kept_rps if found.kept else self.kept_below(at_least_rps)
        except _CancelledError:
            what = ", ".join(misses(found, self.plan)) or "not all of the traffic is carried"
            part = "" if found.share is None else f" (a part of its replicas at {found.share:.3g} of the rate)"
            note = f"{MISSES_AT} {found.rate_rps:.4g} requests/s: {what}{part}"
            return replace(self.plan, notes=(*self.plan.notes, note))
        stored = json_value(replace(found, kept_rps=kept_rps))
        return replace(self.plan, inputs={**self.plan.inputs, VERIFICATION: stored})


def _at_planned_rate(
    plan: Plan, problem: PlacementProblem, *, seed: int, cancelled: threading.Event, report: RunReport
) -> _AtPlannedRate | None:
    """Simulate a plan at its rate and, if it keeps the limits, at higher ones.

    None: it promises no latency, or this was cancelled before its own rate was decided.
    """
    if not needs_verifying(plan) or cancelled.is_set():
        return None
    planned_rps, to_fill = default_rate(plan, problem), _most_of(plan).to_fill
    part = _simulated_part(plan, problem, to_fill)
    ordinary, long, longer = num_requests_of(part.plan), enough_of(part.plan), longest_of(part.plan)
    too_short = not _are_filled(part.plan, to_fill)

    settings = AS_PLANNED

    @cache
    def simulate(settings: Settings, rate_rps: float, *lengths: int, traffic: int = seed) -> TriedRate:
        found = simulated_at(
            part.plan, problem, rate_rps * part.share, plan.objective, seed=traffic, lengths=lengths,
            cancelled=cancelled, report=partial(report, rate_rps), settings=settings,
        )  # fmt: skip
        if found is None:
            raise _CancelledError
        return found

    def at_planned_rate() -> TriedRate:
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

    def kept_below(at_least_rps: float) -> float | None:
        def seems_sure(rate_rps: float) -> bool:
            return simulate(settings, rate_rps, ordinary).sure

        return _kept_below(planned_rps, at_least_rps=at_least_rps, seems_sure=seems_sure, is_sure=is_sure)

    kept_rps = None
    try:
        split = simulate(AS_PLANNED, planned_rps, ordinary) if _has_workers(plan) else None
        if split is not None and (split.close or not split.kept):
            _compile_dispatcher(lambda: report(planned_rps, 0, 0))
            settings = DISPATCHED
        at_plan = split if split is not None and settings == AS_PLANNED else at_planned_rate()
    except _CancelledError:
        return None
    if at_plan.kept:
        kept_rps = planned_rps
        if _may_keep_more(plan, at_plan) and not too_short:
            with suppress(_CancelledError):
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
    return _AtPlannedRate(plan, found, kept_below)


def _with_seats(
    plan: Plan, problem: PlacementProblem, *, seed: int, cancelled: threading.Event, report: RunReport
) -> _AtPlannedRate | None:
    """Simulate a plan at its rate and, if TTFT is missed, with engines that may run more requests at once.

    A plan has as many seats as keep the limit on TPOT when all are taken. At lower rates fewer are, so that more of
    them spare requests the wait for a seat without TPOT being missed. None: as `_at_planned_rate`.
    """
    simulated = partial(_at_planned_rate, problem=problem, seed=seed, cancelled=cancelled, report=report)
    best = simulated(plan)
    for factor in MORE_SEATS:
        if best is None or best.found.kept or not _waits(best.found, plan):
            break
        wider = with_more_seats(plan, problem, factor)
        if seats_of(wider) == seats_of(best.plan):
            continue
        other = simulated(wider)
        if other is None or not (other.found.kept or _excess(other) < LESS_EXCESS * _excess(best)):
            break
        best = other
    return best


def _waits(found: Verification, plan: Plan) -> bool:
    """Return whether TTFT is over its limit, by more than TPOT."""
    worst = max(limited_latencies(found, plan), key=lambda one: one.value_s / one.limit_s)
    return worst.latency is Latency.TTFT and worst.value_s > worst.limit_s


def _excess(tried: _AtPlannedRate) -> float:
    """Return the worst latency of a plan over its limit, or the share of requests that miss a limit."""
    if service_level_of(tried.plan).attainment is not None:
        return 1.0 - tried.found.attainment
    return max(one.value_s / one.limit_s for one in limited_latencies(tried.found, tried.plan))


def _compile_dispatcher(on_start: Callable[[], None]) -> None:
    """Compile what dispatches head groups, if that has not been done on this machine."""
    from hetis.planner.use_cases.dispatch import is_compiled
    from hetis.solver.dispatch.solve import compile_dispatch

    if not is_compiled():
        on_start()
        compile_dispatch()


def _most_of(plan: Plan) -> _Most:
    return WITH_WORKERS if _has_workers(plan) else WITHOUT_WORKERS


def _has_workers(plan: Plan) -> bool:
    return any(replica.attention_workers for replica in plan.replicas)


class _CancelledError(Exception):
    """A simulation was cancelled."""


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


def _kept_below(
    missed_rps: float, *, at_least_rps: float, seems_sure: Callable[[float], bool], is_sure: Callable[[float], bool]
) -> float | None:
    """Return the highest rate found below one that misses a limit; None: none of those tried keeps the limits.

    Short runs search for it, and longer ones decide. Rates below ``at_least_rps`` are not of interest.
    """
    low = high = missed_rps
    for share in BELOW:
        low, high = max(share * missed_rps, at_least_rps), low
        if low >= high:
            return None
        if seems_sure(low):
            break
    else:
        return None
    while high - low > PRECISE * high:
        middle = (low + high) / 2.0
        low, high = (middle, high) if seems_sure(middle) else (low, middle)
    return _sure_near(low, is_sure, at_least_rps=at_least_rps, below_rps=missed_rps)


def _sure_near(
    rate_rps: float, is_sure: Callable[[float], bool], *, at_least_rps: float, below_rps: float
) -> float | None:
    """Return the highest rate found that keeps the limits in long runs, if ``rate_rps`` does in short ones.

    The wide intervals of short runs exclude rates that long runs show to be kept. If this is cancelled after one such
    rate was found, the highest so far is returned. None: no rate that was tried is kept.
    """
    if is_sure(rate_rps):
        with suppress(_CancelledError):
            for _ in range(MOST_HIGHER):
                higher_rps = (1.0 + COARSE) * rate_rps
                if higher_rps >= below_rps or not is_sure(higher_rps):
                    break
                rate_rps = higher_rps
        return rate_rps
    kept = missed = 1.0  # shares of the rate
    for share in LESS:
        kept, missed = max(share, at_least_rps / rate_rps), kept
        if kept >= missed:
            return None
        if is_sure(kept * rate_rps):
            break
    else:
        return None
    with suppress(_CancelledError):
        while missed - kept > COARSE:
            middle = (missed + kept) / 2.0
            kept, missed = (middle, missed) if is_sure(middle * rate_rps) else (kept, middle)
    return kept * rate_rps


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


# --- latencies as a function of the rate


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
    plan: Plan, problem: PlacementProblem, *, seed: int = 0, cancelled: threading.Event, report: Report
) -> Curve | None:
    """Simulate Poisson arrivals at shares of the planned rate, with attention workers if the plan has them.

    Of a plan with more seats than runs can fill, a part is simulated, as `verified` does, and head groups are
    dispatched if it did that.

    None if the plan has no replicas, or if it was cancelled before the first rate was done.
    """
    if not plan.replicas:
        return None
    limits, most_requests = plan.objective, min(MOST_OF_CURVE, _most_of(plan).to_fill)
    part = _simulated_part(plan, problem, most_requests)
    planned_rps, num_requests = default_rate(promising(plan), problem), min(MOST_OF_CURVE, num_requests_of(part.plan))
    verification, found = verification_of(plan), dict[float, TriedRate]()
    settings = AS_PLANNED if verification is None else verification.settings
    for number, share in enumerate(SHARES):

        def told(given: int, total: int, done: int = number) -> None:
            report(done * total + given, len(SHARES) * total)

        if cancelled.is_set():
            break
        tried = simulated_at(
            part.plan, problem, share * planned_rps * part.share, limits, seed=seed, cancelled=cancelled, report=told,
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
        too_short=not _are_filled(part.plan, most_requests),
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


# --- another search with a tighter limit


TIGHTENED = "tightened"  # entry of `Plan.inputs`
SEARCHES = 2  # in addition to the first one
LEAST_STEP = 0.8  # share of a limit: near saturation latencies are so steep that their ratio is too large a step
LITTLE = 0.05  # share of a rate given up for a plan that keeps its limits at its own rate, not at a lower one

Find = Callable[[PlacementProblem], Plan]  # raises InfeasibleError, NoPlanFoundError


@dataclass(frozen=True, slots=True, kw_only=True)
class Tightening:
    """A limit under the name that plans show, and the tighter limit that was planned for."""

    name: str
    asked_s: float
    planned_s: float

    def of(self, objective: Objective) -> Objective:
        """Return the objective with the tighter limit."""
        if self.name == TTFT:
            return replace(objective, ttft_limit_s=self.planned_s)
        return replace(objective, tpot_limit_s=self.planned_s)


def _never() -> bool:
    return False


def verified_plan(
    plan: Plan, problem: PlacementProblem, find: Find | None, *, seed: int, cancelled: threading.Event,
    report: RunReport, is_short: Callable[[], bool] = _never,
) -> Plan:  # fmt: skip
    """Return the plan as `verified` does or, if it misses a limit at its planned rate, a better one.

    The cost model predicts TTFT by averages, which is too low if a few long iterations with a chunk take most of the
    time (`docs/cost-model.md`, "What is approximated"). The simulator takes that into account.

    If requests wait for seats, engines that may run more of them at once are simulated first (`with_more_seats`).

    ``find`` then searches again with the missed limit tightened (None: there is no other search). The first step is the
    ratio of the planned to the simulated latency, but at most 20%. The next is another step of this size if a limit is
    still missed, and half of it in the other direction if none is missed or there is no such plan. The result is the
    plan that serves most within the limits of the problem; one that keeps them at its own rate may serve a little less.
    Its bound is that of the problem, since a tighter limit can only exclude plans.

    Lower rates of plans that miss a limit are simulated last, and only those at which such a plan would be the result.
    Those of the first plan are simulated first if ``is_short`` says then that little time is left: another search may
    use it up, and no rate would be known to keep the limits.
    """
    simulated = partial(_with_seats, problem=problem, seed=seed, cancelled=cancelled, report=report)
    first = simulated(plan)
    if first is None:
        return plan
    limit = None if find is None else _missed(first.found, plan)
    if find is None or limit is None:
        return _with_seats_noted(first.decided())
    first = first.with_lower_rates() if is_short() else first
    tried, step = [first], limit.planned_s / limit.asked_s
    share, planned_s = step, _planned_s(plan, limit)
    for _ in range(SEARCHES):
        tightened = replace(limit, planned_s=share * planned_s)
        posed = replace(problem, objective=tightened.of(problem.objective))
        again = None if cancelled.is_set() else _found(find, posed)
        other = None if again is None else simulated(_answering(plan, problem, again, tightened))
        tried += [] if other is None else [other]
        still_missed = other is not None and not other.found.kept
        share *= step if still_missed else step**-0.5
    return _with_seats_noted(_best(tried))


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


def _best(tried: Sequence[_AtPlannedRate]) -> Plan:
    """Return the plan that serves most within the limits, with a note if that is not the first one, which misses them.

    If several serve as much, it is the first of them.
    """
    best = max((one.decided() for one in tried if one.found.kept), key=_worth, default=None)
    missed = () if best is not None and not best.objective.maximises else [one for one in tried if not one.found.kept]
    below_rps = None  # rate at and above which the first plan misses the limits, if that is known
    for one in reversed(missed):
        least_rps = 0.0 if best is None else _worth(best)[1]
        decided = one.decided(least_rps)
        best = decided if best is None else max(decided, best, key=_worth)
        below_rps = None if verification_of(decided) is None else min(least_rps, one.found.rate_rps)
    assert best is not None, "each plan keeps or misses the limits"
    other = tightening_of(best)
    return best if other is None else replace(best, notes=(*best.notes, _sentence(tried[0], other, below_rps)))


def tightening_of(plan: Plan) -> Tightening | None:
    """Return the limit that was tightened for a plan, or None if there is none or it is unreadable."""
    found = plan.inputs.get(TIGHTENED)
    try:
        return Tightening(**found) if isinstance(found, Mapping) else None
    except TypeError:
        return None


def _missed(found: Verification, plan: Plan) -> Tightening | None:
    """Return the limit that a simulated plan misses most, and the first step from this limit.

    None if it misses none.
    """
    if found.kept:
        return None
    limited = limited_latencies(found, plan)  # a plan without limits is not verified
    if service_level_of(plan).attainment is None:
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


def _answering(first: Plan, problem: PlacementProblem, again: Plan, tried: Tightening) -> Plan:
    """Return the plan for a tightened limit as one for the problem, with the first plan's bound and inputs."""
    return replace(
        again,
        objective=problem.objective,
        result=_bounded(again.result, first.result, maximises=problem.objective.maximises),
        inputs={**first.inputs, TIGHTENED: asdict(tried)},
    )


def _bounded(result: SolveResult, first: SolveResult, *, maximises: bool) -> SolveResult:
    found = bounded_by(result, max(first.bound, result.value) if maximises else min(first.bound, result.value))
    status = Status.INTERRUPTED if Status.INTERRUPTED in (result.status, first.status) else found.status
    return replace(found, status=status, solve_s=first.solve_s + result.solve_s)


def _sentence(first: _AtPlannedRate, tried: Tightening, below_rps: float | None) -> str:
    result, asked = first.plan.result, _seconds(tried.asked_s)
    this = "misses the limits" if below_rps is None else f"keeps the limits at less than {below_rps:.4g} requests/s"
    return (
        f"planned for a {tried.name} of {_seconds(tried.planned_s)} where {asked} are asked for: simulated, "
        f"the best plan for {asked} by the model ({result.value:.4g} {result.unit}) {this}; the bound is "
        f"that for {asked}"
    )


def _worth(plan: Plan) -> tuple[bool, float]:
    """Return the key by which plans are compared: the rate within the limits or, if a rate is demanded, the cost."""
    found = verification_of(plan)
    kept = found is not None and found.kept
    if plan.objective.maximises:
        return True, _kept_rps(plan) * (1.0 + LITTLE if kept else 1.0)
    return kept, -plan.result.value if kept else _kept_rps(plan)


def _kept_rps(plan: Plan) -> float:
    found = verification_of(plan)
    return 0.0 if found is None or found.kept_rps is None else found.kept_rps
