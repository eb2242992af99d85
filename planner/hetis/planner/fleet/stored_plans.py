"""Plans with an answer: their documents are read from the store, parsed and cached for calls and for the fleet."""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from hetis.formats.documents import from_data
from hetis.formats.errors import DocumentError, single_problem
from hetis.planner.convert.documents import document_of, of_another_version
from hetis.planner.convert.names import word_of
from hetis.planner.convert.plans import MOST_PLAN_BYTES, complete, gpu_kinds_to_proto, kv_partners_to_proto
from hetis.planner.convert.stages import stages_of_replica
from hetis.planner.failures import Reason, ServiceError, not_found
from hetis.planner.fleet.replica import Contents
from hetis.planner.store import PlanRecord, Reader, Store
from hetis.planner.threads import run_in_thread_gc_paused
from hetis.planner.use_cases.saved_plans import PlanAndProblem, problem_of_plan
from hetis.solver.errors import HetisError
from hetis.solver.plan import Plan
from hetis.solver.problem import PlacementProblem
from hetis.v1 import document_pb2, plan_pb2, replica_pb2

SEARCHING = frozenset({plan_pb2.PLAN_STATE_QUEUED, plan_pb2.PLAN_STATE_SOLVING})
_MOST_KEPT_BYTES = 64 << 20  # limit on the cached documents
_ERROR_BYTES = 1 << 10  # what the error of an unreadable document counts for
_UNREADABLE = (Reason.ERROR_REASON_NOT_FOUND, Reason.ERROR_REASON_PLAN_STATE)
_log = logging.getLogger("hetis.planner.fleet")


@dataclass(frozen=True, kw_only=True)
class AnsweredPlan:
    """A plan with an answer, and the problem that it solves."""

    record: PlanRecord
    document: bytes
    found: PlanAndProblem

    @property
    def plan(self) -> Plan:
        return self.found.plan

    @property
    def problem(self) -> PlacementProblem:
        return self.found.problem

    @cached_property
    def shared(self) -> tuple[document_pb2.Document, Sequence[Sequence[replica_pb2.KvPartner]]]:
        """What the contents of all replicas are made of: the model, and the partners of each replica."""
        return document_of(self.problem.model), kv_partners_to_proto(self.plan)

    @cached_property
    def _full(self) -> bytes:
        """The result in the view FULL where nothing else is in its message, encoded."""
        message = plan_pb2.Plan()
        complete(message, self.plan, self.document)
        return message.result.SerializeToString()

    def complete(self, message: plan_pb2.Plan) -> None:
        """Turn the view BASIC into FULL, as far as the message has room."""
        if message.ByteSize() + len(self._full) <= MOST_PLAN_BYTES:
            message.result.MergeFromString(self._full)
        else:
            complete(message, self.plan, self.document)

    @cached_property
    def _contents(self) -> dict[int, Contents | None]:
        return {}

    def contents(self, index: int) -> Contents | None:
        """Return what the plan says of a replica besides its shape; None if it cannot be derived, which is logged."""
        if index not in self._contents:
            self._contents[index] = self._derived(index)
        return self._contents[index]

    def _derived(self, index: int) -> Contents | None:
        try:
            model, partners = self.shared
            replica, types = self.plan.replicas[index], self.problem.cluster.gpu_types
            kinds = gpu_kinds_to_proto(replica, partners[index], types)
            stages = tuple(stages_of_replica(self.found, index))
            return Contents(model=model, stages=stages, kv_partners=partners[index], gpu_kinds=kinds)
        except (HetisError, LookupError):
            extra = {"plan": self.record.name, "replica": index}
            _log.exception("the contents of a replica cannot be derived from its plan", extra=extra)
            return None


class StoredPlans:
    """The plans in the store. Their documents never change, so cached ones never become stale."""

    def __init__(self, store: Store) -> None:
        self._store = store
        # By digest, since names can be reused; what cannot be read is kept as well, so that it is logged once
        self._read: OrderedDict[str, AnsweredPlan | DocumentError] = OrderedDict()

    async def answered(self, name: str) -> AnsweredPlan:
        """Return a plan that has an answer. Raises NOT_FOUND, or PLAN_STATE if it has none or cannot be read."""
        record = await self._store.require(Reader.plans, name)
        require_answer(record)
        return await self.of(record)

    async def in_force(self, cluster: str) -> AnsweredPlan | None:
        """Return the plan of a cluster that is in force or being activated. Raises as `of` does."""

        def read(reader: Reader) -> PlanRecord | None:
            found = reader.clusters.get(cluster)
            return None if found is None or not found.active_plan else reader.plans.get(found.active_plan)

        record = await self._store.read(read)
        return None if record is None else await self.of(record)

    async def of(self, record: PlanRecord) -> AnsweredPlan:
        """Return the plan of a record, which must have an answer. Raises PLAN_STATE if its document cannot be read."""
        return replace(await self._kept(record), record=record)

    async def complete(self, message: plan_pb2.Plan, record: PlanRecord) -> None:
        """Turn a plan's view BASIC into FULL. Raises PLAN_STATE if its document cannot be read."""
        await run_in_thread_gc_paused((await self._kept(record)).complete, message)

    async def contents(self, plan: str, indices: Sequence[int]) -> list[Contents | None]:
        """Return the contents of these replicas of a plan; None for those that cannot be derived."""
        try:
            kept = await self._kept(await self._store.require(Reader.plans, plan))
        except ServiceError as error:
            if error.reason not in _UNREADABLE:
                raise
            return [None] * len(indices)
        return await run_in_thread_gc_paused(lambda: list(map(kept.contents, indices)))

    async def read_ahead(self, plan: str) -> None:
        """Parse a plan and derive the contents of its replicas, unless both are known or it cannot be read."""
        record = await self._store.get(Reader.plans, plan)
        if record is not None and record.body.HasField("result"):
            try:
                kept = await self._kept(record)
            except ServiceError as error:
                if error.reason not in _UNREADABLE:
                    raise
            else:
                await run_in_thread_gc_paused(lambda: list(map(kept.contents, range(len(kept.plan.replicas)))))

    async def _kept(self, record: PlanRecord) -> AnsweredPlan:
        """Return the plan with the record for which it was parsed. Raises PLAN_STATE if it cannot be read."""
        digest = record.body.result.document.digest
        if digest not in self._read:
            document = await self._store.read(lambda reader: reader.plan_documents.get(record.name))
            if document is None:  # deleted in the meantime
                raise not_found(record.name)
            self._read[digest] = await run_in_thread_gc_paused(_parsed, record, document)
        self._read.move_to_end(digest)
        kept = self._read[digest]
        while len(self._read) > 1 and sum(map(_num_bytes, self._read.values())) > _MOST_KEPT_BYTES:
            self._read.popitem(last=False)
        if isinstance(kept, DocumentError):
            raise plan_state(record, f"was made by {of_another_version(kept)}")
        return kept


def require_answer(record: PlanRecord) -> None:
    """Check that the plan has an answer. Raises PLAN_STATE."""
    if not record.body.HasField("result"):
        raise plan_state(record, "has no answer" + (" yet" if record.state in SEARCHING else ""))


def plan_state(record: PlanRecord, what: str) -> ServiceError:
    """Return the error for a call in the wrong state; in the message ``what`` follows the plan's name and state."""
    state = word_of(plan_pb2.PlanState, record.state)
    message = f"{record.name} is {state} and {what}"
    return ServiceError(Reason.ERROR_REASON_PLAN_STATE, message, metadata={"name": record.name, "state": state})


def _parsed(record: PlanRecord, document: bytes) -> AnsweredPlan | DocumentError:
    try:
        plan = from_data(json.loads(document), name=record.name)
        if not isinstance(plan, Plan):
            raise single_problem(record.name, f"is a {type(plan).__name__}, expected a Plan")
        return AnsweredPlan(record=record, document=document, found=problem_of_plan(plan, record.name))
    except DocumentError as error:
        _log.error("a plan's document cannot be read", extra={"plan": record.name, "why": str(error)})
        return error
    except (HetisError, ValueError, LookupError) as error:
        _log.exception("a plan's document cannot be read", extra={"plan": record.name})
        return single_problem(record.name, str(error))


def _num_bytes(kept: AnsweredPlan | DocumentError) -> int:
    return _ERROR_BYTES if isinstance(kept, DocumentError) else 2 * len(kept.document)  # and in its message
