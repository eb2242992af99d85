"""Servicers without a planner, whose behaviour a test selects by the requested name."""

# ruff: noqa: N802  # gRPC's names

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

import grpc
from prometheus_client.registry import Collector

from hetis.formats.errors import single_problem
from hetis.planner.callers import present_caller
from hetis.planner.failures import Reason, ServiceError, etag_mismatch, invalid_fields, not_found, wrong_node
from hetis.planner.service.loops import Loops
from hetis.planner.service.observability.overview import ClusterNow, ClusterOverview, Overview
from hetis.planner.service.server import Servicing
from hetis.planner.service.settings import PlannerConfig
from hetis.planner.store import AuditedChange
from hetis.planner.watching import Hub
from hetis.v1 import (
    agent_service_pb2,
    agent_service_pb2_grpc,
    cluster_service_pb2_grpc,
    dispatch_service_pb2_grpc,
    failure_pb2,
    plan_pb2,
    plan_service_pb2,
    plan_service_pb2_grpc,
    profile_service_pb2_grpc,
)


def too_many_violations() -> ServiceError:
    return invalid_fields(
        failure_pb2.FieldViolation(field=f"plan.spec.field_{n}", description="x" * 200) for n in range(1000)
    )


ERRORS: dict[str, Exception] = {
    "plans/missing": not_found("plans/missing"),
    "plans/changed": etag_mismatch("plans/changed", given="v1", present="v2"),
    "plans/full": ServiceError(
        Reason.ERROR_REASON_SOLVER_QUEUE_FULL, "the queue is full", metadata={"queued": 32}, retry_after_s=2.5
    ),
    "plans/used": ServiceError(
        Reason.ERROR_REASON_RESOURCE_IN_USE,
        "clusters/c is used by plans/p",
        metadata={"name": "clusters/c", "user": "plans/p"},
    ),
    "plans/gpus": ServiceError(
        Reason.ERROR_REASON_INVENTORY_MISMATCH,
        "2 GPUs are missing",
        metadata={"cluster": "clusters/c", "missing_gpus": 2},
        violations=[failure_pb2.FieldViolation(field=gpu, description="is not there") for gpu in ("n1/0", "n2/3")],
    ),
    "plans/fields": too_many_violations(),
    "plans/document": single_problem("cluster.yaml", "is empty", line=3),
    "plans/bug": ZeroDivisionError("the secret is 42"),
    "plans/unwritten": grpc.aio.InternalError("an answer could not be written"),
    "plans/long": not_found("plans/" + "ü" * 5000),
}


class FakePlans(plan_service_pb2_grpc.PlanServiceServicer):
    """``GetPlan`` raises the error in `ERRORS`; ``plans/slow`` waits for ``release``; watches end with the hub."""

    def __init__(self) -> None:
        self.release = asyncio.Event()
        self.entered = asyncio.Event()
        self.num_slow = 0
        self.hub: Hub[str, plan_pb2.Plan] = Hub(1)

    async def GetPlan(self, request: Any, context: Any) -> Any:
        if request.name in ERRORS:
            raise ERRORS[request.name]
        if request.name == "plans/slow":
            self.entered.set()
            self.num_slow += 1
            await self.release.wait()
        return plan_service_pb2.GetPlanResponse(
            plan=plan_pb2.Plan(name=request.name, labels={"by": present_caller().name})
        )

    async def WatchPlan(self, request: Any, context: Any) -> AsyncIterator[Any]:
        if request.name in ERRORS:
            raise ERRORS[request.name]
        yield plan_service_pb2.WatchPlanResponse(plan=plan_pb2.Plan(name=request.name))
        if request.name == "plans/deaf":
            await asyncio.Event().wait()
        async for events in self.hub.watch():
            for event in events:
                yield plan_service_pb2.WatchPlanResponse(plan=event.value)


class FakeAgents(agent_service_pb2_grpc.AgentServiceServicer):
    """Welcomes agents for nodes that they may represent, and sends a Goodbye to all."""

    def __init__(self) -> None:
        self.goodbye = asyncio.Event()
        self.gone = asyncio.Event()
        self.gone.set()

    async def ConnectNode(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:
        self.gone.clear()
        try:
            async for request in request_iterator:
                if not present_caller().speaks_for(request.hello.node):
                    raise wrong_node(present_caller(), request.hello.node)
                yield agent_service_pb2.ConnectNodeResponse(epoch=1, welcome=agent_service_pb2.Welcome())
                await self.goodbye.wait()
                yield agent_service_pb2.ConnectNodeResponse(epoch=1, goodbye=agent_service_pb2.Goodbye())
                return
        finally:
            self.gone.set()


class FakePlanner:
    """The planner interface that `running` needs."""

    collectors: Sequence[Collector] = ()

    def __init__(self) -> None:
        self.plans = FakePlans()
        self.agents = FakeAgents()
        self.closed = False
        self.loops = Loops()
        self.clusters: list[ClusterNow] = []
        self.leads = True
        self.num_looks = self.num_overviews = 0

    @property
    def servicings(self) -> Sequence[Servicing]:
        return (
            Servicing(
                service="hetis.v1.ClusterService",
                servicer=cluster_service_pb2_grpc.ClusterServiceServicer(),
                add=cluster_service_pb2_grpc.add_ClusterServiceServicer_to_server,
            ),
            Servicing(
                service="hetis.v1.ProfileService",
                servicer=profile_service_pb2_grpc.ProfileServiceServicer(),
                add=profile_service_pb2_grpc.add_ProfileServiceServicer_to_server,
            ),
            Servicing(
                service="hetis.v1.PlanService",
                servicer=self.plans,
                add=plan_service_pb2_grpc.add_PlanServiceServicer_to_server,
            ),
            Servicing(
                service="hetis.v1.DispatchService",
                servicer=dispatch_service_pb2_grpc.DispatchServiceServicer(),
                add=dispatch_service_pb2_grpc.add_DispatchServiceServicer_to_server,
            ),
            Servicing(
                service="hetis.v1.AgentService",
                servicer=self.agents,
                add=agent_service_pb2_grpc.add_AgentServiceServicer_to_server,
            ),
        )

    async def overview(self) -> Overview:
        self.num_overviews += 1
        return Overview(
            epoch=3,
            leader_since_s=1_800_000_000.0,
            clusters=(
                ClusterOverview(
                    name="clusters/c",
                    active_plan="plans/p",
                    num_nodes={"READY": 2, "LOST": 1},
                    num_replicas={"SERVING": 3, "FAILED": 1},
                    desired={"2xL4": 3},
                    activation="ACTIVATING",
                ),
            ),
            num_plans={"SOLVING": 1},
            queued=4,
            searching=1,
            solver_processes=2,
        )

    def clusters_now(self, only: str = "") -> Sequence[ClusterNow]:
        self.num_looks += 1
        return [one for one in self.clusters if only in ("", one.name)]

    async def cluster_details(self, name: str) -> Mapping[str, Any] | None:
        return {"cluster": {"name": name}} if name == "clusters/c" else None

    def note_refusal(self, change: AuditedChange) -> None:
        pass

    is_ready = True

    def require_leader(self, method: str) -> None:
        pass

    async def until_begun(self, is_change: bool) -> None:
        pass

    def on_loss(self, end_streams: Callable[[ServiceError], Awaitable[None]]) -> None:
        pass

    async def until_replaced(self) -> None:
        await asyncio.Event().wait()

    async def say_goodbye(self) -> None:
        self.agents.goodbye.set()
        self.plans.hub.close()
        await self.agents.gone.wait()  # as the fleet does: a stream that ends in a drain sends nothing more

    async def close(self) -> None:
        self.closed = True


async def open_fake(_config: PlannerConfig) -> FakePlanner:
    return FakePlanner()


async def open_held(_config: PlannerConfig) -> FakePlanner:
    raise ServiceError(Reason.ERROR_REASON_NOT_LEADER, "the store hetis.db is held by another planner")
