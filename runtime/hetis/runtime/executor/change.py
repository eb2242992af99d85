"""A change as an engine holds it, and the failures that prevent it or one of its moves."""

from __future__ import annotations

from dataclasses import dataclass, field

from hetis.runtime.executor.refusals import RefusedError, failure_of, refusal
from hetis.v1.change_pb2 import Change, ChangeOutcome, ChangePart, ChangePhase, ChangeStatus, MoveResult
from hetis.v1.failure_pb2 import ErrorReason, Failure
from hetis.v1.head_map_pb2 import Move

ENDED = (ChangePhase.CHANGE_PHASE_FLIPPED, ChangePhase.CHANGE_PHASE_ABORTED, ChangePhase.CHANGE_PHASE_RELEASED)


@dataclass(slots=True, kw_only=True)
class EngineChange:
    """A change in this engine.

    Attributes:
        change: as reserved; empty but for its id if the engine was only told to abort it.
        parts: this node's parts.
        deadline_s: until when it may be prepared, on the engine's clock.
        left_out: moves that are not made, by number, with the reason.
        copy_bytes: bytes that this node copies, as far as known now.
        copied_bytes: bytes copied so far.
        copy_begun_s: when CopyMoves was first called. None: not yet.
        flip_by_s: FlipMoves was called, and the flip happens before this time or not at all. None: not called yet.
        step: decode step before which it was flipped.
        generation: of the replica after it ended.
        why: reason for the abort.
        forget_s: when it may be forgotten. None: neither released nor given up yet.
    """

    change: Change
    parts: tuple[ChangePart.ValueType, ...] = ()
    phase: ChangePhase.ValueType = ChangePhase.CHANGE_PHASE_PREPARING
    deadline_s: float = 0.0
    left_out: dict[int, Failure] = field(default_factory=dict)
    copy_bytes: int = 0
    copied_bytes: int = 0
    copy_begun_s: float | None = None
    flip_by_s: float | None = None
    step: int = 0
    generation: int = 0
    why: Failure | None = None
    forget_s: float | None = None

    @property
    def is_authority(self) -> bool:
        return ChangePart.CHANGE_PART_AUTHORITY in self.parts

    @property
    def is_open(self) -> bool:
        return self.phase not in ENDED

    def results(self) -> list[MoveResult]:
        return [MoveResult(number=number, failure=why) for number, why in sorted(self.left_out.items())]

    def outcome(self) -> ChangeOutcome.ValueType:
        aborted = self.phase == ChangePhase.CHANGE_PHASE_ABORTED
        return ChangeOutcome.CHANGE_OUTCOME_ABORTED if aborted else ChangeOutcome.CHANGE_OUTCOME_FLIPPED

    def status(self, replica: str, generation: int) -> ChangeStatus:
        return ChangeStatus(
            change_id=self.change.change_id,
            replica=replica,
            phase=self.phase,
            generation=generation,
            moves=self.results(),
            copied_bytes=self.copied_bytes,
            failure=self.why if self.phase == ChangePhase.CHANGE_PHASE_ABORTED else None,
            step=self.step,
        )


def unknown(change_id: str) -> RefusedError:
    return refusal(ErrorReason.ERROR_REASON_CHANGE_UNKNOWN, f"change {change_id} is not known", change_id=change_id)


def expired(change_id: str) -> Failure:
    return failure_of(ErrorReason.ERROR_REASON_PREPARE_EXPIRED, f"change {change_id}: its time to prepare passed")


def gone(move: Move) -> Failure:
    return failure_of(
        ErrorReason.ERROR_REASON_REQUEST_GONE, f"{move.request} does not run any more", request=move.request
    )


def unavailable(device: str) -> Failure:
    return failure_of(ErrorReason.ERROR_REASON_DEVICE_UNAVAILABLE, f"{device} cannot be relied on", device=device)


def no_room(move: Move, **blocks: int) -> Failure:
    return failure_of(
        ErrorReason.ERROR_REASON_KV_BLOCKS_EXHAUSTED,
        f"{move.target} has too few free KV blocks for {move.request}",
        device=move.target,
        **blocks,
    )


def not_owner(move: Move, group: int, owner: str) -> Failure:
    return failure_of(
        ErrorReason.ERROR_REASON_NOT_OWNER,
        f"{move.source} does not own head group {group} of {move.request}",
        request=move.request,
        owner=owner,
    )
