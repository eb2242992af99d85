"""A simulated hetis engine of one node, without sockets or a clock: what is asked of it and how late it is come in."""

from __future__ import annotations

import uuid
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

from hetis.runtime.agent.refusals import RefusedError, failure_of, generation_mismatch, refusal, stale_epoch
from hetis.runtime.agent.simulated.admission import Admission, ProportionalAdmission
from hetis.runtime.agent.simulated.changes import EngineChanges
from hetis.runtime.agent.simulated.control import Control
from hetis.runtime.agent.simulated.engine_change import EngineChange
from hetis.runtime.agent.simulated.replica import PrimaryRun
from hetis.v1.change_pb2 import ChangeStatus
from hetis.v1.executor_service_pb2 import (
    AbortMovesRequest,
    AbortMovesResponse,
    ApplyAssignmentRequest,
    ApplyAssignmentResponse,
    CopyMovesRequest,
    FlipMovesRequest,
    FlipMovesResponse,
    ReadHeadMapsResponse,
    ReleaseMovesRequest,
    ReleaseMovesResponse,
    ReserveMovesRequest,
    ReserveMovesResponse,
    WatchReportsResponse,
)
from hetis.v1.failure_pb2 import ErrorReason
from hetis.v1.replica_pb2 import Assignment, AssignmentGoal, ReplicaRole
from hetis.v1.report_pb2 import AssignmentState, DeviceReport, ReplicaReport


@dataclass(slots=True)
class _Held:
    """A replica in the engine.

    Attributes:
        assignment: as applied.
        changes: its moves.
        loaded_s: when its weights are there.
        authority: the last that the primary's engine said of it; None: nothing, or it is this engine.
    """

    assignment: Assignment
    changes: EngineChanges
    loaded_s: float
    authority: ReplicaReport | None = None

    @property
    def primary(self) -> PrimaryRun | None:
        return self.changes.primary


class SimulatedEngine:
    """One engine. Methods named after those of `ExecutorService` raise RefusedError with its documented reasons.

    Args:
        node: its id in the cluster, the part of ``node/index`` before the slash.
        num_devices: GPUs that it has.
        seed: of arrivals and lengths; equal seeds and equal calls make equal runs.
        admission: where new requests go.
        engine_id: of this run; None: a new UUID.
    """

    def __init__(
        self,
        node: str,
        num_devices: int,
        *,
        seed: int = 0,
        admission: Admission | None = None,
        engine_id: str | None = None,
    ) -> None:
        self.node = node
        self.engine_id = engine_id or str(uuid.uuid4())
        self.control = Control()
        self.newest_epoch = 0
        self.is_warm = True  # False: admission is being compiled, which counts as loading weights
        self._num_devices = num_devices
        self._seed = seed
        self.admission = admission or ProportionalAdmission()
        self._held: dict[str, _Held] = {}
        # Changes that the engine was told to give up before it heard of them, whatever their replica.
        self._given_up = EngineChanges("", generation=0, primary=None, devices=frozenset())

    # --- assignments

    def apply_assignment(self, request: ApplyAssignmentRequest, now_s: float) -> ApplyAssignmentResponse:
        self._fence(request.epoch)
        removed = request.WhichOneof("change") == "removed_replica"
        name = request.removed_replica if removed else request.assignment.replica
        held = self._held.get(name)
        if removed:
            if held is not None and request.generation < held.changes.generation:
                raise RefusedError(generation_mismatch(request.generation, held.changes.generation))
            self._held.pop(name, None)
            return ApplyAssignmentResponse(state=AssignmentState.ASSIGNMENT_STATE_STOPPED)
        if held is not None and held.assignment == request.assignment:
            held.changes.generation = max(held.changes.generation, request.generation)
        else:
            if held is not None and request.generation <= held.changes.generation:
                raise RefusedError(generation_mismatch(request.generation, held.changes.generation))
            self._take(request.assignment, request.generation, held, now_s)
        return ApplyAssignmentResponse(state=self._state(self._held[name], now_s))

    def _take(self, assignment: Assignment, generation: int, held: _Held | None, now_s: float) -> None:
        for device in assignment.devices:
            node, _, index = device.rpartition("/")
            if node != self.node or not index.isdigit() or int(index) >= self._num_devices:
                raise refusal(
                    ErrorReason.ERROR_REASON_DEVICE_UNAVAILABLE,
                    f"{device} is not here: this is {self.node} with {self._num_devices} devices",
                    device=device,
                )
        kept = Assignment()
        kept.CopyFrom(assignment)
        if held is not None and list(held.assignment.stages) == list(kept.stages):
            held.changes.end_all(failure_of(ErrorReason.ERROR_REASON_CHANGE_CANCELLED, "a new assignment came"))
            held.assignment = kept
            held.changes.generation = generation
            if held.primary is not None:
                held.primary.use(kept)
            held.changes.advance(now_s)
            return
        primary = None
        prefills = kept.shape.role == ReplicaRole.REPLICA_ROLE_PREFILL
        if kept.primary_node.rpartition("/")[2] == self.node and (kept.stages or prefills):
            seed = self._seed ^ zlib.crc32(kept.replica.encode())
            primary = PrimaryRun(kept, seed=seed, admission=self.admission, now_s=now_s)
        changes = EngineChanges(kept.replica, generation=generation, primary=primary, devices=frozenset(kept.devices))
        if held is not None:  # requests begin anew, but how changes ended stays known
            held.changes.end_all(failure_of(ErrorReason.ERROR_REASON_CHANGE_CANCELLED, "a new assignment came"))
            changes.known.update(held.changes.known)
        self._held[kept.replica] = _Held(kept, changes, now_s + self.control.load_s)

    def _state(self, held: _Held, now_s: float) -> AssignmentState.ValueType:
        if now_s < held.loaded_s or not self.is_warm:
            return AssignmentState.ASSIGNMENT_STATE_LOADING
        match held.assignment.goal:
            case AssignmentGoal.ASSIGNMENT_GOAL_SERVE:
                return AssignmentState.ASSIGNMENT_STATE_SERVING
            case AssignmentGoal.ASSIGNMENT_GOAL_DRAIN:
                primary, said = held.primary, held.authority
                stopped = AssignmentState.ASSIGNMENT_STATE_STOPPED
                empty = said is not None and said.assignment_state == stopped
                if primary is not None:
                    empty = not primary.running and not primary.waiting
                return stopped if empty else AssignmentState.ASSIGNMENT_STATE_DRAINING
        return AssignmentState.ASSIGNMENT_STATE_LOADED

    # --- moves

    def reserve_moves(self, request: ReserveMovesRequest, now_s: float) -> ReserveMovesResponse:
        self._fence(request.epoch)
        held = self._held.get(request.change.replica)
        if held is None:
            raise RefusedError(generation_mismatch(request.change.base_generation, 0))
        changes = self._given_up if request.change.change_id in self._given_up.known else held.changes
        change = changes.reserve(request.change, request.parts, now_s)
        return ReserveMovesResponse(moves=change.results(), copy_bytes=change.copy_bytes)

    def copy_moves(self, request: CopyMovesRequest, now_s: float) -> EngineChange:
        """Begins to copy; `step` goes on, the change's phase tells when all is there."""
        self._fence(request.epoch)
        if self.control.fail_copies:
            raise refusal(ErrorReason.ERROR_REASON_COPY_FAILED, "the control file says that copies fail", device="")
        change = self._changes_of(request.change_id).begin_copy(request.change_id, now_s)
        self._changes_of(request.change_id).advance(now_s)
        return change

    def flip_moves(self, request: FlipMovesRequest, now_s: float) -> EngineChange:
        """Asks for the flip, which `step` makes at the next boundary; `flip_answer` says how it ended."""
        self._fence(request.epoch)
        timeout_s = request.timeout.seconds + request.timeout.nanos / 1e9
        return self._changes_of(request.change_id).ask_flip(request.change_id, timeout_s, now_s)

    def flip_answer(self, change_id: str) -> FlipMovesResponse | None:
        """How a flip that was asked for ended; None: it has not."""
        changes = self._changes_of(change_id)
        change = changes.known[change_id]
        return None if change.is_open else changes.flip_answer(change)

    def release_moves(self, request: ReleaseMovesRequest, now_s: float) -> ReleaseMovesResponse:
        self._fence(request.epoch)
        changes = self._changes_of(request.change_id)
        freed = changes.release(request.change_id, request.moves, request.generation, now_s)
        return ReleaseMovesResponse(freed_blocks=freed)

    def abort_moves(
        self, request: AbortMovesRequest, now_s: float, *, authority: Iterable[ChangeStatus] | None = None
    ) -> AbortMovesResponse:
        """``authority``: what the primary's engine said of its changes just now, where this is another one."""
        self._fence(request.epoch)
        try:
            changes = self._changes_of(request.change_id)
        except RefusedError:
            changes = self._given_up
        change = changes.abort(request.change_id, request.failure, authority, now_s)
        return AbortMovesResponse(
            outcome=change.outcome(), generation=changes.generation, moves=change.results() if change.generation else ()
        )

    def authority_of(self, change_id: str) -> str | None:
        """Address of the engine that decides the change, if that is another one and the change is open here."""
        for held in self._held.values():
            change = held.changes.known.get(change_id)
            if change is not None and change.is_open and not change.is_authority:
                return self.peer_of(held.assignment)
        return None

    # --- other engines

    def peer_of(self, assignment: Assignment) -> str | None:
        """Where the engine of the replica's primary listens; None: it is this one, or it is not known."""
        primary = assignment.primary_node.rpartition("/")[2]
        if primary == self.node:
            return None
        return next((p.address for p in assignment.peers if p.node.rpartition("/")[2] == primary and p.address), None)

    def peers(self) -> dict[str, str]:
        """The address of every primary's engine that this one has to hear, by replica."""
        found = ((name, self.peer_of(held.assignment)) for name, held in self._held.items())
        return {name: address for name, address in found if address is not None}

    def hear(self, replica: str, report: WatchReportsResponse) -> None:
        """What the engine of a replica's primary reports."""
        held = self._held.get(replica)
        if held is None or held.primary is not None:
            return
        held.authority = next((said for said in report.replicas if said.replica == replica), None)
        generation = held.authority.generation if held.authority is not None else 0
        # A change that it gave up before it heard of it has no replica there.
        held.changes.hear((status for status in report.changes if status.replica in (replica, "")), generation)

    # --- time

    def step(self, now_s: float) -> None:
        """Everything that has happened by ``now_s``: decode steps, flips between them, copies, deadlines."""
        for held in self._held.values():
            primary = held.primary
            if primary is not None:
                while primary.next_boundary_s() <= now_s:
                    at_s = primary.next_boundary_s()
                    held.changes.advance(at_s)
                    held.changes.flip_due(at_s)
                    primary.step(self.control, serves=self.is_warm and at_s >= held.loaded_s)
                    primary.check()
            held.changes.advance(now_s)
        self._given_up.advance(now_s)

    def catch_up(self, now_s: float) -> None:
        """In real time: what a process that was stopped missed is not made good."""
        for held in self._held.values():
            if held.primary is not None:
                held.primary.catch_up(now_s)

    def next_s(self) -> float:
        """When the next decode step begins; infinity: no primary is here."""
        times = [held.primary.next_boundary_s() for held in self._held.values() if held.primary is not None]
        return min(times, default=float("inf"))

    # --- telling

    def report(self, now_s: float) -> WatchReportsResponse:
        return WatchReportsResponse(
            engine_id=self.engine_id,
            newest_epoch=self.newest_epoch,
            replicas=[self._replica_report(name, held, now_s) for name, held in self._held.items()],
            changes=[
                change.status(name, held.changes.generation, now_s)
                for name, held in self._held.items()
                for change in held.changes.known.values()
            ]
            + [change.status("", 0, now_s) for change in self._given_up.known.values()],
            devices=self._device_reports(),
        )

    def head_maps(self, replica: str) -> ReadHeadMapsResponse:
        """All head maps of a replica whose primary is here, in one message of any size."""
        held = self._held.get(replica)
        if held is None or held.primary is None:
            raise refusal(ErrorReason.ERROR_REASON_NOT_FOUND, f"the primary of {replica} is not here", name=replica)
        return ReadHeadMapsResponse(
            generation=held.changes.generation, step=held.primary.num_steps, head_maps=held.primary.head_maps()
        )

    def _replica_report(self, name: str, held: _Held, now_s: float) -> ReplicaReport:
        report = ReplicaReport(
            replica=name, assignment_state=self._state(held, now_s), generation=held.changes.generation
        )
        if held.primary is not None:
            held.primary.fill(report)
        return report

    def _device_reports(self) -> list[DeviceReport]:
        """KV of the node's devices over all replicas; a tensor-parallel group's is shared evenly by its cards."""
        total, used = [0.0] * self._num_devices, [0.0] * self._num_devices
        for held in self._held.values():
            if held.primary is not None:
                loads = held.primary.loads()
            else:
                loads = list(held.authority.stages) if held.authority is not None else []
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

    # --- inside

    def _fence(self, epoch: int) -> None:
        if epoch < max(self.newest_epoch, 1):
            raise RefusedError(stale_epoch(epoch, self.newest_epoch))
        self.newest_epoch = epoch

    def _changes_of(self, change_id: str) -> EngineChanges:
        for changes in [*(held.changes for held in self._held.values()), self._given_up]:
            if change_id in changes.known:
                return changes
        raise refusal(ErrorReason.ERROR_REASON_CHANGE_UNKNOWN, f"change {change_id} is not known", change_id=change_id)


def gpu_groups(assignment: Assignment) -> dict[str, list[str]]:
    """GPUs of each device of the replica's stages, by the device's name: its first GPU."""
    groups = {pool_gpu: [pool_gpu] for pool in assignment.shape.attention_workers for pool_gpu in pool.devices}
    for stage in assignment.shape.stages:
        tp = max(stage.tp, 1)
        for first in range(0, len(stage.devices), tp):
            groups[stage.devices[first]] = list(stage.devices[first : first + tp])
    return groups
