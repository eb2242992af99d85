"""The planner's side of one node's stream, as a state machine without I/O: messages in, messages and events out."""

from __future__ import annotations

import heapq
import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from hetis.planner.convert.names import duration, last_part
from hetis.planner.failures import Reason, ServiceError
from hetis.planner.fleet.agents.deltas import (
    MOST_GENERATION,
    DeltaAnswer,
    ReplicaSlot,
    WantedRemoval,
    protocol_violation,
)
from hetis.planner.fleet.agents.head_maps import HeadMapPieces, HeadMaps
from hetis.planner.fleet.agents.messages import (
    PROTOCOL_VERSION,
    check_device_reports,
    check_hello,
    check_inventory,
    check_replicas,
    drop_impossible,
    shorten_failures,
    stale_epoch,
)
from hetis.planner.fleet.settings import FleetCounters, FleetSettings
from hetis.v1 import agent_service_pb2, change_pb2, cluster_pb2, inventory_pb2, report_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class Reported:
    """A newer report arrived."""

    replicas: tuple[report_pb2.ReplicaReport, ...]  # reports of replicas on the node
    changed: tuple[str, ...]  # replicas of which anything but numbers changed


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadMapsRead:
    """The answer to a request for head maps."""

    request_id: str
    result: HeadMaps | ServiceError


# An inventory and the status of a change are events as they are; an answer to a delta is its `DeltaAnswer`. An error
# ends the stream after the events before it: the node has obeyed a newer planner, so this one no longer leads.
LinkEvent = Reported | inventory_pb2.NodeInventory | DeltaAnswer | change_pb2.ChangeStatus | HeadMapsRead | ServiceError


_log = logging.getLogger("hetis.planner.fleet")
_MOST_FOREIGN = 1000  # replicas of other nodes, or unknown ones, that are kept from a node's reports
_MOST_REMOVALS = 16  # removals in flight per node

Request = agent_service_pb2.ConnectNodeRequest
Response = agent_service_pb2.ConnectNodeResponse
Capability = agent_service_pb2.AgentCapability


def taken_over(message: str, node: str) -> ServiceError:
    return ServiceError(Reason.ERROR_REASON_NODE_TAKEN_OVER, message, metadata={"node": node})


def not_connected(node: str) -> ServiceError:
    message = f"node {node} is not connected"
    return ServiceError(Reason.ERROR_REASON_DEVICE_UNAVAILABLE, message, metadata={"device": node})


class NodeLink:
    """The state of one node and the messages due to it. It exists longer than the node's streams."""

    def __init__(
        self,
        node: str,
        *,
        epoch: int,
        settings: FleetSettings,
        counters: FleetCounters,
        most_held: Callable[[str], int | None],
        known: cluster_pb2.Node | None,
    ) -> None:
        """Start without a stream.

        Args:
            most_held: returns the highest generation of a replica that the node can hold; None if it is another node's.
            known: the stored node; None if it is not stored.
        """
        self.node = node  # `clusters/{cluster}/nodes/{node}`
        self.devices: tuple[report_pb2.DeviceReport, ...] = ()  # last report of each GPU of the node; empty: none yet
        # What the agent found on its node; None: unknown
        self.inventory = known.inventory if known is not None and known.HasField("inventory") else None
        self.agent_version = ""  # version of the last connected agent; empty: there was none
        self.engine_address = known.engine_address if known is not None else ""  # where it listens for peers, or empty
        self.capabilities: frozenset[Capability.ValueType] = frozenset()
        self._counters = counters
        self._most_held = most_held
        self._epoch = epoch
        self._settings = settings
        self.session = ""  # id of the current stream, the only one whose messages are accepted; empty: none
        self.boot_id = ""  # id of the last connected agent's run; empty: there was none
        self.slots: dict[str, ReplicaSlot] = {}  # by replica; modified through `slot` and `reported_slot`
        self._foreign: set[str] = set()  # replicas with a slot that are or were another node's
        self._active: set[str] = set()  # replicas for which there may be something to send now
        self._due: list[tuple[float, str]] = []  # heap of the times from which there may be something to send
        self._due_s: dict[str, float] = {}  # by replica; other entries of the heap are void
        self._removals: set[str] = set()  # replicas whose removal was sent but not answered
        self._put_off: dict[str, None] = {}  # replicas whose removal waits until others are answered
        self._outbox: list[Response] = []  # messages that concern no replica, which are sent first
        self._report_sequence = 0  # sequence of the last accepted report
        self._inventory_sequence = 0
        self._head_maps: dict[str, HeadMapPieces] = {}  # by request id
        self._has_dropped = False  # whether a report of this stream had values that cannot be

    # --- State

    @property
    def moves_heads(self) -> bool:
        """Whether the agent can move heads, or has not announced its capabilities yet."""
        return not self.boot_id or Capability.AGENT_CAPABILITY_MOVE in self.capabilities

    @property
    def has_more(self) -> bool:
        """Whether there are messages to send now or later."""
        return bool(self._active or self._outbox or self._due or self._put_off)

    @property
    def is_clearing(self) -> bool:
        """Whether the node holds a replica that it was ordered to remove."""
        return any(slot.held and isinstance(slot.wanted, WantedRemoval) for slot in self.slots.values())

    def slot(self, replica: str) -> ReplicaSlot:
        """Return the slot of a replica that is about to change, and mark it for `messages`."""
        self._active.add(replica)
        if replica not in self.slots:
            self.slots[replica] = ReplicaSlot(replica, lambda: self._bound(replica))
        return self.slots[replica]

    def reported_slot(self, replica: str) -> ReplicaSlot | None:
        """Return the slot of a replica that the node mentions, or None beyond the limit for other nodes' replicas."""
        if replica not in self.slots and self._most_held(replica) is None:
            if len(self._foreign) >= _MOST_FOREIGN:
                self._counters.replicas_ignored += 1
                return None
            self._foreign.add(replica)
        return self.slot(replica)

    def forget(self, replica: str) -> None:
        """Forget a replica that is gone from all nodes."""
        self.slots.pop(replica, None)
        self._due_s.pop(replica, None)
        self._put_off.pop(replica, None)
        for known in (self._active, self._foreign, self._removals):
            known.discard(replica)

    def _bound(self, replica: str) -> int:
        most = self._most_held(replica)
        return MOST_GENERATION if most is None else most

    # --- The stream

    def require_same_agent(self, boot_id: str, *, heard_s: float | None, now_s: float) -> None:
        """Raise NODE_IN_USE while another agent is connected: the node's credentials must not suffice to replace it.

        ``heard_s``: when the connected agent last sent a message; None: never.
        """
        is_gone = not self.session or heard_s is None or now_s - heard_s >= self._settings.suspect_s
        if not is_gone and boot_id != self.boot_id:
            self._counters.refusals += 1
            message = f"another agent is connected as node {last_part(self.node)}, and sent a message recently"
            raise ServiceError(Reason.ERROR_REASON_NODE_IN_USE, message, metadata={"node": self.node})

    def open(self, request: Request) -> None:
        """Open a stream with its first message; an earlier stream of the node is void from then on.

        Raises ServiceError as `check_hello` does; the earlier stream then continues.
        """
        hello = check_hello(request, epoch=self._epoch)
        self.session, self.boot_id = str(uuid.uuid4()), hello.boot_id
        self.agent_version, self.engine_address = hello.agent_version, hello.engine_address
        self.capabilities = frozenset(hello.capabilities).intersection(Capability.values())
        self._report_sequence = self._inventory_sequence = 0
        self._has_dropped = False
        self._head_maps.clear()
        self._removals.clear()
        self._put_off.clear()
        held = {one.replica: one for one in hello.replicas}
        for replica in [one for one in self.slots if one not in held and self._most_held(one) is None]:
            self.forget(replica)
        self._foreign = {one for one in self._foreign if self._most_held(one) is None}
        for replica in dict.fromkeys((*self.slots, *held)):
            one = held.get(replica, agent_service_pb2.HeldReplica())
            if (slot := self.reported_slot(replica)) is not None:
                slot.restart(one.generation, one.assignment_state)
        known = self.inventory is not None and self.inventory.digest == hello.inventory_digest
        welcome = agent_service_pb2.Welcome(
            protocol_version=PROTOCOL_VERSION,
            session_id=self.session,
            settings=self._settings.to_proto(),
            send_inventory=not known,
        )
        self._outbox = [Response(epoch=self._epoch, welcome=welcome)]

    def close(self, session: str) -> bool:
        """Close a stream; return False if it was void already."""
        if session != self.session:
            return False
        self.session, self._outbox = "", []
        self._head_maps.clear()
        return True

    def receive(self, request: Request, *, now_s: float) -> list[LinkEvent]:
        """Handle a message of the stream.

        Raises PROTOCOL_VIOLATION, STALE_EPOCH or INVALID_FIELD if the stream must end.
        """
        if request.WhichOneof("message") == "hello":
            raise protocol_violation("a hello was received in the middle of a stream")
        if request.epoch > self._epoch:
            raise stale_epoch("follows", request.epoch, self._epoch)
        if request.epoch < self._epoch:
            return []  # sent on an earlier stream: all messages of this one have the epoch of its Welcome
        said = [*request.report.replicas, request.nack, request.change_status]
        check_replicas([*said, request.ack])
        shorten_failures(said)
        match request.WhichOneof("message"):
            case "report":
                return self._take_report(request.sequence, request.report)
            case "inventory":
                return self._take_inventory(request.sequence, request.inventory)
            case "ack":
                return self._take_ack(request.ack)
            case "nack":
                return self._take_nack(request.nack, now_s)
            case "change_status":
                self._learn_generation(request.change_status)
                return [request.change_status]
            case "head_map":
                return self._take_piece(request.head_map)
            case _:  # a heartbeat, or a kind of message that only newer agents send
                return []

    def messages(self, now_s: float) -> list[Response]:
        """Return the messages to send now; each is returned only once."""
        if not self.session:
            return []
        found, self._outbox = self._outbox, []
        self._wake(now_s)
        # A slot without a delta in flight has nothing to send until it is changed, except for delayed retries.
        active, self._active = self._active, set()
        for replica in sorted(active):
            slot = self.slots[replica]
            if self._must_wait(slot):
                self._put_off[replica] = None
                continue
            delta = slot.next_delta(now_s, answer_s=self._settings.answer_s)
            if delta is not None:
                found.append(Response(epoch=self._epoch, delta=delta))
                if delta.HasField("removal"):
                    self._removals.add(replica)
            self._note_due(replica, slot)
        return found

    def _wake(self, now_s: float) -> None:
        while self._due and self._due[0][0] <= now_s:
            due_s, replica = heapq.heappop(self._due)
            if self._due_s.get(replica) == due_s:
                del self._due_s[replica]
                self._active.add(replica)
        for replica in list(self._put_off)[: max(_MOST_REMOVALS - len(self._removals), 0)]:
            del self._put_off[replica]
            self._active.add(replica)

    def _must_wait(self, slot: ReplicaSlot) -> bool:
        if slot.in_flight or slot.num_directives or not isinstance(slot.wanted, WantedRemoval) or not slot.held:
            return False
        return len(self._removals) >= _MOST_REMOVALS

    def _note_due(self, replica: str, slot: ReplicaSlot) -> None:
        due_s = slot.due_s(self._settings.answer_s)
        if due_s is None:
            self._due_s.pop(replica, None)
        elif self._due_s.get(replica) != due_s:
            self._due_s[replica] = due_s
            heapq.heappush(self._due, (due_s, replica))

    def request_head_maps(self, replica: str) -> str:
        """Add a request for head maps to the next `messages`; return the id of the request.

        Raises DEVICE_UNAVAILABLE or ENGINE_CANNOT.
        """
        node = last_part(self.node)
        if not self.session:
            raise not_connected(node)
        if Capability.AGENT_CAPABILITY_HEAD_MAP not in self.capabilities:
            raise ServiceError(
                Reason.ERROR_REASON_ENGINE_CANNOT, f"the agent of node {node} cannot report the head map"
            )
        request_id = str(uuid.uuid4())
        self._head_maps[request_id] = HeadMapPieces(replica, most_bytes=self._settings.piece_bytes)
        request = agent_service_pb2.StateRequest(request_id=request_id, head_map_of=replica)
        self._outbox.append(Response(epoch=self._epoch, state_request=request))
        return request_id

    def drop_head_maps(self, request_id: str) -> None:
        """Drop a request for head maps for which the caller no longer waits."""
        self._head_maps.pop(request_id, None)

    def say_goodbye(self, reason: str) -> None:
        goodbye = agent_service_pb2.Goodbye(reason=reason, reconnect_within=duration(self._settings.reconnect_s))
        self._outbox.append(Response(epoch=self._epoch, goodbye=goodbye))

    # --- Messages from the agent

    def _take_report(self, sequence: int, report: agent_service_pb2.NodeReport) -> list[LinkEvent]:
        if sequence <= self._report_sequence:
            return []
        check_device_reports(report.devices)
        self._report_sequence = sequence
        if dropped := drop_impossible(report):
            self._counters.values_dropped.update(dropped)
            if not self._has_dropped:
                self._has_dropped = True
                extra = {"node": self.node, "fields": ", ".join(sorted({*dropped}))}
                _log.warning("an agent reports values that cannot be, which are taken as not known", extra=extra)
        self.devices = tuple(report.devices)
        changed, taken = [], []
        for one in report.replicas:
            slot = self.slots.get(one.replica) or self.reported_slot(one.replica)
            if slot is None:
                continue
            if self._most_held(one.replica) is None:  # to be removed: its numbers would only fill memory
                one = report_pb2.ReplicaReport(
                    replica=one.replica, assignment_state=one.assignment_state, generation=one.generation
                )
            if slot.learn(one):
                self._active.add(one.replica)
                changed.append(one.replica)
            if slot.is_believed:
                taken.append(one)
        return [Reported(replicas=tuple(taken), changed=tuple(changed))]

    def _take_inventory(self, sequence: int, inventory: inventory_pb2.NodeInventory) -> list[LinkEvent]:
        if sequence <= self._inventory_sequence:
            return []
        check_inventory(inventory)
        self._inventory_sequence = sequence
        if self.inventory == inventory:
            return []
        self.inventory = inventory
        return [inventory]

    def _take_ack(self, ack: agent_service_pb2.DeltaAck) -> list[LinkEvent]:
        if ack.replica not in self.slots:
            return []
        answer = self.slot(ack.replica).acknowledge(ack)
        self._note_answered(ack.replica)
        return [] if answer is None else [answer]

    def _take_nack(self, nack: agent_service_pb2.DeltaNack, now_s: float) -> list[LinkEvent]:
        if nack.replica not in self.slots:
            return []
        answer = self.slot(nack.replica).refuse(nack, now_s=now_s, retry_s=self._settings.retry_s)
        self._note_answered(nack.replica)
        if answer is None:
            return []
        if nack.failure.reason != Reason.ERROR_REASON_STALE_EPOCH:
            return [answer]
        newest = nack.failure.metadata.get("newest_epoch", "")
        return [answer, stale_epoch("has followed", int(newest) if newest.isdecimal() else 0, self._epoch)]

    def _note_answered(self, replica: str) -> None:
        if not self.slots[replica].in_flight:
            self._removals.discard(replica)

    def _learn_generation(self, status: change_pb2.ChangeStatus) -> None:
        slot = self.slots.get(status.replica)
        if slot is not None and slot.held:
            slot.hold(max(slot.held, status.generation))

    def _take_piece(self, piece: agent_service_pb2.HeadMapPiece) -> list[LinkEvent]:
        pieces = self._head_maps.get(piece.request_id)
        if pieces is None:
            return []
        result: HeadMaps | ServiceError | None
        try:
            result = pieces.add(piece)
        except ServiceError as error:
            result = error
        if result is None:
            return []
        del self._head_maps[piece.request_id]
        return [HeadMapsRead(request_id=piece.request_id, result=result)]
