"""What the loop is measured by: a static plan for the peak, threshold scaling, and the loop with a perfect forecast.

`ThresholdScaling` lets replicas of the static plan come and go by their utilisation. Its rule is that of Kubernetes'
HorizontalPodAutoscaler with its defaults: every 15 s (10 here), if the ratio of measured to wanted utilisation is off
by over 10%, as many replicas as the ratio asks for; fewer only once the highest number of the last 5 minutes is fewer.
Utilisation is the rate of the last minute over what the replicas are planned for. The cheapest replicas per request
start first. Source: Kubernetes documentation, "Horizontal Pod Autoscaling", algorithm details.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from hetis.planner.loop.curves import TrafficCurve
from hetis.planner.loop.rehearsal import (
    Answer,
    Change,
    Follower,
    LoopFollower,
    NodeEvent,
    Rehearsal,
    RememberingSearch,
    View,
    rehearse,
)
from hetis.planner.loop.settings import LoopSettings
from hetis.planner.use_cases.describing import with_inputs
from hetis.planner.use_cases.other_fleets.replan import pose_replanning
from hetis.planner.use_cases.place import search
from hetis.planner.use_cases.prices import price_of_plan
from hetis.planner.use_cases.saved_plans import PlanAndProblem
from hetis.planner.use_cases.sources import LoadedInputs
from hetis.solver.budget import Budget, silent
from hetis.solver.errors import InvalidProblemError
from hetis.solver.plan import LEAST_DEMAND_RPS, ObjectiveKind, ReplicaPlan, Role
from hetis.solver.replanning.change import ChangeCosts, holdings_of
from hetis.solver.replanning.transition import Action, Step

TOLERANCE = 0.1
STABLE_S = 300.0


class Static(Follower):
    """A plan that never changes."""

    name, every_s, watch_s = "static", math.inf, math.inf

    def ask(self, view: View) -> Answer:
        return Answer(None, view.in_force.found, None)


class ThresholdScaling(Follower):
    """Follows traffic with replicas of a plan for the peak."""

    every_s, watch_s = 10.0, math.inf

    def __init__(self, peak: PlanAndProblem, costs: ChangeCosts, utilisation: float) -> None:
        """Raises InvalidProblemError if the plan's replicas do not serve by themselves."""
        if any(one.role is not Role.UNIFIED for one in peak.plan.replicas):
            raise InvalidProblemError("threshold scaling needs replicas that serve by themselves")
        self.name = f"threshold {utilisation:.0%}"
        self._peak, self._costs, self._utilisation = peak, costs, utilisation
        cluster = peak.problem.cluster

        def price(one: ReplicaPlan) -> float:
            paid = price_of_plan(replace(peak.plan, replicas=(one,)), cluster)
            return (len(one.devices()) if paid is None else paid) / one.rate

        self._replicas = sorted(peak.plan.replicas, key=price)
        self._wanted = deque[tuple[float, int]]()

    def ask(self, view: View) -> Answer:
        now_s, found = view.now_s, view.in_force.found
        there = {device.name for device in view.in_force.fleet.devices()}
        able = [one for one in self._replicas if there.issuperset(one.devices())]
        running = [one for one in found.plan.replicas if there.issuperset(one.devices())]
        wanted = len(running)
        ratio = view.rate_rps / (self._capacity(running) * self._utilisation) if running else 2.0
        if abs(ratio - 1) > TOLERANCE or len(running) < len(found.plan.replicas):
            need = view.rate_rps / self._utilisation
            wanted = next((n for n in range(1, len(able)) if self._capacity(able[:n]) >= need), len(able))
        self._wanted.append((now_s, wanted))
        while self._wanted[0][0] < now_s - STABLE_S:
            self._wanted.popleft()
        after = able[: max(wanted, min(len(running), max(count for _, count in self._wanted)))]
        if {one.devices() for one in after} == {one.devices() for one in found.plan.replicas}:
            return Answer(None, found, None)
        following = replace(found, plan=replace(self._peak.plan, replicas=tuple(after)))
        return Answer(Change(next=following, steps=self._steps(running, found, after), reason=""), following, None)

    def _capacity(self, replicas: Sequence[ReplicaPlan]) -> float:
        return self._peak.plan.planned_share * sum(one.rate for one in replicas)

    def _steps(
        self, running: Sequence[ReplicaPlan], before: PlanAndProblem, after: Sequence[ReplicaPlan]
    ) -> tuple[Step, ...]:
        starts = tuple(number for number, one in enumerate(after) if one not in running)
        stops = tuple(number for number, one in enumerate(before.plan.replicas) if one not in after)
        model, now, then = self._peak.problem.model, self._capacity(running), self._capacity(after)
        loads = [holding.weight_bytes(model) for number in starts for _, holding in holdings_of(after[number])]
        steps = list[Step]()
        if starts:
            seconds = self._costs.start_s(max(loads))
            steps.append(
                Step(action=Action.START, replicas=starts, seconds=seconds, capacity=now, capacity_after=max(now, then))
            )
        if stops:
            steps.append(Step(action=Action.STOP, replicas=stops, seconds=0.0, capacity=now, capacity_after=then))
        return tuple(steps)


# --- all of them on one curve


def rehearse_all(
    found: PlanAndProblem, curve: TrafficCurve, settings: LoopSettings, *, events: Sequence[NodeEvent] = (),
    seed: int = 0, utilisations: Sequence[float] = (0.7,),
    progress: Callable[[str, float], None] = lambda _name, _share: None,
) -> Iterator[Rehearsal]:  # fmt: skip
    """Yield the static plan, threshold scaling, the perfect forecast, and the loop, on the same arrivals.

    All begin with the static plan. ``progress`` is told who follows, and which share of the time has passed.

    Raises:
        InfeasibleError: no plan of the fleet serves the curve's peak.
        NoPlanFoundError: none was found.
    """
    peak = plan_for_peak(found, curve, settings)
    remembering = RememberingSearch()
    followers: list[Follower] = [Static()]
    if all(one.role is Role.UNIFIED for one in peak.plan.replicas):
        followers += [ThresholdScaling(peak, settings.costs, one) for one in utilisations]
    followers += [LoopFollower(settings, remembering, curve), LoopFollower(settings, remembering)]
    seconds = curve.end_s - curve.start_s
    for follower in followers:

        def passed(now_s: float, name: str = follower.name) -> None:
            progress(name, (now_s - curve.start_s) / seconds)

        yield rehearse(peak, curve, follower, events=events, seed=seed, progress=passed)


def plan_for_peak(found: PlanAndProblem, curve: TrafficCurve, settings: LoopSettings) -> PlanAndProblem:
    """Return the cheapest plan that serves the peak of each of the curve's mixes, as far as one plan does: that for the
    mix which needs most. Without prices it has the fewest GPUs.
    """
    objective = found.plan.objective
    if objective.maximises:
        kind = ObjectiveKind.GPUS if found.problem.cluster.without_price() else ObjectiveKind.COST
        objective = replace(objective, kind=kind)
    best: PlanAndProblem | None = None
    for number, (from_s, workload) in enumerate(curve.mixes):
        until_s = curve.mixes[number + 1][0] if number + 1 < len(curve.mixes) else curve.end_s
        if until_s <= curve.start_s:
            continue
        peak_rps = float(curve.rates_within(max(from_s, curve.start_s), until_s).max())
        demand = replace(objective, demand_rps=max(peak_rps, LEAST_DEMAND_RPS))
        inputs = replace(found.inputs, workload=workload)
        posed = pose_replanning(found, LoadedInputs(inputs=inputs, origins={}), demand, settings.search)
        plan = search(posed.problem, posed.settings, budget=Budget(), report=silent)
        plan = with_inputs(plan, posed.loaded, posed.settings, posed.problem, demand, rung=posed.settings.rung)
        if best is None or plan.result.value > best.plan.result.value:
            best = PlanAndProblem(plan=plan, inputs=posed.loaded.inputs, problem=posed.problem, warnings=())
    assert best is not None, "a curve has a mix at its end"
    return best
