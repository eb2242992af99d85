"""Searches from QUEUED to their end: every change of state is durable before it is published."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from hetis.formats.errors import DocumentError
from hetis.planner.callers import PLANNER
from hetis.planner.convert.plans import digest_of, progress_to_proto
from hetis.planner.convert.times import timestamp
from hetis.planner.failures import Reason, ServiceError
from hetis.planner.jobs.outcomes import (
    CalledOff,
    Crashed,
    FoundPlan,
    Infeasible,
    Invalid,
    NothingFound,
    Outcome,
    Unsound,
)
from hetis.planner.jobs.pool import SolverPool
from hetis.planner.jobs.posed import PosedProblem, posed_from_json
from hetis.planner.jobs.search import Begun, Search
from hetis.planner.resources.hubs import Hubs
from hetis.planner.resources.plan_views import SEARCHING, basic_view
from hetis.planner.store import PlanRecord, Store, Transaction
from hetis.planner.threads import run_in_thread_gc_paused
from hetis.solver.budget import Progress
from hetis.v1 import failure_pb2, plan_pb2

_log = logging.getLogger(__name__)

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0  # between attempts to write to an unavailable store


def problem_name(plan: str) -> str:
    """Return the name under which a plan's posed problem is stored during the search; see `Store`'s plan documents.

    Cancelling removes it, so that the next planner does not start a cancelled search again.
    """
    return f"{plan}/problem"


class PlanSearches:
    """The searches of one planner. `begin` and `resume` start them, `stop` leaves them to the next planner."""

    def __init__(self, store: Store, hubs: Hubs, pool: SolverPool, *, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._hubs = hubs
        self._pool = pool
        self._clock = clock
        self._searches: dict[str, Search] = {}
        self._progress: dict[str, plan_pb2.SolveProgress] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def progress_of(self, plan: str) -> plan_pb2.SolveProgress | None:
        """Return the latest progress of a running search, or None."""
        return self._progress.get(plan)

    def begin(self, plan: str, search: Search, posed: PosedProblem, posed_json: bytes) -> None:
        """Begin the search for a plan that is in the store already."""
        self._searches[plan] = search
        search.begin(posed_json, time_limit_s=posed.settings.time_limit_s)
        task = asyncio.create_task(self._follow(plan, search, posed), name=f"search for {plan}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def cancel(self, plan: str) -> None:
        """Cancel the search; does nothing if it has ended."""
        if (search := self._searches.get(plan)) is not None:
            search.cancel()

    def cluster_deleted(self, _cluster: str, plans: Sequence[str]) -> None:
        """Cancel the searches for plans of a deleted cluster."""
        for plan in plans:
            self.cancel(plan)

    async def resume(self) -> None:
        """Restart the searches that the previous planner had not finished, oldest first, however many there are."""
        left = await self._store.read(lambda reader: reader.plans.all(state=SEARCHING))
        for record in reversed(left):
            posed_json = await self._posed_json(record.name)
            if posed_json is None:
                await self._end(record.name, None, CalledOff())
                continue
            try:
                posed = await run_in_thread_gc_paused(posed_from_json, posed_json)
            except DocumentError as error:
                await self._end(record.name, None, Invalid(f"the problem was posed by another version: {error}"))
                continue
            if record.state != plan_pb2.PLAN_STATE_QUEUED:
                await self._change(record.name, _queued_again)
            self.begin(record.name, self._pool.reserve(PLANNER.name, even_if_full=True), posed, posed_json)

    async def _posed_json(self, plan: str) -> bytes | None:
        return await self._store.read(lambda reader: reader.plan_documents.get(problem_name(plan)))

    async def stop(self) -> None:
        """Stop following the searches; the store keeps what is QUEUED or SOLVING."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _follow(self, plan: str, search: Search, posed: PosedProblem) -> None:
        record: PlanRecord | None = None
        try:
            async for news in search.news():
                match news:
                    case Begun():
                        record = await self._change(plan, self._solving)
                    case Progress():
                        self._progress[plan] = progress_to_proto(news, posed.objective.unit)
                        if record is not None:
                            self._publish(record)
                    case outcome:
                        await self._end(plan, posed, outcome, is_called_off=search.is_called_off)
        finally:
            self._searches.pop(plan, None)
            self._progress.pop(plan, None)

    def _publish(self, record: PlanRecord) -> None:
        progress = self._progress.get(record.name) if record.state in SEARCHING else None
        self._hubs.plans.publish(record.name, basic_view(record, progress), now_s=self._clock())

    def _solving(self, record: PlanRecord, _tx: Transaction) -> PlanRecord:
        record.body.solve_start_time.CopyFrom(timestamp(self._clock()))
        return replace(record, state=plan_pb2.PLAN_STATE_SOLVING)

    async def _end(
        self, plan: str, posed: PosedProblem | None, outcome: Outcome, *, is_called_off: bool = True
    ) -> None:
        result: plan_pb2.PlanResult | None = None
        if isinstance(outcome, FoundPlan):
            result = plan_pb2.PlanResult.FromString(outcome.result)
            if await run_in_thread_gc_paused(digest_of, outcome.document) != result.document.digest:
                outcome = Unsound(("its document is not the one that was checked",))

        def change(record: PlanRecord, tx: Transaction) -> PlanRecord:
            tx.plan_documents.delete(problem_name(plan))
            record.body.solve_end_time.CopyFrom(timestamp(self._clock()))
            if (progress := self._progress.get(plan)) is not None:
                record.body.progress.CopyFrom(progress)
            if result is not None and isinstance(outcome, FoundPlan):
                tx.plan_documents.put(plan, outcome.document)
                record.body.result.CopyFrom(result)
                interrupted = result.status == plan_pb2.SOLVE_STATUS_INTERRUPTED
                return replace(
                    record, state=plan_pb2.PLAN_STATE_CANCELLED if interrupted else plan_pb2.PLAN_STATE_READY
                )
            if isinstance(outcome, CalledOff) or (isinstance(outcome, NothingFound) and is_called_off):
                return replace(record, state=plan_pb2.PLAN_STATE_CANCELLED)
            if isinstance(outcome, Infeasible):
                record.body.infeasible_reasons.extend(outcome.reasons)
                return replace(record, state=plan_pb2.PLAN_STATE_INFEASIBLE)
            record.body.failure.CopyFrom(_failure(outcome, posed))
            return replace(record, state=plan_pb2.PLAN_STATE_FAILED)

        await self._change(plan, change)

    async def _change(self, plan: str, change: Callable[[PlanRecord, Transaction], PlanRecord]) -> PlanRecord | None:
        """Change a record and tell the watchers; retries while the store is unavailable."""

        def work(tx: Transaction) -> PlanRecord | None:
            record = tx.plans.get(plan)
            if record is None:  # its cluster was deleted
                tx.plan_documents.delete(problem_name(plan))
                return None
            return tx.plans.update(change(record, tx))

        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                record = await self._store.write(work)
                break
            except ServiceError as error:
                if error.reason == Reason.ERROR_REASON_NOT_LEADER:
                    raise  # the next planner resumes it
                _log.warning("%s: %s; trying again in %g s", plan, error, pause_s)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        if record is not None:
            self._publish(record)
        return record


def _queued_again(record: PlanRecord, _tx: Transaction) -> PlanRecord:
    record.body.ClearField("solve_start_time")
    return replace(record, state=plan_pb2.PLAN_STATE_QUEUED)


def _failure(outcome: Outcome, posed: PosedProblem | None) -> failure_pb2.Failure:
    match outcome:
        case NothingFound(message):
            limit_s = posed.settings.time_limit_s if posed is not None else 0.0
            error = ServiceError(Reason.ERROR_REASON_NO_PLAN_FOUND, message, metadata={"time_limit_s": f"{limit_s:g}"})
        case Unsound(violations):
            error = ServiceError(
                Reason.ERROR_REASON_PLAN_CHECK_FAILED,
                f"the plan fails {len(violations)} of its checks, a bug in hetis: {'; '.join(violations[:5])}",
                metadata={"violations": len(violations)},
            )
        case Invalid(message):
            error = ServiceError(Reason.ERROR_REASON_INVALID_PROBLEM, message)
        case Crashed(exit_code, message):
            error = ServiceError(Reason.ERROR_REASON_SOLVER_CRASHED, message, metadata={"exit_code": exit_code})
        case _:
            raise AssertionError(f"{outcome} is no failure")
    return error.to_proto()
