"""What goes wrong with nodes and their answers: the planner's part. The change of heads itself: tests/protocol."""

from __future__ import annotations

import pytest

from hetis.planner.failures import Reason, ServiceError
from hetis.planner.fleet.writes import MOST_EVENTS
from hetis.v1 import change_pb2, replica_pb2, report_pb2
from tests.planner.fleet.samples import REPLICA, SETTINGS
from tests.planner.fleet.world import World

Phase = change_pb2.ChangePhase


def ready(world: World) -> str:
    """A change for which every node is ready, before the planner has received a's status."""
    change_id = world.propose()
    assert change_id
    world.flow()
    for node in ("b", "c"):
        world.agents[node].get_ready()
    world.flow()
    assert world.state(change_id) == "PREPARING"
    world.agents["a"].get_ready()
    return change_id


def test_a_node_refuses_to_prepare_and_all_are_told_to_abort(world: World) -> None:
    world.agents["c"].refuse_with = Reason.ERROR_REASON_KV_BLOCKS_EXHAUSTED
    change_id = world.propose()
    world.flow()
    assert world.state(change_id) == "ABORTED"
    failure = next(iter(world.store.tables.redispatches.rows.values())).body.failure
    assert failure.reason == Reason.ERROR_REASON_KV_BLOCKS_EXHAUSTED
    assert not world.engines.reserved
    world.check_healed()


def test_a_copy_fails_and_all_are_told_to_abort(world: World) -> None:
    change_id = world.propose()
    world.flow()
    world.agents["c"].fail_copy()
    world.flow()
    assert world.state(change_id) == "ABORTED"
    assert not world.engines.reserved
    world.check_healed()


def test_nobody_is_ready_in_time_and_the_change_is_called_off(world: World) -> None:
    change_id = world.propose()
    world.flow()
    world.live(31)
    world.flow()
    assert world.state(change_id) == "ABORTED"
    failure = next(iter(world.store.tables.redispatches.rows.values())).body.failure
    assert failure.reason == Reason.ERROR_REASON_PREPARE_EXPIRED


def test_the_node_of_the_primary_is_lost_and_the_replica_fails_and_the_change_waits_for_its_word(world: World) -> None:
    change_id = ready(world)
    world.hear("a")
    world.tell("a")
    assert change_id in world.engines.flipped
    world.disconnect("a")
    world.live(6, ("b", "c"))
    assert world.store.tables.replicas.rows[REPLICA].state == replica_pb2.REPLICA_STATE_FAILED
    assert world.state(change_id) == "COMMITTING"
    world.heal()
    assert world.store.tables.replicas.rows[REPLICA].state == replica_pb2.REPLICA_STATE_SERVING
    assert world.state(change_id) == "DONE"
    world.check_healed()


@pytest.mark.parametrize("is_restarted", [False, True])
def test_a_dead_node_that_leaves_the_document_does_not_serve_again(world: World, is_restarted: bool) -> None:
    world.disconnect("a")
    world.live(6, ("b", "c"))
    replicas = world.store.tables.replicas.rows
    assert replicas[REPLICA].state == replica_pb2.REPLICA_STATE_FAILED
    if is_restarted:
        world.restart_planner()
        for node in ("b", "c"):
            world.connect(node)
    world.planner.nodes = ("b", "c")
    world.planner.reread(world.now_s)
    world.settle()
    world.live(6, ("b", "c"))
    assert replicas[REPLICA].state == replica_pb2.REPLICA_STATE_FAILED
    world.planner.nodes = ("a", "b", "c")
    world.planner.reread(world.now_s)
    world.heal()
    assert replicas[REPLICA].state == replica_pb2.REPLICA_STATE_SERVING
    world.check_healed()


def test_an_attention_worker_is_lost_and_the_replica_is_degraded_and_told_so(world: World) -> None:
    world.disconnect("c")
    world.live(6, ("a", "b"))
    world.flow()
    record = world.store.tables.replicas.rows[REPLICA]
    assert record.state == replica_pb2.REPLICA_STATE_DEGRADED
    assignment = world.agents["a"].held[REPLICA][2]
    lost = replica_pb2.DeviceCondition(device="c/0", status=report_pb2.DEVICE_STATUS_LOST)
    assert list(assignment.conditions) == [lost] == list(record.body.conditions)
    world.heal()
    assert world.store.tables.replicas.rows[REPLICA].state == replica_pb2.REPLICA_STATE_SERVING
    assert not world.agents["a"].held[REPLICA][2].conditions
    world.check_healed()


def test_an_old_planner_is_refused_by_an_agent_that_has_seen_a_newer_one(world: World) -> None:
    old = world.planner
    world.restart_planner()
    world.connect("a")
    world.flow()
    assert world.agents["a"].epoch == 2
    with pytest.raises(ServiceError) as caught:
        old.cluster.open("a", world.agents["a"].hello(), now_s=0.0, time_s=0.0)
    assert caught.value.reason == Reason.ERROR_REASON_STALE_EPOCH
    assert caught.value.metadata == {"epoch": "1", "newest_epoch": "2"}


def test_a_delta_without_an_answer_is_sent_again_under_its_nonce(world: World) -> None:
    change_id = world.propose()
    first = world.to_agent["c"].pop(0)  # lost, although its stream continues
    world.pass_time(SETTINGS.answer_s / 10)
    assert not world.to_agent["c"]
    for _ in range(12):
        for agent in world.agents.values():
            agent.heartbeat()
        for node in world.agents:
            while world.agents[node].sent:
                world.hear(node)
        world.pass_time(1.0)
    assert world.to_agent["c"][0].delta == first.delta
    for _ in range(4):
        for agent in world.agents.values():
            agent.get_ready()
        world.flow()
    assert world.state(change_id) == "DONE"


def test_two_changes_of_a_replica_do_not_run_at_once(world: World) -> None:
    assert world.propose()
    assert not world.propose()


def test_an_agent_that_lost_what_it_was_told_is_told_again_when_it_is_back(world: World) -> None:
    change_id = world.propose()
    world.flow()
    world.agents["c"].changes.clear()
    world.connect("c")
    world.flow()
    assert list(world.agents["c"].changes) == [change_id]


def test_what_happened_to_a_replica_is_stored_and_bounded(world: World) -> None:
    def events() -> list[tuple[str, str]]:
        stored = world.store.tables.replicas.rows[REPLICA].body.events
        state, goal = replica_pb2.ReplicaState, replica_pb2.AssignmentGoal
        return [(state.Name(one.state)[14:], goal.Name(one.goal)[16:]) for one in stored]

    came_up = [("STARTING", "LOAD"), ("STARTING", "SERVE"), ("SERVING", "SERVE")]
    assert events() == came_up
    world.disconnect("a")
    world.pass_time(SETTINGS.lease_s + 1.0)
    assert events()[3:] == [("FAILED", "SERVE")]
    last = world.store.tables.replicas.rows[REPLICA].body.events[-1]
    assert "node a" in last.failure.message
    for _ in range(MOST_EVENTS):
        world.heal()
        world.disconnect("a")
        world.pass_time(SETTINGS.lease_s + 1.0)
    assert len(events()) == MOST_EVENTS
    assert events()[-1][0] == "FAILED"
