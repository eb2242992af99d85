"""An engine as an agent steers it, without sockets or a clock: requests and the current time are passed in."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Generic, TypeVar

from hetis.runtime.moves.changes import Copies, EngineChange, EngineChanges, MoveAuthority, unknown
from hetis.runtime.moves.refusals import RefusedError, failure_of, generation_mismatch, stale_epoch
from hetis.v1 import executor_service_pb2 as messages
from hetis.v1.change_pb2 import ChangeStatus
from hetis.v1.failure_pb2 import ErrorReason
from hetis.v1.head_map_pb2 import HeadMap
from hetis.v1.replica_pb2 import Assignment
from hetis.v1.report_pb2 import AssignmentState
from hetis.v1.stage_pb2 import StageDevice, StageModel

MOST_BYTES = (1 << 20) - 4096  # limit per piece of head maps; the message around it fits in the rest of 1 MiB


def pieces_of(head_maps: Iterable[HeadMap]) -> Iterator[list[HeadMap]]:
    """Yield lists of head maps of at most `MOST_BYTES` bytes. A larger map is split by its requests.

    Yields at least one list, possibly empty. Each part of a map repeats its devices; the moves are in the first part.
    """
    piece: list[HeadMap] = []
    size = 0
    for head_map in head_maps:
        for part in _parts_of(head_map):
            part_size = part.ByteSize() + 8
            if piece and size + part_size > MOST_BYTES:
                yield piece
                piece, size = [], 0
            piece.append(part)
            size += part_size
    yield piece


def _parts_of(head_map: HeadMap) -> Iterator[HeadMap]:
    if head_map.ByteSize() + 8 <= MOST_BYTES:
        yield head_map
        return
    part = HeadMap(stage=head_map.stage, copy=head_map.copy, devices=head_map.devices)
    base = part.ByteSize()
    size, is_empty = base, True
    for field in ("moves", "requests"):
        for entry in getattr(head_map, field):
            entry_size = entry.ByteSize() + 8
            if not is_empty and size + entry_size > MOST_BYTES:
                yield part
                part = HeadMap(stage=head_map.stage, copy=head_map.copy, devices=head_map.devices)
                size = base
            getattr(part, field).append(entry)
            size, is_empty = size + entry_size, False
    yield part


def planned_s(model: StageModel, device: StageDevice, heads: int, kv_bytes: float) -> float:
    """Return the seconds per layer of attention and exchange by the plan's coefficients, as in ``stage.proto``."""
    if not heads or not device.pieces:
        return 0.0
    cards = max(len(device.gpus), 1) if device.is_primary else 1
    share = min(cards, model.heads.head_groups)
    seconds = max(p.head_s * heads / cards + p.kv_byte_s * kv_bytes / share + p.call_s for p in device.pieces)
    if device.is_primary:
        return seconds
    return seconds + device.transfer_byte_s * model.heads.exchange_bytes_per_head * heads + device.transfer_s


@dataclass(slots=True)
class TakenReplica:
    """A replica in an engine: its assignment and its changes."""

    assignment: Assignment
    changes: EngineChanges


TakenT = TypeVar("TakenT", bound=TakenReplica)


class SteeredEngine(ABC, Generic[TakenT]):
    """One engine. Methods named after those of `ExecutorService` raise RefusedError with its documented reasons.

    All of them are called between two decode steps.
    """

    def __init__(self, engine_id: str | None = None) -> None:
        """Initialise with ``engine_id``, or a new UUID if it is None."""
        self.engine_id = engine_id or str(uuid.uuid4())  # id of this run
        self.newest_epoch = 0  # the highest epoch that was obeyed; older ones change nothing
        self._held: dict[str, TakenT] = {}
        # Changes that the engine was to abort before it received them, whatever their replica.
        self._given_up = EngineChanges("", generation=0, authority=None, copies=None, devices=frozenset())

    @property
    def is_assigned(self) -> bool:
        """Return whether the planner has assigned a replica, and so decides on moves."""
        return bool(self._held)

    # --- what depends on the engine

    @abstractmethod
    def head_maps(self, replica: str) -> messages.ReadHeadMapsResponse:
        """Return all head maps of a replica whose primary is here, in one message of any size."""

    @abstractmethod
    def report(self, now_s: float) -> messages.WatchReportsResponse:
        """Return a report on the whole engine."""

    @abstractmethod
    def step(self, now_s: float) -> None:
        """Do what is due by ``now_s``: flips, copies, deadlines, forgetting."""

    @abstractmethod
    def _take(self, assignment: Assignment, generation: int, held: TakenT | None, now_s: float) -> TakenT:
        """Run an assignment in place of the one held. Raises RefusedError if it cannot; then nothing changed."""

    @abstractmethod
    def _remove(self, held: TakenT) -> None:
        """Stop running a replica."""

    @abstractmethod
    def _state(self, held: TakenT, now_s: float) -> AssignmentState.ValueType:
        """Return the state of a replica's assignment."""

    # --- assignments

    def apply_assignment(
        self, request: messages.ApplyAssignmentRequest, now_s: float
    ) -> messages.ApplyAssignmentResponse:
        self._fence(request.epoch)
        removed = request.WhichOneof("change") == "removed_replica"
        name = request.removed_replica if removed else request.assignment.replica
        held = self._held.get(name)
        if removed:
            if held is not None:
                if request.generation < held.changes.generation:
                    raise RefusedError(generation_mismatch(request.generation, held.changes.generation))
                del self._held[name]
                self._remove(held)
            return messages.ApplyAssignmentResponse(state=AssignmentState.ASSIGNMENT_STATE_STOPPED)
        if held is not None and held.assignment == request.assignment:
            held.changes.raise_to(request.generation)
        else:
            if held is not None and request.generation <= held.changes.generation:
                raise RefusedError(generation_mismatch(request.generation, held.changes.generation))
            self._held[name] = self._take(deepcopy(request.assignment), request.generation, held, now_s)
        return messages.ApplyAssignmentResponse(state=self._state(self._held[name], now_s))

    # --- moves

    def reserve_moves(self, request: messages.ReserveMovesRequest, now_s: float) -> messages.ReserveMovesResponse:
        self._fence(request.epoch)
        held = self._held.get(request.change.replica)
        if held is None:
            raise RefusedError(generation_mismatch(request.change.base_generation, 0))
        changes = self._given_up if request.change.change_id in self._given_up.known else held.changes
        change = changes.reserve(request.change, request.parts, now_s)
        return messages.ReserveMovesResponse(moves=change.status.moves, copy_bytes=change.copy_bytes)

    def copy_moves(self, request: messages.CopyMovesRequest, now_s: float) -> EngineChange:
        """Begin to copy. `step` continues, and the change's phase shows when the copy is complete."""
        self._fence(request.epoch)
        change = self._changes_of(request.change_id).begin_copy(request.change_id, now_s)
        self._changes_of(request.change_id).advance(now_s)
        return change

    def copy_answer(self, change: EngineChange) -> messages.CopyMovesResponse:
        """Return the progress of a copy."""
        return messages.CopyMovesResponse(
            copied_bytes=change.status.copied_bytes, total_bytes=change.copy_bytes, moves=change.status.moves
        )

    def flip_moves(self, request: messages.FlipMovesRequest, now_s: float) -> EngineChange:
        """Request the flip, which `step` makes at the next boundary. `flip_answer` returns its outcome."""
        self._fence(request.epoch)
        timeout_s = request.timeout.ToNanoseconds() / 1e9
        return self._changes_of(request.change_id).request_flip(request.change_id, timeout_s, now_s)

    def flip_answer(self, change_id: str) -> messages.FlipMovesResponse | None:
        """Return the outcome of a requested flip, or None while it is undecided."""
        changes = self._changes_of(change_id)
        change = changes.known[change_id]
        return None if change.is_open else changes.flip_answer(change)

    def release_moves(self, request: messages.ReleaseMovesRequest, now_s: float) -> messages.ReleaseMovesResponse:
        self._fence(request.epoch)
        changes = self._changes_of(request.change_id)
        changes.release(request.change_id, request.moves, request.generation, now_s)
        return messages.ReleaseMovesResponse()

    def abort_moves(
        self, request: messages.AbortMovesRequest, now_s: float, *, authority: Iterable[ChangeStatus] | None = None
    ) -> messages.AbortMovesResponse:
        """Abort a change. ``authority`` holds what the primary's engine, if it is another one, has just reported."""
        self._fence(request.epoch)
        try:
            changes = self._changes_of(request.change_id)
        except RefusedError:
            changes = self._given_up
        change = changes.abort(request.change_id, request.failure, authority, now_s)
        return messages.AbortMovesResponse(
            outcome=change.outcome,
            generation=changes.generation,
            moves=change.status.moves if change.was_flipped else (),
        )

    # --- for subclasses

    def _changes(
        self,
        assignment: Assignment,
        generation: int,
        held: TakenT | None,
        authority: MoveAuthority | None,
        copies: Copies,
        devices: Iterable[str],
    ) -> EngineChanges:
        """Return the changes of an assignment that replaces ``held``, whose open ones end; all outcomes stay known."""
        name, here = assignment.replica, frozenset(devices)
        changes = EngineChanges(name, generation=generation, authority=authority, copies=copies, devices=here)
        if held is not None:
            held.changes.end_all(failure_of(ErrorReason.ERROR_REASON_CHANGE_CANCELLED, "a new assignment arrived"))
            changes.known.update(held.changes.known)
        return changes

    def statuses(self) -> list[ChangeStatus]:
        """Return the statuses of the changes that are remembered."""
        return [
            change.report(name, held.changes.generation)
            for name, held in self._held.items()
            for change in held.changes.to_report()
        ] + [change.report("", 0) for change in self._given_up.to_report()]

    def _fence(self, epoch: int) -> None:
        if epoch < max(self.newest_epoch, 1):
            raise RefusedError(stale_epoch(epoch, self.newest_epoch))
        self.newest_epoch = epoch

    def _changes_of(self, change_id: str) -> EngineChanges:
        for changes in [*(held.changes for held in self._held.values()), self._given_up]:
            if change_id in changes.known:
                return changes
        raise unknown(change_id)
