"""The planner, put together: store, hubs, solver pool, fleet, resources, servicers; taken apart in the other order."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from hetis.planner.fleet.dispatching.states import DispatchStates
from hetis.planner.fleet.fleet import Fleet
from hetis.planner.fleet.proposals import PlacementProposals
from hetis.planner.fleet.redispatching.loop import RedispatchLoop
from hetis.planner.fleet.settings import FleetSettings
from hetis.planner.jobs.pool import PoolSettings, SolverPool
from hetis.planner.resources.clusters import Clusters
from hetis.planner.resources.declared import DeclaredFleets
from hetis.planner.resources.hubs import Hubs
from hetis.planner.resources.node_views import NodeReader
from hetis.planner.resources.nodes import Nodes
from hetis.planner.resources.placements import StoredPlacements
from hetis.planner.resources.plan_activation import PlanActivation
from hetis.planner.resources.plan_creation import PlanCreation
from hetis.planner.resources.plan_documents import PlanDocuments
from hetis.planner.resources.plan_searches import PlanSearches
from hetis.planner.resources.plan_specs import SearchLimits
from hetis.planner.resources.plans import Plans
from hetis.planner.resources.profiles import Profiles
from hetis.planner.resources.running import Running
from hetis.planner.resources.watches import ClusterWatches
from hetis.planner.service.fleet_metrics import FleetCollector
from hetis.planner.service.overview import Overview
from hetis.planner.service.overviews import Overviews
from hetis.planner.service.server import Servicing
from hetis.planner.service.servicers.agent import AgentServicer
from hetis.planner.service.servicers.cluster import ClusterServicer
from hetis.planner.service.servicers.dispatch import DispatchServicer
from hetis.planner.service.servicers.plan import PlanServicer
from hetis.planner.service.servicers.profile import ProfileServicer
from hetis.planner.service.settings import PlannerConfig, default_store
from hetis.planner.store import Store
from hetis.v1.agent_service_pb2_grpc import add_AgentServiceServicer_to_server
from hetis.v1.cluster_service_pb2_grpc import add_ClusterServiceServicer_to_server
from hetis.v1.dispatch_service_pb2_grpc import add_DispatchServiceServicer_to_server
from hetis.v1.plan_service_pb2_grpc import add_PlanServiceServicer_to_server
from hetis.v1.profile_service_pb2_grpc import add_ProfileServiceServicer_to_server

_SUSPECT_HEARTBEATS = 1.6  # the settings make the lease at least two
_log = logging.getLogger("hetis.planner")


class SystemClock:
    """The machine's clocks."""

    def monotonic(self) -> float:
        return time.monotonic()

    def time(self) -> float:
        return time.time()


class AssembledPlanner:
    """Everything behind the gRPC server. Made by `open_planner`."""

    def __init__(
        self,
        store: Store,
        hubs: Hubs,
        fleet: Fleet,
        overviews: Overviews,
        servicings: Sequence[Servicing],
        loops: Loops,
        parts: AsyncExitStack,
    ) -> None:
        self._store = store
        self._hubs = hubs
        self._fleet = fleet
        self._overviews = overviews
        self._loops = loops
        self._parts = parts
        self.servicings = servicings
        self.collectors = (FleetCollector(fleet.counters),)

    async def overview(self) -> Overview:
        return await self._overviews.overview()

    async def cluster_details(self, name: str) -> Mapping[str, Any] | None:
        return await self._overviews.cluster_details(name)

    @property
    def failures(self) -> Sequence[str]:
        return self._loops.failures

    async def until_failed(self) -> None:
        await self._loops.failed.wait()

    async def until_replaced(self) -> None:
        await self._store.until_replaced()

    async def say_goodbye(self) -> None:
        self._hubs.close()
        await self._fleet.stop("the planner is shutting down")

    async def close(self) -> None:
        await self._parts.aclose()


async def open_planner(config: PlannerConfig) -> AssembledPlanner:
    """Opens the store, takes leadership, and begins again what the planner before had under way.

    Raises:
        StoreError: the store cannot be used.
        ServiceError: NOT_LEADER, another planner holds it.
    """
    if config.store == default_store():
        Path(config.store.removeprefix("sqlite:///")).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    clock = SystemClock()
    async with AsyncExitStack() as parts:
        store = await Store.open(config.store)
        parts.push_async_callback(store.close)
        epoch = await store.lead(f"{socket.gethostname()}:{os.getpid()}")
        leader_since_s = clock.time()
        hubs = Hubs(epoch)
        parts.callback(hubs.close)

        pool = SolverPool(PoolSettings(num_processes=config.solver.processes, queue_size=config.solver.queue))
        parts.push_async_callback(pool.stop)
        fleet_settings = FleetSettings(
            heartbeat_s=config.agents.heartbeat,
            lease_s=config.agents.lease,
            suspect_s=_SUSPECT_HEARTBEATS * config.agents.heartbeat,
        )
        fleet = Fleet(store, hubs, epoch=epoch, settings=fleet_settings, clock=clock)
        states = DispatchStates(fleet)
        loop = RedispatchLoop(fleet, states, clock=clock)
        fleet.observers.append(loop)

        declared = DeclaredFleets()
        reader = NodeReader(store, fleet, declared)
        clusters = Clusters(store, hubs, fleet, declared)
        nodes = Nodes(store, hubs, fleet, reader)
        running = Running(store, fleet)
        searches = PlanSearches(store, hubs, pool)
        parts.push_async_callback(searches.stop)
        clusters.deleted.append(searches.cluster_deleted)
        documents = PlanDocuments(store)
        limits = SearchLimits(threads=_threads(config), time_s=config.solver.max_search)
        creation = PlanCreation(store, hubs, fleet, declared, pool, searches, limits=limits)
        plans = Plans(store, hubs, searches, documents)
        activation = PlanActivation(store, hubs, fleet, declared, documents)
        proposals = PlacementProposals(fleet, StoredPlacements(store, plans, creation, activation), clock=clock)
        fleet.observers.append(proposals)
        servicings = (
            Servicing(
                service="hetis.v1.ClusterService",
                servicer=ClusterServicer(clusters, nodes, running, ClusterWatches(store, hubs, fleet, reader)),
                add=add_ClusterServiceServicer_to_server,
            ),
            Servicing(
                service="hetis.v1.ProfileService",
                servicer=ProfileServicer(Profiles(store)),
                add=add_ProfileServiceServicer_to_server,
            ),
            Servicing(
                service="hetis.v1.PlanService",
                servicer=PlanServicer(creation, plans, activation),
                add=add_PlanServiceServicer_to_server,
            ),
            Servicing(
                service="hetis.v1.DispatchService",
                servicer=DispatchServicer(states, fleet),
                add=add_DispatchServiceServicer_to_server,
            ),
            Servicing(
                service="hetis.v1.AgentService",
                servicer=AgentServicer(fleet),
                add=add_AgentServiceServicer_to_server,
            ),
        )
        overviews = Overviews(
            store,
            fleet,
            pool,
            clusters,
            nodes,
            running,
            epoch=epoch,
            leader_since_s=leader_since_s,
            most_searches=config.solver.processes,
        )
        pool.start()
        await fleet.start()
        parts.push_async_callback(fleet.stop, "the planner is shutting down")
        for cluster in await store.read(lambda reader: reader.clusters.all()):
            proposals.capacity_changed(cluster.name)
        loops = Loops()
        parts.push_async_callback(loops.stop)
        loops.start("the re-dispatch loop", loop.run())
        loops.start("placement proposals", proposals.run())
        loops.start("warming up dispatch", states.warm_up())
        await searches.resume()
        return AssembledPlanner(store, hubs, fleet, overviews, servicings, loops, parts.pop_all())


def _threads(config: PlannerConfig) -> int:
    """Of one search: all processes together use the machine once."""
    return max(1, (os.cpu_count() or 1) // config.solver.processes)


class Loops:
    """What goes on beside the calls. One that fails is not begun again: nobody knows what it left half done.

    Attributes:
        failures: names of those that have failed.
        failed: set with the first of them.
    """

    def __init__(self) -> None:
        self.failures: list[str] = []
        self.failed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(self._note_failure)
        self._tasks.append(task)

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _note_failure(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("%s failed: restart the planner", task.get_name(), exc_info=error)
            self.failures.append(task.get_name())
            self.failed.set()
