"""Plans for `hetis.planner.fleet.proposals`: with replicas, and without requests and views."""

from __future__ import annotations

from hetis.planner.failures import Reason, ServiceError
from hetis.planner.resources.plan_activation import PlanActivation
from hetis.planner.resources.plan_creation import PlanCreation
from hetis.planner.resources.plan_views import SEARCHING, basic_view
from hetis.planner.resources.plans import Plans
from hetis.planner.store import PlanRecord, Store, etag_of
from hetis.v1 import plan_pb2, view_pb2
from hetis.v1 import plan_service_pb2 as pb2

_MOST_KEPT = 64  # plans whose replicas are cached; two per cluster are requested over and over


class StoredPlacements:
    """Reads the replicas from a plan's document once per state of the plan."""

    def __init__(self, store: Store, plans: Plans, creation: PlanCreation, activation: PlanActivation) -> None:
        self._store, self._plans, self._creation, self._activation = store, plans, creation, activation
        self._kept: dict[str, plan_pb2.Plan] = {}

    async def plan_in_force(self, cluster: str) -> plan_pb2.Plan | None:
        record = await self._store.read(lambda reader: reader.clusters.get(cluster))
        return None if record is None or not record.active_plan else await self.plan(record.active_plan)

    async def plan(self, name: str) -> plan_pb2.Plan | None:
        record: PlanRecord | None = await self._store.read(lambda reader: reader.plans.get(name))
        if record is None:
            self._kept.pop(name, None)
            return None
        if record.state in SEARCHING:
            return basic_view(record)
        kept = self._kept.get(name)
        if kept is None or kept.etag != etag_of(record):
            request = pb2.GetPlanRequest(name=name, view=view_pb2.VIEW_FULL)
            kept = self._kept[name] = (await self._plans.get(request)).plan
            while len(self._kept) > _MOST_KEPT:
                del self._kept[next(iter(self._kept))]
        return kept

    async def propose(self, cluster: str, spec: plan_pb2.PlanSpec, reason: str) -> str:
        return await self._creation.propose(cluster, spec, reason)

    async def withdraw(self, plan: str) -> None:
        """Cancel a running search, which keeps what it found; delete a plan that nobody activated."""
        try:
            record = await self._store.read(lambda reader: reader.plans.get(plan))
            if record is not None and record.state in SEARCHING:
                await self._plans.cancel(pb2.CancelPlanRequest(name=plan))
            elif record is not None:
                await self._plans.delete(pb2.DeletePlanRequest(name=plan))
        except ServiceError as error:
            if error.reason not in (Reason.ERROR_REASON_NOT_FOUND, Reason.ERROR_REASON_RESOURCE_IN_USE):
                raise

    async def activate(self, plan: str) -> None:
        await self._activation.activate(pb2.ActivatePlanRequest(name=plan))
