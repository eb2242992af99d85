"""Two-phase moves inside a simulated engine, of one replica: as the authority and as anybody else.

The authority checks moves against its head map, reserves blocks at targets, and flips between two steps. Other engines
pin and reserve, and learn how it ended from the authority: they free a source only after its FLIPPED.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from hetis.runtime.agent.refusals import RefusedError, failure_of, generation_mismatch, refusal, unreachable
from hetis.runtime.agent.simulated.replica import PrimaryRun
from hetis.v1.change_pb2 import Change, ChangeOutcome, ChangePart, ChangePhase, ChangeStatus, MoveResult
from hetis.v1.executor_service_pb2 import FlipMovesResponse
from hetis.v1.failure_pb2 import ErrorReason, Failure
from hetis.v1.head_map_pb2 import Move
from hetis.v1.report_pb2 import DeviceStatus

REMEMBERED_S = 600.0
DEFAULT_LINK_BYTES_PER_S = 10e9  # where neither the stage nor the move says how long a copy takes
_ENDED = (ChangePhase.CHANGE_PHASE_FLIPPED, ChangePhase.CHANGE_PHASE_ABORTED, ChangePhase.CHANGE_PHASE_RELEASED)


@dataclass(slots=True, kw_only=True)
class EngineChange:
    """A change in this engine.

    Attributes:
        change: as reserved; empty but for its id where the engine was only told to give it up.
        parts: of this node.
        deadline_s: until when it may be prepared, by the engine's own count.
        left_out: moves that are not made, by number, with the reason.
        copy_bytes, copy_s: what this node copies and how long that takes.
        copy_begun_s: when CopyMoves was first called. None: it was not.
        flip_by_s: FlipMoves was called; the flip is made before then or not at all. None: it was not called.
        step: decode step before which it was flipped.
        generation: of the replica after it ended.
        why: it was aborted.
        forget_s: when it may be forgotten. None: it was not released or given up yet.
    """

    change: Change
    parts: tuple[ChangePart.ValueType, ...] = ()
    phase: ChangePhase.ValueType = ChangePhase.CHANGE_PHASE_PREPARING
    deadline_s: float = 0.0
    left_out: dict[int, Failure] = field(default_factory=dict)
    copy_bytes: int = 0
    copy_s: float = 0.0
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
        return self.phase not in _ENDED

    def copied(self, now_s: float) -> int:
        if self.copy_begun_s is None:
            return 0
        share = 1.0 if self.copy_s <= 0 else min(max(now_s - self.copy_begun_s, 0.0) / self.copy_s, 1.0)
        return int(self.copy_bytes * share)

    def results(self) -> list[MoveResult]:
        return [MoveResult(number=number, failure=why) for number, why in sorted(self.left_out.items())]

    def outcome(self) -> ChangeOutcome.ValueType:
        aborted = self.phase == ChangePhase.CHANGE_PHASE_ABORTED
        return ChangeOutcome.CHANGE_OUTCOME_ABORTED if aborted else ChangeOutcome.CHANGE_OUTCOME_FLIPPED

    def status(self, replica: str, generation: int, now_s: float) -> ChangeStatus:
        return ChangeStatus(
            change_id=self.change.change_id,
            replica=replica,
            phase=self.phase,
            generation=generation,
            moves=self.results(),
            copied_bytes=self.copied(now_s),
            failure=self.why if self.phase == ChangePhase.CHANGE_PHASE_ABORTED else None,
            step=self.step,
        )


class EngineChanges:
    """The changes of one replica in one engine.

    Attributes:
        generation: of the replica's state here.
        primary: its head map, at the engine that owns it. None elsewhere.
        known: by id, in the order in which they came.
    """

    def __init__(self, replica: str, *, generation: int, primary: PrimaryRun | None, devices: frozenset[str]) -> None:
        self.replica = replica
        self.generation = generation
        self.primary = primary
        self.known: dict[str, EngineChange] = {}
        self._devices = devices  # of this node, by name

    # --- the five calls

    def reserve(self, change: Change, parts: Iterable[ChangePart.ValueType], now_s: float) -> EngineChange:
        """ReserveMoves."""
        known = self.known.get(change.change_id)
        if known is not None:
            if not known.is_open:
                raise refusal(
                    ErrorReason.ERROR_REASON_CHANGE_PHASE,
                    f"change {change.change_id} has ended here",
                    change_id=change.change_id,
                    phase=ChangePhase.Name(known.phase).removeprefix("CHANGE_PHASE_"),
                )
            return known
        other = next((found for found in self.known.values() if found.is_open), None)
        if other is not None:
            raise refusal(
                ErrorReason.ERROR_REASON_CHANGE_IN_FLIGHT,
                f"change {other.change.change_id} is under way",
                change_id=other.change.change_id,
            )
        timeout_s = change.prepare_timeout.seconds + change.prepare_timeout.nanos / 1e9
        taken = EngineChange(change=change, parts=tuple(parts), deadline_s=now_s + timeout_s)
        if taken.is_authority:
            self._reserve_here(taken)
        moves = [m for m in change.moves if m.number not in taken.left_out and self._touches(m, taken)]
        taken.copy_bytes = int(sum(move.kv_bytes for move in moves))
        taken.copy_s = sum(self._copy_s(taken, move) for move in moves)
        self.known[change.change_id] = taken
        return taken

    def begin_copy(self, change_id: str, now_s: float) -> EngineChange:
        """CopyMoves: begins the copy, or finds it under way."""
        change = self._open(change_id)
        if now_s >= change.deadline_s and change.phase == ChangePhase.CHANGE_PHASE_PREPARING:
            raise refusal(ErrorReason.ERROR_REASON_PREPARE_EXPIRED, f"change {change_id}: its time to prepare passed")
        if change.copy_begun_s is None:
            change.copy_begun_s = now_s
        return change

    def ask_flip(self, change_id: str, timeout_s: float, now_s: float) -> EngineChange:
        """FlipMoves: to be done at the next boundary; ended changes answer as the first time."""
        change = self.known.get(change_id)
        if change is None:
            raise _unknown(change_id)
        if not change.is_authority:
            raise refusal(
                ErrorReason.ERROR_REASON_CHANGE_PHASE, "this engine is not the authority", change_id=change_id
            )
        if change.is_open and len(change.parts) > 1 and change.phase != ChangePhase.CHANGE_PHASE_READY:
            raise refusal(ErrorReason.ERROR_REASON_CHANGE_PHASE, "its copies are not there yet", change_id=change_id)
        if change.is_open:
            change.flip_by_s = min(change.deadline_s, now_s + timeout_s)
        return change

    def release(self, change_id: str, moves: Iterable[MoveResult], generation: int, now_s: float) -> int:
        """ReleaseMoves: the change was flipped. Returns the blocks per layer that are free now: the authority has
        freed them at the flip, and where another engine owns the map, that one counts them."""
        change = self.known.get(change_id)
        if change is None:
            raise _unknown(change_id)
        if change.phase == ChangePhase.CHANGE_PHASE_ABORTED or (change.is_authority and change.is_open):
            raise refusal(
                ErrorReason.ERROR_REASON_CHANGE_PHASE,
                f"change {change_id} was not flipped",
                change_id=change_id,
                phase=ChangePhase.Name(change.phase).removeprefix("CHANGE_PHASE_"),
            )
        for result in moves:
            change.left_out.setdefault(result.number, result.failure)
        self._learn_flipped(change, generation)
        change.phase = ChangePhase.CHANGE_PHASE_RELEASED
        change.forget_s = now_s + REMEMBERED_S
        return 0

    def abort(
        self, change_id: str, why: Failure, authority: Iterable[ChangeStatus] | None, now_s: float
    ) -> EngineChange:
        """AbortMoves. ``authority``: what its engine said of its changes just now; None: it was not reached.

        An engine whose copies were not complete has promised nothing and may give up alone. After that it goes by the
        authority. One that has never heard of the change cannot say whether it will: then the planner's word, which
        gives the change up for good, is enough, and the agent's own deadline is not.
        """
        change = self.known.get(change_id)
        if change is None:
            change = EngineChange(change=Change(change_id=change_id, replica=self.replica))
            self.known[change_id] = change
            self._end_aborted(change, why)
        elif change.is_open and (change.is_authority or change.phase == ChangePhase.CHANGE_PHASE_PREPARING):
            self._end_aborted(change, why)
        elif change.is_open:
            self._go_by(change, why, authority)
        change.forget_s = now_s + REMEMBERED_S
        return change

    # --- time

    def advance(self, now_s: float) -> None:
        """Copies that are complete, deadlines, what is forgotten."""
        if self.primary is not None:
            for change_id, move in self.primary.take_void():
                change = self.known.get(change_id)
                if change is not None:
                    gone = move.request not in self.primary.running
                    self._leave_out(change, move, _gone(move) if gone else _no_room(move))
        for change in list(self.known.values()):
            if change.phase == ChangePhase.CHANGE_PHASE_PREPARING and self._is_copied(change, now_s):
                change.phase = ChangePhase.CHANGE_PHASE_READY
            overdue = change.is_open and change.is_authority and now_s >= change.deadline_s and change.flip_by_s is None
            if overdue:
                self._end_aborted(change, _expired(change.change.change_id))
            if change.forget_s is not None and now_s >= change.forget_s:
                del self.known[change.change.change_id]

    def flip_due(self, now_s: float) -> None:
        """Between two steps: makes the flips that were asked for, all moves of one at once."""
        for change in self.known.values():
            if change.is_open and change.flip_by_s is not None:
                self._flip(change, now_s)

    def end_all(self, why: Failure) -> None:
        """A new assignment: what is open and the engine's own to decide is aborted."""
        for change in self.known.values():
            if change.is_open and (change.is_authority or change.phase == ChangePhase.CHANGE_PHASE_PREPARING):
                self._end_aborted(change, why)

    def hear(self, said: Iterable[ChangeStatus], generation: int) -> None:
        """What the authority's engine says of its changes: how they ended is final."""
        for status in said:
            change = self.known.get(status.change_id)
            if change is None or not change.is_open or change.is_authority:
                continue
            if status.phase in (ChangePhase.CHANGE_PHASE_FLIPPED, ChangePhase.CHANGE_PHASE_RELEASED):
                for result in status.moves:
                    change.left_out.setdefault(result.number, result.failure)
                change.step = status.step
                self._learn_flipped(change, change.change.generation or generation)
                change.phase = ChangePhase.CHANGE_PHASE_RELEASED
            elif status.phase == ChangePhase.CHANGE_PHASE_ABORTED:
                self._end_aborted(change, status.failure)

    def flip_answer(self, change: EngineChange) -> FlipMovesResponse:
        return FlipMovesResponse(
            outcome=change.outcome(),
            generation=self.generation,
            step=change.step,
            moves=change.results(),
            failure=change.why if change.phase == ChangePhase.CHANGE_PHASE_ABORTED else None,
        )

    # --- inside

    def _reserve_here(self, taken: EngineChange) -> None:
        """Checks every move against the head map and takes blocks for those that fit."""
        change = taken.change
        if change.base_generation != self.generation:
            raise RefusedError(generation_mismatch(change.base_generation, self.generation))
        assert self.primary is not None
        stage = self.primary.stages.get((change.stage, change.copy))
        if stage is None:
            raise refusal(
                ErrorReason.ERROR_REASON_INVALID_FIELD, f"there is no copy {change.copy} of stage {change.stage}"
            )
        reserved = stage.reserved.setdefault(change.change_id, [])
        for move in change.moves:
            why = self._move_refusal(change, move)
            if why is None:
                reserved.append(move)
            else:
                taken.left_out[move.number] = why
        self._keep_together(taken)
        if not stage.reserved[change.change_id]:
            del stage.reserved[change.change_id]
            raise RefusedError(taken.left_out[min(taken.left_out)])

    def _move_refusal(self, change: Change, move: Move) -> Failure | None:
        assert self.primary is not None
        stage = self.primary.stages[change.stage, change.copy]
        request = stage.requests.get(move.request)
        if request is None or request.incarnation != move.incarnation:
            return _gone(move)
        ends = [stage.index.get(move.source), stage.index.get(move.target)]
        lost, ok = DeviceStatus.DEVICE_STATUS_LOST, DeviceStatus.DEVICE_STATUS_OK
        source, target = ends
        if source is None or stage.status[source] == lost:
            return _unavailable(move.source)
        if target is None or stage.status[target] != ok or target == source:
            return _unavailable(move.target)
        owners = stage.owners[move.request]
        taken = {
            group
            for moves in stage.reserved.values()
            for other in moves
            if other.request == move.request and other is not move
            for group in other.head_groups
        }
        for group in move.head_groups:
            if group >= len(owners) or owners[group] != source or group in taken:
                return failure_of(
                    ErrorReason.ERROR_REASON_NOT_OWNER,
                    f"{move.source} does not own head group {group} of {move.request}",
                    request=move.request,
                    owner=stage.model.devices[owners[group]].name if group < len(owners) else "",
                )
        if move in stage.reserved.get(change.change_id, ()):
            return None  # looked at again: its blocks are taken already
        needed, free = stage.blocks(request.context_tokens) * len(move.head_groups), stage.free_blocks()[target]
        return None if needed <= free else _no_room(move, needed_blocks=needed, free_blocks=free)

    def _keep_together(self, change: EngineChange) -> None:
        """Moves that only flip together are left out together, and no request leaves its primary uneven."""
        assert self.primary is not None
        stage = self.primary.stages[change.change.stage, change.change.copy]
        reserved = stage.reserved.get(change.change.change_id, [])
        while True:
            out = {
                (m.request, m.together): change.left_out[m.number]
                for m in change.change.moves
                if m.number in change.left_out
            }
            broken = [move for move in reserved if (move.request, move.together) in out]
            if not broken:
                broken = [move for move in reserved if self._is_uneven(change, move.request)]
                out = {
                    (m.request, m.together): failure_of(
                        ErrorReason.ERROR_REASON_DEVICE_UNAVAILABLE,
                        f"the primary takes {stage.primary_groups} head groups at a time",
                        device=stage.model.devices[0].name,
                    )
                    for m in broken
                }
            if not broken:
                return
            for move in broken:
                reserved.remove(move)
                change.left_out[move.number] = out[move.request, move.together]

    def _is_uneven(self, change: EngineChange, request: str) -> bool:
        assert self.primary is not None
        stage = self.primary.stages[change.change.stage, change.change.copy]
        owners = list(stage.owners[request])
        for move in stage.reserved.get(change.change.change_id, ()):
            if move.request == request:
                for group in move.head_groups:
                    owners[group] = stage.index[move.target]
        primaries = [i for i, device in enumerate(stage.model.devices) if device.is_primary]
        return any(owners.count(i) % stage.primary_groups for i in primaries)

    def _flip(self, change: EngineChange, now_s: float) -> None:
        assert self.primary is not None
        assert change.flip_by_s is not None
        stage = self.primary.stages[change.change.stage, change.change.copy]
        if now_s >= change.flip_by_s:
            self._end_aborted(change, _expired(change.change.change_id))
            return
        for move in list(stage.reserved.get(change.change.change_id, ())):
            why = self._move_refusal(change.change, move)
            if why is not None:
                self._leave_out(change, move, why)
        self._keep_together(change)
        moves = stage.reserved.pop(change.change.change_id, [])
        if not moves:
            first = change.left_out[min(change.left_out)]
            self._end_aborted(change, first)
            return
        for move in moves:
            owners, source, target = stage.owners[move.request], stage.index[move.source], stage.index[move.target]
            for group in move.head_groups:
                assert owners[group] == source, "a flip found another owner"
                owners[group] = target
        change.phase, change.step = ChangePhase.CHANGE_PHASE_FLIPPED, self.primary.num_steps + 1
        self.generation = change.generation = change.change.generation
        stage.check()

    def _leave_out(self, change: EngineChange, move: Move, why: Failure) -> None:
        change.left_out.setdefault(move.number, why)
        assert self.primary is not None
        stage = self.primary.stages[change.change.stage, change.change.copy]
        reserved = stage.reserved.get(change.change.change_id, [])
        if move in reserved:
            reserved.remove(move)

    def _end_aborted(self, change: EngineChange, why: Failure) -> None:
        assert change.is_open, "what was flipped cannot be aborted"
        change.phase, change.why = ChangePhase.CHANGE_PHASE_ABORTED, why
        if self.primary is not None:
            for stage in self.primary.stages.values():
                stage.reserved.pop(change.change.change_id, None)

    def _learn_flipped(self, change: EngineChange, generation: int) -> None:
        self.generation = max(self.generation, generation)
        change.generation = self.generation

    def _go_by(self, change: EngineChange, why: Failure, authority: Iterable[ChangeStatus] | None) -> None:
        if authority is None:
            raise RefusedError(unreachable("the authority's engine was not reached; it knows how the change ended"))
        said = list(authority)
        self.hear(said, self.generation)
        if not change.is_open:
            return
        if any(status.change_id == change.change.change_id for status in said):
            raise RefusedError(unreachable("the authority's engine has not decided yet"))
        if why.reason == ErrorReason.ERROR_REASON_PREPARE_EXPIRED:
            raise RefusedError(
                unreachable("the authority's engine knows nothing of the change, and may yet hear of it")
            )
        self._end_aborted(change, why)

    def _open(self, change_id: str) -> EngineChange:
        change = self.known.get(change_id)
        if change is None:
            raise _unknown(change_id)
        if not change.is_open:
            raise refusal(
                ErrorReason.ERROR_REASON_CHANGE_PHASE,
                f"change {change_id} has ended here",
                change_id=change_id,
                phase=ChangePhase.Name(change.phase).removeprefix("CHANGE_PHASE_"),
            )
        return change

    def _is_copied(self, change: EngineChange, now_s: float) -> bool:
        return change.copy_begun_s is not None and now_s - change.copy_begun_s >= change.copy_s

    def _touches(self, move: Move, change: EngineChange) -> bool:
        source = ChangePart.CHANGE_PART_SOURCE in change.parts and move.source in self._devices
        return source or (ChangePart.CHANGE_PART_TARGET in change.parts and move.target in self._devices)

    def _copy_s(self, change: EngineChange, move: Move) -> float:
        """Seconds that a copy takes on the slower of its two links."""
        if self.primary is not None:
            stage = self.primary.stages.get((change.change.stage, change.change.copy))
            links = (
                [d.link_byte_s for d in stage.model.devices if d.name in (move.source, move.target)] if stage else []
            )
            if any(links):
                return move.kv_bytes * max(links)
        return move.copy_s or move.kv_bytes / DEFAULT_LINK_BYTES_PER_S


def _unknown(change_id: str) -> RefusedError:
    return refusal(ErrorReason.ERROR_REASON_CHANGE_UNKNOWN, f"change {change_id} is not known", change_id=change_id)


def _expired(change_id: str) -> Failure:
    return failure_of(ErrorReason.ERROR_REASON_PREPARE_EXPIRED, f"change {change_id}: its time to prepare passed")


def _gone(move: Move) -> Failure:
    return failure_of(
        ErrorReason.ERROR_REASON_REQUEST_GONE, f"{move.request} does not run any more", request=move.request
    )


def _unavailable(device: str) -> Failure:
    return failure_of(ErrorReason.ERROR_REASON_DEVICE_UNAVAILABLE, f"{device} cannot be relied on", device=device)


def _no_room(move: Move, **blocks: int) -> Failure:
    return failure_of(
        ErrorReason.ERROR_REASON_KV_BLOCKS_EXHAUSTED,
        f"{move.target} has too few free KV blocks for {move.request}",
        device=move.target,
        **blocks,
    )
