"""A simulated hetis engine of one node, without sockets or a clock: requests and the current time are passed in."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from examples.simulated_engine.replica import Control, PrimaryRun
from examples.simulated_engine.stage import AdmissionRule, ProportionalAdmission, StageRun
from hetis.runtime.moves.changes import EngineChange, MoveAuthority, gone, no_room, not_owner, unavailable
from hetis.runtime.moves.engine import SteeredEngine, TakenReplica
from hetis.runtime.moves.refusals import failure_of, refusal
from hetis.v1.change_pb2 import Change
from hetis.v1.executor_service_pb2 import (
    ApplyAssignmentRequest,
    ApplyAssignmentResponse,
    CopyMovesRequest,
    ReadHeadMapsResponse,
    WatchReportsResponse,
)
from hetis.v1.failure_pb2 import ErrorReason, Failure
from hetis.v1.head_map_pb2 import Move
from hetis.v1.replica_pb2 import Assignment, AssignmentGoal, ReplicaRole
from hetis.v1.report_pb2 import AssignmentState, DeviceReport, DeviceStatus, ReplicaReport

DEFAULT_LINK_BYTES_PER_S = 10e9  # used if neither the stage nor the move states how long a copy takes


class HeadMapAuthority(MoveAuthority):
    """The authority over moves in the head map of one replica."""

    def __init__(self, primary: PrimaryRun) -> None:
        super().__init__()
        self.primary = primary

    def check(self, change: Change) -> None:
        if (change.stage, change.copy) not in self.primary.stages:
            why = f"there is no copy {change.copy} of stage {change.stage}"
            raise refusal(ErrorReason.ERROR_REASON_INVALID_FIELD, why)

    def begin(self, change: Change, move: Move) -> Failure | None:
        self._stage(change).reserved.setdefault(change.change_id, []).append(move)
        return None

    def abort(self, change: Change, move: Move) -> None:
        reserved = self._stage(change).reserved
        if move in reserved.get(change.change_id, ()):
            reserved[change.change_id].remove(move)
        if not reserved.get(change.change_id):
            reserved.pop(change.change_id, None)

    def why_void(self, change: Change, move: Move) -> Failure | None:
        """Return why a move is void: its request ended or lost its KV, or its blocks were needed."""
        if move in self._stage(change).reserved.get(change.change_id, ()):
            return None
        return no_room(move) if move.request in self.primary.running else gone(move)

    def flip(self, change: EngineChange) -> Failure | None:
        moves = self._open[change.id]
        refused = [(move, why) for move in moves if (why := self.refusal_of(change.change, move)) is not None]
        self._leave_out(change, moves, refused)
        self._keep_together(change, moves)
        return super().flip(change)

    def commit(self, change: EngineChange, moves: Sequence[Move]) -> int:
        stage = self._stage(change.change)
        for move in moves:
            owners, source, target = stage.owners[move.request], stage.index[move.source], stage.index[move.target]
            for group in move.head_groups:
                assert owners[group] == source, "a flip found another owner"
                owners[group] = target
        stage.reserved.pop(change.id, None)
        stage.check()
        return self.primary.num_steps + 1

    def link_byte_s(self, change: EngineChange, move: Move) -> float:
        """Return the seconds per byte of the slower of a move's two links, or 0 if the stage does not state it."""
        stage = self.primary.stages.get((change.change.stage, change.change.copy))
        ends = (move.source, move.target)
        links = [device.link_byte_s for device in stage.model.devices if device.name in ends] if stage else []
        return max(links, default=0.0)

    def refusal_of(self, change: Change, move: Move) -> Failure | None:
        stage = self._stage(change)
        request = stage.requests.get(move.request)
        if request is None or request.incarnation != move.incarnation:
            return gone(move)
        source, target = stage.index.get(move.source), stage.index.get(move.target)
        if source is None or stage.status[source] == DeviceStatus.DEVICE_STATUS_LOST:
            return unavailable(move.source)
        if target is None or stage.status[target] != DeviceStatus.DEVICE_STATUS_OK or target == source:
            return unavailable(move.target)
        owners = stage.owners[move.request]
        reserved = [other for moves in stage.reserved.values() for other in moves if other != move]
        taken = {group for other in reserved if other.request == move.request for group in other.head_groups}
        for group in move.head_groups:
            if group >= len(owners) or owners[group] != source or group in taken:
                owner = stage.model.devices[owners[group]].name if group < len(owners) else ""
                return not_owner(move, group, owner)
        if move in stage.reserved.get(change.change_id, ()):
            return None  # rechecked: its blocks are already reserved
        needed, free = stage.blocks(request.context_tokens) * len(move.head_groups), stage.free_blocks()[target]
        return None if needed <= free else no_room(move, needed_blocks=needed, free_blocks=free)

    def stranded(self, change: Change, moves: Sequence[Move]) -> list[tuple[Move, Failure]]:
        """Return the moves that would leave the primary with part of a set of head groups that it takes together."""
        stage = self._stage(change)
        text, primary = f"the primary takes {stage.primary_groups} head groups at a time", stage.model.devices[0].name
        why = failure_of(ErrorReason.ERROR_REASON_DEVICE_UNAVAILABLE, text, device=primary)
        return [(move, why) for move in moves if self._is_uneven(stage, move.request, moves)]

    def _is_uneven(self, stage: StageRun, request: str, moves: Sequence[Move]) -> bool:
        owners = list(stage.owners.get(request, ()))
        for move in (move for move in moves if move.request == request):
            for group in move.head_groups if owners else ():
                owners[group] = stage.index[move.target]
        primaries = [i for i, device in enumerate(stage.model.devices) if device.is_primary]
        return any(owners.count(i) % stage.primary_groups for i in primaries)

    def _stage(self, change: Change) -> StageRun:
        return self.primary.stages[change.stage, change.copy]


@dataclass(slots=True)
class _Held(TakenReplica):
    """A replica in the engine."""

    loaded_s: float  # time at which the weights are loaded
    primary: PrimaryRun | None  # requests and head maps, at the engine that runs them. None elsewhere.
    # The latest report on it from the primary's engine. None: no report yet, or this is that engine.
    authority: ReplicaReport | None = None


class SimulatedEngine(SteeredEngine[_Held]):
    """The engine of one node. ``node``: the part of ``node/index`` before the slash.

    Equal seeds and equal calls make equal runs. ``admission`` decides where new requests go; ``engine_id`` identifies
    this run, by a new UUID unless given.
    """

    def __init__(
        self,
        node: str,
        num_devices: int,
        *,
        seed: int = 0,
        admission: AdmissionRule | None = None,
        engine_id: str | None = None,
    ) -> None:
        super().__init__(engine_id)
        self.node, self.control = node, Control()
        self.is_warm = True  # False while admission is being compiled, which counts as loading weights
        self.when_primary: Callable[[], None] = lambda: None  # called when a primary is to run here
        self._num_devices, self._seed, self.admission = num_devices, seed, admission or ProportionalAdmission()

    # --- assignments

    def apply_assignment(self, request: ApplyAssignmentRequest, now_s: float) -> ApplyAssignmentResponse:
        if request.assignment.stages:
            self.when_primary()
        return super().apply_assignment(request, now_s)

    def _take(self, kept: Assignment, generation: int, held: _Held | None, now_s: float) -> _Held:
        for device in kept.devices:
            node, _, index = device.rpartition("/")
            if node != self.node or not index.isdigit() or int(index) >= self._num_devices:
                why = f"{device} is not on this node, which is {self.node} with {self._num_devices} devices"
                raise refusal(ErrorReason.ERROR_REASON_DEVICE_UNAVAILABLE, why, device=device)
        if held is not None and list(held.assignment.stages) == list(kept.stages):
            held.changes.end_all(failure_of(ErrorReason.ERROR_REASON_CHANGE_CANCELLED, "a new assignment arrived"))
            held.assignment = kept
            held.changes.raise_to(generation)
            if held.primary is not None:
                held.primary.use(kept)
            held.changes.advance(now_s)
            return held
        primary = None
        prefills = kept.shape.role == ReplicaRole.REPLICA_ROLE_PREFILL
        if kept.primary_node.rpartition("/")[2] == self.node and (kept.stages or prefills):
            seed = self._seed ^ zlib.crc32(kept.replica.encode())
            primary = PrimaryRun(kept, seed=seed, admission=self.admission, now_s=now_s)
        authority = HeadMapAuthority(primary) if primary is not None else None
        changes = self._changes(kept, generation, held, authority, TimedCopies(authority), kept.devices)
        return _Held(kept, changes, now_s + self.control.load_s, primary)

    def _remove(self, held: _Held) -> None:
        """Do nothing more: the requests go with the replica."""

    def _state(self, held: _Held, now_s: float) -> AssignmentState.ValueType:
        if now_s < held.loaded_s or not self.is_warm:
            return AssignmentState.ASSIGNMENT_STATE_LOADING
        match held.assignment.goal:
            case AssignmentGoal.ASSIGNMENT_GOAL_SERVE:
                return AssignmentState.ASSIGNMENT_STATE_SERVING
            case AssignmentGoal.ASSIGNMENT_GOAL_DRAIN:
                primary, said, stopped = held.primary, held.authority, AssignmentState.ASSIGNMENT_STATE_STOPPED
                empty = said is not None and said.assignment_state == stopped
                if primary is not None:
                    empty = not primary.running and not primary.waiting
                return stopped if empty else AssignmentState.ASSIGNMENT_STATE_DRAINING
        return AssignmentState.ASSIGNMENT_STATE_LOADED

    # --- moves

    def copy_moves(self, request: CopyMovesRequest, now_s: float) -> EngineChange:
        if self.control.fail_copies and request.epoch >= max(self.newest_epoch, 1):
            raise refusal(ErrorReason.ERROR_REASON_COPY_FAILED, "the control file makes copies fail", device="")
        return super().copy_moves(request, now_s)

    def authority_of(self, change_id: str) -> str | None:
        """Return the address of the engine that decides a change, None if it is this one or it is not open here."""
        for held in self._held.values():
            change = held.changes.known.get(change_id)
            if change is not None and change.is_open and not change.is_authority:
                return self.peer_of(held.assignment)
        return None

    # --- other engines

    def peer_of(self, assignment: Assignment) -> str | None:
        """Return where the engine of the replica's primary listens, or None if it is this one or unknown."""
        primary = assignment.primary_node.rpartition("/")[2]
        if primary == self.node:
            return None
        return next((p.address for p in assignment.peers if p.node.rpartition("/")[2] == primary and p.address), None)

    def peers(self) -> dict[str, str]:
        """Return the address of every other primary's engine that this one listens to, by replica."""
        found = ((name, self.peer_of(held.assignment)) for name, held in self._held.items())
        return {name: address for name, address in found if address is not None}

    def hear(self, replica: str, report: WatchReportsResponse) -> None:
        """Handle a report of the engine of a replica's primary."""
        held = self._held.get(replica)
        if held is None or held.primary is not None:
            return
        held.authority = next((said for said in report.replicas if said.replica == replica), None)
        generation = held.authority.generation if held.authority is not None else 0
        # A change that was aborted before the primary's engine received it has no replica there.
        held.changes.resolve((status for status in report.changes if status.replica in (replica, "")), generation)

    # --- time

    def step(self, now_s: float) -> None:
        """Do everything that happens by ``now_s``: decode steps, flips between them, copies, deadlines."""
        for held in self._held.values():
            primary = held.primary
            if primary is not None:
                while primary.next_step_s <= now_s:
                    at_s = primary.next_step_s
                    held.changes.advance(at_s)
                    held.changes.flip_due(at_s)
                    primary.step(self.control, serves=self.is_warm and at_s >= held.loaded_s)
                    primary.check()
            held.changes.advance(now_s)
        self._given_up.advance(now_s)

    def catch_up(self, now_s: float) -> None:
        """Catch up with real time: the time that a suspended process missed is skipped."""
        for held in self._held.values():
            if held.primary is not None:
                held.primary.catch_up(now_s)

    def next_s(self) -> float:
        """Return when the next decode step begins, or infinity if no primary is here."""
        times = [held.primary.next_step_s for held in self._held.values() if held.primary is not None]
        return min(times, default=float("inf"))

    # --- reports

    def report(self, now_s: float) -> WatchReportsResponse:
        return WatchReportsResponse(
            engine_id=self.engine_id,
            newest_epoch=self.newest_epoch,
            replicas=[self._replica_report(name, held, now_s) for name, held in self._held.items()],
            changes=self.statuses(),
            devices=self._device_reports(),
        )

    def head_maps(self, replica: str) -> ReadHeadMapsResponse:
        """Return all head maps of a replica whose primary is here, in one message of any size."""
        held = self._held.get(replica)
        if held is None or held.primary is None:
            raise refusal(
                ErrorReason.ERROR_REASON_NOT_FOUND, f"the primary of {replica} is not on this node", name=replica
            )
        step, head_maps = held.primary.num_steps, held.primary.head_maps()
        return ReadHeadMapsResponse(generation=held.changes.generation, step=step, head_maps=head_maps)

    def _replica_report(self, name: str, held: _Held, now_s: float) -> ReplicaReport:
        state, generation = self._state(held, now_s), held.changes.generation
        report = ReplicaReport(replica=name, assignment_state=state, generation=generation)
        if held.primary is not None:
            held.primary.fill(report)
        return report

    def _device_reports(self) -> list[DeviceReport]:
        """Return the KV of the node's devices over all replicas, shared evenly in a tensor parallel group."""
        total, used = [0.0] * self._num_devices, [0.0] * self._num_devices
        for held in self._held.values():
            away = list(held.authority.stages) if held.authority is not None else []
            loads = away if held.primary is None else held.primary.loads()
            groups = gpu_groups(held.assignment)
            for load in (load for stage in loads for load in stage.devices):
                gpus = groups.get(load.device, [load.device])
                for node, _, index in (gpu.rpartition("/") for gpu in gpus):
                    if node == self.node and index.isdigit() and int(index) < self._num_devices:
                        total[int(index)] += load.total_blocks / len(gpus)
                        used[int(index)] += load.used_blocks / len(gpus)
        return [
            DeviceReport(index=i, total_blocks=int(total[i]), used_blocks=min(round(used[i]), int(total[i])))
            for i in range(self._num_devices)
        ]


def gpu_groups(assignment: Assignment) -> dict[str, list[str]]:
    """Return the GPUs of each device of the replica's stages, by the name of its first GPU."""
    groups = {pool_gpu: [pool_gpu] for pool in assignment.shape.attention_workers for pool_gpu in pool.devices}
    for stage in assignment.shape.stages:
        tp = max(stage.tp, 1)
        for first in range(0, len(stage.devices), tp):
            groups[stage.devices[first]] = list(stage.devices[first : first + tp])
    return groups


class TimedCopies:
    """The copies of one replica in one engine, made sequentially within a change. Implements `Copies`. Its
    ``authority`` knows the links, if this is the primary's engine.
    """

    def __init__(self, authority: HeadMapAuthority | None) -> None:
        self._authority = authority
        self._seconds: dict[str, float] = {}  # seconds that the copies of each open change take, by id

    def plan(self, change: EngineChange, moves: Sequence[Move]) -> None:
        change.copy_bytes = int(sum(move.kv_bytes for move in moves))

        def copy_s(move: Move) -> float:
            """Return the seconds that a copy takes on the slower of its two links."""
            if link_byte_s := self._authority.link_byte_s(change, move) if self._authority is not None else 0.0:
                return move.kv_bytes * link_byte_s
            return move.copy_s or move.kv_bytes / DEFAULT_LINK_BYTES_PER_S

        self._seconds = {change.id: sum(map(copy_s, moves))}

    def look(self, change: EngineChange, now_s: float) -> bool:
        if change.copy_begun_s is None:
            return False
        whole_s = self._seconds.get(change.id, 0.0)
        share = 1.0 if whole_s <= 0 else min(max(now_s - change.copy_begun_s, 0.0) / whole_s, 1.0)
        change.status.copied_bytes = int(change.copy_bytes * share)
        return share >= 1
