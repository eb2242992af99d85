"""What the engine is asked next for one replica, and what its answer means.

`EngineSteps.advance` looks at the difference between what is wanted (`hetis.runtime.agent.held`) and what the engine
has done, and makes the next call. So it does not matter whether a directive came once or twice, before or after a
restart: what is left to do is worked out from the state.
"""

from __future__ import annotations

from google.protobuf.duration_pb2 import Duration

from hetis.runtime.agent.actions import EngineRequest, EngineResponse
from hetis.runtime.agent.book import ReplicaBook, add_moves
from hetis.runtime.agent.fence import Fence
from hetis.runtime.agent.held import HeldChange, Wanted
from hetis.runtime.agent.outbox import Outbox
from hetis.v1.agent_service_pb2 import AgentCapability
from hetis.v1.change_pb2 import Change, ChangeOutcome, ChangePhase
from hetis.v1.executor_service_pb2 import (
    AbortMovesRequest,
    AbortMovesResponse,
    ApplyAssignmentRequest,
    ApplyAssignmentResponse,
    CopyMovesRequest,
    CopyMovesResponse,
    FlipMovesRequest,
    FlipMovesResponse,
    ReleaseMovesRequest,
    ReserveMovesRequest,
    ReserveMovesResponse,
)
from hetis.v1.failure_pb2 import ErrorReason, Failure
from hetis.v1.report_pb2 import AssignmentState

LEAST_WAIT_S, MOST_WAIT_S = 0.2, 5.0  # before a call that failed is made again
CALL_S = 10.0  # an engine that does not answer for so long is taken to be unreachable
PROGRESS_S = 1.0  # between two statuses that only tell of copied bytes
_UNREACHABLE = (ErrorReason.ERROR_REASON_ENGINE_UNREACHABLE, ErrorReason.ERROR_REASON_INTERNAL)
_OUTCOME = {
    ChangeOutcome.CHANGE_OUTCOME_FLIPPED: ChangePhase.CHANGE_PHASE_FLIPPED,
    ChangeOutcome.CHANGE_OUTCOME_ABORTED: ChangePhase.CHANGE_PHASE_ABORTED,
}


class EngineSteps:
    """One call of the engine after the other, for one replica."""

    def __init__(self, book: ReplicaBook, *, fence: Fence, outbox: Outbox) -> None:
        self._book = book
        self._fence = fence
        self._outbox = outbox
        self._call: tuple[int, EngineRequest, HeldChange | None] | None = None
        self._retry_s = float("-inf")
        self._wait_s = LEAST_WAIT_S
        self._told_progress_s = float("-inf")

    def wait_no_longer(self, now_s: float) -> None:
        """Something else is wanted now: the next call is due."""
        self._retry_s, self._wait_s = now_s, LEAST_WAIT_S

    def forget_call(self) -> None:
        """The engine that was asked is gone."""
        self._call = None

    def waits_for(self, number: int) -> bool:
        return self._call is not None and self._call[0] == number

    def is_applying(self) -> bool:
        """Whether the call that is being waited for is of the assignment."""
        return self._call is not None and isinstance(self._call[1], ApplyAssignmentRequest)

    def next_s(self) -> float:
        """When `advance` has a call to make again; infinity: it waits for an answer, or has nothing to do."""
        retries = self._call is None and self._next_request(self._retry_s) is not None
        return self._retry_s if retries else float("inf")

    # --- asking

    def advance(self, now_s: float) -> None:
        """Makes the next call of the engine, if one is due and none is being waited for."""
        if self._call is not None:
            number, request, change = self._call
            must_stop = (
                change is not None and isinstance(request, CopyMovesRequest) and change.wanted is not Wanted.PREPARED
            )
            if not must_stop:
                return
            self._outbox.cancel(number)
            self._call = None
        if now_s < self._retry_s:
            return
        found = self._next_request(now_s)
        if found is None:
            return
        request, change = found
        timeout_s = None if isinstance(request, CopyMovesRequest) else CALL_S
        self._call = (self._outbox.call(request, timeout_s=timeout_s), request, change)

    def _next_request(self, now_s: float) -> tuple[EngineRequest, HeldChange | None] | None:
        """What the engine has to be asked next, and of which change."""
        held = self._book.held
        aborting = next((c for c in held.changes.values() if c.is_open and c.wanted is Wanted.ABORTED), None)
        must_apply = (
            not held.is_applied and held.failure is None and AgentCapability.AGENT_CAPABILITY_ASSIGN in self._book.can
        )
        if aborting is not None and not (must_apply and aborting.is_abort_tried):
            return AbortMovesRequest(epoch=self._fence.newest, change_id=aborting.id, failure=aborting.why), aborting
        if must_apply and held.generation:
            apply = ApplyAssignmentRequest(epoch=self._fence.newest, generation=held.generation)
            if held.assignment is None:
                apply.removed_replica = held.replica
            else:
                apply.assignment.CopyFrom(held.assignment)
            return apply, None
        for change in held.changes.values():
            request = self._next_of_change(change, now_s)
            if request is not None:
                return request, change
        return None

    def _next_of_change(self, change: HeldChange, now_s: float) -> EngineRequest | None:
        if change.wanted is Wanted.RELEASED and not change.has_ended:
            return ReleaseMovesRequest(
                epoch=self._fence.newest,
                change_id=change.id,
                moves=change.status.moves,
                generation=change.change.generation,
            )
        if not change.is_open:
            return None
        if change.wanted is Wanted.FLIPPED:
            return FlipMovesRequest(
                epoch=change.epoch, change_id=change.id, timeout=_duration(change.deadline_s - now_s)
            )
        if change.wanted is Wanted.PREPARED and change.phase == ChangePhase.CHANGE_PHASE_PREPARING:
            if change.is_reserved:
                return CopyMovesRequest(epoch=change.epoch, change_id=change.id)
            left = Change()
            left.CopyFrom(change.change)
            left.prepare_timeout.CopyFrom(_duration(max(change.deadline_s - now_s, 1e-3)))
            return ReserveMovesRequest(epoch=change.epoch, change=left, parts=change.parts)
        return None

    # --- hearing

    def progressed(self, response: CopyMovesResponse, now_s: float) -> None:
        """The copy goes on."""
        change = self._call[2] if self._call else None
        if change is not None and change.is_open:
            _note_copy(change, response)
            if now_s - self._told_progress_s >= PROGRESS_S:
                self._told_progress_s = now_s
                self._book.tell(change)

    def answered(self, answer: EngineResponse | Failure, now_s: float) -> None:
        """What the engine answered to the call that is being waited for."""
        assert self._call is not None
        _, request, change = self._call
        self._call = None
        if isinstance(answer, Failure) and answer.reason in _UNREACHABLE:
            self._try_later(request, change, answer, now_s)
        else:
            self.wait_no_longer(now_s)
            if change is None:
                self._applied(answer)
            elif isinstance(answer, Failure):
                self._change_refused(request, change, answer, now_s)
            else:
                self._change_answered(answer, change, now_s)
        self.advance(now_s)

    def _try_later(self, request: EngineRequest, change: HeldChange | None, failure: Failure, now_s: float) -> None:
        self._retry_s = now_s + self._wait_s
        self._wait_s = min(2 * self._wait_s, MOST_WAIT_S)
        if change is None:
            return
        if isinstance(request, AbortMovesRequest):
            if not change.is_abort_tried and not self._book.held.is_applied:
                self._retry_s = now_s  # the assignment that waits goes on
            change.is_abort_tried = True
        elif isinstance(request, FlipMovesRequest) and now_s >= change.deadline_s:
            self._book.want_abort(change, failure)  # it may have flipped: AbortMoves says which
        elif isinstance(request, CopyMovesRequest):
            change.is_reserved = False  # another engine may answer next: begin again

    def _applied(self, answer: EngineResponse | Failure) -> None:
        held = self._book.held
        held.is_applied = True
        if isinstance(answer, Failure):
            held.failure, held.assignment_state = answer, AssignmentState.ASSIGNMENT_STATE_FAILED
        elif isinstance(answer, ApplyAssignmentResponse):
            held.assignment_state = answer.state
            held.is_anew = False
            self._book.persist()

    def _change_refused(self, request: EngineRequest, change: HeldChange, failure: Failure, now_s: float) -> None:
        if isinstance(request, AbortMovesRequest):
            self._retry_s = now_s + self._wait_s
            change.is_abort_tried = True
        elif isinstance(request, ReleaseMovesRequest):
            if failure.reason == ErrorReason.ERROR_REASON_CHANGE_UNKNOWN:
                self._book.enter(change, ChangePhase.CHANGE_PHASE_RELEASED, now_s=now_s)  # it holds nothing of it
            else:
                self._retry_s = now_s + MOST_WAIT_S
        elif isinstance(request, FlipMovesRequest) and failure.reason == ErrorReason.ERROR_REASON_STALE_EPOCH:
            change.wanted = Wanted.PREPARED  # whose permission it was may give none
            self._book.persist()
        else:
            self._book.want_abort(change, failure)
            self._book.persist()

    def _change_answered(self, answer: EngineResponse, change: HeldChange, now_s: float) -> None:
        ready = False
        if isinstance(answer, ReserveMovesResponse):
            change.is_reserved = True
            add_moves(change, answer.moves)
            ready = not change.copies
        elif isinstance(answer, CopyMovesResponse):
            _note_copy(change, answer)
            ready = True
        elif isinstance(answer, FlipMovesResponse | AbortMovesResponse):
            add_moves(change, answer.moves)
            if isinstance(answer, FlipMovesResponse):
                change.status.step = answer.step
                if answer.HasField("failure"):
                    change.why = answer.failure
            flipped = answer.outcome == ChangeOutcome.CHANGE_OUTCOME_FLIPPED
            if flipped:
                change.change.generation = change.change.generation or answer.generation
            self._book.enter(change, _OUTCOME[answer.outcome], now_s=now_s)
        else:
            self._book.enter(change, ChangePhase.CHANGE_PHASE_RELEASED, now_s=now_s)
        if ready and change.wanted is Wanted.PREPARED:
            self._book.enter(change, ChangePhase.CHANGE_PHASE_READY, now_s=now_s)


def _note_copy(change: HeldChange, response: CopyMovesResponse) -> None:
    change.status.copied_bytes = max(change.status.copied_bytes, response.copied_bytes)
    add_moves(change, response.moves)


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(max(int(seconds * 1e9), 0))
    return duration
