"""Retention: what is older than the configuration says is deleted, once a day."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from hetis.planner.failures import ServiceError
from hetis.planner.fleet.stored_plans import SEARCHING
from hetis.planner.resources.proposals import StoredPlacements
from hetis.planner.store import Reader, Store
from hetis.v1 import plan_pb2

FIRST_S = 600.0  # after a takeover there is more urgent work
EVERY_S, AGAIN_S = 86_400.0, 60.0  # between two deletions, the latter after a failure
_PAGE = 500  # plans that are looked at in one read
_ANSWERED = [state for state in plan_pb2.PlanState.values() if state and state not in SEARCHING]
_log = logging.getLogger("hetis.planner.retention")


@dataclass(slots=True, eq=False)
class Retention:
    """Deletes old plans and old lines of the audit log; None: they are kept for ever. Run `run` once."""

    _store: Store
    _placements: StoredPlacements
    _plans_s: float | None
    _audit_s: float | None

    async def run(self) -> None:
        await asyncio.sleep(FIRST_S)
        while True:
            try:
                await self.step()
                await asyncio.sleep(EVERY_S)
            except ServiceError as error:
                _log.warning("what is too old could not be deleted: %s", error)
                await asyncio.sleep(AGAIN_S)

    async def step(self) -> None:
        """Delete what is too old, each plan as a caller would."""
        now_s = self._store.clock()
        if self._plans_s is not None:
            before_s = now_s - self._plans_s
            for plan in await self._store.read(lambda reader: unused_plans(reader, before_s)):
                await self._placements.withdraw(plan)
        if self._audit_s is not None:
            oldest_s = now_s - self._audit_s
            while await self._store.write(lambda tx: tx.audit.forget_before(oldest_s, time_s=tx.now_s)):
                await asyncio.sleep(0)


def unused_plans(reader: Reader, before_s: float) -> list[str]:
    """Return the plans made before a Unix time that are neither searched, nor in force, nor what a rollback returns to.

    A plan in force is not INACTIVE, whatever has become of its activation.
    """
    found, earlier, after = list[str](), dict[str, str](), (before_s, "")
    while page := reader.plans.page(after, _PAGE, state=_ANSWERED, activation=plan_pb2.ACTIVATION_STATE_INACTIVE):
        for plan in page:
            if plan.cluster not in earlier:
                cluster = reader.clusters.get(plan.cluster)
                earlier[plan.cluster] = "" if cluster is None else cluster.earlier_plan
            if plan.name != earlier[plan.cluster]:
                found.append(plan.name)
        after = page[-1].create_time_s, page[-1].name
    return found
