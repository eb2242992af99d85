"""Most agents of a fleet, in a process of their own: this module, which reads lines of JSON and answers on stdout."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.measuring.scripted_agent import ScriptedAgent
from benchmarks.measuring.service_planner import ROOT, raise_file_limit

CONNECTING_AT_ONCE = 32
WRITING_AT_ONCE = 64
TURN_S = 0.02  # between two checks for due reports
MOST_BEHIND_S = 0.5  # backlog beyond which due reports are dropped


@dataclass(frozen=True, slots=True, kw_only=True)
class CrowdCounts:
    """Counts since the crowd began.

    Attributes:
        connected: number of agents whose stream is open.
        sent: number of reports that gRPC took.
        cpu_s: CPU time of the crowd's process.
    """

    connected: int
    sent: int
    cpu_s: float


class Crowd:
    """The handle of the crowd's process, a context manager."""

    def __enter__(self) -> Crowd:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def connect(self, address: str, cluster: str, nodes: Sequence[tuple[str, int]], *, token: str = "") -> float:
        """Connect an agent for each node (id, number of GPUs), and return the seconds that it took."""
        nodes = list(nodes)
        return float(self._say({"address": address, "token": token, "cluster": cluster, "nodes": nodes})["seconds"])

    def set_rate(self, reports_per_s: float, *, agents: int | None = None) -> None:
        """Set the rate of the reports of all agents, or of the first ``agents``, sent in turn.

        Agents that are silent for long send heartbeats, too.
        """
        self._say({"rate": reports_per_s, "reporting": agents})

    def counts(self) -> CrowdCounts:
        return CrowdCounts(**self._say({}))

    def _say(self, message: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(message), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the process of the agents has ended")
        return json.loads(line)


class Sending:
    """Sends reports of agents in turn at a rate, and heartbeats of silent agents."""

    def __init__(self, agents: Sequence[ScriptedAgent]) -> None:
        self.agents = agents
        self.rate_per_s = 0.0
        self.num_reporting = len(agents)
        self._due = asyncio.Queue[ScriptedAgent]()
        self._owed = 0.0
        self._turn = 0
        self._beats = {agent.node: agent.next_heartbeat_s() for agent in agents}

    async def run(self) -> None:
        """Send until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(WRITING_AT_ONCE):
                tasks.create_task(self._write())
            tasks.create_task(self._beat())
            then_s = time.monotonic()
            while True:
                await asyncio.sleep(TURN_S)
                now_s = time.monotonic()
                most = MOST_BEHIND_S * self.rate_per_s - self._due.qsize()
                self._owed = min(self._owed + (now_s - then_s) * self.rate_per_s, max(0.0, most))
                then_s = now_s
                while self._owed >= 1:
                    self._owed -= 1
                    self._due.put_nowait(self.agents[self._turn % self.num_reporting])
                    self._turn += 1

    async def _write(self) -> None:
        while True:
            agent = await self._due.get()
            if agent.is_connected:
                await agent.report()

    async def _beat(self) -> None:
        while True:
            now_s = time.monotonic()
            for agent in self.agents:
                if now_s >= self._beats[agent.node]:
                    if agent.is_connected and agent.sent_s + 0.85 * agent.heartbeat_s <= now_s:
                        await agent.heartbeat()
                    self._beats[agent.node] = agent.next_heartbeat_s()
            await asyncio.sleep(10 * TURN_S)


async def connect_all(agents: Iterable[ScriptedAgent], address: str, token: str = "") -> None:
    """Connect the agents, some at once."""
    waiting = iter(agents)

    async def connect() -> None:
        for agent in waiting:
            await agent.connect(address, token=token)

    await asyncio.gather(*(connect() for _ in range(CONNECTING_AT_ONCE)))


async def _serve() -> None:
    loop = asyncio.get_running_loop()
    agents: list[ScriptedAgent] = []
    sending: Sending | None = None
    task: asyncio.Task[None] | None = None
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        message = json.loads(line)
        if "nodes" in message:
            agents = [ScriptedAgent(message["cluster"], node, num_gpus=gpus) for node, gpus in message["nodes"]]
            began_s = time.monotonic()
            sending = Sending(agents)
            task = asyncio.create_task(sending.run())  # heartbeats begin with the connection
            await connect_all(agents, message["address"], message["token"])
            answer = {"seconds": time.monotonic() - began_s}
        elif "rate" in message:
            assert sending is not None
            sending.rate_per_s = message["rate"]
            sending.num_reporting = min(message["reporting"] or len(agents), len(agents))
            answer = {}
        else:
            answer = {
                "connected": sum(agent.is_connected for agent in agents),
                "sent": sum(agent.num_sent for agent in agents),
                "cpu_s": time.process_time(),
            }
        if task is not None and task.done():
            task.result()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    raise_file_limit()
    asyncio.run(_serve())
