"""The simulated engine in virtual time: what a real one would do, and what no engine may do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from examples.simulated_engine.engine import SimulatedEngine
from examples.simulated_engine.replica import Control
from examples.simulated_engine.stage import AdmissionRule, ProportionalAdmission, SolverAdmission
from hetis.runtime.moves.changes import MOST_ABORTED, REMEMBERED_S
from hetis.runtime.moves.refusals import RefusedError, reason_name
from hetis.v1.change_pb2 import Change, ChangePhase
from hetis.v1.executor_service_pb2 import (
    AbortMovesRequest,
    ApplyAssignmentRequest,
    CopyMovesRequest,
    FlipMovesRequest,
    FlipMovesResponse,
    ReleaseMovesRequest,
    ReserveMovesRequest,
)
from hetis.v1.head_map_pb2 import Move, MoveReason
from hetis.v1.replica_pb2 import AssignmentGoal, DeviceCondition
from hetis.v1.report_pb2 import AssignmentState, DeviceStatus, ReplicaReport
from hetis.v1.stage_pb2 import StageModel
from tests.runtime.agent.builders import (
    ABORTED,
    AUTHORITY,
    FLIPPED,
    REPLICA,
    SOURCE,
    TARGET,
    assignment,
    change,
    duration,
    stage_model,
)

BUSY = Control(rate_rps=20, prompt_tokens=100, output_tokens=200, load_s=0, dense_step_s=0.02)


def engine_with(
    model: StageModel | None = None, *, control: Control = BUSY, seed: int = 1, admission: AdmissionRule | None = None
) -> SimulatedEngine:
    engine = SimulatedEngine("p", 4, seed=seed, admission=admission, engine_id="e")
    engine.control = control
    what = assignment(model=model or stage_model(blocks=4000))
    engine.apply_assignment(ApplyAssignmentRequest(epoch=1, generation=1, assignment=what), 0.0)
    return engine


@pytest.fixture
def engine() -> SimulatedEngine:
    """An engine with requests at 5 s."""
    engine = engine_with()
    engine.step(5.0)
    return engine


def replica(engine: SimulatedEngine, now_s: float) -> ReplicaReport:
    (report,) = engine.report(now_s).replicas
    return report


def allowed_move(engine: SimulatedEngine, *, kv_bytes: float = 1e6, number: int = 0) -> Move:
    head_map = engine.head_maps(REPLICA).head_maps[0]
    names = [device.name for device in head_map.devices]
    request = head_map.requests[number]
    source = names[request.owners[0]]
    return Move(
        number=number,
        request=request.id,
        incarnation=request.incarnation,
        head_groups=[0],
        source=source,
        target=next(name for name in names if name != source),
        kv_bytes=kv_bytes,
        reason=MoveReason.MOVE_REASON_BALANCE,
    )


def owner(engine: SimulatedEngine, move: Move) -> str:
    head_map = engine.head_maps(REPLICA).head_maps[0]
    (request,) = [request for request in head_map.requests if request.id == move.request]
    return head_map.devices[request.owners[move.head_groups[0]]].name


def ready(engine: SimulatedEngine, now_s: float, *, timeout_s: float = 10.0) -> Change:
    """A change of one move that is prepared."""
    what = change(timeout_s=timeout_s, moves=[allowed_move(engine)])
    engine.reserve_moves(ReserveMovesRequest(epoch=1, change=what, parts=[AUTHORITY, SOURCE]), now_s)
    engine.copy_moves(CopyMovesRequest(epoch=1, change_id=what.change_id), now_s)
    engine.step(now_s + 0.01)
    return what


def flip(engine: SimulatedEngine, what: Change, now_s: float, *, timeout_s: float = 5.0) -> None:
    request = FlipMovesRequest(epoch=1, change_id=what.change_id, timeout=duration(timeout_s))
    engine.flip_moves(request, now_s)


def flipped(engine: SimulatedEngine, what: Change) -> FlipMovesResponse:
    answer = engine.flip_answer(what.change_id)
    assert answer is not None
    return answer


@contextmanager
def refused(reason: str) -> Iterator[None]:
    with pytest.raises(RefusedError) as refusal:
        yield
    assert reason_name(refusal.value.failure) == reason


def test_a_slow_device_is_observed_slower_than_predicted_and_slows_the_steps() -> None:
    engine = engine_with()
    engine.step(10.0)
    before = replica(engine, 10.0).num_steps
    engine.control = Control(**{**vars_of(BUSY), "slow": {"w/0": 3000.0}})
    engine.step(20.0)
    report = replica(engine, 20.0)
    assert report.num_steps - before < before * 0.9
    ratios = {load.device: load.observed_s / load.predicted_s for load in report.stages[0].devices if load.heads}
    assert ratios["w/0"] == pytest.approx(3000)
    assert ratios["p/0"] == pytest.approx(1)


def vars_of(control: Control) -> dict[str, object]:
    return {name: getattr(control, name) for name in Control.model_fields}


def test_out_of_blocks_the_youngest_are_preempted_and_begin_again() -> None:
    engine = engine_with(stage_model(blocks=300), control=Control(**{**vars_of(BUSY), "output_tokens": 200.0}))
    engine.step(20.0)
    report = replica(engine, 20.0)
    assert report.num_preempted > 0
    assert report.num_waiting_for_kv > 0
    engine.control = Control(**{**vars_of(BUSY), "rate_rps": 0.0})
    engine.step(2000.0)
    report = replica(engine, 2000.0)
    assert (report.num_running, report.num_waiting) == (0, 0)  # all preempted requests ended at last


def test_a_lost_device_costs_its_requests_their_kv_and_nothing_else() -> None:
    engine = engine_with()
    engine.step(10.0)
    running = {request.id for request in engine.head_maps(REPLICA).head_maps[0].requests}
    what = assignment(model=stage_model(blocks=4000))
    what.conditions.append(DeviceCondition(device="w/0", status=DeviceStatus.DEVICE_STATUS_LOST))
    engine.apply_assignment(ApplyAssignmentRequest(epoch=1, generation=2, assignment=what), 10.0)
    engine.step(10.1)
    head_map = engine.head_maps(REPLICA).head_maps[0]
    assert all(1 not in request.owners for request in head_map.requests)
    again = {request.id for request in head_map.requests if request.incarnation}
    assert again
    assert again <= running


def test_a_draining_replica_takes_nothing_new_and_stops_when_it_is_empty() -> None:
    engine = engine_with()
    engine.step(10.0)
    what = assignment(model=stage_model(blocks=4000), goal=AssignmentGoal.ASSIGNMENT_GOAL_DRAIN)
    engine.apply_assignment(ApplyAssignmentRequest(epoch=1, generation=2, assignment=what), 10.0)
    assert replica(engine, 10.0).assignment_state == AssignmentState.ASSIGNMENT_STATE_DRAINING
    waiting = replica(engine, 10.0).num_waiting
    engine.step(200.0)
    report = replica(engine, 200.0)
    assert report.num_running == 0
    if waiting == 0:
        assert report.assignment_state == AssignmentState.ASSIGNMENT_STATE_STOPPED


@pytest.mark.parametrize("admission", [ProportionalAdmission(), SolverAdmission()], ids=["proportional", "solver"])
def test_a_tensor_parallel_primary_stays_even(admission: AdmissionRule) -> None:
    engine = engine_with(stage_model(blocks=2000, tp=2), admission=admission)
    engine.step(5.0)
    requests = engine.head_maps(REPLICA).head_maps[0].requests
    assert requests
    assert all(list(request.owners).count(0) % 2 == 0 for request in requests)
    odd = change(moves=[allowed_move(engine)])
    if odd.moves[0].source == "p/0":
        with pytest.raises(RefusedError, match="takes 2 head groups at a time"):
            engine.reserve_moves(ReserveMovesRequest(epoch=1, change=odd, parts=[AUTHORITY]), 5.0)


# --- moves


def test_a_flip_is_made_between_two_steps_and_the_source_owns_until_then(engine: SimulatedEngine) -> None:
    what = ready(engine, 5.0)
    move = what.moves[0]
    assert owner(engine, move) == move.source
    boundary_s = engine.next_s()
    flip(engine, what, 5.011)
    engine.step(boundary_s - 1e-6)
    assert engine.flip_answer(what.change_id) is None
    assert owner(engine, move) == move.source
    engine.step(boundary_s)
    answer = flipped(engine, what)
    assert (answer.outcome, answer.generation) == (FLIPPED, 2)
    assert owner(engine, move) == move.target


@pytest.mark.parametrize(("left_s", "outcome"), [(-0.001, ABORTED), (0.0, ABORTED), (0.001, FLIPPED)])
@pytest.mark.parametrize("limit", ["of the call", "of the change"])
def test_a_flip_is_made_before_its_time_is_over_or_not_at_all(left_s: float, outcome: int, limit: str) -> None:
    """``left_s``: time left at the boundary between two steps, the only moment that counts."""
    engine = engine_with(control=Control(**{**vars_of(BUSY), "dense_step_s": 1.0}))
    engine.step(5.0)
    boundary_s = engine.next_s()
    now_s = boundary_s - 0.5
    last_s = 0.5 + left_s
    what = change(timeout_s=last_s if limit == "of the change" else 60.0, moves=[allowed_move(engine)])
    engine.reserve_moves(ReserveMovesRequest(epoch=1, change=what, parts=[AUTHORITY]), now_s)
    flip(engine, what, now_s, timeout_s=60.0 if limit == "of the change" else last_s)
    engine.step(boundary_s)
    answer = flipped(engine, what)
    assert answer.outcome == outcome
    if outcome == ABORTED:
        assert reason_name(answer.failure) == "PREPARE_EXPIRED"
    assert answer.generation == (2 if outcome == FLIPPED else 1)
    assert owner(engine, what.moves[0]) == (what.moves[0].target if outcome == FLIPPED else what.moves[0].source)
    assert not engine.head_maps(REPLICA).head_maps[0].moves


def test_what_was_not_flipped_is_not_released_by_whoever_waits_for_the_flip(engine: SimulatedEngine) -> None:
    """Invariant 2 at the engine: a source frees nothing before the flip, whatever commands it gets, however often."""
    what = change(moves=[allowed_move(engine)])
    release = ReleaseMovesRequest(epoch=1, change_id=what.change_id, generation=2)
    with refused("CHANGE_UNKNOWN"):
        engine.release_moves(release, 5.0)
    engine.reserve_moves(ReserveMovesRequest(epoch=1, change=what, parts=[AUTHORITY, SOURCE]), 5.0)
    for step in ("reserved", "copied", "asked to flip", "aborted"):
        with refused("CHANGE_PHASE"):
            engine.release_moves(release, 5.0)
        assert engine.head_maps(REPLICA).generation == 1
        assert owner(engine, what.moves[0]) == what.moves[0].source
        match step:
            case "reserved":
                engine.copy_moves(CopyMovesRequest(epoch=1, change_id=what.change_id), 5.0)
                engine.step(5.001)
            case "copied":
                flip(engine, what, 5.001)
            case "asked to flip":
                engine.abort_moves(AbortMovesRequest(epoch=1, change_id=what.change_id), 5.001)
    (status,) = engine.report(5.001).changes
    assert (status.phase, status.generation) == (ChangePhase.CHANGE_PHASE_ABORTED, 1)


def test_a_change_that_the_engine_aborts_itself_is_forgotten_like_any_other() -> None:
    """The agent hears of it by a report or by the answer to the flip, and sends no AbortMoves then."""
    engine = engine_with(control=Control())
    what = change(timeout_s=3.0)
    engine.abort_moves(AbortMovesRequest(epoch=1, change_id=what.change_id), 5.0)
    engine.control = BUSY
    engine.step(5.0)
    expired = ready(engine, 5.0, timeout_s=3.0)
    engine.step(8.1)
    late = ready(engine, 8.2)
    flip(engine, late, 8.21, timeout_s=0.0)
    engine.step(8.5)
    flipped = ready(engine, 8.5)
    flip(engine, flipped, 8.6)
    engine.step(9.0)
    ended = [what.change_id, expired.change_id, late.change_id]
    assert [status.change_id for status in engine.report(9.0).changes] == [*ended[1:], flipped.change_id, ended[0]]
    engine.catch_up(8.0 + REMEMBERED_S)
    engine.step(8.0 + REMEMBERED_S)
    assert {status.change_id for status in engine.report(0.0).changes} >= {*ended[1:], flipped.change_id}
    engine.step(10.0 + REMEMBERED_S)  # what was flipped is kept until it is released
    assert [status.change_id for status in engine.report(0.0).changes] == [flipped.change_id]


def test_only_the_last_of_many_aborted_changes_are_reported(engine: SimulatedEngine) -> None:
    """A report is limited to 4 MiB. Open and flipped changes are always in it, however old they are."""
    flipped = ready(engine, 5.0)
    flip(engine, flipped, 5.1)
    engine.step(5.5)
    for _ in range(MOST_ABORTED + 10):
        what = change(moves=[allowed_move(engine)], base=2)
        engine.reserve_moves(ReserveMovesRequest(epoch=1, change=what, parts=[AUTHORITY]), 5.5)
        engine.abort_moves(AbortMovesRequest(epoch=1, change_id=what.change_id), 5.5)
    last = change(moves=[allowed_move(engine)], base=2)
    engine.reserve_moves(ReserveMovesRequest(epoch=1, change=last, parts=[AUTHORITY]), 5.5)
    said = [status.change_id for status in engine.report(5.5).changes]
    assert len(said) == MOST_ABORTED + 2
    assert (said[0], *said[-2:]) == (flipped.change_id, what.change_id, last.change_id)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("request", "nobody", "REQUEST_GONE"),
        ("incarnation", 7, "REQUEST_GONE"),
        ("source", "elsewhere/0", "DEVICE_UNAVAILABLE"),
        ("target", "elsewhere/0", "DEVICE_UNAVAILABLE"),
    ],
)
def test_moves_that_do_not_fit_the_head_map_are_refused(
    engine: SimulatedEngine, field: str, value: object, reason: str
) -> None:
    move = allowed_move(engine)
    setattr(move, field, value)
    with refused(reason):
        engine.reserve_moves(ReserveMovesRequest(epoch=1, change=change(moves=[move]), parts=[AUTHORITY]), 5.0)


def test_a_source_must_own_what_moves(engine: SimulatedEngine) -> None:
    move = allowed_move(engine)
    move.source, move.target = move.target, move.source
    with refused("NOT_OWNER"):
        engine.reserve_moves(ReserveMovesRequest(epoch=1, change=change(moves=[move]), parts=[AUTHORITY]), 5.0)


@settings(max_examples=15)
@given(st.data())
def test_no_order_of_calls_breaks_the_head_map(data: st.DataObject) -> None:
    """`StageRun.check` asserts after each step: one owner per group, no block twice, sources keep unflipped groups."""
    engine = engine_with(stage_model(blocks=150), seed=data.draw(st.integers(0, 99)))
    now_s, what = 3.0, change()
    engine.step(now_s)
    for _ in range(data.draw(st.integers(1, 25))):
        kind = data.draw(st.sampled_from(["reserve", "copy", "flip", "release", "abort", "step"]))
        try:
            match kind:
                case "reserve":
                    what = change(base=engine.head_maps(REPLICA).generation, moves=[allowed_move(engine)])
                    request = ReserveMovesRequest(epoch=1, change=what, parts=[AUTHORITY, SOURCE, TARGET])
                    engine.reserve_moves(request, now_s)
                case "copy":
                    engine.copy_moves(CopyMovesRequest(epoch=1, change_id=what.change_id), now_s)
                case "flip":
                    flip(engine, what, now_s)
                case "release":
                    engine.release_moves(ReleaseMovesRequest(epoch=1, change_id=what.change_id, generation=2), now_s)
                case "abort":
                    engine.abort_moves(AbortMovesRequest(epoch=1, change_id=what.change_id), now_s)
                case "step":
                    now_s += data.draw(st.sampled_from([0.01, 0.3, 12.0]))
        except RefusedError:
            pass
        engine.step(now_s)
