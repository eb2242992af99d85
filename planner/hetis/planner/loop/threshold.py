"""`ThresholdScaling`: replicas of a fixed plan come and go by their utilisation, as autoscalers of the field decide.

The rule is that of Kubernetes' HorizontalPodAutoscaler with its defaults: every 15 s (20 here), if the ratio of
measured to wanted utilisation is off by over 10%, as many replicas as the ratio asks for; fewer only once the highest
number of the last 5 minutes is fewer. Utilisation is the rate of the last minute over what the replicas are planned
for. The cheapest replicas per request start first. Source: Kubernetes documentation, "Horizontal Pod Autoscaling",
algorithm details.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from hetis.planner.loop.drift import DriftTest
from hetis.planner.loop.rehearsal import Answer, Change, View
from hetis.planner.use_cases.prices import price_of_plan
from hetis.planner.use_cases.saved_plans import PlanAndProblem
from hetis.solver.errors import InvalidProblemError
from hetis.solver.plan import ReplicaPlan, Role
from hetis.solver.replanning.change import ChangeCosts, holdings_of
from hetis.solver.replanning.transition import Action, Step

TOLERANCE = 0.1
STABLE_S = 300.0


class ThresholdScaling:
    """Follows traffic with replicas of a plan for the peak."""

    every_s = 20.0

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
        now_s, found = view.history.end_s, view.in_force.found
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

    def drift_test(self) -> DriftTest | None:
        return None

    def _capacity(self, replicas: Sequence[ReplicaPlan]) -> float:
        return self._peak.problem.planned_share * sum(one.rate for one in replicas)

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
