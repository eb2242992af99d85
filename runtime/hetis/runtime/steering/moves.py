"""Changes of the contract, carried by the hauler: the planner's moves go the way of the engine's own."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hetis.runtime.executor.change import EngineChange, gone, no_room, not_owner, unavailable
from hetis.runtime.executor.refusals import RefusedError, failure_of, generation_mismatch, refusal
from hetis.runtime.moving.hauler import Change as Hauled
from hetis.runtime.moving.hauler import Hauler, Phase, WantedMove
from hetis.runtime.steering.binding import StageBinding
from hetis.solver.dispatch.snapshot import DeviceStatus
from hetis.v1.change_pb2 import Change, ChangePhase
from hetis.v1.failure_pb2 import ErrorReason, Failure
from hetis.v1.head_map_pb2 import Move


@dataclass(slots=True)
class _Carried:
    """A change that is open, and what became of it in the hauler. Attributes: ``binding``: its stage's."""

    binding: StageBinding
    hauled: Hauled
    moves: dict[WantedMove, Move]


class HauledMoves:
    """Moves on the stages of a replica: its `Authority`, and its `Copies`.

    Copies begin with the reservation, for all of them pass through the primary: other nodes have nothing to do.
    """

    def __init__(self, hauler: Hauler, bindings: Sequence[StageBinding]) -> None:
        self._hauler, self._engine = hauler, hauler.engine
        self._bindings = {(binding.model.stage, binding.model.copy): binding for binding in bindings}
        self._open: dict[str, _Carried] = {}

    def in_flight(self, binding: StageBinding) -> list[tuple[str, Move]]:
        """Moves that are under way on a stage, with their changes."""
        found = {
            (change_id, move.number): move
            for change_id, carried in self._open.items()
            if carried.binding is binding
            for move in (carried.moves[one.wanted] for one in carried.hauled.moves)
        }
        return [(change_id, move) for (change_id, _), move in found.items()]

    # --- Authority

    def reserve(self, taken: EngineChange, generation: int) -> None:
        change = taken.change
        self._check(change, generation)
        binding = self._bindings[change.stage, change.copy]
        wanted: dict[WantedMove, Move] = {}
        used = {(move.request, head) for move in binding.part.placement.moves for head in move.heads}
        for move in change.moves:
            why = self._refusal_of(binding, move, used)
            if why is not None:
                taken.left_out[move.number] = why
                continue
            used |= {(int(move.request), head) for head in move.head_groups}
            wanted |= dict.fromkeys(self._wanted(binding, move), move)
        out = {(m.request, m.together): taken.left_out[m.number] for m in change.moves if m.number in taken.left_out}
        for one, move in list(wanted.items()):
            if (move.request, move.together) in out:  # they flip at the same step or not at all
                taken.left_out[move.number] = out[move.request, move.together]
                del wanted[one]
        if not wanted:
            raise RefusedError(taken.left_out[min(taken.left_out)])
        carried = _Carried(binding, self._hauler.reserve(list(wanted), prepare_s=math.inf), wanted)
        for one, _ in carried.hauled.left_out:
            taken.left_out[wanted[one].number] = self._no_room(binding, wanted[one])
        if not carried.hauled.is_open:
            raise RefusedError(taken.left_out[min(taken.left_out)])
        self._open[change.change_id] = carried

    def is_ready(self, change: EngineChange) -> bool:
        return self._open[change.change.change_id].hauled.phase is not Phase.COPYING

    def flip(self, change: EngineChange) -> Failure | None:
        carried = self._open[change.change.change_id]
        if carried.hauled.is_open:
            self._hauler.flip(carried.hauled)
        self._note_void(change, carried)
        if carried.hauled.phase is Phase.FLIPPED:
            change.phase, change.step = ChangePhase.CHANGE_PHASE_FLIPPED, self._engine.num_steps + 1
            change.generation = change.change.generation
            change.copied_bytes = carried.hauled.copied_bytes
            del self._open[change.change.change_id]
            return None
        if len(change.left_out) == len(change.change.moves):
            return change.left_out[min(change.left_out)]
        return failure_of(ErrorReason.ERROR_REASON_COPY_FAILED, carried.hauled.why, device="")

    def leave_out_void(self, changes: Mapping[str, EngineChange]) -> None:
        for change_id, carried in self._open.items():
            self._note_void(changes[change_id], carried)

    def give_blocks_back(self, change: EngineChange) -> None:
        carried = self._open.pop(change.change.change_id, None)
        if carried is not None:
            self._hauler.abort(carried.hauled, change.why.message if change.why is not None else "it was aborted")

    # --- Copies

    def plan(self, change: EngineChange, moves: Sequence[Move]) -> None:
        change.copy_bytes = self._bytes(change)

    def look(self, change: EngineChange, now_s: float) -> bool:
        carried = self._open.get(change.change.change_id)
        if carried is None:
            return True
        change.copied_bytes = carried.hauled.copied_bytes
        change.copy_bytes = max(change.copied_bytes, self._bytes(change))
        return carried.hauled.phase is not Phase.COPYING

    # --- inside

    def _check(self, change: Change, generation: int) -> None:
        if change.base_generation != generation:
            raise RefusedError(generation_mismatch(change.base_generation, generation))
        wrong = []
        binding = self._bindings.get((change.stage, change.copy))
        if change.generation <= change.base_generation:
            wrong.append(f"generation is {change.generation}, must be above {change.base_generation}")
        if binding is None:
            wrong.append(f"there is no copy {change.copy} of stage {change.stage}")
        if not change.moves:
            wrong.append("moves are 0, must be at least 1")
        numbers = [move.number for move in change.moves]
        if len(set(numbers)) < len(numbers):
            wrong.append("two moves have one number")
        if binding is not None:
            wrong += _uneven(binding, change)
        if wrong:
            raise refusal(ErrorReason.ERROR_REASON_INVALID_FIELD, "; ".join(wrong))

    def _wanted(self, binding: StageBinding, move: Move) -> list[WantedMove]:
        """A move as the engine makes it: from rank to rank."""
        request = int(move.request)
        splits = binding.part.placement.group.split(
            binding.part.placement.heads(request), list(move.head_groups), binding.index[move.target]
        )
        return [WantedMove(request, s.heads, s.target, move.together, binding.part.number) for s in splits]

    def _refusal_of(self, binding: StageBinding, move: Move, used: set[tuple[int, int]]) -> Failure | None:
        """Why a move cannot begin, whatever room there is; ``used``: heads that are on their way."""
        number = int(move.request) if move.request.isdecimal() else -1
        request = self._engine.running.get(number)
        owners = None if request is None else request.heads.get(binding.part.number)
        if request is None or owners is None or request.incarnation != move.incarnation:
            return gone(move)
        source, target = (binding.index.get(name) for name in (move.source, move.target))
        if source is None or binding.status(source) is DeviceStatus.LOST:
            return unavailable(move.source)
        if target is None or binding.status(target) is not DeviceStatus.OK or target == source:
            return unavailable(move.target)
        place = binding.part.placement.group.place
        for head in move.head_groups:
            if head >= len(owners) or place(owners[head]) != source or (number, head) in used:
                owner = binding.name(owners[head]) if head < len(owners) else ""
                return not_owner(move, head, owner)
        if not move.head_groups:
            return not_owner(move, 0, "")
        return None

    def _note_void(self, change: EngineChange, carried: _Carried) -> None:
        for one, _ in carried.hauled.left_out:
            move = carried.moves[one]
            if move.number not in change.left_out:
                why = self._refusal_of(carried.binding, move, set())
                change.left_out[move.number] = why or self._no_room(carried.binding, move)

    def _no_room(self, binding: StageBinding, move: Move) -> Failure:
        placement = binding.part.placement
        needed = binding.part.stage.shape.pages(placement.tokens(int(move.request))) * len(move.head_groups)
        return no_room(move, needed_blocks=needed, free_blocks=binding.room(binding.index[move.target]))

    def _bytes(self, change: EngineChange) -> int:
        """KV of the moves that are still to be made, as it is now."""
        carried = self._open.get(change.change.change_id)
        if carried is None:
            return 0
        positions = 0
        for one in carried.hauled.moves:
            request = self._engine.running.get(one.move.request)
            positions += 0 if request is None else request.computed * len(one.move.heads)
        shape = carried.binding.part.stage.shape
        return positions * shape.page_bytes // shape.page_tokens


def _uneven(binding: StageBinding, change: Change) -> list[str]:
    """Moves that would leave other numbers of heads on one rank of a primary than on another."""
    primary, group = binding.part.stage.devices[0].name, binding.part.placement.group
    more: dict[tuple[str, int], Counter[int]] = {}
    for move in change.moves:
        ranks = more.setdefault((move.request, move.together), Counter())
        for head in set(move.head_groups) & set(range(len(group.homes))):
            ranks[group.homes[head]] += (move.target == primary) - (move.source == primary)
    by_rank = {ends: [ranks[rank] for rank in range(group.size)] for ends, ranks in more.items()}
    return [
        f"together {together} of request {request} changes the heads on the ranks of {primary} by "
        f"{', '.join(map(str, nums))}: must be as many for each"
        for (request, together), nums in by_rank.items()
        if len(set(nums)) > 1
    ]
