"""The work of the engine of a replica's primary: checking moves against its head map, reserving and flipping."""

from __future__ import annotations

from collections.abc import Mapping

from hetis.runtime.agent.simulated.replica import PrimaryRun
from hetis.runtime.agent.simulated.stage import StageRun
from hetis.runtime.moves.changes import EngineChange, gone, no_room, not_owner, unavailable
from hetis.runtime.moves.refusals import RefusedError, failure_of, generation_mismatch, refusal
from hetis.v1.change_pb2 import Change, ChangePhase
from hetis.v1.failure_pb2 import ErrorReason, Failure
from hetis.v1.head_map_pb2 import Move
from hetis.v1.report_pb2 import DeviceStatus


class HeadMapAuthority:
    """The authority over moves in the head map of one replica. Implements `Authority`."""

    def __init__(self, primary: PrimaryRun) -> None:
        self.primary = primary

    def reserve(self, taken: EngineChange, generation: int) -> None:
        """Check every move against the head map, which has ``generation``, and reserve blocks for those that fit."""
        change = taken.change
        if change.base_generation != generation:
            raise RefusedError(generation_mismatch(change.base_generation, generation))
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

    def is_ready(self, change: EngineChange) -> bool:
        return True  # nodes that copy report their own readiness

    def flip(self, change: EngineChange) -> Failure | None:
        """Flip every move that still fits, all at once between two steps. If none fits, change nothing and say why."""
        stage = self._stage(change.change)
        for move in list(stage.reserved.get(change.change.change_id, ())):
            why = self._move_refusal(change.change, move)
            if why is not None:
                self.leave_out(change, move, why)
        self._keep_together(change)
        moves = stage.reserved.pop(change.change.change_id, [])
        if not moves:
            return change.left_out[min(change.left_out)]
        for move in moves:
            owners, source, target = stage.owners[move.request], stage.index[move.source], stage.index[move.target]
            for group in move.head_groups:
                assert owners[group] == source, "a flip found another owner"
                owners[group] = target
        change.phase, change.step = ChangePhase.CHANGE_PHASE_FLIPPED, self.primary.num_steps + 1
        change.generation = change.change.generation
        stage.check()
        return None

    def leave_out(self, change: EngineChange, move: Move, why: Failure) -> None:
        change.left_out.setdefault(move.number, why)
        stage = self._stage(change.change)
        reserved = stage.reserved.get(change.change.change_id, [])
        if move in reserved:
            reserved.remove(move)

    def leave_out_void(self, changes: Mapping[str, EngineChange]) -> None:
        """Leave out moves whose requests ended or lost their KV, or whose blocks were needed."""
        for change_id, move in self.primary.take_void():
            change = changes.get(change_id)
            if change is not None:
                is_gone = move.request not in self.primary.running
                self.leave_out(change, move, gone(move) if is_gone else no_room(move))

    def give_blocks_back(self, change: EngineChange) -> None:
        for stage in self.primary.stages.values():
            stage.reserved.pop(change.change.change_id, None)

    def link_byte_s(self, change: EngineChange, move: Move) -> float:
        """Return the seconds per byte of the slower of a move's two links, or 0 if the stage does not say."""
        stage = self.primary.stages.get((change.change.stage, change.change.copy))
        ends = (move.source, move.target)
        links = [device.link_byte_s for device in stage.model.devices if device.name in ends] if stage else []
        return max(links, default=0.0)

    def _move_refusal(self, change: Change, move: Move) -> Failure | None:
        stage = self._stage(change)
        request = stage.requests.get(move.request)
        if request is None or request.incarnation != move.incarnation:
            return gone(move)
        ends = [stage.index.get(move.source), stage.index.get(move.target)]
        lost, ok = DeviceStatus.DEVICE_STATUS_LOST, DeviceStatus.DEVICE_STATUS_OK
        source, target = ends
        if source is None or stage.status[source] == lost:
            return unavailable(move.source)
        if target is None or stage.status[target] != ok or target == source:
            return unavailable(move.target)
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
                owner = stage.model.devices[owners[group]].name if group < len(owners) else ""
                return not_owner(move, group, owner)
        if move in stage.reserved.get(change.change_id, ()):
            return None  # rechecked: its blocks are already reserved
        needed, free = stage.blocks(request.context_tokens) * len(move.head_groups), stage.free_blocks()[target]
        return None if needed <= free else no_room(move, needed_blocks=needed, free_blocks=free)

    def _keep_together(self, change: EngineChange) -> None:
        """Leave out together moves that only flip together, and those that leave a request uneven on the primary."""
        stage = self._stage(change.change)
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
        stage = self._stage(change.change)
        owners = list(stage.owners[request])
        for move in stage.reserved.get(change.change.change_id, ()):
            if move.request == request:
                for group in move.head_groups:
                    owners[group] = stage.index[move.target]
        primaries = [i for i, device in enumerate(stage.model.devices) if device.is_primary]
        return any(owners.count(i) % stage.primary_groups for i in primaries)

    def _stage(self, change: Change) -> StageRun:
        return self.primary.stages[change.stage, change.copy]
