"""Requests of `hetis-plan simulate` as runs of the simulator, with one combined result."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from hetis.formats.errors import DocumentError, Problem, did_you_mean
from hetis.formats.traces import ENDINGS, PrefixHitRate, Trace, read_trace
from hetis.formats.workload import load_workload
from hetis.planner.use_cases.service_level import DEFAULT, ServiceLevel, limits_of
from hetis.planner.use_cases.simulation.engine_settings import with_all_seats
from hetis.planner.use_cases.simulation.judging import LevelVerdict, as_swept, latencies_of, swept_limits, verdict_of
from hetis.simulator.arrivals import Arrivals, Load
from hetis.simulator.metrics import Metrics, Prediction, Summary, prediction_of, summarise
from hetis.simulator.running import MAX_ROUNDS, RateSweep, Report, SimulationJob, SimulationRunner, runner, sweep
from hetis.simulator.simulate import Timings
from hetis.simulator.values import Fault, Run, Settings
from hetis.solver.engine_rules import NOTHING_SET, EngineSettings
from hetis.solver.errors import InvalidProblemError
from hetis.solver.plan import PLANNED_UTILISATION, Objective, Plan
from hetis.solver.problem import PlacementProblem
from hetis.solver.workload import Workload

MIN_REQUESTS = 2000
TURNS = 20  # how many times, by default, a run replaces all the requests that a plan holds at once
SAMPLES = 200  # per device and run
AGREES = 0.1  # tolerated difference of the ratio simulated / planned from 1
MOST_FOR_A_SHARE = 40_000  # most requests, by default, that a run has only because of the share it has to measure
WHOLE_AT_ONCE = 2_000_000  # requests of whole runs that are in memory at once, about 80 bytes each


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """The simulation to run."""

    load: Load  # the traffic; a sweep ignores its rate and tries rates of its own
    num_requests: int  # requests per run
    seeds: tuple[int, ...]  # one per run, replacing the seed in the settings
    settings: Settings
    limits: Objective
    service_level: ServiceLevel = DEFAULT  # what must keep the limits, see `verdicts.level_to_hold`
    sweeps: bool = False  # whether to search for the highest rate within the limits, to a relative ``tolerance``
    tolerance: float = 0.02
    keep_run: bool = False  # whether the answer contains the whole first run
    # Settings with which engines are started instead of the plan's, see `at_settings`
    engine_settings: EngineSettings = NOTHING_SET
    changes: tuple[str, ...] = ()  # the changes that these settings make to the plan, in a few words each

    def __post_init__(self) -> None:
        if self.num_requests < 1 or not self.seeds:
            raise InvalidProblemError(
                f"{self.num_requests} requests in {len(self.seeds)} runs: at least one of each is needed"
            )
        if self.service_level.attainment is not None and not limits_of(self.limits):
            raise InvalidProblemError("a share of requests is to keep all limits, but neither TTFT nor TPOT has one")


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """The answer to a question, with the plan's prediction."""

    question: Question
    prediction: Prediction
    # Over all runs; for a sweep, at the highest rate within the limits, or at the lowest one tried if there is none
    summary: Summary
    runs: tuple[Metrics, ...] = ()  # metrics of each run, in the order of the seeds; empty for a sweep
    num_clipped: int  # requests in all runs that were shortened to the model's context
    run: Run | None = None  # the first run, if it was requested
    sweep: RateSweep | None = None
    complete: bool
    verdict: LevelVerdict | None  # None: the fleet was saturated, so that its latencies mean nothing
    verdicts: tuple[LevelVerdict, ...] = ()  # one for each point of the sweep

    @property
    def kept(self) -> bool | None:
        """Return whether the service level was kept; None: that cannot be told."""
        return None if self.verdict is None else self.verdict.kept


class NothingSimulatedError(Exception):
    """The simulation was cancelled before any of it was done."""


def load_lengths(ref: str, prefix_hit_rate: PrefixHitRate | None = None) -> Trace | Workload:
    """Return the requests of a trace file, or the distribution of anything else that `load_workload` accepts.

    ``prefix_hit_rate`` replaces the source's own. Hits counted in a trace are those of each request.

    Raises:
        DocumentError: the name is unknown, or the file has problems (contains all of them).
    """
    if ref.endswith(ENDINGS):
        return read_trace(ref, prefix_hit_rate=prefix_hit_rate or 0.0)
    return load_workload(ref, prefix_hit_rate=prefix_hit_rate)


def default_rate(plan: Plan, problem: PlacementProblem) -> float:
    """Return the default rate in requests/s: the demanded one, or else the planned goodput if it is not 0."""
    return plan.objective.demand_rps or (plan.result.utilisation or PLANNED_UTILISATION) * plan.served_rate()


def default_requests(plan: Plan, load: Load, level: ServiceLevel = DEFAULT) -> int:
    """Return all requests of a trace replayed as recorded, or else enough that warm-up and chance matter little."""
    if load.arrivals is Arrivals.RECORDED and isinstance(load.lengths, Trace):
        return len(load.lengths.arrival_s)
    return max(MIN_REQUESTS, TURNS * seats_of(plan), level.requests(MOST_FOR_A_SHARE))


def seats_of(plan: Plan) -> int:
    """Return how many requests a plan holds at once."""
    return sum(replica.seats for replica in plan.replicas)


def sample_spacing_s(plan: Plan, load: Load, num_requests: int, faults: Collection[Fault] = ()) -> float | None:
    """Return the spacing for about `SAMPLES` samples over a run, or None if the run's length cannot be predicted.

    A run lasts until the last of its ``faults``, even if no request is left by then, and at least as long as a mean
    request, which in a run of few requests is long compared to the time in which a fleet serves as many.
    """
    lengths, predicted = load.lengths, prediction_of(plan)
    recorded = lengths.rate_rps if load.arrivals is Arrivals.RECORDED else None
    served_rps = predicted.rate_rps
    outputs = float(lengths.output_tokens.mean()) if isinstance(lengths, Trace) else lengths.moments().mean_output
    request_s = min(outputs, load.max_position) * predicted.tpot_s
    # However fast requests arrive, they leave no faster than they are served.
    rate_rps = min(load.rate_rps or recorded or served_rps, served_rps)
    last_s = max((fault.at_s for fault in faults), default=0.0)
    return max(num_requests / rate_rps, last_s, request_s) / SAMPLES if rate_rps > 0 else None


def faults_of(events: Iterable[Fault], plan: Plan, problem: PlacementProblem, *, source: str) -> tuple[Fault, ...]:
    """Return the faults of devices that the plan uses.

    Raises:
        DocumentError: devices are not in the cluster or not in the plan; contains all of them, as problems of
            ``source``.
    """
    used = set(plan.devices())
    known = {device.name for device in problem.cluster.devices()}
    problems, faults = [], []
    for event in events:
        device = problem.cluster.device_named(event.device)
        if device not in known:
            near = did_you_mean(event.device, known) if len(known) <= 10_000 else ""
            problems.append(Problem(file=source, message=f"no device {event.device[:80]!r} in the cluster{near}"))
        elif device not in used:
            message = f"{device} is not used by the plan: its failure would have no effect"
            problems.append(Problem(file=source, message=message))
        else:
            faults.append(replace(event, device=device))
    if not problems:
        problems += (Problem(file=source, message=message) for message in _joins_without_failure(faults))
    if problems:
        raise DocumentError(problems)
    return tuple(faults)


def _joins_without_failure(faults: Iterable[Fault]) -> Iterator[str]:
    down = set[str]()
    for fault in sorted(faults, key=lambda one: one.at_s):
        if not fault.joins:
            down.add(fault.device)
        elif fault.device in down:
            down.remove(fault.device)
        else:
            yield f"{fault.device} joins at {fault.at_s:g} s, it has not failed before"


def answer(
    plan: Plan,
    problem: PlacementProblem,
    question: Question,
    *,
    processes: int,
    is_cancelled: Callable[[], bool],
    report: Report,
    begins: Callable[[str], None] = lambda _part: None,
    timings: Timings | None = None,
) -> Simulated:
    """Run the simulator as often as the question requires. Once ``is_cancelled``, answer what was run by then.

    ``begins`` is called for every part of a question with several: the rates of a sweep. ``timings`` are those of other
    runs of the problem, to which these add.

    Raises:
        NothingSimulatedError: the simulation was cancelled before any of it was done.
        InvalidProblemError: the plan cannot be simulated.
    """
    plan = with_all_seats(plan, problem)
    with runner(plan, problem, processes=processes, is_cancelled=is_cancelled, report=report, timings=timings) as runs:
        return (_swept if question.sweeps else _run)(runs, question, begins)


def _run(runs: SimulationRunner, question: Question, begins: Callable[[str], None]) -> Simulated:
    answers = _answers(runs, question, [question.load], begins)
    if not any(one.metrics.counts.arrived for one in answers):
        raise NothingSimulatedError
    metrics = tuple(one.metrics for one in answers)
    summary = summarise(metrics)
    saturated = question.load.arrivals is Arrivals.SATURATED
    return Simulated(
        question=question,
        prediction=prediction_of(runs.plan),
        summary=summary,
        runs=metrics,
        num_clipped=sum(one.num_clipped for one in answers),
        run=answers[0].run,
        complete=not runs.is_cancelled(),
        verdict=None if saturated else _verdict(question, summary, answers),
    )


def _swept(runs: SimulationRunner, question: Question, begins: Callable[[str], None]) -> Simulated:
    clipped: list[int] = []  # clipped requests by load; all rates draw the same requests
    rounds = itertools.count(1)
    summaries: dict[float, Summary] = {}
    verdicts: dict[float, LevelVerdict] = {}

    def evaluate(rates: Sequence[float]) -> list[Summary]:
        tried = ", ".join(f"{rate:.3g}" for rate in rates)
        begins(f"rate {next(rounds)} of {MAX_ROUNDS} at most: {tried} requests/s")
        loads = [replace(question.load, rate_rps=rate) for rate in rates]
        answers = _answers(runs, question, loads, begins)
        if runs.is_cancelled():
            return []  # traffic that was cut short shows nothing about its rate
        each = len(question.seeds)
        clipped.append(sum(one.num_clipped for one in answers[:each]))
        for number, rate in enumerate(rates):
            of_rate = answers[number * each : (number + 1) * each]
            summaries[rate] = summarise([one.metrics for one in of_rate])
            verdicts[rate] = _verdict(question, summaries[rate], of_rate)
        return [as_swept(summaries[rate], verdicts[rate]) for rate in rates]

    found = sweep(
        evaluate,
        swept_limits(question.service_level, question.limits),
        start_rps=default_rate(runs.plan, runs.problem),
        tolerance=question.tolerance,
        at_once=max(1, runs.processes // len(question.seeds)),
    )
    if not found.points:
        raise NothingSimulatedError
    found = replace(found, points=tuple(replace(point, summary=summaries[point.rate_rps]) for point in found.points))
    at = next((point for point in found.points if point.rate_rps == found.goodput_rps), found.points[0])
    return Simulated(
        question=question,
        prediction=prediction_of(runs.plan),
        summary=at.summary,
        num_clipped=clipped[0],
        sweep=found,
        complete=not runs.is_cancelled(),
        verdict=verdicts[at.rate_rps],
        verdicts=tuple(verdicts[point.rate_rps] for point in found.points),
    )


class _Answer(NamedTuple):
    """What is kept of the answer to a job."""

    metrics: Metrics
    num_clipped: int
    run: Run | None  # the whole run, of the first job only
    latencies: Run | None  # what a verdict needs of the run; None at the default level, which needs nothing


def _answers(
    runs: SimulationRunner, question: Question, loads: Sequence[Load], begins: Callable[[str], None]
) -> list[_Answer]:
    """Return the answers for all seeds of each load in turn.

    Whole runs come back from the processes if their requests are judged one by one. No more of them than
    `WHOLE_AT_ONCE` allows are in memory at once, unless every process has only one.
    """
    judged = question.service_level != DEFAULT
    jobs = [job for load in loads for job in _jobs(question, load, keep_runs=judged)]
    most = max(runs.processes, WHOLE_AT_ONCE // question.num_requests) if judged else len(jobs)
    answers = list[_Answer]()
    for first in range(0, len(jobs), most):
        if runs.is_cancelled():
            break
        part = jobs[first : first + most]
        if len(part) < len(jobs):
            begins(f"runs {first + 1} to {first + len(part)} of {len(jobs)}")
        answers += [
            _Answer(
                metrics=one.metrics,
                num_clipped=one.num_clipped,
                run=one.run if question.keep_run and number == first == 0 else None,
                latencies=latencies_of(one.run, one.metrics) if judged and one.run is not None else None,
            )
            for number, one in enumerate(runs.run(part))
        ]
    return answers


def _verdict(question: Question, summary: Summary, answers: Sequence[_Answer]) -> LevelVerdict:
    latencies = [one.latencies for one in answers if one.latencies is not None]
    return verdict_of(question.service_level, question.limits, summary, latencies)


def _jobs(question: Question, load: Load, *, keep_runs: bool) -> list[SimulationJob]:
    """Return a job for every seed. Only the first run can be shown."""
    return [
        SimulationJob(
            load=load,
            num_requests=question.num_requests,
            seed=seed,
            settings=replace(question.settings, seed=seed),
            limits=question.limits,
            keep_run=keep_runs or (question.keep_run and number == 0),
        )
        for number, seed in enumerate(question.seeds)
    ]
