"""The calls of PlanService about existing plans: get, list, delete, watch, cancel, read the document."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from functools import partial

from hetis.planner.convert import names
from hetis.planner.convert.clusters import basic_view, full_view
from hetis.planner.convert.names import timestamp
from hetis.planner.failures import Reason, ServiceError, invalid_field, not_found
from hetis.planner.fleet.fleet import LiveFleet
from hetis.planner.fleet.hubs import Hubs
from hetis.planner.fleet.stored_plans import SEARCHING, StoredPlans, plan_state, require_answer
from hetis.planner.resources.checks import Checks, check, require_etag
from hetis.planner.resources.committing import Publish, change_once
from hetis.planner.resources.in_force import IN_FORCE, how_to_withdraw, is_withdrawable, publish_change, withdraw
from hetis.planner.resources.pages import read_page
from hetis.planner.resources.plan_creation import PlanSearches, forget_problem
from hetis.planner.resources.plan_documents import is_settled
from hetis.planner.store import PlanRecord, Reader, Store, Transaction
from hetis.planner.watching import LeftBehindError
from hetis.v1 import plan_pb2, view_pb2
from hetis.v1 import plan_service_pb2 as pb2

PIECE_BYTES = 1 << 20


@dataclass(slots=True, eq=False)
class Plans:
    """The resource ``plans/{plan}``."""

    _store: Store
    _hubs: Hubs
    _fleet: LiveFleet
    _searches: PlanSearches
    _stored: StoredPlans

    async def get(self, request: pb2.GetPlanRequest) -> pb2.GetPlanResponse:
        check(request, name=names.PLAN)
        record = await self._store.require(Reader.plans, request.name)
        if request.view == view_pb2.VIEW_BASIC:
            return pb2.GetPlanResponse(plan=self._basic(record))
        plan = full_view(record, self._searches.progress_of(record.name))
        if record.body.HasField("result"):
            await self._stored.complete(plan, record)
        return pb2.GetPlanResponse(plan=plan)

    async def list(self, request: pb2.ListPlansRequest) -> pb2.ListPlansResponse:
        checks = Checks()
        checks.request(request, optional=("cluster",), cluster=names.CLUSTER)
        states = checks.states("states", request.states, plan_pb2.PlanState)
        checks.raise_if_wrong()
        records, token = await read_page(self._store, request, Reader.plans, cluster=request.cluster, state=states)
        return pb2.ListPlansResponse(plans=map(self._basic, records), next_page_token=token)

    async def delete(self, request: pb2.DeletePlanRequest) -> pb2.DeletePlanResponse:
        check(request, name=names.PLAN)
        if request.validate_only:
            await self._store.read(lambda reader: _require_deletable(reader, request))
            return pb2.DeletePlanResponse()

        async def publish() -> None:
            self._hubs.plans.publish(request.name, None, now_s=self._store.clock())

        def delete(tx: Transaction) -> tuple[pb2.DeletePlanResponse, Publish]:
            record = _require_deletable(tx, request)
            tx.plans.delete(record.name)
            tx.plan_documents.delete(record.name)
            cluster = tx.clusters.get(record.cluster)
            if cluster is not None and cluster.earlier_plan == record.name:
                tx.clusters.update(replace(cluster, earlier_plan=""))
            return pb2.DeletePlanResponse(), publish

        return await change_once(self._store, request, pb2.DeletePlanResponse, delete)

    async def watch(self, request: pb2.WatchPlanRequest) -> AsyncIterator[pb2.WatchPlanResponse]:
        """Yield the plan's states until it can no longer change without a call.

        Raises NOT_FOUND, even if the plan is deleted during the watch; DRAINING if the planner shuts down; NOT_LEADER
        once its term is over.
        """
        check(request, name=names.PLAN)
        after = 0 if self._hubs.plans.is_too_old(request.after_sequence) else request.after_sequence
        while True:
            record = await self._store.require(Reader.plans, request.name)
            try:
                async for response in self._states(record, after):
                    yield response
                return
            except LeftBehindError:  # the plan may have been deleted in the meantime
                continue

    async def _states(self, record: PlanRecord, after: int) -> AsyncIterator[pb2.WatchPlanResponse]:
        """Yield the plan's states after ``after`` until it is settled. Raises as `watch` does, or LeftBehindError."""
        hub, is_first = self._hubs.plans, True
        async for events in hub.watch():
            event = next((event for event in events if event.key == record.name), None)
            if event is None and is_first:
                # The plan has not changed in this term, so its state is the stored one.
                hub.publish(record.name, self._basic(record), now_s=self._store.clock())
            is_first = False
            if event is None:
                continue
            if event.value is None:
                raise not_found(record.name)
            if event.sequence > after:
                time = timestamp(event.time_s)
                yield pb2.WatchPlanResponse(sequence=event.sequence, plan=event.value, event_time=time)
            if is_settled(event.value):
                return
        raise ServiceError(Reason.ERROR_REASON_DRAINING, "this planner is shutting down: retry")

    async def cancel(self, request: pb2.CancelPlanRequest, *, withdraws: bool = True) -> pb2.CancelPlanResponse:
        """Cancel a plan's search. If it is over, nothing is changed, unless the call also ``withdraws`` plans.

        It then withdraws the plan's activation if nothing serves and there is no earlier plan.
        """
        check(request, name=names.PLAN)

        async def publish() -> None:
            self._searches.cancel(request.name)

        def cancel(tx: Transaction) -> tuple[pb2.CancelPlanResponse, Publish]:
            record = tx.plans.require(request.name)
            require_etag(record, request.etag)
            if record.state in SEARCHING:
                forget_problem(tx, record.name)
            elif withdraws and is_withdrawable(tx, record):
                cluster, record = withdraw(tx, record)
                withdrawn = partial(publish_change, self._store, self._hubs, self._fleet, cluster, [record])
                return pb2.CancelPlanResponse(plan=self._basic(record)), withdrawn
            return pb2.CancelPlanResponse(plan=self._basic(record)), publish

        return await change_once(self._store, request, pb2.CancelPlanResponse, cancel)

    async def read_document(self, request: pb2.ReadPlanDocumentRequest) -> AsyncIterator[pb2.ReadPlanDocumentResponse]:
        """Yield the document in pieces, from the offset on; a single empty piece if the offset is its end."""
        check(request, name=names.PLAN)

        def read(reader: Reader) -> tuple[PlanRecord, bytes | None]:
            return reader.plans.require(request.name), reader.plan_documents.get(request.name)

        record, document = await self._store.read(read)
        require_answer(record)
        assert document is not None, "a plan with a result has a document"
        if request.offset > len(document):
            raise invalid_field("offset", f"is {request.offset}, the document has {len(document)} bytes")
        for offset in range(request.offset, max(len(document), request.offset + 1), PIECE_BYTES):
            yield pb2.ReadPlanDocumentResponse(
                offset=offset,
                content=document[offset : offset + PIECE_BYTES],
                total_bytes=len(document),
                digest=record.body.result.document.digest,
            )

    def _basic(self, record: PlanRecord) -> plan_pb2.Plan:
        return basic_view(record, self._searches.progress_of(record.name) if record.state in SEARCHING else None)


def _require_deletable(reader: Reader, request: pb2.DeletePlanRequest) -> PlanRecord:
    record = reader.plans.require(request.name)
    require_etag(record, request.etag)
    if record.state in SEARCHING:
        raise plan_state(record, "cannot be deleted before its search has ended: cancel it first")
    cluster = reader.clusters.get(record.cluster)
    if record.activation in IN_FORCE or (cluster is not None and cluster.active_plan == record.name):
        raise ServiceError(
            Reason.ERROR_REASON_RESOURCE_IN_USE,
            f"{record.name} is in force in {record.cluster}{how_to_withdraw(reader, record)}",
            metadata={"name": record.name, "user": record.cluster},
        )
    return record
