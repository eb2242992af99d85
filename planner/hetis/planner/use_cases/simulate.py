"""Requests of `hetis-plan simulate` as runs of the simulator, with one combined result."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

from hetis.formats.errors import DocumentError, Problem, did_you_mean
from hetis.formats.traces import ENDINGS, PrefixHitRate, Trace, read_trace
from hetis.formats.workload import load_workload
from hetis.planner.use_cases.grouping import group_replicas
from hetis.planner.use_cases.judging import LevelVerdict, as_swept, latencies_of, swept_limits, verdict_of
from hetis.planner.use_cases.service_level import DEFAULT, ServiceLevel, limits_of
from hetis.simulator.arrivals import Arrivals, Load
from hetis.simulator.metrics import Metrics, Prediction, Summary, prediction_of, summarise
from hetis.simulator.running import MAX_ROUNDS, RateSweep, Report, SimulationJob, SimulationRunner, runner, sweep
from hetis.simulator.simulate import batch_with_room, check_simulable
from hetis.simulator.values import Fault, Run, Settings
from hetis.solver.check.fleet import Fleet, ReplicaShape, replica_shape
from hetis.solver.check.rederive import Rederivation
from hetis.solver.errors import InvalidProblemError
from hetis.solver.plan import KvRoute, Objective, Plan, ReplicaPlan, Role
from hetis.solver.problem import NOTHING_SET, EngineSettings, PlacementProblem
from hetis.solver.workload import Workload

MIN_REQUESTS = 2000
TURNS = 20  # how many times, by default, a run replaces all the requests that a plan holds at once
DOUBLINGS = 6  # most doublings of the number of requests until the intervals are narrow
SAMPLES = 200  # per device and run
MOST_SEATS = 1024  # of a micro-batch: more is beyond what engines are set to
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
    # Relative width of every interval up to which runs are lengthened; None: they are not
    precision: float | None = None
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

    question: Question  # the question, with the final number of requests
    prediction: Prediction
    # Over all runs; for a sweep, at the highest rate within the limits, or at the lowest one tried if there is none
    summary: Summary
    runs: tuple[Metrics, ...] = ()  # metrics of each run, in the order of the seeds; empty for a sweep
    num_clipped: int  # requests in all runs that were shortened to the model's context
    run: Run | None = None  # the first run, if it was requested
    sweep: RateSweep | None = None
    complete: bool
    precise: bool = True  # whether the intervals are as narrow as requested; True if that was not requested
    verdict: LevelVerdict | None  # None: the fleet was saturated, so that its latencies mean nothing
    verdicts: tuple[LevelVerdict, ...] = ()  # one for each point of the sweep

    @property
    def kept(self) -> bool | None:
        """Return whether the service level was kept; None: that cannot be told."""
        return None if self.verdict is None else self.verdict.kept

    @property
    def precision(self) -> float:
        """Return the widest interval relative to its value, as `Summary.precision` but with those of the limits."""
        limits = () if self.verdict is None else self.verdict.limits
        return max((self.summary.precision(), *(one.estimate.relative for one in limits)))


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
    """Return the default rate in requests/s: the demanded one, or else the planned goodput."""
    return plan.objective.demand_rps or problem.assumptions.planned_utilisation * prediction_of(plan).rate_rps


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
) -> Simulated:
    """Run the simulator as often as the question requires. Once ``is_cancelled``, answer what was run by then.

    ``begins`` is called for every part of a question with several: the rates of a sweep, the doublings of the requests.

    Raises:
        NothingSimulatedError: the simulation was cancelled before any of it was done.
        InvalidProblemError: the plan cannot be simulated.
    """
    plan = with_all_seats(plan, problem)
    with runner(plan, problem, processes=processes, is_cancelled=is_cancelled, report=report) as runs:
        if question.sweeps:
            return _swept(runs, question, begins)
        found = _run(runs, question, begins)
        for number in range(DOUBLINGS if question.precision is not None else 0):
            if is_cancelled() or found.precise:
                break
            begins(f"with twice the requests, {number + 1} of {DOUBLINGS} times at most")
            question = replace(question, num_requests=2 * question.num_requests)
            found = _run(runs, question, begins)
        return found


def _run(runs: SimulationRunner, question: Question, begins: Callable[[str], None]) -> Simulated:
    answers = _answers(runs, question, [question.load], begins)
    if not any(one.metrics.counts.arrived for one in answers):
        raise NothingSimulatedError
    metrics = tuple(one.metrics for one in answers)
    summary = summarise(metrics)
    saturated = question.load.arrivals is Arrivals.SATURATED
    found = Simulated(
        question=question,
        prediction=prediction_of(runs.plan),
        summary=summary,
        runs=metrics,
        num_clipped=sum(one.num_clipped for one in answers),
        run=answers[0].run,
        complete=not runs.is_cancelled(),
        verdict=None if saturated else _verdict(question, summary, answers),
    )
    return replace(found, precise=question.precision is None or found.precision <= question.precision)


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
    """Return a job for every seed. Only the first run can be shown, so only that one records a trace."""
    return [
        SimulationJob(
            load=load,
            num_requests=question.num_requests,
            seed=seed,
            settings=replace(question.settings, seed=seed, trace=question.settings.trace and number == 0),
            limits=question.limits,
            keep_run=keep_runs or (question.keep_run and number == 0),
        )
        for number, seed in enumerate(question.seeds)
    ]


# --- a plan whose engines are started with settings other than the planned ones


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanAtSettings:
    """The plan and the problem at given settings, and sentences about what these change in the plan."""

    plan: Plan
    problem: PlacementProblem
    changes: tuple[str, ...]


def at_settings(plan: Plan, problem: PlacementProblem, settings: EngineSettings) -> PlanAtSettings:
    """Return the plan with its engines started with these settings, as far as they are specified.

    GPUs, layers and head groups stay. Every replica gets the specified seats, chunk and KV blocks, and the rate,
    latencies and KV room that the plan checker derives for them.

    A replica with M micro-batches in flight of which only N may have a request each has N of them in flight. Copies
    that share experts are engines of their own, so the settings apply to each. Seats that micro-batches cannot share
    evenly stay empty, since the simulated micro-batches are equally large. If KV has no room for all seats, the rate is
    that of the highest number of requests for which it has room. Routes of KV carry no more than before. Without
    settings nothing changes.

    Raises:
        InvalidProblemError: there are several chunk sizes, whereas an engine has one; KV has no room for a mean
            request; or the plan cannot be simulated.
    """
    if not settings:
        return PlanAtSettings(plan=plan, problem=problem, changes=())
    if len(settings.chunk_tokens) > 1:
        raise InvalidProblemError(f"chunk_tokens has {len(settings.chunk_tokens)} sizes, an engine accepts only one")
    before = problem.family.engine_settings
    merged = replace(before, **{name: value for name, value in asdict(settings).items() if value})
    at = replace(problem, family=replace(problem.family, engine_settings=merged))
    fleet = Fleet.of(problem.cluster)
    for number, one in enumerate(plan.replicas):
        check_simulable(one, number, problem, fleet)
    old, new = Rederivation(problem), Rederivation(at)
    replicas, changes = list(plan.replicas), dict[str, None]()
    for group in group_replicas(plan.replicas):
        first = plan.replicas[group.numbers[0]]
        shape = replica_shape(first, problem, fleet)
        claimed = _claimed(first, shape, old)
        for number in group.numbers:
            replicas[number] = _at(replicas[number], shape, settings, new, claimed)
        _check_room(replicas[group.numbers[0]], group.numbers[0], at)
        changes |= dict.fromkeys(_changes(first, replicas[group.numbers[0]], settings))
    routes = tuple(_route(route, plan, replicas) for route in plan.kv_routes)
    set_plan = replace(plan, replicas=tuple(replicas), kv_routes=routes)
    return PlanAtSettings(plan=set_plan, problem=at, changes=tuple(changes))


def _claimed(one: ReplicaPlan, shape: ReplicaShape, derivation: Rederivation) -> float:
    """Return the share of a replica's derived rate that the plan promises: the search may have charged slower links."""
    return min(1.0, one.rate * derivation.of(shape).t_s)


def _at(
    one: ReplicaPlan, shape: ReplicaShape, settings: EngineSettings, derivation: Rederivation, claimed: float
) -> ReplicaPlan:
    """Return a replica at the settings; ``claimed`` is the share of its derived rate that the plan promises."""
    most, b, m = settings.max_num_seqs, one.micro_batch, one.in_flight
    if most is not None and one.expert_parallel:
        b = most if b else 0
    elif most is not None:
        m = min(m, most)
        b = most // m if b else 0
    chunk = settings.chunk_tokens[0] if settings.chunk_tokens and one.chunk_tokens else one.chunk_tokens
    shape = replace(shape, micro_batch=b, in_flight=m, chunk_tokens=chunk)
    held = batch_with_room(shape, derivation) if b else 0
    derived = derivation.of(replace(shape, micro_batch=held))
    t_s = derived.t_s / claimed
    return replace(
        one,
        micro_batch=b,
        in_flight=m,
        chunk_tokens=chunk,
        rate=1.0 / t_s,
        ttft_s=derived.ttft_s(t_s),
        tpot_s=t_s * derived.tpot_per_t if derived.tpot_per_t else 0.0,
        kv_tokens=int(derivation.of(shape).kv_tokens),
        max_num_seqs=one.max_num_seqs if most is None else 0,
    )


def with_all_seats(plan: Plan, problem: PlacementProblem) -> Plan:
    """Return the plan as its engines run it, with micro-batches of as many requests as each may run at once.

    Rates and latencies are those of the cost model at these sizes.
    """
    if not any(one.max_num_seqs for one in plan.replicas):
        return plan
    fleet, derivation, replicas = Fleet.of(problem.cluster), Rederivation(problem), list(plan.replicas)
    for number, one in enumerate(plan.replicas):
        if one.max_num_seqs:
            shape, most = replica_shape(one, problem, fleet), one.seats // one.attention_dp
            claimed = _claimed(one, shape, derivation)
            replicas[number] = _at(one, shape, EngineSettings(max_num_seqs=most), derivation, claimed)
    return replace(plan, replicas=tuple(replicas))


def with_more_seats(plan: Plan, problem: PlacementProblem, factor: float) -> Plan:
    """Return the plan with engines that may run ``factor`` times the planned requests at once, as KV has room.

    Replicas that only prefill, or that have attention workers, are left as they are, and so are all if the engines'
    number of requests is given.
    """
    if problem.family.engine_settings.max_num_seqs is not None:
        return plan
    fleet, derivation, replicas = Fleet.of(problem.cluster), Rederivation(problem), list(plan.replicas)
    for number, one in enumerate(plan.replicas):
        if one.role is Role.PREFILL or one.attention_workers:
            continue
        most = int(max(one.micro_batch + 1, min(factor * one.micro_batch, MOST_SEATS)))
        size = batch_with_room(replace(replica_shape(one, problem, fleet), micro_batch=most), derivation)
        if size > one.micro_batch:
            replicas[number] = replace(one, max_num_seqs=size * one.in_flight)
    return replace(plan, replicas=tuple(replicas))


def _check_room(one: ReplicaPlan, number: int, problem: PlacementProblem) -> None:
    moments = problem.moments()
    tokens = moments.mean_prompt + moments.mean_output
    room = one.kv_tokens / min(stage.copies for stage in one.stages)  # a request is in one copy of each stage
    if one.micro_batch and room < problem.model.cached_tokens(tokens):
        raise InvalidProblemError(
            f"replica {number}: KV has room for {room:.0f} tokens, not for a single mean request of {tokens:.0f} tokens"
        )


def _route(route: KvRoute, plan: Plan, replicas: list[ReplicaPlan]) -> KvRoute:
    """Return a route with as much of its rate as both of its replicas still provide."""
    left = (replicas[number].rate / plan.replicas[number].rate for number in (route.prefill, route.decode))
    return replace(route, rate=route.rate * min(1.0, *left))


def _changes(old: ReplicaPlan, new: ReplicaPlan, settings: EngineSettings) -> list[str]:
    """Return the differences between a planned replica and the same one at the settings, in a few words each."""
    found, role = [], "" if old.role is Role.UNIFIED else f" of {old.role} replicas"
    if settings.max_num_seqs is not None:
        seats = [one.planned_seats // one.attention_dp for one in (old, new)]
        beside = "" if seats[1] == settings.max_num_seqs or not new.micro_batch else f" of {settings.max_num_seqs}"
        found.append(f"{seats[1]}{beside} requests at once{role} (planned: {seats[0]})")
    if settings.chunk_tokens and old.chunk_tokens:
        found.append(f"chunks of {new.chunk_tokens} tokens{role} (planned: {old.chunk_tokens})")
    if settings.kv_blocks is not None:
        found.append(f"room for KV of {new.kv_tokens} tokens{role} (planned: {old.kv_tokens})")
    return found
