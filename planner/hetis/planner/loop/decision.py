"""`decide`: whether the plan in force should be changed, to which plan, by which steps, and how good that is at most.

The question is asked at regular times, at a drift (`drift.DriftTest`) and when the fleet has changed. With the peak
demand D of the next horizon, at the upper end of the forecast's interval, and the rate C at which the plan in force
keeps its limits for requests as they are now:

- *Short*: C is below the demand of the time until the next question can be answered and a replica started.
- *Other requests*: their mix has drifted. Plans for the most goodput are made for a mix rather than for a demand.
- *Saving*: the objective is cost or GPUs, and D leaves something to give back.

The answer is a re-planning (docs/replanning.md): its value counts what the change costs, its bound is one on every
change of the family, and its steps keep the capacity as high as any order can. A shortage is ended whatever that
costs. Any other change must gain `LoopSettings.least_gain` of what the plan in force yields, net of the change: what
noise gains and loses again is less, so that it moves nothing. Nor may it serve less on the way than the near demand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum

from hetis.planner.loop.drift import Drift, DriftTest, Expected, expected_shares
from hetis.planner.loop.forecast import BIN_S, LEVEL_BINS, Forecast, History, forecast
from hetis.planner.use_cases.other_fleets.replan import PosedReplan, pose_replanning, replan
from hetis.planner.use_cases.placement_settings import PlacementSettings
from hetis.planner.use_cases.prices import price_of_plan
from hetis.planner.use_cases.robustness.fixed_plan import FixedPlan
from hetis.planner.use_cases.saved_plans import PlanAndProblem
from hetis.planner.use_cases.sources import LoadedInputs
from hetis.solver.budget import Budget, silent
from hetis.solver.cluster import Cluster
from hetis.solver.errors import InfeasibleError, InvalidProblemError, NoPlanFoundError
from hetis.solver.plan import LEAST_DEMAND_RPS, Objective, ObjectiveKind, Plan
from hetis.solver.problem import PlacementProblem
from hetis.solver.replanning.change import ChangeCosts
from hetis.solver.replanning.replanner import Replanning
from hetis.solver.workload import Workload

ENOUGH = 1 - 1e-6
LEVEL_S = LEVEL_BINS * BIN_S
LEAST_ENDED = 100  # requests that a mix is measured from


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopSettings:
    """How the loop decides.

    Attributes:
        costs: what a change costs. Its horizon is the time for which demand is forecast and a plan expected to last.
        every_s: time between two regular questions.
        coverage: probability with which the demand of a horizon is at most what is planned for. Demand that is higher
            lasts until the next question is answered, which of an hour is a ninth: so the default leaves less than 1%
            of the requests outside the limits.
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
    coverage: float = 0.92
    false_alarms_per_day: float = 0.1
    tolerance: float = 0.1
    least_gain: float = 0.05
    cool_down_s: float = 600.0
    max_moves: int | None = None
    search: PlacementSettings = field(default_factory=PlacementSettings)
    verify: bool = False

    def __post_init__(self) -> None:
        for name, least, most in (
            ("every_s", 1, 86400), ("coverage", 0.5, 0.9999), ("false_alarms_per_day", 1e-9, 1e3),
            ("tolerance", 0.01, 0.5),
        ):  # fmt: skip
            if not least <= getattr(self, name) <= most:
                raise InvalidProblemError(f"{name} is {getattr(self, name):g}, must be {least:g} to {most:g}")

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
        demand_rps: the peak that is expected until ``expires_s``, at the upper end of its interval.
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
    """Re-plan, within the time limit of the settings' searches. Raises InfeasibleError or NoPlanFoundError."""
    budget = Budget(time_limit_s=settings.search.time_limit_s)
    return replan(posed, settings.costs, settings.max_moves, verify=settings.verify, budget=budget, report=silent)


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


def decide(
    history: History, in_force: InForce, settings: LoopSettings, *, drift: Drift | None = None,
    ahead: Callable[[float], Forecast] | None = None, solve: Solve = solve, least: Least = _nothing_known,
) -> Decision:  # fmt: skip
    """Return what to do at the end of a history.

    Args:
        history: the traffic until now.
        in_force: the plan, and the fleet as it is.
        settings: those of the cluster.
        drift: the last alarm, if it is not older than `LEVEL_S`, in which a drift shows in the recent rate; None: there
            is none.
        ahead: the forecast for a horizon in seconds; None: `forecast.forecast` of the history.
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
        if drift is not None and not drift.is_of_mix:
            level = history.traffic_since(drift.since_s).rate_per_s or drift.value
        ahead = ahead or (lambda horizon_s: forecast(history, horizon_s, settings.coverage, level))
        self._near, self._far = ahead(self._lead_s()), ahead(settings.costs.horizon_s)
        self._workload = self._measured(history)
        inputs = replace(in_force.found.inputs, workload=self._workload, cluster=in_force.fleet)
        self._loaded = LoadedInputs(inputs=inputs, origins={})
        self._problem = replace(in_force.found.problem, workload=self._workload, cluster=in_force.fleet)
        self._capacity_rps = kept_rate(self._plan, self._problem)

    def _lead_s(self) -> float:
        """Return the time until a change that is decided at the next regular question serves, at the latest."""
        return self._settings.every_s + max(60.0, 2 * self._settings.costs.restart_s)

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
        demand_rps = max(self._far.high_rps, self._near.high_rps)
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
        """Return the bands beyond which traffic has drifted: what the plan in force serves need not be less."""
        high = max(self._near.high_rps, min(self._far.high_rps, self._capacity_rps))
        return Expected(
            low_rps=self._near.low_rps, high_rps=high, shares=expected_shares(workload, self._settings.tolerance)
        )
