"""The calls of PlanService about existing plans: get, list, delete, watch, cancel, explain, diff, read the document."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

from hetis.planner.convert import names
from hetis.planner.convert.plans import complete, explanation_to_proto
from hetis.planner.failures import Reason, ServiceError, etag_mismatch, invalid_field, not_found
from hetis.planner.resources.checking import Checks
from hetis.planner.resources.hubs import Hubs
from hetis.planner.resources.paging import read_page_request
from hetis.planner.resources.plan_differences import compare
from hetis.planner.resources.plan_documents import PlanDocuments, plan_state, require_answer
from hetis.planner.resources.plan_searches import PlanSearches, problem_name
from hetis.planner.resources.plan_views import IN_FORCE, SEARCHING, basic_view, full_view, is_settled
from hetis.planner.resources.requests import once, to_the_end
from hetis.planner.store import PlanRecord, Reader, Store, Transaction, etag_of
from hetis.planner.threads import run_in_thread_gc_paused
from hetis.v1 import plan_pb2, view_pb2
from hetis.v1 import plan_service_pb2 as pb2

PIECE_BYTES = 1 << 20


class Plans:
    """The resource ``plans/{plan}``."""

    def __init__(
        self,
        store: Store,
        hubs: Hubs,
        searches: PlanSearches,
        documents: PlanDocuments,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._hubs = hubs
        self._searches = searches
        self._documents = documents
        self._clock = clock

    async def get(self, request: pb2.GetPlanRequest) -> pb2.GetPlanResponse:
        _require_name(request.name)
        record = await self._store.read(lambda reader: reader.plans.require(request.name))
        if request.view == view_pb2.VIEW_BASIC:
            return pb2.GetPlanResponse(plan=self._basic(record))
        plan = full_view(record, self._searches.progress_of(record.name))
        if record.body.HasField("result"):
            answered = await self._documents.of(record)
            await run_in_thread_gc_paused(complete, plan, answered.plan, answered.document)
        return pb2.GetPlanResponse(plan=plan)

    async def list(self, request: pb2.ListPlansRequest) -> pb2.ListPlansResponse:
        checks = Checks()
        checks.page_size(request.page_size)
        checks.optional_name("cluster", request.cluster, names.CLUSTER)
        checks.raise_if_wrong()
        page = read_page_request(request, newest_first=True)
        filters: dict[str, str | frozenset[int]] = {}
        if request.cluster:
            filters["cluster"] = request.cluster
        if request.states:
            filters["state"] = frozenset(request.states)
        found = await self._store.read(lambda reader: reader.plans.page(page.after, page.num_read, **filters))
        records, token = page.cut(found, lambda record: (record.create_time_s, record.name))
        return pb2.ListPlansResponse(plans=map(self._basic, records), next_page_token=token)

    async def delete(self, request: pb2.DeletePlanRequest) -> pb2.DeletePlanResponse:
        checks = Checks()
        checks.name("name", request.name, names.PLAN)
        checks.request_id(request.request_id)
        checks.raise_if_wrong()
        if request.validate_only:
            await self._store.read(lambda reader: _require_deletable(reader, request))
            return pb2.DeletePlanResponse()

        def delete(tx: Transaction) -> pb2.DeletePlanResponse:
            record = _require_deletable(tx, request)
            tx.plans.delete(record.name)
            tx.plan_documents.delete(record.name)
            cluster = tx.clusters.get(record.cluster)
            if cluster is not None and cluster.earlier_plan == record.name:
                tx.clusters.update(replace(cluster, earlier_plan=""))
            return pb2.DeletePlanResponse()

        async def change() -> pb2.DeletePlanResponse:
            answer = await self._store.write(lambda tx: once(tx, request, pb2.DeletePlanResponse, lambda: delete(tx)))
            if answer.is_new:
                self._hubs.plans.publish(request.name, None, now_s=self._clock())
            return answer.response

        return await to_the_end(change())

    async def watch(self, request: pb2.WatchPlanRequest) -> AsyncIterator[pb2.WatchPlanResponse]:
        """Yield the plan's states until it can no longer change without a call.

        Raises:
            ServiceError: NOT_FOUND, also if it is deleted meanwhile; DRAINING if the planner shuts down.
        """
        _require_name(request.name)
        hub = self._hubs.plans
        record = await self._store.read(lambda reader: reader.plans.require(request.name))
        after = 0 if hub.is_too_old(request.after_sequence) else request.after_sequence
        is_first = True
        async for events in hub.watch():
            event = next((event for event in events if event.key == request.name), None)
            if event is None and is_first:
                # Nothing has happened to it in this term: its state is the stored one.
                hub.publish(record.name, self._basic(record), now_s=self._clock())
            is_first = False
            if event is None:
                continue
            if event.value is None:
                raise not_found(request.name)
            if event.sequence > after:
                yield _watch_response(event.sequence, event.value, event.time_s)
            if is_settled(event.value):
                return
        raise ServiceError(Reason.ERROR_REASON_DRAINING, "this planner is shutting down: retry")

    async def cancel(self, request: pb2.CancelPlanRequest) -> pb2.CancelPlanResponse:
        checks = Checks()
        checks.name("name", request.name, names.PLAN)
        checks.request_id(request.request_id)
        checks.raise_if_wrong()

        def cancel(tx: Transaction) -> pb2.CancelPlanResponse:
            record = tx.plans.require(request.name)
            _require_etag(record, request.etag)
            if record.state in SEARCHING:
                tx.plan_documents.delete(problem_name(record.name))
            return pb2.CancelPlanResponse(plan=self._basic(record))

        async def change() -> pb2.CancelPlanResponse:
            answer = await self._store.write(lambda tx: once(tx, request, pb2.CancelPlanResponse, lambda: cancel(tx)))
            self._searches.cancel(request.name)
            return answer.response

        return await to_the_end(change())

    async def explain(self, request: pb2.ExplainPlanRequest) -> pb2.ExplainPlanResponse:
        from hetis.solver.placement.explanation import explain_plan

        _require_name(request.name)
        answered = await self._documents.answered(request.name)

        def explained() -> pb2.ExplainPlanResponse:
            return explanation_to_proto(answered.plan, explain_plan(answered.plan, answered.problem))

        return await run_in_thread_gc_paused(explained)

    async def diff(self, request: pb2.DiffPlansRequest) -> pb2.DiffPlansResponse:
        checks = Checks()
        checks.name("name", request.name, names.PLAN)
        checks.name("other", request.other, names.PLAN)
        checks.raise_if_wrong()
        one = await self._documents.answered(request.name)
        other = await self._documents.answered(request.other)
        return await run_in_thread_gc_paused(compare, one.found, other.found)

    async def read_document(self, request: pb2.ReadPlanDocumentRequest) -> AsyncIterator[pb2.ReadPlanDocumentResponse]:
        """Yield the document from the offset on in pieces; one empty piece if the offset is its end."""
        _require_name(request.name)

        def read(reader: Reader) -> tuple[PlanRecord, bytes | None]:
            return reader.plans.require(request.name), reader.plan_documents.get(request.name)

        record, document = await self._store.read(read)
        require_answer(record)
        assert document is not None, "a plan with an answer has a document"
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


def _require_name(name: str) -> None:
    checks = Checks()
    checks.name("name", name, names.PLAN)
    checks.raise_if_wrong()


def _require_etag(record: PlanRecord, etag: str) -> None:
    if etag and etag != etag_of(record):
        raise etag_mismatch(record.name, given=etag, present=etag_of(record))


def _require_deletable(reader: Reader, request: pb2.DeletePlanRequest) -> PlanRecord:
    record = reader.plans.require(request.name)
    _require_etag(record, request.etag)
    if record.state in SEARCHING:
        raise plan_state(record, "is still searched: cancel it first")
    cluster = reader.clusters.get(record.cluster)
    if record.activation in IN_FORCE or (cluster is not None and cluster.active_plan == record.name):
        raise ServiceError(
            Reason.ERROR_REASON_RESOURCE_IN_USE,
            f"{record.name} is in force in {record.cluster}",
            metadata={"name": record.name, "user": record.cluster},
        )
    return record


def _watch_response(sequence: int, plan: plan_pb2.Plan, time_s: float) -> pb2.WatchPlanResponse:
    response = pb2.WatchPlanResponse(sequence=sequence, plan=plan)
    response.event_time.FromNanoseconds(round(time_s * 1e9))
    return response
