"""The planner's changes, carried out by the scheduler in the same way as the engine's own moves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hetis.runtime.moves.changes import EngineChange, gone, no_room, not_owner, unavailable
from hetis.runtime.moves.refusals import RefusedError, failure_of, generation_mismatch, refusal
from hetis.runtime.vllm.binding import Binding
from hetis.runtime.vllm.scheduler import SchedulerSide
from hetis.solver.dispatch.snapshot import DeviceStatus
from hetis.v1.change_pb2 import Change, ChangePhase
from hetis.v1.failure_pb2 import ErrorReason, Failure
from hetis.v1.head_map_pb2 import Move


@dataclass(slots=True)
class _InFlightMove:
    """A move in flight. ``number`` identifies it in the scheduler."""

    move: Move
    number: int


class PlannedMoves:
    """Moves of a replica's head map. Implements `Authority` and `Copies`.

    Copies begin with the reservation: they pass through the ranks, so other nodes have nothing to do.
    """

    def __init__(self, side: SchedulerSide, binding: Binding) -> None:
        self._side, self._binding = side, binding
        self._open: dict[str, list[_InFlightMove]] = {}

    def in_flight(self) -> list[tuple[str, Move]]:
        """Return the moves in flight, with the ids of their changes."""
        return [(change_id, one.move) for change_id, carried in self._open.items() for one in carried]

    # --- Authority

    def reserve(self, taken: EngineChange, generation: int) -> None:
        change = taken.change
        self._check(change, generation)
        carried: list[_InFlightMove] = []
        names = self._names()
        for move in change.moves:
            why, number = self._refusal_of(move, names), None
            if why is None:
                number = self._side.begin_move(
                    names[move.request], self._groups(move), self._target(move), by="planner"
                )
                why = self._no_room(move, names) if number is None else None
            if number is None:
                assert why is not None
                taken.left_out[move.number] = why
            else:
                carried.append(_InFlightMove(move, number))
        self._keep_together(taken, carried)
        if not carried:
            raise RefusedError(taken.left_out[min(taken.left_out)])
        self._open[change.change_id] = carried

    def is_ready(self, change: EngineChange) -> bool:
        return self._are_copied(self._open.get(change.change.change_id, []))

    def flip(self, change: EngineChange) -> Failure | None:
        carried = self._open[change.change.change_id]
        self._leave_out_void(change, carried)
        if not carried:
            return change.left_out[min(change.left_out)]
        change.copied_bytes = self._bytes(carried)
        self._side.commit([one.number for one in carried])
        change.phase, change.step = ChangePhase.CHANGE_PHASE_FLIPPED, self._side.num_steps
        change.generation = change.change.generation
        del self._open[change.change.change_id]
        return None

    def leave_out_void(self, changes: Mapping[str, EngineChange]) -> None:
        for change_id, carried in self._open.items():
            self._leave_out_void(changes[change_id], carried)

    def give_blocks_back(self, change: EngineChange) -> None:
        for one in self._open.pop(change.change.change_id, []):
            self._side.abort(one.number)

    # --- Copies

    def plan(self, change: EngineChange, moves: Sequence[Move]) -> None:
        change.copy_bytes = self._bytes(self._open.get(change.change.change_id, []))

    def look(self, change: EngineChange, now_s: float) -> bool:
        carried = self._open.get(change.change.change_id)
        if carried is None:
            return True
        copied = [one for one in carried if self._side.is_copied(one.number)]
        change.copied_bytes = self._bytes(copied)
        change.copy_bytes = max(change.copied_bytes, self._bytes(carried))
        return len(copied) == len(carried)

    # --- inside

    def _check(self, change: Change, generation: int) -> None:
        if change.base_generation != generation:
            raise RefusedError(generation_mismatch(change.base_generation, generation))
        model, wrong = self._binding.model, []
        if change.generation <= change.base_generation:
            wrong.append(f"generation is {change.generation}, must be above {change.base_generation}")
        if (change.stage, change.copy) != (model.stage, model.copy):
            wrong.append(f"there is no copy {change.copy} of stage {change.stage}")
        if not change.moves:
            wrong.append("moves are 0, must be at least 1")
        numbers = [move.number for move in change.moves]
        if len(set(numbers)) < len(numbers):
            wrong.append("two moves have one number")
        wrong += [reason for move in change.moves if (reason := self._split_ranks(move))]
        if wrong:
            raise refusal(ErrorReason.ERROR_REASON_INVALID_FIELD, "; ".join(wrong))

    def _split_ranks(self, move: Move) -> str:
        """Return why the existing groups of a move cannot move without others, or an empty string if they can."""
        groups, ranks = set(move.head_groups), range(self._binding.cards)
        num = self._side.shape.heads.head_groups
        lacking = sorted({rank * num + group % num for group in groups for rank in ranks} - groups)
        if not lacking or max(groups) >= num * len(ranks):
            return ""
        return (
            f"move {move.number} of request {move.request} lacks head groups {', '.join(map(str, lacking))}: "
            f"each of the {len(ranks)} ranks keeps its groups where the others keep theirs"
        )

    def _refusal_of(self, move: Move, names: Mapping[str, str]) -> Failure | None:
        """Return why a move cannot begin, whatever room there is. See `_names` for ``names``."""
        allocator, binding = self._side.allocator, self._binding
        name = names.get(move.request)
        if name is None or move.incarnation:
            return gone(move)
        source, target = binding.index.get(move.source), binding.index.get(move.target)
        devices = allocator.state.devices
        if source is None or devices[source].status is DeviceStatus.LOST:
            return unavailable(move.source)
        if target is None or devices[target].status is not DeviceStatus.OK or target == source:
            return unavailable(move.target)
        if not move.head_groups:
            return not_owner(move, 0, "")
        owners, running = allocator.devices(name), allocator.moving(name)
        for group in move.head_groups:
            exists = group < len(owners) * binding.cards
            here = group % len(owners)
            if not exists or owners[here] != source or here in running:
                return not_owner(move, group, binding.name(owners[here]) if exists else "")
        return None

    def _leave_out_void(self, change: EngineChange, carried: list[_InFlightMove]) -> None:
        void = [one for one in carried if not self._side.is_under_way(one.number)]
        if not void:
            return
        names = self._names()
        for one in void:
            carried.remove(one)
            change.left_out.setdefault(one.move.number, self._refusal_of(one.move, names) or _copy_failed(one.move))
        self._keep_together(change, carried)

    def _keep_together(self, change: EngineChange, carried: list[_InFlightMove]) -> None:
        """Leave out moves that must flip together with one left out, for the reason of the first."""
        moves = [move for move in change.change.moves if move.number in change.left_out]
        out = {(move.request, move.together): change.left_out[move.number] for move in moves}
        for one in list(carried):
            why = out.get((one.move.request, one.move.together))
            if why is not None:
                carried.remove(one)
                change.left_out[one.move.number] = why
                self._side.abort(one.number)

    def _are_copied(self, carried: Sequence[_InFlightMove]) -> bool:
        return all(self._side.is_copied(one.number) or not self._side.is_under_way(one.number) for one in carried)

    def _no_room(self, move: Move, names: Mapping[str, str]) -> Failure:
        allocator, target = self._side.allocator, self._target(move)
        each = self._binding.planned_blocks
        needed = len(self._groups(move)) * allocator.blocks(names[move.request]) * each
        return no_room(move, needed_blocks=needed, free_blocks=allocator.room(target) * each)

    def _bytes(self, carried: Sequence[_InFlightMove]) -> int:
        """Return the present KV bytes of moves."""
        names, allocator, shape = self._names(), self._side.allocator, self._side.shape
        tokens = sum(
            allocator.state.context_tokens(names[one.move.request]) * len(one.move.head_groups)
            for one in carried
            if one.move.request in names
        )
        return int(tokens * shape.heads.kv_bytes_per_token * shape.num_layers)

    def _groups(self, move: Move) -> list[int]:
        """Return the groups of a move in the allocator's numbering."""
        return sorted({group % self._side.shape.heads.head_groups for group in move.head_groups})

    def _target(self, move: Move) -> int:
        return self._binding.index[move.target]

    def _names(self) -> dict[str, str]:
        """Return the running requests by the planner's names for them."""
        allocator = self._side.allocator
        return {str(allocator.number(name)): name for name in allocator.running}


def _copy_failed(move: Move) -> Failure:
    return failure_of(
        ErrorReason.ERROR_REASON_COPY_FAILED, f"the copy of request {move.request} was given up", device=move.target
    )
