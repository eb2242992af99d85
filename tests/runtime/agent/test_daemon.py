"""The process around the core and its counters."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from hetis.runtime.agent.core import AgentCore, AgentIdentity
from hetis.runtime.agent.daemon import LEAST_REPORT_S, AgentDaemon
from hetis.runtime.agent.devices import SimulatedDevices
from hetis.runtime.agent.disk import StateDirectory
from hetis.runtime.agent.metrics import AgentMetrics
from hetis.runtime.agent.options import PlannerAddress, ReconnectBackoff
from hetis.runtime.agent.stream import PlannerStream
from hetis.v1.executor_service_pb2 import WatchReportsResponse
from hetis.v1.report_pb2 import DeviceReport
from tests.runtime.agent.builders import NODE, STEERED
from tests.runtime.agent.planner_double import WAIT_S, PlannerDouble
from tests.runtime.agent.recording import RecordingExecutor


async def test_gauges_of_kv_are_what_the_engine_says_until_it_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hetis.runtime.agent.daemon.LOST_S", 0.2)
    devices = SimulatedDevices.parse("L4:2")
    identity = AgentIdentity(node=NODE + "p", agent_version="0", boot_id="b", capabilities=STEERED)
    core = AgentCore(identity, {}, devices.inventory(), seed=random.Random(0))
    metrics, executor, state = AgentMetrics(version="0"), RecordingExecutor(), StateDirectory(tmp_path)
    kv = DeviceReport(index=1, total_blocks=1000, used_blocks=40)
    executor.reports.put_nowait(WatchReportsResponse(engine_id="e", devices=[kv]))
    async with PlannerDouble() as planner:
        daemon = AgentDaemon(core, state, executor, lambda: executor.watch_reports(LEAST_REPORT_S), devices, metrics)
        address = PlannerAddress(server=planner.address, is_plain=True)
        running = asyncio.create_task(daemon.run(PlannerStream(address, daemon, ReconnectBackoff(random.Random(0)))))

        def gauge(name: str, index: str) -> float | None:
            labels = {"index": index, "gpu_type": "L4"}
            return metrics.registry.get_sample_value(f"hetis_agent_{name}", labels)

        async with asyncio.timeout(WAIT_S):
            while gauge("device_kv_blocks_used", "1") != 40:
                await asyncio.sleep(0.05)
        assert metrics.registry.get_sample_value("hetis_agent_engine_connected") == 1
        assert gauge("device_kv_blocks", "1") == 1000
        assert gauge("device_kv_blocks", "0") == 0
        assert gauge("device_healthy", "1") == 1
        executor.reports.put_nowait(None)
        async with asyncio.timeout(WAIT_S):
            while gauge("device_kv_blocks", "1"):
                await asyncio.sleep(0.05)
        assert metrics.registry.get_sample_value("hetis_agent_engine_connected") == 0
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    state.close()
