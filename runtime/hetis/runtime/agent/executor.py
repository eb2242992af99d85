"""The engine as the agent calls it: `ExecutorService` over a Unix socket."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Protocol

import grpc
from google.protobuf.duration_pb2 import Duration

from hetis.runtime.agent.outbox import EngineRequest, EngineResponse
from hetis.runtime.agent.replica import CALL_S
from hetis.runtime.moves.refusals import RefusedError, failure_of_call, unreachable
from hetis.v1.executor_service_pb2 import (
    CopyMovesRequest,
    CopyMovesResponse,
    ReadHeadMapsRequest,
    WatchReportsRequest,
    WatchReportsResponse,
)
from hetis.v1.executor_service_pb2_grpc import ExecutorServiceStub

MOST_MESSAGE_BYTES = 4 << 20
# After this long without a report the engine is asked for one: an engine with nothing new to say and one that hangs are
# equally silent. Not by HTTP/2 pings, of which a server with gRPC's defaults permits one in five minutes.
SILENCE_S = 5.0


class Executor(Protocol):
    """The engine's services to the agent. Every call may be repeated. See ``executor_service.proto``.

    All methods raise RefusedError with the engine's failure, or with ENGINE_UNREACHABLE if the outcome of the call is
    unknown.
    """

    async def call(
        self, request: EngineRequest, progressed: Callable[[CopyMovesResponse], None] = lambda response: None
    ) -> EngineResponse:
        """Call the method that belongs to the request's type. ``progressed`` receives every response to CopyMoves."""

    def watch_reports(self, min_interval_s: float) -> AsyncIterator[WatchReportsResponse]:
        """Yield a report at once, and one after each change. Ends when it is time to ask the engine anew."""

    async def close(self) -> None: ...


class SocketExecutor:
    """An engine that serves `ExecutorService` on a Unix socket of this user.

    The socket is checked before each call: one that another user owns, or that others may write to, is not used.
    """

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        # The authority names the peer for HTTP/2, because a path is not a valid one.
        options = [("grpc.default_authority", "localhost"), ("grpc.max_receive_message_length", MOST_MESSAGE_BYTES)]
        options += [("grpc.initial_reconnect_backoff_ms", 200), ("grpc.max_reconnect_backoff_ms", 2000)]
        self._channel = grpc.aio.insecure_channel(f"unix:{socket}", options=options)
        self._stub = ExecutorServiceStub(self._channel)

    async def call(
        self, request: EngineRequest, progressed: Callable[[CopyMovesResponse], None] = lambda response: None
    ) -> EngineResponse:
        check_socket(self._socket)
        method: Any = getattr(self._stub, type(request).__name__.removesuffix("Request"))
        try:
            if isinstance(request, ReadHeadMapsRequest):
                return [response async for response in method(request)]
            if not isinstance(request, CopyMovesRequest):
                answer: EngineResponse = await method(request)
                return answer
            copied = CopyMovesResponse()
            async for copied in method(request):
                progressed(copied)
            return copied
        except grpc.aio.AioRpcError as error:
            raise RefusedError(failure_of_call(error)) from error

    async def watch_reports(self, min_interval_s: float) -> AsyncIterator[WatchReportsResponse]:
        check_socket(self._socket)
        interval = Duration()
        interval.FromNanoseconds(int(min_interval_s * 1e9))
        call: Any = self._stub.WatchReports(WatchReportsRequest(min_interval=interval))
        has_reported = False
        try:
            while True:
                async with asyncio.timeout(SILENCE_S if has_reported else CALL_S):
                    response = await call.read()
                if response is grpc.aio.EOF:
                    return
                has_reported = True
                yield response
        except TimeoutError:
            if not has_reported:
                raise RefusedError(unreachable(f"the engine did not report within {CALL_S:g} s")) from None
        except grpc.aio.AioRpcError as error:
            raise RefusedError(failure_of_call(error)) from error
        finally:
            call.cancel()

    async def close(self) -> None:
        await self._channel.close()


def check_socket(socket: Path) -> None:
    """Refuse a socket that another user could have created or could listen on. Raises RefusedError (ENGINE_UNREACHABLE)
    if the path is missing, is not a socket, is owned by another user, or is open to others.
    """
    try:
        found = socket.lstat()
    except OSError as error:
        raise RefusedError(unreachable(f"engine socket {socket}: {error.strerror}")) from error
    why = ""
    if not stat.S_ISSOCK(found.st_mode):
        why = "it is not a socket"
    elif found.st_uid != os.geteuid():
        why = f"it belongs to user {found.st_uid}, the agent runs as {os.geteuid()}"
    elif found.st_mode & 0o022:
        why = f"its mode is {stat.S_IMODE(found.st_mode):o}, which lets other users write to it"
    if why:
        raise RefusedError(unreachable(f"engine socket {socket}: {why}"))
