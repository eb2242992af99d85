"""The agent's side of the protocol, rule by rule."""

from __future__ import annotations

import itertools

import pytest

from hetis.runtime.agent.outbox import Persist, Send
from hetis.v1.agent_service_pb2 import AgentCapability, ConnectNodeRequest, ConnectNodeResponse, Goodbye, StateRequest
from hetis.v1.change_pb2 import ChangePhase, ChangeStatus
from hetis.v1.executor_service_pb2 import (
    AbortMovesRequest,
    AbortMovesResponse,
    ApplyAssignmentRequest,
    ApplyAssignmentResponse,
    CopyMovesRequest,
    CopyMovesResponse,
    FlipMovesRequest,
    FlipMovesResponse,
    ReadHeadMapsResponse,
    ReleaseMovesRequest,
    ReleaseMovesResponse,
    ReserveMovesRequest,
    ReserveMovesResponse,
    WatchReportsResponse,
)
from hetis.v1.failure_pb2 import ErrorReason, Failure
from hetis.v1.head_map_pb2 import HeadMap, RunningRequest
from hetis.v1.report_pb2 import AssignmentState, DeviceReport, DeviceStatus, ReplicaReport
from tests.runtime.agent.builders import (
    ABORTED,
    AUTHORITY,
    FLIPPED,
    REPLICA,
    SOURCE,
    STEERED,
    TARGET,
    Bench,
    Planner,
    assignment,
    change,
    duration,
    stage_model,
    welcome,
)

PLANNER = Planner()
LOADED = ApplyAssignmentResponse(state=AssignmentState.ASSIGNMENT_STATE_LOADED)


def nack_reason(messages: list[ConnectNodeRequest]) -> str:
    (nack,) = [message.nack for message in messages if message.HasField("nack")]
    return ErrorReason.Name(nack.failure.reason).removeprefix("ERROR_REASON_")


def acks(messages: list[ConnectNodeRequest]) -> list[int]:
    return [message.ack.generation for message in messages if message.HasField("ack")]


def phases(messages: list[ConnectNodeRequest]) -> list[str]:
    statuses = [message.change_status for message in messages if message.HasField("change_status")]
    return [ChangePhase.Name(status.phase).removeprefix("CHANGE_PHASE_") for status in statuses]


def failure(name: str, **metadata: str) -> Failure:
    return Failure(reason=ErrorReason.Value(f"ERROR_REASON_{name}"), message=name, metadata=metadata)


@pytest.fixture
def bench() -> Bench:
    """A connected agent with an assignment of generation 1 that the engine has taken."""
    bench = Bench()
    bench.connect()
    bench.hear(PLANNER.assign())
    bench.answer(LOADED)
    return bench


def prepared(bench: Bench, *parts: int, timeout_s: float = 10.0) -> object:
    """A change that is READY."""
    what = change(timeout_s=timeout_s)
    bench.hear(PLANNER.prepare(what, *(parts or (AUTHORITY, SOURCE))))  # type: ignore[arg-type]
    bench.answer(ReserveMovesResponse())
    if set(parts or (AUTHORITY, SOURCE)) != {AUTHORITY}:
        bench.answer(CopyMovesResponse(copied_bytes=5, total_bytes=5))
    return what


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


# --- changes


def test_a_change_goes_from_prepare_to_released(bench: Bench) -> None:
    what = change()
    assert phases(bench.hear(PLANNER.prepare(what))) == ["PREPARING"]
    reserve = bench.call()
    assert isinstance(reserve, ReserveMovesRequest)
    assert reserve.epoch == 1
    bench.answer(ReserveMovesResponse())
    assert isinstance(bench.call(), CopyMovesRequest)
    assert phases(bench.answer(CopyMovesResponse(copied_bytes=7))) == ["READY"]
    bench.now_s += 4
    bench.hear(PLANNER.commit(what))
    flip = bench.call()
    assert isinstance(flip, FlipMovesRequest)
    assert flip.timeout.ToMilliseconds() == 6000
    flipped = bench.answer(FlipMovesResponse(outcome=FLIPPED, generation=2, step=9))
    (status,) = [message.change_status for message in flipped if message.HasField("change_status")]
    assert (status.phase, status.generation, status.step) == (ChangePhase.CHANGE_PHASE_FLIPPED, 2, 9)
    bench.hear(PLANNER.resolved(what, FLIPPED))
    release = bench.call()
    assert isinstance(release, ReleaseMovesRequest)
    assert release.generation == 2
    assert phases(bench.answer(ReleaseMovesResponse())) == ["RELEASED"]
    assert bench.core.held()[0].generation == 2


def test_an_authority_that_copies_nothing_is_ready_when_it_has_reserved(bench: Bench) -> None:
    bench.hear(PLANNER.prepare(change(), AUTHORITY))
    assert phases(bench.answer(ReserveMovesResponse())) == ["READY"]


def test_one_change_at_a_time(bench: Bench) -> None:
    first = change()
    bench.hear(PLANNER.prepare(first))
    said = bench.hear(PLANNER.prepare(change()))
    assert nack_reason(said) == "CHANGE_IN_FLIGHT"
    assert said[-1].nack.failure.metadata["change_id"] == first.change_id


def test_a_repeated_prepare_reserves_once(bench: Bench) -> None:
    what = change()
    bench.hear(PLANNER.prepare(what))
    assert phases(bench.hear(PLANNER.prepare(what))) == ["PREPARING"]
    assert len(bench.calls) == 1


def test_only_a_ready_authority_takes_a_commit(bench: Bench) -> None:
    what = change()
    assert nack_reason(bench.hear(PLANNER.commit(what))) == "CHANGE_UNKNOWN"
    bench.hear(PLANNER.prepare(what, AUTHORITY, SOURCE))
    assert nack_reason(bench.hear(PLANNER.commit(what))) == "CHANGE_PHASE"
    other = Bench(node="w")
    other.connect()
    other.hear(PLANNER.assign(assignment("w")))
    other.answer(LOADED)
    what = prepared(other, TARGET)  # type: ignore[assignment]
    assert nack_reason(other.hear(PLANNER.commit(what))) == "CHANGE_PHASE"


def test_a_prepare_after_the_abort_is_refused(bench: Bench) -> None:
    what = change()
    bench.hear(PLANNER.abort(what))
    bench.answer(AbortMovesResponse(outcome=ABORTED))
    assert nack_reason(bench.hear(PLANNER.prepare(what))) == "CHANGE_PHASE"


def test_an_abort_stops_the_copy(bench: Bench) -> None:
    what = change()
    bench.hear(PLANNER.prepare(what))
    bench.answer(ReserveMovesResponse())
    bench.hear(PLANNER.abort(what))
    assert isinstance(bench.call(), AbortMovesRequest)
    assert phases(bench.answer(AbortMovesResponse(outcome=ABORTED))) == ["ABORTED"]


def test_an_abort_that_comes_too_late_says_flipped(bench: Bench) -> None:
    what = prepared(bench)
    bench.hear(PLANNER.abort(what))  # type: ignore[arg-type]
    assert phases(bench.answer(AbortMovesResponse(outcome=FLIPPED, generation=2))) == ["FLIPPED"]
    assert bench.core.held()[0].generation == 2


def test_a_copy_that_fails_gives_the_change_up_and_says_why(bench: Bench) -> None:
    bench.hear(PLANNER.prepare(change()))
    bench.answer(ReserveMovesResponse())
    bench.answer(failure("COPY_FAILED", device="p/0"))
    said = bench.answer(AbortMovesResponse(outcome=ABORTED), of=AbortMovesRequest)
    (status,) = [message.change_status for message in said if message.HasField("change_status")]
    assert status.failure.reason == ErrorReason.ERROR_REASON_COPY_FAILED


def test_without_the_planner_the_deadline_aborts(bench: Bench) -> None:
    prepared(bench, timeout_s=10)
    bench.core.stream_ended()
    assert bench.core.next_s() <= bench.now_s + 10
    bench.tick(9.9)
    assert not bench.calls
    bench.tick(0.2)
    request = bench.call()
    assert isinstance(request, AbortMovesRequest)
    assert request.failure.reason == ErrorReason.ERROR_REASON_PREPARE_EXPIRED


def test_an_engine_that_does_not_know_how_it_ended_is_asked_until_it_does(bench: Bench) -> None:
    bench = Bench(node="w")
    bench.connect()
    bench.hear(PLANNER.assign(assignment("w")))
    bench.answer(LOADED)
    prepared(bench, TARGET)
    bench.tick(11)
    for _ in range(3):
        assert isinstance(bench.call(), AbortMovesRequest)
        assert phases(bench.answer(failure("ENGINE_UNREACHABLE"))) == []
        bench.tick(6)
    assert phases(bench.answer(AbortMovesResponse(outcome=FLIPPED, generation=2))) == ["FLIPPED"]


def test_after_the_deadline_a_commit_flips_nothing(bench: Bench) -> None:
    what = prepared(bench, timeout_s=10)
    bench.now_s += 11
    bench.hear(PLANNER.commit(what))  # type: ignore[arg-type]
    flip = bench.call()
    assert isinstance(flip, FlipMovesRequest | AbortMovesRequest)
    if isinstance(flip, FlipMovesRequest):
        assert flip.timeout.ToNanoseconds() == 0  # no time left, so that the engine aborts


def test_a_reboot_ends_what_was_being_prepared(bench: Bench) -> None:
    prepared(bench, timeout_s=500)
    rebooted = Bench(disk=bench.disk, clock="boot-2")
    rebooted.now_s = 1.0
    rebooted.tick()
    assert isinstance(rebooted.call(), AbortMovesRequest)


def test_a_restarted_agent_goes_on_where_it_was(bench: Bench) -> None:
    what = change()
    bench.hear(PLANNER.prepare(what))
    bench.answer(ReserveMovesResponse())
    bench.boot()
    bench.tick()
    assert isinstance(bench.call(), ApplyAssignmentRequest)
    bench.answer(LOADED)
    again = bench.call()
    assert isinstance(again, ReserveMovesRequest)
    assert again.change.prepare_timeout.ToMilliseconds() == 10_000


def test_a_restarted_agent_flips_what_it_had_acknowledged(bench: Bench) -> None:
    what = prepared(bench)
    bench.hear(PLANNER.commit(what))  # type: ignore[arg-type]
    bench.boot()
    bench.tick()
    bench.answer(LOADED)
    assert isinstance(bench.call(), FlipMovesRequest)


def test_an_agent_hears_from_its_engine_how_a_change_ended_without_it(bench: Bench) -> None:
    what = prepared(bench)
    bench.boot()
    bench.connect()
    ended = ChangeStatus(
        change_id=what.change_id,  # type: ignore[attr-defined]
        replica=REPLICA,
        phase=ChangePhase.CHANGE_PHASE_FLIPPED,
        generation=2,
        step=3,
    )
    report = WatchReportsResponse(engine_id="e", changes=[ended])
    assert phases(bench.do(bench.core.on_engine_report(report, bench.now_s))) == ["FLIPPED"]
    assert phases(bench.do(bench.core.on_engine_report(report, bench.now_s))) == []


def test_statuses_are_repeated_after_a_reconnect_until_resolved(bench: Bench) -> None:
    what = prepared(bench)
    bench.sent.clear()
    bench.connect()
    assert phases(bench.sent) == ["READY"]
    bench.hear(PLANNER.abort(what))  # type: ignore[arg-type]
    bench.answer(AbortMovesResponse(outcome=ABORTED))
    bench.sent.clear()
    bench.connect()
    assert phases(bench.sent) == ["ABORTED"]
    bench.hear(PLANNER.resolved(what, ABORTED))  # type: ignore[arg-type]
    bench.sent.clear()
    bench.connect()
    assert phases(bench.sent) == []


def test_an_authority_that_aborted_is_not_told_that_it_flipped(bench: Bench) -> None:
    what = prepared(bench)
    bench.hear(PLANNER.abort(what))  # type: ignore[arg-type]
    bench.answer(AbortMovesResponse(outcome=ABORTED))
    assert nack_reason(bench.hear(PLANNER.resolved(what, FLIPPED))) == "CHANGE_PHASE"  # type: ignore[arg-type]
    assert not bench.calls


def test_an_assignment_ends_the_change_under_way_first(bench: Bench) -> None:
    prepared(bench)
    bench.hear(PLANNER.assign(generation=4))
    assert isinstance(bench.call(), AbortMovesRequest)
    bench.answer(failure("ENGINE_UNREACHABLE"))
    assert isinstance(bench.call(), ApplyAssignmentRequest)


def test_the_same_assignment_of_a_new_planner_disturbs_nothing(bench: Bench) -> None:
    prepared(bench)
    bench.connect(epoch=2)
    assert acks(bench.hear(Planner(2).assign())) == [1]
    assert not bench.calls


# --- reports


def kv(used: int) -> WatchReportsResponse:
    replica = ReplicaReport(replica=REPLICA, assignment_state=AssignmentState.ASSIGNMENT_STATE_SERVING, num_steps=used)
    device = DeviceReport(index=0, total_blocks=1000, used_blocks=used)
    return WatchReportsResponse(engine_id="e", replicas=[replica], devices=[device])


def reports(messages: list[ConnectNodeRequest]) -> list[int]:
    return [message.report.devices[0].used_blocks for message in messages if message.HasField("report")]


def test_reports_follow_change_thresholds_and_the_least_interval(bench: Bench) -> None:
    def hear(used: int, after_s: float) -> list[int]:
        bench.now_s += after_s
        return reports(bench.do(bench.core.on_engine_report(kv(used), bench.now_s)))

    hear(500, 2)
    bench.tick(2)
    assert hear(510, 1.5) == []  # changed by one point
    assert hear(530, 0.0) == [530]  # changed by three points
    assert hear(560, 0.5) == []  # too soon
    assert hear(560, 0.6) == [560]
    assert hear(899, 1.1) == [899]
    assert hear(900, 0.01) == [900]  # reaches the threshold: reported at once


def test_a_share_that_hovers_at_a_threshold_is_reported_at_once_only_once(bench: Bench) -> None:
    def hear(used: int, after_s: float = 0.2) -> list[int]:
        bench.now_s += after_s
        return reports(bench.do(bench.core.on_engine_report(kv(used), bench.now_s)))

    bench.connect(heartbeat_interval=duration(600))
    hear(850)
    assert hear(901) == [901]
    assert [hear(used) for used in [899, 901, 885, 900] * 50] == [[]] * 200
    assert hear(875) == [875]  # the fall is reported once the least interval is over
    assert hear(901) == [901]
    assert hear(875) == []
    assert hear(901) == []  # the planner has not heard that it fell


def test_a_silent_node_sends_heartbeats_with_jitter(bench: Bench) -> None:
    bench.sent.clear()
    beats = []
    for _ in range(20_000):
        bench.now_s += 0.01
        if any(message.HasField("heartbeat") for message in bench.tick()):
            beats.append(bench.now_s)
    waits = {round(later - earlier, 2) for earlier, later in itertools.pairwise(beats)}
    assert all(4.49 <= wait <= 5.52 for wait in waits)
    assert len(waits) > 5


def test_a_report_can_be_asked_for(bench: Bench) -> None:
    request = StateRequest(request_id="q", report=True)
    said = bench.hear(ConnectNodeResponse(epoch=1, state_request=request))
    assert [message.WhichOneof("message") for message in said] == ["report"]


def test_head_maps_come_in_pieces_of_at_most_a_mebibyte(bench: Bench) -> None:
    requests = [RunningRequest(id=f"request-{i}", context_tokens=1000 + i, owners=[i % 3] * 64) for i in range(30_000)]
    request = StateRequest(request_id="q", head_map_of=REPLICA)
    bench.hear(ConnectNodeResponse(epoch=1, state_request=request))
    said = bench.answer([ReadHeadMapsResponse(generation=1, step=5, head_maps=[HeadMap(requests=requests)])])
    pieces = [message.head_map for message in said if message.HasField("head_map")]
    assert len(pieces) > 2
    assert all(message.ByteSize() <= 1 << 20 for message in said)
    assert [piece.index for piece in pieces] == list(range(len(pieces)))
    assert [piece.is_last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert [r for piece in pieces for head_map in piece.head_maps for r in head_map.requests] == requests


def test_a_head_map_that_is_not_there_is_a_failure() -> None:
    bench = Bench()
    bench.connect()
    said = bench.hear(ConnectNodeResponse(epoch=1, state_request=StateRequest(request_id="q", head_map_of="x")))
    piece = next(message.head_map for message in said if message.HasField("head_map"))
    assert piece.is_last
    assert piece.failure.reason == ErrorReason.ERROR_REASON_NOT_FOUND
