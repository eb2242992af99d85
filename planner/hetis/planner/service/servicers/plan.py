"""PlanService: each call is passed to a resource; the interceptor translates failures."""

# ruff: noqa: N802  # gRPC's names

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc

from hetis.planner.resources.plan_activation import PlanActivation
from hetis.planner.resources.plan_creation import PlanCreation
from hetis.planner.resources.plans import Plans
from hetis.v1 import plan_service_pb2 as pb2
from hetis.v1 import plan_service_pb2_grpc

_Context = grpc.aio.ServicerContext[Any, Any]


class PlanServicer(plan_service_pb2_grpc.PlanServiceServicer):
    def __init__(self, creation: PlanCreation, plans: Plans, activation: PlanActivation) -> None:
        self._creation = creation
        self._plans = plans
        self._activation = activation

    async def CreatePlan(self, request: pb2.CreatePlanRequest, context: _Context) -> pb2.CreatePlanResponse:
        return await self._creation.create(request)

    async def GetPlan(self, request: pb2.GetPlanRequest, context: _Context) -> pb2.GetPlanResponse:
        return await self._plans.get(request)

    async def ListPlans(self, request: pb2.ListPlansRequest, context: _Context) -> pb2.ListPlansResponse:
        return await self._plans.list(request)

    async def DeletePlan(self, request: pb2.DeletePlanRequest, context: _Context) -> pb2.DeletePlanResponse:
        return await self._plans.delete(request)

    async def WatchPlan(self, request: pb2.WatchPlanRequest, context: _Context) -> AsyncIterator[pb2.WatchPlanResponse]:
        async for response in self._plans.watch(request):
            yield response

    async def CancelPlan(self, request: pb2.CancelPlanRequest, context: _Context) -> pb2.CancelPlanResponse:
        return await self._plans.cancel(request)

    async def ExplainPlan(self, request: pb2.ExplainPlanRequest, context: _Context) -> pb2.ExplainPlanResponse:
        return await self._plans.explain(request)

    async def DiffPlans(self, request: pb2.DiffPlansRequest, context: _Context) -> pb2.DiffPlansResponse:
        return await self._plans.diff(request)

    async def ReadPlanDocument(
        self, request: pb2.ReadPlanDocumentRequest, context: _Context
    ) -> AsyncIterator[pb2.ReadPlanDocumentResponse]:
        async for response in self._plans.read_document(request):
            yield response

    async def ActivatePlan(self, request: pb2.ActivatePlanRequest, context: _Context) -> pb2.ActivatePlanResponse:
        return await self._activation.activate(request)

    async def RollbackPlan(self, request: pb2.RollbackPlanRequest, context: _Context) -> pb2.RollbackPlanResponse:
        return await self._activation.rollback(request)
