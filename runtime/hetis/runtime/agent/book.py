"""Enters what becomes of one replica and of its changes: into what is held, on disk, and then into the stream."""

from __future__ import annotations

from collections.abc import Iterable

from hetis.runtime.agent.held import HeldChange, HeldReplica, Wanted
from hetis.runtime.agent.outbox import Outbox
from hetis.runtime.executor.refusals import failure_of
from hetis.v1.agent_service_pb2 import AgentCapability, ConnectNodeRequest
from hetis.v1.change_pb2 import Change, ChangePhase, ChangeStatus, MoveResult
from hetis.v1.failure_pb2 import ErrorReason, Failure
from hetis.v1.report_pb2 import AssignmentState

MOST_ENDED = 64  # changes that have ended and are remembered
REMEMBERED_S = 600.0


class ReplicaBook:
    """What is held of one replica, and the only place that writes it down.

    Args:
        held: as read from disk or empty.
        can: what the agent can do for its engine.
        clock: names what times count on, see `HeldReplica.to_bytes`.
    """

    def __init__(
        self, held: HeldReplica, *, can: frozenset[AgentCapability.ValueType], clock: str, outbox: Outbox
    ) -> None:
        self.held = held
        self.can = can
        self._clock = clock
        self._outbox = outbox

    def persist(self) -> None:
        self._outbox.persist(self.held.replica, self.held.to_bytes(clock=self._clock))

    def tell(self, change: HeldChange) -> None:
        """The planner hears how far the change is."""
        self._outbox.send(ConnectNodeRequest(change_status=change.status))

    # --- the assignment

    def first_state(self) -> AssignmentState.ValueType:
        """Of an assignment that the engine has not answered to."""
        can = AgentCapability.AGENT_CAPABILITY_ASSIGN in self.can
        return AssignmentState.ASSIGNMENT_STATE_LOADING if can else AssignmentState.ASSIGNMENT_STATE_UNMANAGED

    # --- changes

    def status(self, change: Change, phase: ChangePhase.ValueType) -> ChangeStatus:
        return ChangeStatus(
            change_id=change.change_id, replica=self.held.replica, phase=phase, generation=self.held.held_generation
        )

    def unheard(self, change_id: str, *, epoch: int, now_s: float) -> HeldChange:
        """A change that is told to end before, or without, anything else: only the engine may know of it."""
        change = Change(change_id=change_id, replica=self.held.replica)
        heard = HeldChange(
            change=change,
            parts=(),
            epoch=epoch,
            deadline_s=now_s,
            status=self.status(change, ChangePhase.CHANGE_PHASE_PREPARING),
        )
        self.held.changes[change_id] = heard
        return heard

    def want_abort(self, change: HeldChange, why: Failure) -> None:
        change.wanted = Wanted.ABORTED
        change.why = why
        change.is_abort_tried = False

    def give_up_open(self, reason: ErrorReason.ValueType, message: str) -> None:
        """No change of the replica goes on."""
        for change in self.held.changes.values():
            if change.is_open and change.wanted is not Wanted.ABORTED:
                self.want_abort(change, failure_of(reason, message))

    def enter(self, change: HeldChange, phase: ChangePhase.ValueType, *, now_s: float) -> None:
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
        self.tell(change)

    def look_at_time(self, now_s: float) -> None:
        """Ends what was prepared for too long, and forgets what ended long ago."""
        for change in list(self.held.changes.values()):
            if change.is_being_prepared and now_s >= change.deadline_s:
                late = f"change {change.id}: its time to prepare passed"
                self.want_abort(change, failure_of(ErrorReason.ERROR_REASON_PREPARE_EXPIRED, late))
                self.persist()
            if change.has_ended and change.ended_s is None:
                change.ended_s = now_s
            if change.is_resolved and change.ended_s is not None and now_s - change.ended_s >= REMEMBERED_S:
                del self.held.changes[change.id]
                self.persist()

    def next_deadline_s(self) -> float:
        """Infinity: nothing is being prepared."""
        open_ones = [change.deadline_s for change in self.held.changes.values() if change.is_being_prepared]
        return min(open_ones, default=float("inf"))

    def _forget_oldest(self) -> None:
        ended = [change.id for change in self.held.changes.values() if change.has_ended]
        for change_id in ended[: max(len(ended) - MOST_ENDED, 0)]:
            del self.held.changes[change_id]


def add_moves(change: HeldChange, moves: Iterable[MoveResult]) -> None:
    """Moves of which it was not known yet that they are not made."""
    known = {move.number for move in change.status.moves}
    change.status.moves.extend(move for move in moves if move.number not in known)
