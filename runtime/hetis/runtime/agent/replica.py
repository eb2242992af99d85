"""One replica on one node: accepts or refuses the planner's deltas, and drives the engine to the desired state.

The state held here (`hetis.runtime.agent.replica_state`) records what is desired and what the engine has done. The
next call to the engine follows from the difference, so it does not matter whether a directive came once or twice,
before or after a restart. Every change of the state is on disk before it is reported to the planner.
"""

from __future__ import annotations

from copy import deepcopy

from google.protobuf.duration_pb2 import Duration

from hetis.runtime.agent.outbox import EngineRequest, EngineResponse, Outbox
from hetis.runtime.agent.replica_state import (
    ChangeState,
    DesiredPhase,
    Fence,
    ReplicaState,
    refusal_of,
    wrong_fields,
)
from hetis.runtime.moves.changes import REMEMBERED_S, expired
from hetis.runtime.moves.refusals import failure_of, unreachable
from hetis.v1 import executor_service_pb2 as messages
from hetis.v1.agent_service_pb2 import AgentCapability, ConnectNodeRequest, Delta, DeltaAck, DeltaNack
from hetis.v1.change_pb2 import Change, ChangeOutcome, ChangePhase, ChangeStatus
from hetis.v1.changes import DECIDED, PHASE_OF_OUTCOME
from hetis.v1.failure_pb2 import ErrorReason, Failure
from hetis.v1.report_pb2 import AssignmentState, ReplicaReport

LEAST_WAIT_S, MOST_WAIT_S = 0.2, 5.0  # shortest and longest wait before a failed call is repeated
CALL_S = 10.0  # an engine that does not answer within this time counts as unreachable
PROGRESS_S = 1.0  # interval between statuses that only report copied bytes
UNREACHABLE = (ErrorReason.ERROR_REASON_ENGINE_UNREACHABLE, ErrorReason.ERROR_REASON_INTERNAL)
# State of a replica whose engine cannot be reached, by the last one that it reported. Any other state stays.
_WITHOUT_ENGINE = {
    AssignmentState.ASSIGNMENT_STATE_LOADED: AssignmentState.ASSIGNMENT_STATE_LOADING,
    AssignmentState.ASSIGNMENT_STATE_SERVING: AssignmentState.ASSIGNMENT_STATE_FAILED,
    AssignmentState.ASSIGNMENT_STATE_DRAINING: AssignmentState.ASSIGNMENT_STATE_FAILED,
}


class ReplicaAgent:
    """The agent's work on one replica, whose state on this node is ``held``, as read from disk or empty.

    ``capabilities`` are what the agent can do for its engine; ``clock`` names the origin of times, see
    `ReplicaState.to_bytes`.
    """

    def __init__(
        self,
        held: ReplicaState,
        *,
        capabilities: frozenset[AgentCapability.ValueType],
        clock: str,
        fence: Fence,
        outbox: Outbox,
    ) -> None:
        self.held, self._can, self._clock, self._fence, self._outbox = held, capabilities, clock, fence, outbox
        self._call: tuple[int, EngineRequest, ChangeState | None] | None = None
        self._retry_s = self._progress_sent_s = float("-inf")
        self._wait_s = LEAST_WAIT_S

    # --- the planner

    def handle(self, delta: Delta, *, epoch: int, now_s: float) -> None:
        """Store and acknowledge a delta whose epoch is not stale, or refuse it."""
        if delta.nonce and delta.nonce == self.held.nonce and self.held.answer is not None:
            self._outbox.send(self.held.answer)
            return
        failure = wrong_fields(delta) or refusal_of(delta, self.held, self._can)
        if failure is not None:
            self.refuse(delta, failure)
            return
        reported: ChangeState | None = None
        match delta.WhichOneof("change"):
            case "assignment" | "removal":
                if self.held.take_assignment(delta, self._first_state(), epoch=epoch):
                    self._give_up_open(ErrorReason.ERROR_REASON_CHANGE_CANCELLED, "a new assignment arrived")
            case "prepare":
                reported = self._take_prepare(delta, epoch=epoch, now_s=now_s)
            case _:
                reported = self._take_directive(delta, epoch=epoch, now_s=now_s)
        ack = DeltaAck(nonce=delta.nonce, replica=delta.replica, generation=self.held.held_generation)
        answer = ConnectNodeRequest(ack=ack)
        self.held.remember(delta.nonce, answer)
        self._wait_no_longer(now_s)
        self._persist()
        self._outbox.send(answer)
        if reported is not None:
            self._send_status(reported)
        self.advance(now_s)

    def refuse(self, delta: Delta, failure: Failure) -> None:
        """Refuse a delta and leave everything as it was; if repeated, it is refused again, whatever has changed."""
        generation = self.held.held_generation
        nack = DeltaNack(nonce=delta.nonce, replica=delta.replica, generation=generation, failure=failure)
        answer = ConnectNodeRequest(nack=nack)
        self.held.remember(delta.nonce, answer)
        if self.held.generation:  # otherwise nothing was ever held, and a file would only preserve a mistake
            self._persist()
        self._outbox.send(answer)

    def _take_prepare(self, delta: Delta, *, epoch: int, now_s: float) -> ChangeState:
        known = self.held.changes.get(delta.prepare.change.change_id)
        if known is not None:
            return known
        change = deepcopy(delta.prepare.change)
        taken = ChangeState(
            change=change,
            parts=tuple(dict.fromkeys(delta.prepare.parts)),
            epoch=epoch,
            deadline_s=now_s + change.prepare_timeout.ToNanoseconds() / 1e9,
            status=ChangeState.first_status(change, generation=self.held.held_generation),
        )
        self.held.changes[taken.id] = taken
        return taken

    def _take_directive(self, delta: Delta, *, epoch: int, now_s: float) -> ChangeState | None:
        """Take a commit, an abort or a resolution. Returns the change if its status must be reported now."""
        kind = delta.WhichOneof("change")
        assert kind in ("commit", "abort", "resolved"), kind
        change_id: str = getattr(delta, kind).change_id
        change = self.held.changes.get(change_id) or self._ending(change_id, epoch=epoch, now_s=now_s)
        return change if change.take(delta, epoch=epoch) else None

    def forget_assignment(self) -> None:
        """Drop an assignment that the engine knows to be of an old planner, so that the current one sends its own."""
        self.held.forget_assignment()
        self._persist()

    # --- time

    def tick(self, now_s: float) -> None:
        """Abort changes that took too long to prepare, forget those that ended long ago, and retry failed calls."""
        self._expire_changes(now_s)
        self.advance(now_s)

    def next_s(self) -> float:
        """Return when `tick` is due, or infinity if never."""
        deadlines = [change.deadline_s for change in self.held.changes.values() if change.is_being_prepared]
        retries = self._call is None and self._next_request(self._retry_s) is not None
        return min([*deadlines, self._retry_s if retries else float("inf")])

    # --- calls to the engine

    def _wait_no_longer(self, now_s: float) -> None:
        """Make the next call due now, because the desired state has changed."""
        self._retry_s, self._wait_s = now_s, LEAST_WAIT_S

    def waits_for(self, number: int) -> bool:
        return self._call is not None and self._call[0] == number

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to do: the replica was removed, or never assigned, and no change is in progress."""
        return self.held.assignment is None and not self._must_apply and self.held.open_change is None

    @property
    def _must_apply(self) -> bool:
        """Whether the engine has yet to apply the assignment, or its removal: it can, and there was one."""
        can = AgentCapability.AGENT_CAPABILITY_ASSIGN in self._can
        return can and self.held.generation > 0 and not self.held.is_applied and self.held.failure is None

    def is_applying(self) -> bool:
        """Return whether the pending call applies the assignment."""
        return self._call is not None and isinstance(self._call[1], messages.ApplyAssignmentRequest)

    def advance(self, now_s: float) -> None:
        """Make the next call to the engine, if one is due and none is pending."""
        if self._call is not None:
            number, request, change = self._call
            is_copy = isinstance(request, messages.CopyMovesRequest)
            if not is_copy or change is None or change.desired is DesiredPhase.PREPARED:
                return
            self._outbox.cancel(number)
            self._call = None
        if now_s < self._retry_s:
            return
        found = self._next_request(now_s)
        if found is None:
            return
        request, change = found
        timeout_s = None if isinstance(request, messages.CopyMovesRequest) else CALL_S
        self._call = (self._outbox.call(request, timeout_s=timeout_s), request, change)

    def _next_request(self, now_s: float) -> tuple[EngineRequest, ChangeState | None] | None:
        """Return the next request to the engine and the change that it is about."""
        held, epoch, must_apply = self.held, self._fence.newest, self._must_apply
        aborting = next((c for c in held.changes.values() if c.is_open and c.desired is DesiredPhase.ABORTED), None)
        if aborting is not None and not (must_apply and aborting.is_abort_tried):
            return messages.AbortMovesRequest(epoch=epoch, change_id=aborting.id, failure=aborting.why), aborting
        if must_apply:
            apply = messages.ApplyAssignmentRequest(epoch=epoch, generation=held.generation, assignment=held.assignment)
            if held.assignment is None:
                apply.removed_replica = held.replica
            return apply, None
        found = ((self._next_of_change(change, now_s), change) for change in held.changes.values())
        return next(((request, change) for request, change in found if request is not None), None)

    def _next_of_change(self, change: ChangeState, now_s: float) -> EngineRequest | None:
        if change.desired is DesiredPhase.RELEASED and not change.has_ended:
            return messages.ReleaseMovesRequest(
                epoch=self._fence.newest,
                change_id=change.id,
                moves=change.status.moves,
                generation=change.change.generation,
            )
        if not change.is_open:
            return None
        if change.desired is DesiredPhase.FLIPPED:
            left_s = change.deadline_s - now_s
            return messages.FlipMovesRequest(epoch=change.epoch, change_id=change.id, timeout=_duration(left_s))
        if change.desired is DesiredPhase.PREPARED and change.phase == ChangePhase.CHANGE_PHASE_PREPARING:
            if change.is_reserved:
                return messages.CopyMovesRequest(epoch=change.epoch, change_id=change.id)
            left = deepcopy(change.change)
            left.prepare_timeout.CopyFrom(_duration(max(change.deadline_s - now_s, 1e-3)))
            return messages.ReserveMovesRequest(epoch=change.epoch, change=left, parts=change.parts)
        return None

    def progressed(self, response: messages.CopyMovesResponse, now_s: float) -> None:
        """Record the progress of a copy, and report it to the planner once a second."""
        change = self._call[2] if self._call else None
        if change is not None and change.is_open:
            change.copied(response)
            if now_s - self._progress_sent_s >= PROGRESS_S:
                self._progress_sent_s = now_s
                self._send_status(change)

    def answered(self, answer: EngineResponse | Failure, now_s: float) -> None:
        """Handle the engine's answer to the pending call."""
        assert self._call is not None
        _, request, change = self._call
        self._call = None
        if isinstance(answer, Failure) and answer.reason in UNREACHABLE:
            self._try_later(request, change, answer, now_s)
        else:
            self._wait_no_longer(now_s)
            if change is None:
                self._applied(answer)
            elif isinstance(answer, Failure):
                self._change_refused(request, change, answer, now_s)
            else:
                self._change_answered(answer, change, now_s)
        self.advance(now_s)

    def _try_later(self, request: EngineRequest, change: ChangeState | None, failure: Failure, now_s: float) -> None:
        self._retry_s = now_s + self._wait_s
        self._wait_s = min(2 * self._wait_s, MOST_WAIT_S)
        if change is None:
            return
        if isinstance(request, messages.AbortMovesRequest):
            if not change.is_abort_tried and self._must_apply:
                self._retry_s = now_s  # let the waiting assignment proceed
            change.abort_tried()
        elif isinstance(request, messages.FlipMovesRequest) and now_s >= change.deadline_s:
            change.want_abort(failure)  # it may have flipped: AbortMoves will tell
        elif isinstance(request, messages.CopyMovesRequest):
            change.lost_reservation()

    def _applied(self, answer: EngineResponse | Failure) -> None:
        assert isinstance(answer, Failure | messages.ApplyAssignmentResponse), "it answers ApplyAssignment"
        if isinstance(answer, Failure):
            self.held.applied(answer)
        else:
            self.held.applied(answer.state)
            self._persist()

    def _change_refused(self, request: EngineRequest, change: ChangeState, failure: Failure, now_s: float) -> None:
        if isinstance(request, messages.AbortMovesRequest):
            self._retry_s = now_s + self._wait_s
            change.abort_tried()
        elif isinstance(request, messages.ReleaseMovesRequest):
            if failure.reason == ErrorReason.ERROR_REASON_CHANGE_UNKNOWN:
                self._enter(change, ChangePhase.CHANGE_PHASE_RELEASED, now_s=now_s)  # the engine has nothing of it
            else:
                self._retry_s = now_s + MOST_WAIT_S
        elif isinstance(request, messages.FlipMovesRequest) and failure.reason == ErrorReason.ERROR_REASON_STALE_EPOCH:
            change.revoke_commit()
            self._persist()
        else:
            change.want_abort(failure)
            self._persist()

    def _change_answered(self, answer: EngineResponse, change: ChangeState, now_s: float) -> None:
        ready = False
        if isinstance(answer, messages.ReserveMovesResponse):
            change.reserved(answer.moves)
            ready = not change.copies
        elif isinstance(answer, messages.CopyMovesResponse):
            change.copied(answer)
            ready = True
        elif isinstance(answer, messages.FlipMovesResponse | messages.AbortMovesResponse):
            if isinstance(answer, messages.FlipMovesResponse):
                change.learn(answer)
            else:
                change.leave_out(answer.moves)
            if answer.outcome == ChangeOutcome.CHANGE_OUTCOME_FLIPPED:
                change.learn_generation(answer.generation)
            self._enter(change, PHASE_OF_OUTCOME[answer.outcome], now_s=now_s)
        else:
            self._enter(change, ChangePhase.CHANGE_PHASE_RELEASED, now_s=now_s)
        if ready and change.desired is DesiredPhase.PREPARED:
            self._enter(change, ChangePhase.CHANGE_PHASE_READY, now_s=now_s)

    # --- the engine's reports

    def take_status(self, said: ChangeStatus, now_s: float) -> None:
        """Handle the engine's report on a change, whose end the agent may have missed."""
        change = self.held.changes.get(said.change_id)
        if change is None:
            if said.phase not in (ChangePhase.CHANGE_PHASE_ABORTED, ChangePhase.CHANGE_PHASE_RELEASED):
                self._adopt(said, now_s)
            return
        if said.phase not in DECIDED or not change.may_become(said.phase):
            return
        change.learn(said)
        self._enter(change, said.phase, now_s=now_s)

    def _adopt(self, said: ChangeStatus, now_s: float) -> None:
        """Adopt a change that the engine has and of which the agent lost its record; its deadline is unknown."""
        change = self._ending(said.change_id, epoch=0, now_s=now_s)
        if said.phase == ChangePhase.CHANGE_PHASE_FLIPPED:
            change.learn_generation(said.generation)
            change.learn(said)
            self._enter(change, said.phase, now_s=now_s)
        else:
            lost = f"the agent lost its record of change {said.change_id}"
            change.want_abort(failure_of(ErrorReason.ERROR_REASON_PREPARE_EXPIRED, lost))
            self._persist()

    def engine_restarted(self, now_s: float) -> None:
        """Apply the assignment again and give up open changes: the engine's KV is gone."""
        if self.held.assignment is not None:
            self.held.must_apply(self._first_state())
        self._call = None
        self._wait_no_longer(now_s)
        self._give_up_open(ErrorReason.ERROR_REASON_ENGINE_UNREACHABLE, "the engine restarted")
        self._persist()

    # --- reports to the planner

    def statuses(self) -> list[ChangeStatus]:
        """Return the statuses of all changes that are remembered."""
        return [change.status for change in self.held.changes.values()]

    def report_unresolved(self) -> None:
        """Send the statuses of all changes again except those that have both ended and been resolved."""
        for change in self.held.changes.values():
            if not change.is_resolved or not change.has_ended:
                self._send_status(change)

    def report(self, engine: ReplicaReport | None) -> ReplicaReport:
        """Return the report on this node's part of the replica, from the engine's report and the state held here.

        An engine that reports a replica has applied it in its present run, even if it has not answered the latest
        assignment yet, or any call in this run of the agent. So a node that serves is not reported as loading merely
        because it receives another assignment.
        """
        report = self._without_engine(self.held.assignment_state)
        is_steered = AgentCapability.AGENT_CAPABILITY_ASSIGN in self._can
        has_applied = self.held.is_applied or not self.held.is_anew or not is_steered
        if engine is not None and has_applied and self.held.failure is None:
            report.CopyFrom(engine)
            report.replica, report.generation = self.held.replica, self.held.held_generation
        if self.held.failure is not None:
            report.failure.CopyFrom(self.held.failure)
        return report

    def report_anew(self) -> ReplicaReport:
        """Return the report for an engine that has just started, without anything from its previous run."""
        return self._without_engine(self._first_state())

    def report_lost(self, last: AssignmentState.ValueType) -> ReplicaReport:
        """Return the report for an engine that cannot be reached. ``last``: the state in its last report.

        A replica that was served has failed. One that was not served yet is loading: a planner gives up a replica that
        fails before it has ever served, but one whose engine is started again is only late.
        """
        report = self._without_engine(_WITHOUT_ENGINE.get(last, last))
        if self.held.failure is not None:
            report.failure.CopyFrom(self.held.failure)
        elif report.assignment_state != last and last != AssignmentState.ASSIGNMENT_STATE_LOADED:
            report.failure.CopyFrom(unreachable("the engine cannot be reached"))
        return report

    def _without_engine(self, state: AssignmentState.ValueType) -> ReplicaReport:
        held = self.held
        return ReplicaReport(replica=held.replica, assignment_state=state, generation=held.held_generation)

    # --- the state held here, on disk first

    def _persist(self) -> None:
        self._outbox.persist(self.held.replica, self.held.to_bytes(clock=self._clock))

    def _send_status(self, change: ChangeState) -> None:
        """Report the change's status to the planner."""
        self._outbox.send(ConnectNodeRequest(change_status=change.status))

    def _first_state(self) -> AssignmentState.ValueType:
        """Return the state of an assignment that the engine has not answered yet."""
        can = AgentCapability.AGENT_CAPABILITY_ASSIGN in self._can
        return AssignmentState.ASSIGNMENT_STATE_LOADING if can else AssignmentState.ASSIGNMENT_STATE_UNMANAGED

    def _ending(self, change_id: str, *, epoch: int, now_s: float) -> ChangeState:
        """Record a change of which the agent first learns now that it is to end: only the engine may know it."""
        change = Change(change_id=change_id, replica=self.held.replica)
        status = ChangeState.first_status(change, generation=self.held.held_generation)
        state = self.held.changes[change_id] = ChangeState(change=change, epoch=epoch, deadline_s=now_s, status=status)
        return state

    def _give_up_open(self, reason: ErrorReason.ValueType, message: str) -> None:
        """Mark every open change to be aborted."""
        for change in self.held.changes.values():
            if change.is_open and change.desired is not DesiredPhase.ABORTED:
                change.want_abort(failure_of(reason, message))

    def _enter(self, change: ChangeState, phase: ChangePhase.ValueType, *, now_s: float) -> None:
        """Move a change to its next phase: on disk first, then to the planner."""
        if change.may_become(phase):
            self.held.enter(change, phase, now_s=now_s)
            self._persist()
            self._send_status(change)

    def _expire_changes(self, now_s: float) -> None:
        """Abort changes that took too long to prepare, and forget those that ended long ago."""
        for change in list(self.held.changes.values()):
            if change.is_being_prepared and now_s >= change.deadline_s:
                change.want_abort(expired(change.id))
                self._persist()
            change.note_end(now_s)
            if change.is_resolved and change.ended_s is not None and now_s - change.ended_s >= REMEMBERED_S:
                del self.held.changes[change.id]
                self._persist()


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(max(int(seconds * 1e9), 0))
    return duration
