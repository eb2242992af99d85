"""One replica on one node: checks what the planner wants, and brings the engine there, one call after the other.

Deltas change what is wanted (`hetis.runtime.agent.held`); `ReplicaDesk.advance` looks at the difference between that
and what the engine has done, and makes the next call. So it does not matter whether a directive came once or twice,
before or after a restart: what is left to do is worked out from the state.
"""

from __future__ import annotations

from collections.abc import Iterable

from google.protobuf.duration_pb2 import Duration

from hetis.runtime.agent.actions import EngineRequest, EngineResponse
from hetis.runtime.agent.checks import wrong_fields
from hetis.runtime.agent.fence import Fence
from hetis.runtime.agent.held import HeldChange, HeldReplica, Wanted
from hetis.runtime.agent.outbox import Outbox
from hetis.runtime.agent.refusals import failure_of, generation_mismatch
from hetis.v1.agent_service_pb2 import AgentCapability, ConnectNodeRequest, Delta, DeltaAck, DeltaNack
from hetis.v1.change_pb2 import Change, ChangeOutcome, ChangePhase, ChangeStatus, MoveResult
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
from hetis.v1.report_pb2 import AssignmentState, ReplicaReport

MOST_ENDED = 64  # changes that have ended and are remembered
REMEMBERED_S = 600.0
LEAST_WAIT_S, MOST_WAIT_S = 0.2, 5.0  # before a call that failed is made again
CALL_S = 10.0  # an engine that does not answer for so long is taken to be unreachable
PROGRESS_S = 1.0  # between two statuses that only tell of copied bytes
_UNREACHABLE = (ErrorReason.ERROR_REASON_ENGINE_UNREACHABLE, ErrorReason.ERROR_REASON_INTERNAL)
_OUTCOME = {
    ChangeOutcome.CHANGE_OUTCOME_FLIPPED: ChangePhase.CHANGE_PHASE_FLIPPED,
    ChangeOutcome.CHANGE_OUTCOME_ABORTED: ChangePhase.CHANGE_PHASE_ABORTED,
}


class ReplicaDesk:
    """The agent's work on one replica.

    Args:
        held: what is held of it, as read from disk or empty.
        capabilities: what the agent can do for its engine.
        clock: names what times count on, see `HeldReplica.to_bytes`.
    """

    def __init__(
        self,
        held: HeldReplica,
        *,
        capabilities: frozenset[AgentCapability.ValueType],
        clock: str,
        fence: Fence,
        outbox: Outbox,
    ) -> None:
        self.held = held
        self._fence = fence
        self._can = capabilities
        self._clock = clock
        self._outbox = outbox
        self._call: tuple[int, EngineRequest, HeldChange | None] | None = None
        self._retry_s = float("-inf")
        self._wait_s = LEAST_WAIT_S
        self._told_progress_s = float("-inf")
        self._abort_tried = False  # since it was wanted: an assignment waits for one try, not for success

    # --- the planner

    def handle(self, delta: Delta, *, epoch: int, now_s: float) -> None:
        """A delta of an epoch that may change things: stores and acknowledges it, or refuses it."""
        if delta.nonce and delta.nonce == self.held.nonce and self.held.answer is not None:
            self._outbox.send(self.held.answer)
            return
        kind = delta.WhichOneof("change")
        failure = wrong_fields(delta) or self._refusal(delta, epoch=epoch)
        if failure is not None:
            self.refuse(delta, failure)
            return
        told: HeldChange | None = None
        if kind in ("assignment", "removal"):
            self._take_assignment(delta, epoch=epoch)
        elif kind == "prepare":
            told = self._take_prepare(delta, epoch=epoch, now_s=now_s)
        else:
            told = self._take_directive(delta, epoch=epoch, now_s=now_s)
        self.held.nonce = delta.nonce
        self.held.answer = ConnectNodeRequest(
            ack=DeltaAck(nonce=delta.nonce, replica=delta.replica, generation=self.held.held_generation)
        )
        self._retry_s, self._wait_s = now_s, LEAST_WAIT_S
        self.persist()
        self._outbox.send(self.held.answer)
        if told is not None:
            self._tell(told)
        self.advance(now_s)

    def refuse(self, delta: Delta, failure: Failure) -> None:
        """Everything stays as it was; the same delta is refused again, whatever happens in between."""
        held = self.held
        held.nonce = delta.nonce
        held.answer = ConnectNodeRequest(
            nack=DeltaNack(nonce=delta.nonce, replica=delta.replica, generation=held.held_generation, failure=failure)
        )
        if held.generation:  # nothing was ever held: a file would only keep a mistake
            self.persist()
        self._outbox.send(held.answer)

    def _refusal(self, delta: Delta, *, epoch: int) -> Failure | None:
        """Why a well-formed delta cannot be taken."""
        kind, held = delta.WhichOneof("change"), self.held
        if kind in ("assignment", "removal"):
            return self._assignment_refusal(delta)
        if AgentCapability.AGENT_CAPABILITY_MOVE not in self._can:
            return failure_of(ErrorReason.ERROR_REASON_ENGINE_CANNOT, "the engine of this node moves no head groups")
        if kind == "prepare":
            return self._prepare_refusal(delta)
        if kind == "commit":
            change = held.changes.get(delta.commit.change_id)
            if change is None:
                return failure_of(
                    ErrorReason.ERROR_REASON_CHANGE_UNKNOWN,
                    f"change {delta.commit.change_id} was never prepared here",
                    change_id=delta.commit.change_id,
                )
            if not change.is_authority or change.phase == ChangePhase.CHANGE_PHASE_PREPARING:
                return _wrong_phase(change, "is not the authority" if not change.is_authority else "is not ready")
        if kind == "resolved":
            change = held.changes.get(delta.resolved.change_id)
            contradicts = change is not None and change.is_authority and _contradicts(change, delta.resolved.outcome)
            if change is not None and contradicts:
                return _wrong_phase(change, "decided otherwise")
        return None

    def _assignment_refusal(self, delta: Delta) -> Failure | None:
        held = self.held
        if delta.base_generation and delta.base_generation != held.held_generation:
            return generation_mismatch(delta.base_generation, held.held_generation)
        if delta.generation > held.generation:
            return None
        same = delta.generation == held.generation and (
            delta.assignment == held.assignment if delta.HasField("assignment") else held.assignment is None
        )
        return None if same else generation_mismatch(delta.base_generation, held.generation)

    def _prepare_refusal(self, delta: Delta) -> Failure | None:
        held, wanted = self.held, delta.prepare.change
        known = held.changes.get(wanted.change_id)
        if known is not None:
            return None if known.is_open and known.wanted is Wanted.PREPARED else _wrong_phase(known, "has ended")
        other = held.open_change
        if other is not None:
            return failure_of(
                ErrorReason.ERROR_REASON_CHANGE_IN_FLIGHT,
                f"change {other.id} of the replica is under way",
                change_id=other.id,
            )
        if held.assignment is None or delta.base_generation != held.generation:
            return generation_mismatch(delta.base_generation, held.held_generation)
        return None

    def _take_assignment(self, delta: Delta, *, epoch: int) -> None:
        held = self.held
        if delta.generation == held.generation:
            held.epoch = epoch  # the same again
            return
        for change in held.changes.values():
            if change.is_open and change.wanted is not Wanted.ABORTED:
                self._want_abort(change, failure_of(ErrorReason.ERROR_REASON_CHANGE_CANCELLED, "a new assignment came"))
        held.generation, held.epoch = delta.generation, epoch
        held.assignment = None
        if delta.HasField("assignment"):
            held.assignment = type(delta.assignment)()
            held.assignment.CopyFrom(delta.assignment)
        held.is_applied, held.failure = False, None
        held.assignment_state = self._first_state()

    def _first_state(self) -> AssignmentState.ValueType:
        can = AgentCapability.AGENT_CAPABILITY_ASSIGN in self._can
        return AssignmentState.ASSIGNMENT_STATE_LOADING if can else AssignmentState.ASSIGNMENT_STATE_UNMANAGED

    def _take_prepare(self, delta: Delta, *, epoch: int, now_s: float) -> HeldChange:
        known = self.held.changes.get(delta.prepare.change.change_id)
        if known is not None:
            return known
        change = Change()
        change.CopyFrom(delta.prepare.change)
        timeout = change.prepare_timeout
        taken = HeldChange(
            change=change,
            parts=tuple(dict.fromkeys(delta.prepare.parts)),
            epoch=epoch,
            deadline_s=now_s + timeout.seconds + timeout.nanos / 1e9,
            status=self._status(change, ChangePhase.CHANGE_PHASE_PREPARING),
        )
        self.held.changes[taken.id] = taken
        return taken

    def _take_directive(self, delta: Delta, *, epoch: int, now_s: float) -> HeldChange | None:
        """commit, abort or resolved. Returns the change if its status is to be told now."""
        kind = delta.WhichOneof("change")
        change_id = (
            delta.commit.change_id
            if kind == "commit"
            else delta.abort.change_id
            if kind == "abort"
            else delta.resolved.change_id
        )
        change = self.held.changes.get(change_id)
        if change is None:
            change = self._unheard(change_id, epoch=epoch, now_s=now_s)
        change.epoch = epoch
        if kind == "resolved":
            change.is_resolved = True
            flipped = delta.resolved.outcome == ChangeOutcome.CHANGE_OUTCOME_FLIPPED
            if flipped and not change.has_ended:
                change.wanted = Wanted.RELEASED
                change.change.generation = change.change.generation or delta.generation
                del change.status.moves[:]
                change.status.moves.extend(delta.resolved.moves)
                return None
            if not flipped and change.is_open:
                self._want_abort(
                    change, failure_of(ErrorReason.ERROR_REASON_CHANGE_CANCELLED, "the authority aborted the change")
                )
                return None
        elif kind == "commit" and change.phase == ChangePhase.CHANGE_PHASE_READY:
            if change.wanted is Wanted.PREPARED:
                change.wanted = Wanted.FLIPPED
            return None
        elif kind == "abort" and change.is_open:
            self._want_abort(change, delta.abort.failure)
            return None
        return change

    def _unheard(self, change_id: str, *, epoch: int, now_s: float) -> HeldChange:
        """A change that is told to end before, or without, anything else: only the engine may know of it."""
        change = Change(change_id=change_id, replica=self.held.replica)
        heard = HeldChange(
            change=change,
            parts=(),
            epoch=epoch,
            deadline_s=now_s,
            status=self._status(change, ChangePhase.CHANGE_PHASE_PREPARING),
        )
        self.held.changes[change_id] = heard
        return heard

    def _want_abort(self, change: HeldChange, why: Failure) -> None:
        change.wanted = Wanted.ABORTED
        change.why = why
        self._abort_tried = False

    # --- time

    def tick(self, now_s: float) -> None:
        """Ends what was prepared for too long, forgets what ended long ago, tries again what failed."""
        for change in list(self.held.changes.values()):
            overdue = change.is_open and change.wanted is Wanted.PREPARED and now_s >= change.deadline_s
            if overdue:
                self._want_abort(
                    change,
                    failure_of(
                        ErrorReason.ERROR_REASON_PREPARE_EXPIRED, f"change {change.id}: its time to prepare passed"
                    ),
                )
                self.persist()
            if change.has_ended and change.ended_s is None:
                change.ended_s = now_s
            if change.is_resolved and change.ended_s is not None and now_s - change.ended_s >= REMEMBERED_S:
                del self.held.changes[change.id]
                self.persist()
        self.advance(now_s)

    def next_s(self) -> float:
        """When `tick` is due; infinity: not by itself."""
        deadlines = [
            change.deadline_s
            for change in self.held.changes.values()
            if change.is_open and change.wanted is Wanted.PREPARED
        ]
        retries = self._call is None and self._next_request(self._retry_s) is not None
        return min([*deadlines, self._retry_s if retries else float("inf")])

    # --- the engine

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
        held = self.held
        aborting = next((c for c in held.changes.values() if c.is_open and c.wanted is Wanted.ABORTED), None)
        must_apply = (
            not held.is_applied and held.failure is None and AgentCapability.AGENT_CAPABILITY_ASSIGN in self._can
        )
        if aborting is not None and not (must_apply and self._abort_tried):
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

    def waits_for(self, number: int) -> bool:
        return self._call is not None and self._call[0] == number

    def is_applying(self) -> bool:
        """Whether the call that is being waited for is of the assignment."""
        return self._call is not None and isinstance(self._call[1], ApplyAssignmentRequest)

    def progressed(self, response: CopyMovesResponse, now_s: float) -> None:
        """The copy goes on."""
        change = self._call[2] if self._call else None
        if change is not None and change.is_open:
            self._note_copy(change, response)
            if now_s - self._told_progress_s >= PROGRESS_S:
                self._told_progress_s = now_s
                self._tell(change)

    def answered(self, answer: EngineResponse | Failure, now_s: float) -> None:
        """What the engine answered to the call that is being waited for."""
        assert self._call is not None
        _, request, change = self._call
        self._call = None
        if isinstance(answer, Failure) and answer.reason in _UNREACHABLE:
            self._try_later(request, change, answer, now_s)
        else:
            self._retry_s, self._wait_s = now_s, LEAST_WAIT_S
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
            if not self._abort_tried and not self.held.is_applied:
                self._retry_s = now_s  # the assignment that waits goes on
            self._abort_tried = True
        elif isinstance(request, FlipMovesRequest) and now_s >= change.deadline_s:
            self._want_abort(change, failure)  # it may have flipped: AbortMoves says which
        elif isinstance(request, CopyMovesRequest):
            change.is_reserved = False  # another engine may answer next: begin again

    def _applied(self, answer: EngineResponse | Failure) -> None:
        held = self.held
        held.is_applied = True
        if isinstance(answer, Failure):
            held.failure, held.assignment_state = answer, AssignmentState.ASSIGNMENT_STATE_FAILED
        elif isinstance(answer, ApplyAssignmentResponse):
            held.assignment_state = answer.state

    def _change_refused(self, request: EngineRequest, change: HeldChange, failure: Failure, now_s: float) -> None:
        if isinstance(request, AbortMovesRequest):
            self._retry_s = now_s + self._wait_s
            self._abort_tried = True
        elif isinstance(request, ReleaseMovesRequest):
            if failure.reason == ErrorReason.ERROR_REASON_CHANGE_UNKNOWN:
                self._enter(change, ChangePhase.CHANGE_PHASE_RELEASED, now_s=now_s)  # it holds nothing of it
            else:
                self._retry_s = now_s + MOST_WAIT_S
        elif isinstance(request, FlipMovesRequest) and failure.reason == ErrorReason.ERROR_REASON_STALE_EPOCH:
            change.wanted = Wanted.PREPARED  # whose permission it was may give none
            self.persist()
        else:
            self._want_abort(change, failure)
            self.persist()

    def _change_answered(self, answer: EngineResponse, change: HeldChange, now_s: float) -> None:
        ready = False
        if isinstance(answer, ReserveMovesResponse):
            change.is_reserved = True
            _add_moves(change, answer.moves)
            ready = not change.copies
        elif isinstance(answer, CopyMovesResponse):
            self._note_copy(change, answer)
            ready = True
        elif isinstance(answer, FlipMovesResponse | AbortMovesResponse):
            _add_moves(change, answer.moves)
            if isinstance(answer, FlipMovesResponse):
                change.status.step = answer.step
                if answer.HasField("failure"):
                    change.why = answer.failure
            flipped = answer.outcome == ChangeOutcome.CHANGE_OUTCOME_FLIPPED
            if flipped:
                change.change.generation = change.change.generation or answer.generation
            self._enter(change, _OUTCOME[answer.outcome], now_s=now_s)
        else:
            self._enter(change, ChangePhase.CHANGE_PHASE_RELEASED, now_s=now_s)
        if ready and change.wanted is Wanted.PREPARED:
            self._enter(change, ChangePhase.CHANGE_PHASE_READY, now_s=now_s)

    def hear_change(self, said: ChangeStatus, now_s: float) -> None:
        """What the engine's report says of a change: how it ended may have passed the agent by."""
        change = self.held.changes.get(said.change_id)
        ended = said.phase in (
            ChangePhase.CHANGE_PHASE_FLIPPED,
            ChangePhase.CHANGE_PHASE_ABORTED,
            ChangePhase.CHANGE_PHASE_RELEASED,
        )
        if change is None:
            if said.phase not in (ChangePhase.CHANGE_PHASE_ABORTED, ChangePhase.CHANGE_PHASE_RELEASED):
                self._adopt(said, now_s)
            return
        if not ended or not change.may_become(said.phase):
            return
        _add_moves(change, said.moves)
        change.status.step = change.status.step or said.step
        if said.HasField("failure"):
            change.why = said.failure
        self._enter(change, said.phase, now_s=now_s)

    def _adopt(self, said: ChangeStatus, now_s: float) -> None:
        """A change that the engine has and the agent lost the record of: its time to prepare is not known."""
        change = self._unheard(said.change_id, epoch=0, now_s=now_s)
        change.change.generation = said.generation if said.phase == ChangePhase.CHANGE_PHASE_FLIPPED else 0
        if said.phase == ChangePhase.CHANGE_PHASE_FLIPPED:
            change.status.step = said.step
            _add_moves(change, said.moves)
            self._enter(change, said.phase, now_s=now_s)
        else:
            self._want_abort(
                change,
                failure_of(
                    ErrorReason.ERROR_REASON_PREPARE_EXPIRED, f"the agent lost its record of change {said.change_id}"
                ),
            )
            self.persist()

    def engine_restarted(self, now_s: float) -> None:
        """All KV is gone: what is held is applied again, what was under way is given up."""
        if self.held.assignment is not None:
            self.held.is_applied, self.held.failure = False, None
            self.held.assignment_state = self._first_state()
        self._call = None
        self._retry_s, self._wait_s = now_s, LEAST_WAIT_S
        for change in self.held.changes.values():
            if change.is_open and change.wanted is not Wanted.ABORTED:
                self._want_abort(
                    change, failure_of(ErrorReason.ERROR_REASON_ENGINE_UNREACHABLE, "the engine restarted")
                )
        self.persist()

    def forget_assignment(self) -> None:
        """An old planner gave it, as the engine knows: nothing is held, so that the present one sends its own."""
        self.held.assignment, self.held.generation, self.held.is_applied = None, 0, True
        self.held.nonce, self.held.answer = "", None
        self.persist()

    # --- telling

    def statuses(self) -> list[ChangeStatus]:
        """Of all changes that are remembered."""
        return [change.status for change in self.held.changes.values()]

    def tell_unresolved(self) -> None:
        """Says again how far changes are, until a ``resolved`` delta came."""
        for change in self.held.changes.values():
            if not change.is_resolved or not change.has_ended:
                self._tell(change)

    def report(self, engine: ReplicaReport | None) -> ReplicaReport:
        """The part of the replica on this node, by what the engine says and what the agent holds."""
        report = ReplicaReport(replica=self.held.replica, assignment_state=self.held.assignment_state)
        is_told = self.held.is_applied or AgentCapability.AGENT_CAPABILITY_ASSIGN not in self._can
        if engine is not None and is_told and self.held.failure is None:
            report.CopyFrom(engine)
        report.replica = self.held.replica
        report.generation = self.held.held_generation
        if self.held.failure is not None:
            report.failure.CopyFrom(self.held.failure)
        return report

    def persist(self) -> None:
        self._outbox.persist(self.held.replica, self.held.to_bytes(clock=self._clock))

    def _status(self, change: Change, phase: ChangePhase.ValueType) -> ChangeStatus:
        return ChangeStatus(
            change_id=change.change_id, replica=self.held.replica, phase=phase, generation=self.held.held_generation
        )

    def _enter(self, change: HeldChange, phase: ChangePhase.ValueType, *, now_s: float) -> None:
        """A change goes forward: on disk first, then told."""
        if not change.may_become(phase):
            return
        has_flipped = phase in (ChangePhase.CHANGE_PHASE_FLIPPED, ChangePhase.CHANGE_PHASE_RELEASED)
        if has_flipped and self.held.assignment is not None:
            self.held.generation = max(self.held.generation, change.change.generation)
        if change.wanted is Wanted.FLIPPED or (change.wanted is Wanted.ABORTED and has_flipped):
            change.wanted = Wanted.RELEASED if change.is_resolved else Wanted.PREPARED
        change.status.phase = phase
        change.status.generation = self.held.held_generation
        if phase == ChangePhase.CHANGE_PHASE_ABORTED and change.why is not None:
            change.status.failure.CopyFrom(change.why)
        if change.has_ended:
            change.ended_s = now_s
            self._forget_oldest()
        self.persist()
        self._tell(change)

    def _forget_oldest(self) -> None:
        ended = [change.id for change in self.held.changes.values() if change.has_ended]
        for change_id in ended[: max(len(ended) - MOST_ENDED, 0)]:
            del self.held.changes[change_id]

    def _note_copy(self, change: HeldChange, response: CopyMovesResponse) -> None:
        change.status.copied_bytes = max(change.status.copied_bytes, response.copied_bytes)
        _add_moves(change, response.moves)

    def _tell(self, change: HeldChange) -> None:
        self._outbox.send(ConnectNodeRequest(change_status=change.status))


def _expired(message: str) -> Failure:
    return failure_of(ErrorReason.ERROR_REASON_PREPARE_EXPIRED, message)


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(max(int(seconds * 1e9), 0))
    return duration


def _add_moves(change: HeldChange, moves: Iterable[MoveResult]) -> None:
    known = {move.number for move in change.status.moves}
    change.status.moves.extend(move for move in moves if move.number not in known)


def _contradicts(change: HeldChange, outcome: ChangeOutcome.ValueType) -> bool:
    if outcome == ChangeOutcome.CHANGE_OUTCOME_FLIPPED:
        return change.phase not in (ChangePhase.CHANGE_PHASE_FLIPPED, ChangePhase.CHANGE_PHASE_RELEASED)
    return change.phase in (ChangePhase.CHANGE_PHASE_FLIPPED, ChangePhase.CHANGE_PHASE_RELEASED)


def _wrong_phase(change: HeldChange, why: str) -> Failure:
    phase = ChangePhase.Name(change.phase).removeprefix("CHANGE_PHASE_")
    return failure_of(
        ErrorReason.ERROR_REASON_CHANGE_PHASE,
        f"change {change.id} is {phase} here and {why}",
        change_id=change.id,
        phase=phase,
    )
