"""The object graph of one leadership term: hubs, solver pool, fleet, resources, and the methods of all services."""

from __future__ import annotations

from contextlib import AsyncExitStack
from types import SimpleNamespace

from hetis.planner.callers import present_caller
from hetis.planner.convert.documents import DeclaredFleets
from hetis.planner.failures import ServiceError
from hetis.planner.fleet.fleet import LiveFleet
from hetis.planner.fleet.hubs import Hubs
from hetis.planner.fleet.reading_ahead import ReadAhead
from hetis.planner.fleet.redispatching.loop import RedispatchLoop
from hetis.planner.fleet.settings import FleetCounters, FleetSettings
from hetis.planner.fleet.stored_plans import StoredPlans
from hetis.planner.fleet.views import Clock
from hetis.planner.jobs.pool import PoolSettings, SolverPool
from hetis.planner.resources import dispatch
from hetis.planner.resources.clusters import Clusters
from hetis.planner.resources.nodes import NodeReader, Nodes
from hetis.planner.resources.plan_activation import PlanActivation
from hetis.planner.resources.plan_creation import PlanCreation, PlanSearches
from hetis.planner.resources.plan_specs import SearchLimits
from hetis.planner.resources.plans import Plans
from hetis.planner.resources.profiles import Profiles
from hetis.planner.resources.proposals import PlacementProposals, StoredPlacements
from hetis.planner.resources.retention import Retention
from hetis.planner.resources.traffic import MeasuredTraffic
from hetis.planner.resources.traffic_loop import TrafficLoop
from hetis.planner.resources.watches import ClusterWatches, RunningResources
from hetis.planner.service.audit_refusals import AuditRefusals
from hetis.planner.service.loops import Loops
from hetis.planner.service.observability.overview import Overviews
from hetis.planner.service.settings import PlannerConfig
from hetis.planner.store import Store
from hetis.planner.threads import run_in_daemon_thread
from hetis.solver.redispatch.redispatcher import compile_redispatch

_SUSPECT_HEARTBEATS = 1.6  # below the lease, which the settings require to be at least two


class Term:
    """Everything behind the gRPC server during one leadership term. Before `begin` it answers only from the store.

    Args:
        epoch: the term's epoch; 0 if this planner does not lead and will not lead in this term.
        counters: the fleet's counters, which continue from term to term.
        loops: the background tasks of all terms, which collect failures.
        declared, stored: the parsed documents of all terms.
    """

    def __init__(
        self,
        config: PlannerConfig,
        store: Store,
        *,
        epoch: int,
        counters: FleetCounters,
        loops: Loops,
        refusals: AuditRefusals,
        declared: DeclaredFleets,
        stored: StoredPlans,
    ) -> None:
        clock = Clock()
        self.epoch = epoch
        self.since_s = clock.time()
        self._loops, self._refusals = Loops(loops), refusals
        self._parts = AsyncExitStack()
        self._hubs = hubs = Hubs(epoch)
        self._pool = SolverPool(pool_settings(config))
        fleet_settings = FleetSettings(
            heartbeat_s=config.agents.heartbeat,
            lease_s=config.agents.lease,
            suspect_s=_SUSPECT_HEARTBEATS * config.agents.heartbeat,
        )
        self._ahead = ReadAhead(store, declared, stored)
        self._fleet = fleet = LiveFleet(
            store,
            hubs,
            epoch=epoch,
            settings=fleet_settings,
            clock=clock,
            plans=stored,
            counters=counters,
            declared=declared,
        )
        self._loop = RedispatchLoop(fleet, clock=clock)
        fleet.add_observer(self._loop)

        reader = NodeReader(store, fleet, declared)
        self._searches = searches = PlanSearches(store, hubs, self._pool)
        clusters = Clusters(store, hubs, fleet, declared, searches.cluster_deleted)
        nodes = Nodes(store, hubs, fleet, reader)
        running = RunningResources(store, fleet)
        limits = SearchLimits(time_s=config.solver.max_search)
        creation = PlanCreation(store, hubs, fleet, declared, self._pool, searches, limits)
        plans = Plans(store, hubs, fleet, searches, stored)
        activation = PlanActivation(store, hubs, fleet, declared, stored)
        placements = StoredPlacements(store, plans, creation, activation, stored)
        self._proposals = PlacementProposals(fleet, placements, clock=clock)
        fleet.add_observer(self._proposals)
        self._retention = Retention(store, placements, config.retention.plans, config.retention.audit)
        self._traffic = MeasuredTraffic(store, fleet, stored, clock)
        fleet.add_observer(self._traffic)
        self._traffic_loop = TrafficLoop(fleet, reader, self._traffic, placements, creation, clock)
        self._traffic.decision_of = self._traffic_loop.decision_of

        self.parts = SimpleNamespace(
            clusters=clusters,
            nodes=nodes,
            running=running,
            watches=ClusterWatches(store, hubs, fleet, reader),
            profiles=Profiles(store),
            creation=creation,
            plans=plans,
            activation=activation,
            dispatch=dispatch,
            traffic=self._traffic,
            connect_node=lambda requests: fleet.connect(present_caller(), requests),  # as the node in its credentials
        )
        self.overviews = Overviews(
            store,
            fleet,
            hubs,
            self._pool,
            clusters,
            nodes,
            running,
            epoch=epoch,
            leader_since_s=self.since_s if epoch else 0.0,
            most_searches=config.solver.processes,
            traffic=self._traffic,
        )

    async def stand_by(self) -> None:
        """Load the kernels of re-dispatch and all documents, which would delay this process when it takes over."""
        await run_in_daemon_thread(compile_redispatch, name="kernels of re-dispatch")
        await self._ahead.run()

    async def begin(self) -> None:
        """Resume earlier work, and decide from now on. Raises NOT_LEADER or STORE_UNAVAILABLE; then call `close`."""
        parts = self._parts
        parts.callback(self._hubs.close)
        parts.push_async_callback(self._pool.stop)
        parts.push_async_callback(self._searches.stop)
        parts.push_async_callback(self._fleet.stop, "the planner is shutting down")
        await self._fleet.start()
        for cluster in self._fleet.cluster_names:
            self._proposals.capacity_changed(cluster)
        parts.push_async_callback(self._loops.stop)
        self._loops.start("the re-dispatch loop", self._loop.run())
        self._loops.start("the audit log of refusals", self._refusals.run())
        self._loops.start("placement proposals", self._proposals.run())
        self._loops.start("measured traffic", self._traffic.run())
        self._loops.start("decisions about traffic", self._traffic_loop.run())
        self._loops.start("retention", self._retention.run())
        await self._searches.resume()
        self._pool.start()
        self._loops.start("the solver slots", self._pool.until_failed())

    def lose(self, error: ServiceError) -> None:
        """End the term: dismiss agents and watchers at once, and make no further decisions."""
        self._fleet.lose_leadership(error)
        self._hubs.close(error)

    async def say_goodbye(self) -> None:
        """Inform the agents that the planner stops, and end all watches."""
        self._hubs.close()
        await self._fleet.stop("the planner is shutting down")

    async def close(self) -> None:
        """Stop everything that `begin` started."""
        await self._parts.aclose()


def pool_settings(config: PlannerConfig) -> PoolSettings:
    """Return the pool's settings, which reserve capacity for others than the busiest caller."""
    solver = config.solver
    return PoolSettings(
        num_processes=solver.processes,
        queue_size=solver.queue,
        running_per_caller=solver.running_per_caller or max(1, solver.processes - 1),
        queued_per_caller=solver.queued_per_caller or max(1, solver.queue // 4),
    )
