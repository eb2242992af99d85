"""Runs of a plan, several of them in parallel processes, and the highest rate that it serves within its limits.

If stopped early, these return their results so far.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event

from hetis.simulator.arrivals import (
    LEAST_RPS,
    MOST_RPS,
    Arrivals,
    KeepGoing,
    Load,
    Saturation,
    draw_traffic,
    requests_of,
)
from hetis.simulator.metrics import Metrics, Summary, measure
from hetis.simulator.simulate import Timings, simulate
from hetis.simulator.values import Run, Settings
from hetis.solver.plan import Objective, Plan
from hetis.solver.problem import PlacementProblem

_LOOK_EVERY = 64  # requests between two checks for a stop
_POLL_S = 0.1

Report = Callable[[int, int], None]
"""Called with the number of requests that have arrived so far, over all runs, and the total that will arrive."""


def silent(_given: int, _total: int) -> None:
    """Ignore the progress."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationJob:
    """One run of ``num_requests`` of a load, drawn by ``seed``; with ``keep_run`` the answer includes all requests."""

    load: Load
    num_requests: int
    seed: int
    settings: Settings
    limits: Objective
    keep_run: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RunAnswer:
    """The result of a job. ``num_clipped`` of its requests were shortened to the model's context."""

    metrics: Metrics
    num_clipped: int
    run: Run | None = None


def run_job(
    plan: Plan, problem: PlacementProblem, job: SimulationJob, keep_going: KeepGoing, timings: Timings | None = None
) -> RunAnswer:
    """Simulate one job in this process; once ``keep_going`` returns False, traffic ends and earlier requests finish."""
    traffic = draw_traffic(job.load, job.num_requests, seed=job.seed)
    saturated = job.load.arrivals is Arrivals.SATURATED
    requests = (Saturation if saturated else requests_of)(traffic, keep_going=keep_going)
    run = simulate(plan, problem, requests, job.settings, timings)
    metrics = measure(run, job.limits, saturated=saturated)
    return RunAnswer(metrics=metrics, num_clipped=traffic.num_clipped, run=run if job.keep_run else None)


def never() -> bool:
    """Return that a simulation is not cancelled."""
    return False


@dataclass(slots=True, kw_only=True)
class SimulationRunner:
    """Runs jobs of one plan. Created by `runner`, which also ends its processes.

    All traffic stops once ``is_cancelled``: jobs already started return their results so far, others nothing.
    """

    plan: Plan
    problem: PlacementProblem
    processes: int
    is_cancelled: Callable[[], bool]
    report: Report
    timings: Timings | None = None
    _pool: ProcessPoolExecutor | None = None
    _given: Synchronized[int] | None = None
    _stop: Event | None = None
    _total: int = field(default=0)
    _done_before: int = field(default=0)

    def run(self, jobs: Sequence[SimulationJob]) -> list[RunAnswer]:
        """Return answers in the order of the jobs; fewer of them once ``is_cancelled``."""
        self._total += sum(job.num_requests for job in jobs)
        if self._pool is None and (len(jobs) == 1 or self.processes == 1):
            return list(self._here(jobs))
        return self._apart(jobs)

    def close(self) -> None:
        """End the processes, which are idle by then unless something went wrong."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _here(self, jobs: Sequence[SimulationJob]) -> Iterator[RunAnswer]:
        for job in jobs:
            if self.is_cancelled():
                return

            def keep_going(given: int) -> bool:
                if given % _LOOK_EVERY == 0:
                    self.report(self._done_before + given, self._total)
                return not self.is_cancelled()

            yield run_job(self.plan, self.problem, job, keep_going, self.timings)
            self._done_before += job.num_requests

    def _apart(self, jobs: Sequence[SimulationJob]) -> list[RunAnswer]:
        pool = self._started()
        futures: list[Future[RunAnswer]] = [pool.submit(_run_here, job) for job in jobs]
        waiting: set[Future[RunAnswer]] = set(futures)
        while waiting:
            _, waiting = wait(waiting, timeout=_POLL_S, return_when=FIRST_COMPLETED)
            if self.is_cancelled() and self._stop is not None and not self._stop.is_set():
                self._stop.set()
                for future in futures:
                    future.cancel()
            if self._given is not None:
                self.report(self._done_before + self._given.value, self._total)
        answers = [future.result() for future in futures if not future.cancelled()]
        # The pool submits a job before a process is free for it: such a job has had no traffic when everything is
        # stopped.
        return [one for one in answers if one.metrics.counts.arrived or not self.is_cancelled()]

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")  # a fork would copy the threads of the solvers' libraries
            self._given, self._stop = context.Value("q", 0), context.Event()
            self._pool = ProcessPoolExecutor(
                max_workers=self.processes,
                mp_context=context,
                initializer=_begin,
                initargs=(self.plan, self.problem, self._given, self._stop),
            )
        return self._pool


@contextmanager
def runner(
    plan: Plan, problem: PlacementProblem, *, processes: int = 1, is_cancelled: Callable[[], bool] = never,
    report: Report = silent, timings: Timings | None = None,
) -> Iterator[SimulationRunner]:  # fmt: skip
    """Yield a `SimulationRunner` for jobs of a plan.

    Args:
        processes: number of parallel processes; 0: one per core. A single job runs in this process. More than one
            process needs a main module that can be imported again (``if __name__ == "__main__"``).
        is_cancelled: called often; whether to stop all traffic.
        report: called a few times a second, from the thread that runs jobs.
        timings: of other runs of the problem in this process, to which these add.
    """
    made = SimulationRunner(
        plan=plan,
        problem=problem,
        processes=processes or os.cpu_count() or 1,
        is_cancelled=is_cancelled,
        report=report,
        timings=timings,
    )
    try:
        yield made
    finally:
        made.close()


# Arguments with which this worker process was started; empty in the process that submits jobs.
_this: list[tuple[Plan, PlacementProblem, Synchronized[int], Event]] = []


def _begin(plan: Plan, problem: PlacementProblem, given: Synchronized[int], stop: Event) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the submitting process sets `stop`
    _this.append((plan, problem, given, stop))


def _run_here(job: SimulationJob) -> RunAnswer:
    ((plan, problem, given_so_far, stop),) = _this
    stopped = False

    def keep_going(given: int) -> bool:
        nonlocal stopped
        if given % _LOOK_EVERY == 0:
            with given_so_far.get_lock():
                given_so_far.value += _LOOK_EVERY if given else 0
            stopped = stop.is_set()
        return not stopped

    return run_job(plan, problem, job, keep_going)


MAX_ROUNDS = 24
STEP = 1.15  # factor of the first step up; each further step is twice as far, in powers of this
MOST_STEPS = 2047  # powers of the factor, at most: a rate stays a finite number
IDLE = 0.01  # fraction of the starting rate: if even this is too high, no rate is within the limits


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A rate that was tried. ``sure``: all 95% intervals are on one side of their limits."""

    rate_rps: float
    summary: Summary
    within: bool
    sure: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RateSweep:
    """All rates that were tried, from the lowest."""

    points: tuple[Point, ...]
    goodput_rps: float  # highest rate below which every tried rate is within the limits; 0: there is none
    beyond_rps: float | None  # lowest rate that exceeds a limit; None: none was found, or the search was stopped


def sweep(
    evaluate: Callable[[Sequence[float]], Sequence[Summary]], limits: Objective, *, start_rps: float,
    tolerance: float = 0.02, at_once: int = 1,
) -> RateSweep:  # fmt: skip
    """Bracket the highest rate within the limits by increasing steps, then bisect the bracket.

    If the first rate is already too high, an almost idle fleet is tried next: limits that it misses are missed at every
    rate.

    Seeds draw the same lengths and gaps at every rate, only scaled, so that neighbouring rates differ by little except
    the load: a rate below one within the limits is rarely outside them.

    Args:
        evaluate: results at the given rates, all in one call; fewer answers than rates end the search.
        start_rps: the first guess, such as the planned goodput.
        tolerance: width of the final bracket over its upper end.
        at_once: number of rates evaluated together.
    """
    tried: dict[float, Point] = {}
    low, high = 0.0, None
    idle_rps = max(IDLE * start_rps, LEAST_RPS)
    for _ in range(MAX_ROUNDS):
        rates = _next_rates(low, high, start_rps=start_rps, idle_rps=idle_rps, tried=len(tried), at_once=at_once)
        answers = evaluate(rates)
        for rate, summary in zip(rates, answers, strict=False):
            tried[rate] = _judged(rate, summary, limits)
        low, high = _bracket(tried)
        done = low >= MOST_RPS if high is None else high - low <= tolerance * high or high <= idle_rps
        if done or len(answers) < len(rates):
            break
    return RateSweep(points=tuple(tried[rate] for rate in sorted(tried)), goodput_rps=low, beyond_rps=high)


def judged_rates(summaries: Mapping[float, Summary], limits: Objective) -> RateSweep:
    """Return the same result for rates that were chosen beforehand, given the summary at each."""
    tried = {rate: _judged(rate, summary, limits) for rate, summary in summaries.items()}
    low, high = _bracket(tried)
    return RateSweep(points=tuple(tried[rate] for rate in sorted(tried)), goodput_rps=low, beyond_rps=high)


def _next_rates(
    low: float, high: float | None, *, start_rps: float, idle_rps: float, tried: int, at_once: int
) -> list[float]:
    if high is None:
        # Capped where a float would overflow, and at the highest rate of a load.
        steps = (min(2**n - 1, MOST_STEPS) for n in range(tried, tried + at_once))
        return [min(start_rps * STEP**number, MOST_RPS) for number in steps]
    if low == 0:
        return [idle_rps, *(high * part / at_once for part in range(1, at_once))]
    return [low + (high - low) * part / (at_once + 1) for part in range(1, at_once + 1)]


def _bracket(tried: dict[float, Point]) -> tuple[float, float | None]:
    """Return the highest rate with no rate below it outside the limits, and the lowest rate outside."""
    low = 0.0
    for rate in sorted(tried):
        if not tried[rate].within:
            return low, rate
        low = rate
    return low, None


def _judged(rate_rps: float, summary: Summary, limits: Objective) -> Point:
    within = summary.within(limits)
    pairs = ((summary.ttft_p95_s, limits.ttft_limit_s), (summary.mean_tpot_s, limits.tpot_limit_s))
    known = [(estimate, limit) for estimate, limit in pairs if limit is not None]
    below = all(estimate.is_below(limit) for estimate, limit in known)
    above = any(estimate.is_above(limit) for estimate, limit in known)
    sure = summary.steady is True and below if within else summary.steady is False or above
    return Point(rate_rps=rate_rps, summary=summary, within=within, sure=sure)
