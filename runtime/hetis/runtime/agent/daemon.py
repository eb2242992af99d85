"""The running agent: connects core, disk, engine, devices and stream, and carries out the core's actions."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from hetis.runtime.agent.actions import (
    Action,
    Cancel,
    EndStream,
    EngineCall,
    EngineRequest,
    EngineResponse,
    Persist,
    Send,
)
from hetis.runtime.agent.core import AgentCore
from hetis.runtime.agent.devices import Devices
from hetis.runtime.agent.disk import StateDirectory, StateError
from hetis.runtime.agent.executor import Executor
from hetis.runtime.agent.metrics import AgentMetrics
from hetis.runtime.agent.stream import PlannerStream
from hetis.runtime.moves.refusals import RefusedError, failure_of, reason_name, unreachable
from hetis.v1.agent_service_pb2 import ConnectNodeRequest, ConnectNodeResponse
from hetis.v1.change_pb2 import ChangePhase
from hetis.v1.executor_service_pb2 import (
    AbortMovesRequest,
    ApplyAssignmentRequest,
    CopyMovesRequest,
    CopyMovesResponse,
    FlipMovesRequest,
    ReadHeadMapsRequest,
    ReleaseMovesRequest,
    ReserveMovesRequest,
    WatchReportsResponse,
)
from hetis.v1.failure_pb2 import ErrorReason, Failure

SAMPLE_S = 1.0  # between two samples of the devices
INVENTORY_S = 60.0
FIRST_REPORT_S = 3.0  # wait at most this long for the engine's first report before connecting to the planner
LEAST_TICK_S, MOST_TICK_S = 0.005, 1.0
_log = logging.getLogger(__name__)


class EngineReports(Protocol):
    """A source of the engine's reports: its socket or its metrics. Raises RefusedError when the engine is gone."""

    def __call__(self) -> AsyncIterator[WatchReportsResponse]: ...


class AgentDaemon:
    """One agent, which works while `run` runs."""

    def __init__(
        self,
        core: AgentCore,
        state: StateDirectory,
        executor: Executor | None,
        reports: EngineReports,
        devices: Devices,
        metrics: AgentMetrics,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._core = core
        self._state = state
        self._executor = executor
        self._reports = reports
        self._devices = devices
        self._metrics = metrics
        self._clock = clock
        self._calls: dict[int, asyncio.Task[None]] = {}
        self._stream: PlannerStream | None = None
        self._woken = asyncio.Event()
        self._engine_spoke = asyncio.Event()
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self, stream: PlannerStream) -> None:
        """Run until cancelled.

        Raises:
            StateError: the state cannot be written. Nothing unwritten was acknowledged.
        """
        self._stream = stream
        self._metrics.inventory_found(self._core.inventory)
        loops = [self._watch_engine(), self._watch_devices(), self._keep_time(), self._connect(stream)]
        tasks: list[asyncio.Task[None]] = [asyncio.create_task(loop) for loop in loops]
        try:
            done, _ = await asyncio.wait({*tasks, self._failed}, return_when=asyncio.FIRST_COMPLETED)
            for ended in done:
                await ended
        finally:
            for task in [*tasks, *self._calls.values()]:
                task.cancel()
            await asyncio.gather(*tasks, *self._calls.values(), return_exceptions=True)
            if self._failed.done() and not self._failed.cancelled():
                self._failed.exception()

    # --- the stream

    def hello(self) -> ConnectNodeRequest:
        message = self._core.hello()
        self._metrics.sent(message)
        return message

    def heard(self, message: ConnectNodeResponse) -> None:
        self._metrics.received(message)
        self._do(self._core.handle(message, self._clock()))
        if message.HasField("welcome") and self._core.is_connected:
            _log.info("connected: epoch %d, session %s", message.epoch, message.welcome.session_id)
            self._metrics.stream_opened(message.epoch)

    def ended(self, reason: str) -> None:
        self._core.stream_ended()
        self._metrics.stream_ended(reason)

    # --- what the core wants

    def _do(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Persist():
                    try:
                        self._state.write(action.part, action.body)
                    except StateError as error:
                        if not self._failed.done():
                            self._failed.set_exception(error)
                        return  # later actions build on this one
                case Send():
                    self._count(action.message)
                    if self._stream is not None:
                        self._stream.send(action.message)
                case EngineCall():
                    self._calls[action.number] = asyncio.create_task(self._call(action))
                case Cancel():
                    if action.number in self._calls:
                        self._calls.pop(action.number).cancel()
                case EndStream():
                    if self._stream is not None:
                        self._stream.end(action)
        self._woken.set()

    def _count(self, message: ConnectNodeRequest) -> None:
        self._metrics.sent(message)
        if message.HasField("nack"):
            self._metrics.delta_refused(reason_name(message.nack.failure))
        if message.HasField("change_status"):
            phase = message.change_status.phase
            if phase in (ChangePhase.CHANGE_PHASE_FLIPPED, ChangePhase.CHANGE_PHASE_ABORTED):
                self._metrics.change_ended(ChangePhase.Name(phase).removeprefix("CHANGE_PHASE_").lower())

    async def _call(self, call: EngineCall) -> None:
        answer: EngineResponse | Failure
        try:
            async with asyncio.timeout(call.timeout_s):
                answer = await self._ask(call.number, call.request)
        except RefusedError as error:
            answer = error.failure
        except TimeoutError:
            answer = unreachable(f"the engine did not answer in {call.timeout_s:g} s")
        except Exception as error:
            _log.exception("a call of the engine broke")
            answer = failure_of(ErrorReason.ERROR_REASON_INTERNAL, f"{type(error).__name__}: {error}")
        if self._calls.pop(call.number, None) is not None:
            self._do(self._core.answered(call.number, answer, self._clock()))

    async def _ask(self, number: int, request: EngineRequest) -> EngineResponse:
        executor = self._executor
        if executor is None:
            raise RefusedError(failure_of(ErrorReason.ERROR_REASON_ENGINE_CANNOT, "this engine is not steered"))
        match request:
            case ApplyAssignmentRequest():
                return await executor.apply_assignment(request)
            case ReserveMovesRequest():
                return await executor.reserve_moves(request)
            case CopyMovesRequest():
                last = CopyMovesResponse()
                async for last in executor.copy_moves(request):
                    self._do(self._core.progressed(number, last, self._clock()))
                return last
            case FlipMovesRequest():
                return await executor.flip_moves(request)
            case ReleaseMovesRequest():
                return await executor.release_moves(request)
            case AbortMovesRequest():
                return await executor.abort_moves(request)
            case ReadHeadMapsRequest():
                return [response async for response in executor.read_head_maps(request)]

    # --- loops

    async def _connect(self, stream: PlannerStream) -> None:
        """Wait for the engine's first report, because the engine may know of a newer planner than the disk does; then
        connect.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_REPORT_S):
                await self._engine_spoke.wait()
        await stream.run()

    async def _watch_engine(self) -> None:
        told = ""
        while True:
            try:
                async for report in self._reports():
                    told = ""
                    self._do(self._core.on_engine_report(report, self._clock()))
                    self._engine_spoke.set()
            except RefusedError as error:
                if str(error) != told:
                    _log.warning("engine: %s", error)
                told = str(error)
            await asyncio.sleep(0.5)

    async def _watch_devices(self) -> None:
        looked_s = self._clock()
        while True:
            samples = await asyncio.to_thread(self._devices.sample)
            self._do(self._core.on_devices(samples, self._clock()))
            self._metrics.devices_sampled(self._core.devices())
            if self._clock() - looked_s >= INVENTORY_S:
                looked_s = self._clock()
                inventory = await asyncio.to_thread(self._devices.inventory)
                if inventory.digest != self._core.inventory.digest:
                    self._metrics.inventory_found(inventory)
                self._do(self._core.on_inventory(inventory, self._clock()))
            await asyncio.sleep(SAMPLE_S)

    async def _keep_time(self) -> None:
        while True:
            self._woken.clear()
            wait_s = min(max(self._core.next_s() - self._clock(), LEAST_TICK_S), MOST_TICK_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._woken.wait()
                    continue
            actions = self._core.tick(self._clock())
            if actions:
                self._do(actions)
