"""The agent's side of the protocol, rule by rule: streams and assignments."""

from __future__ import annotations

import pytest

from hetis.runtime.agent.outbox import Persist, Send
from hetis.v1.agent_service_pb2 import AgentCapability, ConnectNodeRequest, ConnectNodeResponse, Goodbye
from hetis.v1.change_pb2 import ChangePhase
from hetis.v1.executor_service_pb2 import (
    AbortMovesRequest,
    AbortMovesResponse,
    ApplyAssignmentRequest,
    WatchReportsResponse,
)
from hetis.v1.failure_pb2 import ErrorReason
from hetis.v1.report_pb2 import AssignmentState, DeviceStatus, ReplicaReport
from tests.runtime.agent.builders import (
    ABORTED,
    FLIPPED,
    LOADED,
    PLANNER,
    REPLICA,
    STEERED,
    Bench,
    Planner,
    acks,
    assignment,
    change,
    duration,
    failure,
    kv,
    nack_reason,
    phases,
    prepared,
    stage_model,
    welcome,
)

# --- stream and epochs


def test_the_first_message_is_a_hello_with_everything_held(bench: Bench) -> None:
    what = prepared(bench)
    bench.boot()
    hello = bench.core.hello()
    assert (hello.sequence, hello.epoch, hello.hello.newest_epoch) == (1, 0, 1)
    assert [(held.replica, held.generation, held.epoch) for held in hello.hello.replicas] == [(REPLICA, 1, 1)]
    assert [(status.change_id, status.phase) for status in hello.hello.changes] == [
        (what.change_id, ChangePhase.CHANGE_PHASE_READY)
    ]


def test_messages_are_numbered_and_carry_the_epoch_of_the_welcome(bench: Bench) -> None:
    assert [message.sequence for message in bench.sent] == list(range(2, 2 + len(bench.sent)))
    assert {message.epoch for message in bench.sent} == {1}


def test_nothing_is_sent_before_the_welcome() -> None:
    bench = Bench()
    bench.core.hello()
    assert not bench.tick(60)
    bench.hear(PLANNER.assign())
    assert bench.ended[0].failure.reason == ErrorReason.ERROR_REASON_PROTOCOL_VIOLATION  # type: ignore[union-attr]
    assert not bench.sent


def test_an_older_planner_changes_nothing_also_after_a_restart(bench: Bench) -> None:
    bench.connect(epoch=5)
    bench.boot()
    bench.core.hello()
    bench.hear(welcome(epoch=4))
    assert bench.ended[-1].failure.reason == ErrorReason.ERROR_REASON_STALE_EPOCH  # type: ignore[union-attr]
    bench.connect(epoch=5)
    assert nack_reason(bench.hear(Planner(4).assign(generation=9))) == "STALE_EPOCH"
    assert bench.core.held()[0].generation == 1


def test_a_delta_of_an_old_planner_on_a_live_stream_is_refused_and_changes_nothing(bench: Bench) -> None:
    what = prepared(bench)
    bench.connect(epoch=5)
    before, calls = dict(bench.disk), dict(bench.calls)
    old = Planner(4)
    deltas = [
        old.assign(generation=9),
        old.remove(9),
        old.prepare(change()),
        old.commit(what),  # type: ignore[arg-type]
        old.abort(what),  # type: ignore[arg-type]
        old.resolved(what, ABORTED),  # type: ignore[arg-type]
    ]
    for delta in deltas:
        said = bench.hear(delta)
        assert nack_reason(said) == "STALE_EPOCH"
        assert said[-1].nack.failure.metadata["newest_epoch"] == "5"
        assert bench.ended[-1].failure.reason == ErrorReason.ERROR_REASON_STALE_EPOCH  # type: ignore[union-attr]
        assert (bench.disk, bench.calls) == (before, calls)
        bench.connect(epoch=5)


def test_an_engine_that_obeyed_a_newer_planner_fences_the_present_one(bench: Bench) -> None:
    bench.do(bench.core.on_engine_report(WatchReportsResponse(engine_id="e", newest_epoch=7), bench.now_s))
    assert bench.ended[-1].failure.reason == ErrorReason.ERROR_REASON_STALE_EPOCH  # type: ignore[union-attr]
    assert bench.core.newest_epoch == 7


def test_a_goodbye_ends_the_stream_and_nothing_else(bench: Bench) -> None:
    bench.hear(ConnectNodeResponse(epoch=1, goodbye=Goodbye(reconnect_within=duration(3), reason="drain")))
    assert (bench.ended[-1].failure, bench.ended[-1].within_s) == (None, 3.0)
    assert bench.core.held()[0].assignment is not None


# --- assignments


def test_what_is_acknowledged_is_on_disk_before(bench: Bench) -> None:
    bench.hear(PLANNER.assign(generation=2))
    bench.hear(PLANNER.prepare(change(base=2)))
    for i, action in enumerate(bench.log):
        if isinstance(action, Send) and (action.message.HasField("ack") or action.message.HasField("change_status")):
            assert any(isinstance(before, Persist) and before.part == REPLICA for before in bench.log[:i])
    last_ack = max(i for i, a in enumerate(bench.log) if isinstance(a, Send) and a.message.HasField("ack"))
    assert isinstance(bench.log[last_ack - 1], Persist)


def test_the_same_nonce_is_answered_as_before_and_done_once(bench: Bench) -> None:
    delta = PLANNER.assign(generation=2)
    first = bench.hear(delta)
    bench.answer(LOADED)
    assert [message.ack for message in bench.hear(delta)] == [message.ack for message in first]
    assert not bench.calls


def test_a_refusal_is_remembered_too(bench: Bench) -> None:
    what = change(base=3)
    early = PLANNER.prepare(what)
    assert nack_reason(bench.hear(early)) == "GENERATION_MISMATCH"
    bench.hear(PLANNER.assign(generation=3))
    late = bench.hear(PLANNER.prepare(what))
    assert acks(late) == [3]


@pytest.mark.parametrize(("base", "generation", "fits"), [(0, 2, True), (1, 2, True), (2, 3, False), (0, 1, False)])
def test_an_assignment_builds_on_what_is_held_or_replaces_what_is_older(
    bench: Bench, base: int, generation: int, fits: bool
) -> None:
    other = assignment()
    other.plan = "plans/two"
    said = bench.hear(PLANNER.delta(base=base, generation=generation, assignment=other))
    assert acks(said) == ([generation] if fits else [])
    assert bench.core.held()[0].generation == (generation if fits else 1)


@pytest.mark.parametrize(("ahead", "fits"), [(1 << 32, True), ((1 << 32) + 1, False), (1 << 62, False)])
def test_a_generation_that_no_planner_reaches_is_not_stored(bench: Bench, ahead: int, fits: bool) -> None:
    """Such a generation would lock out every correct planner for good, because a stored generation never decreases."""
    other = assignment()
    other.plan = "plans/two"
    said = bench.hear(PLANNER.assign(other, generation=1 + ahead))
    if fits:
        assert acks(said) == [1 + ahead]
    else:
        assert nack_reason(said) == "GENERATION_MISMATCH"
        assert acks(bench.hear(PLANNER.assign(other, generation=2))) == [2]


def test_nor_by_a_node_that_has_heard_nothing_yet_nor_by_way_of_a_change(bench: Bench) -> None:
    new = Bench()
    new.connect()
    assert nack_reason(new.hear(PLANNER.assign(generation=1 << 62))) == "GENERATION_MISMATCH"
    assert acks(new.hear(PLANNER.assign(generation=1 << 33))) == [1 << 33]
    far = change()
    far.generation = 1 << 62
    for delta in (PLANNER.prepare(far), PLANNER.resolved(far, FLIPPED), PLANNER.remove(1 << 62)):
        assert nack_reason(bench.hear(delta)) == "GENERATION_MISMATCH"
    assert bench.core.held()[0].generation == 1
    assert not bench.core.held()[0].changes


def test_a_removed_replica_does_not_come_back_with_an_old_assignment(bench: Bench) -> None:
    assert acks(bench.hear(PLANNER.remove(2))) == [0]
    bench.boot()
    bench.connect()
    assert nack_reason(bench.hear(PLANNER.assign(generation=1))) == "GENERATION_MISMATCH"
    assert not bench.core.hello().hello.replicas


def test_an_unreachable_engine_is_asked_again(bench: Bench) -> None:
    bench.hear(PLANNER.assign(generation=2))
    bench.answer(failure("ENGINE_UNREACHABLE"))
    assert not bench.calls
    assert bench.core.next_s() > bench.now_s
    bench.tick(6)
    assert isinstance(bench.call(), ApplyAssignmentRequest)


def test_an_engine_that_refuses_an_assignment_is_reported_as_failed(bench: Bench) -> None:
    bench.hear(PLANNER.assign(generation=2))
    said = bench.answer(failure("DEVICE_UNAVAILABLE", device="p/0"))
    bench.tick(2)
    (report,) = [m.report.replicas[0] for m in [*said, *bench.sent[-1:]] if m.HasField("report")][-1:]
    assert report.assignment_state == AssignmentState.ASSIGNMENT_STATE_FAILED
    assert report.failure.reason == ErrorReason.ERROR_REASON_DEVICE_UNAVAILABLE


def test_a_restarted_engine_gets_everything_again_and_changes_are_given_up(bench: Bench) -> None:
    bench.do(bench.core.on_engine_report(WatchReportsResponse(engine_id="one"), bench.now_s))
    prepared(bench)
    bench.do(bench.core.on_engine_report(WatchReportsResponse(engine_id="two"), bench.now_s))
    assert isinstance(bench.call(), AbortMovesRequest)
    assert phases(bench.answer(AbortMovesResponse(outcome=ABORTED))) == ["ABORTED"]
    applied = bench.call()
    assert isinstance(applied, ApplyAssignmentRequest)
    assert applied.generation == 1


def states(messages: list[ConnectNodeRequest]) -> list[str]:
    found = [message.report.replicas[0].assignment_state for message in messages if message.HasField("report")]
    return [AssignmentState.Name(state).removeprefix("ASSIGNMENT_STATE_") for state in found]


def engine_run(bench: Bench, engine_id: str) -> list[ConnectNodeRequest]:
    report = kv(100)
    report.engine_id = engine_id
    return bench.do(bench.core.on_engine_report(report, bench.now_s))


def test_an_engine_that_restarts_between_two_reports_is_told_of_at_once(bench: Bench) -> None:
    """The engine's KV is gone, however soon it serves again."""
    engine_run(bench, "one")
    bench.tick(10)
    bench.now_s += 0.001  # a report was just sent
    assert states(engine_run(bench, "two")) == ["LOADING"]
    bench.answer(LOADED)
    said = engine_run(bench, "two") + bench.tick(2)
    assert states(said) == ["SERVING"]
    assert states(engine_run(bench, "two")) == []


def test_an_engine_that_restarted_while_nobody_listened_is_told_of_after_the_next_welcome(bench: Bench) -> None:
    engine_run(bench, "one")
    bench.core.stream_ended()
    engine_run(bench, "two")
    bench.answer(LOADED)
    engine_run(bench, "two")
    bench.sent.clear()
    hello = bench.connect()
    assert [held.assignment_state for held in hello.hello.replicas] == [AssignmentState.ASSIGNMENT_STATE_LOADING]
    assert states(bench.sent) == ["LOADING"]
    assert states(bench.tick(2)) == ["SERVING"]


def last_report(bench: Bench) -> ReplicaReport:
    return [message.report.replicas[0] for message in bench.sent if message.report.replicas][-1]


def test_a_replica_whose_engine_is_lost_has_failed_until_the_engine_reports_again(bench: Bench) -> None:
    engine_run(bench, "one")
    bench.tick(2)
    assert last_report(bench).assignment_state == AssignmentState.ASSIGNMENT_STATE_SERVING
    bench.do(bench.core.on_engine_lost(bench.now_s))
    bench.tick(2)
    lost = last_report(bench)
    assert lost.assignment_state == AssignmentState.ASSIGNMENT_STATE_FAILED
    assert lost.failure.reason == ErrorReason.ERROR_REASON_ENGINE_UNREACHABLE
    assert (lost.engine_id, lost.generation, lost.num_steps) == ("one", 1, 0)
    assert bench.core.devices()[0].total_blocks == 0  # the KV of an engine that is gone
    (held,) = bench.connect().hello.replicas
    assert held.assignment_state == AssignmentState.ASSIGNMENT_STATE_FAILED
    bench.sent.clear()
    assert states(engine_run(bench, "one") + bench.tick(2)) == ["SERVING"]  # it hung only: nothing is lost
    bench.do(bench.core.on_engine_lost(bench.now_s))
    bench.tick(2)
    assert states(engine_run(bench, "two")) == ["LOADING"]
    bench.answer(LOADED)
    assert states(engine_run(bench, "two") + bench.tick(2)) == ["SERVING"]


@pytest.mark.parametrize(
    ("last", "then"),
    [("LOADING", "LOADING"), ("LOADED", "LOADING"), ("DRAINING", "FAILED"), ("STOPPED", "STOPPED")],
)
def test_what_a_lost_engine_had_not_served_yet_has_not_failed(bench: Bench, last: str, then: str) -> None:
    """A planner gives up a replica that fails before it has ever served."""
    report = kv(100)
    report.replicas[0].assignment_state = AssignmentState.Value(f"ASSIGNMENT_STATE_{last}")
    bench.do(bench.core.on_engine_report(report, bench.now_s))
    bench.do(bench.core.on_engine_lost(bench.now_s))
    bench.tick(10)
    lost = last_report(bench)
    assert AssignmentState.Name(lost.assignment_state).removeprefix("ASSIGNMENT_STATE_") == then
    assert lost.HasField("failure") == (then == "FAILED")


def test_a_lost_engine_that_refused_the_assignment_keeps_its_reason(bench: Bench) -> None:
    bench.hear(PLANNER.assign(generation=2))
    bench.answer(failure("DEVICE_UNAVAILABLE", device="p/0"))
    bench.do(bench.core.on_engine_lost(bench.now_s))
    bench.tick(10)
    assert last_report(bench).assignment_state == AssignmentState.ASSIGNMENT_STATE_FAILED
    assert last_report(bench).failure.reason == ErrorReason.ERROR_REASON_DEVICE_UNAVAILABLE


def test_a_node_that_serves_is_not_said_to_load_because_it_is_told_more(bench: Bench) -> None:
    """A planner would conclude that the engine has restarted and lost its KV."""
    engine_run(bench, "one")
    bench.tick(10)
    more = assignment()
    more.conditions.add(device="w/0", status=DeviceStatus.DEVICE_STATUS_LOST)
    bench.sent.clear()
    bench.hear(PLANNER.assign(more, generation=2))
    bench.tick(10)
    bench.answer(LOADED)
    engine_run(bench, "one")
    bench.tick(10)
    assert set(states(bench.sent)) == {"SERVING"}
    other = assignment(model=stage_model(blocks=7))
    assert states(bench.hear(PLANNER.assign(other, generation=3))) == ["LOADING"]
    assert states(engine_run(bench, "one") + bench.tick(10)) == []  # the engine still reports the previous assignment


def test_a_restarted_agent_does_not_say_that_its_engine_restarted(bench: Bench) -> None:
    engine_run(bench, "one")
    bench.boot()
    engine_run(bench, "one")
    (held,) = bench.connect().hello.replicas
    assert held.assignment_state == AssignmentState.ASSIGNMENT_STATE_SERVING
    bench.boot()
    bench.do(bench.core.on_engine_report(WatchReportsResponse(engine_id="two"), bench.now_s))
    (held,) = bench.connect().hello.replicas
    assert held.assignment_state == AssignmentState.ASSIGNMENT_STATE_LOADING


def test_an_engine_that_cannot_be_steered_has_assignments_written_down_only() -> None:
    bench = Bench(capabilities=frozenset())
    bench.connect()
    assert acks(bench.hear(PLANNER.assign())) == [1]
    assert not bench.calls
    assert nack_reason(bench.hear(PLANNER.prepare(change()))) == "ENGINE_CANNOT"
    bench.tick(10)
    report = [message.report for message in bench.sent if message.HasField("report")][-1]
    assert report.replicas[0].assignment_state == AssignmentState.ASSIGNMENT_STATE_UNMANAGED


def other_replica(delta: ConnectNodeResponse, number: int) -> ConnectNodeResponse:
    """The same delta, of a replica of its own."""
    delta.delta.replica = f"{REPLICA}-{number}"
    if delta.delta.HasField("assignment"):
        delta.delta.assignment.replica = delta.delta.replica
    return delta


@pytest.mark.parametrize("capabilities", [frozenset(), STEERED], ids=["engine that hetis does not run", "steered"])
def test_only_the_last_removed_replicas_are_remembered(
    capabilities: frozenset[AgentCapability.ValueType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hetis.runtime.agent.core.MOST_REMOVED", 2)
    bench = Bench(capabilities=capabilities)
    bench.connect()
    for number in range(5):
        bench.hear(other_replica(PLANNER.assign(), number))
        bench.hear(other_replica(PLANNER.remove(2), number))
        while bench.calls:
            bench.answer(LOADED)
    bench.tick()
    assert [held.replica for held in bench.core.held()] == [f"{REPLICA}-{number}" for number in (3, 4)]
    assert set(bench.disk) == {"node", f"{REPLICA}-3", f"{REPLICA}-4"}
    bench.boot()
    bench.connect()
    assert nack_reason(bench.hear(other_replica(PLANNER.assign(), 4))) == "GENERATION_MISMATCH"


def test_replicas_first_heard_of_in_an_abort_are_not_remembered_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hetis.runtime.agent.core.MOST_REMOVED", 2)
    bench = Bench()
    bench.connect()
    for number in range(5):
        bench.hear(other_replica(PLANNER.abort(change()), number))
        bench.answer(failure("ENGINE_UNREACHABLE"))
        bench.tick(1)  # asked again, although no assignment waits for that
        bench.answer(AbortMovesResponse(outcome=ABORTED))
    bench.tick()
    assert set(bench.disk) == {"node", f"{REPLICA}-3", f"{REPLICA}-4"}


def test_every_wrong_field_is_named() -> None:
    bench = Bench()
    bench.connect()
    wrong = change()
    wrong.prepare_timeout.Clear()
    del wrong.moves[:]
    said = bench.hear(PLANNER.prepare(wrong))
    assert nack_reason(said) == "INVALID_FIELD"
    fields = {violation.field for violation in said[-1].nack.failure.field_violations}
    assert fields == {"prepare.change.moves", "prepare.change.prepare_timeout"}
