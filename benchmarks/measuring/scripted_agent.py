"""Node agents that cost next to nothing: they speak the protocol and obey at once, in memory.

A stream that ends is opened again, as by the real agent, because the planner ends every connection after half an hour.
Nothing is stored, copied or decoded. A primary has a head map of invented requests, which it updates on the planner's
command to flip a change.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
import uuid
from collections.abc import Callable
from typing import Any

import grpc

from examples.simulated_engine.stage import SimulatedRequest, SolverAdmission, StageRun
from hetis.v1 import agent_service_pb2 as pb
from hetis.v1 import change_pb2, inventory_pb2, replica_pb2, report_pb2
from hetis.v1.agent_service_pb2_grpc import AgentServiceStub

CHANNEL_OPTIONS = (  # as in hetis-agent; a separate pool gives every agent its own connection
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.use_local_subchannel_pool", 1),
)
REQUESTS, CONTEXT_TOKENS = 24, 1400  # running on a primary, where they fit and trigger nothing
VARIETY = 64  # number of different reports before they repeat
LEAST_PAUSE_S, MOST_PAUSE_S = 0.1, 1.0  # pause between two streams, as at the first attempt of the real agent
LONGEST_PAUSE_S = 4.0  # those of agents that fail for long; the real one's double to more
WELCOME_S = 30.0

Phase = change_pb2.ChangePhase
State = report_pb2.AssignmentState
_REACHED = {
    replica_pb2.ASSIGNMENT_GOAL_LOAD: State.ASSIGNMENT_STATE_LOADED,
    replica_pb2.ASSIGNMENT_GOAL_SERVE: State.ASSIGNMENT_STATE_SERVING,
    replica_pb2.ASSIGNMENT_GOAL_DRAIN: State.ASSIGNMENT_STATE_DRAINING,
}
# A stream ends with an error status, a cancellation, a write or read after its end, or no Welcome.
STREAM_ENDED = (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError, ConnectionError, TimeoutError)
_ALL = (pb.AGENT_CAPABILITY_ASSIGN, pb.AGENT_CAPABILITY_MOVE, pb.AGENT_CAPABILITY_HEAD_MAP)
_admission = SolverAdmission()
_balanced: dict[tuple[int, ...], list[list[int]]] = {}


class ScriptedAgent:
    """The agent of one node, on a connection of its own.

    Attributes:
        node: id of the node.
        stage: head map of the first stage copy on a primary's node; None on other nodes and before the assignment.
        heard: called with every message of the planner before it is answered.
        sent_s: when something was last sent, by the monotonic clock.
        num_sent: number of reports sent.
        num_finished: number of requests of `stage` that have ended so far.
        num_reconnects: number of streams after the first that the planner has welcomed.
    """

    def __init__(self, cluster: str, node: str, *, num_gpus: int) -> None:
        self.cluster, self.node = cluster, node
        self.stage: StageRun | None = None
        self.heard: Callable[[pb.ConnectNodeResponse], None] | None = None
        self.sent_s, self.num_sent, self.num_finished, self.num_reconnects = 0.0, 0, 0, 0
        self.heartbeat_s = 5.0
        self._num_gpus = num_gpus
        self._capabilities = _ALL
        self._held: dict[str, tuple[int, replica_pb2.Assignment]] = {}
        self._changes: dict[str, tuple[change_pb2.Change, Phase.ValueType]] = {}
        self._boot_id = str(uuid.uuid4())
        self._epoch = self._sequence = 0
        self._numbers = itertools.cycle(range(VARIETY))
        self._report = pb.NodeReport()
        self._writing = asyncio.Lock()
        self._channel: grpc.aio.Channel | None = None
        self._call: Any = None
        self._reading: asyncio.Task[None] | None = None

    # --- the stream

    async def connect(self, address: str, *, token: str = "") -> None:
        """Send a hello and return at the planner's welcome; after that the agent stays connected by itself.

        Args:
            address: of a planner, or of several, separated by commas, which are tried in turn as one leads.
            token: a bearer token, if the planner requires one.
        """
        self._addresses = itertools.cycle(address.split(","))
        self._credentials = [("authorization", f"Bearer {token}")] if token else None
        for is_last in [False] * address.count(",") + [True]:
            try:
                await self._open()
                break
            except STREAM_ENDED:
                if is_last:
                    raise
        self._reading = asyncio.create_task(self._stay_connected(), name=f"agent of {self.node}")

    async def close(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
        if self._channel is not None:
            await self._channel.close()

    @property
    def is_connected(self) -> bool:
        return self._call is not None

    async def _open(self) -> None:
        """Open a stream to the next planner and wait for its Welcome; nothing else may write to it before that."""
        if self._channel is not None:
            await self._channel.close()
        self._channel = grpc.aio.insecure_channel(next(self._addresses), options=CHANNEL_OPTIONS)
        call: Any = AgentServiceStub(self._channel).ConnectNode(metadata=self._credentials)
        async with asyncio.timeout(WELCOME_S):
            await call.write(self._hello())
            welcome = await call.read()
        if welcome is grpc.aio.EOF:
            raise ConnectionError(f"no Welcome for {self.node}")
        self._epoch, self._sequence = welcome.epoch, 1
        interval = welcome.welcome.settings.heartbeat_interval
        self.heartbeat_s = interval.seconds + interval.nanos / 1e9
        self._call = call
        if welcome.welcome.send_inventory:
            await self._write(pb.ConnectNodeRequest(inventory=self._inventory()))
        for change, phase in list(self._changes.values()):
            await self._write(pb.ConnectNodeRequest(change_status=self._status(change, phase)))

    async def _stay_connected(self) -> None:
        """Read messages; after a stream ends, say hello again as often as needed, with doubling pauses."""
        most_s = MOST_PAUSE_S
        while True:
            try:
                if self._call is None:
                    await self._open()
                    self.num_reconnects += 1
                most_s = MOST_PAUSE_S
                await self._read()
            except STREAM_ENDED:
                pass
            self._call = None
            await asyncio.sleep(random.uniform(LEAST_PAUSE_S, most_s))
            most_s = min(2 * most_s, LONGEST_PAUSE_S)

    def _hello(self) -> pb.ConnectNodeRequest:
        hello = pb.Hello(
            node=f"{self.cluster}/nodes/{self.node}",
            protocol_version=1,
            min_protocol_version=1,
            agent_version="0.0",
            boot_id=self._boot_id,
            inventory_digest=self._inventory().digest,
            capabilities=self._capabilities,
            newest_epoch=self._epoch,
            replicas=[
                pb.HeldReplica(
                    replica=name, generation=generation, epoch=self._epoch, assignment_state=_REACHED[assignment.goal]
                )
                for name, (generation, assignment) in self._held.items()
            ],
            changes=[self._status(change, phase) for change, phase in self._changes.values()],
        )
        return pb.ConnectNodeRequest(sequence=1, hello=hello)

    def next_heartbeat_s(self) -> float:
        """Return the latest time of the next message, with 10% jitter."""
        return self.sent_s + self.heartbeat_s * random.uniform(0.9, 1.1)

    async def heartbeat(self) -> None:
        await self._write(pb.ConnectNodeRequest(heartbeat=pb.Heartbeat()))

    async def report(self) -> None:
        """Report the present state of the node and its replicas, different every time."""
        number = next(self._numbers)
        for device in self._report.devices:
            device.used_blocks = 50_000 + 10 * number
            device.temperature_c = 40.0 + number
        for replica in self._report.replicas:
            replica.num_steps += 1
            replica.tpot_s = 0.05 + 1e-4 * number
        if await self._write(pb.ConnectNodeRequest(report=self._report)):
            self.num_sent += 1

    async def report_stage(self) -> None:
        """Report a change of `stage`."""
        self._write_report()
        await self.report()

    async def _write(self, message: pb.ConnectNodeRequest) -> bool:
        """Write a message and return whether the stream took it.

        What an ended stream does not take is sent after the next Welcome.
        """
        async with self._writing:
            call = self._call
            if call is None:
                return False
            self._sequence += 1
            message.sequence, message.epoch = self._sequence, self._epoch
            self.sent_s = time.monotonic()
            try:
                await call.write(message)
            except STREAM_ENDED:
                return False  # the reader notices it, too, and reconnects
            return True

    async def _read(self) -> None:
        call = self._call
        while (message := await call.read()) is not grpc.aio.EOF:
            if self.heard is not None:
                self.heard(message)
            for answer in self._answers(message):
                await self._write(answer)

    # --- answers

    def _answers(self, message: pb.ConnectNodeResponse) -> list[pb.ConnectNodeRequest]:
        match message.WhichOneof("message"):
            case "delta":
                return self._obey(message.delta)
            case "state_request":
                return [self._tell(message.state_request)]
            case _:
                return []

    def _tell(self, request: pb.StateRequest) -> pb.ConnectNodeRequest:
        if request.WhichOneof("subject") == "inventory":
            return pb.ConnectNodeRequest(inventory=self._inventory())
        if request.WhichOneof("subject") == "report":
            return pb.ConnectNodeRequest(report=self._report)
        generation, _ = self._held[request.head_map_of]
        piece = pb.HeadMapPiece(
            request_id=request.request_id,
            replica=request.head_map_of,
            generation=generation,
            is_last=True,
            head_maps=[] if self.stage is None else [self.stage.head_map()],
        )
        return pb.ConnectNodeRequest(head_map=piece)

    def _obey(self, delta: pb.Delta) -> list[pb.ConnectNodeRequest]:
        statuses, reports = list[change_pb2.ChangeStatus](), False  # reports: whether more than numbers changed
        match delta.WhichOneof("change"):
            case "assignment":
                self._held[delta.replica] = (delta.generation, delta.assignment)
                self._take_stage(delta.assignment)
                reports = True
            case "removal":
                self._held.pop(delta.replica, None)
                reports = True
            case "prepare":
                change = delta.prepare.change
                self._changes[change.change_id] = (change, Phase.CHANGE_PHASE_READY)
                statuses = [self._status(change, Phase.CHANGE_PHASE_READY)]
            case "commit":
                change, phase = self._changes[delta.commit.change_id]
                if phase != Phase.CHANGE_PHASE_FLIPPED:  # otherwise the commit is repeated after a reconnect
                    self._flip(change)
                self._changes[change.change_id] = (change, Phase.CHANGE_PHASE_FLIPPED)
                statuses, reports = [self._status(change, Phase.CHANGE_PHASE_FLIPPED)], True
            case "abort":
                if (aborted := self._changes.pop(delta.abort.change_id, None)) is not None:
                    statuses = [self._status(aborted[0], Phase.CHANGE_PHASE_ABORTED)]
            case "resolved":
                resolved = self._changes.pop(delta.resolved.change_id, None)
                if resolved is not None and delta.resolved.outcome == change_pb2.CHANGE_OUTCOME_FLIPPED:
                    self._reach(resolved[0])
                    statuses = [self._status(resolved[0], Phase.CHANGE_PHASE_RELEASED)]
        generation, _ = self._held.get(delta.replica, (0, None))
        ack = pb.DeltaAck(nonce=delta.nonce, replica=delta.replica, generation=generation)
        answers = [pb.ConnectNodeRequest(ack=ack)]
        answers += [pb.ConnectNodeRequest(change_status=status) for status in statuses]
        if reports:
            self._write_report()
            answers.append(pb.ConnectNodeRequest(report=self._report))
        return answers

    def _status(self, change: change_pb2.Change, phase: Phase.ValueType) -> change_pb2.ChangeStatus:
        generation, _ = self._held.get(change.replica, (0, None))
        return change_pb2.ChangeStatus(
            change_id=change.change_id, replica=change.replica, phase=phase, generation=generation
        )

    def _flip(self, change: change_pb2.Change) -> None:
        assert self.stage is not None, f"{self.node} was permitted to flip and is no primary"
        for move in change.moves:
            owners = self.stage.owners.get(move.request)
            if owners is not None:
                for group in move.head_groups:
                    owners[group] = self.stage.index[move.target]
        self._reach(change)

    def _reach(self, change: change_pb2.Change) -> None:
        generation, assignment = self._held[change.replica]
        self._held[change.replica] = (max(generation, change.generation), assignment)
        self._write_report()

    # --- reports

    def _take_stage(self, assignment: replica_pb2.Assignment) -> None:
        """Put balanced requests on the first stage copy at the first assignment, so that nothing triggers."""
        if assignment.stages and self.stage is None:
            self.stage = StageRun(assignment.stages[0])
            for number, owners in enumerate(balanced_owners(self.stage)):
                self.stage.admit(request_of(number), list(owners))

    def _write_report(self) -> None:
        """Rebuild the report; `report` fills in what changes every time."""
        self._report = pb.NodeReport(
            devices=[
                report_pb2.DeviceReport(
                    index=index,
                    total_blocks=100_000,
                    used_blocks=50_000,
                    evictable_blocks=1000,
                    memory_used_bytes=70 * 2**30,
                    busy_ratio=0.9,
                    clock_hz=1.7e9,
                    temperature_c=60.0,
                    power_w=500.0,
                )
                for index in range(self._num_gpus)
            ]
        )
        for name, (generation, assignment) in self._held.items():
            is_primary = assignment.primary_node == self.node
            report = self._report.replicas.add(
                replica=name,
                assignment_state=_REACHED[assignment.goal],
                generation=generation,
                is_primary=is_primary,
            )
            if is_primary and self.stage is not None:
                report.num_running, report.num_finished = len(self.stage.requests), self.num_finished
                report.stages.append(self.stage.load())

    def _inventory(self) -> inventory_pb2.NodeInventory:
        is_primary = self._num_gpus > 1
        name, gib = ("H100-SXM-80GB", 80) if is_primary else ("P100-PCIe-12GB", 12)
        return inventory_pb2.NodeInventory(
            devices=[
                inventory_pb2.GpuDevice(index=index, gpu_type=name, memory_bytes=gib * 2**30)
                for index in range(self._num_gpus)
            ],
            host_name=self.node,
            source=inventory_pb2.DEVICE_SOURCE_SIMULATED,
            digest=f"sha256:{self.node}",
        )


def request_of(number: int, prefix: str = "r") -> SimulatedRequest:
    return SimulatedRequest(id=f"{prefix}{number}", context_tokens=CONTEXT_TOKENS, remaining_tokens=1000, arrived_s=0.0)


def balanced_owners(stage: StageRun) -> list[list[int]]:
    """Return the owners of `REQUESTS` requests as the dispatcher places them one by one, cached per stage shape."""
    key = tuple(device.total_blocks for device in stage.model.devices)
    if key not in _balanced:
        trial = StageRun(stage.model)
        for number in range(REQUESTS):
            request = request_of(number)
            owners = _admission.owners(trial, request)
            if owners is None:
                break
            trial.admit(request, owners)
        _balanced[key] = list(trial.owners.values())
    return _balanced[key]
