"""A planner with a fleet of agents, and the rows that describe it."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.measuring.rows import Cell, Row
from benchmarks.measuring.service_agents import ScriptedAgent
from benchmarks.measuring.service_calls import Latencies
from benchmarks.measuring.service_crowd import Crowd, Sending, connect_all
from benchmarks.measuring.service_fleet import CellFleet, cell_fleet
from benchmarks.measuring.service_process import PlannerProcess, Watched, raise_file_limit
from hetis.planner.client import AsyncClient
from hetis.v1 import cluster_pb2, cluster_service_pb2, plan_pb2, plan_service_pb2, replica_pb2

CLUSTER, PLAN = "clusters/cells", "plans/cells"
QUIET_CORES = 0.5
MOST_STOLEN_CORES = 0.02  # above that, the host may cause the latencies, and a row says so
MOST_BETWEEN = 0.1  # share of agents that may be reconnecting, as connections end after half an hour
KEYS = (
    "name",
    "agents",
    "at_once",
    "count",
    "rate_per_s",
    "p50_ms",
    "p99_ms",
    "max_ms",
    "over_empty_p50",
    "over_empty_p99",
    "cores",
    "cpu_us",
    "rss_mib",
    "kb_per_agent",
    "lag_s",
    "load",
    "note",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """The size of the measurements.

    Attributes:
        agents: number of nodes of the fleet, with one agent each.
        idle_s, report_s: duration of one measurement with heartbeats, and with reports.
        rates: reports per second of all agents, tried in order until the planner is saturated.
        beside_rate: reports per second while changes and calls are timed.
        changes: number of changes timed under reports; a fifth as many are timed without.
        calls: number of calls of one kind.
    """

    agents: int = 3000
    idle_s: float = 30.0
    report_s: float = 12.0
    rates: Sequence[float] = (500, 1000, 2000, 3000, 4000, 5000, 6000, 8000, 12_000)
    beside_rate: float = 1000
    changes: int = 100
    calls: int = 2000


class Bench:
    """All running parts, made by `opened`; agents are not connected yet.

    Attributes:
        engine_cell, planner_cell: agents of this process, the primary's first: those of a replica whose engine decides
            its head map, and those of one whose head map the planner decides.
        empty: latencies of empty calls, by the number in progress at once.
        base_bytes: memory of the planner before the first agent.
    """

    def __init__(
        self, planner: PlannerProcess, client: AsyncClient, crowd: Crowd, fleet: CellFleet, extent: Extent
    ) -> None:
        self.planner, self.client, self.crowd, self.fleet, self.extent = planner, client, crowd, fleet, extent
        self._num_gpus = {cell[0]: 2 for cell in fleet.cells}
        self.engine_cell = self._agents(fleet.cells[0], has_head_map=True)
        self.planner_cell = self._agents(fleet.cells[1], has_head_map=False)
        self.empty: dict[int, Latencies] = {}
        self.base_bytes = planner.rss_bytes()
        self._sending: asyncio.Task[None] | None = None

    def _agents(self, nodes: Sequence[str], *, has_head_map: bool) -> list[ScriptedAgent]:
        return [
            ScriptedAgent(CLUSTER, node, num_gpus=self._num_gpus.get(node, 1), has_head_map=has_head_map)
            for node in nodes
        ]

    # --- the fleet

    async def create_cluster(self) -> None:
        policy = cluster_pb2.ClusterPolicy()
        policy.redispatch_interval.FromMilliseconds(100)
        cluster = cluster_pb2.Cluster(document=self.fleet.cluster, policy=policy)
        cluster_id = CLUSTER.partition("/")[2]
        request = cluster_service_pb2.CreateClusterRequest(cluster_id=cluster_id, cluster=cluster)
        await self.client.clusters.CreateCluster(request)
        await self.until_quiet(cores=0.05)
        self.base_bytes = self.planner.rss_bytes()

    async def connect(self) -> float:
        """Connect all agents, and return the seconds that those of the other process took."""
        here = [*self.engine_cell, *self.planner_cell]
        ids = {agent.node for agent in here}
        everywhere = [*(node for cell in self.fleet.cells for node in cell), *self.fleet.spare]
        there = [(node, self._num_gpus.get(node, 1)) for node in everywhere if node not in ids]
        await connect_all(here, self.planner.address)
        self._sending = asyncio.create_task(Sending(here).run())
        return await asyncio.to_thread(self.crowd.connect, self.planner.address, CLUSTER, there)

    async def activate(self) -> float:
        """Activate the plan, and return the seconds until every replica serves."""
        plan = plan_pb2.Plan(cluster=CLUSTER, imported=self.fleet.plan)
        plan_id = PLAN.partition("/")[2]
        await self.client.plans.CreatePlan(plan_service_pb2.CreatePlanRequest(plan_id=plan_id, plan=plan))
        began_s = time.monotonic()
        await self.client.plans.ActivatePlan(plan_service_pb2.ActivatePlanRequest(name=PLAN))
        while True:
            found = (await self.client.plans.GetPlan(plan_service_pb2.GetPlanRequest(name=PLAN))).plan
            if found.activation == plan_pb2.ACTIVATION_STATE_ACTIVE:
                return time.monotonic() - began_s
            if found.activation == plan_pb2.ACTIVATION_STATE_FAILED:
                raise RuntimeError(f"the plan cannot be activated: {found.activation_progress.failure}")
            await asyncio.sleep(0.1)

    async def replica_at(self, primary: str) -> replica_pb2.Replica:
        async for replica in self.client.list_replicas(CLUSTER, page_size=500):
            if replica.primary_node == primary:
                return replica
        raise LookupError(f"no replica has its primary on {primary}")

    async def set_rate(self, reports_per_s: float) -> None:
        """Set the rate of the agents in the other process."""
        await asyncio.to_thread(self.crowd.set_rate, reports_per_s)

    async def behind(self) -> tuple[float, float]:
        """Return how many reports the planner has taken so far, and how many sent ones it has not."""
        counts = await asyncio.to_thread(self.crowd.counts)
        there = self.extent.agents - len(self.engine_cell) - len(self.planner_cell)
        if counts.connected < there * (1 - MOST_BETWEEN):
            raise RuntimeError(f"only {counts.connected} agents are still connected: {self.planner.log()[-2000:]}")
        taken = await asyncio.to_thread(self.planner.messages, "report")
        return taken, max(0.0, counts.sent - taken)

    async def until_quiet(self, *, cores: float = QUIET_CORES, most_s: float = 60.0) -> None:
        """Wait until the planner has finished its work."""
        end_s = time.monotonic() + most_s
        while time.monotonic() < end_s:
            with Watched(self.planner) as watched:
                await asyncio.sleep(0.5)
            if watched.cores < cores:
                return

    async def close(self) -> None:
        if self._sending is not None:
            self._sending.cancel()
            await asyncio.gather(self._sending, return_exceptions=True)
        for agent in (*self.engine_cell, *self.planner_cell):
            await agent.close()

    # --- rows

    def row(self, name: str, **cells: Cell) -> Row:
        """Return a row with all keys, so that the rows make one table."""
        row: dict[str, Cell] = dict.fromkeys(KEYS)
        row |= {"name": name, "agents": self.extent.agents, "load": os.getloadavg()[0], "note": ""}
        assert cells.keys() <= row.keys(), f"a row has no {cells.keys() - row.keys()}"
        return row | cells

    def memory(self) -> dict[str, Cell]:
        """Return the planner's present memory."""
        found = self.planner.rss_bytes()
        return {"rss_mib": found / 2**20, "kb_per_agent": (found - self.base_bytes) / self.extent.agents / 1e3}

    def latency_row(
        self, name: str, found: Latencies, *, at_once: int, watched: Watched | None = None, note: str = ""
    ) -> Row:
        empty = self.empty.get(at_once)
        notes = [note] if note else []
        if found.failures:
            notes.append(f"{len(found.failures)} failed, the first: {found.failures[0]}")
        if watched is not None and watched.stolen_cores > MOST_STOLEN_CORES:
            notes.append(f"the host kept {watched.stolen_cores:.2f} cores from this machine")
        return self.row(
            name,
            at_once=at_once,
            count=len(found.seconds),
            rate_per_s=found.per_s,
            **percentiles(found.seconds),
            over_empty_p50=found.ms(50) / empty.ms(50) if empty else None,
            over_empty_p99=found.ms(99) / empty.ms(99) if empty else None,
            cores=watched.cores if watched else None,
            cpu_us=1e6 * watched.cpu_s / len(found.seconds) if watched else None,
            note="; ".join(notes),
        )


def percentiles(seconds: Sequence[float]) -> dict[str, Cell]:
    """Return ``p50_ms``, ``p99_ms`` and ``max_ms``."""
    return {
        "p50_ms": 1e3 * float(np.median(seconds)),
        "p99_ms": 1e3 * float(np.percentile(seconds, 99)),
        "max_ms": 1e3 * max(seconds),
    }


@asynccontextmanager
async def opened(extent: Extent, profile: Path | None) -> AsyncIterator[Bench]:
    """Yield a planner that has just started and a process for agents; both are stopped at the end."""
    fleet = cell_fleet(extent.agents)
    most_files = raise_file_limit()
    if most_files < extent.agents + 100:
        raise RuntimeError(f"{extent.agents} agents need as many files, and {most_files} are allowed: ulimit -Hn")
    async with AsyncExitStack() as stack:
        planner = stack.enter_context(PlannerProcess(profile=profile))
        client = await stack.enter_async_context(AsyncClient(planner.address))
        crowd = stack.enter_context(Crowd())
        bench = Bench(planner, client, crowd, fleet, extent)
        stack.push_async_callback(bench.close)
        yield bench
