"""The agent's side of the protocol without sockets, files or clocks: events in, actions out.

Every method that returns actions returns them in the order in which they must be carried out. An acknowledgement
follows the action that puts what it acknowledges on disk. Times are seconds of one monotonic clock.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from hetis.runtime.agent.outbox import Action, EngineResponse, Outbox
from hetis.runtime.agent.replica import CALL_S, ReplicaAgent
from hetis.runtime.agent.replica_state import NODE_PART, DamagedStateError, Fence, ReplicaState, epoch_from_bytes
from hetis.runtime.agent.reporting import NodeReporter, with_kv
from hetis.runtime.moves.engine import pieces_of
from hetis.runtime.moves.refusals import failure_of, stale_epoch
from hetis.v1.agent_service_pb2 import (
    AgentCapability,
    ConnectNodeRequest,
    ConnectNodeResponse,
    Delta,
    DeltaNack,
    HeadMapPiece,
    HeldReplica,
    Hello,
    NodeReport,
    StateRequest,
)
from hetis.v1.executor_service_pb2 import CopyMovesResponse, ReadHeadMapsRequest, WatchReportsResponse
from hetis.v1.failure_pb2 import ErrorReason, Failure
from hetis.v1.inventory_pb2 import NodeInventory
from hetis.v1.report_pb2 import AssignmentState, DeviceReport, ReplicaReport

PROTOCOL_VERSION = 1
MOST_REMOVED = 256  # number of removed replicas whose generation is remembered
MOST_ENGINE_ID = 64  # length limit in characters, from the contract


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentIdentity:
    """Properties that stay the same for one run of an agent."""

    node: str  # ``clusters/{cluster}/nodes/{node}``
    agent_version: str
    boot_id: str  # UUID of this run
    capabilities: frozenset[AgentCapability.ValueType] = frozenset()  # what the agent can do for its engine
    engine_address: str = ""  # where the engine listens for other engines. Empty: nowhere.
    clock: str = ""  # identifies the origin of the monotonic clock; changes with a reboot


class AgentCore:
    """The protocol of one node's agent. ``saved``: parts of the state as last persisted, by name. A damaged part starts
    empty and is listed in `damaged`. ``seed``: source of the heartbeat jitter.
    """

    def __init__(
        self, identity: AgentIdentity, saved: Mapping[str, bytes], inventory: NodeInventory, *, seed: random.Random
    ) -> None:
        self.identity = identity
        self.inventory = inventory
        self.damaged: dict[str, str] = {}
        self._outbox = Outbox()
        self._reporter = NodeReporter(seed)
        self._devices: list[DeviceReport] = [DeviceReport(index=device.index) for device in inventory.devices]
        self._engine: WatchReportsResponse | None = None
        self._engine_is_lost = False  # no report has come for so long that the last one no longer holds
        self._restart_is_unreported = False  # the restart of the engine has not been reported yet
        self._is_welcome = False
        # Request id and replica by number of the call, of the current stream
        self._map_requests: dict[int, tuple[str, str]] = {}
        held = self._read(saved)
        self._fence = Fence(self._newest_epoch(saved, held), self._outbox)
        self._replicas = {entry.replica: self._replica_agent(entry) for entry in held}

    # --- the stream

    def hello(self) -> ConnectNodeRequest:
        """Return the first message of a new stream. Everything that belonged to an earlier stream is forgotten."""
        self._is_welcome = False
        self._map_requests.clear()
        hello = Hello(
            node=self.identity.node,
            protocol_version=PROTOCOL_VERSION,
            min_protocol_version=PROTOCOL_VERSION,
            agent_version=self.identity.agent_version,
            boot_id=self.identity.boot_id,
            inventory_digest=self.inventory.digest,
            newest_epoch=self._fence.newest,
            replicas=[
                HeldReplica(
                    replica=replica.held.replica,
                    generation=replica.held.held_generation,
                    epoch=replica.held.epoch,
                    assignment_state=self._report_of(replica).assignment_state,
                )
                for replica in self._replicas.values()
                if replica.held.assignment is not None
            ],
            changes=[status for replica in self._replicas.values() for status in replica.statuses()],
            capabilities=sorted(self.identity.capabilities),
            engine_address=self.identity.engine_address,
        )
        return self._outbox.open_stream(ConnectNodeRequest(hello=hello))

    def handle(self, message: ConnectNodeResponse, now_s: float) -> list[Action]:
        """Handle a message from the planner."""
        kind = message.WhichOneof("message")
        if self._fence.is_stale(message.epoch):
            self._refuse_stale(message)
            return self._outbox.take()
        if (kind == "welcome") == self._is_welcome:
            what = "a second Welcome" if self._is_welcome else f"{kind} before the Welcome"
            self._outbox.end_stream(failure_of(ErrorReason.ERROR_REASON_PROTOCOL_VIOLATION, f"the planner sent {what}"))
            return self._outbox.take()
        self._fence.raise_to(message.epoch)
        match kind:
            case "welcome":
                self._welcome(message, now_s)
            case "settings":
                self._reporter.change_settings(message.settings, now_s)
            case "delta":
                self._delta(message.delta, epoch=message.epoch, now_s=now_s)
            case "state_request":
                self._state_request(message.state_request, now_s)
            case "goodbye":
                self._outbox.end_stream(None, within_s=message.goodbye.reconnect_within.ToNanoseconds() / 1e9)
        self._report(now_s)
        return self._outbox.take()

    def stream_ended(self) -> None:
        """Record that the stream ended: messages are dropped until the next Welcome. Nothing else changes."""
        self._is_welcome = False
        self._outbox.stream_ended()

    # --- the engine and the devices

    def on_engine_report(self, report: WatchReportsResponse, now_s: float) -> list[Action]:
        """Handle a report of the engine about itself."""
        restarted = self._engine is not None and self._engine.engine_id != report.engine_id
        first = self._engine is None
        self._engine, self._engine_is_lost = report, False
        if report.newest_epoch > self._fence.newest:
            self._overtaken(report.newest_epoch)
        if restarted:
            self._restart_is_unreported = True
            for replica in self._replicas.values():
                replica.engine_restarted(now_s)
        for status in report.changes:
            if not status.replica:
                continue  # the change was aborted before the engine received it
            if status.replica not in self._replicas:
                self._replicas[status.replica] = self._replica_agent(ReplicaState(replica=status.replica))
            self._replicas[status.replica].take_status(status, now_s)
        for replica in self._replicas.values() if first or restarted else ():
            replica.advance(now_s)
        self._report(now_s, is_requested=restarted)
        return self._outbox.take()

    def on_engine_lost(self, now_s: float) -> list[Action]:
        """Handle an engine that cannot be reached: a replica that it served has failed until it reports again."""
        if not self._engine_is_lost:
            self._engine_is_lost = True
            self._report(now_s)
        return self._outbox.take()

    def on_devices(self, devices: Sequence[DeviceReport], now_s: float) -> list[Action]:
        """Handle new samples of the node's devices."""
        self._devices = list(devices)
        self._report(now_s)
        return self._outbox.take()

    def on_inventory(self, inventory: NodeInventory, now_s: float) -> list[Action]:
        """Handle the node's inventory; only a changed one is sent."""
        if inventory.digest != self.inventory.digest:
            self.inventory = inventory
            self._outbox.send(ConnectNodeRequest(inventory=inventory))
            self._report(now_s)
        return self._outbox.take()

    def progressed(self, number: int, response: CopyMovesResponse, now_s: float) -> list[Action]:
        """Handle the progress of a CopyMoves call."""
        for replica in self._waiting_for(number):
            replica.progressed(response, now_s)
        return self._outbox.take()

    def answered(self, number: int, answer: EngineResponse | Failure, now_s: float) -> list[Action]:
        """Handle the end of a call to the engine. The answer is a Failure if the call was refused or unanswered."""
        if number in self._map_requests:
            self._send_head_maps(*self._map_requests.pop(number), answer)
            return self._outbox.take()
        for replica in self._waiting_for(number):
            if isinstance(answer, Failure) and answer.reason == ErrorReason.ERROR_REASON_STALE_EPOCH:
                newest = answer.metadata.get("newest_epoch", "")
                if newest.isdigit() and int(newest) > self._fence.newest:
                    self._overtaken(int(newest))
                    if replica.is_applying():
                        replica.forget_assignment()
            replica.answered(answer, now_s)
        self._report(now_s)
        return self._outbox.take()

    # --- time

    def tick(self, now_s: float) -> list[Action]:
        """Do everything that is due by now."""
        for replica in self._replicas.values():
            replica.tick(now_s)
        self._forget_removed()
        self._report(now_s)
        return self._outbox.take()

    def next_s(self) -> float:
        """Return when `tick` is due if nothing else happens, or infinity if never."""
        times = [replica.next_s() for replica in self._replicas.values()]
        if self._is_welcome:
            times.append(self._reporter.next_s())
        return min(times, default=float("inf"))

    @property
    def newest_epoch(self) -> int:
        return self._fence.newest

    @property
    def is_connected(self) -> bool:
        """Return whether a planner's Welcome has arrived on the open stream."""
        return self._is_welcome

    def devices(self) -> list[DeviceReport]:
        """Return the node's devices as last sampled, with the KV figures from the engine."""
        return with_kv(self._devices, self._engine.devices if self._engine and not self._engine_is_lost else ())

    def held(self) -> list[ReplicaState]:
        """Return the state held for each replica, for metrics and tests."""
        return [replica.held for replica in self._replicas.values()]

    def _waiting_for(self, number: int) -> list[ReplicaAgent]:
        """Return the replica that waits for the answer to a call, or nothing if none does any more."""
        return [replica for replica in self._replicas.values() if replica.waits_for(number)]

    def _read(self, saved: Mapping[str, bytes]) -> list[ReplicaState]:
        held = []
        for name, body in saved.items():
            if name == NODE_PART:
                continue
            try:
                entry = ReplicaState.from_bytes(body, clock=self.identity.clock)
                if entry.replica != name:
                    raise DamagedStateError(f"it is of {entry.replica}")
                held.append(entry)
            except DamagedStateError as error:
                self.damaged[name] = str(error)
        return held

    def _newest_epoch(self, saved: Mapping[str, bytes], held: Sequence[ReplicaState]) -> int:
        """Return the newest epoch among the saved one, unless damaged, and those of all assignments and changes."""
        epochs = [entry.epoch for entry in held] + [c.epoch for entry in held for c in entry.changes.values()]
        if NODE_PART in saved:
            try:
                epochs.append(epoch_from_bytes(saved[NODE_PART]))
            except DamagedStateError as error:
                self.damaged[NODE_PART] = str(error)
        return max(epochs, default=0)

    def _replica_agent(self, held: ReplicaState) -> ReplicaAgent:
        can = self.identity.capabilities
        if AgentCapability.AGENT_CAPABILITY_ASSIGN not in can:
            held = replace(held, assignment_state=AssignmentState.ASSIGNMENT_STATE_UNMANAGED)
        return ReplicaAgent(held, capabilities=can, clock=self.identity.clock, fence=self._fence, outbox=self._outbox)

    def _refuse_stale(self, message: ConnectNodeResponse) -> None:
        failure = stale_epoch(message.epoch, self._fence.newest)
        if message.HasField("delta"):
            nonce, name = message.delta.nonce, message.delta.replica
            generation = self._replicas[name].held.held_generation if name in self._replicas else 0
            nack = DeltaNack(nonce=nonce, replica=name, generation=generation, failure=failure)
            self._outbox.send(ConnectNodeRequest(nack=nack))
        self._outbox.end_stream(failure)
        self._is_welcome = False

    def _overtaken(self, newest: int) -> None:
        """End the stream: the engine has obeyed a newer planner, so the connected one is outdated."""
        old = self._fence.newest
        self._fence.raise_to(newest)
        if self._is_welcome:
            self._outbox.end_stream(stale_epoch(old, newest))
            self._is_welcome = False

    def _welcome(self, message: ConnectNodeResponse, now_s: float) -> None:
        chosen = message.welcome.protocol_version
        if chosen != PROTOCOL_VERSION:
            why = f"the planner chose protocol version {chosen}, this agent supports {PROTOCOL_VERSION}"
            versions = {"protocol_version": chosen, "min_version": PROTOCOL_VERSION, "max_version": PROTOCOL_VERSION}
            self._outbox.end_stream(failure_of(ErrorReason.ERROR_REASON_PROTOCOL_VERSION, why, **versions))
            return
        self._is_welcome = True
        self._outbox.welcome(message.epoch)
        self._reporter.begin(message.welcome.settings, now_s)
        if message.welcome.send_inventory:
            self._outbox.send(ConnectNodeRequest(inventory=self.inventory))
        for replica in self._replicas.values():
            replica.report_unresolved()

    def _delta(self, delta: Delta, *, epoch: int, now_s: float) -> None:
        replica = self._replicas.get(delta.replica) or self._replica_agent(ReplicaState(replica=delta.replica))
        replica.handle(delta, epoch=epoch, now_s=now_s)
        if delta.replica and (replica.held.generation or replica.held.changes):  # otherwise the delta was refused
            self._replicas[delta.replica] = replica

    def _state_request(self, request: StateRequest, now_s: float) -> None:
        match request.WhichOneof("subject"):
            case "inventory":
                self._outbox.send(ConnectNodeRequest(inventory=self.inventory))
            case "report":
                self._report(now_s, is_requested=True)
            case "head_map_of":
                self._request_head_maps(request.request_id, request.head_map_of)

    def _request_head_maps(self, request_id: str, name: str) -> None:
        """Request the head maps of a replica from the engine, or report to the planner why that is impossible."""
        replica = self._replicas.get(name)
        if replica is None or replica.held.assignment is None:
            why = failure_of(ErrorReason.ERROR_REASON_NOT_FOUND, f"{name} is not held here", name=name)
        elif AgentCapability.AGENT_CAPABILITY_HEAD_MAP not in self.identity.capabilities:
            why = failure_of(
                ErrorReason.ERROR_REASON_ENGINE_CANNOT, "the engine of this node does not provide a head map"
            )
        else:
            number = self._outbox.call(ReadHeadMapsRequest(replica=name), timeout_s=CALL_S)
            self._map_requests[number] = request_id, name
            return
        self._send_head_maps(request_id, name, why)

    def _send_head_maps(self, request_id: str, replica: str, answer: EngineResponse | Failure) -> None:
        """Forward head maps in pieces, or the reason why there are none."""
        if not isinstance(answer, list) or not answer:
            silent = failure_of(ErrorReason.ERROR_REASON_INTERNAL, "the engine answered without a head map")
            failure = answer if isinstance(answer, Failure) else silent
            piece = HeadMapPiece(request_id=request_id, replica=replica, is_last=True, failure=failure)
            self._outbox.send(ConnectNodeRequest(head_map=piece))
            return
        pieces = list(pieces_of(head_map for response in answer for head_map in response.head_maps))
        for index, head_maps in enumerate(pieces):
            piece = HeadMapPiece(
                request_id=request_id,
                replica=replica,
                generation=answer[0].generation,
                step=answer[0].step,
                index=index,
                is_last=index == len(pieces) - 1,
                head_maps=head_maps,
            )
            self._outbox.send(ConnectNodeRequest(head_map=piece))

    def _report(self, now_s: float, *, is_requested: bool = False) -> None:
        """Send the report on all devices and replicas held here, if it is due."""
        if not self._is_welcome:
            return
        held = [self._report_of(replica) for replica in self._replicas.values() if replica.held.assignment is not None]
        for report in held:
            # An engine that the agent has started has an identity of its own in every run.
            report.engine_id = (report.engine_id or (self._engine.engine_id if self._engine else ""))[:MOST_ENGINE_ID]
        message = self._reporter.due(
            NodeReport(devices=self.devices(), replicas=held), now_s, is_requested=is_requested
        )
        if message is not None:
            self._outbox.send(message)
            self._restart_is_unreported &= not message.HasField("report")

    def _report_of(self, replica: ReplicaAgent) -> ReplicaReport:
        """Return the engine's report on a replica. Right after a restart it is loading, as its KV is gone."""
        if self._restart_is_unreported:
            return replica.report_anew()
        said = self._engine.replicas if self._engine else ()
        found = replica.report(next((report for report in said if report.replica == replica.held.replica), None))
        return replica.report_lost(found.assignment_state) if self._engine_is_lost else found

    def _forget_removed(self) -> None:
        removed = [name for name, replica in self._replicas.items() if replica.is_over]
        for name in removed[: max(len(removed) - MOST_REMOVED, 0)]:
            del self._replicas[name]
            self._outbox.persist(name, None)
