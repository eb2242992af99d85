"""PlanService on a real loopback server: a store in a file, a fake fleet, real or scripted solver processes."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import grpc

from hetis.planner.convert.documents import DeclaredFleets
from hetis.planner.fleet.hubs import Hubs
from hetis.planner.fleet.stored_plans import StoredPlans
from hetis.planner.jobs.pool import PoolSettings, SolverPool
from hetis.planner.jobs.process import SolverProcess
from hetis.planner.resources.clusters import Clusters
from hetis.planner.resources.plan_activation import PlanActivation
from hetis.planner.resources.plan_creation import PlanCreation, PlanSearches
from hetis.planner.resources.plans import Plans
from hetis.planner.service.calls import Calls
from hetis.planner.service.identity.credentials import Authenticator, NoCredentials
from hetis.planner.service.observability.metrics import ServiceMetrics
from hetis.planner.service.observability.telemetry import Telemetry
from hetis.planner.service.server import PlannerServer
from hetis.planner.service.servicers import servicing
from hetis.planner.store import Store
from hetis.v1 import cluster_pb2, cluster_service_pb2, document_pb2, plan_pb2, plan_service_pb2_grpc
from hetis.v1 import plan_service_pb2 as pb2
from tests.planner.resources.served import FakeFleet

T = TypeVar("T")
PAPER = (Path(__file__).parents[3] / "examples" / "paper.yaml").read_bytes()
SCRIPTED = (sys.executable, str(Path(__file__).parents[1] / "jobs" / "scripted_worker.py"))
WAIT, CRASH, HANG, FIND_NOTHING = 1, 2, 3, 4  # seeds that select the behaviour of the scripted process
SEARCHING = (plan_pb2.PLAN_STATE_QUEUED, plan_pb2.PLAN_STATE_SOLVING)


@dataclass(kw_only=True)
class Planner:
    """A planner whose only cluster, at first, is ``clusters/paper``."""

    stub: Any
    address: str
    store: Store
    hubs: Hubs
    fleet: FakeFleet
    pool: SolverPool
    clusters: Clusters
    creation: PlanCreation

    async def call(self, name: str, request: Any) -> Any:
        return await getattr(self.stub, name)(request, timeout=30)

    async def create(self, plan_id: str, **spec: Any) -> plan_pb2.Plan:
        response = await self.call("CreatePlan", create_request(plan_id, **spec))
        return response.plan  # type: ignore[no-any-return]

    async def get(self, name: str) -> plan_pb2.Plan:
        return (await self.call("GetPlan", pb2.GetPlanRequest(name=name))).plan  # type: ignore[no-any-return]

    async def until(self, name: str, is_reached: Callable[[plan_pb2.Plan], bool]) -> list[plan_pb2.Plan]:
        """Return the states as a watcher sees them, up to the first for which the condition holds."""
        seen: list[plan_pb2.Plan] = []
        async for response in self.stub.WatchPlan(pb2.WatchPlanRequest(name=name)):
            seen.append(response.plan)
            if is_reached(response.plan):
                return seen
        raise AssertionError(f"the watch ended with {seen[-1]}")

    async def solved(self, name: str) -> plan_pb2.Plan:
        return (await self.until(name, lambda plan: plan.state not in SEARCHING))[-1]

    async def solving(self, name: str) -> None:
        await self.until(name, lambda plan: plan.state == plan_pb2.PLAN_STATE_SOLVING)


def create_request(plan_id: str = "", *, request_id: str = "", validate_only: bool = False, **spec: Any) -> Any:
    wanted = {
        "model_name": "Llama-2-70B",
        "workload_name": "azure_conv_2023",
        "skip_verification": True,  # verification takes seconds for each plan
        **spec,
    }
    plan = plan_pb2.Plan(cluster="clusters/paper", spec=plan_pb2.PlanSpec(**wanted))
    return pb2.CreatePlanRequest(plan_id=plan_id, plan=plan, request_id=request_id, validate_only=validate_only)


@asynccontextmanager
async def planner_in(
    folder: Path,
    *,
    scripted: bool = False,
    settings: PoolSettings = PoolSettings(),  # noqa: B008  # frozen
    authenticator: Authenticator = NoCredentials(),  # noqa: B008  # without state
) -> AsyncIterator[Planner]:
    start_process: Callable[[], Awaitable[SolverProcess]] = SolverProcess.start
    if scripted:
        start_process = partial(SolverProcess.start, SCRIPTED)
    store = await Store.open(f"sqlite:///{folder}/hetis.db")
    hubs, fleet, fleets = Hubs(await store.leadership.grant("test")), FakeFleet(), DeclaredFleets()
    pool = SolverPool(settings, start_process=start_process)
    searches = PlanSearches(store, hubs, pool)
    documents = StoredPlans(store)
    creation = PlanCreation(store, hubs, fleet, fleets, pool, searches)
    clusters = Clusters(store, hubs, fleet, fleets)
    plans = Plans(store, hubs, fleet, searches, documents)
    activation = PlanActivation(store, hubs, fleet, fleets, documents)
    parts = SimpleNamespace(creation=creation, plans=plans, activation=activation)
    server = PlannerServer(
        [servicing("PlanService", lambda method, request, _: method.carry_out(parts, request))],
        Calls(authenticator, Telemetry(ServiceMetrics("0"))),
    )
    address = server.listen("127.0.0.1:0")
    pool.start()
    await searches.resume()
    await server.start()
    try:
        if await store.read(lambda reader: reader.clusters.get("clusters/paper")) is None:
            await make_cluster(clusters, "paper", PAPER)
        async with grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            yield Planner(
                stub=plan_service_pb2_grpc.PlanServiceStub(channel),
                address=address,
                store=store,
                hubs=hubs,
                fleet=fleet,
                pool=pool,
                clusters=clusters,
                creation=creation,
            )
    finally:
        hubs.close()
        await server.stop_at_once()
        await searches.stop()
        await pool.stop()
        await store.close()


async def make_cluster(clusters: Clusters, cluster_id: str, text: bytes) -> None:
    cluster = cluster_pb2.Cluster(document=document_pb2.Document(content=text, source_name=f"{cluster_id}.yaml"))
    await clusters.create(cluster_service_pb2.CreateClusterRequest(cluster_id=cluster_id, cluster=cluster))
