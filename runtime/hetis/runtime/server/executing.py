"""`ExecutorService` of `hetis-serve`: the agent's calls, carried to the thread of the engine and back."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, TypeVar

import grpc

from hetis.runtime.executor.binding import bind, bind_socket
from hetis.runtime.executor.engine import SteeredEngine
from hetis.runtime.executor.refusals import RefusedError
from hetis.runtime.executor.servicer import ExecutorServicer
from hetis.runtime.server.asked import ExecutorAddress
from hetis.runtime.server.desk import Desk
from hetis.runtime.steering.engine import RealEngine
from hetis.v1.change_pb2 import ChangeStatus
from hetis.v1.executor_service_pb2_grpc import add_ExecutorServiceServicer_to_server

T = TypeVar("T")


class ExecutorServer:
    """Listens from the moment it is made; answers while `serving`."""

    def __init__(self, address: ExecutorAddress) -> None:
        """Made in the event loop that will serve.

        Raises:
            OSError: the address is taken, or not ours.
        """
        self.address, self._server = str(address), grpc.aio.server()
        if address.socket is not None:
            bind_socket(self._server, address.socket)
        else:
            port = bind(self._server, address.tcp)
            self.address = f"{address.tcp.rpartition(':')[0]}:{port}"
        self._socket = address.socket

    @contextlib.asynccontextmanager
    async def serving(self, desk: Desk, engine: RealEngine) -> AsyncIterator[None]:
        """Answers for this engine, which the desk owns, until the end of the context."""
        add_ExecutorServiceServicer_to_server(ExecutorServicer(_Host(desk, engine)), self._server)
        await self._server.start()
        try:
            yield
        finally:
            await self._server.stop(0)
            if self._socket is not None:
                self._socket.unlink(missing_ok=True)


class _Host:
    """An `EngineHost`: between two steps is when the desk obeys."""

    def __init__(self, desk: Desk, engine: RealEngine, clock: Callable[[], float] = time.monotonic) -> None:
        self._desk, self._engine, self._clock = desk, engine, clock

    async def do(self, work: Callable[[SteeredEngine[Any], float], T]) -> T:
        def act() -> T:
            now_s = self._clock()
            try:
                return work(self._engine, now_s)
            finally:
                self._engine.step(now_s)  # what was asked for is done at this boundary, also where nothing runs

        return await self._desk.call(act, refusals=(RefusedError,))

    async def stepped(self) -> None:
        await self._desk.stepped()

    async def ask_authority(self, change_id: str) -> Iterable[ChangeStatus] | None:
        return None  # it is this engine, always
