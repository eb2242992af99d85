"""A planner of a few lines: records agents' messages, sends what the test chooses, over a real loopback channel."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from grpc_status import rpc_status

from hetis.runtime.moves.refusals import status_of
from hetis.v1.agent_service_pb2 import ConnectNodeRequest, ConnectNodeResponse
from hetis.v1.agent_service_pb2_grpc import AgentServiceServicer, add_AgentServiceServicer_to_server
from hetis.v1.failure_pb2 import Failure
from tests.runtime.agent.builders import duration, welcome

WAIT_S = 600.0  # the engine may have to compile its dispatcher: nearly a minute on a busy machine


class PlannerDouble(AgentServiceServicer):
    """One planner for one agent.

    Attributes:
        heard: every message of the agent, over all streams.
        hellos: number of streams so far.
        end_with: failure with which the next stream ends after its Hello.
        metadata, peer: those of the last stream; its peer as TLS identified it.

    Args:
        credentials: TLS credentials. None: plain text.
        token: token that agents must present. Empty: none.
    """

    def __init__(self, *, epoch: int = 1, credentials: grpc.ServerCredentials | None = None, token: str = "") -> None:
        self.epoch = epoch
        self._credentials = credentials
        self._token = token
        self.heard: list[ConnectNodeRequest] = []
        self.hellos = 0
        self.end_with: Failure | None = None
        self.metadata: dict[str, Any] = {}
        self.peer: dict[str, list[str]] = {}
        self.port = 0
        self._outgoing: asyncio.Queue[ConnectNodeResponse] = asyncio.Queue()
        self._news = asyncio.Event()
        self._server = grpc.aio.server()
        add_AgentServiceServicer_to_server(self, self._server)

    async def __aenter__(self) -> PlannerDouble:
        if self._credentials is None:
            self.port = self._server.add_insecure_port("127.0.0.1:0")
        else:
            self.port = self._server.add_secure_port("127.0.0.1:0", self._credentials)
        await self._server.start()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._server.stop(0)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def ConnectNode(  # noqa: N802  the contract's name
        self, requests: AsyncIterator[ConnectNodeRequest], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[ConnectNodeResponse]:
        self.metadata = dict(context.invocation_metadata() or ())
        self.peer = {name: [value.decode() for value in values] for name, values in context.auth_context().items()}
        if self._token and self.metadata.get("authorization") != f"Bearer {self._token}":
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the token is not known")
        self._outgoing = asyncio.Queue()
        self._hear(await anext(aiter(requests)))
        if self.end_with is not None:
            failure, self.end_with = self.end_with, None
            await context.abort_with_status(rpc_status.to_status(status_of(failure)))
        yield welcome(
            self.epoch,
            heartbeat_interval=duration(0.5),
            min_report_interval=duration(0.05),
            kv_change_ratio=0.0001,
        )
        self.hellos += 1
        listening = asyncio.create_task(self._listen(requests))
        try:
            while True:
                yield await self._outgoing.get()
        finally:
            listening.cancel()

    def send(self, message: ConnectNodeResponse) -> None:
        self._outgoing.put_nowait(message)

    async def until(self, found: Callable[[ConnectNodeRequest], bool], *, since: int = 0) -> ConnectNodeRequest:
        """Return the first message after ``since`` messages for which the condition holds."""
        async with asyncio.timeout(WAIT_S):
            while True:
                for message in self.heard[since:]:
                    if found(message):
                        return message
                self._news.clear()
                await self._news.wait()

    async def phase(self, change_id: str, phase: int, *, since: int = 0) -> ConnectNodeRequest:
        """Return the status of a change in this phase, from a report or a Hello."""

        def is_there(message: ConnectNodeRequest) -> bool:
            statuses = [*message.hello.changes, message.change_status]
            return any(status.change_id == change_id and status.phase == phase for status in statuses)

        return await self.until(is_there, since=since)

    async def connected(self, times: int) -> None:
        async with asyncio.timeout(WAIT_S):
            while self.hellos < times:
                await asyncio.sleep(0.02)

    async def _listen(self, requests: AsyncIterator[ConnectNodeRequest]) -> None:
        async for message in requests:
            self._hear(message)

    def _hear(self, message: ConnectNodeRequest) -> None:
        self.heard.append(message)
        self._news.set()
