"""The state machine of a change of heads on one node, which the planner, the agent and the engine share.

    PREPARING ---> READY ---> FLIPPED ---> RELEASED
        |            |
        +------------+------> ABORTED

Phases only go forward, so that messages may be lost, repeated or reordered. The engine runs it, its agent keeps it on
disk beside what the planner wants, and the planner keeps one for each node beside what it has permitted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hetis.v1.change_pb2 import Change, ChangeOutcome, ChangePart, ChangePhase, ChangeStatus, MoveResult
from hetis.v1.failure_pb2 import Failure

FLIPPED = (ChangePhase.CHANGE_PHASE_FLIPPED, ChangePhase.CHANGE_PHASE_RELEASED)
FINAL = (ChangePhase.CHANGE_PHASE_ABORTED, ChangePhase.CHANGE_PHASE_RELEASED)
OPEN = (ChangePhase.CHANGE_PHASE_PREPARING, ChangePhase.CHANGE_PHASE_READY)
DECIDED = (ChangePhase.CHANGE_PHASE_FLIPPED, *FINAL)
_RANK = {
    ChangePhase.CHANGE_PHASE_UNSPECIFIED: 0,
    ChangePhase.CHANGE_PHASE_PREPARING: 1,
    ChangePhase.CHANGE_PHASE_READY: 2,
    ChangePhase.CHANGE_PHASE_FLIPPED: 3,
    ChangePhase.CHANGE_PHASE_ABORTED: 4,
    ChangePhase.CHANGE_PHASE_RELEASED: 4,
}
_OUTCOME = {
    ChangePhase.CHANGE_PHASE_FLIPPED: ChangeOutcome.CHANGE_OUTCOME_FLIPPED,
    ChangePhase.CHANGE_PHASE_RELEASED: ChangeOutcome.CHANGE_OUTCOME_FLIPPED,
    ChangePhase.CHANGE_PHASE_ABORTED: ChangeOutcome.CHANGE_OUTCOME_ABORTED,
}
PHASE_OF_OUTCOME = {
    ChangeOutcome.CHANGE_OUTCOME_FLIPPED: ChangePhase.CHANGE_PHASE_FLIPPED,
    ChangeOutcome.CHANGE_OUTCOME_ABORTED: ChangePhase.CHANGE_PHASE_ABORTED,
}


@dataclass(slots=True, kw_only=True)
class NodeChange:
    """A change on one node."""

    # The change as prepared; only its id and its replica are known where an abort was the first to mention it
    change: Change
    parts: tuple[ChangePart.ValueType, ...] = ()  # this node's parts in it
    status: ChangeStatus  # its progress, as it is reported
    deadline_s: float = 0.0  # until when it may be prepared, on the owner's clock

    @classmethod
    def first_status(cls, change: Change, *, generation: int = 0) -> ChangeStatus:
        """Return the status of a change that begins at a ``generation`` of the replica's state."""
        phase = ChangePhase.CHANGE_PHASE_PREPARING
        return ChangeStatus(change_id=change.change_id, replica=change.replica, phase=phase, generation=generation)

    @property
    def id(self) -> str:
        return self.change.change_id

    @property
    def phase(self) -> ChangePhase.ValueType:
        return self.status.phase

    @property
    def is_authority(self) -> bool:
        return ChangePart.CHANGE_PART_AUTHORITY in self.parts

    @property
    def is_open(self) -> bool:
        """Whether the change can still flip and still be aborted here."""
        return self.phase in OPEN

    @property
    def was_flipped(self) -> bool:
        return self.phase in FLIPPED

    @property
    def has_ended(self) -> bool:
        """Whether the change is in its last phase."""
        return self.phase in FINAL

    @property
    def outcome(self) -> ChangeOutcome.ValueType:
        """How it ended here; UNSPECIFIED while it is open."""
        return _OUTCOME.get(self.phase, ChangeOutcome.CHANGE_OUTCOME_UNSPECIFIED)

    @property
    def left_out(self) -> dict[int, Failure]:
        """The moves that do not share the outcome, by number, with the reason."""
        return {result.number: result.failure for result in self.status.moves}

    def may_become(self, phase: ChangePhase.ValueType) -> bool:
        """Return whether the change may enter a phase; what was flipped can only be released."""
        if self.phase == ChangePhase.CHANGE_PHASE_FLIPPED:
            return phase == ChangePhase.CHANGE_PHASE_RELEASED
        return _RANK.get(phase, 0) > _RANK[self.phase]

    def contradicts(self, said: ChangeStatus) -> bool:
        """Return whether a report tells of another end than the one that is known."""
        return self.phase in DECIDED and said.phase in DECIDED and self.was_flipped != (said.phase in FLIPPED)

    def enter(self, phase: ChangePhase.ValueType, *, generation: int, failure: Failure | None = None) -> None:
        """Enter a phase, at a ``generation`` of the replica's state; ``failure``: why it was aborted."""
        assert self.may_become(phase), f"a change cannot become {phase} after {self.phase}"
        self.status.phase, self.status.generation = phase, generation
        if phase == ChangePhase.CHANGE_PHASE_ABORTED and failure is not None:
            self.status.failure.CopyFrom(failure)

    def leave_out(self, results: Iterable[MoveResult]) -> None:
        """Record moves that do not share the outcome; what is known of a move already stays."""
        known = {result.number for result in self.status.moves}
        self.status.moves.extend(result for result in results if result.number not in known)
        self.status.moves.sort(key=lambda result: result.number)
