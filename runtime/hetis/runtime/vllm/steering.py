"""vLLM as an agent steers it: one replica, whose primary is here, in the contract's terms.

A *group* of the contract is a KV head of the model; one of the allocator is a KV head of every tensor parallel rank.
Group p of the contract is group ``p % G`` here, on rank ``p // G``: a move moves a group on all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from hetis.runtime.measured.calibration import Coefficients
from hetis.runtime.moves.changes import EngineChanges
from hetis.runtime.moves.engine import SteeredEngine, TakenReplica
from hetis.runtime.moves.refusals import failure_of, refusal
from hetis.runtime.vllm.binding import Binding
from hetis.runtime.vllm.costs import HERE
from hetis.runtime.vllm.planned_moves import PlannedMoves
from hetis.runtime.vllm.reports import device_reports, head_map, stage_load
from hetis.runtime.vllm.scheduler import EngineShape, SchedulerSide
from hetis.runtime.vllm.steps import LOCAL
from hetis.v1.executor_service_pb2 import ReadHeadMapsResponse, WatchReportsResponse
from hetis.v1.failure_pb2 import ErrorReason
from hetis.v1.replica_pb2 import Assignment, AssignmentGoal, ReplicaRole
from hetis.v1.report_pb2 import AssignmentState, DeviceStatus, ReplicaReport


@dataclass(slots=True)
class _Taken(TakenReplica):
    """The replica that is run, and the moves of its head map."""

    binding: Binding
    moves: PlannedMoves


class SteeredVllm(SteeredEngine[_Taken]):
    """The engine under the contract. All methods are called at a boundary of the scheduler."""

    def __init__(self, side: SchedulerSide, engine_id: str | None = None) -> None:
        """Initialise with the id of this run, or a new UUID if it is None."""
        super().__init__(engine_id)
        self._side = side

    @property
    def is_assigned(self) -> bool:
        """Return whether the planner has assigned a replica, and so decides on moves."""
        return bool(self._held)

    # --- assignments

    def _take(self, assignment: Assignment, generation: int, held: _Taken | None, now_s: float) -> _Taken:
        other = next((name for name in self._held if name != assignment.replica), None)
        if other is not None:
            raise refusal(ErrorReason.ERROR_REASON_ENGINE_CANNOT, f"it runs {other} already, and no second replica")
        binding = bind(assignment, self._side)
        moves = PlannedMoves(self._side, binding)
        changes = EngineChanges(
            assignment.replica,
            generation=generation,
            authority=moves,
            copies=moves,
            devices=frozenset(binding.index),
        )
        if held is not None:  # requests continue, and the outcomes of changes stay known
            held.changes.end_all(failure_of(ErrorReason.ERROR_REASON_CHANGE_CANCELLED, "a new assignment came"))
            changes.known.update(held.changes.known)
        self._side.costs.planned(_planned_costs(binding))
        self._follow(assignment, binding)
        return _Taken(assignment, changes, binding, moves)

    def _remove(self, held: _Taken) -> None:
        held.changes.end_all(failure_of(ErrorReason.ERROR_REASON_CHANGE_CANCELLED, "the replica was removed"))
        self._given_up.known.update(held.changes.known)
        self._side.follow_plan({}, frozenset())

    def _state(self, held: _Taken, now_s: float) -> AssignmentState.ValueType:
        match held.assignment.goal:
            case AssignmentGoal.ASSIGNMENT_GOAL_SERVE:
                return AssignmentState.ASSIGNMENT_STATE_SERVING
            case AssignmentGoal.ASSIGNMENT_GOAL_DRAIN:
                if not self._side.requests.is_empty:
                    return AssignmentState.ASSIGNMENT_STATE_DRAINING
                return AssignmentState.ASSIGNMENT_STATE_STOPPED
        return AssignmentState.ASSIGNMENT_STATE_LOADED

    def _follow(self, assignment: Assignment, binding: Binding) -> None:
        """Limit dispatch to the plan: its workers take as many blocks as it says, others nothing.

        Workers that are not to be relied on take nothing either. A worker that the planner has lost keeps working as
        long as it is reached from here.
        """
        said = {condition.device for condition in assignment.conditions if condition.status != _OK}
        limits, drained = {}, set(range(1, len(self._side.settings.workers) + 1))
        for planned in binding.model.devices:
            device = binding.index[planned.name]
            if device == LOCAL:
                continue
            limits[device] = planned.total_blocks // binding.planned_blocks
            if said.isdisjoint([planned.name, *planned.gpus]):
                drained.discard(device)
        self._side.follow_plan(limits, frozenset(drained))

    # --- time

    def step(self, now_s: float) -> None:
        for held in self._held.values():
            held.changes.advance(now_s)
            held.changes.flip_due(now_s)
        self._given_up.advance(now_s)

    # --- telling

    def report(self, now_s: float) -> WatchReportsResponse:
        reports, devices = [], []
        for name, held in self._held.items():
            reports.append(self._replica_report(name, held, now_s))
            devices += device_reports(self._side, held.binding, held.assignment.primary_node.rpartition("/")[2])
        return WatchReportsResponse(
            engine_id=self.engine_id,
            newest_epoch=self.newest_epoch,
            replicas=reports,
            changes=self.statuses(),
            devices=sorted(devices, key=lambda device: device.index),
        )

    def head_maps(self, replica: str) -> ReadHeadMapsResponse:
        held = self._held.get(replica)
        if held is None:
            raise refusal(ErrorReason.ERROR_REASON_NOT_FOUND, f"the primary of {replica} is not here", name=replica)
        found = head_map(self._side, held.binding, held.moves.in_flight())
        return ReadHeadMapsResponse(generation=held.changes.generation, step=self._side.num_steps, head_maps=[found])

    def _replica_report(self, name: str, held: _Taken, now_s: float) -> ReplicaReport:
        side, requests = self._side, self._side.requests
        running = len(side.allocator.running)
        waiting = max(requests.num_known - running, 0)
        return ReplicaReport(
            replica=name,
            assignment_state=self._state(held, now_s),
            generation=held.changes.generation,
            is_primary=True,
            num_running=running,
            num_waiting=waiting,
            num_waiting_for_kv=0 if running >= side.shape.most_running else waiting,
            num_preempted=max(side.allocator.stats.released - requests.num_ran_to_end, 0),
            num_steps=side.num_steps,
            num_finished=requests.num_finished,
            stages=[stage_load(side, held.binding)],
            ttft_s=requests.ttft_s,
            tpot_s=requests.tpot_s,
        )


_OK = DeviceStatus.DEVICE_STATUS_OK


def bind(assignment: Assignment, side: SchedulerSide) -> Binding:
    """Return the stage of an assignment as the engine has it.

    Raises:
        RefusedError: ENGINE_CANNOT, with all reasons: an engine only runs what it was started for.
    """
    numbers = {worker.name: number for number, worker in enumerate(side.settings.workers, 1)}
    reasons = list(_differences(assignment, side.shape, numbers))
    if reasons:
        raise refusal(ErrorReason.ERROR_REASON_ENGINE_CANNOT, "; ".join(reasons))
    (model,) = assignment.stages
    return Binding(
        model=model,
        index={device.name: LOCAL if device.is_primary else numbers[device.name] for device in model.devices},
        cards=side.shape.tensor_parallel,
        planned_blocks=side.shape.tensor_parallel * side.shape.heads.block_tokens // model.heads.block_tokens,
    )


def _differences(assignment: Assignment, shape: EngineShape, workers: Mapping[str, int]) -> Iterator[str]:
    role = assignment.shape.role
    if role not in (ReplicaRole.REPLICA_ROLE_UNSPECIFIED, ReplicaRole.REPLICA_ROLE_UNIFIED):
        said = ReplicaRole.Name(role).removeprefix("REPLICA_ROLE_").lower()
        yield f"the replica's role is {said}, this engine runs unified ones"
    elif len(assignment.stages) != 1:
        # Pipeline stages of vLLM share one block table, and therefore one head map.
        yield f"the assignment has {len(assignment.stages)} stages with their copies, vLLM is steered as one stage"
    else:
        (model,) = assignment.stages
        heads, ranks = shape.heads, shape.tensor_parallel
        for what, planned, here in (
            ("layers", model.num_layers, shape.num_layers),
            ("head groups", model.heads.head_groups, heads.head_groups * ranks),
            ("query heads per group", model.heads.queries_per_group, heads.queries_per_group),
        ):
            if planned != here:
                yield f"the plan counts on {planned} {what}, this engine has {here}"
        if heads.block_tokens % max(model.heads.block_tokens, 1):
            yield (
                f"the plan counts on {model.heads.block_tokens} tokens per KV block, this engine's --block-size "
                f"{heads.block_tokens} is no multiple of that"
            )
        primaries = [device for device in model.devices if device.is_primary]
        unknown = [device.name for device in model.devices if not device.is_primary and device.name not in workers]
        if len(primaries) != 1:
            yield f"the plan has {len(primaries)} primaries, must have 1"
        elif (cards := max(len(primaries[0].gpus), 1)) != ranks:
            yield f"the plan's primary {primaries[0].name} has {cards} cards, this engine {ranks}"
        if unknown:
            here_are = ", ".join(workers) or "none"
            yield f"the plan has attention workers {', '.join(unknown)}, this engine's are {here_are}"


def _planned_costs(binding: Binding) -> dict[str, Coefficients]:
    """Return the plan's costs of the devices, by their names here."""
    return {
        HERE if device.is_primary else device.name: Coefficients(
            pieces=tuple((piece.head_s, piece.kv_byte_s, piece.call_s) for piece in device.pieces),
            transfer_byte_s=device.transfer_byte_s,
            transfer_s=device.transfer_s,
        )
        for device in binding.model.devices
        if device.pieces
    }
