"""`ExecutorService` over any engine, from message to call and from refusal to status, and the socket for the agent."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

import grpc
from grpc_status import rpc_status

from hetis.runtime.moves.changes import EngineChange, has_ended
from hetis.runtime.moves.engine import SteeredEngine, pieces_of
from hetis.runtime.moves.refusals import RefusedError, refusal, status_of
from hetis.v1 import executor_service_pb2 as messages
from hetis.v1 import executor_service_pb2_grpc
from hetis.v1.change_pb2 import ChangePhase, ChangeStatus
from hetis.v1.failure_pb2 import ErrorReason

T = TypeVar("T")
Context = grpc.aio.ServicerContext[Any, Any]
PROGRESS_S = 0.1  # interval between progress messages of a copy
_TURNS = 10  # passes of the event loop granted to calls that were cut off; two suffice today
DEFAULT_REPORT_S = 1.0
LEAST_UNCHANGED_S = 0.05  # interval between two reads of a report that has not changed: each takes time from a step
MOST_WATCHES = 64  # streams of reports at a time; an agent needs one, and so does each engine of another node


def bind_socket(server: grpc.aio.Server, path: Path) -> None:
    """Listen on a Unix socket of this user alone, in place of one left by an earlier run.

    Raises OSError if a running process listens there: its agent would find this engine, which knows nothing of the
    other one's head groups.
    """
    if path.is_socket():
        if _answers(path):
            raise OSError(f"cannot listen on unix:{path}: another process listens on it")
        path.unlink(missing_ok=True)
    elif path.exists():
        raise OSError(f"cannot listen on unix:{path}: it exists and is not a socket")
    before = os.umask(0o177)
    try:
        bind(server, f"unix:{path}")
    finally:
        os.umask(before)


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # a listener whose queue is full is alive
        try:
            probe.connect(str(path))
        except BlockingIOError:
            return True
        except OSError:
            return False
    return True


def bind(server: grpc.aio.Server, address: str) -> int:
    """Listen on an address without TLS, and return the port. Raises OSError if it is taken, or not this machine's."""
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise OSError(f"cannot listen on {address}: {error}") from None
    if port == 0:
        raise OSError(f"cannot listen on {address}")
    return port


async def stop(server: grpc.aio.Server) -> None:
    """Cut off all calls of a server, and let their tasks end.

    ``Server.stop`` returns before they have ended. An event loop that closes then cancels them, which gRPC logs as an
    error with a traceback.
    """
    await server.stop(0)
    for _ in range(_TURNS):
        await asyncio.sleep(0)


# ruff: noqa: N802  the methods have the contract's names


class EngineHost(Protocol):
    """Runs an engine, possibly in a thread of its own."""

    async def do(self, work: Callable[[SteeredEngine[Any], float], T]) -> T:
        """Run ``work`` with the engine and the time between two of its steps. Raises what ``work`` raises."""

    async def stepped(self) -> None:
        """Wait until the engine has made another step or looked at the clock again."""

    async def read_authority(self, change_id: str) -> Iterable[ChangeStatus] | None:
        """Return the current changes of the engine that decides this one; None if it is this engine or not reached."""


class ExecutorServicer(executor_service_pb2_grpc.ExecutorServiceServicer):
    """Serves one engine."""

    def __init__(self, host: EngineHost, *, most_watches: int = MOST_WATCHES) -> None:
        """``most_watches``: streams of reports at a time."""
        self._host, self._most_watches = host, most_watches
        self._num_watches = 0
        self._reading: asyncio.Task[messages.WatchReportsResponse] | None = None

    async def ApplyAssignment(
        self, request: messages.ApplyAssignmentRequest, context: Context
    ) -> messages.ApplyAssignmentResponse:
        return await self._answer(context, lambda engine, now_s: engine.apply_assignment(request, now_s))

    async def ReserveMoves(
        self, request: messages.ReserveMovesRequest, context: Context
    ) -> messages.ReserveMovesResponse:
        return await self._answer(context, lambda engine, now_s: engine.reserve_moves(request, now_s))

    async def CopyMoves(
        self, request: messages.CopyMovesRequest, context: Context
    ) -> AsyncIterator[messages.CopyMovesResponse]:
        def look(engine: SteeredEngine[Any], now_s: float) -> tuple[int, messages.CopyMovesResponse]:
            return change.phase, engine.copy_answer(change)

        change: EngineChange = await self._answer(context, lambda engine, now_s: engine.copy_moves(request, now_s))
        phase, progress = await self._host.do(look)
        while phase == ChangePhase.CHANGE_PHASE_PREPARING:
            yield progress
            await self._host.stepped()
            await asyncio.sleep(PROGRESS_S if progress.total_bytes > 2 * progress.copied_bytes else 0)
            phase, progress = await self._host.do(look)
        if phase != ChangePhase.CHANGE_PHASE_READY:
            await _refuse(context, has_ended(change, "ended while it was copied"))
        yield progress

    async def FlipMoves(self, request: messages.FlipMovesRequest, context: Context) -> messages.FlipMovesResponse:
        await self._answer(context, lambda engine, now_s: engine.flip_moves(request, now_s))
        while True:
            answer = await self._answer(context, lambda engine, _: engine.flip_answer(request.change_id))
            if answer is not None:
                return answer
            await self._host.stepped()

    async def ReleaseMoves(
        self, request: messages.ReleaseMovesRequest, context: Context
    ) -> messages.ReleaseMovesResponse:
        return await self._answer(context, lambda engine, now_s: engine.release_moves(request, now_s))

    async def AbortMoves(self, request: messages.AbortMovesRequest, context: Context) -> messages.AbortMovesResponse:
        said = await self._host.read_authority(request.change_id)
        return await self._answer(context, lambda engine, now_s: engine.abort_moves(request, now_s, authority=said))

    async def WatchReports(
        self, request: messages.WatchReportsRequest, context: Context
    ) -> AsyncIterator[messages.WatchReportsResponse]:
        if self._num_watches >= (most := self._most_watches):
            why = f"{most} streams of reports are open already; end one first"
            await _refuse(context, refusal(ErrorReason.ERROR_REASON_TOO_MANY_STREAMS, why, max_streams=most))
        interval_s = DEFAULT_REPORT_S
        if request.HasField("min_interval"):
            interval_s = min(max(request.min_interval.ToNanoseconds() / 1e9, 0.01), 600.0)
        sent = None
        self._num_watches += 1
        try:
            while True:
                report = await asyncio.shield(self._read_report())
                if report != sent:
                    sent = report
                    yield report
                    await asyncio.sleep(interval_s)
                else:
                    await self._host.stepped()
                    await asyncio.sleep(min(interval_s, LEAST_UNCHANGED_S))
        finally:
            self._num_watches -= 1
            if not self._num_watches and self._reading is not None:
                self._reading.cancel()

    def _read_report(self) -> asyncio.Task[messages.WatchReportsResponse]:
        """Read a report; streams that want one at the same time share it, because it takes time between two steps."""
        if self._reading is None or self._reading.done():
            self._reading = asyncio.ensure_future(self._host.do(lambda engine, now_s: engine.report(now_s)))
        return self._reading

    async def ReadHeadMaps(
        self, request: messages.ReadHeadMapsRequest, context: Context
    ) -> AsyncIterator[messages.ReadHeadMapsResponse]:
        whole = await self._answer(context, lambda engine, _: engine.head_maps(request.replica))
        for piece in pieces_of(whole.head_maps):
            yield messages.ReadHeadMapsResponse(generation=whole.generation, step=whole.step, head_maps=piece)

    async def _answer(self, context: Context, work: Callable[[SteeredEngine[Any], float], T]) -> T:
        try:
            return await self._host.do(work)
        except RefusedError as error:
            await _refuse(context, error)


async def _refuse(context: Context, error: RefusedError) -> NoReturn:
    await context.abort_with_status(rpc_status.to_status(status_of(error.failure)))
    raise AssertionError("abort raises")
