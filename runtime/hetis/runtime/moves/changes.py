"""Two-phase moves of one replica inside an engine, for the authority and for all other engines.

The authority checks moves against its head map, reserves blocks at targets, and flips between two steps. Other engines
pin and reserve, and learn the outcome from the authority: they free a source only after its FLIPPED.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from hetis.runtime.moves.refusals import RefusedError, failure_of, generation_mismatch, phase_name, refusal, unreachable
from hetis.v1.change_pb2 import Change, ChangePart, ChangePhase, ChangeStatus, MoveResult
from hetis.v1.changes import FLIPPED, NodeChange
from hetis.v1.executor_service_pb2 import FlipMovesResponse
from hetis.v1.failure_pb2 import ErrorReason, Failure
from hetis.v1.head_map_pb2 import Move

REMEMBERED_S = 600.0
MOST_ABORTED = 64  # aborted changes of a replica in a report, whose size is limited


@dataclass(slots=True, kw_only=True)
class EngineChange(NodeChange):
    """A change in this engine.

    The agent has its own record, `ChangeState`: it is kept on disk, and either of them may end without the other.
    """

    copy_bytes: int = 0  # bytes that this node copies, as far as known now
    copy_begun_s: float | None = None  # when CopyMoves was first called. None: not yet.
    # FlipMoves was called, and the flip happens before this time or not at all. None: not called yet.
    flip_by_s: float | None = None
    forget_s: float | None = None  # when the change may be forgotten. None: it is open, or flipped but not released.

    def report(self, replica: str, generation: int) -> ChangeStatus:
        """Return the status to report, with the ``generation`` of the replica's state here."""
        reported = ChangeStatus()
        reported.CopyFrom(self.status)
        reported.replica, reported.generation = replica, generation
        return reported


def unknown(change_id: str) -> RefusedError:
    return refusal(ErrorReason.ERROR_REASON_CHANGE_UNKNOWN, f"change {change_id} is not known", change_id=change_id)


def has_ended(change: EngineChange, how: str = "has ended here") -> RefusedError:
    why, phase = f"change {change.id} {how}", phase_name(change.phase)
    return refusal(ErrorReason.ERROR_REASON_CHANGE_PHASE, why, change_id=change.id, phase=phase)


def expired(change_id: str) -> Failure:
    return failure_of(
        ErrorReason.ERROR_REASON_PREPARE_EXPIRED, f"change {change_id}: its time limit for preparation passed"
    )


def gone(move: Move) -> Failure:
    why = f"{move.request} is no longer running"
    return failure_of(ErrorReason.ERROR_REASON_REQUEST_GONE, why, request=move.request)


def unavailable(device: str) -> Failure:
    return failure_of(ErrorReason.ERROR_REASON_DEVICE_UNAVAILABLE, f"{device} is not reliable", device=device)


def no_room(move: Move, **blocks: int) -> Failure:
    why = f"{move.target} has too few free KV blocks for {move.request}"
    return failure_of(ErrorReason.ERROR_REASON_KV_BLOCKS_EXHAUSTED, why, device=move.target, **blocks)


def not_owner(move: Move, group: int, owner: str) -> Failure:
    why = f"{move.source} does not own head group {group} of {move.request}"
    return failure_of(ErrorReason.ERROR_REASON_NOT_OWNER, why, request=move.request, owner=owner)


class MoveAuthority(ABC):
    """The role of the engine of a replica's primary: it owns the head map, and its moves in flight."""

    def __init__(self) -> None:
        self._open: dict[str, list[Move]] = {}  # moves that have begun, by change

    # --- what depends on the engine

    @abstractmethod
    def check(self, change: Change) -> None:
        """Raise RefusedError if the change cannot be accepted, whatever its moves."""

    @abstractmethod
    def refusal_of(self, change: Change, move: Move) -> Failure | None:
        """Return why a move cannot begin."""

    @abstractmethod
    def begin(self, change: Change, move: Move) -> Failure | None:
        """Reserve blocks for a move, or return why that is impossible."""

    @abstractmethod
    def why_void(self, change: Change, move: Move) -> Failure | None:
        """Return why a move in flight cannot be made any more."""

    @abstractmethod
    def abort(self, change: Change, move: Move) -> None:
        """Free what was reserved for a move in flight, if it still is."""

    @abstractmethod
    def commit(self, change: EngineChange, moves: Sequence[Move]) -> int:
        """Make the targets own the head groups of all these moves at once, and return the step from which they do."""

    def is_ready(self, change: EngineChange) -> bool:
        """Return whether the copies that only the authority knows of permit `flip`."""
        return True

    def stranded(self, change: Change, moves: Sequence[Move]) -> list[tuple[Move, Failure]]:
        """Return the moves that cannot be made with only these, and why."""
        return []

    # --- what all engines share

    def in_flight(self) -> list[tuple[str, Move]]:
        """Return the moves in flight, with the ids of their changes."""
        return [(change_id, move) for change_id, moves in self._open.items() for move in moves]

    def reserve(self, taken: EngineChange, generation: int) -> None:
        """Check every move against the head map, which has ``generation``, and reserve blocks for the moves that fit.

        The others are left out of ``taken``. Raises RefusedError if the change cannot be accepted, or no move is left.
        No blocks are held then.
        """
        change = taken.change
        if change.base_generation != generation:
            raise RefusedError(generation_mismatch(change.base_generation, generation))
        self.check(change)
        moves, refused = list[Move](), list[MoveResult]()
        self._open[change.change_id] = moves
        for move in change.moves:
            why = self.refusal_of(change, move) or self.begin(change, move)
            if why is None:
                moves.append(move)
            else:
                refused.append(MoveResult(number=move.number, failure=why))
        taken.leave_out(refused)
        self._keep_together(taken, moves)
        if not moves:
            del self._open[change.change_id]
            raise RefusedError(taken.status.moves[0].failure)

    def flip(self, change: EngineChange) -> Failure | None:
        """Flip all moves that still fit at once, between two steps. If none fits, change nothing and return why."""
        moves = self._open[change.id]
        self.leave_out_void({change.id: change})
        if not moves:
            return change.status.moves[0].failure
        change.status.step = self.commit(change, moves)
        change.enter(ChangePhase.CHANGE_PHASE_FLIPPED, generation=change.change.generation)
        del self._open[change.id]
        return None

    def leave_out_void(self, changes: Mapping[str, EngineChange]) -> None:
        """Leave out the moves that have become void, with the reason."""
        for change_id, change in changes.items():
            moves = self._open.get(change_id, [])
            void = [(move, why) for move in moves if (why := self.why_void(change.change, move)) is not None]
            if void:
                self._leave_out(change, moves, void)
                self._keep_together(change, moves)

    def give_blocks_back(self, change: EngineChange) -> None:
        """Free what was reserved for the change, which is aborted."""
        for move in self._open.pop(change.id, []):
            self.abort(change.change, move)

    def _keep_together(self, change: EngineChange, moves: list[Move]) -> None:
        """Leave out moves that must flip together with one left out, for the reason of the first."""
        while True:
            why = change.left_out
            out = {
                (move.request, move.together): why[move.number] for move in change.change.moves if move.number in why
            }
            keys = [(move, (move.request, move.together)) for move in moves]
            leaving = [(move, out[key]) for move, key in keys if key in out] or self.stranded(change.change, moves)
            if not leaving:
                return
            self._leave_out(change, moves, leaving)

    def _leave_out(self, change: EngineChange, moves: list[Move], leaving: Sequence[tuple[Move, Failure]]) -> None:
        change.leave_out(MoveResult(number=move.number, failure=why) for move, why in leaving)
        for move, _ in leaving:
            moves.remove(move)
            self.abort(change.change, move)


class Copies(Protocol):
    """The copies that an engine makes."""

    def plan(self, change: EngineChange, moves: Sequence[Move]) -> None:
        """Set ``change.copy_bytes`` for ``moves`` of a change being reserved that copy from or to this node."""

    def look(self, change: EngineChange, now_s: float) -> bool:
        """Update the bytes of the change, and return whether everything to be copied before the flip has arrived."""


class EngineChanges:
    """The changes of one replica in one engine."""

    def __init__(
        self,
        replica: str,
        *,
        generation: int,
        authority: MoveAuthority | None,
        copies: Copies | None,
        devices: frozenset[str],
    ) -> None:
        """Initialise with ``authority`` if this engine owns the head map, and the names of this node's ``devices``."""
        self.replica, self.generation = replica, generation  # generation of the replica's state here
        self.known: dict[str, EngineChange] = {}  # keyed by id, in order of arrival
        self._authority, self._copies, self._devices = authority, copies, devices

    def raise_to(self, generation: int) -> None:
        """Take the generation of the replica's state, which only grows."""
        self.generation = max(self.generation, generation)

    def to_report(self) -> list[EngineChange]:
        """Return the changes to report: all but the oldest of many that were aborted.

        Only aborted ones may be left out, because an engine that has prepared its part of a change aborts it if the
        authority's report does not contain it.
        """
        aborted = [id_ for id_, change in self.known.items() if change.phase == ChangePhase.CHANGE_PHASE_ABORTED]
        left_out = set(aborted[: max(len(aborted) - MOST_ABORTED, 0)])
        return [change for id_, change in self.known.items() if id_ not in left_out]

    # --- the five calls

    def reserve(self, change: Change, parts: Iterable[ChangePart.ValueType], now_s: float) -> EngineChange:
        """Handle ReserveMoves."""
        if (known := self.known.get(change.change_id)) is not None:
            if not known.is_open:
                raise has_ended(known)
            return known
        other = next((found for found in self.known.values() if found.is_open), None)
        if other is not None:
            why = f"change {other.id} is under way"
            raise refusal(ErrorReason.ERROR_REASON_CHANGE_IN_FLIGHT, why, change_id=other.id)
        timeout_s = change.prepare_timeout.ToNanoseconds() / 1e9
        taken = EngineChange(
            change=change,
            parts=tuple(parts),
            status=EngineChange.first_status(change),
            deadline_s=now_s + timeout_s,
        )
        if taken.is_authority:
            if self._authority is None:
                why = f"the primary of {self.replica} is not on this node"
                raise refusal(ErrorReason.ERROR_REASON_NOT_FOUND, why, name=self.replica)
            self._authority.reserve(taken, self.generation)
        left_out = taken.left_out
        moves = [m for m in change.moves if m.number not in left_out and self._touches(m, taken)]
        assert self._copies is not None
        self._copies.plan(taken, moves)
        self.known[change.change_id] = taken
        return taken

    def begin_copy(self, change_id: str, now_s: float) -> EngineChange:
        """Handle CopyMoves: begin the copy, unless it has begun already."""
        change = self._known(change_id)
        if not change.is_open:
            raise has_ended(change)
        if now_s >= change.deadline_s and change.phase == ChangePhase.CHANGE_PHASE_PREPARING:
            raise RefusedError(expired(change_id))
        if change.copy_begun_s is None:
            change.copy_begun_s = now_s
        return change

    def request_flip(self, change_id: str, timeout_s: float, now_s: float) -> EngineChange:
        """Handle FlipMoves: flip at the next boundary. A change that has ended answers as it did the first time."""
        change = self._known(change_id)
        if not change.is_authority:
            why = "this engine is not the authority"
            raise refusal(ErrorReason.ERROR_REASON_CHANGE_PHASE, why, change_id=change_id)
        if change.is_open and len(change.parts) > 1 and change.phase != ChangePhase.CHANGE_PHASE_READY:
            raise refusal(ErrorReason.ERROR_REASON_CHANGE_PHASE, "its copies are not complete yet", change_id=change_id)
        if change.is_open:
            change.flip_by_s = min(change.deadline_s, now_s + timeout_s)
        return change

    def release(self, change_id: str, moves: Iterable[MoveResult], generation: int, now_s: float) -> None:
        """Handle ReleaseMoves: the change was flipped, and the authority has freed the blocks of all its moves."""
        change = self._known(change_id)
        if change.phase == ChangePhase.CHANGE_PHASE_ABORTED or (change.is_authority and change.is_open):
            raise has_ended(change, "was not flipped")
        change.leave_out(moves)
        self._released(change, generation)
        change.forget_s = now_s + REMEMBERED_S

    def abort(
        self, change_id: str, why: Failure, authority: Iterable[ChangeStatus] | None, now_s: float
    ) -> EngineChange:
        """Handle AbortMoves.

        ``authority`` holds the statuses that the authority's engine has just reported; None if it was not reached. An
        engine whose copies were not complete has promised nothing and may abort alone. After that it follows the
        authority. If the authority does not know the change, it may still receive it later. Then an abort by the
        planner, which gives the change up for good, is enough, but one by the agent's own deadline is not.
        """
        change = self.known.get(change_id)
        if change is None:
            unknown_change = Change(change_id=change_id, replica=self.replica)
            change = EngineChange(change=unknown_change, status=EngineChange.first_status(unknown_change))
            self.known[change_id] = change
            self._end_aborted(change, why)
        elif change.is_open and (change.is_authority or change.phase == ChangePhase.CHANGE_PHASE_PREPARING):
            self._end_aborted(change, why)
        elif change.is_open:
            self._resolve_from_authority(change, why, authority)
        change.forget_s = now_s + REMEMBERED_S
        return change

    # --- time

    def advance(self, now_s: float) -> None:
        """Complete copies, enforce deadlines, and forget old changes."""
        if self._authority is not None:
            self._authority.leave_out_void(self.known)
        for change in list(self.known.values()):
            is_copied = change.is_open and self._copies is not None and self._copies.look(change, now_s)
            if is_copied and change.copy_begun_s is not None and change.phase == ChangePhase.CHANGE_PHASE_PREPARING:
                change.enter(ChangePhase.CHANGE_PHASE_READY, generation=self.generation)
            if change.is_open and change.is_authority and now_s >= change.deadline_s and change.flip_by_s is None:
                self._end_aborted(change, expired(change.id))
            if change.forget_s is None and not change.is_open and change.phase != ChangePhase.CHANGE_PHASE_FLIPPED:
                change.forget_s = now_s + REMEMBERED_S  # it ended here, so nobody may ever ask for its end
            if change.forget_s is not None and now_s >= change.forget_s:
                del self.known[change.id]

    def flip_due(self, now_s: float) -> None:
        """Make the requested flips, between two steps, each with all its moves at once."""
        for change in self.known.values():
            if change.is_open and change.flip_by_s is not None:
                assert self._authority is not None
                late = now_s >= change.flip_by_s
                if not late and not self._authority.is_ready(change):
                    continue
                why = expired(change.id) if late else self._authority.flip(change)
                if why is None:
                    self.generation = change.change.generation
                else:
                    self._end_aborted(change, why)

    def end_all(self, why: Failure) -> None:
        """Abort, for a new assignment, all open changes that this engine may decide."""
        for change in self.known.values():
            if change.is_open and (change.is_authority or change.phase == ChangePhase.CHANGE_PHASE_PREPARING):
                self._end_aborted(change, why)

    def resolve(self, reported: Iterable[ChangeStatus], generation: int) -> None:
        """Take the outcomes that the authority's engine reports. They are final."""
        for status in reported:
            change = self.known.get(status.change_id)
            if change is None or not change.is_open or change.is_authority:
                continue
            if status.phase in FLIPPED:
                change.leave_out(status.moves)
                change.status.step = status.step
                self._released(change, change.change.generation or generation)
            elif status.phase == ChangePhase.CHANGE_PHASE_ABORTED:
                self._end_aborted(change, status.failure)

    def flip_answer(self, change: EngineChange) -> FlipMovesResponse:
        status = change.status
        return FlipMovesResponse(
            outcome=change.outcome,
            generation=self.generation,
            step=status.step,
            moves=status.moves,
            failure=status.failure if status.HasField("failure") else None,
        )

    def _end_aborted(self, change: EngineChange, why: Failure) -> None:
        assert change.is_open, "a flipped change cannot be aborted"
        change.enter(ChangePhase.CHANGE_PHASE_ABORTED, generation=self.generation, failure=why)
        if self._authority is not None:
            self._authority.give_blocks_back(change)

    def _released(self, change: EngineChange, generation: int) -> None:
        """Record that the change was flipped, at a ``generation``, and that nothing of it is held here."""
        self.raise_to(generation)
        if not change.has_ended:
            change.enter(ChangePhase.CHANGE_PHASE_RELEASED, generation=self.generation)

    def _resolve_from_authority(
        self, change: EngineChange, why: Failure, authority: Iterable[ChangeStatus] | None
    ) -> None:
        if authority is None:
            raise RefusedError(unreachable("the authority's engine, which knows how the change ended, is unreachable"))
        reported = list(authority)
        self.resolve(reported, self.generation)
        if not change.is_open:
            return
        if any(status.change_id == change.id for status in reported):
            raise RefusedError(unreachable("the authority's engine has not decided yet"))
        if why.reason == ErrorReason.ERROR_REASON_PREPARE_EXPIRED:
            why_not = "the authority's engine does not know of the change yet"
            raise RefusedError(unreachable(why_not))
        self._end_aborted(change, why)

    def _known(self, change_id: str) -> EngineChange:
        if (change := self.known.get(change_id)) is None:
            raise unknown(change_id)
        return change

    def _touches(self, move: Move, change: EngineChange) -> bool:
        source = ChangePart.CHANGE_PART_SOURCE in change.parts and move.source in self._devices
        return source or (ChangePart.CHANGE_PART_TARGET in change.parts and move.target in self._devices)
