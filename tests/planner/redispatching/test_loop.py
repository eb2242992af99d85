"""The loop with a fleet that exists only in memory, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest

from hetis.planner.convert.stages import snapshot_from_proto, stage_from_proto
from hetis.planner.failures import Reason, ServiceError
from hetis.planner.fleet.agents.head_maps import HeadMaps
from hetis.planner.fleet.redispatching.loop import RedispatchLoop
from hetis.solver.redispatch.triggers import makespan_s
from hetis.v1 import cluster_pb2, head_map_pb2, redispatch_pb2, report_pb2
from tests.planner.redispatching.messages import apply_moves, head_map_message, load_message, stage_message
from tests.planner.redispatching.stages import REPLICA, Replica
from tests.solver.redispatch.instances import random_problem

DONE, ABORTED = redispatch_pb2.REDISPATCH_STATE_DONE, redispatch_pb2.REDISPATCH_STATE_ABORTED


@dataclass
class LiveFleet:
    """One replica of four devices, its engine, and the loop that watches it."""

    policy: cluster_pb2.ClusterPolicy = field(default_factory=cluster_pb2.ClusterPolicy)
    slack: float = 5.0
    seed: int = 3
    now_s: float = 1000.0
    num_reads: int = 0
    sent: list[redispatch_pb2.Redispatch] = field(default_factory=list)
    slowness: dict[str, float] = field(default_factory=dict)
    is_reachable: bool = True
    fails: str = ""  # "before" the next change has begun, or "after"
    last_generation: int = 0

    def __post_init__(self) -> None:
        problem = random_problem(self.seed, num_devices=4, num_requests=40, head_groups=8, slack=self.slack)
        self.model, self.map = stage_message(problem), head_map_message(problem.snapshot)
        self.replica = Replica([self.model], generation=5)
        self.loop = RedispatchLoop(self, clock=self)

    # --- time, and the fleet

    def monotonic(self) -> float:
        return self.now_s

    def time(self) -> float:
        return 1.7e9 + self.now_s

    def replica_view(self, name: str) -> Replica | None:
        return self.replica if name == REPLICA else None

    def policy_of(self, cluster: str) -> cluster_pb2.ClusterPolicy:
        assert cluster == "clusters/c"
        return self.policy

    async def read_head_maps(self, replica: str, timeout_s: float) -> HeadMaps:
        self.num_reads += 1
        if not self.is_reachable:
            raise ServiceError(Reason.ERROR_REASON_ENGINE_UNREACHABLE, "gone")
        copied = head_map_pb2.HeadMap.FromString(self.map.SerializeToString())
        return HeadMaps(replica=replica, generation=self.replica.generation, step=1, maps=(copied,))

    async def redispatch(self, redispatch: redispatch_pb2.Redispatch) -> None:
        assert not self.replica.redispatch, "two changes at once"
        fails, self.fails = self.fails, ""
        if fails == "before":
            raise ServiceError(Reason.ERROR_REASON_DEVICE_UNAVAILABLE, "node d2 is not ready")
        self.sent.append(redispatch)
        if redispatch.state == redispatch_pb2.REDISPATCH_STATE_PREPARING:
            self.last_generation = max(self.last_generation, self.replica.generation) + 1
            redispatch.change.generation = self.last_generation
            self.replica.redispatch = redispatch.name
        if fails == "after":
            raise ServiceError(Reason.ERROR_REASON_STORE_UNAVAILABLE, "the disk is full")

    def is_under_way(self, redispatch: redispatch_pb2.Redispatch) -> bool:
        return self.replica.redispatch == redispatch.name

    # --- events

    def end(self, state: redispatch_pb2.RedispatchState.ValueType = DONE) -> None:
        """End the change in progress."""
        redispatch = self.sent[-1]
        redispatch.state = state
        if state == DONE:
            assert redispatch.change.base_generation == self.replica.generation
            apply_moves(self.map, redispatch.change.moves)
            self.replica.generation = redispatch.change.generation
        self.replica.redispatch = ""
        self.loop.redispatch_ended(redispatch)

    def report(self) -> None:
        """Deliver a report of the primary's node."""
        slowness = {device.name: self.slowness.get(device.name, 1.0) for device in self.model.devices}
        load = load_message(self.map, self.model, slowness=slowness)
        report = report_pb2.ReplicaReport(
            replica=REPLICA, is_primary=True, num_running=len(self.map.requests), stages=[load]
        )
        self.loop.replica_reported(REPLICA, report)

    async def seconds(self, num: int) -> None:
        """Report every second as long as the loop sends nothing; changes end within the second."""
        for _ in range(num):
            self.now_s += 1
            self.report()
            await self.loop.step()
            if self.replica.redispatch:
                self.end()

    async def settle(self) -> None:
        """Run from the random placement to one with nothing left to move."""
        before = None
        while before != len(self.sent):
            before = len(self.sent)
            await self.seconds(20)
        self.sent.clear()
        self.num_reads = 0

    def makespan_s(self) -> float:
        """Return the measured makespan, with the devices' slowness."""
        return makespan_s(snapshot_from_proto(self.map, stage_from_proto(self.model, slowness=self.slowness)))


def in_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Run a test in a separate event loop."""

    def run() -> None:
        asyncio.run(test())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


@in_loop
async def test_an_unbalanced_replica_is_balanced_and_then_left_alone() -> None:
    fleet = LiveFleet()
    before_s = fleet.makespan_s()
    await fleet.seconds(30)
    assert fleet.sent
    first = fleet.sent[0]
    assert fleet.makespan_s() < before_s
    assert first.makespan_before_s == pytest.approx(before_s)
    assert first.makespan_after_s < first.makespan_before_s
    assert first.num_moves == len(first.change.moves) > 0
    assert first.kv_bytes == pytest.approx(sum(move.kv_bytes for move in first.change.moves))
    assert first.bound_s <= first.objective_s * (1 + 1e-9)
    assert first.objective_s < first.stay_s
    assert first.triggers[0].kind == redispatch_pb2.TRIGGER_KIND_DEVIATION
    assert first.triggers[0].value > first.triggers[0].limit == 0.5
    assert (first.change.base_generation, first.change.generation) == (5, 6)
    assert first.change.prepare_timeout.seconds == 30
    assert first.name == f"clusters/c/redispatches/{first.change.change_id}"
    num = len(fleet.sent)
    await fleet.seconds(200)
    assert len(fleet.sent) == num


@in_loop
async def test_under_steady_load_head_maps_are_not_even_read() -> None:
    fleet = LiveFleet()
    await fleet.settle()
    await fleet.seconds(300)
    assert (fleet.sent, fleet.num_reads) == ([], 0)


@in_loop
async def test_a_device_that_becomes_slow_gives_rise_to_one_redispatch_that_helps() -> None:
    fleet = LiveFleet()
    await fleet.settle()
    fleet.slowness = {"d3": 2.0}
    before_s = fleet.makespan_s()
    await fleet.seconds(3)
    assert fleet.sent == []  # three reports may be noise
    await fleet.seconds(60)
    (only,) = fleet.sent
    assert {trigger.kind for trigger in only.triggers} >= {redispatch_pb2.TRIGGER_KIND_CHANGED}
    assert only.makespan_before_s == pytest.approx(before_s)
    assert only.makespan_after_s == pytest.approx(fleet.makespan_s())
    assert fleet.makespan_s() < 0.6 * before_s


@in_loop
async def test_an_alarm_that_nothing_can_be_done_about_is_looked_at_once() -> None:
    fleet = LiveFleet(policy=cluster_pb2.ClusterPolicy(high_water=0.01))
    await fleet.settle()
    await fleet.seconds(300)
    assert fleet.num_reads == 0
    assert fleet.sent == []


@in_loop
async def test_advice_is_recorded_once_and_nothing_moves() -> None:
    fleet = LiveFleet(policy=cluster_pb2.ClusterPolicy(redispatch=cluster_pb2.REACTION_MODE_ADVISORY))
    await fleet.seconds(100)
    (advice,) = fleet.sent
    assert advice.state == redispatch_pb2.REDISPATCH_STATE_ADVISED
    assert advice.HasField("end_time")
    assert fleet.replica.redispatch == ""


@in_loop
async def test_a_cluster_that_forbids_it_is_not_watched() -> None:
    fleet = LiveFleet(policy=cluster_pb2.ClusterPolicy(redispatch=cluster_pb2.REACTION_MODE_OFF))
    await fleet.seconds(30)
    assert (fleet.sent, fleet.num_reads) == ([], 0)


@in_loop
async def test_looks_are_an_interval_apart_also_when_changes_end_at_once() -> None:
    policy = cluster_pb2.ClusterPolicy(redispatch_kv_bytes=20_000_000)
    policy.redispatch_interval.seconds = 10
    fleet = LiveFleet(policy=policy)
    times = list[float]()
    for _ in range(100):
        await fleet.seconds(1)
        times += [fleet.now_s] * (len(fleet.sent) - len(times))
    assert len(times) >= 2
    assert all(later - earlier >= 10 for earlier, later in pairwise(times))
    assert all(redispatch.kv_bytes <= 20_000_000 for redispatch in fleet.sent)


@in_loop
async def test_there_are_never_two_changes_of_a_replica_at_once() -> None:
    fleet = LiveFleet()
    for _ in range(100):
        fleet.now_s += 1
        fleet.report()
        await fleet.loop.step()
    assert len(fleet.sent) == 1
    fleet.end()
    await fleet.seconds(30)
    generations = [redispatch.change.generation for redispatch in fleet.sent]
    assert generations == sorted(set(generations))


@in_loop
async def test_an_aborted_change_is_tried_again_ever_later_under_a_new_number() -> None:
    fleet = LiveFleet()
    times = list[float]()
    for _ in range(200):
        fleet.now_s += 1
        fleet.report()
        await fleet.loop.step()
        if fleet.replica.redispatch:
            times.append(fleet.now_s)
            fleet.end(ABORTED)
    waits = [later - earlier for earlier, later in pairwise(times)]
    assert waits == sorted(waits)
    assert waits[:3] == [10, 20, 40]
    assert [one.change.base_generation for one in fleet.sent] == [5] * len(times)
    assert [one.change.generation for one in fleet.sent] == [6 + n for n in range(len(times))]


@in_loop
async def test_a_change_that_could_not_be_stored_yet_is_left_to_the_fleet_and_one_that_was_refused_is_not() -> None:
    fleet = LiveFleet()
    fleet.fails = "before"
    for _ in range(60):
        fleet.now_s += 1
        fleet.report()
        await fleet.loop.step()
        if fleet.sent:
            break
        fleet.fails = fleet.fails or "after"
    (change,) = fleet.sent
    assert change.state == redispatch_pb2.REDISPATCH_STATE_PREPARING
    for _ in range(60):
        fleet.now_s += 1
        fleet.report()
        await fleet.loop.step()
    assert fleet.sent == [change], "it is under way"
    fleet.end()
    await fleet.seconds(30)
    assert fleet.replica.generation >= change.change.generation


@in_loop
async def test_a_draining_device_is_emptied() -> None:
    fleet = LiveFleet()
    await fleet.settle()
    fleet.replica.conditions = {"d2/0": report_pb2.DEVICE_STATUS_DRAINING}
    fleet.loop.replica_changed(REPLICA)
    await fleet.seconds(60)
    assert fleet.sent
    assert all(2 not in request.owners for request in fleet.map.requests)
    assert {trigger.kind for trigger in fleet.sent[0].triggers} >= {redispatch_pb2.TRIGGER_KIND_DRAINING}


@in_loop
async def test_a_lost_device_makes_the_loop_look_without_a_report() -> None:
    fleet = LiveFleet()
    await fleet.settle()
    fleet.report()
    gone = [request for request in fleet.map.requests if 2 in request.owners]
    for request in gone:
        fleet.map.requests.remove(request)
    fleet.replica.conditions = {"d2/0": report_pb2.DEVICE_STATUS_LOST}
    fleet.loop.replica_changed(REPLICA)
    fleet.now_s += 60
    await fleet.loop.step()
    assert fleet.num_reads == 1
    assert all(move.target != "d2" for redispatch in fleet.sent for move in redispatch.change.moves)


@in_loop
async def test_head_maps_that_cannot_be_read_are_asked_for_an_interval_later() -> None:
    fleet = LiveFleet(is_reachable=False)
    await fleet.seconds(50)
    assert 9 <= fleet.num_reads <= 11
    fleet.is_reachable = True
    await fleet.seconds(10)
    assert fleet.sent


@in_loop
async def test_what_changed_while_moves_were_worked_out_calls_them_off() -> None:
    fleet = LiveFleet()
    read = fleet.read_head_maps

    async def read_and_change(replica: str, timeout_s: float) -> HeadMaps:
        maps = await read(replica, timeout_s)
        fleet.replica.generation += 1
        return maps

    fleet.read_head_maps = read_and_change  # type: ignore[method-assign]
    fleet.now_s += 1
    fleet.report()
    await fleet.loop.step()
    assert (fleet.num_reads, fleet.sent) == (1, [])
    fleet.read_head_maps = read  # type: ignore[method-assign]
    await fleet.seconds(10)
    assert fleet.sent


@in_loop
async def test_the_loop_runs_by_itself() -> None:
    fleet = LiveFleet()
    task = asyncio.create_task(fleet.loop.run())
    await asyncio.sleep(0)
    fleet.report()
    async with asyncio.timeout(20):
        while not fleet.sent:
            await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
