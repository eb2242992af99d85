"""Messages and a driver for tests of the agent: a disk that is a dict, an engine whose answers the test chooses."""

from __future__ import annotations

import random
import uuid
from collections.abc import Sequence

from google.protobuf.duration_pb2 import Duration

from hetis.runtime.agent.core import AgentCore, AgentIdentity
from hetis.runtime.agent.outbox import (
    Action,
    Cancel,
    EndStream,
    EngineCall,
    EngineRequest,
    EngineResponse,
    Persist,
    Send,
)
from hetis.v1.agent_service_pb2 import (
    AbortChange,
    AgentCapability,
    AssignmentRemoval,
    ChangeResolved,
    CommitChange,
    ConnectNodeRequest,
    ConnectNodeResponse,
    Delta,
    PrepareChange,
    Settings,
    Welcome,
)
from hetis.v1.change_pb2 import Change, ChangeOutcome, ChangePart, ChangePhase
from hetis.v1.executor_service_pb2 import (
    ApplyAssignmentResponse,
    CopyMovesResponse,
    ReserveMovesResponse,
    WatchReportsResponse,
)
from hetis.v1.failure_pb2 import ErrorReason, Failure
from hetis.v1.head_map_pb2 import Move, MoveReason
from hetis.v1.inventory_pb2 import GpuDevice, NodeInventory
from hetis.v1.replica_pb2 import (
    Assignment,
    AssignmentGoal,
    AttentionWorkerPool,
    EnginePeer,
    ReplicaPlan,
    StagePlan,
)
from hetis.v1.report_pb2 import AssignmentState, DeviceReport, ReplicaReport
from hetis.v1.stage_pb2 import AttentionPiece, HeadShape, StageDevice, StageModel

REPLICA = "clusters/c/replicas/r"
NODE = "clusters/c/nodes/"
STEERED = frozenset(
    {
        AgentCapability.AGENT_CAPABILITY_ASSIGN,
        AgentCapability.AGENT_CAPABILITY_MOVE,
        AgentCapability.AGENT_CAPABILITY_HEAD_MAP,
    }
)
AUTHORITY, SOURCE, TARGET = (
    ChangePart.CHANGE_PART_AUTHORITY,
    ChangePart.CHANGE_PART_SOURCE,
    ChangePart.CHANGE_PART_TARGET,
)
FLIPPED, ABORTED = ChangeOutcome.CHANGE_OUTCOME_FLIPPED, ChangeOutcome.CHANGE_OUTCOME_ABORTED
SERVE, LOAD = AssignmentGoal.ASSIGNMENT_GOAL_SERVE, AssignmentGoal.ASSIGNMENT_GOAL_LOAD


def duration(seconds: float) -> Duration:
    found = Duration()
    found.FromNanoseconds(int(seconds * 1e9))
    return found


def settings(**changes: object) -> Settings:
    usual = {
        "heartbeat_interval": duration(5),
        "lease": duration(15),
        "kv_change_ratio": 0.02,
        "kv_thresholds": [0.9],
        "min_report_interval": duration(1),
    }
    return Settings(**{**usual, **changes})  # type: ignore[arg-type]


def welcome(epoch: int = 1, **changes: object) -> ConnectNodeResponse:
    said = Welcome(protocol_version=1, session_id="s", settings=settings(**changes))
    return ConnectNodeResponse(epoch=epoch, welcome=said)


def stage_model(
    workers: Sequence[str] = ("w/0", "x/0"), *, blocks: int = 400, tp: int = 1, groups: int = 8
) -> StageModel:
    piece = AttentionPiece(head_s=1e-7, kv_byte_s=1e-12, call_s=1e-6)
    primary = StageDevice(
        name="p/0", gpus=[f"p/{i}" for i in range(tp)], is_primary=True, pieces=[piece], total_blocks=blocks
    )
    others = [
        StageDevice(
            name=name,
            gpus=[name],
            pieces=[piece],
            transfer_s=1e-6,
            link_byte_s=1e-10,
            total_blocks=blocks,
            high_water=0.9,
        )
        for name in workers
    ]
    heads = HeadShape(
        head_groups=groups, queries_per_group=4, kv_bytes_per_token=512, exchange_bytes_per_head=512, block_tokens=16
    )
    return StageModel(stage=0, copy=0, num_layers=4, heads=heads, devices=[primary, *others])


def assignment(
    node: str = "p",
    *,
    model: StageModel | None = None,
    goal: AssignmentGoal.ValueType = SERVE,
    peers: Sequence[EnginePeer] = (),
    workers: Sequence[str] = ("w/0", "x/0"),
) -> Assignment:
    """The assignment of a replica with its primary on p and attention workers, as node ``node`` gets it."""
    model = model or stage_model(workers)
    gpus = [gpu for device in model.devices for gpu in device.gpus]
    tp = len(model.devices[0].gpus)
    return Assignment(
        replica=REPLICA,
        plan="plans/one",
        goal=goal,
        shape=ReplicaPlan(
            rate_rps=10,
            tpot_s=0.02,
            stages=[StagePlan(tp=tp, copies=1, num_layers=4, devices=gpus[:tp])],
            attention_workers=[AttentionWorkerPool(devices=gpus[tp:])],
        ),
        primary_node="p",
        devices=[gpu for gpu in gpus if gpu.startswith(f"{node}/")],
        stages=[model] if node == "p" else [],
        peers=peers,
    )


def change(base: int = 1, *, change_id: str = "", timeout_s: float = 10.0, moves: Sequence[Move] = ()) -> Change:
    usual = Move(
        number=0,
        request="r1",
        head_groups=[0],
        source="p/0",
        target="w/0",
        kv_bytes=1e6,
        reason=MoveReason.MOVE_REASON_BALANCE,
    )
    return Change(
        change_id=change_id or str(uuid.uuid4()),
        replica=REPLICA,
        base_generation=base,
        generation=base + 1,
        moves=moves or [usual],
        prepare_timeout=duration(timeout_s),
    )


class Planner:
    """Builds the deltas of a planner of one epoch."""

    def __init__(self, epoch: int = 1) -> None:
        self.epoch = epoch

    def delta(self, *, base: int = 0, generation: int, nonce: str = "", **what: object) -> ConnectNodeResponse:
        delta = Delta(
            nonce=nonce or str(uuid.uuid4()),
            replica=REPLICA,
            base_generation=base,
            generation=generation,
            **what,  # type: ignore[arg-type]
        )
        return ConnectNodeResponse(epoch=self.epoch, delta=delta)

    def assign(self, what: Assignment | None = None, generation: int = 1, **more: object) -> ConnectNodeResponse:
        return self.delta(generation=generation, assignment=what or assignment(), **more)  # type: ignore[arg-type]

    def remove(self, generation: int) -> ConnectNodeResponse:
        return self.delta(generation=generation, removal=AssignmentRemoval(reason="test"))

    def prepare(self, what: Change, *parts: ChangePart.ValueType, base: int | None = None) -> ConnectNodeResponse:
        prepare = PrepareChange(change=what, parts=parts or (AUTHORITY, SOURCE))
        base = what.base_generation if base is None else base
        return self.delta(base=base, generation=max(what.generation, base + 1), prepare=prepare)

    def commit(self, what: Change) -> ConnectNodeResponse:
        return self.delta(
            base=what.base_generation, generation=what.generation, commit=CommitChange(change_id=what.change_id)
        )

    def abort(self, what: Change) -> ConnectNodeResponse:
        abort = AbortChange(
            change_id=what.change_id,
            failure=Failure(reason=ErrorReason.ERROR_REASON_CHANGE_CANCELLED, message="called off"),
        )
        return self.delta(base=what.base_generation, generation=what.generation, abort=abort)

    def resolved(self, what: Change, outcome: ChangeOutcome.ValueType) -> ConnectNodeResponse:
        resolved = ChangeResolved(change_id=what.change_id, outcome=outcome)
        return self.delta(base=what.base_generation, generation=what.generation, resolved=resolved)


class Bench:
    """An `AgentCore` on a bench: keeps its disk, the messages that it sent and its pending calls."""

    def __init__(
        self,
        *,
        node: str = "p",
        capabilities: frozenset[AgentCapability.ValueType] = STEERED,
        disk: dict[str, bytes] | None = None,
        clock: str = "boot-1",
        num_devices: int = 1,
    ) -> None:
        self.node = node
        self.disk = {} if disk is None else disk
        self.now_s = 100.0
        self.sent: list[ConnectNodeRequest] = []
        self.calls: dict[int, EngineRequest] = {}
        self.ended: list[EndStream] = []
        self.log: list[Action] = []
        self._clock = clock
        self._capabilities = capabilities
        self._num_devices = num_devices
        self.boot()

    def boot(self) -> None:
        """Start a new process: only the disk is kept."""
        identity = AgentIdentity(
            node=NODE + self.node,
            agent_version="0",
            boot_id=str(uuid.uuid4()),
            capabilities=self._capabilities,
            clock=self._clock,
        )
        devices = [GpuDevice(index=i) for i in range(self._num_devices)]
        self.core = AgentCore(
            identity, dict(self.disk), NodeInventory(devices=devices, digest="sha256:0"), seed=random.Random(0)
        )
        self.calls.clear()

    def connect(self, epoch: int = 1, **changes: object) -> ConnectNodeRequest:
        """Open a stream and return its Hello."""
        hello = self.core.hello()
        self.hear(welcome(epoch, **changes))
        return hello

    def hear(self, message: ConnectNodeResponse) -> list[ConnectNodeRequest]:
        """Return the agent's answer to a message."""
        return self.do(self.core.handle(message, self.now_s))

    def tick(self, seconds: float = 0.0) -> list[ConnectNodeRequest]:
        self.now_s += seconds
        return self.do(self.core.tick(self.now_s))

    def answer(self, answer: EngineResponse | Failure, of: type | None = None) -> list[ConnectNodeRequest]:
        """Answer the oldest pending call (of a type), and return the messages that follow."""
        number = next(n for n, request in self.calls.items() if of is None or isinstance(request, of))
        del self.calls[number]
        return self.do(self.core.answered(number, answer, self.now_s))

    def call(self) -> EngineRequest:
        """Return the only pending call."""
        (request,) = self.calls.values()
        return request

    def do(self, actions: list[Action]) -> list[ConnectNodeRequest]:
        said = []
        for action in actions:
            self.log.append(action)
            match action:
                case Persist():
                    if action.body is None:
                        self.disk.pop(action.part, None)
                    else:
                        self.disk[action.part] = action.body
                case Send():
                    said.append(action.message)
                case EngineCall():
                    self.calls[action.number] = action.request
                case Cancel():
                    self.calls.pop(action.number, None)
                case EndStream():
                    self.ended.append(action)
        self.sent += said
        return said


PLANNER = Planner()
LOADED = ApplyAssignmentResponse(state=AssignmentState.ASSIGNMENT_STATE_LOADED)


def nack_reason(messages: list[ConnectNodeRequest]) -> str:
    (nack,) = [message.nack for message in messages if message.HasField("nack")]
    return ErrorReason.Name(nack.failure.reason).removeprefix("ERROR_REASON_")


def acks(messages: list[ConnectNodeRequest]) -> list[int]:
    return [message.ack.generation for message in messages if message.HasField("ack")]


def phases(messages: list[ConnectNodeRequest]) -> list[str]:
    statuses = [message.change_status for message in messages if message.HasField("change_status")]
    return [ChangePhase.Name(status.phase).removeprefix("CHANGE_PHASE_") for status in statuses]


def failure(name: str, **metadata: str) -> Failure:
    return Failure(reason=ErrorReason.Value(f"ERROR_REASON_{name}"), message=name, metadata=metadata)


def prepared(bench: Bench, *parts: int, timeout_s: float = 10.0) -> object:
    """A change that is READY."""
    what = change(timeout_s=timeout_s)
    bench.hear(PLANNER.prepare(what, *(parts or (AUTHORITY, SOURCE))))  # type: ignore[arg-type]
    bench.answer(ReserveMovesResponse())
    if set(parts or (AUTHORITY, SOURCE)) != {AUTHORITY}:
        bench.answer(CopyMovesResponse(copied_bytes=5, total_bytes=5))
    return what


def kv(used: int) -> WatchReportsResponse:
    replica = ReplicaReport(replica=REPLICA, assignment_state=AssignmentState.ASSIGNMENT_STATE_SERVING, num_steps=used)
    device = DeviceReport(index=0, total_blocks=1000, used_blocks=used)
    return WatchReportsResponse(engine_id="e", replicas=[replica], devices=[device])


def reports(messages: list[ConnectNodeRequest]) -> list[int]:
    return [message.report.devices[0].used_blocks for message in messages if message.HasField("report")]
