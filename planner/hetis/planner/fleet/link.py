"""The planner's side of one node's stream, as a state machine without I/O: messages in, messages and events out."""

from __future__ import annotations

import heapq
import uuid
from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message

from hetis.formats.cluster import MAX_GPUS_PER_NODE
from hetis.planner.convert.names import duration
from hetis.planner.failures import Reason, ServiceError, invalid_field
from hetis.planner.fleet.deltas import MOST_GENERATION, DeltaAnswer, ReplicaSlot, WantedRemoval, protocol_violation
from hetis.planner.fleet.settings import FleetCounters, FleetSettings
from hetis.v1 import agent_service_pb2, change_pb2, cluster_pb2, failure_pb2, head_map_pb2, inventory_pb2, report_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadMaps:
    """The owners of all head groups of a replica: one map per copy of each stage."""

    replica: str
    generation: int  # generation of the replica's state at its authority
    step: int  # decode step at which all maps were read
    maps: tuple[head_map_pb2.HeadMap, ...]


class HeadMapPieces:
    """The pieces received so far for one request, which may arrive in any order and repeatedly."""

    def __init__(self, replica: str, *, most_bytes: int) -> None:
        self._replica = replica
        self._most_bytes = most_bytes
        self._num_bytes = 0
        self._pieces: dict[int, agent_service_pb2.HeadMapPiece] = {}
        self._last: int | None = None  # index of the last piece; None if it has not arrived

    def add(self, piece: agent_service_pb2.HeadMapPiece) -> HeadMaps | None:
        """Add a piece; return the maps once all pieces have arrived, else None.

        Raises ServiceError if the agent has no map, or its pieces are inconsistent.
        """
        if piece.HasField("failure"):
            raise _failed(piece.failure)
        if piece.replica != self._replica:
            raise self._nonsense(f"piece {piece.index} belongs to {piece.replica}")
        if piece.index in self._pieces:
            return None
        self._num_bytes += piece.ByteSize()
        if self._num_bytes > self._most_bytes:
            message = f"the head maps of {self._replica} are larger than {self._most_bytes} bytes"
            raise ServiceError(Reason.ERROR_REASON_MESSAGE_TOO_LARGE, message, metadata={"max_bytes": self._most_bytes})
        self._pieces[piece.index] = piece
        if piece.is_last:
            self._last = piece.index
        if self._last is None or len(self._pieces) <= self._last:
            return None
        return self._joined()

    def _joined(self) -> HeadMaps:
        pieces = [piece for _, piece in sorted(self._pieces.items())]
        first = pieces[0]
        maps: dict[tuple[int, int], head_map_pb2.HeadMap] = {}
        for piece in pieces:
            if (piece.generation, piece.step) != (first.generation, first.step):
                raise self._nonsense(f"pieces belong to steps {first.step} and {piece.step}")
            for one in piece.head_maps:
                known = maps.get((one.stage, one.copy))
                if known is None:
                    maps[one.stage, one.copy] = one
                    continue
                if list(known.devices) != list(one.devices):
                    raise self._nonsense(f"stage {one.stage}, copy {one.copy} has two different lists of devices")
                known.requests.extend(one.requests)
        return HeadMaps(replica=self._replica, generation=first.generation, step=first.step, maps=tuple(maps.values()))

    def _nonsense(self, what: str) -> ServiceError:
        return ServiceError(Reason.ERROR_REASON_INTERNAL, f"the head maps of {self._replica} are inconsistent: {what}")


def _failed(failure: failure_pb2.Failure) -> ServiceError:
    """Return the agent's failure as an error; reasons that only newer versions know become ENGINE_CANNOT."""
    if failure.reason in Reason.values() and failure.reason:
        return ServiceError(failure.reason, failure.message, metadata=failure.metadata)
    message = f"the agent cannot report the head maps, for reason {failure.reason}: {failure.message}"
    return ServiceError(Reason.ERROR_REASON_ENGINE_CANNOT, message)


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


PROTOCOL_VERSION = 1
_MOST_FOREIGN = 1000  # replicas of other nodes, or unknown ones, that are kept from a node's reports
_MOST_REMOVALS = 16  # removals in flight per node

MOST_CHARACTERS = 255  # limit on any text that is kept: names, versions, digests
MOST_BYTES = 128 * 2**10  # limit on an inventory, and on the reports of all devices: enough for the largest node

Request = agent_service_pb2.ConnectNodeRequest
Response = agent_service_pb2.ConnectNodeResponse
Capability = agent_service_pb2.AgentCapability


def check_hello(request: Request, *, epoch: int) -> agent_service_pb2.Hello:
    """Return the Hello in a stream's first message.

    Raises PROTOCOL_VIOLATION, PROTOCOL_VERSION, STALE_EPOCH or INVALID_FIELD.
    """
    if request.WhichOneof("message") != "hello":
        kind = request.WhichOneof("message") or "none"
        raise protocol_violation(f"the first message of a stream must be a hello, this is {kind}")
    hello = request.hello
    if not hello.min_protocol_version <= PROTOCOL_VERSION <= hello.protocol_version:
        raise ServiceError(
            Reason.ERROR_REASON_PROTOCOL_VERSION,
            f"this planner supports protocol version {PROTOCOL_VERSION}, the agent {hello.min_protocol_version} to"
            f" {hello.protocol_version}",
            metadata={
                "protocol_version": hello.protocol_version,
                "min_version": PROTOCOL_VERSION,
                "max_version": PROTOCOL_VERSION,
            },
        )
    newest = max((hello.newest_epoch, *(held.epoch for held in hello.replicas)))
    if newest > epoch:
        raise _stale("has followed", newest, epoch)
    _check_replicas([*hello.replicas, *hello.changes])
    for field in ("agent_version", "boot_id", "inventory_digest"):
        if not getattr(hello, field):
            raise invalid_field(f"hello.{field}", "is required")
    _check_texts(hello, "hello")
    return hello


def _stale(obeys: str, newest: int, epoch: int) -> ServiceError:
    message = f"the agent {obeys} epoch {newest}, but this planner's epoch is {epoch}"
    return ServiceError(Reason.ERROR_REASON_STALE_EPOCH, message, metadata={"epoch": epoch, "newest_epoch": newest})


def _check_replicas(said: Iterable[Any]) -> None:
    """Check the names and generations in an agent's list of replicas or changes. Raises PROTOCOL_VIOLATION.

    The names become parameters of queries, and PostgreSQL has no texts with NUL.
    """
    for one in said:
        if one.generation > MOST_GENERATION:
            raise protocol_violation(f"a generation is above {MOST_GENERATION}, the maximum")
        for name in (one.replica, getattr(one, "change_id", "")):
            if len(name) > MOST_CHARACTERS:
                message = f"the name of a replica or change has more than {MOST_CHARACTERS} characters, the maximum"
                raise protocol_violation(message)
            if not name.isprintable():
                raise protocol_violation(f"the name of a replica or change is {name[:80]!r}, must be printable")


def _check_inventory(inventory: inventory_pb2.NodeInventory) -> None:
    """Check the sizes of an inventory, which stays in memory and in the store. Raises INVALID_FIELD."""
    _check_number(inventory.devices, "inventory.devices")
    _check_texts(inventory, "inventory")
    for position, device in enumerate(inventory.devices):
        field = f"inventory.devices[{position}]"
        _check_number(device.linked_devices, f"{field}.linked_devices")
        _check_texts(device, field)
    _check_bytes(inventory.ByteSize(), "inventory")  # it may have fields that only newer versions know


def _check_device_reports(devices: Sequence[report_pb2.DeviceReport]) -> None:
    """Check the sizes of the reports of a node's devices, which stay in memory. Raises INVALID_FIELD."""
    _check_number(devices, "report.devices")
    _check_bytes(sum(device.ByteSize() for device in devices), "report.devices")


def _check_texts(message: Message, field: str) -> None:
    for part, value in message.ListFields():
        if isinstance(value, str) and len(value) > MOST_CHARACTERS:
            raise invalid_field(
                f"{field}.{part.name}", f"has {len(value)} characters, at most {MOST_CHARACTERS} are allowed"
            )


def _check_number(entries: Sized, field: str) -> None:
    if len(entries) > MAX_GPUS_PER_NODE:
        raise invalid_field(field, f"has {len(entries)} entries, at most {MAX_GPUS_PER_NODE} are allowed")


def _check_bytes(num_bytes: int, field: str) -> None:
    if num_bytes > MOST_BYTES:
        raise invalid_field(field, f"has {num_bytes} bytes, at most {MOST_BYTES} are allowed")


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
        self.slots: dict[str, ReplicaSlot] = {}  # by replica; modified through `slot` and `heard_slot`
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

    def heard_slot(self, replica: str) -> ReplicaSlot | None:
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

    def open(self, request: Request) -> None:
        """Open a stream with its first message; an earlier stream of the node is void from then on.

        Raises ServiceError as `check_hello` does; the earlier stream then continues.
        """
        hello = check_hello(request, epoch=self._epoch)
        self.session, self.boot_id = str(uuid.uuid4()), hello.boot_id
        self.agent_version, self.engine_address = hello.agent_version, hello.engine_address
        self.capabilities = frozenset(hello.capabilities).intersection(Capability.values())
        self._report_sequence = self._inventory_sequence = 0
        self._head_maps.clear()
        self._removals.clear()
        self._put_off.clear()
        held = {one.replica: one for one in hello.replicas}
        for replica in [one for one in self.slots if one not in held and self._most_held(one) is None]:
            self.forget(replica)
        self._foreign = {one for one in self._foreign if self._most_held(one) is None}
        for replica in dict.fromkeys((*self.slots, *held)):
            one = held.get(replica, agent_service_pb2.HeldReplica())
            if (slot := self.heard_slot(replica)) is not None:
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
            raise _stale("follows", request.epoch, self._epoch)
        if request.epoch < self._epoch:
            return []  # sent on an earlier stream: all messages of this one have the epoch of its Welcome
        _check_replicas([*request.report.replicas, request.ack, request.nack, request.change_status])
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

    def ask_head_maps(self, replica: str) -> str:
        """Add a request for head maps to the next `messages`; return the id of the request."""
        request_id = str(uuid.uuid4())
        self._head_maps[request_id] = HeadMapPieces(replica, most_bytes=self._settings.piece_bytes)
        asked = agent_service_pb2.StateRequest(request_id=request_id, head_map_of=replica)
        self._outbox.append(Response(epoch=self._epoch, state_request=asked))
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
        _check_device_reports(report.devices)
        self._report_sequence = sequence
        self.devices = tuple(report.devices)
        changed, taken = [], []
        for one in report.replicas:
            slot = self.slots.get(one.replica) or self.heard_slot(one.replica)
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
        _check_inventory(inventory)
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
        return [answer, _stale("has followed", int(newest) if newest.isdecimal() else 0, self._epoch)]

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
