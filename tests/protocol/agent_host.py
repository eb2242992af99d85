"""An agent process in virtual time: the real daemon, stream, core and disk, which can be killed at any write."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hetis.runtime.agent.core import AgentCore, AgentIdentity
from hetis.runtime.agent.daemon import LEAST_REPORT_S, AgentDaemon
from hetis.runtime.agent.devices import Devices, SimulatedDevices
from hetis.runtime.agent.disk import StateDirectory
from hetis.runtime.agent.metrics import AgentMetrics
from hetis.runtime.agent.options import ReconnectBackoff
from hetis.runtime.agent.stream import PlannerStream
from hetis.v1.agent_service_pb2 import AgentCapability
from hetis.v1.inventory_pb2 import NodeInventory
from hetis.v1.report_pb2 import DeviceReport
from tests.planner.fleet.samples import CLUSTER
from tests.protocol.engine_host import EngineHost
from tests.protocol.transport import Address, Network, Way

STEERED = frozenset(
    {
        AgentCapability.AGENT_CAPABILITY_ASSIGN,
        AgentCapability.AGENT_CAPABILITY_MOVE,
        AgentCapability.AGENT_CAPABILITY_HEAD_MAP,
    }
)


class MortalState(StateDirectory):
    """The real directory; an agent can die before or after one of its writes."""

    dies_at: int | None = None
    dies_after = False
    is_dead = False
    num_writes = 0
    died: Callable[[], None]

    def write(self, name: str, body: bytes | None) -> None:
        if self.is_dead:
            return
        number, self.num_writes = self.num_writes, self.num_writes + 1
        if self.dies_at is not None and number >= self.dies_at:
            if self.dies_after:
                super().write(name, body)
            self.is_dead = True
            self.died()
            return
        super().write(name, body)


class PromptReader:
    """Reads the devices at once: in virtual time, a thread would answer after every time limit."""

    def __init__(self, devices: Devices) -> None:
        self._devices = devices

    def sample(self) -> asyncio.Future[list[DeviceReport]]:
        answer = asyncio.get_running_loop().create_future()
        answer.set_result(self._devices.sample())
        return answer

    def inventory(self) -> asyncio.Future[NodeInventory]:
        answer = asyncio.get_running_loop().create_future()
        answer.set_result(self._devices.inventory())
        return answer


class AgentHost:
    """One node's agent. After a kill it has no visible effects.

    Attributes:
        engine_address: the engine address that it reports.
    """

    def __init__(
        self, node: str, folder: Path, network: Network, engine: EngineHost, seed: random.Random, now: Any
    ) -> None:
        self.node, self.folder, self.engine, self._now = node, folder, engine, now
        self._network, self._seed = network, seed
        self.engine_address = node
        self.its_words_arrive = False
        self.is_dead = True
        self.start()

    def start(self) -> None:
        """Start a new process with the present files."""
        assert self.is_dead
        self.state = MortalState(self.folder)
        self.state.died = self.kill
        devices = SimulatedDevices.parse("L4:1", host_name=self.node)
        self.core = AgentCore(
            AgentIdentity(
                node=f"{CLUSTER}/nodes/{self.node}",
                agent_version="1.0",
                boot_id=str(uuid.uuid4()),
                capabilities=STEERED,
                engine_address=self.engine_address,
                clock="this boot",
            ),
            self.state.read(),
            devices.inventory(),
            seed=self._seed,
        )
        assert not self.core.damaged, self.core.damaged
        executor = _Guarded(self.engine, self.state)
        daemon = AgentDaemon(
            self.core,
            self.state,
            executor,
            lambda: executor.watch_reports(LEAST_REPORT_S),
            PromptReader(devices),  # type: ignore[arg-type]
            AgentMetrics(version="1.0"),
            clock=self._now,
        )
        address = Address(self._network, self.node)
        self._stream = PlannerStream(address, daemon, ReconnectBackoff(self._seed))  # type: ignore[arg-type]
        self.is_dead = False
        self._running = asyncio.get_running_loop().create_task(daemon.run(self._stream), name=f"agent of {self.node}")

    def kill(self) -> None:
        """Kill it as by -9, at once. Messages that it has sent arrive if ``its_words_arrive``."""
        if self.is_dead:
            return
        wire = self._network.wires.get(self.node)
        while wire is not None and self.its_words_arrive and not self._stream._outgoing.empty():
            wire.carry(Way.UP, self._stream._outgoing.get_nowait())
        self.is_dead = self.state.is_dead = True
        self.state.close()
        if wire is not None:
            wire.cut(arrives=[Way.UP] if self.its_words_arrive else [])
        asyncio.get_running_loop().call_soon(self._running.cancel)


class _Guarded:
    """The engine's executor, for as long as the agent lives."""

    def __init__(self, engine: EngineHost, state: MortalState) -> None:
        self._engine, self._state = engine, state

    def __getattr__(self, name: str) -> Any:
        if self._state.is_dead:
            raise asyncio.CancelledError
        return getattr(self._engine, name)
