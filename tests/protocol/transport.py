"""The network between agents and planner, in memory: every message of every stream passes through one object.

The agent's end is a gRPC call as used by `hetis.runtime.agent.stream.PlannerStream`, the planner's end is what the
servicer passes to `LiveFleet.connect`. Between them messages are bytes, and have a `Fate`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import grpc
from grpc_status import rpc_status

from hetis.commands.endpoints import Endpoint, LeaderSearch
from hetis.planner import callers
from hetis.planner.failures import ServiceError
from hetis.planner.fleet.fleet import LiveFleet
from hetis.planner.service import statuses
from hetis.v1.agent_service_pb2 import ConnectNodeRequest, ConnectNodeResponse

LATENCY_S = 0.002
NOTICE_S = 25.0  # time until the end that did not break a stream notices, by keepalive
Message = ConnectNodeRequest | ConnectNodeResponse


class Way(Enum):
    UP = "up"  # towards the planner
    DOWN = "down"


class Fate(Enum):
    """The fate of a message."""

    PASS = "pass"
    DROP = "drop"
    DUPLICATE = "duplicate"
    DELAY = "delay"  # later messages overtake it
    CUT_BEFORE = "cut before"  # the stream breaks before the message arrives
    CUT_AFTER = "cut after"  # the message arrives, then the stream breaks
    HOLD = "hold"  # until a test delivers it


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A message as the network saw it.

    Attributes:
        number: number over all messages, from 0.
        kind: the field that is set, with that of its delta.
    """

    number: int
    node: str
    way: Way
    kind: str

    def __str__(self) -> str:
        return f"#{self.number} {self.way.value} {self.node} {self.kind}"


@dataclass(frozen=True, slots=True)
class _End:
    """The planner's end of a stream; None means OK. ``is_broken`` means that neither side ended it."""

    error: ServiceError | None
    is_broken: bool = False


class _HalfClose:
    """The end of the agent's messages."""


@dataclass(slots=True)
class Item:
    """An item in transit."""

    seen: Seen
    content: bytes | _End | _HalfClose


@dataclass(slots=True)
class Network:
    """All links.

    Attributes:
        fate: decides the fate of each message.
        delay_s: transit time of a delayed message.
        log: all messages that were sent.
        wires: the stream that is open at each node's agent.
        fleet: the fleet that answers a new stream of a node; None: none does.
        unreachable: nodes that reach no planner.
    """

    fate: Callable[[Seen], Fate] = field(default=lambda _: Fate.PASS)
    delay_s: float = 3.0
    log: list[Seen] = field(default_factory=list)
    wires: dict[str, Wire] = field(default_factory=dict)
    fleet: Callable[[str], LiveFleet | None] = field(default=lambda _: None)
    unreachable: set[str] = field(default_factory=set)
    earlier: dict[str, list[bytes]] = field(default_factory=dict)  # messages that each node ever received
    acknowledged: Callable[[str, ConnectNodeRequest], None] = field(default=lambda node, request: None)
    watches: list[Callable[[], None]] = field(default_factory=list)  # called after every delivery

    def note(self, node: str, way: Way, message: Message | None, kind: str = "") -> Seen:
        seen = Seen(number=len(self.log), node=node, way=way, kind=kind or kind_of(message))
        self.log.append(seen)
        return seen

    def release(self) -> None:
        """Deliver the held messages in order."""
        for wire in list(self.wires.values()):
            for way in Way:
                while wire.held[way]:
                    wire.push(way, wire.held[way].pop(0))


class Wire:
    """One stream of one node; each end uses it as long as it considers it open."""

    def __init__(self, network: Network, node: str, fleet: LiveFleet) -> None:
        self.network, self.node, self.fleet = network, node, fleet
        self.held: dict[Way, list[Item]] = {way: [] for way in Way}
        self.under_way: dict[Way, list[Item]] = {way: [] for way in Way}
        self.agent_stands = self.planner_stands = True
        self.agent_inbox: asyncio.Queue[bytes | _End] = asyncio.Queue()
        self._planner_inbox: asyncio.Queue[bytes | _HalfClose] = asyncio.Queue()
        self._serving = asyncio.get_running_loop().create_task(self._serve(fleet), name=f"planner's end of {node}")

    def carry(self, way: Way, message: Message) -> None:
        seen = self.network.note(self.node, way, message)
        item = Item(seen, message.SerializeToString())
        if isinstance(message, ConnectNodeRequest) and message.HasField("ack"):
            self.network.acknowledged(self.node, message)
        if way is Way.DOWN:
            self.network.earlier.setdefault(self.node, []).append(message.SerializeToString())
        match self.network.fate(seen):
            case Fate.PASS:
                self.push(way, item)
            case Fate.DROP:
                pass
            case Fate.DUPLICATE:
                self.push(way, item)
                self.push(way, item)
            case Fate.DELAY:
                asyncio.get_running_loop().call_later(self.network.delay_s, self.deliver, way, item)
            case Fate.CUT_BEFORE:
                self.cut()
            case Fate.CUT_AFTER:
                self.push(way, item)
                asyncio.get_running_loop().call_later(2 * LATENCY_S, self.cut)
            case Fate.HOLD:
                self.held[way].append(item)

    def end_of(self, way: Way, content: _End | _HalfClose) -> None:
        """Deliver the end of a direction after the messages sent before it; it is not lost by itself."""
        item = Item(self.network.note(self.node, way, None, "end"), content)
        if self.held[way]:
            self.held[way].append(item)
        else:
            self.push(way, item)

    def push(self, way: Way, item: Item) -> None:
        """Push an item, in order with everything else that is pushed."""
        self.under_way[way].append(item)
        asyncio.get_running_loop().call_later(LATENCY_S, self._arrive, way)

    def _arrive(self, way: Way) -> None:
        if self.under_way[way]:
            self.deliver(way, self.under_way[way].pop(0))

    def deliver(self, way: Way, item: Item) -> None:
        if way is Way.UP and self.planner_stands:
            assert not isinstance(item.content, _End)
            self._planner_inbox.put_nowait(item.content)
        if way is Way.DOWN and self.agent_stands:
            assert not isinstance(item.content, _HalfClose)
            self.agent_inbox.put_nowait(item.content)
        for watch in self.network.watches:
            watch()

    # Breaking.

    def cut(self, *, agent_notices: bool = True, planner_notices: bool = True, arrives: Sequence[Way] = ()) -> None:
        """Stop all traffic; an end that does not notice does so after `NOTICE_S`.

        ``arrives``: directions in which messages in transit still arrive.
        """
        for way in arrives:
            while self.under_way[way]:
                self.deliver(way, self.under_way[way].pop(0))
        for way in Way:
            self.held[way].clear()
            self.under_way[way].clear()
        loop = asyncio.get_running_loop()
        for notices, end in ((agent_notices, self.cut_agent), (planner_notices, self.cut_planner)):
            if notices:
                end()
            else:
                loop.call_later(NOTICE_S, end)

    def cut_agent(self) -> None:
        if self.agent_stands:
            self.agent_stands = False
            self.agent_inbox.put_nowait(_End(None, is_broken=True))
            if self.network.wires.get(self.node) is self:
                del self.network.wires[self.node]

    def cut_planner(self) -> None:
        """Cancel the handler, as gRPC does."""
        if self.planner_stands:
            self.planner_stands = False
            # After the handler has read the messages that have arrived.
            asyncio.get_running_loop().call_later(LATENCY_S, self._serving.cancel)

    # The planner's end.

    async def _serve(self, fleet: LiveFleet) -> None:
        error: ServiceError | None = None
        try:
            async with aclosing(fleet.connect(callers.ANYBODY, self._requests())) as responses:
                async for response in responses:
                    if self.planner_stands:
                        self.carry(Way.DOWN, response)
        except ServiceError as raised:
            error = raised
        if self.planner_stands:
            self.planner_stands = False
            self.end_of(Way.DOWN, _End(error))

    async def _requests(self) -> AsyncIterator[ConnectNodeRequest]:
        while True:
            content = await self._planner_inbox.get()
            if isinstance(content, _HalfClose):
                return
            yield ConnectNodeRequest.FromString(content)


class AgentCall:
    """The agent's end, with the interface of a `grpc.aio` call."""

    def __init__(self, wire: Wire | None) -> None:
        self._wire = wire
        self._ended: _End | None = None

    async def write(self, message: ConnectNodeRequest) -> None:
        if self._wire is not None and self._wire.agent_stands:
            self._wire.carry(Way.UP, message)

    async def done_writing(self) -> None:
        if self._wire is not None and self._wire.agent_stands:
            self._wire.end_of(Way.UP, _HalfClose())

    async def read(self) -> Any:
        if self._wire is None:
            raise _aio_error(grpc.StatusCode.UNAVAILABLE, "nobody listens", ())
        content = await self._wire.agent_inbox.get()
        if isinstance(content, bytes):
            return ConnectNodeResponse.FromString(content)
        if content.is_broken:
            raise _aio_error(grpc.StatusCode.UNAVAILABLE, "the connection broke", ())
        self._ended = content
        if content.error is None:
            return grpc.aio.EOF
        status = rpc_status.to_status(statuses.to_status(content.error))
        raise _aio_error(status.code, status.details, status.trailing_metadata)

    def cancel(self) -> None:
        """The agent ends the stream; the planner is notified a little later."""
        wire = self._wire
        if wire is not None and wire.agent_stands:
            wire.cut_agent()
            asyncio.get_running_loop().call_later(LATENCY_S, wire.cut_planner)

    async def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.OK


class Address:
    """A stand-in for `PlannerAddress` that leads to the planner chosen by the network."""

    server = "memory"

    def __init__(self, network: Network, node: str) -> None:
        self._network, self._node = network, node

    def search(self) -> LeaderSearch:
        return LeaderSearch(("127.0.0.1:1",), is_plain=True, resolve=lambda _: (Endpoint("127.0.0.1:1"),))

    def channel(self, _: Endpoint) -> Any:
        return _Channel(self._network, self._node)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        return ()

    def explained(self, message: str) -> str:
        return message


class _Channel:
    """A channel with the methods that a stub uses."""

    def __init__(self, network: Network, node: str) -> None:
        self._network, self._node = network, node

    async def __aenter__(self) -> _Channel:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    def stream_stream(self, *_: Any, **__: Any) -> Callable[..., AgentCall]:
        def call(**_: Any) -> AgentCall:
            fleet = None if self._node in self._network.unreachable else self._network.fleet(self._node)
            if fleet is None:
                return AgentCall(None)
            wire = Wire(self._network, self._node, fleet)
            self._network.wires[self._node] = wire
            return AgentCall(wire)

        return call


def kind_of(message: Message | None) -> str:
    if message is None:
        return "none"
    kind = message.WhichOneof("message") or "none"
    if isinstance(message, ConnectNodeResponse) and kind == "delta":
        return f"delta.{message.delta.WhichOneof('change')}"
    if isinstance(message, ConnectNodeRequest) and kind == "change_status":
        return f"change_status.{message.change_status.phase}"
    return kind


def _aio_error(code: Any, details: str, trailing: Any) -> grpc.aio.AioRpcError:
    empty = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(code, empty, grpc.aio.Metadata(*trailing), details)
