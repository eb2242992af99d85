"""The process around the core: its counters, and what it makes of a driver that hangs and of a full disk."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hetis.runtime.agent import daemon
from hetis.runtime.agent.core import AgentCore, AgentIdentity
from hetis.runtime.agent.daemon import LEAST_REPORT_S, AgentDaemon
from hetis.runtime.agent.device_reader import DeviceReader
from hetis.runtime.agent.devices import Devices, SimulatedDevices
from hetis.runtime.agent.disk import StateDirectory, StateError
from hetis.runtime.agent.metrics import AgentMetrics
from hetis.runtime.agent.options import EngineChoice, EngineKind, PlannerAddress, ReconnectBackoff
from hetis.runtime.agent.pressure import EngineNews, Scrape, ScrapeState
from hetis.runtime.agent.stream import PlannerStream
from hetis.v1.executor_service_pb2 import ApplyAssignmentRequest, WatchReportsResponse
from hetis.v1.inventory_pb2 import NodeInventory
from hetis.v1.report_pb2 import DeviceReport
from tests.runtime.agent.builders import NODE, STEERED, Planner
from tests.runtime.agent.planner_double import WAIT_S, PlannerDouble
from tests.runtime.agent.recording import RecordingExecutor


class HangingDevices:
    """Devices whose driver hangs while ``answers`` is not set."""

    def __init__(self) -> None:
        self.answers = threading.Event()
        self.answers.set()
        self._devices = SimulatedDevices.parse("L4:2")

    def inventory(self) -> NodeInventory:
        return self._devices.inventory()

    def sample(self) -> list[DeviceReport]:
        self.answers.wait()
        return self._devices.sample()

    def close(self) -> None:
        self.answers.wait()


@contextlib.asynccontextmanager
async def agent(
    planner: PlannerDouble, folder: Path, devices: Devices, executor: RecordingExecutor
) -> AsyncIterator[AgentMetrics]:
    """Run an agent whose engine is ``executor``."""
    reader, metrics, state = DeviceReader(lambda: devices), AgentMetrics(version="0"), StateDirectory(folder)
    identity = AgentIdentity(node=NODE + "p", agent_version="0", boot_id="b", capabilities=STEERED)
    core = AgentCore(identity, state.read(), await reader.start(), seed=random.Random(0))
    process = AgentDaemon(core, state, executor, lambda: executor.watch_reports(LEAST_REPORT_S), reader, metrics)
    address = PlannerAddress(server=planner.address, is_plain=True)
    stream = PlannerStream(address, process, ReconnectBackoff(random.Random(0)))
    running = asyncio.create_task(process.run(stream))
    try:
        yield metrics
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await reader.close()
        state.close()


def gauge(metrics: AgentMetrics, name: str, index: str) -> float | None:
    return metrics.registry.get_sample_value(f"hetis_agent_{name}", {"index": index, "gpu_type": "L4"})


async def test_gauges_of_kv_are_what_the_engine_says_until_it_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hetis.runtime.agent.daemon.LOST_S", 0.2)
    executor = RecordingExecutor()
    kv = DeviceReport(index=1, total_blocks=1000, used_blocks=40)
    executor.reports.put_nowait(WatchReportsResponse(engine_id="e", devices=[kv]))
    async with (
        PlannerDouble() as planner,
        agent(planner, tmp_path, SimulatedDevices.parse("L4:2"), executor) as metrics,
    ):
        async with asyncio.timeout(WAIT_S):
            while gauge(metrics, "device_kv_blocks_used", "1") != 40:
                await asyncio.sleep(0.05)
        assert metrics.registry.get_sample_value("hetis_agent_engine_connected") == 1
        assert gauge(metrics, "device_kv_blocks", "1") == 1000
        assert gauge(metrics, "device_kv_blocks", "0") == 0
        assert gauge(metrics, "device_healthy", "1") == 1
        executor.reports.put_nowait(None)
        async with asyncio.timeout(WAIT_S):
            while gauge(metrics, "device_kv_blocks", "1"):
                await asyncio.sleep(0.05)
        assert metrics.registry.get_sample_value("hetis_agent_engine_connected") == 0


async def test_devices_whose_driver_hangs_are_unhealthy_until_it_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hetis.runtime.agent.daemon.DRIVER_SILENT_S", 0.5)
    monkeypatch.setattr("hetis.runtime.agent.daemon.SAMPLE_S", 0.05)
    devices = HangingDevices()
    async with PlannerDouble() as planner, agent(planner, tmp_path, devices, RecordingExecutor()) as metrics:
        await planner.until(lambda message: bool(message.report.devices))
        devices.answers.clear()
        told = await planner.until(lambda message: any(one.unhealthy for one in message.report.devices))
        silent = "the driver has not answered for 0.5 s: reboot the node if it does not recover"
        assert [one.unhealthy for one in told.report.devices] == [silent, silent]
        assert gauge(metrics, "device_healthy", "1") == 0
        devices.answers.set()
        since = planner.heard.index(told)
        told = await planner.until(
            lambda message: len(message.report.devices) == 2 and not message.report.devices[0].unhealthy, since=since
        )
        assert told.report.devices[1].unhealthy == ""
        assert gauge(metrics, "device_healthy", "1") == 1


async def test_what_the_disk_refuses_is_neither_done_nor_told_until_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("hetis.runtime.agent.daemon.LEAST_REWRITE_S", 0.05)
    monkeypatch.setattr("hetis.runtime.agent.daemon.MOST_REWRITE_S", 0.1)
    write, written, refused, is_full = StateDirectory.write, set[str](), asyncio.Queue[str](), False

    def write_if_not_full(self: StateDirectory, name: str, body: bytes | None) -> None:
        if is_full:
            refused.put_nowait(name)
            raise StateError(f"state file {name}: No space left on device")
        write(self, name, body)
        written.add(name)

    monkeypatch.setattr(StateDirectory, "write", write_if_not_full)
    executor, say = RecordingExecutor(), Planner()
    async with PlannerDouble() as planner, agent(planner, tmp_path, SimulatedDevices(), executor):
        await planner.connected(1)
        while "node" not in written:  # what the planner says of the node when it connects
            await asyncio.sleep(0)
        is_full = True
        planner.send(assign := say.assign())
        executor.reports.put_nowait(WatchReportsResponse(engine_id="e"))
        for _ in range(10):
            assert await refused.get() == assign.delta.replica
        assert planner.hellos == 1
        assert not executor.asked
        assert not any(message.HasField("ack") for message in planner.heard)
        is_full = False
        await planner.connected(2)
        (held,) = [message for message in planner.heard if message.HasField("hello")][1].hello.replicas
        assert held.generation == 1
        assert [type(request) for request in executor.asked] == [ApplyAssignmentRequest]
        planner.send(assign)
        await planner.until(lambda message: message.ack.nonce == assign.delta.nonce)
    said = [record.getMessage() for record in caplog.records if record.name == "hetis.runtime.agent.daemon"]
    assert len([line for line in said if "No space left on device: no planner is connected until" in line]) == 1


async def test_an_engine_whose_metrics_cannot_be_read_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    read, failed = Scrape(state=ScrapeState.READ), Scrape(state=ScrapeState.UNREACHABLE, message="nobody listens")

    async def watched(*_: object, **__: object) -> AsyncIterator[EngineNews]:
        for taken in (failed, failed, read, read, failed):
            yield EngineNews().after(taken, 1.0)

    monkeypatch.setattr(daemon, "watch_engine", watched)
    choice = EngineChoice(kind=EngineKind.VLLM, where="http://localhost:1/metrics")
    core = AgentCore(
        AgentIdentity(node=NODE + "p", agent_version="0", boot_id="b", capabilities=STEERED),
        {}, SimulatedDevices.parse("L4:1").inventory(), seed=random.Random(0),
    )  # fmt: skip
    parts: Any = SimpleNamespace(choice=choice)
    with caplog.at_level("INFO"):
        reports = [one async for one in daemon._reports(parts, core, None, AgentMetrics(version="0"))()]
    assert len(reports) == 5
    said = "engine: nobody listens"
    assert caplog.messages == [said, "engine: its metrics can be read again", said]
