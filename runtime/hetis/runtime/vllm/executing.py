"""`ExecutorService` inside vLLM's engine process: the node's agent reaches the scheduler over a Unix socket.

gRPC runs in its own thread. The scheduler never waits for it; see `hetis.runtime.vllm.scheduler`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import grpc

from hetis.runtime.moves.engine import SteeredEngine
from hetis.runtime.moves.servicer import ExecutorServicer, bind_socket, stop
from hetis.runtime.vllm.counts import SchedulerCounts
from hetis.runtime.vllm.scheduler import Boundary, SchedulerSide
from hetis.runtime.vllm.settings import SettingsError
from hetis.runtime.vllm.steering import SteeredVllm
from hetis.v1.change_pb2 import ChangeStatus
from hetis.v1.executor_service_pb2_grpc import add_ExecutorServiceServicer_to_server

T = TypeVar("T")
_log = logging.getLogger(__name__)
LOOK_S = 0.25  # interval between checks of the clock while no step is made


class ExecutorThread:
    """Serves one engine until it is closed."""

    def __init__(self, socket: Path, engine: SteeredEngine[Any], boundary: Boundary) -> None:
        """Start listening before returning. Raises OSError if the socket cannot be created."""
        self._socket, self._host = socket, _Host(engine, boundary)
        self._loop = asyncio.new_event_loop()
        self._closing = asyncio.Event()
        self._listens = threading.Event()
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="hetis-executor", daemon=True)
        self._thread.start()
        self._listens.wait()
        if self._error is not None:
            raise self._error
        _log.info("the agent can steer this engine at unix://%s", socket)

    def close(self) -> None:
        """Stop answering."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._closing.set)
            self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        except OSError as error:
            self._error = error
        finally:
            self._listens.set()
            self._loop.close()

    async def _serve(self) -> None:
        server = grpc.aio.server()
        add_ExecutorServiceServicer_to_server(ExecutorServicer(self._host), server)
        bind_socket(server, self._socket)
        await server.start()
        self._listens.set()
        try:
            await self._closing.wait()
        finally:
            await stop(server)
            self._socket.unlink(missing_ok=True)


class _Host:
    """An `EngineHost` in gRPC's thread."""

    def __init__(
        self, engine: SteeredEngine[Any], boundary: Boundary, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._engine, self._boundary, self._clock = engine, boundary, clock

    async def do(self, work: Callable[[SteeredEngine[Any], float], T]) -> T:
        def act() -> T:
            now_s = self._clock()
            try:
                return work(self._engine, now_s)
            finally:
                self._engine.step(now_s)  # do what was requested at this boundary, even if nothing runs

        return await asyncio.wrap_future(self._boundary.call(act))

    async def stepped(self) -> None:
        loop, stepped = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(stepped.set)

        self._boundary.on_step(wake)
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await stepped.wait()
        finally:
            self._boundary.off_step(wake)

    async def read_authority(self, change_id: str) -> Iterable[ChangeStatus] | None:
        return None  # this engine is always the authority


def surround(side: SchedulerSide) -> SteeredVllm | None:
    """Attach the counts and, if ``executor`` is set, an engine for the agent to a bound side, and return that engine or
    None. Raises SettingsError if the socket cannot be created.
    """
    path = side.settings.executor
    if path is None:
        side.attach(SchedulerCounts(side).take)
        return None
    steered = SteeredVllm(side)
    try:
        executor = ExecutorThread(path, steered, side.boundary)
    except OSError as error:
        raise SettingsError(f"hetis: executor: {error}") from None
    side.attach(SchedulerCounts(side).take, steered, executor.close)
    return steered
