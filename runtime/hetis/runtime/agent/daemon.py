"""The running agent: it connects core, disk, engine, devices and stream, and carries out the core's actions."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from hetis.engines.versions import Engine
from hetis.runtime.agent.core import AgentCore, AgentIdentity
from hetis.runtime.agent.device_reader import DeviceReader
from hetis.runtime.agent.devices import open_devices
from hetis.runtime.agent.disk import StateDirectory, StateError, machine_boot_id
from hetis.runtime.agent.executor import Executor, SocketExecutor
from hetis.runtime.agent.metrics import AgentMetrics
from hetis.runtime.agent.options import EngineChoice, EngineKind, PlannerAddress, ReconnectBackoff
from hetis.runtime.agent.outbox import Action, Cancel, EndStream, EngineCall, EngineResponse, Persist, Send
from hetis.runtime.agent.pressure import EngineNews, device_reports, replica_report, unreachable_report, watch_engine
from hetis.runtime.agent.replica_state import ReplicaState
from hetis.runtime.agent.stream import PlannerStream
from hetis.runtime.moves.refusals import RefusedError, failure_of, phase_name, reason_name, refusal, unreachable
from hetis.v1.agent_service_pb2 import AgentCapability, ConnectNodeRequest, ConnectNodeResponse
from hetis.v1.change_pb2 import ChangePhase
from hetis.v1.executor_service_pb2 import WatchReportsResponse
from hetis.v1.failure_pb2 import ErrorReason, Failure
from hetis.v1.report_pb2 import DeviceReport

LEAST_REPORT_S = 0.2  # minimum time between two reports from an engine with `ExecutorService`
SCRAPE_S = 2.0
SAMPLE_S = 1.0  # interval between two samples of the devices
INVENTORY_S = 60.0
DRIVER_SILENT_S = 10.0  # devices whose driver has not answered for this long count as unhealthy
LOST_S = 5.0  # an engine that cannot be reached for this long is lost, and with it what it last reported
FIRST_REPORT_S = 3.0  # wait at most this long for the engine's first report before connecting to the planner
LEAST_TICK_S, MOST_TICK_S = 0.005, 1.0
LEAST_REWRITE_S, MOST_REWRITE_S = 1.0, 30.0  # shortest and longest wait before a failed write is repeated
_ASSIGNS = frozenset({AgentCapability.AGENT_CAPABILITY_ASSIGN})
_STEERED = _ASSIGNS | {AgentCapability.AGENT_CAPABILITY_MOVE, AgentCapability.AGENT_CAPABILITY_HEAD_MAP}
_log = logging.getLogger(__name__)
AnswerT = TypeVar("AnswerT")
# A source of the engine's reports: its socket or its metrics. Raises RefusedError when the engine is gone.
Reports = Callable[[], AsyncIterator[WatchReportsResponse]]


def report_of(
    news: EngineNews, held: Sequence[ReplicaState], gpus: Iterable[int], *, engine_id: str
) -> WatchReportsResponse:
    """Return a report on all replicas. A model belongs to the replica whose document names it, or to the only one.

    ``gpus``: indices of the node's devices.
    """
    devices = device_reports(news.readings.values(), gpus)
    report = WatchReportsResponse(engine_id=engine_id, devices=devices)
    assigned = [entry for entry in held if entry.assignment is not None]
    for entry in assigned:
        model = _model_of(entry, news, alone=len(assigned) == 1)
        if news.message or model is None:
            why = news.message or "the engine does not serve a model of that name"
            report.replicas.append(unreachable_report(entry.replica, why))
        else:
            earlier = news.earlier.get(model)
            report.replicas.append(replica_report(entry.replica, news.readings[model], earlier=earlier))
    return report


def _model_of(entry: ReplicaState, news: EngineNews, *, alone: bool) -> str | None:
    assert entry.assignment is not None
    text = entry.assignment.model.content.decode(errors="replace")
    named = [model for model in news.readings if f'"{model}"' in text or f" {model}\n" in text]
    if named:
        return named[0]
    return next(iter(news.readings)) if alone and len(news.readings) == 1 else None


class AgentDaemon:
    """One agent, active while `run` is running."""

    def __init__(
        self,
        core: AgentCore,
        state: StateDirectory,
        executor: Executor | None,
        reports: Reports,
        devices: DeviceReader,
        metrics: AgentMetrics,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._core, self._state, self._executor, self._reports = core, state, executor, reports
        self._devices, self._metrics, self._clock = devices, metrics, clock
        self._calls: dict[int, asyncio.Task[None]] = {}
        self._stream: PlannerStream | None = None
        self._woken, self._engine_reported = asyncio.Event(), asyncio.Event()
        # The write that failed, and all actions that must follow it in order. Empty: everything is on disk.
        self._unwritten: list[Action] = []
        self._write_failed, self._is_written = asyncio.Event(), asyncio.Event()
        self._is_written.set()

    async def run(self, stream: PlannerStream) -> None:
        """Run until cancelled. Nothing unwritten is acknowledged: there is no stream while a write fails."""
        self._stream = stream
        self._metrics.inventory_found(self._core.inventory)
        loops = [self._watch_engine(), self._watch_devices(), self._keep_time(), self._write_again()]
        tasks: list[asyncio.Task[None]] = [asyncio.create_task(loop) for loop in (*loops, self._connect(stream))]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for ended in done:
                await ended
        finally:
            for task in [*tasks, *self._calls.values()]:
                task.cancel()
            await asyncio.gather(*tasks, *self._calls.values(), return_exceptions=True)

    # --- the stream

    async def hello(self) -> ConnectNodeRequest:
        while self._unwritten:
            await self._is_written.wait()
        self._metrics.sent(message := self._core.hello())
        return message

    def received(self, message: ConnectNodeResponse) -> None:
        self._metrics.received(message)
        self._do(self._core.handle(message, self._clock()))
        if message.HasField("welcome") and self._core.is_connected:
            _log.info("connected: epoch %d, session %s", message.epoch, message.welcome.session_id)
            self._metrics.stream_opened(message.epoch)

    def ended(self, reason: str) -> None:
        self._core.stream_ended()
        self._metrics.stream_ended(reason)

    # --- the core's actions

    def _do(self, actions: list[Action]) -> None:
        for action in actions:
            if self._unwritten:
                if not isinstance(action, Send | EndStream):  # the stream has ended
                    self._unwritten.append(action)
                continue
            match action:
                case Persist():
                    try:
                        self._state.write(action.part, action.body)
                    except StateError as error:
                        self._unwritten.append(action)
                        self._end_for_disk(error)
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

    def _end_for_disk(self, error: StateError) -> None:
        """End the stream, because a write failed: what the core holds may be forgotten, so no planner may hear of it.

        The node and its engines continue.
        """
        if self._write_failed.is_set():
            return  # it fails again
        _log.error("%s: no planner is connected until it can be written; the engines continue", error)
        self._write_failed.set()
        self._is_written.clear()
        self._core.stream_ended()
        if self._stream is not None:
            self._stream.end(EndStream(failure_of(ErrorReason.ERROR_REASON_INTERNAL, str(error))))

    def _count(self, message: ConnectNodeRequest) -> None:
        self._metrics.sent(message)
        if message.HasField("nack"):
            self._metrics.delta_refused(reason_name(message.nack.failure))
        if message.HasField("change_status"):
            phase = message.change_status.phase
            if phase in (ChangePhase.CHANGE_PHASE_FLIPPED, ChangePhase.CHANGE_PHASE_ABORTED):
                self._metrics.change_ended(phase_name(phase).lower())

    async def _call(self, call: EngineCall) -> None:
        answer: EngineResponse | Failure
        try:
            if self._executor is None:
                raise refusal(ErrorReason.ERROR_REASON_ENGINE_CANNOT, "this engine is not controlled by the agent")
            async with asyncio.timeout(call.timeout_s):
                answer = await self._executor.call(
                    call.request, lambda copied: self._do(self._core.progressed(call.number, copied, self._clock()))
                )
        except RefusedError as error:
            answer = error.failure
        except TimeoutError:
            answer = unreachable(f"the engine did not answer within {call.timeout_s:g} s")
        except Exception as error:
            _log.exception("a call to the engine failed")
            answer = failure_of(ErrorReason.ERROR_REASON_INTERNAL, f"{type(error).__name__}: {error}")
        if self._calls.pop(call.number, None) is not None:
            self._do(self._core.answered(call.number, answer, self._clock()))

    # --- loops

    async def _connect(self, stream: PlannerStream) -> None:
        """Connect once the engine, which may know of a newer planner than the disk does, has reported or timed out."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_REPORT_S):
                await self._engine_reported.wait()
        await stream.run()

    async def _watch_engine(self) -> None:
        logged, gone_s = "", float("inf")  # since when the engine has not been reached
        while True:
            begun_s, is_answered = self._clock(), False
            try:
                async for report in self._reports():
                    logged, gone_s, is_answered = "", float("inf"), True
                    if self._executor is not None:
                        self._metrics.engine_reached(True)
                    self._do(self._core.on_engine_report(report, self._clock()))
                    self._engine_reported.set()
            except RefusedError as error:
                if str(error) != logged:
                    _log.warning("engine: %s", error)
                logged = str(error)
                self._metrics.engine_reached(False)
                gone_s = min(gone_s, self._clock() if is_answered else begun_s)
            if self._clock() - gone_s >= LOST_S:
                self._do(self._core.on_engine_lost(self._clock()))
            await asyncio.sleep(0.5)

    async def _watch_devices(self) -> None:
        looked_s = self._clock()
        while True:
            self._sampled(await self._from_driver(self._devices.sample()))
            if self._clock() - looked_s >= INVENTORY_S:
                looked_s = self._clock()
                inventory = await self._from_driver(self._devices.inventory())
                if inventory.digest != self._core.inventory.digest:
                    self._metrics.inventory_found(inventory)
                self._do(self._core.on_inventory(inventory, self._clock()))
            await asyncio.sleep(SAMPLE_S)

    async def _from_driver(self, answer: asyncio.Future[AnswerT]) -> AnswerT:
        """Return the driver's answer. From `DRIVER_SILENT_S` until it comes, the devices are reported as unhealthy."""
        try:
            done, _ = await asyncio.wait({answer}, timeout=DRIVER_SILENT_S)
            if not done:
                why = f"the driver has not answered for {DRIVER_SILENT_S:g} s: reboot the node if it does not recover"
                _log.error("devices: %s", why)
                self._sampled([DeviceReport(index=one.index, unhealthy=why) for one in self._core.inventory.devices])
                await answer
                _log.info("devices: the driver answers again")
            return await answer
        finally:
            answer.cancel()

    def _sampled(self, devices: list[DeviceReport]) -> None:
        self._do(self._core.on_devices(devices, self._clock()))
        self._metrics.devices_sampled(self._core.devices())

    async def _write_again(self) -> None:
        """Repeat a write that failed until it succeeds, then do what had to wait for it."""
        while True:
            await self._write_failed.wait()
            wait_s = LEAST_REWRITE_S
            while self._unwritten:
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, MOST_REWRITE_S)
                actions, self._unwritten = self._unwritten, []
                self._do(actions)
            _log.info("the state is written again")
            self._write_failed.clear()
            self._is_written.set()

    async def _keep_time(self) -> None:
        while True:
            self._woken.clear()
            wait_s = min(max(self._core.next_s() - self._clock(), LEAST_TICK_S), MOST_TICK_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._woken.wait()
                    continue
            if actions := self._core.tick(self._clock()):
                self._do(actions)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Everything an agent is made of. ``devices`` is a source for `hetis.runtime.agent.devices.open_devices`."""

    node: str
    address: PlannerAddress
    choice: EngineChoice
    engine_address: str
    state_dir: Path
    devices: str
    metrics: tuple[str, int] | None
    agent_version: str


async def run_agent(parts: Parts) -> None:
    """Run an agent until cancelled. Raises DevicesUnavailableError, StateError or OSError if it cannot start."""
    async with contextlib.AsyncExitStack() as stack:
        state = StateDirectory(parts.state_dir)
        stack.callback(state.close)
        simulated = parts.devices.startswith("simulated:")  # several such nodes share a host
        host_name = parts.node.rpartition("/")[2] if simulated else ""
        devices = DeviceReader(lambda: open_devices(parts.devices, host_name=host_name))
        stack.push_async_callback(devices.close)
        inventory = await devices.start()
        metrics = AgentMetrics(version=parts.agent_version)
        if parts.metrics is not None:
            host, port = parts.metrics
            _log.info("metrics on http://%s:%d/metrics", host, metrics.serve(port, host=host))
            stack.callback(metrics.close)
        executor, engine_address = await _engine(parts, stack)
        steers = _STEERED if executor is not None else frozenset()
        if parts.choice.settings is not None and parts.choice.settings.served_by is not Engine.VLLM_HETIS:
            steers = _ASSIGNS
        core = AgentCore(
            AgentIdentity(
                node=parts.node,
                agent_version=parts.agent_version,
                boot_id=str(uuid.uuid4()),
                capabilities=steers,
                engine_address=engine_address,
                # The monotonic clock survives a restart of the agent but not a reboot.
                clock=machine_boot_id() or f"unknown-{time.time_ns()}",
            ),
            state.read(),
            inventory,
            seed=random.Random(),
        )
        for part, why in core.damaged.items():
            state.set_aside(part, why)
        daemon = AgentDaemon(core, state, executor, _reports(parts, core, executor, metrics), devices, metrics)
        _log.info("agent of %s: %d devices, planner %s", parts.node, len(inventory.devices), parts.address.server)
        await daemon.run(PlannerStream(parts.address, daemon, ReconnectBackoff(random.Random())))


async def _engine(parts: Parts, stack: contextlib.AsyncExitStack) -> tuple[Executor | None, str]:
    """Return the engine that the agent steers (None if it steers none) and the address where it listens for others."""
    executor: Executor
    address = ""
    match parts.choice.kind:
        case EngineKind.SOCKET:
            executor = SocketExecutor(Path(parts.choice.where))
        case EngineKind.LAUNCH:
            from hetis.commands.endpoints import joined
            from hetis.runtime.agent.launched.executor import LaunchExecutor

            settings, node = parts.choice.settings, parts.node.rpartition("/")[2]
            assert settings is not None
            folder = Path(settings.folder) if settings.folder else parts.state_dir / "engines"
            executor = LaunchExecutor(settings, node=node, folder=folder.resolve())
            own = settings.addresses.get(node, "")
            address = joined(own, settings.port) if own else ""
        case _:
            return None, parts.engine_address
    stack.push_async_callback(executor.close)
    return executor, parts.engine_address or address


def _reports(parts: Parts, core: AgentCore, executor: Executor | None, metrics: AgentMetrics) -> Reports:
    if executor is not None:
        return lambda: executor.watch_reports(LEAST_REPORT_S)

    async def scraped() -> AsyncIterator[WatchReportsResponse]:
        url, fails = parts.choice.where, False
        async for news in watch_engine(url, interval_s=SCRAPE_S):
            metrics.engine_scraped(news.state.value, news.age_s(time.monotonic()))
            if news.message and not fails:
                _log.warning("engine: %s", news.message)
            elif fails and not news.message:
                _log.info("engine: its metrics can be read again")
            fails = bool(news.message)
            yield report_of(news, core.held(), [gpu.index for gpu in core.inventory.devices], engine_id=url)

    async def none() -> AsyncIterator[WatchReportsResponse]:
        metrics.engine_reached(True)
        yield WatchReportsResponse()  # so that the agent does not wait for a first report
        await asyncio.Event().wait()

    return none if parts.choice.kind is EngineKind.NONE else scraped
