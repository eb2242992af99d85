"""The agent's side of a change of heads, rule by rule."""

from __future__ import annotations

from hetis.v1.change_pb2 import ChangePhase, ChangeStatus
from hetis.v1.executor_service_pb2 import (
    AbortMovesRequest,
    AbortMovesResponse,
    ApplyAssignmentRequest,
    CopyMovesRequest,
    CopyMovesResponse,
    FlipMovesRequest,
    FlipMovesResponse,
    ReleaseMovesRequest,
    ReleaseMovesResponse,
    ReserveMovesRequest,
    ReserveMovesResponse,
    WatchReportsResponse,
)
from hetis.v1.failure_pb2 import ErrorReason
from tests.runtime.agent.builders import (
    ABORTED,
    AUTHORITY,
    FLIPPED,
    LOADED,
    PLANNER,
    REPLICA,
    SOURCE,
    TARGET,
    Bench,
    Planner,
    acks,
    assignment,
    change,
    failure,
    nack_reason,
    phases,
    prepared,
)


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
