"""Builds an agent from its options and shuts it down again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from hetis.runtime.agent.connecting import PlannerAddress, ReconnectBackoff
from hetis.runtime.agent.core import AgentCore, AgentIdentity, new_boot_id
from hetis.runtime.agent.daemon import AgentDaemon
from hetis.runtime.agent.devices import open_devices
from hetis.runtime.agent.disk import StateDirectory, machine_boot_id
from hetis.runtime.agent.executor import Executor, SocketExecutor
from hetis.runtime.agent.metrics import AgentMetrics
from hetis.runtime.agent.options import EngineChoice, EngineKind
from hetis.runtime.agent.sources import Reports, executor_reports, scraped_reports
from hetis.runtime.agent.stream import PlannerStream
from hetis.v1.agent_service_pb2 import AgentCapability
from hetis.v1.executor_service_pb2 import WatchReportsResponse

_STEERED = frozenset(
    {
        AgentCapability.AGENT_CAPABILITY_ASSIGN,
        AgentCapability.AGENT_CAPABILITY_MOVE,
        AgentCapability.AGENT_CAPABILITY_HEAD_MAP,
    }
)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Everything an agent is made of. ``devices`` is a source for `hetis.runtime.agent.devices.open_devices`."""

    node: str
    address: PlannerAddress
    choice: EngineChoice
    engine_address: str
    state_dir: Path
    devices: str
    control: Path | None
    seed: int
    peer_address: str
    metrics: tuple[str, int] | None
    agent_version: str


async def run_agent(parts: Parts, waiting: ReconnectBackoff) -> None:
    """Run an agent until it is cancelled.

    Raises:
        DevicesUnavailableError, StateError, OSError: the agent cannot start or cannot continue.
    """
    async with contextlib.AsyncExitStack() as stack:
        state = StateDirectory(parts.state_dir)
        stack.callback(state.close)
        simulated = parts.devices.startswith("simulated:")  # several such nodes share a host
        devices = open_devices(parts.devices, host_name=parts.node.rpartition("/")[2] if simulated else "")
        stack.callback(devices.close)
        inventory = devices.inventory()
        metrics = AgentMetrics(version=parts.agent_version)
        if parts.metrics is not None:
            host, port = parts.metrics
            _log.info("metrics on http://%s:%d/metrics", host, metrics.serve(port, host=host))
            stack.callback(metrics.close)
        executor, engine_address = await _engine(parts, len(inventory.devices), stack)
        core = AgentCore(
            AgentIdentity(
                node=parts.node,
                agent_version=parts.agent_version,
                boot_id=new_boot_id(),
                capabilities=_capabilities(parts.choice, executor),
                engine_address=engine_address,
                clock=_clock_name(),
            ),
            state.read(),
            inventory,
            seed=random.Random(),
        )
        for part, why in core.damaged.items():
            state.set_aside(part, why)
        daemon = AgentDaemon(core, state, executor, _reports(parts, core, executor, metrics), devices, metrics)
        _log.info("agent of %s: %d devices, planner %s", parts.node, len(inventory.devices), parts.address.server)
        await daemon.run(PlannerStream(parts.address, daemon, waiting))


async def run_engine(node: str, devices: str, socket: Path, control: Path | None, seed: int, peer_address: str) -> None:
    """Run a simulated engine until it is cancelled."""
    from hetis.runtime.agent.devices import discover
    from hetis.runtime.agent.simulated.admission import best_admission
    from hetis.runtime.agent.simulated.control import ControlFile
    from hetis.runtime.agent.simulated.engine import SimulatedEngine
    from hetis.runtime.agent.simulated.server import SimulatedServer

    engine = SimulatedEngine(
        node.rpartition("/")[2], len(discover(devices).devices), seed=seed, admission=best_admission()
    )
    server = SimulatedServer(
        engine, socket, peer_address=peer_address, control=ControlFile(control) if control else None
    )
    try:
        await server.start()
        _log.info("simulated engine of %s on %s, other engines on %s", node, socket, server.address)
        await server.wait()
    finally:
        await server.close()


async def _engine(parts: Parts, num_devices: int, stack: contextlib.AsyncExitStack) -> tuple[Executor | None, str]:
    """Return the engine that the agent steers (None if it steers none) and the address where it listens for others."""
    match parts.choice.kind:
        case EngineKind.SOCKET:
            executor = SocketExecutor(Path(parts.choice.where))
            stack.push_async_callback(executor.close)
            return executor, parts.engine_address
        case EngineKind.SIMULATED:
            from hetis.runtime.agent.simulated.admission import best_admission
            from hetis.runtime.agent.simulated.control import ControlFile
            from hetis.runtime.agent.simulated.engine import SimulatedEngine
            from hetis.runtime.agent.simulated.server import SimulatedServer

            node = parts.node.rpartition("/")[2]
            admission = best_admission()
            _log.info("simulated engine: admission by %s", type(admission).__name__)
            engine = SimulatedEngine(node, num_devices, seed=parts.seed, admission=admission)
            control = ControlFile(parts.control) if parts.control else None
            socket = parts.state_dir / "engine.sock"
            server = SimulatedServer(engine, socket, peer_address=parts.peer_address, control=control)
            await server.start()
            stack.push_async_callback(server.close)
            executor = SocketExecutor(socket)
            stack.push_async_callback(executor.close)
            return executor, parts.engine_address or server.address
        case EngineKind.LAUNCH:
            from hetis.engines.serving import joined
            from hetis.runtime.agent.launched.executor import LaunchExecutor

            settings, node = parts.choice.settings, parts.node.rpartition("/")[2]
            assert settings is not None
            folder = Path(settings.folder) if settings.folder else parts.state_dir / "engines"
            launched = LaunchExecutor(settings, node=node, folder=folder.resolve())
            stack.push_async_callback(launched.close)
            own = settings.addresses.get(node, "")
            return launched, parts.engine_address or (joined(own, settings.port) if own else "")
    return None, parts.engine_address


def _capabilities(choice: EngineChoice, executor: Executor | None) -> frozenset[AgentCapability.ValueType]:
    if choice.kind is EngineKind.LAUNCH:
        return frozenset({AgentCapability.AGENT_CAPABILITY_ASSIGN})
    return _STEERED if executor is not None else frozenset()


def _reports(parts: Parts, core: AgentCore, executor: Executor | None, metrics: AgentMetrics) -> Reports:
    if executor is not None:
        return executor_reports(executor)
    if parts.choice.kind is EngineKind.NONE:
        return _no_reports
    return scraped_reports(
        parts.choice.where,
        core.held,
        len(core.inventory.devices),
        told=lambda news, age_s: metrics.engine_scraped(news.state.value, age_s),
    )


async def _no_reports() -> AsyncIterator[WatchReportsResponse]:
    """Yield one empty report without an engine, so that the agent does not wait for one."""
    yield WatchReportsResponse()
    await asyncio.Event().wait()


def _clock_name() -> str:
    """Return a name for the monotonic clock, which survives a restart of the agent but not a reboot."""
    return machine_boot_id() or f"unknown-{time.time_ns()}"
