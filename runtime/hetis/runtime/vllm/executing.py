"""What vLLM's engine process shows of its scheduler: counts for ``/metrics``, and `ExecutorService` for the agent.

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
from hetis.runtime.vllm.counts import COUNTERS, GAUGES, Samples
from hetis.runtime.vllm.scheduler import Boundary, SchedulerSide
from hetis.runtime.vllm.settings import SettingsError
from hetis.runtime.vllm.steering import SteeredVllm
from hetis.solver.dispatch.snapshot import DeviceStatus
from hetis.v1.change_pb2 import ChangeStatus
from hetis.v1.executor_service_pb2_grpc import add_ExecutorServiceServicer_to_server

T = TypeVar("T")
_log = logging.getLogger(__name__)
LOOK_S = 0.25  # interval between checks of the clock while no step is made
MOST_CALLS, MOST_WATCHES = 16, 4  # calls at a time, and streams of reports among them: an agent has one of each
EVERY_S = 0.5  # interval between takes of counts while requests run


class SchedulerCounts:
    """Takes the counts of one scheduler."""

    def __init__(self, side: SchedulerSide, clock: Callable[[], float] = time.monotonic) -> None:
        self._side, self._clock = side, clock
        self._taken: Samples = {}
        self._taken_s = float("-inf")

    def take(self, is_last: bool) -> dict[str, Any] | None:
        """Return the counts since the last take and the gauges, or None if it is too early and not the last take."""
        now_s = self._clock()
        if not is_last and now_s < self._taken_s + EVERY_S:
            return None
        self._taken_s = now_s
        counted = _counted(self._side)
        new = {
            name: {label: value - self._taken.get(name, {}).get(label, 0.0) for label, value in samples.items()}
            for name, samples in counted.items()
        }
        self._taken = counted
        recent = self._side.allocator.stats.take_recent()
        return {"gauges": _gauges(self._side), "counters": new, "dispatch_s": recent}


def _gauges(side: SchedulerSide) -> Samples:
    allocator = side.allocator
    load, scales = allocator.state.load(), side.costs.scales
    queries = side.shape.heads.queries_per_group
    found: Samples = {name: {} for name in GAUGES}
    for device, name in enumerate(side.costs.stage.devices):
        total, used = allocator.totals(device)
        found["hetis_head_groups"][name] = int(load.heads[device]) // queries
        found["hetis_kv_blocks"][name], found["hetis_kv_blocks_used"][name] = total, used
        found["hetis_device_up"][name] = int(allocator.state.devices[device].status is DeviceStatus.OK)
        found["hetis_device_cost_scale"][name] = scales[device]
    return found


def _counted(side: SchedulerSide) -> Samples:
    stats = side.allocator.stats
    found: Samples = {name: {} for name in COUNTERS}
    for device, name in enumerate(side.costs.stage.devices):
        exchanged = side.exchanged.get(device)
        if exchanged is not None:
            found["hetis_exchanges"][name] = exchanged.exchanges
            found["hetis_exchange_seconds"][name] = exchanged.exchange_s
            found["hetis_exchange_bytes"][f"{name}|sent"] = exchanged.bytes_sent
            found["hetis_exchange_bytes"][f"{name}|received"] = exchanged.bytes_received
    found["hetis_moves"] = {f"{by}|{state}": count for (by, state), count in side.moves.items()}
    found["hetis_moved_groups"][""] = stats.moved_groups
    found["hetis_relieved_blocks"][""] = stats.relieved_blocks
    found["hetis_recomputes"][""] = stats.recomputed
    found["hetis_dispatch_decisions"] = dict(stats.decisions)
    return found


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
        # gRPC's thread shares Python's lock with the scheduler, so that many callers would delay every token.
        server = grpc.aio.server(maximum_concurrent_rpcs=MOST_CALLS)
        servicer = ExecutorServicer(self._host, most_watches=MOST_WATCHES)
        add_ExecutorServiceServicer_to_server(servicer, server)
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
