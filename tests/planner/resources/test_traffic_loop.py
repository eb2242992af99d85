"""The loop of a cluster: when it asks, what it proposes, what it changes itself, and what it takes back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any, cast

import pytest

from hetis.planner.convert.traffic import MINUTE_S, TrafficWindow
from hetis.planner.failures import Reason, ServiceError
from hetis.planner.fleet.traffic import TrafficWindows
from hetis.planner.fleet.views import Clock
from hetis.planner.loop.decision import Decision, InForce, Verdict
from hetis.planner.loop.drift import Drift, Expected
from hetis.planner.loop.settings import LoopSettings
from hetis.planner.resources.traffic_loop import JUDGED_S, SETTLE_S, STEP_S, TrafficLoop
from hetis.planner.use_cases.robustness.fixed_plan import structure_of
from hetis.planner.use_cases.saved_plans import PlanAndProblem
from hetis.planner.use_cases.sources import Inputs
from hetis.solver.plan import ObjectiveKind, Plan
from hetis.solver.traffic import SECONDS, TOKENS, Histogram, TrafficSketch
from hetis.v1 import cluster_pb2, plan_pb2
from tests.planner.use_cases.robustness.studied import planned, posed

CLUSTER = "clusters/a"
START_S = 100 * MINUTE_S
OFF, ADVISORY, AUTOMATIC = (
    cluster_pb2.REACTION_MODE_OFF,
    cluster_pb2.REACTION_MODE_ADVISORY,
    cluster_pb2.REACTION_MODE_AUTOMATIC,
)
ACTIVE = plan_pb2.ACTIVATION_STATE_ACTIVE


class Hand(Clock):
    """``step_s``: by how much the machine's clock was set forward since the start."""

    now_s, step_s = START_S, 0.0

    def time(self) -> float:
        return self.now_s + self.step_s

    def monotonic(self) -> float:
        return self.now_s


def found(plan: Plan) -> PlanAndProblem:
    problem, plan = posed("paper"), replace(plan, result=replace(plan.result, value=4.0))
    inputs = Inputs(cluster=problem.cluster, model=problem.model, workload=problem.workload, profiles=problem.profiles)
    return PlanAndProblem(plan=plan, inputs=inputs, problem=problem, warnings=())


def other_plan(number: int = 1) -> Plan:
    """Return a plan that differs from the one in force."""
    plan = planned("paper")
    return replace(plan, replicas=tuple(replace(one, micro_batch=one.micro_batch + number) for one in plan.replicas))


@cache
def planned_lengths() -> list[Histogram]:
    """Return the lengths of one planned request on average."""
    bins = posed("paper").workload.bins
    weight = sum(one.weight for one in bins)
    return [
        sum(
            (Histogram.of_values(TOKENS, [getattr(one, name)]).times(one.weight / weight) for one in bins),
            Histogram(scale=TOKENS),
        )
        for name in ("prompt_tokens", "output_tokens")
    ]


class World:
    """A cluster with a plan in force, whose traffic and decisions the test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, mode: cluster_pb2.ReactionMode.ValueType = AUTOMATIC) -> None:
        self.clock = Hand()
        self.policy = cluster_pb2.ClusterPolicy(traffic=mode)
        self.windows = TrafficWindows()
        self.plans = {"plans/old": planned("paper")}
        self.in_force, self.earlier, self.since_s = "plans/old", "", START_S
        self.proposals = dict[str, plan_pb2.TrafficProposal]()
        self.activated, self.rolled_back, self.withdrawn = list[str](), list[str](), list[str]()
        self.asked = list[tuple[float, object]]()
        self.answer: Callable[[], Decision] = lambda: self.keep()
        self.attained = 1.0
        self.num, self.firsts = 0.0, Histogram(scale=SECONDS)
        monkeypatch.setattr("hetis.planner.resources.traffic_loop.decide", self._decide)
        fleet = SimpleNamespace(
            cluster_names=[CLUSTER], policy_of=lambda name: self.policy, has_plan=lambda name: bool(self.in_force)
        )
        views = SimpleNamespace(live={}, declared=SimpleNamespace(value=posed("paper").cluster))
        self.loop = TrafficLoop(
            cast(Any, fleet),
            cast(Any, SimpleNamespace(read=_later(lambda name: views))),
            cast(Any, self),
            cast(Any, self),
            cast(Any, self),
            self.clock,
        )

    # --- decisions

    def _decide(self, history: object, in_force: InForce, settings: LoopSettings, **given: Any) -> Decision:
        self.told = in_force
        self.asked.append((self.clock.now_s, given["drift"]))
        return self.answer()

    def keep(self) -> Decision:
        return Decision(
            verdict=Verdict.KEEP, reason="Nothing to gain.", made_s=self.clock.time(),
            expires_s=self.clock.time() + 300,
            demand_rps=self.rate, capacity_rps=4.0, expected=Expected(low_rps=0.5, high_rps=4.0),
            next=found(self.plans[self.in_force]),
        )  # fmt: skip

    def change(self, plan: Plan) -> Decision:
        step = SimpleNamespace(action="start", replicas=(0,), seconds=40.0, capacity=1.5, capacity_after=3.0)
        replanning = SimpleNamespace(plan=plan, transition=SimpleNamespace(steps=(step,)))
        return replace(
            self.keep(), verdict=Verdict.CHANGE, reason="More arrives.", found=cast(Any, replanning), gain=1.0,
            bound=1.25, unit="requests/s", usd_per_hour=0.5,
        )  # fmt: skip

    # --- MeasuredTraffic

    def now(self, cluster: str) -> Any:
        return SimpleNamespace(speeds=())

    async def windows_of(self, cluster: str) -> TrafficWindows:
        return self.windows

    async def plan_in_force(self, cluster: str) -> Any:
        assert self.in_force  # otherwise the store need not be read
        body = plan_pb2.Plan()
        body.activate_time.FromSeconds(int(self.since_s))
        body.spec.objective.kind = self.requested
        record = SimpleNamespace(name=self.in_force, body=body, activation=ACTIVE)
        return await self._answered(self.in_force, record)

    def attainment(self, cluster: str, plan: object, since_s: float) -> Any:
        times = Histogram(scale=SECONDS, counts=(100.0,) + (0.0,) * len(SECONDS.edges))
        return self.attained, TrafficSketch(seconds=100.0, arrivals=100.0 * self.rate, ttft_s=times)

    # --- StoredPlacements

    async def _answered(self, name: str, record: object = None) -> Any:
        plan = found(self.plans[name])
        return SimpleNamespace(record=record, plan=plan.plan, problem=plan.problem, found=plan)

    async def answered(self, name: str) -> Any:
        return await self._answered(name) if name in self.plans else None

    async def open_proposals(self, cluster: str, *, of_traffic: bool) -> list[str]:
        assert of_traffic
        return ["plans/of-an-earlier-leader"]

    async def withdraw(self, name: str) -> None:
        self.withdrawn.append(name)

    async def activate(self, name: str) -> None:
        self.earlier, self.in_force, self.since_s = self.in_force, name, self.clock.time()
        self.activated.append(name)

    async def roll_back(self, name: str) -> None:
        self.in_force, self.since_s = self.earlier, self.clock.time()
        self.rolled_back.append(name)

    # --- PlanCreation

    async def propose(self, cluster: str, spec: object, reason: str, *, found: Plan, gains: Any) -> str:
        name = f"plans/new-{len(self.proposals)}"
        self.plans[name], self.proposals[name] = found, gains
        return name

    # --- time

    rate, ttft_s = 2.0, 0.1
    requested = plan_pb2.OBJECTIVE_KIND_UNSPECIFIED

    async def pass_time(self, seconds: float) -> None:
        for _ in range(round(seconds / STEP_S)):
            for _ in range(4):
                self.clock.now_s += STEP_S / 4
                self.num += self.rate * STEP_S / 4
                prompts, outputs = (one.times(self.num) for one in planned_lengths())
                clock_s = self.clock.now_s - START_S
                self.firsts += Histogram.of_values(SECONDS, [self.ttft_s]).times(self.rate * STEP_S / 4)
                reading = TrafficSketch(
                    seconds=clock_s,
                    arrivals=self.num,
                    prompt_tokens=prompts,
                    output_tokens=outputs,
                    ttft_s=self.firsts,
                )
                self.windows.take("r", posed("paper").model.name, reading, self.clock.time())
            self.windows.complete(self.clock.time())
            self.windows.drop(self.clock.time())
            await self.loop.step()


def _later(function: Callable[[str], Any]) -> Callable[[str], Any]:
    async def call(name: str) -> Any:
        return function(name)

    return call


async def test_it_asks_every_few_minutes_and_forgets_what_earlier_leaders_proposed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(monkeypatch)
    await world.pass_time(1000)
    assert world.withdrawn == ["plans/of-an-earlier-leader"]
    times_s = [at for at, _ in world.asked]
    assert len(times_s) == 3
    assert all(drift is None for _, drift in world.asked)
    decision = world.loop.decision_of(CLUSTER)
    assert decision is not None
    assert decision.reason == "Nothing to gain."
    wanted = {one.shape: (one.desired, one.in_force) for one in decision.desired}
    assert wanted == {shape: (count, count) for shape, count in structure_of(planned("paper")).items()}


async def test_traffic_that_doubles_is_noticed_within_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    await world.pass_time(600)
    world.asked.clear()
    world.rate = 8.0  # at most 4 are expected
    await world.pass_time(60)
    ((_, drift),) = world.asked
    assert "requests/s arrive, 0.5 to 4 were expected" in str(drift)


async def test_traffic_that_doubles_is_noticed_while_another_proposal_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, ADVISORY)
    world.answer = lambda: world.change(other_plan())
    await world.pass_time(600)
    world.asked.clear()
    world.rate = 8.0
    await world.pass_time(60)
    assert len(world.asked) == 1


async def test_an_alarm_of_another_kind_does_not_wait_for_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    await world.pass_time(600)
    world.asked.clear()
    world.rate = 0.01  # at least 0.5 are expected
    while not any(drift for _, drift in world.asked):
        await world.pass_time(STEP_S)
    world.rate = 12.0
    await world.pass_time(40)
    rises = [drift.rises for _, drift in world.asked if isinstance(drift, Drift)]
    assert rises[0] is False
    assert rises[-1] is True


async def test_broken_limits_are_asked_about_within_a_minute_and_then_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a rate at which a minute tells nothing of its rise, and the model says that the plan serves it."""
    world = World(monkeypatch)
    world.rate = 1.0
    await world.pass_time(600)
    world.asked.clear()
    world.ttft_s = 100.0
    await world.pass_time(60)
    ((_, drift),) = world.asked
    assert "of the first tokens of the last minute came after" in str(drift)
    await world.pass_time(250)
    assert len(world.asked) == 1


async def test_the_last_alarm_about_the_rate_is_told_with_the_next_question(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)

    def answer() -> Decision:
        kept = world.keep()
        more = replace(kept, capacity_rps=20.0, expected=Expected(low_rps=0.5, high_rps=20.0))
        return kept if world.asked[-1][1] is None else more

    world.answer = answer
    await world.pass_time(600)
    world.rate = 8.0
    await world.pass_time(400)
    alarm, again = world.asked[-2:]
    assert alarm[1] is not None
    assert again == (alarm[0] + 300, alarm[1])


async def test_a_shortage_that_comes_slowly_is_asked_about_within_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    world.answer = lambda: replace(world.keep(), expected=Expected(low_rps=0.0, high_rps=1e3))  # no drift
    await world.pass_time(600)
    asked = len(world.asked)
    world.rate = 5.0  # the plan keeps its limits up to 4
    await world.pass_time(160)
    assert len(world.asked) > asked
    assert world.asked[-1][1] is None


async def test_the_objective_is_the_requested_one_after_a_plan_for_all_that_the_fleet_serves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else no card would go back once traffic falls."""
    world = World(monkeypatch)
    world.requested = plan_pb2.OBJECTIVE_KIND_COST
    await world.pass_time(400)
    assert planned("paper").objective.kind is ObjectiveKind.GOODPUT
    objective = world.told.found.plan.objective
    assert (objective.kind, objective.demand_rps) == (ObjectiveKind.COST, 4.0)


@pytest.mark.parametrize("step_s", [3600.0, -3600.0])
async def test_a_step_of_the_clock_neither_stops_the_questions_nor_makes_alarms(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, step_s: float
) -> None:
    """In the past nothing was asked for an hour after a step back, whatever came, and one forward was a fall."""
    world = World(monkeypatch)
    await world.pass_time(1000)
    world.asked.clear()
    world.clock.step_s = step_s
    await world.pass_time(900)
    assert [drift for _, drift in world.asked] == [None] * 3
    assert f"the clock of this machine was set by {step_s:+.0f} s" in caplog.text
    last = [
        one.traffic.rate_per_s for one in world.windows.windows(least_s=30) if one.start_s > world.clock.time() - 600
    ]
    assert last == pytest.approx([world.rate] * len(last), rel=0.1)
    assert len(last) >= 8
    world.asked.clear()
    world.rate = 8.0
    await world.pass_time(60)
    ((_, drift),) = world.asked
    assert drift is not None


async def test_a_plan_activated_by_a_leader_whose_clock_was_ahead_is_asked_about(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(monkeypatch)
    world.since_s = START_S + 3600
    await world.pass_time(400)
    assert world.asked


async def test_off_asks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, OFF)
    await world.pass_time(1000)
    assert world.asked == []
    assert world.loop.decision_of(CLUSTER) is None


async def test_advice_is_one_proposal_that_says_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, ADVISORY)
    world.answer = lambda: world.change(other_plan())
    await world.pass_time(1500)
    assert len(world.asked) == 5  # the same answer each time it expired
    ((name, gains),) = world.proposals.items()
    assert (gains.gain, gains.bound, gains.unit, gains.usd_per_h) == (1.0, 1.25, "requests/s", 0.5)
    assert gains.steps[0].startswith("Start 1 × ")
    assert gains.steps[0].endswith(" in up to 40 s: 1.5 → 3 requests/s.")
    assert world.activated == []
    decision = world.loop.decision_of(CLUSTER)
    assert decision is not None
    assert decision.plan == name
    world.answer = lambda: world.change(other_plan(2))
    await world.pass_time(400)
    assert list(world.proposals) == ["plans/new-0", "plans/new-1"]
    assert world.withdrawn[1:] == ["plans/new-0"]
    world.answer = world.keep
    await world.pass_time(400)
    assert world.withdrawn[1:] == ["plans/new-0", "plans/new-1"]


async def test_changes_are_made_as_often_as_the_policy_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    world.policy.traffic_changes_per_hour = 2
    world.answer = lambda: world.change(other_plan(len(world.plans)))
    await world.pass_time(3000)
    assert world.activated == ["plans/new-0", "plans/new-1"]
    await world.pass_time(2000)
    assert len(world.activated) == 4


@pytest.mark.parametrize(("rate", "taken_back"), [(2.0, True), (5.0, False)], ids=["as before", "more traffic"])
async def test_a_change_that_made_it_worse_is_taken_back(
    monkeypatch: pytest.MonkeyPatch, rate: float, taken_back: bool
) -> None:
    world = World(monkeypatch)
    world.answer = lambda: world.keep() if world.in_force == "plans/new-0" else world.change(other_plan())
    await world.pass_time(400)
    assert world.activated == ["plans/new-0"]
    world.attained, world.rate = 0.8, rate  # the plan before serves 4
    await world.pass_time(SETTLE_S + JUDGED_S)
    assert world.rolled_back == (["plans/new-0"] if taken_back else [])
    await world.pass_time(1500)
    assert world.activated == ["plans/new-0"]  # from now on it advises
    if taken_back:
        decision = world.loop.decision_of(CLUSTER)
        assert decision is not None
        assert decision.plan


async def test_an_error_is_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)

    def fails() -> Decision:
        raise ServiceError(Reason.ERROR_REASON_INTERNAL, "no") if len(world.asked) == 1 else ValueError("a bug")

    world.answer = fails
    await world.pass_time(1000)
    assert len(world.asked) == 3


async def test_a_window_of_another_model_is_not_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    traffic = TrafficSketch(seconds=60.0, arrivals=60.0)
    other = TrafficWindow(model="other", span_s=MINUTE_S, start_s=START_S, traffic=traffic)
    world.windows = TrafficWindows([other])
    world.clock.now_s += 600
    await world.loop.step()
    assert world.asked == []
