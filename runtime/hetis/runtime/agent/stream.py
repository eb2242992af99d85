"""The agent's stream to the planner, reopened after a random wait: a fleet must not reconnect all at once."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any, Protocol

import grpc

from hetis.commands.endpoints import Endpoint
from hetis.runtime.agent.options import MOST_WAIT_FOR_LEADER_S, PlannerAddress, ReconnectBackoff
from hetis.runtime.agent.outbox import EndStream
from hetis.runtime.moves.refusals import failure_of, failure_of_call, reason_name
from hetis.v1.agent_service_pb2 import ConnectNodeRequest, ConnectNodeResponse
from hetis.v1.agent_service_pb2_grpc import AgentServiceStub
from hetis.v1.failure_pb2 import ErrorReason, Failure

MOST_QUEUED = 10_000  # messages queued for the planner: beyond this the stream is abandoned, and all is sent anew
WELCOME_S = 30.0
STOOD_S = 10.0  # a stream that lasted this long after its Welcome has not failed: the next wait is short
# Reasons that every planner would give. All others concern one planner, or the way to it.
_OF_THIS_AGENT = (ErrorReason.ERROR_REASON_NODE_TAKEN_OVER, ErrorReason.ERROR_REASON_NODE_IN_USE)
_log = logging.getLogger(__name__)


class Listener(Protocol):
    """Makes the first message of each stream, once one may be opened, and handles what arrives on it."""

    async def hello(self) -> ConnectNodeRequest: ...

    def received(self, message: ConnectNodeResponse) -> None: ...

    def ended(self, reason: str) -> None: ...


class PlannerStream:
    """A succession of streams to whichever planner leads, until cancelled."""

    def __init__(self, address: PlannerAddress, listener: Listener, waiting: ReconnectBackoff) -> None:
        self._address, self._listener, self._waiting = address, listener, waiting
        self._leaders = address.search()
        self._outgoing: asyncio.Queue[ConnectNodeRequest] = asyncio.Queue(MOST_QUEUED)
        self._end: asyncio.Future[EndStream] | None = None
        self._awaits_leader = False  # since the last wait, another planner seemed to lead or to be about to
        self._welcome_s: float | None = None  # when the planner answered on the present stream

    def send(self, message: ConnectNodeRequest) -> None:
        """Queue a message for the planner. Messages that an ending stream has not sent are lost."""
        try:
            self._outgoing.put_nowait(message)
        except asyncio.QueueFull:
            self.end(EndStream(None))

    def end(self, why: EndStream) -> None:
        """End the present stream."""
        if self._end is not None and not self._end.done():
            self._end.set_result(why)

    async def run(self) -> None:
        """Connect, and connect again whenever a stream ends."""
        logged, tried = "", set[Endpoint]()
        while True:
            endpoint, hello = self._leaders.present, await self._listener.hello()
            end, failure = await self._once(endpoint, hello)
            why = failure or (end.failure if end is not None else None)
            within_s = end.within_s if end is not None else None
            if self._welcome_s is not None and asyncio.get_running_loop().time() - self._welcome_s >= STOOD_S:
                self._waiting.succeeded()
            wait_s = self._wait_s(endpoint, why, within_s, tried)
            if why is not None:
                # Log once: a persisting failure needs no line per attempt.
                level = logging.DEBUG if why.message == logged else logging.WARNING
                is_new = self._welcome_s is None  # of a stream that worked, address and credentials are right
                message = self._address.explained(why.message) if is_new else why.message
                _log.log(level, "stream to %s: %s; retrying in %.1f s", endpoint.address, message, wait_s)
            logged = why.message if why is not None and self._welcome_s is None else ""
            self._listener.ended(reason_name(why).lower() if why is not None else "goodbye")
            if self._leaders.is_stale:
                await asyncio.to_thread(self._leaders.refresh)
            await asyncio.sleep(wait_s)

    def _wait_s(self, endpoint: Endpoint, why: Failure | None, within_s: float | None, tried: set[Endpoint]) -> float:
        """Return how long to wait before the next attempt, and choose the planner for it."""
        if self._welcome_s is not None:
            tried.clear()
        is_elsewhere = why is not None and why.reason == ErrorReason.ERROR_REASON_NOT_LEADER
        goes_on = False
        if why is None or why.reason not in _OF_THIS_AGENT:  # every planner would give one of those
            address = why.metadata.get("leader_address", "") if why is not None and is_elsewhere else ""
            goes_on = self._leaders.failed(endpoint, address, tried)
        if within_s is not None:
            return self._waiting.within_s(within_s)
        # Among several planners, one that is gone is soon replaced.
        self._awaits_leader |= is_elsewhere or self._leaders.are_several
        if goes_on and self._welcome_s is None:
            return 0.0
        tried.clear()
        awaits_leader, self._awaits_leader = self._awaits_leader, False
        return self._waiting.next_s(MOST_WAIT_FOR_LEADER_S) if awaits_leader else self._waiting.next_s()

    async def _once(self, endpoint: Endpoint, hello: ConnectNodeRequest) -> tuple[EndStream | None, Failure | None]:
        """Run one stream from Hello to its end. Returns what ended it here, or how the planner ended it."""
        self._end = asyncio.get_running_loop().create_future()
        self._welcome_s = None
        self._outgoing = asyncio.Queue(MOST_QUEUED)
        try:
            channel = self._address.channel(endpoint)
            metadata = self._address.metadata()
        except OSError as error:
            return None, Failure(reason=ErrorReason.ERROR_REASON_CREDENTIALS, message=str(error))
        async with channel:
            call: Any = AgentServiceStub(channel).ConnectNode(metadata=metadata)
            works = (self._read(call), self._write(call, hello))
            tasks: set[asyncio.Future[Any]] = {asyncio.create_task(work) for work in works}
            try:
                done, _ = await asyncio.wait({*tasks, self._end}, return_when=asyncio.FIRST_COMPLETED)
                if self._end in done:
                    await self._flush(call)
                    return self._end.result(), None
                return None, await _how_it_ended(call, done)
            finally:
                for task in tasks:
                    task.cancel()
                call.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, call: Any) -> None:
        async with asyncio.timeout(WELCOME_S):
            message = await call.read()
        self._welcome_s = asyncio.get_running_loop().time()
        while message is not grpc.aio.EOF:
            self._listener.received(message)
            message = await call.read()

    async def _write(self, call: Any, hello: ConnectNodeRequest) -> None:
        await call.write(hello)
        while True:
            await call.write(await self._outgoing.get())

    async def _flush(self, call: Any) -> None:
        """Send the last messages, such as a NACK, if the planner takes them soon."""
        with contextlib.suppress(grpc.aio.AioRpcError, TimeoutError, asyncio.InvalidStateError):
            async with asyncio.timeout(0.2):
                await asyncio.sleep(0.05)
                await call.done_writing()


async def _how_it_ended(call: Any, done: set[Any]) -> Failure:
    for task in done:
        error = task.exception() if isinstance(task, asyncio.Task) else None
        if isinstance(error, grpc.aio.AioRpcError):
            return failure_of_call(error)
        if isinstance(error, TimeoutError):
            return failure_of(ErrorReason.ERROR_REASON_PROTOCOL_VIOLATION, f"no Welcome arrived within {WELCOME_S:g} s")
        if error is not None and not isinstance(error, asyncio.InvalidStateError):
            # The state held here stays as it is: the node keeps working, and reports that state at the next attempt.
            _log.error("the agent failed on a message: the stream ends", exc_info=error)
            return failure_of(ErrorReason.ERROR_REASON_INTERNAL, f"{type(error).__name__}: {error}")
    code = await call.code()
    if code is grpc.StatusCode.OK:
        return Failure(reason=ErrorReason.ERROR_REASON_DRAINING, message="the planner closed the stream")
    return failure_of_call(
        grpc.aio.AioRpcError(code, await call.initial_metadata(), await call.trailing_metadata(), await call.details())
    )
