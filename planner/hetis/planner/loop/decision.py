"""`decide`: whether the plan in force should be changed, to which plan, by which steps, and how good that is at most.

The question is asked at regular times, at a drift (`drift.DriftTest`), when a shortage is near (`is_short`) and when
the fleet has changed. C is the rate at which the plan in force keeps its limits for requests as they are now:

- *Short*: C is below the demand until what is decided at the next look serves, a minute or two, at the upper end of a
  forecast.
- *Other requests*: their mix has drifted. Plans for the most goodput are made for a mix rather than for a demand.
- *Saving*: the objective is cost or GPUs, and the peak demand D of the time that is looked ahead leaves something to
  give back.

How far is looked ahead for D is another question than the horizon over which a change must be worth its costs: what is
given back too early is taken again within a minute or two and costs its start once more, about as much as keeping it
for that time, whereas what is kept for a later peak is paid until then. So D is the peak of some minutes. Both demands
are upper ends, surer for the time in which nothing can be helped than for that for which a change is made. Their level
is the mean of minutes, or since a jump (`History.level`), known up to the chance of counting. A plan is short only by
`SHORT` standard deviations of it, and what is given back leaves `SPARE` of them above D: so chance alone hardly ever
gives back what it soon takes again, whereas a shortage is answered with no more than D.

The answer is a re-planning (docs/replanning.md): its value counts what the change costs, its bound is one on every
change of the family, and its steps keep the capacity as high as any order can. A shortage is ended whatever that costs,
by a plan whose way there serves what serves now, or the demand, if one is found. Any other change must gain
`LoopSettings.least_gain` of what the plan in force yields, net of the change: what noise gains and loses again is less,
so that it moves nothing. Nor may it serve less on the way than the near demand.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import product

from hetis.planner.loop.drift import LATE, Drift, Expected, expected_shares
from hetis.planner.loop.forecast import BIN_S, LEVEL_BINS, MINUTE_S, Forecast, History, demand
from hetis.planner.loop.settings import LoopSettings
from hetis.planner.use_cases.other_fleets.replan import PosedReplan, pose_replanning, replan
from hetis.planner.use_cases.prices import price_of_plan
from hetis.planner.use_cases.robustness.fixed_plan import FixedPlan
from hetis.planner.use_cases.saved_plans import PlanAndProblem
from hetis.planner.use_cases.sources import LoadedInputs
from hetis.solver.budget import Budget, silent
from hetis.solver.check.waiting import request_queue
from hetis.solver.cluster import Cluster
from hetis.solver.errors import InfeasibleError, NoPlanFoundError, UncheckedPlanError
from hetis.solver.placement.utilisation import GRID
from hetis.solver.plan import LEAST_DEMAND_RPS, Lanes, Objective, ObjectiveKind, Plan, Role
from hetis.solver.problem import PlacementProblem
from hetis.solver.replanning.replanner import Replanning
from hetis.solver.traffic import TrafficSketch
from hetis.solver.workload import Workload

ENOUGH = 1 - 1e-6
SHORT, SPARE = 1.0, 3.0  # standard deviations of a level
LEVEL_S = LEVEL_BINS * BIN_S
LEAST_ENDED = 100  # requests that a mix is measured from
STAY_S = 60.0  # horizon of a change whose replicas mostly stay: what starts then costs more than what it saves
MOST_SLOWER = 2.0  # times as slow as by its model, that a plan is taken to be at most


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
        expires_s: when to ask again at the latest.
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
        return replan(question, settings.costs, settings.max_moves, verify=False, budget=budget, report=silent)

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
    return Lanes(lanes[Role.UNIFIED], lanes[Role.PREFILL], running.result.lanes.prefill_load)


def _kept_utilisation(plan: Plan, problem: PlacementProblem) -> float:
    """Return the utilisation up to its own at which a plan's p95 TTFT, waits included, keeps the limit."""
    limit_s, rate_rps = problem.objective.ttft_limit_s, plan.served_rate()
    if limit_s is None:
        return plan.result.utilisation
    queue = request_queue(plan, problem.at(plan.result.utilisation, plan.lanes()))
    return 0.0 if queue is None else queue.highest_rate(plan.result.utilisation * rate_rps, limit_s) / rate_rps


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


def is_short(history: History, capacity_rps: float, settings: LoopSettings) -> bool:
    """Return whether to ask at once, since a plan that keeps its limits up to this rate is or may soon be short.

    ``capacity_rps`` is that of the last decision about the plan in force.
    """
    if history.by_minutes() is None:
        return False
    needed_rps = demand(history, settings.lead_s, settings.coverage).high_rps * (1 - SHORT * history.level().chance)
    return capacity_rps < needed_rps * ENOUGH


def is_spare(history: History, demand_rps: float, since_s: float, settings: LoopSettings) -> bool:
    """Return whether to ask at once, since less is demanded than at the last question by as much as a change must gain.

    ``demand_rps`` is that of the last decision, and the plan in force serves since ``since_s``.
    """
    if history.by_minutes() is None or history.end_s < since_s + settings.cool_down_s:
        return False
    ahead = demand(history, settings.look_ahead_s, settings.lasting)
    return ahead.high_rps < demand_rps * (1 - settings.least_gain)


def decide(
    history: History, in_force: InForce, settings: LoopSettings, *, drift: Drift | None = None,
    ahead: Callable[[float, float], Forecast] | None = None, solve: Solve = solve, least: Least = lambda _posed: 0.0,
) -> Decision:  # fmt: skip
    """Return what to do at the end of a history.

    Args:
        history: the traffic until now.
        in_force: the plan, and the fleet as it is.
        settings: those of the cluster.
        drift: the last alarm. One about the rate counts for `LEVEL_S`, after which it shows in the recent rate.
        ahead: the forecast for a time in seconds and a coverage; None: those of the history.
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
        ahead: Callable[[float, float], Forecast] | None, solve: Solve, least: Least,
    ) -> None:  # fmt: skip
        self._in_force, self._settings, self._drift = in_force, settings, drift
        self._solve, self._least = solve, least
        self._now_s, self._plan = history.end_s, in_force.found.plan
        level, is_known = None, ahead is not None
        if drift is not None and drift.what == "rate" and self._now_s - drift.since_s <= LEVEL_S:
            since = history.traffic_since(drift.since_s)
            level = since.rate_per_s if since.seconds >= MINUTE_S else drift.value
        elif not history.known_bins:
            level = history.traffic_since(-math.inf).rate_per_s or None
        is_in_minutes, self._chance = ahead is None and history.by_minutes() is not None, 0.0
        if is_in_minutes:
            self._chance = history.level().chance
            level = None if self._does_level_count() else level
        ahead = ahead or (lambda horizon_s, coverage: demand(history, horizon_s, coverage, level))
        self._near = ahead(settings.lead_s, settings.coverage)
        self._far = ahead(settings.look_ahead_s, settings.lasting)
        self._until_next = ahead(settings.every_s, settings.coverage)
        self._is_new = not is_known and not is_in_minutes and history.known_bins < LEVEL_BINS
        self._dispersion = history.dispersion()
        self._workload = self._measured(history)
        inputs = replace(in_force.found.inputs, workload=self._workload, cluster=in_force.fleet)
        self._loaded = LoadedInputs(inputs=inputs, origins={})
        self._problem = replace(in_force.found.problem, workload=self._workload, cluster=in_force.fleet)
        self._slower = 1.0
        self._slower = self._measured_slowness(history)
        self._capacity_rps = self._kept_rate(self._plan, self._problem)

    def _kept_rate(self, plan: Plan, problem: PlacementProblem) -> float:
        return kept_rate(plan, problem) / self._slower

    def _measured_slowness(self, history: History) -> float:
        """Return how many times less the plan in force serves than its model says; 1 unless first tokens are late.

        While a queue grows, as many first tokens come as it serves at most, and fewer than requests.
        """
        if self._drift is None or self._drift.what != LATE:
            return 1.0
        recent = history.traffic_since(self._drift.since_s)
        if not recent.ttft_s.count or recent.ttft_s.count >= recent.arrivals:
            return 1.0
        most = kept_rate(self._plan, self._problem) * recent.seconds / recent.ttft_s.count
        return min(MOST_SLOWER, max(1.0, most))

    def _does_level_count(self) -> bool:
        """Return whether the last minutes show the rate since a drift as well as it is known."""
        return self._drift is None or self._now_s - self._drift.since_s >= LEVEL_BINS * MINUTE_S

    def _measured(self, history: History) -> Workload:
        """Return the requests as they come now: the plan's, unless their mix is seen to be another."""
        planned, drift = self._in_force.workload, self._drift
        recent = history.traffic_since(history.end_s - 1800 if drift is None else drift.since_s)
        if recent.prompt_tokens.count < LEAST_ENDED or recent.output_tokens.count < LEAST_ENDED:
            return planned
        is_drifted = drift is not None and (drift.is_of_mix or self._has_other_lengths(recent))
        hits = recent.prefix_hit_rate
        if is_drifted:
            return recent.workload(f"traffic at {history.end_s:.0f} s")
        if abs(hits - planned.prefix_hit_rate) > self._settings.tolerance:
            return replace(planned, prefix_hit_rate=hits)
        return planned

    def _has_other_lengths(self, recent: TrafficSketch) -> bool:
        """Return whether lengths since an alarm are off by more than is tolerated: with the rate, they change, too."""
        bands = expected_shares(self._in_force.workload, self._settings.tolerance)
        return any(not one.low <= one.share_of(recent) <= one.high for one in bands)

    def decision(self) -> Decision:
        objective = self._plan.objective
        demand_rps = max(self._far.high_rps, self._near.high_rps)
        if self._capacity_rps < self._near.high_rps * (1 - SHORT * self._chance) * ENOUGH:
            return self._out_of_shortage(demand_rps)
        demand_rps *= 1 + SPARE * self._chance
        other = self._workload != self._in_force.workload
        if objective.maximises and not other:
            return self._keep("")
        if not other and demand_rps > self._capacity_rps * (1 - self._settings.least_gain):
            return self._keep("That leaves nothing to give back.")
        if self._is_new:
            return self._keep("That is too little history to give anything back.")
        if self._now_s < (cooled_s := self._in_force.since_s + self._settings.cool_down_s):
            kept = self._keep("The last change was too short a time ago for another one.")
            return replace(kept, expires_s=min(kept.expires_s, cooled_s))
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
        if (lowest := self._lowest(found, posed)) < self._near.high_rps * ENOUGH:
            return self._keep(f"The cheapest change would serve {lowest:.4g} requests/s on the way.")
        mix = f"{self._drift}. " if other and self._drift is not None else ""
        reason = f"{mix}{self._sentence(self._far)}; {gain:.4g} {objective.unit} are gained"
        return self._change(found, posed, reason, gain=gain, bound=bound, unit=objective.unit)

    def _out_of_shortage(self, demand_rps: float) -> Decision:
        """Return the change that serves the demand, or most of it, or that there is none.

        Where its way there serves less than now and than is demanded, one is sought whose replicas mostly stay.
        """
        objective, reason = self._plan.objective, self._sentence(self._near)
        kinds = [objective.kind] if objective.maximises else [objective.kind, ObjectiveKind.GOODPUT]
        staying = replace(self._settings, costs=replace(self._settings.costs, horizon_s=STAY_S))
        floor, why = min(self._capacity_rps, self._near.high_rps), ""
        found: tuple[Replanning, PosedReplan] | None = None
        for kind, settings in product(kinds, (self._settings, staying)):
            posed = self._posed(kind, demand_rps)
            try:
                each = self._solve(posed, settings)
            except (InfeasibleError, NoPlanFoundError) as error:
                why = str(error)
                continue
            served = self._kept_rate(each.plan, posed.problem)
            if served < demand_rps and served < self._capacity_rps * (1 + self._settings.least_gain):
                continue
            found = found or (each, posed)
            if self._lowest(each, posed) >= floor * ENOUGH:
                found = each, posed
                break
        if found is None:
            cannot = replace(self._keep(""), verdict=Verdict.CANNOT)
            return replace(cannot, reason=f"{reason}, and no change serves more. {why}".strip())
        served = self._kept_rate(found[0].plan, found[1].problem)
        most = found[0].bound / self._slower if found[1].problem.objective.maximises else math.inf
        gain, bound = (min(rate, demand_rps) - self._capacity_rps for rate in (served, max(most, served)))
        return self._change(*found, reason, gain=gain, bound=bound, unit="requests/s")

    def _lowest(self, found: Replanning, posed: PosedReplan) -> float:
        """Return the lowest rate that is kept on the way to a plan."""
        way = found.transition
        return self._kept_rate(found.plan, posed.problem) * (way.lowest / way.after if way.after else 0.0)

    def _posed(self, kind: ObjectiveKind, demand_rps: float) -> PosedReplan:
        demand = (
            None
            if kind in (ObjectiveKind.GOODPUT, ObjectiveKind.THROUGHPUT)
            else max(demand_rps * self._slower, LEAST_DEMAND_RPS)
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
