"""A simulated engine in real time: `ExecutorService` on a Unix socket for its agent, reports over TCP for its peers."""

# ruff: noqa: N802  the methods have the contract's names

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import grpc
from grpc_status import rpc_status

from hetis.runtime.agent.pieces import pieces_of
from hetis.runtime.agent.refusals import RefusedError, failure_of, status_of
from hetis.runtime.agent.simulated.control import ControlFile
from hetis.runtime.agent.simulated.engine import SimulatedEngine
from hetis.runtime.agent.simulated.peers import Peers
from hetis.v1 import executor_service_pb2 as messages
from hetis.v1 import executor_service_pb2_grpc
from hetis.v1.change_pb2 import ChangePhase
from hetis.v1.failure_pb2 import ErrorReason

ResponseT = TypeVar("ResponseT")
Context = grpc.aio.ServicerContext[Any, Any]

LONGEST_STEP_S = 0.05  # between two looks at the clock
CONTROL_S = 0.5  # between two looks at the control file
PROGRESS_S = 0.1
DEFAULT_REPORT_S = 1.0
_log = logging.getLogger(__name__)


class SimulatedServer:
    """Runs one engine until it is closed.

    Args:
        socket: where the agent asks; made new, for this user only.
        peer_address: ``host:port`` where other engines read; port 0 chooses one.
        control: what to simulate, looked at while running. None: an idle engine.
    """

    def __init__(
        self,
        engine: SimulatedEngine,
        socket: Path,
        *,
        peer_address: str = "127.0.0.1:0",
        control: ControlFile | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engine = engine
        self.address = ""  # where other engines read, once started
        self._socket = socket
        self._peer_address = peer_address
        self._control = control
        self._clock = clock
        self._stepped = asyncio.Event()
        self._peers = Peers(engine)
        self._servers: list[grpc.aio.Server] = []
        self._loop: asyncio.Task[None] | None = None
        self._warming: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Serves and decodes from now on.

        Raises:
            OSError: the socket or the address cannot be bound.
        """
        self._look_at_control()
        servicer = _Servicer(self)
        agent, peers = grpc.aio.server(), grpc.aio.server()
        executor_service_pb2_grpc.add_ExecutorServiceServicer_to_server(servicer, agent)
        _add_peer_methods(servicer, peers)
        with contextlib.suppress(FileNotFoundError):
            self._socket.unlink()
        before = os.umask(0o177)
        try:
            _bind(agent, f"unix:{self._socket}")
        finally:
            os.umask(before)
        port = _bind(peers, self._peer_address)
        self.address = f"{self._peer_address.rpartition(':')[0]}:{port}"
        self._servers = [agent, peers]
        for server in self._servers:
            await server.start()
        self._loop = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Stops at once; what ran is gone."""
        if self._loop is not None:
            self._loop.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._loop
        await self._peers.close()
        for server in self._servers:
            await server.stop(0)
        with contextlib.suppress(FileNotFoundError):
            self._socket.unlink()

    async def wait(self) -> None:
        """Until the decode loop ends, which only an error makes it do."""
        assert self._loop is not None
        await self._loop

    def warm_up(self) -> None:
        """Makes admission ready in a thread, once: this node is to run a primary."""
        if self._warming is None:
            self.engine.is_warm = False
            self._warming = asyncio.create_task(self._warm_up())

    async def _warm_up(self) -> None:
        try:
            await asyncio.to_thread(self.engine.admission.warm_up)
        finally:
            self.engine.is_warm = True

    def now_s(self) -> float:
        return self._clock()

    async def stepped(self) -> None:
        """Until the engine has looked at the clock again."""
        await self._stepped.wait()

    async def ask_authority(self, change_id: str) -> list[Any] | None:
        """Changes of the engine that decides this one, as it says now. None: it was not reached, or it is this one."""
        address = self.engine.authority_of(change_id)
        return None if address is None else await self._peers.changes_at(address)

    def _look_at_control(self) -> None:
        if self._control is not None and self._control.look():
            _log.info("control file: %s", self._control.control)
        if self._control is not None:
            self.engine.control = self._control.control

    async def _run(self) -> None:
        looked_s = self._clock()
        while True:
            now_s = self._clock()
            if now_s - looked_s >= CONTROL_S:
                looked_s = now_s
                self._look_at_control()
            self.engine.catch_up(now_s)
            self.engine.step(now_s)
            self._peers.follow()
            self._stepped.set()
            self._stepped = asyncio.Event()
            await asyncio.sleep(min(max(self.engine.next_s() - self._clock(), 0.001), LONGEST_STEP_S))


class _Servicer(executor_service_pb2_grpc.ExecutorServiceServicer):
    """Message to call, call to message, refusal to status."""

    def __init__(self, server: SimulatedServer) -> None:
        self._server = server
        self._engine = server.engine

    async def ApplyAssignment(
        self, request: messages.ApplyAssignmentRequest, context: Context
    ) -> messages.ApplyAssignmentResponse:
        if request.assignment.stages:
            self._server.warm_up()
        return await _answer(context, lambda: self._engine.apply_assignment(request, self._server.now_s()))

    async def ReserveMoves(
        self, request: messages.ReserveMovesRequest, context: Context
    ) -> messages.ReserveMovesResponse:
        return await _answer(context, lambda: self._engine.reserve_moves(request, self._server.now_s()))

    async def CopyMoves(
        self, request: messages.CopyMovesRequest, context: Context
    ) -> AsyncIterator[messages.CopyMovesResponse]:
        change = await _answer(context, lambda: self._engine.copy_moves(request, self._server.now_s()))
        while change.phase == ChangePhase.CHANGE_PHASE_PREPARING:
            yield self._progress(change)
            await self._server.stepped()
            await asyncio.sleep(PROGRESS_S if change.copy_s > PROGRESS_S else 0)
        if change.phase != ChangePhase.CHANGE_PHASE_READY:
            ended = failure_of(
                ErrorReason.ERROR_REASON_CHANGE_PHASE,
                f"change {request.change_id} ended while it was copied",
                change_id=request.change_id,
                phase=ChangePhase.Name(change.phase).removeprefix("CHANGE_PHASE_"),
            )
            await _refuse(context, RefusedError(ended))
        yield self._progress(change)

    def _progress(self, change: Any) -> messages.CopyMovesResponse:
        return messages.CopyMovesResponse(
            copied_bytes=change.copied(self._server.now_s()), total_bytes=change.copy_bytes, moves=change.results()
        )

    async def FlipMoves(self, request: messages.FlipMovesRequest, context: Context) -> messages.FlipMovesResponse:
        await _answer(context, lambda: self._engine.flip_moves(request, self._server.now_s()))
        while (answer := self._engine.flip_answer(request.change_id)) is None:
            await self._server.stepped()
        return answer

    async def ReleaseMoves(
        self, request: messages.ReleaseMovesRequest, context: Context
    ) -> messages.ReleaseMovesResponse:
        return await _answer(context, lambda: self._engine.release_moves(request, self._server.now_s()))

    async def AbortMoves(self, request: messages.AbortMovesRequest, context: Context) -> messages.AbortMovesResponse:
        said = await self._server.ask_authority(request.change_id)
        return await _answer(context, lambda: self._engine.abort_moves(request, self._server.now_s(), authority=said))

    async def WatchReports(
        self, request: messages.WatchReportsRequest, context: Context
    ) -> AsyncIterator[messages.WatchReportsResponse]:
        interval = request.min_interval
        asked_s = interval.seconds + interval.nanos / 1e9
        interval_s = min(max(asked_s, 0.01), 600.0) if request.HasField("min_interval") else DEFAULT_REPORT_S
        sent = None
        while True:
            report = self._engine.report(self._server.now_s())
            if report != sent:
                sent = report
                yield report
                await asyncio.sleep(interval_s)
            else:
                await self._server.stepped()

    async def ReadHeadMaps(
        self, request: messages.ReadHeadMapsRequest, context: Context
    ) -> AsyncIterator[messages.ReadHeadMapsResponse]:
        whole = await _answer(context, lambda: self._engine.head_maps(request.replica))
        for piece in pieces_of(whole.head_maps):
            yield messages.ReadHeadMapsResponse(generation=whole.generation, step=whole.step, head_maps=piece)


def _add_peer_methods(servicer: _Servicer, server: grpc.aio.Server) -> None:
    """What other engines may read; everything else is UNIMPLEMENTED there."""
    watch: Any = grpc.unary_stream_rpc_method_handler(
        servicer.WatchReports,
        request_deserializer=messages.WatchReportsRequest.FromString,
        response_serializer=messages.WatchReportsResponse.SerializeToString,
    )
    service = messages.DESCRIPTOR.services_by_name["ExecutorService"].full_name
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"WatchReports": watch}),))


async def _answer(context: Context, work: Callable[[], ResponseT]) -> ResponseT:
    try:
        return work()
    except RefusedError as error:
        await _refuse(context, error)


async def _refuse(context: Context, error: RefusedError) -> NoReturn:
    await context.abort_with_status(rpc_status.to_status(status_of(error.failure)))
    raise AssertionError("abort raises")


def _bind(server: grpc.aio.Server, address: str) -> int:
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise OSError(f"cannot listen on {address}: {error}") from None
    if port == 0:
        raise OSError(f"cannot listen on {address}")
    return port
