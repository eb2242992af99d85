"""vLLM as an agent steers it: one replica, whose primary is here, in the contract's terms.

A *group* of the contract is a KV head of the model; one of the allocator is a KV head of every tensor parallel rank.
Group p of the contract is group ``p % G`` here, on rank ``p // G``: a move moves a group on all ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hetis.engines.workers import worker_name
from hetis.runtime.moves.changes import EngineChange, MoveAuthority, gone, no_room, not_owner, unavailable
from hetis.runtime.moves.engine import SteeredEngine, TakenReplica, planned_s
from hetis.runtime.moves.refusals import failure_of, refusal
from hetis.runtime.vllm.calibration import Coefficients, device_seconds
from hetis.runtime.vllm.costs import HERE
from hetis.runtime.vllm.scheduler import EngineShape, SchedulerSide
from hetis.runtime.vllm.steps import LOCAL
from hetis.solver.dispatch.snapshot import DeviceStatus as OwnStatus
from hetis.v1.change_pb2 import Change
from hetis.v1.executor_service_pb2 import ReadHeadMapsResponse, WatchReportsResponse
from hetis.v1.failure_pb2 import ErrorReason, Failure
from hetis.v1.head_map_pb2 import HeadMap, HeadMapDevice, Move, MoveInFlight, RunningRequest
from hetis.v1.replica_pb2 import Assignment, AssignmentGoal, ReplicaRole
from hetis.v1.report_pb2 import AssignmentState, DeviceLoad, DeviceReport, DeviceStatus, ReplicaReport, StageLoad
from hetis.v1.stage_pb2 import StageModel
from hetis.v1.traffic_pb2 import Traffic

_STATUS = {
    OwnStatus.OK: DeviceStatus.DEVICE_STATUS_OK,
    OwnStatus.DRAINING: DeviceStatus.DEVICE_STATUS_DRAINING,
    OwnStatus.LOST: DeviceStatus.DEVICE_STATUS_LOST,
}
_OK = DeviceStatus.DEVICE_STATUS_OK


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """The stage of an assignment in this engine."""

    model: StageModel  # the stage as the planner knows it
    index: Mapping[str, int]  # number of each of its devices here, by name; the primary is `LOCAL`
    cards: int  # tensor parallel ranks, each with as many groups as the allocator has
    # Number of the plan's blocks that a block of one group here makes up, on all ranks together: vLLM's blocks may be
    # several times as long
    planned_blocks: int

    def name(self, device: int) -> str:
        """Return the planner's name for a device, or its own name if the plan does not have it."""
        return next((name for name, number in self.index.items() if number == device), f"device {device}")


def stage_load(side: SchedulerSide, binding: Binding) -> StageLoad:
    """Return the load of the replica's stage, with its times as planned and as measured."""
    allocator, costs = side.allocator, side.costs
    load = allocator.state.load()
    measured = device_seconds(costs.stage, load.heads.astype(np.float64), load.kv_bytes)
    devices = []
    for planned in binding.model.devices:
        device = binding.index[planned.name]
        heads, kv_bytes = int(load.heads[device]) * binding.cards, float(load.kv_bytes[device]) * binding.cards
        total, used = blocks(side, binding, device)
        devices.append(
            DeviceLoad(
                device=planned.name,
                heads=heads,
                kv_bytes=round(kv_bytes),
                total_blocks=total,
                used_blocks=used,
                status=_STATUS[allocator.state.devices[device].status],
                observed_s=float(measured[device]) if costs.is_measured else 0.0,
                predicted_s=planned_s(binding.model, planned, heads, kv_bytes),
            )
        )
    remaining = sum(allocator.state.remaining_tokens(name) for name in allocator.running)
    return StageLoad(stage=binding.model.stage, copy=binding.model.copy, devices=devices, remaining_tokens=remaining)


def blocks(side: SchedulerSide, binding: Binding, device: int) -> tuple[int, int]:
    """Return a device's blocks, as far as the plan lets it use them, and its used blocks, in the plan's unit."""
    total, used = side.allocator.totals(device)
    return total * binding.planned_blocks, used * binding.planned_blocks


def head_map(side: SchedulerSide, binding: Binding, in_flight: Iterable[tuple[str, Move]]) -> HeadMap:
    """Return the head map with the moves ``in_flight``, given with the ids of their changes."""
    allocator, model = side.allocator, binding.model
    position = {binding.index[device.name]: i for i, device in enumerate(model.devices)}
    devices = [
        HeadMapDevice(
            name=device.name,
            total_blocks=blocks(side, binding, binding.index[device.name])[0],
            status=_STATUS[allocator.state.devices[binding.index[device.name]].status],
        )
        for device in model.devices
    ]
    requests = [
        RunningRequest(
            id=str(allocator.number(name)),
            context_tokens=allocator.state.context_tokens(name),
            remaining_tokens=allocator.state.remaining_tokens(name),
            owners=[position[owner] for owner in allocator.devices(name)] * binding.cards,
        )
        for name in allocator.running
        if position.keys() >= set(allocator.devices(name))  # else it has groups on a worker that the plan lacks
    ]
    known = {request.id for request in requests}
    return HeadMap(
        stage=model.stage,
        copy=model.copy,
        devices=devices,
        requests=requests,
        moves=[MoveInFlight(change_id=one, move=move) for one, move in in_flight if move.request in known],
    )


def device_reports(side: SchedulerSide, binding: Binding, node: str) -> list[DeviceReport]:
    """Return the KV of the GPUs of one node. The GPUs of a device share its KV evenly."""
    reports = []
    for planned in binding.model.devices:
        total, used = blocks(side, binding, binding.index[planned.name])
        for gpu in planned.gpus:
            where, _, index = gpu.rpartition("/")
            if where == node and index.isdecimal():
                each = len(planned.gpus)
                reports.append(DeviceReport(index=int(index), total_blocks=total // each, used_blocks=used // each))
    return reports


class PlannedMoves(MoveAuthority):
    """Moves of a replica's head map. Implements `Copies`, too.

    Copies begin with the reservation: they pass through the ranks, so other nodes have nothing to do.
    """

    def __init__(self, side: SchedulerSide, binding: Binding) -> None:
        super().__init__()
        self._side, self._binding = side, binding
        self._numbers: dict[tuple[str, int], int] = {}  # the allocator's, by a change's id and a move's number

    # --- the authority

    def check(self, change: Change) -> None:
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

    def refusal_of(self, change: Change, move: Move) -> Failure | None:
        allocator, binding = self._side.allocator, self._binding
        name = allocator.numbered(move.request)
        if name is None or move.incarnation:
            return gone(move)
        source, target = binding.index.get(move.source), binding.index.get(move.target)
        devices = allocator.state.devices
        if source is None or devices[source].status is OwnStatus.LOST:
            return unavailable(move.source)
        if target is None or devices[target].status is not OwnStatus.OK or target == source:
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

    def begin(self, change: Change, move: Move) -> Failure | None:
        # The groups in the allocator's numbering.
        groups = sorted({group % self._side.shape.heads.head_groups for group in move.head_groups})
        name, target = self._side.allocator.numbered(move.request), self._binding.index[move.target]
        assert name is not None, "it was checked"
        number = self._side.begin_move(name, groups, target, by="planner")
        if number is not None:
            self._numbers[change.change_id, move.number] = number
            return None
        allocator, each = self._side.allocator, self._binding.planned_blocks
        needed = len(groups) * allocator.blocks(name) * each
        return no_room(move, needed_blocks=needed, free_blocks=allocator.room(target) * each)

    def why_void(self, change: Change, move: Move) -> Failure | None:
        if self._side.allocator.is_under_way(self._numbers[change.change_id, move.number]):
            return None
        why = f"the copy of request {move.request} was given up"
        failed = failure_of(ErrorReason.ERROR_REASON_COPY_FAILED, why, device=move.target)
        return self.refusal_of(change, move) or failed

    def abort(self, change: Change, move: Move) -> None:
        self._side.abort(self._numbers.pop((change.change_id, move.number)))

    def commit(self, change: EngineChange, moves: Sequence[Move]) -> int:
        change.status.copied_bytes = self._bytes(moves)
        self._side.commit([self._numbers.pop((change.id, move.number)) for move in moves])
        return self._side.num_steps

    def is_ready(self, change: EngineChange) -> bool:
        is_under_way = self._side.allocator.is_under_way
        numbers = [self._numbers[change.id, move.number] for move in self._open.get(change.id, [])]
        return all(self._side.is_copied(number) or not is_under_way(number) for number in numbers)

    # --- Copies

    def plan(self, change: EngineChange, moves: Sequence[Move]) -> None:
        change.copy_bytes = self._bytes(self._open.get(change.id, []))

    def look(self, change: EngineChange, now_s: float) -> bool:
        moves = self._open.get(change.id)
        if moves is None:
            return True
        copied = [move for move in moves if self._side.is_copied(self._numbers[change.id, move.number])]
        change.status.copied_bytes = self._bytes(copied)
        change.copy_bytes = max(change.status.copied_bytes, self._bytes(moves))
        return len(copied) == len(moves)

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

    def _bytes(self, moves: Sequence[Move]) -> int:
        """Return the present KV bytes of moves."""
        allocator, shape = self._side.allocator, self._side.shape
        named = [(allocator.numbered(move.request), len(move.head_groups)) for move in moves]
        tokens = sum(allocator.state.context_tokens(name) * groups for name, groups in named if name is not None)
        return int(tokens * shape.heads.kv_bytes_per_token * shape.num_layers)


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

    # --- assignments

    def _take(self, assignment: Assignment, generation: int, held: _Taken | None, now_s: float) -> _Taken:
        other = next((name for name in self._held if name != assignment.replica), None)
        if other is not None:
            raise refusal(ErrorReason.ERROR_REASON_ENGINE_CANNOT, f"it runs {other} already, and no second replica")
        binding = bind(assignment, self._side)
        moves = PlannedMoves(self._side, binding)
        changes = self._changes(assignment, generation, held, moves, moves, binding.index)
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
        """Limit dispatch to the plan: its workers take as many blocks as it says, others none.

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

    # --- reports

    def report(self, now_s: float) -> WatchReportsResponse:
        devices: list[DeviceReport] = []
        for held in self._held.values():
            devices += device_reports(self._side, held.binding, held.assignment.primary_node.rpartition("/")[2])
        return WatchReportsResponse(
            engine_id=self.engine_id,
            newest_epoch=self.newest_epoch,
            replicas=[self._replica_report(name, held, now_s) for name, held in self._held.items()],
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
            traffic=Traffic(**requests.traffic.sketch(int(now_s)).packed()),
        )


def bind(assignment: Assignment, side: SchedulerSide) -> Binding:
    """Return an assignment's stage as the engine has it. Raises RefusedError: ENGINE_CANNOT, with all reasons."""
    numbers = {worker.name: number for number, worker in enumerate(side.settings.workers, 1)}
    reasons = list(_differences(assignment, side.shape, numbers))
    if reasons:
        raise refusal(ErrorReason.ERROR_REASON_ENGINE_CANNOT, "; ".join(reasons))
    (model,) = assignment.stages
    workers = {planned: numbers[name] for planned, name in _names_here(model).items()}
    return Binding(
        model=model,
        index={device.name: LOCAL if device.is_primary else workers[device.name] for device in model.devices},
        cards=side.shape.tensor_parallel,
        planned_blocks=side.shape.tensor_parallel * side.shape.heads.block_tokens // model.heads.block_tokens,
    )


def _names_here(model: StageModel) -> dict[str, str]:
    """Return the engine's name for each attention worker of a plan, by its name there: that of its first GPU."""
    workers = [device for device in model.devices if not device.is_primary]
    return {device.name: worker_name(device.gpus or [device.name], i) for i, device in enumerate(workers)}


def _differences(assignment: Assignment, shape: EngineShape, workers: Mapping[str, int]) -> Iterator[str]:
    role = assignment.shape.role
    if role not in (ReplicaRole.REPLICA_ROLE_UNSPECIFIED, ReplicaRole.REPLICA_ROLE_UNIFIED):
        said = ReplicaRole.Name(role).removeprefix("REPLICA_ROLE_").lower()
        yield f"the replica's role is {said}, this engine runs unified ones"
    elif len(assignment.stages) != 1:
        # Pipeline stages of vLLM share one block table, and therefore one head map.
        yield (
            f"the assignment has {len(assignment.stages)} stages with head maps of their own, those of vLLM share one: "
            "the plan must be one for the engine vllm-hetis"
        )
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
        unknown = [name for name in _names_here(model).values() if name not in workers]
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
