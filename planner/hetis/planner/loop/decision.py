"""`decide`: whether the plan in force should be changed, to which plan, by which steps, and how good that is at most.

The question is asked at regular times, at a drift (`drift.DriftTest`), when a shortage is near (`is_short`) and when
the fleet has changed. C is the rate at which the plan in force keeps its limits for requests as they are now:

- *Short*: C is below the demand until what is decided at the next look serves, a minute or two, at the upper end of a
  forecast by minutes.
- *Other requests*: their mix has drifted. Plans for the most goodput are made for a mix rather than for a demand.
- *Saving*: the objective is cost or GPUs, and the peak demand D of the time that is looked ahead leaves something to
  give back.

How far is looked ahead for D is another question than the horizon over which a change must be worth its costs: what is
given back too early is taken again within a minute or two, and costs a change, whereas what is kept for a peak that may
come within an hour is paid until then. So D is a likely peak, and the demand that ends in a shortage a nearly certain
one. Both are of rates. The rate of the last minutes is known up to the chance of counting their requests. So that
chance alone neither takes nor gives back anything, the latter is less and D more by some standard deviations of it.

The answer is a re-planning (docs/replanning.md): its value counts what the change costs, its bound is one on every
change of the family, and its steps keep the capacity as high as any order can. A shortage is ended whatever that
costs. Any other change must gain `LoopSettings.least_gain` of what the plan in force yields, net of the change: what
noise gains and loses again is less, so that it moves nothing. Nor may it serve less on the way than the near demand.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum

from hetis.planner.loop.drift import Drift, DriftTest, Expected, expected_shares
from hetis.planner.loop.forecast import BIN_S, LEVEL_BINS, MINUTE_S, Forecast, History, forecast
from hetis.planner.use_cases.other_fleets.replan import PosedReplan, pose_replanning, replan
from hetis.planner.use_cases.placement_settings import PlacementSettings
from hetis.planner.use_cases.prices import price_of_plan
from hetis.planner.use_cases.robustness.fixed_plan import FixedPlan
from hetis.planner.use_cases.saved_plans import PlanAndProblem
from hetis.planner.use_cases.sources import LoadedInputs
from hetis.solver.budget import Budget, silent
from hetis.solver.check.waiting import request_queue
from hetis.solver.cluster import Cluster
from hetis.solver.errors import InfeasibleError, InvalidProblemError, NoPlanFoundError, UncheckedPlanError
from hetis.solver.placement.utilisation import GRID
from hetis.solver.plan import LEAST_DEMAND_RPS, Lanes, Objective, ObjectiveKind, Plan, Role
from hetis.solver.problem import PlacementProblem
from hetis.solver.replanning.change import ChangeCosts
from hetis.solver.replanning.replanner import Replanning
from hetis.solver.workload import Workload

ENOUGH = 1 - 1e-6
# Standard deviations of counting requests: by which less must be short already, and more is planned for
CHANCE_OF_SHORTAGE, CHANCE = 2.0, 3.0
LEVEL_S = LEVEL_BINS * BIN_S
LEAST_ENDED = 100  # requests that a mix is measured from


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopSettings:
    """How the loop decides.

    Attributes:
        costs: what a change costs. Its horizon is the time over which that is repaid.
        every_s: time between two regular questions.
        watch_s: time between two looks for a shortage.
        coverage: probability with which demand until the next look can be answered is at most what is kept, before what
            chance may have added is taken off.
        look_ahead_s: time for whose demand a change is made.
        lasting: probability with which that demand is at most what is planned for.
        false_alarms_per_day: probability at most of an alarm about drift in a day without any.
        tolerance: share of the requests by which the mix, or prefix hits, may differ from the plan's.
        least_gain: of what the plan in force yields, that a change other than out of a shortage must gain.
        cool_down_s: least time between a change and one that is not out of a shortage.
        max_moves: limit on the GPUs that change their work in one change; None: any number.
        search: settings of searches, which may choose another rung.
        verify: whether a plan is simulated before it is proposed.
    """

    costs: ChangeCosts = field(default_factory=ChangeCosts)
    every_s: float = 300.0
    watch_s: float = 60.0
    coverage: float = 0.95
    look_ahead_s: float = 900.0
    lasting: float = 0.8
    false_alarms_per_day: float = 0.1
    tolerance: float = 0.1
    least_gain: float = 0.05
    cool_down_s: float = 600.0
    max_moves: int | None = None
    search: PlacementSettings = field(default_factory=PlacementSettings)
    verify: bool = False

    def __post_init__(self) -> None:
        for name, least, most in (
            ("every_s", 1, 86400), ("watch_s", 1, 86400), ("coverage", 0.5, 0.9999), ("look_ahead_s", 60, 86400),
            ("lasting", 0.5, 0.9999), ("false_alarms_per_day", 1e-9, 1e3), ("tolerance", 0.01, 0.5),
        ):  # fmt: skip
            if not least <= getattr(self, name) <= most:
                raise InvalidProblemError(f"{name} is {getattr(self, name):g}, must be {least:g} to {most:g}")

    @property
    def lead_s(self) -> float:
        """Time until a change that is decided at the next look serves, at the latest."""
        return self.watch_s + max(60.0, 2 * self.costs.restart_s)

    def drift_test(self, window_s: float) -> DriftTest:
        """Return the test for windows of so many seconds."""
        return DriftTest(false_alarms_per_day=self.false_alarms_per_day, window_s=window_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class InForce:
    """The plan in force, the fleet as it is now, and since when the plan serves.

    The workload of its problem is the one for which it was planned, or which the last decision saw (`Decision.next`).
    """

    found: PlanAndProblem
    fleet: Cluster
    since_s: float

    @property
    def workload(self) -> Workload:
        return self.found.problem.workload


class Verdict(StrEnum):
    KEEP = "keep"
    CHANGE = "change"
    CANNOT = "cannot"  # more is demanded than any plan of the fleet serves, or than was found


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to do, and why.

    Attributes:
        reason: one or two sentences.
        demand_rps: the peak that is looked ahead to, at the upper end of its interval.
        capacity_rps: rate at which the plan in force keeps its limits for the requests that come now.
        found: the answer of the re-planning; None: the plan in force stays.
        next: the plan to go on with, and its problem, which has the requests as they come now.
        gain: what the change gains net of its costs, in ``unit``; in a shortage the requests/s more, and so is bound.
        bound: no change gains more.
        usd_per_hour: price of the GPUs of the new plan less that of the plan in force; None: not all have prices.
    """

    verdict: Verdict
    reason: str
    made_s: float
    expires_s: float
    demand_rps: float
    capacity_rps: float
    expected: Expected
    next: PlanAndProblem
    found: Replanning | None = None
    gain: float = 0.0
    bound: float = 0.0
    unit: str = ""
    usd_per_hour: float | None = None


Solve = Callable[[PosedReplan, LoopSettings], Replanning]
Least = Callable[[PosedReplan], float]  # what every plan is known to cost at least, without a search; 0: nothing


def solve(posed: PosedReplan, settings: LoopSettings) -> Replanning:
    """Re-plan, within the time limit of the settings' searches, at the highest utilisation that the answer is seen to
    keep by the model of its queues: first the highest of all, then what that answer keeps, then that of the problem.

    Raises InfeasibleError or NoPlanFoundError.
    """
    problem, budget = posed.problem, Budget(time_limit_s=settings.search.time_limit_s)

    def at(problem: PlacementProblem) -> Replanning:
        question = replace(posed, problem=problem)
        return replan(
            question, settings.costs, settings.max_moves, verify=settings.verify, budget=budget, report=silent
        )

    utilisation = GRID[-1] if problem.objective.kind.goal.is_planned else 0.0
    for _ in range(2):
        if utilisation <= problem.assumptions.planned_utilisation:
            break
        try:
            found = at(problem.at(utilisation, _fewest_lanes(posed, utilisation)))
        except (InfeasibleError, NoPlanFoundError, UncheckedPlanError):  # or fewer lanes than were assumed
            break
        kept = _kept_utilisation(found.plan, problem)
        if kept >= utilisation * ENOUGH:
            return found
        utilisation = kept
    return at(problem)


def _fewest_lanes(posed: PosedReplan, utilisation: float) -> Lanes:
    """Return half as many replicas of each role as serve the demand if all are like the fastest that run."""
    running, demand_rps = posed.running, posed.problem.objective.demand_rps
    lanes = dict[Role, int]()
    for role in (Role.UNIFIED, Role.PREFILL):
        rates = [one.rate for one in running.replicas if one.role is role]
        share = 1.0 if demand_rps is None else demand_rps / (utilisation * running.served_rate())
        lanes[role] = max(1, int(0.5 * share * sum(rates) / max(rates))) if rates else 1
    return Lanes(lanes[Role.UNIFIED], lanes[Role.PREFILL])


def _kept_utilisation(plan: Plan, problem: PlacementProblem) -> float:
    """Return the utilisation up to its own at which a plan's p95 TTFT, waits included, keeps the limit."""
    limit_s, rate_rps = problem.objective.ttft_limit_s, plan.served_rate()
    if limit_s is None:
        return plan.result.utilisation
    queue = request_queue(plan, problem.at(plan.result.utilisation, plan.result.lanes))
    return 0.0 if queue is None else queue.highest_rate(plan.result.utilisation * rate_rps, limit_s) / rate_rps


def _nothing_known(_posed: PosedReplan) -> float:
    return 0.0


def kept_rate(plan: Plan, problem: PlacementProblem) -> float:
    """Return the rate up to which a plan keeps its limits for the problem's requests, without its lost replicas."""
    there = {device.name: device.gpu for device in problem.cluster.devices()}
    left = [
        number
        for number, replica in enumerate(plan.replicas)
        if all(there.get(device) == part.gpu for part in replica.parts() for device in part.devices)
    ]
    if not left:
        return 0.0
    places = {number: place for place, number in enumerate(left)}
    routes = tuple(
        replace(route, prefill=places[route.prefill], decode=places[route.decode])
        for route in plan.kv_routes
        if route.prefill in places and route.decode in places
    )
    whole = replace(plan, replicas=tuple(plan.replicas[number] for number in left), kv_routes=routes)
    return FixedPlan(whole, problem).as_started(problem.profiles).rate


def demand_soon(history: History, settings: LoopSettings, level_rps: float | None = None) -> Forecast:
    """Return the forecast of the time until a change that is decided at the next look serves: by minutes, if enough of
    them are known, less what chance may have added to them. Raises InvalidProblemError if nothing was measured.
    """
    by_minutes = history.by_minutes()
    if by_minutes is None:
        return forecast(history, settings.lead_s, settings.coverage, level_rps)
    found = forecast(by_minutes, settings.lead_s, settings.coverage, level_rps)
    return replace(found, high_rps=found.high_rps * max(0.5, 1 - CHANCE_OF_SHORTAGE * _chance(found.expected_rps)))


def _chance(rate_rps: float) -> float:
    """Return the relative standard deviation of a rate that is measured for as long as the level of minutes."""
    return 1 / math.sqrt(max(1.0, rate_rps * LEVEL_BINS * MINUTE_S))


def is_short(history: History, capacity_rps: float, settings: LoopSettings) -> bool:
    """Return whether to ask at once, since a plan that keeps its limits up to this rate may soon be short.

    ``capacity_rps`` is that of the last decision about the plan in force.
    """
    known = bool(len(history.minutes))
    return known and capacity_rps < demand_soon(history, settings).high_rps * ENOUGH


def decide(
    history: History, in_force: InForce, settings: LoopSettings, *, drift: Drift | None = None,
    ahead: Callable[[float], Forecast] | None = None, solve: Solve = solve, least: Least = _nothing_known,
) -> Decision:  # fmt: skip
    """Return what to do at the end of a history.

    Args:
        history: the traffic until now.
        in_force: the plan, and the fleet as it is.
        settings: those of the cluster.
        drift: the last alarm. One about the rate counts for `LEVEL_S`, after which it shows in the recent rate.
        ahead: the forecast for a time in seconds; None: those of the history.
        solve: the re-planning.
        least: what is known without it.

    Raises:
        InvalidProblemError: nothing was measured yet, or the plan has no re-planning.
        UncheckedPlanError: a new plan fails the independent checker.
    """
    return _Deciding(history, in_force, settings, drift, ahead, solve, least).decision()


class _Deciding:
    """One decision, from the question to the answer."""

    def __init__(
        self, history: History, in_force: InForce, settings: LoopSettings, drift: Drift | None,
        ahead: Callable[[float], Forecast] | None, solve: Solve, least: Least,
    ) -> None:  # fmt: skip
        self._in_force, self._settings, self._drift = in_force, settings, drift
        self._solve, self._least = solve, least
        self._now_s, self._plan = history.end_s, in_force.found.plan
        level = None
        if drift is not None and not drift.is_of_mix and self._now_s - drift.since_s <= LEVEL_S:
            level = history.traffic_since(drift.since_s).rate_per_s or drift.value
        self._margin = 1.0
        if ahead is None:
            self._near, self._far = (
                demand_soon(history, settings, None if self._is_in_minutes(history) else level),
                forecast(history, settings.look_ahead_s, settings.lasting, level),
            )
            self._until_next = forecast(history, settings.every_s, settings.coverage, level)
            if history.by_minutes() is not None:
                self._margin += CHANCE * _chance(self._near.expected_rps)
        else:
            self._near, self._far = ahead(settings.lead_s), ahead(settings.look_ahead_s)
            self._until_next = ahead(settings.every_s)
        self._dispersion = history.dispersion()
        self._workload = self._measured(history)
        inputs = replace(in_force.found.inputs, workload=self._workload, cluster=in_force.fleet)
        self._loaded = LoadedInputs(inputs=inputs, origins={})
        self._problem = replace(in_force.found.problem, workload=self._workload, cluster=in_force.fleet)
        self._capacity_rps = kept_rate(self._plan, self._problem)

    def _is_in_minutes(self, history: History) -> bool:
        """Return whether the last minutes show the rate since a drift as well as it is known."""
        since_s = -math.inf if self._drift is None else self._drift.since_s
        return self._now_s - since_s >= LEVEL_BINS * MINUTE_S and history.by_minutes() is not None

    def _measured(self, history: History) -> Workload:
        """Return the requests as they come now: the plan's, unless their mix is seen to be another."""
        planned, drift = self._in_force.workload, self._drift
        is_drifted = drift is not None and drift.is_of_mix
        recent = history.traffic_since(drift.since_s if is_drifted and drift is not None else history.end_s - 1800)
        if recent.prompt_tokens.count < LEAST_ENDED or recent.output_tokens.count < LEAST_ENDED:
            return planned
        hits = recent.prefix_hit_rate
        if is_drifted:
            return recent.workload(f"traffic at {history.end_s:.0f} s")
        if abs(hits - planned.prefix_hit_rate) > self._settings.tolerance:
            return replace(planned, prefix_hit_rate=hits)
        return planned

    def decision(self) -> Decision:
        objective = self._plan.objective
        demand_rps = self._margin * max(self._far.high_rps, self._near.high_rps)
        if self._capacity_rps < self._near.high_rps * ENOUGH:
            return self._out_of_shortage(demand_rps)
        other = self._workload != self._in_force.workload
        if objective.maximises and not other:
            return self._keep("")
        if not other and demand_rps > self._capacity_rps * (1 - self._settings.least_gain):
            return self._keep("That leaves nothing to give back.")
        if self._now_s - self._in_force.since_s < self._settings.cool_down_s:
            return self._keep("The last change was too short a time ago for another one.")
        return self._for_gain(demand_rps, other=other)

    def _for_gain(self, demand_rps: float, *, other: bool) -> Decision:
        """Return the change that gains most, or the plan in force if that is too little."""
        objective = self._plan.objective
        posed = self._posed(objective.kind, demand_rps)
        now = self._value_now(objective)
        if not objective.maximises and now - (least := self._least(posed)) < self._settings.least_gain * now:
            return self._keep(f"No plan costs less than {least:.4g} {objective.unit}.")
        try:
            found = self._solve(posed, self._settings)
        except (InfeasibleError, NoPlanFoundError):
            return self._keep("")
        sign = 1.0 if objective.maximises else -1.0
        gain, bound = sign * (found.value - now), sign * (found.bound - now)
        if gain < self._settings.least_gain * now:
            return self._keep(f"No change gains more than {max(0.0, bound):.4g} {objective.unit}.")
        way = found.transition
        lowest = kept_rate(found.plan, posed.problem) * (way.lowest / way.after if way.after else 0.0)
        if lowest < self._near.high_rps * ENOUGH:
            return self._keep(f"The cheapest change would serve {lowest:.4g} requests/s on the way.")
        mix = f"{self._drift}. " if other and self._drift is not None else ""
        reason = f"{mix}{self._sentence(self._far)}; {gain:.4g} {objective.unit} are gained"
        return self._change(found, posed, reason, gain=gain, bound=bound, unit=objective.unit)

    def _out_of_shortage(self, demand_rps: float) -> Decision:
        """Return the change that serves the demand, or most of it, or that there is none."""
        objective, reason = self._plan.objective, self._sentence(self._near)
        kinds = [objective.kind] if objective.maximises else [objective.kind, ObjectiveKind.GOODPUT]
        why = ""
        for kind in kinds:
            posed = self._posed(kind, demand_rps)
            try:
                found = self._solve(posed, self._settings)
            except (InfeasibleError, NoPlanFoundError) as error:
                why = str(error)
                continue
            served = kept_rate(found.plan, posed.problem)
            most = found.bound if posed.problem.objective.maximises else float("inf")
            if min(served, demand_rps) < self._capacity_rps * (1 + self._settings.least_gain) and served < demand_rps:
                break
            gain, bound = (min(rate, demand_rps) - self._capacity_rps for rate in (served, max(most, served)))
            return self._change(found, posed, reason, gain=gain, bound=bound, unit="requests/s")
        cannot = replace(self._keep(""), verdict=Verdict.CANNOT)
        return replace(cannot, reason=f"{reason}, and no change serves more. {why}".strip())

    def _posed(self, kind: ObjectiveKind, demand_rps: float) -> PosedReplan:
        demand = (
            None if kind in (ObjectiveKind.GOODPUT, ObjectiveKind.THROUGHPUT) else max(demand_rps, LEAST_DEMAND_RPS)
        )
        objective = replace(self._plan.objective, kind=kind, demand_rps=demand)
        return pose_replanning(self._in_force.found, self._loaded, objective, self._settings.search)

    def _value_now(self, objective: Objective) -> float:
        """Return what the plan in force yields in the unit of the objective."""
        if objective.maximises:
            return self._capacity_rps
        if objective.kind is ObjectiveKind.GPUS:
            return float(len(self._plan.devices()))
        return price_of_plan(self._plan, self._in_force.found.inputs.cluster) or 0.0

    def _sentence(self, ahead: Forecast) -> str:
        return f"{str(ahead).capitalize()}, and the plan in force keeps its limits up to {self._capacity_rps:.4g}"

    def _keep(self, why: str) -> Decision:
        return Decision(
            verdict=Verdict.KEEP, reason=f"{self._sentence(self._near)}. {why}".strip(), made_s=self._now_s,
            expires_s=self._now_s + self._settings.every_s, demand_rps=self._far.high_rps,
            capacity_rps=self._capacity_rps, expected=self._expected(self._workload),
            next=PlanAndProblem(plan=self._plan, inputs=self._loaded.inputs, problem=self._problem, warnings=()),
        )  # fmt: skip

    def _change(
        self, found: Replanning, posed: PosedReplan, reason: str, *, gain: float, bound: float, unit: str
    ) -> Decision:
        plan, before = found.plan, self._in_force.found.inputs.cluster
        prices = price_of_plan(plan, posed.problem.cluster), price_of_plan(self._plan, before)
        # The objective remains the cluster's, also after a plan for the most that a fleet too small can serve.
        kept = replace(plan, objective=replace(self._plan.objective, demand_rps=plan.objective.demand_rps))
        following = PlanAndProblem(plan=kept, inputs=posed.loaded.inputs, problem=posed.problem, warnings=())
        return Decision(
            verdict=Verdict.CHANGE, reason=f"{reason}.", made_s=self._now_s,
            expires_s=self._now_s + self._settings.every_s, demand_rps=self._far.high_rps,
            capacity_rps=self._capacity_rps, expected=self._expected(posed.problem.workload), found=found,
            next=following, gain=gain, bound=max(gain, bound), unit=unit,
            usd_per_hour=None if None in prices else (prices[0] or 0.0) - (prices[1] or 0.0),
        )  # fmt: skip

    def _expected(self, workload: Workload) -> Expected:
        """Return the bands beyond which traffic has drifted. What the plan in force serves is no drift."""
        return Expected(
            low_rps=self._until_next.low_rps, high_rps=max(self._until_next.high_rps, self._capacity_rps),
            shares=expected_shares(workload, self._settings.tolerance), dispersion=self._dispersion,
        )  # fmt: skip
