"""`rehearse`: days of traffic against plans that follow it, in virtual time and with the real decisions.

Time passes in steps of some seconds. In each of them requests arrive (Poisson around the curve's rate, lengths drawn
from its mix), are measured as agents measure them, and are tested for drift; a `Follower` is asked at regular times, at
a drift and when a node is lost or back. A change takes the time that its steps state: replicas that start are paid and
do not serve; those that stop are paid until then.

Requests are a fluid. The fleet keeps its limits up to its kept rate, which is that of the model for what serves now
(`decision.kept_rate`) and is held to simulated requests elsewhere (docs/simulator.md). While the rate is above it,
*all* requests count as outside the limits and what is above it queues up, and all are outside until the queue is empty,
which is more than there would be.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np

from hetis.planner.loop.curves import STEP_S, TrafficCurve
from hetis.planner.loop.decision import InForce, Verdict, decide, is_short, is_spare, kept_rate, solve
from hetis.planner.loop.drift import Drift, DriftTest, Expected
from hetis.planner.loop.forecast import BIN_S, KEPT_S, MINUTE_S, MINUTES_KEPT_S, Forecast, History, Window, with_hours
from hetis.planner.loop.settings import LoopSettings
from hetis.planner.use_cases.other_fleets.replan import PosedReplan
from hetis.planner.use_cases.prices import price_of_plan
from hetis.planner.use_cases.saved_plans import PlanAndProblem
from hetis.solver.advice import without_nodes
from hetis.solver.cluster import Cluster, node_of
from hetis.solver.placement.utilisation import GRID
from hetis.solver.plan import Plan
from hetis.solver.replanning.replanner import Replanning
from hetis.solver.replanning.transition import Action, Step
from hetis.solver.traffic import TOKENS, Histogram, TrafficSketch
from hetis.solver.workload import FloatArray, Workload

WINDOW_S = 10.0  # between two looks of the planner at what agents report
RECENT_S = 3600.0  # of whole windows


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeEvent:
    """A node is lost, or is back."""

    at_s: float
    node: str
    joins: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A change of plans, and the steps to it."""

    next: PlanAndProblem
    steps: tuple[Step, ...]
    reason: str


class View(NamedTuple):
    """What a follower sees."""

    now_s: float
    history: Callable[[], History]
    in_force: InForce
    drift: Drift | None
    rate_rps: float  # of the last minute


class Answer(NamedTuple):
    """What a follower does: a change or none, the plan to go on with, and the bands of what it expects (None: any)."""

    change: Change | None
    next: PlanAndProblem
    expected: Expected | None


class Follower(Protocol):
    """A way to follow traffic; it is asked every ``every_s``, at events and, looked at every ``watch_s``, in haste."""

    name: str
    every_s: float
    watch_s: float

    def ask(self, view: View) -> Answer: ...

    def is_hasty(self, view: View) -> bool:
        """Return whether to ask now."""
        return False

    def drift_test(self) -> DriftTest | None:
        """Return a new test of what its last answer expected; None: it has none."""
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeChange:
    """A change that was made."""

    at_s: float
    reason: str
    next: PlanAndProblem
    gpus: int  # of the new plan
    capacity_rps: float  # of the new plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """What came of following a curve.

    Attributes:
        usd: price of all GPU-hours; None: a GPU has no price.
        outside: share of the requests outside the limits.
        alarms: drifts that were reported.
        changes: those that were made.
    """

    name: str
    hours: float
    requests: float
    outside: float
    gpu_hours: float
    usd: float | None
    alarms: int
    changes: tuple[MadeChange, ...]


class RememberingSearch:
    """A search that a rehearsal of many days can afford: it answers no question twice.

    Demands are rounded up to a percent. The least cost of a demand does not fall if the demand rises, so that the bound
    for one is a bound for all higher ones, as saturated rates.
    """

    def __init__(self) -> None:
        self._solved = dict[object, Replanning]()
        self._bounds = dict[object, list[tuple[float, float]]]()  # demand, and bound on every plan for it

    def solve(self, posed: PosedReplan, settings: LoopSettings) -> Replanning:
        demand = posed.problem.objective.demand_rps
        if demand is not None:
            demand = math.exp(math.ceil(math.log(demand) / 0.01) * 0.01)
            objective = replace(posed.problem.objective, demand_rps=demand)
            posed = replace(posed, problem=replace(posed.problem, objective=objective), requested=objective)
        key = posed.running.replicas, demand, settings.costs, _kind(posed)
        if key not in self._solved:
            self._solved[key] = found = solve(posed, settings)
            if demand is not None:
                self._bounds.setdefault(_kind(posed), []).append(
                    (demand / found.plan.result.utilisation, found.plan.result.bound)
                )
        return self._solved[key]

    def least(self, posed: PosedReplan) -> float:
        demand = (posed.problem.objective.demand_rps or 0.0) / GRID[-1]
        return max((bound for lower, bound in self._bounds.get(_kind(posed), ()) if lower <= demand), default=0.0)


def _kind(posed: PosedReplan) -> object:
    """Return what distinguishes questions besides the running plan and the demand."""
    workload, fleet = posed.problem.workload, posed.problem.cluster
    return posed.problem.objective.kind, workload.bins, workload.prefix_hit_rate, fleet.node_groups


class LoopFollower(Follower):
    """The loop itself. With ``truth`` it knows the rates to come, as a perfect forecast would."""

    def __init__(self, settings: LoopSettings, search: RememberingSearch, truth: TrafficCurve | None = None) -> None:
        self.name = "loop" if truth is None else "perfect forecast"
        self.every_s, self.watch_s = settings.every_s, settings.watch_s
        self._settings, self._search, self._truth = settings, search, truth
        self._capacity_rps, self._demand_rps = math.inf, 0.0  # above and below which there is something to ask
        self._changes_s = deque[float](maxlen=settings.changes_per_hour)

    def ask(self, view: View) -> Answer:
        history, truth = view.history(), self._truth
        if truth is None and history.by_minutes() is None:  # the first minutes
            return Answer(None, view.in_force.found, None)
        ahead = None if truth is None else partial(_known, truth, view.now_s)
        found = decide(
            history, view.in_force, self._settings, drift=view.drift, ahead=ahead,
            solve=self._search.solve, least=self._search.least,
        )  # fmt: skip
        self._capacity_rps = math.inf if found.verdict is Verdict.CANNOT else found.capacity_rps
        self._demand_rps = found.demand_rps
        change = None
        if found.verdict is Verdict.CHANGE and found.found is not None:
            if len(self._changes_s) == self._changes_s.maxlen and view.now_s - self._changes_s[0] < 3600:
                return Answer(None, view.in_force.found, found.expected)  # it stays a proposal
            self._changes_s.append(view.now_s)
            change = Change(next=found.next, steps=found.found.transition.steps, reason=found.reason)
        return Answer(change, found.next, found.expected)

    def is_hasty(self, view: View) -> bool:
        if self._truth is not None:
            soon = self._truth.rates_within(view.now_s, view.now_s + self._settings.lead_s)
            return self._capacity_rps < float(soon.max())
        history, settings = view.history(), self._settings
        if is_short(history, self._capacity_rps, settings):
            return True
        return is_spare(history, self._demand_rps, view.in_force.since_s, settings)

    def drift_test(self) -> DriftTest | None:
        return self._settings.drift_test(WINDOW_S)


def _known(truth: TrafficCurve, now_s: float, horizon_s: float, coverage: float) -> Forecast:
    """Return the forecast that a curve comes true."""
    rates = truth.rates_within(now_s, now_s + horizon_s)
    low_rps, high_rps = float(rates.min()), float(rates.max())
    return Forecast(
        expected_rps=high_rps, low_rps=low_rps, high_rps=high_rps, coverage=coverage, rule="the truth", errors=0
    )


def rehearse(
    start: PlanAndProblem, curve: TrafficCurve, follower: Follower, *, events: Sequence[NodeEvent] = (),
    seed: int = 0, progress: Callable[[float], None] = lambda _now_s: None,
) -> Rehearsal:  # fmt: skip
    """Follow a curve from its start on, beginning with a plan that serves already.

    Raises:
        InvalidProblemError: the plan has no re-planning.
    """
    return _Rehearsing(start, curve, follower, events, seed).run(progress)


class _Rehearsing:
    def __init__(
        self, start: PlanAndProblem, curve: TrafficCurve, follower: Follower, events: Sequence[NodeEvent], seed: int
    ) -> None:
        self._curve, self._follower, self._whole = curve, follower, start.problem.cluster
        self._events, self._gone = deque(sorted(events, key=lambda one: one.at_s)), frozenset[str]()
        self._serving, self._log = _Serving(start, curve), _TrafficLog(curve, seed)
        self._in_force = InForce(found=start, fleet=self._whole, since_s=-math.inf)
        self._test: DriftTest | None = None
        self._expected: Expected | None = None
        self._drift: Drift | None = None  # the last one, unless it was of the mix
        self._asked_s, self._looked_s, self._is_due = -math.inf, -math.inf, True
        self._changes, self._alarms = list[MadeChange](), 0

    def run(self, progress: Callable[[float], None]) -> Rehearsal:
        curve, serving = self._curve, self._serving
        requests = outside = gpu_hours = usd = backlog = 0.0
        windows = round((curve.end_s - curve.start_s) / WINDOW_S)
        for number in range(windows):
            now_s = curve.start_s + number * WINDOW_S
            self._take_events(now_s)
            if not serving.is_changing:
                self._ask_if_due(now_s)
            rate = curve.rate_at(now_s)
            kept = serving.kept_rps(curve.mix_at(now_s), self._in_force.fleet, self._gone)
            arrived = rate * WINDOW_S
            requests += arrived
            outside += arrived * (rate > kept * (1 + 1e-9) or backlog > 0)
            backlog = max(0.0, backlog + arrived - kept * WINDOW_S)
            gpus, price = serving.paid(self._in_force.fleet, self._gone)
            gpu_hours += gpus * WINDOW_S / 3600
            usd += price * WINDOW_S / 3600
            sketch = self._log.measure(now_s, in_full=self._expected is not None)
            if self._test is not None and self._expected is not None and not serving.is_changing:
                self._test = self._test.after(now_s + WINDOW_S, sketch, self._expected)
            self._advance(now_s + WINDOW_S)
            progress(now_s)
        return Rehearsal(
            name=self._follower.name, hours=windows * WINDOW_S / 3600, requests=requests,
            outside=outside / requests if requests else 0.0, gpu_hours=gpu_hours,
            usd=None if math.isnan(usd) else usd, alarms=self._alarms, changes=tuple(self._changes),
        )  # fmt: skip

    def _advance(self, now_s: float) -> None:
        if self._serving.advance(now_s):
            self._in_force = replace(self._in_force, found=self._serving.found, since_s=now_s)
            self._is_due = now_s > self._asked_s  # the time of the change may have changed the answer

    def _take_events(self, now_s: float) -> None:
        while self._events and self._events[0].at_s <= now_s - self._curve.start_s:
            event = self._events.popleft()
            self._gone = self._gone - {event.node} if event.joins else self._gone | {event.node}
            fleet = without_nodes(self._whole, self._gone) if self._gone else self._whole
            self._in_force, self._is_due = replace(self._in_force, fleet=fleet), True

    def _ask_if_due(self, now_s: float) -> None:
        drift = None if self._test is None else self._test.drift
        if drift is not None:
            self._drift = None if drift.is_of_mix else drift
        history = partial(self._log.history, now_s)
        view = View(now_s, history, self._in_force, drift or self._drift, self._log.last_minute_rps())
        if not self._is_due and drift is None and now_s - self._asked_s < self._follower.every_s:
            if now_s - max(self._asked_s, self._looked_s) < self._follower.watch_s:
                return
            self._looked_s = now_s
            if not self._follower.is_hasty(view):
                return
        answer = self._follower.ask(view)
        self._asked_s, self._is_due = now_s, False
        self._alarms += drift is not None
        self._expected = answer.expected
        if self._test is None or drift is not None:
            self._test = self._follower.drift_test()
        if answer.change is None:
            self._in_force = replace(self._in_force, found=answer.next)
            return
        self._serving.begin(answer.change, now_s)
        following = answer.change.next
        made = MadeChange(
            at_s=now_s, reason=answer.change.reason, next=following, gpus=len(following.plan.devices()),
            capacity_rps=kept_rate(following.plan, following.problem),
        )  # fmt: skip
        self._changes.append(made)
        self._advance(now_s)


class _Serving:
    """What serves: a plan, or two during a change."""

    def __init__(self, start: PlanAndProblem, curve: TrafficCurve) -> None:
        self.found, self._mixes = start, tuple(workload for _, workload in curve.mixes)
        self._change: Change | None = None
        self._left = deque[Step]()
        self._until_s = math.inf
        self._olds = frozenset(range(len(start.plan.replicas)))
        self._news = self._starting = frozenset[int]()
        self._rates, self._paid = dict[object, float](), dict[object, tuple[int, float]]()
        self._phase = 0  # number of the present combination of plans and replicas

    @property
    def is_changing(self) -> bool:
        return self._change is not None

    def begin(self, change: Change, now_s: float) -> None:
        self._change, self._left, self._until_s = change, deque(change.steps), now_s
        self._phase += 1

    def advance(self, now_s: float) -> bool:
        """Take the steps that are due; return whether a change has just been completed."""
        if self._change is None:
            return False
        while now_s >= self._until_s - 1e-6:
            self._phase += 1
            self._news, self._starting = self._news | self._starting, frozenset()
            if not self._left:
                self.found, self._change, self._until_s = self._change.next, None, math.inf
                self._olds, self._news = frozenset(range(len(self.found.plan.replicas))), frozenset()
                return True
            step = self._left.popleft()
            if step.action is Action.STOP:
                self._olds -= frozenset(step.replicas)
            else:
                self._starting = frozenset(step.replicas)
                self._until_s = now_s + math.ceil(step.seconds / WINDOW_S) * WINDOW_S
        return False

    def _plan(self, *, with_starting: bool) -> Plan:
        """Return the replicas that serve, and those that start, as a plan."""
        replicas = [self.found.plan.replicas[number] for number in sorted(self._olds)]
        if self._change is not None:
            news = self._news | self._starting if with_starting else self._news
            replicas += [self._change.next.plan.replicas[number] for number in sorted(news)]
        return replace(self.found.plan, replicas=tuple(replicas), kv_routes=())

    def kept_rps(self, mix: int, fleet: Cluster, gone: frozenset[str]) -> float:
        """Return the rate up to which what serves keeps its limits."""
        key = self._phase, mix, gone
        if key not in self._rates:
            problem = replace(self.found.problem, workload=self._mixes[mix], cluster=fleet)
            self._rates[key] = kept_rate(self._plan(with_starting=False), problem)
        return self._rates[key]

    def paid(self, fleet: Cluster, gone: frozenset[str]) -> tuple[int, float]:
        """Return the GPUs that serve or start, and their price in USD per hour; NaN if one has none."""
        if (key := (self._phase, gone)) not in self._paid:
            plan = self._plan(with_starting=True)
            price = price_of_plan(plan, fleet)
            there = sum(node_of(device) not in gone for device in plan.devices())
            self._paid[key] = there, math.nan if price is None else price
        return self._paid[key]


class _TrafficLog:
    """Draws requests and keeps what was measured of them, as the planner's store does."""

    def __init__(self, curve: TrafficCurve, seed: int) -> None:
        self._curve, self._rng = curve, np.random.default_rng(seed)
        past = round(curve.start_s / WINDOW_S)
        every = round(STEP_S / WINDOW_S)
        self._arrivals = np.zeros(len(curve.rates) * every)
        self._arrivals[:past] = self._rng.poisson(np.repeat(curve.rates, every)[:past] * WINDOW_S)
        self._count = past
        self._recent = deque[Window](maxlen=round(RECENT_S / WINDOW_S))
        self._lengths = [(_buckets(one, "prompt_tokens"), _buckets(one, "output_tokens")) for _, one in curve.mixes]

    def measure(self, start_s: float, *, in_full: bool) -> TrafficSketch:
        """Return the traffic of the window that begins now: its arrivals or, in full, their lengths, too."""
        mix = self._curve.mix_at(start_s)
        arrivals = int(self._rng.poisson(self._curve.rate_at(start_s) * WINDOW_S))
        self._arrivals[self._count] = arrivals
        self._count += 1
        if not in_full:
            return TrafficSketch(seconds=WINDOW_S, arrivals=arrivals)
        prompts, outputs = (self._histogram(arrivals, *lengths) for lengths in self._lengths[mix])
        hits = self._curve.mixes[mix][1].prefix_hit_rate
        sketch = TrafficSketch(
            seconds=WINDOW_S, arrivals=arrivals, prompt_tokens=prompts, output_tokens=outputs,
            cached_tokens=hits * prompts.total,
        )  # fmt: skip
        self._recent.append(Window(start_s=start_s, traffic=sketch))
        return sketch

    def _histogram(self, requests: int, shares: FloatArray, means: FloatArray) -> Histogram:
        counts = self._rng.multinomial(requests, shares)
        return Histogram(scale=TOKENS, counts=tuple(map(float, counts)), total=float(counts @ means))

    def history(self, now_s: float) -> History:
        """Return what the planner's store has: minutes of the last hours, and hours of two weeks."""
        rates, hour = self._rates(BIN_S, KEPT_S), round(3600 / BIN_S)
        hours = max(0, len(rates) - round(MINUTES_KEPT_S / BIN_S)) // hour
        if hours:
            fine, spans = rates.copy(), np.array([(n * hour, hour) for n in range(hours)], dtype=float)
            fine[: hours * hour] = np.nan
            rates = with_hours(fine, spans, rates[: hours * hour].reshape(hours, hour).mean(axis=1))
        minutes = self._rates(MINUTE_S, MINUTES_KEPT_S)
        return History(end_s=now_s, rates=rates, minutes=minutes, recent=tuple(self._recent))

    def _rates(self, bin_s: float, kept_s: float) -> FloatArray:
        """Return the rates of arrivals in the last whole bins, at most those of the time for which they are kept."""
        each = round(bin_s / WINDOW_S)
        bins = min(self._count // each, round(kept_s / bin_s))
        counts: FloatArray = self._arrivals[self._count - bins * each : self._count].reshape(bins, each).sum(axis=1)
        return counts / bin_s

    def last_minute_rps(self) -> float:
        last = self._arrivals[max(0, self._count - round(60 / WINDOW_S)) : self._count]
        return float(last.mean()) / WINDOW_S if len(last) else 0.0


def _buckets(workload: Workload, lengths: str) -> tuple[FloatArray, FloatArray]:
    """Return the share of the requests in each bucket of tokens, and their mean lengths."""
    tokens = np.array([getattr(one, lengths) for one in workload.bins])
    weights = np.array([one.weight for one in workload.bins])
    bucket = np.searchsorted(np.array(TOKENS.edges), tokens)
    shares = np.bincount(bucket, weights / weights.sum(), minlength=len(TOKENS.edges) + 1)
    sums = np.bincount(bucket, tokens * weights / weights.sum(), minlength=len(shares))
    return shares / shares.sum(), np.divide(sums, shares, out=np.zeros_like(sums), where=shares > 0)
