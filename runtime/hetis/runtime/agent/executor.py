"""The engine as the agent calls it: `ExecutorService` over a Unix socket."""

from __future__ import annotations

import os
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Protocol

import grpc
from google.protobuf.duration_pb2 import Duration

from hetis.runtime.moves.refusals import RefusedError, failure_of_call, unreachable
from hetis.v1 import executor_service_pb2 as messages
from hetis.v1.executor_service_pb2_grpc import ExecutorServiceStub

MOST_MESSAGE_BYTES = 4 << 20


class Executor(Protocol):
    """The engine's services to the agent. Every call may be repeated. See ``executor_service.proto``.

    All methods raise RefusedError with the engine's failure, or with ENGINE_UNREACHABLE if the outcome of the call is
    unknown.
    """

    async def apply_assignment(self, request: messages.ApplyAssignmentRequest) -> messages.ApplyAssignmentResponse: ...

    async def reserve_moves(self, request: messages.ReserveMovesRequest) -> messages.ReserveMovesResponse: ...

    def copy_moves(self, request: messages.CopyMovesRequest) -> AsyncIterator[messages.CopyMovesResponse]: ...

    async def flip_moves(self, request: messages.FlipMovesRequest) -> messages.FlipMovesResponse: ...

    async def release_moves(self, request: messages.ReleaseMovesRequest) -> messages.ReleaseMovesResponse: ...

    async def abort_moves(self, request: messages.AbortMovesRequest) -> messages.AbortMovesResponse: ...

    def watch_reports(self, min_interval_s: float) -> AsyncIterator[messages.WatchReportsResponse]: ...

    def read_head_maps(self, request: messages.ReadHeadMapsRequest) -> AsyncIterator[messages.ReadHeadMapsResponse]: ...

    async def close(self) -> None: ...


class SocketExecutor:
    """An engine that serves `ExecutorService` on a Unix socket of this user.

    The socket is checked before each call: one that another user owns, or that others may write to, is not used.
    """

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        # Names the peer for HTTP/2, because a path is no valid authority.
        options = [("grpc.default_authority", "localhost"), ("grpc.max_receive_message_length", MOST_MESSAGE_BYTES)]
        options += [("grpc.initial_reconnect_backoff_ms", 200), ("grpc.max_reconnect_backoff_ms", 2000)]
        self._channel = grpc.aio.insecure_channel(f"unix:{socket}", options=options)
        self._stub = ExecutorServiceStub(self._channel)

    async def apply_assignment(self, request: messages.ApplyAssignmentRequest) -> messages.ApplyAssignmentResponse:
        check_socket(self._socket)
        try:
            return await self._stub.ApplyAssignment(request)
        except grpc.aio.AioRpcError as error:
            raise RefusedError(failure_of_call(error)) from error

    async def reserve_moves(self, request: messages.ReserveMovesRequest) -> messages.ReserveMovesResponse:
        check_socket(self._socket)
        try:
            return await self._stub.ReserveMoves(request)
        except grpc.aio.AioRpcError as error:
            raise RefusedError(failure_of_call(error)) from error

    async def copy_moves(self, request: messages.CopyMovesRequest) -> AsyncIterator[messages.CopyMovesResponse]:
        check_socket(self._socket)
        try:
            async for response in self._stub.CopyMoves(request):
                yield response
        except grpc.aio.AioRpcError as error:
            raise RefusedError(failure_of_call(error)) from error

    async def flip_moves(self, request: messages.FlipMovesRequest) -> messages.FlipMovesResponse:
        check_socket(self._socket)
        try:
            return await self._stub.FlipMoves(request)
        except grpc.aio.AioRpcError as error:
            raise RefusedError(failure_of_call(error)) from error

    async def release_moves(self, request: messages.ReleaseMovesRequest) -> messages.ReleaseMovesResponse:
        check_socket(self._socket)
        try:
            return await self._stub.ReleaseMoves(request)
        except grpc.aio.AioRpcError as error:
            raise RefusedError(failure_of_call(error)) from error

    async def abort_moves(self, request: messages.AbortMovesRequest) -> messages.AbortMovesResponse:
        check_socket(self._socket)
        try:
            return await self._stub.AbortMoves(request)
        except grpc.aio.AioRpcError as error:
            raise RefusedError(failure_of_call(error)) from error

    async def watch_reports(self, min_interval_s: float) -> AsyncIterator[messages.WatchReportsResponse]:
        check_socket(self._socket)
        interval = Duration()
        interval.FromNanoseconds(int(min_interval_s * 1e9))
        try:
            async for response in self._stub.WatchReports(messages.WatchReportsRequest(min_interval=interval)):
                yield response
        except grpc.aio.AioRpcError as error:
            raise RefusedError(failure_of_call(error)) from error

    async def read_head_maps(
        self, request: messages.ReadHeadMapsRequest
    ) -> AsyncIterator[messages.ReadHeadMapsResponse]:
        check_socket(self._socket)
        try:
            async for response in self._stub.ReadHeadMaps(request):
                yield response
        except grpc.aio.AioRpcError as error:
            raise RefusedError(failure_of_call(error)) from error

    async def close(self) -> None:
        await self._channel.close()


def check_socket(socket: Path) -> None:
    """Refuse a socket that anybody but this user could have created or could listen on.

    Raises:
        RefusedError: ENGINE_UNREACHABLE; the path is missing, no socket, owned by another user, or open to others.
    """
    try:
        found = socket.lstat()
    except OSError as error:
        raise RefusedError(unreachable(f"engine socket {socket}: {error.strerror}")) from error
    if not stat.S_ISSOCK(found.st_mode):
        raise RefusedError(unreachable(f"engine socket {socket}: it is no socket"))
    if found.st_uid != os.geteuid():
        raise RefusedError(
            unreachable(f"engine socket {socket}: it belongs to user {found.st_uid}, this is {os.geteuid()}")
        )
    if found.st_mode & 0o022:
        mode = stat.S_IMODE(found.st_mode)
        raise RefusedError(unreachable(f"engine socket {socket}: its mode is {mode:o}, others may write to it"))
