"""The model and stages of plans' replicas, looked up once. Plans are parsed outside the event loop."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

from hetis.formats.documents import from_data
from hetis.formats.errors import DocumentError
from hetis.planner.convert.documents import document_of
from hetis.planner.convert.stages import stages_of_replica
from hetis.planner.fleet.replica import Contents
from hetis.planner.store import Store
from hetis.planner.use_cases.sources import PlanAndProblem, problem_of_plan
from hetis.solver.errors import HetisError
from hetis.solver.plan import Plan

_log = logging.getLogger("hetis.planner.fleet")
_KEPT = 2  # parsed plans: the active one and the one before


class ContentsSource(Protocol):
    """Source of the contents of plans' replicas."""

    async def of(self, plan: str, indices: Sequence[int]) -> list[Contents | None]:
        """Return the contents of these replicas of a plan; None for those whose plan is gone or unreadable."""


class PlanContents:
    """Contents of plans from their documents in the store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._parsed: OrderedDict[str, PlanAndProblem] = OrderedDict()

    async def of(self, plan: str, indices: Sequence[int]) -> list[Contents | None]:
        """Return the contents of these replicas. A plan's document never changes, so parsed plans can be kept."""
        found = self._parsed.get(plan)
        if found is None:
            document = await self._store.read(lambda tx: tx.plan_documents.get(plan))
            found = None if document is None else await asyncio.to_thread(_parse, plan, document)
            if found is None:
                return [None] * len(indices)
            self._parsed[plan] = found
            if len(self._parsed) > _KEPT:
                self._parsed.popitem(last=False)
        return await asyncio.to_thread(_contents, found, plan, indices)


def _parse(plan: str, document: bytes) -> PlanAndProblem | None:
    try:
        value = from_data(json.loads(document), name=plan)
        return problem_of_plan(value, plan) if isinstance(value, Plan) else None
    except (DocumentError, HetisError, ValueError):
        _log.exception("the document of a plan cannot be read", extra={"plan": plan})
        return None


def _contents(found: PlanAndProblem, plan: str, indices: Sequence[int]) -> list[Contents | None]:
    model = document_of(found.problem.model)
    contents: list[Contents | None] = []
    for index in indices:
        try:
            contents.append(Contents(model=model, stages=tuple(stages_of_replica(found, index))))
        except (HetisError, IndexError):
            _log.exception("a replica of a plan cannot be worked out", extra={"plan": plan, "replica": index})
            contents.append(None)
    return contents
