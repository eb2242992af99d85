"""The rate at which simulated traffic keeps a plan's limits: its value.

A plan is searched for what it keeps by the cost model and a queue model. The simulator models more: how iterations
follow each other, and how lengths vary. So `place` simulates the plan that it has found. If a limit is missed at the
planned rate, the highest lower rate that keeps all is searched for (`LowerRates`), and if all are kept, higher rates up
to the bound are tried. What is kept becomes the plan's value (`restated`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from typing import NamedTuple

from hetis.planner.use_cases.record.forms import Verification
from hetis.planner.use_cases.record.parts import Requested, Verified
from hetis.planner.use_cases.service_level import DEFAULT, Latency
from hetis.planner.use_cases.simulation.judging import measured
from hetis.planner.use_cases.simulation.representative import RepresentativePart, representative_part
from hetis.planner.use_cases.simulation.simulate import NothingSimulatedError, Question, answer, default_rate, seats_of
from hetis.planner.use_cases.verification.lower_rates import KeptRate, LowerRates, StoppedError
from hetis.planner.use_cases.verification.outcome import (
    AS_PLANNED,
    DISPATCHED,
    MISSES_AT,
    NGINX,
    misses,
    needs_verifying,
    noted_if_stopped,
    promising,
    restated,
)
from hetis.planner.use_cases.verification.tried_rate import TriedRate, hardly_grows, judged
from hetis.simulator.arrivals import Arrivals, Load
from hetis.simulator.metrics import Metrics
from hetis.simulator.running import Report
from hetis.simulator.simulate import Timings
from hetis.simulator.values import RouterName, Settings
from hetis.solver.budget import Budget, Progress
from hetis.solver.budget import Report as SearchReport
from hetis.solver.check.result import MOST_UTILISATION
from hetis.solver.plan import Objective, ObjectiveKind, Plan, Role
from hetis.solver.problem import PlacementProblem

TURNS = 8  # how many times a run replaces all the requests that a plan holds at once
FEWEST = 4_000  # requests per run: with few seats, the p95 TTFT depends on the few bursts of long requests in a run
FILLS = 2  # how many times at least, if that is not too much: while most seats are empty, TPOT looks too good
LONGER = 2  # factor of the requests in a run that decides where limits are close
PROBE = 500  # requests of the run before it, which only shows that a limit is missed by far
ITERATIONS = 2_000_000  # iterations of stages that all simulations of a plan may take: about six seconds
PER_REQUEST = 20.0  # iterations that take as long as a request's arrival, routing and record
PART = 0.2  # of all iterations, which one run may take
WORKER_ITERATIONS = 3.0  # an iteration with attention workers takes as long as so many without
DEAR = 0.8  # of a rate that misses a limit, which is tried first if there is work for few runs
HIGHER = (1.5, 1.2, 1.15, 1.1, 1.05)  # factors of the planned rate, which are tried if it is kept, up to the bound
WORTH_TRYING = 1.01  # ratio of the highest rate to the planned one
LONG_RUN = 10_000  # requests of a run at these rates, unless that is more than `LONGER` times the ordinary number


# A callback for the progress of a run: its arrival rate, the requests that have arrived, and their number (zero while
# the dispatcher is compiled, once on a machine).
RunReport = Callable[[float, int, int], None]


def simulation_report(plan: Plan, report: SearchReport) -> RunReport:
    """Return a callback that reports simulations as progress of the search, for each quarter of a run's requests."""
    started_s, reported = time.monotonic() - plan.result.solve_s, (0.0, 0, 0)

    def run(rate_rps: float, given: int, total: int) -> None:
        nonlocal reported
        if reported == (reported := (rate_rps, given * 4 // max(total, 1), total)):
            return
        phase = f"simulating {rate_rps:.4g} requests/s, {given:,} of {total:,}"
        if not total:
            phase = "compiling the dispatcher (only once; takes a minute or two)"
        report(Progress(phase=phase, elapsed_s=time.monotonic() - started_s, incumbent=plan.result.value))

    return run


def kept_plan(
    plan: Plan, problem: PlacementProblem, *, seed: int, budget: Budget, report: RunReport, router: RouterName = NGINX
) -> Plan:
    """Return the plan with the rate that simulated traffic keeps as its value, and the simulation in its record.

    It is unchanged if it promises no latency, and has a note if time ended its simulation. A plan that maximises its
    rate is simulated at that rate, whatever rate is demanded of it.

    Head groups are split as planned. If a run with this split misses a limit or is close to one, they are dispatched
    per request, as engines do, which takes twice as long to simulate: below the saturated rate a dispatcher keeps more
    of them where they are computed fastest.

    If it has more seats than runs can fill, a part of its replicas gets that part of the traffic, and rates are
    multiplied. If it misses a limit and the search for a lower rate is stopped before any run kept them, the plan gets
    a note only (`MISSES_AT`).
    """
    if not needs_verifying(plan):
        return plan
    demanded, plan = plan.objective, promising(plan)
    runs = None
    if not budget.is_spent():
        runs = _Runs(plan, problem, seed, budget, report, router)
        with suppress(StoppedError):
            plan = runs.kept()
    found = replace(plan, objective=demanded)
    return noted_if_stopped(found, budget)


class _Most(NamedTuple):
    """The most requests that a run can have within seconds.

    ``ordinary`` is for an ordinary run, ``deciding`` for one that decides where limits are close, ``to_fill`` for
    either if seats must be filled.
    """

    ordinary: int
    deciding: int
    to_fill: int


WITHOUT_WORKERS = _Most(ordinary=8_000, deciding=16_000, to_fill=12_000)
WITH_WORKERS = _Most(ordinary=4_000, deciding=8_000, to_fill=8_000)  # each request takes several times as long


def num_requests_of(plan: Plan) -> int:
    """Return the number of requests per run: enough to fill the plan several times over, within seconds."""
    most, seats = most_requests_of(plan), seats_of(plan)
    for_level = min(Requested.of(plan).service_level.requests(most.deciding), most.deciding)
    return max(for_level, min(max(FEWEST, TURNS * seats), max(most.ordinary, min(most.to_fill, FILLS * seats))))


def longest_of(plan: Plan) -> int:
    """Return the number of requests in a run that decides where limits are close."""
    num_requests = num_requests_of(plan)
    return max(num_requests, min(most_requests_of(plan).deciding, LONGER * num_requests))


def enough_of(plan: Plan) -> int:
    """Return the number of requests in a run at a rate that may be too high: queues take long to fill."""
    return max(num_requests_of(plan), min(LONG_RUN, longest_of(plan)))


def simulated_part(plan: Plan, problem: PlacementProblem, most_requests: int) -> RepresentativePart:
    """Return the whole plan if so many requests fill its seats or it has classes of requests, or else a part of it."""
    if plan.classes or are_filled(plan, most_requests) or not plan.served_rate():
        return RepresentativePart(plan=plan, share=1.0)
    few_seats = most_requests_of(plan).ordinary // TURNS
    return representative_part(plan, problem, few_seats=few_seats, most_seats=most_requests // FILLS)


def are_filled(plan: Plan, most_requests: int) -> bool:
    return FILLS * seats_of(plan) <= most_requests


def simulated_at(
    plan: Plan, problem: PlacementProblem, rate_rps: float, limits: Objective, *, seed: int, budget: Budget,
    report: Report, lengths: tuple[int, ...] = (), settings: Settings = AS_PLANNED, timings: Timings | None = None,
) -> TriedRate | None:  # fmt: skip
    """Simulate a plan at a rate, and judge it by its service level; None: the budget was spent.

    ``lengths`` are the numbers of requests in the first run and in longer ones, each of which follows if the limits are
    close; empty: the ordinary numbers. The budget is charged with the iterations of every run.
    """
    load = Load(
        lengths=problem.workload, max_position=problem.model.max_position, arrivals=Arrivals.DRAWN, rate_rps=rate_rps,
        gap_cv=problem.workload.burstiness,
    )  # fmt: skip
    outcome, level = None, Requested.of(plan).service_level
    for num_requests in dict.fromkeys(lengths or (num_requests_of(plan), longest_of(plan))):
        question = Question(
            load=load, num_requests=num_requests, seeds=(seed,), settings=settings, limits=limits,
            keep_run=level != DEFAULT,
        )  # fmt: skip
        try:
            found = answer(
                plan, problem, question, processes=1, is_cancelled=budget.is_spent, report=report, timings=timings
            )
        except NothingSimulatedError:
            return None
        if not found.complete:
            return None
        budget.work += iterations_of(plan, found.runs[0])
        outcome = judged(found.summary, measured(level, found.summary, found.run, limits), num_requests)
        if not outcome.close:
            break
    return outcome


def iterations_of(plan: Plan, run: Metrics) -> float:
    """Return the iterations of stages that take as long as a run, by which its cost is counted."""
    stages = sum(len(one.stages) for one in plan.replicas) / len(plan.replicas)
    each = WORKER_ITERATIONS if _has_workers(plan) else 1.0
    return run.counts.iterations * stages * each + PER_REQUEST * run.counts.arrived


def utilisation_at(rate_rps: float, saturated_rps: float) -> float:
    """Return the utilisation at a rate, which `MOST_UTILISATION` of the saturated one does not exceed by rounding."""
    return min(rate_rps / saturated_rps, MOST_UTILISATION)


class _Runs:
    """Simulations of a plan, or of a part of it, at rates of the whole plan; none is run twice."""

    def __init__(
        self, plan: Plan, problem: PlacementProblem, seed: int, budget: Budget, report: RunReport, router: RouterName
    ) -> None:
        self._plan, self._problem, self._seed = plan, problem, seed
        self._planned_rps, to_fill = default_rate(plan, problem), most_requests_of(plan).to_fill
        self._is_value = plan.objective.kind is ObjectiveKind.GOODPUT  # the rate that is kept
        self._part = part = simulated_part(plan, problem, to_fill)
        self._ordinary, self._long, self._longer = (
            num_requests_of(part.plan),
            enough_of(part.plan),
            longest_of(part.plan),
        )
        self._most_rps = MOST_UTILISATION * plan.served_rate()
        self._too_short = not are_filled(part.plan, to_fill)
        self._settings = replace(AS_PLANNED, router=router)
        self._compiling = lambda: report(self._planned_rps, 0, 0)
        timings = Timings()

        @cache
        def run(settings: Settings, rate_rps: float, *lengths: int, traffic: int) -> TriedRate:
            found = simulated_at(
                part.plan, problem, rate_rps * part.share, plan.objective, seed=traffic, lengths=lengths,
                budget=budget, report=partial(report, rate_rps), settings=settings, timings=timings,
            )  # fmt: skip
            if found is None:
                raise StoppedError
            return found

        self._each = 1e-9  # iterations per request, as far as is known

        @cache
        def simulate(settings: Settings, rate_rps: float, *lengths: int, traffic: int) -> TriedRate:
            before, is_long = budget.work, min(lengths) >= 2 * PROBE
            if is_long and rate_rps >= self._planned_rps:  # lower rates are hardly missed by far
                probe = run(settings, rate_rps, PROBE, traffic=traffic)
                self._each = max(self._each, (budget.work - before) / PROBE)
                if probe.missed_by_far:
                    return probe
            part = PART / WORKER_ITERATIONS if _has_workers(plan) else PART
            most = max(PROBE, int(part * budget.work_limit / self._each)) if budget.work_limit < math.inf else math.inf
            return run(
                settings, rate_rps, *(int(min(one, most)) if is_long else one for one in lengths), traffic=traffic
            )

        self._simulate, self._budget = simulate, budget

    def _at(self, rate_rps: float, *lengths: int, other: bool = False) -> TriedRate:
        """Simulate the usual traffic, or other traffic, at a rate. Raises `StoppedError`."""
        return self._simulate(self._settings, rate_rps, *lengths, traffic=self._seed + other)

    def kept(self) -> Plan:
        """Return the plan at the rate that is kept.

        Raises `StoppedError` before the behaviour at the planned rate is known.
        """
        found, plan = self._planned(), self._plan
        if not self._is_value:
            kept = None if found.kept else self._lower(found)
            return self._recorded(found, self._planned_rps if found.kept else None if kept is None else kept.rate_rps)
        if found.kept:
            return self._recorded(*self._higher(found))
        try:
            kept = self._lower(found)
        except StoppedError:
            what = ", ".join(misses(self._verification(found, self._planned_rps, None), plan))
            part = "" if self._part.share == 1.0 else f" (a part of its replicas at {self._part.share:.3g} of the rate)"
            note = (
                f"{MISSES_AT} {self._planned_rps:.4g} requests/s: {what or 'not all of the traffic is carried'}{part}"
            )
            return replace(plan, notes=(*plan.notes, note))
        if kept is None:
            return self._recorded(found, None)
        kept_plan = self._recorded(replace(self._longest_at(kept.rate_rps), kept=True), kept.rate_rps)
        return replace(kept_plan, notes=(*kept_plan.notes, *kept.notes()))

    def _recorded(self, found: TriedRate, kept_rps: float | None) -> Plan:
        """Return the plan with a run at the rate that is kept, or at the planned one if none is, in its record."""
        plan, at_rps = self._plan, self._planned_rps
        if self._is_value and kept_rps is not None:
            at_rps = kept_rps
        record = replace(Verified.of(plan), verification=self._verification(found, at_rps, kept_rps))
        if not self._is_value or kept_rps == self._planned_rps:
            return record.on(plan)
        record = replace(record, model_value=plan.result.value)
        return record.on(restated(plan, self._problem, utilisation_at(kept_rps or 0.0, plan.served_rate())))

    def _planned(self) -> TriedRate:
        """Return the plan's behaviour at its planned rate. Raises `StoppedError`."""
        found = self._at(self._planned_rps, self._ordinary) if _has_workers(self._plan) else None
        if found is not None and (found.close or not found.kept) and self._budget.work_limit > ITERATIONS:
            _compile_dispatcher(self._compiling)
            self._settings, found = replace(DISPATCHED, router=self._settings.router), None
        if found is None:
            found = self._at(self._planned_rps, self._ordinary)
            if found.kept and found.close:  # other traffic may well miss the limits
                other = self._at(self._planned_rps, self._longer, other=True)
                found = found if other.kept else other
        return found

    def _higher(self, found: TriedRate) -> tuple[TriedRate, float]:
        """Return the run at the highest rate tried, up to the plan's bound, that is kept for sure, and this rate.

        If none is, return the one ``found`` at the planned rate. Higher rates get other traffic than that one.
        """
        most_rps = min(self._plan.result.bound, self._most_rps)
        may, planned_rps = _may_keep_more(self._plan, found) and not self._too_short, self._planned_rps
        higher = [factor * planned_rps for factor in HIGHER if factor * planned_rps <= most_rps]
        if not self._are_cheap() or not higher:  # one rate is all that there is time, or room, for
            higher = [most_rps] if planned_rps * WORTH_TRYING <= most_rps < HIGHER[-1] * planned_rps else higher[-1:]
        lengths = (self._long, self._longer) if self._are_cheap() else (self._ordinary,)
        with suppress(StoppedError):
            for rate_rps in higher if may else ():
                if self._may_promise(rate_rps):
                    tried = self._at(rate_rps, *lengths, other=True)
                    if tried.sure and hardly_grows(tried.summary):
                        return tried, rate_rps
        return found, planned_rps

    def _may_promise(self, rate_rps: float) -> bool:
        """Return whether each replica's own TTFT, as a plan of this rate states it, keeps the limit."""
        limit_s = self._plan.objective.ttft_limit_s
        if limit_s is None or not self._is_value:
            return True
        stated = restated(self._plan, self._problem, rate_rps / self._plan.served_rate())
        return all(one.ttft_s <= limit_s for one in stated.replicas if one.role is not Role.DECODE)

    def _longest_at(self, rate_rps: float) -> TriedRate:
        """Return the longest run at a rate that was simulated before, all that is needed if no more can be."""
        try:
            return self._at(rate_rps, self._longer)
        except StoppedError:
            return self._at(rate_rps, self._ordinary)

    def _verification(self, found: TriedRate, rate_rps: float, kept_rps: float | None) -> Verification:
        summary, seconds, missed = found.summary, found.measured.seconds, found.measured.missed
        return Verification(
            rate_rps=rate_rps,
            num_requests=found.num_requests,
            kept=found.kept,
            steady=summary.steady,
            ttft_p95_s=summary.ttft_p95_s.value,
            tpot_mean_s=summary.mean_tpot_s.value,
            attainment=summary.attainment,
            kept_rps=kept_rps,
            ttft_s=seconds.get(Latency.TTFT),
            tpot_s=seconds.get(Latency.TPOT),
            ttft_missed=missed.get(Latency.TTFT),
            tpot_missed=missed.get(Latency.TPOT),
            share=self._part.share if self._part.share < 1.0 else None,
            too_short=self._too_short or None,
            dispatched=self._settings.dispatch or None,
            router=None if self._settings.router == NGINX else self._settings.router,
        )

    def _are_cheap(self) -> bool:
        """Return whether longer runs take a small part of the budget."""
        return bool(self._longer * self._each <= PART / 2 * self._budget.work_limit)

    def _are_sure(self, rate_rps: float) -> Iterator[bool]:
        """Yield whether the limits are kept with the usual traffic, and with other traffic, too.

        A search for the highest rate finds rates that are kept by luck.
        """
        return (self._at(rate_rps, self._longer, other=other).sure for other in (False, True))

    def _lower(self, found: TriedRate) -> KeptRate | None:
        """Search for the highest rate below the planned one, at which ``found`` misses limits, that keeps them.

        Raises `StoppedError` before any run kept them.
        """

        def seems_sure(rate_rps: float) -> bool | None:
            if rate_rps > self._most_rps:
                return False
            found = self._at(rate_rps, self._ordinary)
            return found.sure or (None if found.kept else False)

        def excess(rate_rps: float) -> float | None:
            if rate_rps > self._most_rps:
                return None
            tried = self._at(rate_rps, self._ordinary)
            most = max((one.high / one.limit for one in tried.measured.limited if one.limit), default=math.inf) - 1.0
            is_known = tried.summary.steady is not False and math.isfinite(most) and tried.sure == (most <= 0.0)
            return most if is_known else None

        search = LowerRates(seems_sure, self._are_sure, excess)
        try:
            guess_rps = math.inf if self._are_cheap() else DEAR * self._planned_rps
            rate_rps = search.highest(self._planned_rps, 0.0, guess_rps)
        except StoppedError:
            if search.likely_rps is None:
                raise
            tried = self._longest_at(search.likely_rps)
            return KeptRate(search.likely_rps, tried.num_requests, is_confirmed=False)
        return None if rate_rps is None else KeptRate(rate_rps, self._longer, is_confirmed=True)


def _compile_dispatcher(on_start: Callable[[], None]) -> None:
    """Compile what dispatches head groups, if that has not been done on this machine."""
    from hetis.planner.use_cases.dispatch.answers import is_compiled
    from hetis.solver.dispatch.dispatcher import compile_dispatch

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
    return plan.objective.demand_rps is None and hardly_grows(at_plan.summary) and not _has_workers(plan)
