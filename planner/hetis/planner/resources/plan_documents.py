"""Plans parsed from their documents; the last few are cached, since they are often requested several times in a row."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass

from hetis.formats.documents import from_data
from hetis.planner.failures import Reason, ServiceError
from hetis.planner.resources.plan_views import SEARCHING
from hetis.planner.store import PlanRecord, Reader, Store
from hetis.planner.threads import run_in_thread_gc_paused
from hetis.planner.use_cases.sources import PlanAndProblem, problem_of_plan
from hetis.solver.plan import Plan
from hetis.solver.problem import PlacementProblem
from hetis.v1 import plan_pb2

_MOST_KEPT_BYTES = 64 << 20  # of documents


@dataclass(frozen=True, slots=True, kw_only=True)
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


class PlanDocuments:
    """Documents of plans; they never change, so cached ones never become stale."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._read: OrderedDict[str, tuple[bytes, PlanAndProblem]] = OrderedDict()  # by digest

    async def answered(self, name: str) -> AnsweredPlan:
        """Return a plan that has an answer.

        Raises:
            ServiceError: NOT_FOUND; PLAN_STATE if it has no answer.
        """
        record = await self._store.read(lambda reader: reader.plans.require(name))
        require_answer(record)
        return await self.of(record)

    async def of(self, record: PlanRecord) -> AnsweredPlan:
        """Return the answered plan of a record that has an answer."""
        digest = record.body.result.document.digest
        if digest not in self._read:
            document = await self._store.read(lambda reader: _document(reader, record.name))
            self._read[digest] = document, await run_in_thread_gc_paused(_parsed, document, record.name)
        self._read.move_to_end(digest)
        document, found = self._read[digest]
        while len(self._read) > 1 and sum(len(kept) for kept, _ in self._read.values()) > _MOST_KEPT_BYTES:
            self._read.popitem(last=False)
        return AnsweredPlan(record=record, document=document, found=found)


def require_answer(record: PlanRecord) -> None:
    """Check that the plan has an answer.

    Raises:
        ServiceError: PLAN_STATE.
    """
    if not record.body.HasField("result"):
        raise plan_state(record, "has no answer" + (" yet" if record.state in SEARCHING else ""))


def plan_state(record: PlanRecord, what: str) -> ServiceError:
    """Return the error for a call that the plan's state does not allow.

    ``what`` follows its name and state in the message.
    """
    state = plan_pb2.PlanState.Name(record.state).removeprefix("PLAN_STATE_")
    return ServiceError(
        Reason.ERROR_REASON_PLAN_STATE,
        f"{record.name} is {state} and {what}",
        metadata={"name": record.name, "state": state},
    )


def _document(reader: Reader, name: str) -> bytes:
    document = reader.plan_documents.get(name)
    if document is None:  # deleted since
        reader.plans.require(name)
        raise AssertionError(f"{name} has an answer without a document")
    return document


def _parsed(document: bytes, name: str) -> PlanAndProblem:
    plan = from_data(json.loads(document), name=name)
    assert isinstance(plan, Plan)
    return problem_of_plan(plan, name)
