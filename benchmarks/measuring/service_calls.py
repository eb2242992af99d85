"""A planner with a fleet of agents, latencies of unary calls, one after another or several at once, and of changes.

A change is a re-dispatch, from the report that shows the need to its end. Scripted engines act at once, so what remains
is the time of the planner and the network. The replica is one cell: a primary and eight attention workers, hence nine
agents. For every sample, new requests replace those of its head map, and every third of them has its head groups on the
eight workers.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np

from benchmarks.measuring.rows import Cell, Row
from benchmarks.measuring.scripted_agent import ScriptedAgent, balanced_owners, request_of
from benchmarks.measuring.service_crowd import Crowd, Sending, connect_all
from benchmarks.measuring.service_planner import CellFleet, PlannerProcess, Watched, cell_fleet, raise_file_limit
from examples.simulated_engine.stage import StageRun
from hetis.planner.client import AsyncClient, CallError
from hetis.v1 import (
    agent_service_pb2,
    cluster_pb2,
    cluster_service_pb2,
    plan_pb2,
    plan_service_pb2,
    redispatch_pb2,
)

Call = Callable[[list[float]], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Latencies:
    """Latencies of calls.

    Attributes:
        seconds: seconds of each call.
        total_s: from the start of the first call to the end of the last.
        failures: errors of the calls that have no seconds.
        began_s: start of each call by the monotonic clock, if `paced` made them.
    """

    seconds: Sequence[float]
    total_s: float
    failures: Sequence[CallError] = ()
    began_s: Sequence[float] = ()

    @property
    def per_s(self) -> float:
        return len(self.seconds) / self.total_s

    def ms(self, percent: float) -> float:
        return 1e3 * float(np.percentile(self.seconds, percent))


async def timed(call: Call, *, count: int, at_once: int) -> Latencies:
    """Make ``count`` calls, ``at_once`` at a time; each call appends its seconds to the list that it is given."""
    left = iter(range(count))
    seconds = list[float]()

    async def lane() -> None:
        for _ in left:
            await call(seconds)

    began_s = time.perf_counter()
    await asyncio.gather(*(lane() for _ in range(at_once)))
    return Latencies(seconds=seconds, total_s=time.perf_counter() - began_s)


async def paced(call: Call, *, per_s: float, seconds: float) -> Latencies:
    """Start calls at a rate, whether or not earlier ones have ended; failed calls are counted."""
    found, failures, running = list[float](), list[CallError](), set[asyncio.Task[None]]()
    began = list[float]()

    async def one() -> None:
        timed, at_s = list[float](), time.monotonic()
        try:
            await call(timed)
        except CallError as error:
            failures.append(error)
        found.extend(timed)
        began.extend([at_s] * len(timed))

    began_s = time.perf_counter()
    for number in range(max(1, round(per_s * seconds))):
        await asyncio.sleep(max(0.0, began_s + number / per_s - time.perf_counter()))
        task = asyncio.create_task(one())
        running.add(task)
        task.add_done_callback(running.discard)
    await asyncio.gather(*running)
    return Latencies(seconds=found, total_s=time.perf_counter() - began_s, failures=failures, began_s=began)


def timed_call(call: Callable[[], Awaitable[object]]) -> Call:
    """Return a call that is timed as a whole."""

    async def timed_one(seconds: list[float]) -> None:
        began_s = time.perf_counter()
        await call()
        seconds.append(time.perf_counter() - began_s)

    return timed_one


PAUSE_S = 1.1  # between samples: a replica is checked every half second, and again after a change
GIVE_UP_S = 20.0
MISPLACED_EVERY = 3  # one in this many requests


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeTimes:
    """Seconds since the report was written.

    Attributes:
        asked_s: the planner asks for the head map.
        prepare_s: the first node receives the command to prepare; before that, the change is solved and stored.
        commit_s: the primary is permitted to flip.
        resolved_s: the first node is informed that the change was flipped.
        done_s: the change is stored as DONE.
        moves: number of moves of the change.
    """

    asked_s: float
    prepare_s: float
    commit_s: float
    resolved_s: float
    done_s: float
    moves: int


class CellUnderStress:
    """The connected agents of a cell that serve a replica, the primary's first."""

    def __init__(self, agents: Sequence[ScriptedAgent], client: AsyncClient) -> None:
        self._agents, self._client = agents, client
        self._number = 0
        for agent in agents:
            agent.heard = self._hear

    async def sample(self) -> ChangeTimes | None:
        """Make one change, or return None if the planner made none."""
        await asyncio.sleep(PAUSE_S)
        stage = self._agents[0].stage
        assert stage is not None, "the cell has no assignment yet"
        self._number += 1
        self._agents[0].num_finished += len(stage.requests)
        skew(stage, f"s{self._number}-")
        self._first: dict[str, float] = {}
        self._change_id, self._moves = "", 0
        self._resolved = asyncio.Event()
        began_s, began_unix_s = time.perf_counter(), time.time()
        await self._agents[0].report_stage()
        try:
            async with asyncio.timeout(GIVE_UP_S):
                await self._resolved.wait()
                end_unix_s = await self._end()
        except TimeoutError:
            return None
        at = {kind: moment - began_s for kind, moment in self._first.items()}
        return ChangeTimes(
            asked_s=at["head_map_of"],
            prepare_s=at["prepare"],
            commit_s=at["commit"],
            resolved_s=at["resolved"],
            done_s=end_unix_s - began_unix_s,
            moves=self._moves,
        )

    def _hear(self, message: agent_service_pb2.ConnectNodeResponse) -> None:
        kind: str | None = message.delta.WhichOneof("change") or message.state_request.WhichOneof("subject")
        if kind is None:
            return
        self._first.setdefault(kind, time.perf_counter())
        if kind == "prepare":
            change = message.delta.prepare.change
            self._change_id, self._moves = change.change_id, len(change.moves)
        elif kind == "resolved":
            self._resolved.set()

    async def _end(self) -> float:
        """Return when the planner's clock, which is this machine's, recorded the change as DONE."""
        name = f"{self._agents[0].cluster}/redispatches/{self._change_id}"
        while True:
            answer = await self._client.clusters.GetRedispatch(cluster_service_pb2.GetRedispatchRequest(name=name))
            found = answer.redispatch
            if found.state == redispatch_pb2.REDISPATCH_STATE_DONE:
                return found.end_time.seconds + found.end_time.nanos / 1e9
            if found.state == redispatch_pb2.REDISPATCH_STATE_ABORTED:
                raise RuntimeError(f"a change was aborted: {found.failure}")
            await asyncio.sleep(0.02)


def skew(stage: StageRun, prefix: str) -> None:
    """Replace the requests; some get a head group on every worker, although the primary has room and is faster."""
    for name in list(stage.requests):
        stage.drop(name)
    workers = [i for i, device in enumerate(stage.model.devices) if not device.is_primary]
    for number, owners in enumerate(balanced_owners(stage)):
        is_misplaced = number % MISPLACED_EVERY == 0
        misplaced = [workers[group % len(workers)] for group in range(len(owners))]
        stage.admit(request_of(number, prefix), misplaced if is_misplaced else list(owners))


CLUSTER, PLAN = "clusters/cells", "plans/cells"
QUIET_CORES = 0.5
MOST_STOLEN_CORES = 0.02  # above this, the host may cause the latencies, and the row notes it
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
        cell: agents of this process, those of one replica, the primary's first.
        empty: latencies of empty calls, by the number in progress at once.
        base_bytes: memory of the planner before the first agent.
    """

    def __init__(
        self, planner: PlannerProcess, client: AsyncClient, crowd: Crowd, fleet: CellFleet, extent: Extent
    ) -> None:
        self.planner, self.client, self.crowd, self.fleet, self.extent = planner, client, crowd, fleet, extent
        self._num_gpus = {cell[0]: 2 for cell in fleet.cells}
        self.cell = [ScriptedAgent(CLUSTER, node, num_gpus=self._num_gpus.get(node, 1)) for node in fleet.cells[0]]
        self.empty: dict[int, Latencies] = {}
        self.base_bytes = planner.rss_bytes()
        self._sending: asyncio.Task[None] | None = None

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
        ids = {agent.node for agent in self.cell}
        everywhere = [*(node for cell in self.fleet.cells for node in cell), *self.fleet.spare]
        there = [(node, self._num_gpus.get(node, 1)) for node in everywhere if node not in ids]
        await connect_all(self.cell, self.planner.address)
        self._sending = asyncio.create_task(Sending(self.cell).run())
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

    async def set_rate(self, reports_per_s: float, *, agents: int | None = None) -> None:
        """Set the rate of the agents, or of so many of them, in the other process."""
        await asyncio.to_thread(partial(self.crowd.set_rate, reports_per_s, agents=agents))

    async def behind(self) -> tuple[float, float]:
        """Return how many reports the planner has processed so far, and how many sent ones it has not."""
        counts = await asyncio.to_thread(self.crowd.counts)
        there = self.extent.agents - len(self.cell)
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
        for agent in self.cell:
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
async def opened(extent: Extent) -> AsyncIterator[Bench]:
    """Yield a planner that has just started and a process for agents; both are stopped at the end."""
    fleet = cell_fleet(extent.agents)
    most_files = raise_file_limit()
    if most_files < extent.agents + 100:
        raise RuntimeError(f"{extent.agents} agents need as many files, and {most_files} are allowed: ulimit -Hn")
    async with AsyncExitStack() as stack:
        planner = stack.enter_context(PlannerProcess())
        client = await stack.enter_async_context(AsyncClient(planner.address))
        crowd = stack.enter_context(Crowd())
        bench = Bench(planner, client, crowd, fleet, extent)
        stack.push_async_callback(bench.close)
        yield bench
