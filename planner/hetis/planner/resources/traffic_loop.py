"""From measured traffic to the next plan: when to ask, proposals, and changes that the planner makes itself.

The question is `hetis.planner.loop.decide`. It is asked every few minutes, and as soon as traffic has drifted from
what the last answer expects or a shortage is near. A change is proposed as a plan with its gain, bound, steps and
expiry. AUTOMATIC activates it, within the changes per hour, and goes back if measured attainment falls although no more
arrives than the earlier plan could serve; then it only advises for `WARY_S`. All state but plans lives in memory: a new
leader asks anew.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter, deque
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field, replace

from hetis.planner.convert.documents import document_of
from hetis.planner.convert.names import seconds_of, timestamp
from hetis.planner.convert.plans import OBJECTIVE_KINDS
from hetis.planner.convert.traffic import MINUTE_S
from hetis.planner.failures import ServiceError
from hetis.planner.fleet.fleet import LiveFleet
from hetis.planner.fleet.settings import TrafficPolicy, policy_from
from hetis.planner.fleet.stored_plans import AnsweredPlan
from hetis.planner.fleet.views import Clock
from hetis.planner.jobs.apart import call_apart
from hetis.planner.loop.decision import LEAST_ENDED, Decision, InForce, Verdict, decide, is_short, is_spare, solve
from hetis.planner.loop.drift import LATE_S, Drift, DriftTest, Expected, expected_shares, late
from hetis.planner.loop.forecast import History, Window
from hetis.planner.loop.settings import LoopSettings
from hetis.planner.loop.speeds import corrections
from hetis.planner.resources.nodes import NodeReader
from hetis.planner.resources.plan_creation import PlanCreation
from hetis.planner.resources.proposals import StoredPlacements
from hetis.planner.resources.traffic import MeasuredTraffic
from hetis.planner.threads import run_in_daemon_thread
from hetis.planner.use_cases.other_fleets.replan import PosedReplan
from hetis.planner.use_cases.robustness.fixed_plan import structure_of
from hetis.planner.use_cases.robustness.profile_errors import scaled
from hetis.planner.use_cases.saved_plans import PlanAndProblem
from hetis.solver.advice import without_nodes
from hetis.solver.cluster import Cluster
from hetis.solver.errors import HetisError
from hetis.solver.plan import Plan
from hetis.solver.replanning.replanner import Replanning
from hetis.solver.traffic import TrafficSketch
from hetis.v1 import cluster_pb2, plan_pb2, traffic_pb2

LEAST_ASK_S = 60.0  # after a question that failed, or that an alarm of the same kind asked
STEP_S = 10.0  # between two looks, each of which is a window of the drift test
SETTLE_S = 120.0  # time that a plan is in force before traffic is judged by it
JUDGED_S, LEAST_JUDGED = 180.0, 50  # a change is judged after so long, by so many first tokens
FALL = 0.05  # fall of the attainment that takes a change back
WARY_S = 3600.0
HOUR_S = 3600.0
MARGIN_S = 120.0  # that a search and the simulation of its plan may take beyond the limit of the search
_log = logging.getLogger("hetis.planner.traffic")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Judged:
    """A change that may be taken back: the plan, and the attainment and capacity before it."""

    plan: str
    attainment: float
    capacity_rps: float


@dataclass(slots=True, kw_only=True)
class _Loop:
    """The state of one cluster, of which ``plan`` is in force since ``since_s``.

    Attributes:
        due_s: when the question is next asked without an alarm; with one, from ``free_s`` on, or at once if the last
            question was ``answered`` to an alarm of another kind.
        looked_s: when a shortage, or much less demand, was last looked for.
        late_s: when limits were last seen to be broken.
        capacity_rps: rate from which on there is a shortage that may have an answer.
        demand_rps: what was demanded when the question was last asked.
        test: that of drift from what is ``expected``; ``alarm``: one that was not asked about yet; ``drift``: the last
            one of the rate, unless the mix has changed since.
        seen: the traffic up to the last look, of all replicas since the planner's start; ``looks``: what came between
            the looks of the last hour.
        proposal: the open proposal; empty if there is none.
        changes_s: times of the changes that the planner made itself.
        wary_until_s: until when it makes none, since one was taken back.
    """

    plan: str = ""
    since_s: float = 0.0
    found: PlanAndProblem | None = None
    due_s: float = 0.0
    free_s: float = 0.0
    answered: tuple[str, bool] | None = None
    looked_s: float = 0.0
    late_s: float = 0.0
    capacity_rps: float = math.inf
    demand_rps: float = 0.0
    test: DriftTest | None = None
    alarm: Drift | None = None
    drift: Drift | None = None
    seen: TrafficSketch | None = None
    looks: deque[Window] = field(default_factory=lambda: deque(maxlen=round(HOUR_S / STEP_S)))
    expected: Expected | None = None
    shown: traffic_pb2.TrafficDecision | None = None
    proposal: str = ""
    changes_s: list[float] = field(default_factory=list)
    judged: _Judged | None = None
    wary_until_s: float = 0.0
    has_cleared: bool = False

    def move(self, step_s: float) -> None:
        """Move all times, after the clock was set forward by so much (negative: back)."""
        for name in ("since_s", "due_s", "free_s", "looked_s", "late_s", "wary_until_s"):
            setattr(self, name, getattr(self, name) + step_s)
        self.changes_s = [at_s + step_s for at_s in self.changes_s]
        looks = [replace(one, start_s=one.start_s + step_s) for one in self.looks]
        self.looks.clear()
        self.looks.extend(looks)
        self.test = self.alarm = self.drift = None


class TrafficLoop:
    """The loops of all clusters. Run `run` once; `step` does what is due."""

    def __init__(
        self, fleet: LiveFleet, nodes: NodeReader, traffic: MeasuredTraffic, placements: StoredPlacements,
        creation: PlanCreation, clock: Clock, settings: LoopSettings | None = None,
    ) -> None:  # fmt: skip
        self._fleet, self._nodes, self._traffic, self._placements = fleet, nodes, traffic, placements
        self._creation, self._clock = creation, clock
        self._settings = settings or LoopSettings()
        self._loops: dict[str, _Loop] = {}
        self._offset_s = clock.time() - clock.monotonic()

    async def run(self) -> None:
        while True:
            await asyncio.sleep(STEP_S)
            await self.step()

    async def step(self) -> None:
        """Look at every cluster."""
        names = set(self._fleet.cluster_names)
        self._loops = {name: self._loops.get(name, _Loop()) for name in names}
        offset_s = self._clock.time() - self._clock.monotonic()
        if abs(step_s := offset_s - self._offset_s) > STEP_S:
            _log.warning("the clock of this machine was set by %+.0f s", step_s)
            self._offset_s = offset_s
            for loop in self._loops.values():
                loop.move(step_s)
        for name, loop in sorted(self._loops.items()):
            try:
                await self._look(name, loop, policy_from(TrafficPolicy, self._fleet.policy_of(name)))
            except (ServiceError, HetisError) as error:  # for example, the plan has no re-planning
                _log.warning("no decision about the traffic of %s: %s", name, error)
            except Exception:
                _log.exception(
                    "deciding about the traffic of %s failed", name
                )  # must not end the other clusters' loops

    def decision_of(self, cluster: str) -> traffic_pb2.TrafficDecision | None:
        """Return the last decision, with the replicas that there should be; None if no plan is in force."""
        loop = self._loops.get(cluster)
        return None if loop is None or not loop.plan else loop.shown

    async def _look(self, cluster: str, loop: _Loop, policy: TrafficPolicy) -> None:
        now_s = self._clock.time()
        if not loop.has_cleared:
            await self._clear(cluster)
            loop.has_cleared = True
        is_off = policy.mode == cluster_pb2.REACTION_MODE_OFF or not self._fleet.has_plan(cluster)
        answered = None if is_off else await self._traffic.plan_in_force(cluster)
        if answered is None:
            await self._withdraw(loop)
            self._loops[cluster] = _Loop(has_cleared=True)
            return
        if answered.record.name != loop.plan:
            self._begin(loop, answered)
        if answered.record.activation != plan_pb2.ACTIVATION_STATE_ACTIVE:
            return
        windows = await self._traffic.windows_of(cluster)
        model = answered.problem.model.name
        seen = windows.total(model)
        if seen is None or now_s - loop.since_s < STEP_S:
            return
        latest, loop.seen = (seen.since(loop.seen) if loop.seen is not None else None), seen
        if latest is not None and latest.seconds > 0:
            self._test(loop, answered, latest, now_s)
        await self._judge(cluster, loop, answered, now_s)
        is_other = loop.answered and loop.alarm and loop.answered != (loop.alarm.what, loop.alarm.rises)
        if now_s < loop.free_s and not is_other:
            return
        is_due = now_s >= loop.due_s or (loop.alarm is not None and _is_measured(loop.alarm, loop.looks, now_s))
        if not is_due and (loop.proposal or now_s - loop.looked_s < self._settings.watch_s):
            return
        minutes = [
            Window(start_s=one.start_s, traffic=one.traffic)
            for one in windows.windows(least_s=MINUTE_S / 4)
            if one.model == model
        ]
        history = replace(History.of_windows(minutes, now_s), recent=tuple(loop.looks))
        if loop.alarm is None and history.by_minutes() is None:
            return  # the first minutes
        loop.looked_s = now_s
        costs = replace(self._settings, cool_down_s=policy.cool_down_s)
        is_hasty = is_due or is_short(history, loop.capacity_rps, costs)
        if not is_hasty and not is_spare(history, loop.demand_rps, loop.since_s, costs):
            return
        alarm, drift, loop.answered = loop.alarm, loop.alarm or loop.drift, None
        if alarm is not None:
            loop.alarm = loop.test = None
        loop.due_s, loop.free_s = now_s + self._settings.every_s, now_s + LEAST_ASK_S
        in_force = InForce(
            found=self._corrected(cluster, loop.found or answered.found),
            fleet=await self._fleet_now(cluster),
            since_s=loop.since_s,
        )
        decision = await run_in_daemon_thread(
            lambda: decide(history, in_force, costs, drift=drift, solve=_solve_apart), name=f"decision for {cluster}"
        )
        loop.due_s = decision.expires_s  # when the same is proposed again, or withdrawn
        loop.answered = None if alarm is None else (alarm.what, alarm.rises)
        loop.free_s = now_s if alarm is None else loop.free_s
        _log.info("%s: %s: %s", cluster, decision.verdict, decision.reason)
        await self._act(cluster, loop, answered, decision, policy, now_s)

    def _test(self, loop: _Loop, answered: AnsweredPlan, latest: TrafficSketch, now_s: float) -> None:
        """Look whether the traffic since the last look is a drift, or the limits are broken."""
        loop.looks.append(Window(start_s=now_s - latest.seconds, traffic=latest))
        if loop.expected is not None:
            test = loop.test or self._settings.drift_test(STEP_S)
            loop.test = test = test.after(now_s, latest, loop.expected)
            if test.drift is not None:
                loop.alarm = test.drift
                loop.drift = None if test.drift.is_of_mix else test.drift
        # What waited for the plan is still late when it serves; and what a question had no answer to, is asked rarely.
        if now_s - max(loop.since_s + SETTLE_S, loop.late_s + self._settings.every_s) >= LATE_S:
            last = [one.traffic for one in loop.looks if one.start_s >= now_s - LATE_S - STEP_S]
            if (found := late(last, now_s, answered.plan.objective.ttft_limit_s)) is not None:
                loop.late_s, loop.alarm = now_s, loop.alarm or found

    def _begin(self, loop: _Loop, answered: AnsweredPlan) -> None:
        """Begin with another plan in force."""
        body = answered.record.body
        loop.plan, loop.found = answered.record.name, _of_cluster(answered)
        activated_s = seconds_of(body.activate_time) if body.HasField("activate_time") else 0.0
        loop.since_s = min(activated_s, self._clock.time())  # the clock of an earlier leader may have been ahead
        loop.due_s = loop.free_s = 0.0
        loop.test, loop.alarm, loop.seen, loop.capacity_rps = None, None, None, math.inf
        objective = loop.found.plan.objective
        high_rps = answered.plan.result.value if objective.maximises else objective.demand_rps
        shares = expected_shares(answered.problem.workload, self._settings.tolerance)
        loop.expected = Expected(low_rps=0.0, high_rps=high_rps or 0.0, shares=shares)
        is_ours = loop.proposal == loop.plan
        shown = loop.shown if is_ours and loop.shown is not None else traffic_pb2.TrafficDecision()
        del shown.desired[:]
        shown.desired.extend(_desired(answered.plan, answered.plan))
        shown.plan, loop.shown = "", shown
        loop.proposal = "" if is_ours else loop.proposal

    async def _fleet_now(self, cluster: str) -> Cluster:
        """Return the declared fleet without nodes that are lost or drain."""
        views = await self._nodes.read(cluster)
        lost = cluster_pb2.NODE_STATE_LOST
        gone = frozenset(node for node, live in views.live.items() if live.state == lost or live.is_draining)
        return without_nodes(views.declared.value, gone)

    def _corrected(self, cluster: str, found: PlanAndProblem) -> PlanAndProblem:
        """Return a plan's problem with the profiles as they are measured."""
        factors = corrections(self._traffic.now(cluster).speeds)
        profiles = dict(found.problem.profiles)
        for gpu, factor in factors.items():
            if gpu in profiles:
                profiles |= scaled({gpu: profiles[gpu]}, factor)
        inputs = replace(found.inputs, profiles={**found.inputs.profiles, **profiles})
        return replace(found, inputs=inputs, problem=replace(found.problem, profiles=profiles))

    async def _act(
        self, cluster: str, loop: _Loop, answered: AnsweredPlan, decision: Decision, policy: TrafficPolicy, now_s: float
    ) -> None:
        loop.expected = decision.expected
        loop.capacity_rps = math.inf if decision.verdict is Verdict.CANNOT else decision.capacity_rps
        loop.demand_rps = decision.demand_rps
        if decision.verdict is not Verdict.CHANGE or decision.found is None:
            await self._withdraw(loop)
            # The requests as they come now; corrections of profiles are made anew each time.
            found, workload = loop.found or answered.found, decision.next.problem.workload
            loop.found = replace(
                found,
                inputs=replace(found.inputs, workload=workload),
                problem=replace(found.problem, workload=workload),
            )
        else:
            await self._propose(cluster, loop, answered, decision, decision.found.plan)
        plan = decision.found.plan if loop.proposal and decision.found is not None else answered.plan
        loop.shown = traffic_pb2.TrafficDecision(
            decide_time=timestamp(now_s),
            reason=decision.reason,
            demand_rps=decision.demand_rps,
            capacity_rps=decision.capacity_rps,
            plan=loop.proposal,
            desired=_desired(plan, answered.plan),
        )
        loop.changes_s = [at for at in loop.changes_s if at > now_s - HOUR_S]
        may_act = policy.mode == cluster_pb2.REACTION_MODE_AUTOMATIC and now_s >= loop.wary_until_s
        if loop.proposal and may_act and len(loop.changes_s) < policy.changes_per_hour:
            attainment = self._traffic.attainment(cluster, answered, now_s - 300)
            await self._placements.activate(loop.proposal)
            loop.changes_s.append(now_s)
            if attainment is not None:
                loop.judged = _Judged(plan=loop.proposal, attainment=attainment[0], capacity_rps=decision.capacity_rps)

    async def _propose(self, cluster: str, loop: _Loop, answered: AnsweredPlan, decision: Decision, plan: Plan) -> None:
        """Propose a plan in place of the one that was proposed before, if it is another."""
        assert decision.found is not None
        if loop.proposal:
            open_plan = await self._placements.answered(loop.proposal)
            if open_plan is not None and open_plan.plan.replicas == plan.replicas:
                return
            await self._withdraw(loop)
        details = plan_pb2.TrafficProposal(
            gain=decision.gain,
            bound=decision.bound,
            unit=decision.unit,
            usd_per_h=decision.usd_per_hour,
            steps=_steps(decision.found, answered.plan),
            expire_time=timestamp(decision.expires_s),
        )
        spec = None
        if answered.record.body.HasField("spec"):  # else it was imported, and this one counts as imported, too
            spec = deepcopy(answered.record.body.spec)
            spec.workload_document.CopyFrom(document_of(decision.next.inputs.workload))
            if plan.objective.demand_rps is not None:
                spec.objective.demand_rps = plan.objective.demand_rps
        loop.proposal = await self._creation.propose(cluster, spec, decision.reason, found=plan, gains=details)

    async def _judge(self, cluster: str, loop: _Loop, answered: AnsweredPlan, now_s: float) -> None:
        """Take back a change after which fewer requests are within the limit, though the plan before would do."""
        judged = loop.judged
        if judged is None or now_s - loop.since_s < SETTLE_S + JUDGED_S:
            return
        loop.judged = None
        found = self._traffic.attainment(cluster, answered, loop.since_s + SETTLE_S)
        if judged.plan != loop.plan or found is None or found[1].ttft_s.count < LEAST_JUDGED:
            return
        attainment, traffic = found
        if attainment < judged.attainment - FALL and traffic.rate_per_s <= judged.capacity_rps:
            loop.wary_until_s = now_s + WARY_S
            _log.warning(
                "%s: %s is taken back: %.1f%% of the first tokens come in time, %.1f%% did before",
                *(cluster, loop.plan, 100 * attainment, 100 * judged.attainment),
            )
            await self._placements.roll_back(loop.plan)

    async def _withdraw(self, loop: _Loop) -> None:
        if loop.proposal:
            proposal, loop.proposal = loop.proposal, ""
            await self._placements.withdraw(proposal)

    async def _clear(self, cluster: str) -> None:
        """Withdraw what earlier leaders proposed because of traffic: their reasons are lost."""
        for name in await self._placements.open_proposals(cluster, of_traffic=True):
            await self._placements.withdraw(name)


def _of_cluster(answered: AnsweredPlan) -> PlanAndProblem:
    """Return the plan in force with the objective that was requested: out of a shortage that no plan of the fleet ends,
    the planner changes to one for the most goodput, from which cards are to go back all the same.
    """
    plan = answered.plan
    kind = next(
        (k for k, number in OBJECTIVE_KINDS.items() if number == answered.record.body.spec.objective.kind), None
    )
    if kind in (None, plan.objective.kind) or not plan.objective.maximises:
        return answered.found
    objective = replace(plan.objective, kind=kind, demand_rps=plan.result.value)
    return replace(answered.found, plan=replace(plan, objective=objective))


def _is_measured(alarm: Drift, looks: Iterable[Window], now_s: float) -> bool:
    """Return whether an alarm can be answered: lengths that are new are measured from some requests, for a minute."""
    ended = math.fsum(one.traffic.prompt_tokens.count for one in looks if one.start_s >= alarm.since_s - 1e-6)
    return not alarm.is_of_mix or ended >= LEAST_ENDED or now_s - alarm.since_s >= LEAST_ASK_S


def _solve_apart(posed: PosedReplan, settings: LoopSettings) -> Replanning:
    return call_apart(solve, posed, settings, limit_s=settings.search.time_limit_s + MARGIN_S)


def _desired(plan: Plan, in_force: Plan) -> list[traffic_pb2.DesiredReplicas]:
    wanted, there = Counter(structure_of(plan)), Counter(structure_of(in_force))
    return [
        traffic_pb2.DesiredReplicas(shape=shape, desired=wanted[shape], in_force=there[shape])
        for shape in sorted({*wanted, *there})
    ]


def _steps(found: Replanning, before: Plan) -> list[str]:
    """Return the way there in sentences."""
    sentences = list[str]()
    for step in found.transition.steps:
        plan = found.plan if step.action == "start" else before
        shapes = structure_of(replace(plan, replicas=tuple(plan.replicas[number] for number in step.replicas)))
        what = ", ".join(f"{count} × {shape}" for shape, count in shapes.items())
        takes = f" in up to {step.seconds:.0f} s" if step.seconds else ""
        flow = f"{step.capacity:.4g} → {step.capacity_after:.4g} requests/s"
        sentences.append(f"{step.action.capitalize()} {what}{takes}: {flow}.")
    return sentences
