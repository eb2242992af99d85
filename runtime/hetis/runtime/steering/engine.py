"""A real engine that an agent steers: one replica, whose primary is here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from hetis.runtime.engine.engine import Engine
from hetis.runtime.engine.heads import StageHeads
from hetis.runtime.executor.changes import EngineChanges
from hetis.runtime.executor.engine import SteeredEngine, TakenReplica
from hetis.runtime.executor.refusals import failure_of, refusal
from hetis.runtime.moving.hauler import Hauler
from hetis.runtime.steering.binding import StageBinding, bind
from hetis.runtime.steering.moves import HauledMoves
from hetis.runtime.steering.reports import device_reports, head_map, stage_load
from hetis.solver.dispatch.problem import Stage as StageCosts
from hetis.solver.dispatch.snapshot import DeviceStatus as OwnStatus
from hetis.v1.change_pb2 import ChangePhase
from hetis.v1.executor_service_pb2 import (
    ReadHeadMapsResponse,
    ReserveMovesRequest,
    ReserveMovesResponse,
    WatchReportsResponse,
)
from hetis.v1.failure_pb2 import ErrorReason
from hetis.v1.replica_pb2 import Assignment, AssignmentGoal
from hetis.v1.report_pb2 import AssignmentState, DeviceStatus, ReplicaReport

PERMISSIONS = ("none", "preparing", "ready", "permitted")
NOT_YET = "the planner has not put the replica in force yet"
DRAINING = "the planner takes the replica out of service"
TAKEN_AWAY = "the planner has taken the replica away"


@dataclass(slots=True)
class ServedCounts:
    """What the front knows of requests and the engine does not; means are of the last ones, 0: of none."""

    num_finished: int = 0
    ttft_s: float = 0.0
    tpot_s: float = 0.0


@dataclass(slots=True, kw_only=True)
class Front:
    """The front as the steered engine uses it.

    Attributes:
        counts: see there.
        close: takes no new requests, and says so to clients; empty: takes them again.
        end_all: ends whatever is open.
    """

    counts: ServedCounts = field(default_factory=ServedCounts)
    close: Callable[[str], None] = lambda why: None
    end_all: Callable[[], None] = lambda: None


@dataclass(slots=True)
class _Taken(TakenReplica):
    """The replica that is run; ``moves``: its head maps'."""

    bindings: tuple[StageBinding, ...]
    moves: HauledMoves


class RealEngine(SteeredEngine[_Taken]):
    """The engine under the contract. All methods are called by the engine's thread, between two steps.

    Args:
        hauler: of the engine that is steered.
        takes_moves: False: it moves heads as it likes, or not at all, and refuses the planner's changes.
        observed: what attention was measured to cost on a stage's devices. None: nothing was measured.
        clock: seconds, never going back.
        engine_id: of this run; None: a new UUID.
    """

    def __init__(
        self,
        hauler: Hauler,
        *,
        clock: Callable[[], float],
        takes_moves: bool = True,
        observed: Callable[[StageHeads], StageCosts | None] = lambda part: None,
        engine_id: str | None = None,
    ) -> None:
        super().__init__(engine_id)
        self.engine: Engine = hauler.engine
        self.front = Front()
        self.takes_moves = takes_moves
        self._hauler, self._observed = hauler, observed
        self.engine.between_steps.append(lambda: self.step(clock()))

    # --- assignments

    def _take(self, assignment: Assignment, generation: int, held: _Taken | None, now_s: float) -> _Taken:
        other = next((name for name in self._held if name != assignment.replica), None)
        if other is not None:
            raise refusal(ErrorReason.ERROR_REASON_ENGINE_CANNOT, f"it runs {other} already, and no second replica")
        bindings = bind(assignment, self.engine)
        moves = HauledMoves(self._hauler, bindings)
        changes = EngineChanges(
            assignment.replica,
            generation=generation,
            authority=moves,
            copies=moves,
            devices=frozenset(name for binding in bindings for name in binding.index),
        )
        if held is not None:  # requests go on, and how changes ended stays known
            held.changes.end_all(failure_of(ErrorReason.ERROR_REASON_CHANGE_CANCELLED, "a new assignment came"))
            changes.known.update(held.changes.known)
        taken = _Taken(assignment, changes, bindings, moves)
        self._follow(taken)
        return taken

    def _remove(self, held: _Taken) -> None:
        held.changes.end_all(failure_of(ErrorReason.ERROR_REASON_CHANGE_CANCELLED, "the replica was removed"))
        self._given_up.known.update(held.changes.known)
        for part in self.engine.stages:
            for device, known in enumerate(part.placement.state.devices):
                if known.status is OwnStatus.DRAINING:
                    part.placement.restore(device)
        self.front.close(TAKEN_AWAY)
        self.front.end_all()

    def _state(self, held: _Taken, now_s: float) -> AssignmentState.ValueType:
        match held.assignment.goal:
            case AssignmentGoal.ASSIGNMENT_GOAL_SERVE:
                return AssignmentState.ASSIGNMENT_STATE_SERVING
            case AssignmentGoal.ASSIGNMENT_GOAL_DRAIN:
                if self.engine.has_work:
                    return AssignmentState.ASSIGNMENT_STATE_DRAINING
                return AssignmentState.ASSIGNMENT_STATE_STOPPED
        return AssignmentState.ASSIGNMENT_STATE_LOADED

    # --- moves

    def reserve_moves(self, request: ReserveMovesRequest, now_s: float) -> ReserveMovesResponse:
        if not self.takes_moves:
            self._fence(request.epoch)
            raise refusal(
                ErrorReason.ERROR_REASON_ENGINE_CANNOT, "this engine was started to move heads without the planner"
            )
        return super().reserve_moves(request, now_s)

    # --- time

    def step(self, now_s: float) -> None:
        for held in self._held.values():
            self._follow_conditions(held)
            held.changes.advance(now_s)
            held.changes.flip_due(now_s)
        self._given_up.advance(now_s)

    # --- telling

    def report(self, now_s: float) -> WatchReportsResponse:
        reports, devices = [], []
        for name, held in self._held.items():
            reports.append(self._replica_report(name, held, now_s))
            for binding in held.bindings:
                devices += device_reports(binding, node_id(held.assignment))
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
        maps = [head_map(self.engine, binding, held.moves.in_flight(binding)) for binding in held.bindings]
        return ReadHeadMapsResponse(generation=held.changes.generation, step=self.engine.num_steps, head_maps=maps)

    @property
    def permission(self) -> str:
        """How far the planner's change is: ``none`` is under way, ``preparing``, ``ready`` or ``permitted``."""
        changes = [change for held in self._held.values() for change in held.changes.known.values() if change.is_open]
        if not changes:
            return "none"
        if changes[0].flip_by_s is not None:
            return "permitted"
        return "ready" if changes[0].phase == ChangePhase.CHANGE_PHASE_READY else "preparing"

    # --- inside

    def _replica_report(self, name: str, held: _Taken, now_s: float) -> ReplicaReport:
        engine, counts = self.engine, self.front.counts
        waiting, is_full = len(engine.waiting), len(engine.running) >= engine.options.most_running
        return ReplicaReport(
            replica=name,
            assignment_state=self._state(held, now_s),
            generation=held.changes.generation,
            is_primary=True,
            num_running=len(engine.running),
            num_waiting=waiting,
            num_waiting_for_kv=0 if is_full else waiting,
            num_preempted=engine.num_preempted,
            num_steps=engine.num_steps,
            num_finished=counts.num_finished,
            stages=[stage_load(engine, binding, self._observed(binding.part)) for binding in held.bindings],
            ttft_s=counts.ttft_s,
            tpot_s=counts.tpot_s,
        )

    def _follow(self, taken: _Taken) -> None:
        """The goal and the conditions of an assignment that has just come."""
        goal = taken.assignment.goal
        why = {AssignmentGoal.ASSIGNMENT_GOAL_SERVE: "", AssignmentGoal.ASSIGNMENT_GOAL_DRAIN: DRAINING}
        self.front.close(why.get(goal, NOT_YET))
        self._follow_conditions(taken)

    def _follow_conditions(self, taken: _Taken) -> None:
        """Devices that are not to be relied on take no heads. What the planner lost works while we reach it."""
        said = {condition.device for condition in taken.assignment.conditions if condition.status != _OK}
        for binding in taken.bindings:
            placement = binding.part.placement
            for planned in binding.model.devices:
                is_wanted = said.isdisjoint([planned.name, *planned.gpus])
                for device in placement.group.devices(binding.index[planned.name]):
                    status = placement.state.devices[device].status
                    if status is OwnStatus.OK and not is_wanted:
                        for move in [move for move in placement.moves if move.target == device]:
                            self.engine.abort_move(move)
                        placement.state.drain_device(device)
                    elif status is OwnStatus.DRAINING and is_wanted:
                        placement.restore(device)


_OK = DeviceStatus.DEVICE_STATUS_OK


def node_id(assignment: Assignment) -> str:
    """The node that this engine is on: that of the primary."""
    return assignment.primary_node.rpartition("/")[2]
