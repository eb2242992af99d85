"""The executor of an agent that starts engines itself: it turns assignments into processes and reports.

    assigned -> waits for its GPUs -> LOADING -> LOADED, SERVING -> withdrawn -> requests end -> stopped -> GPUs free

An engine that exits or stops answering is LOADING while it is restarted; one that is given up is FAILED, with the last
lines of its log. When the agent ends, its engines end, too; the next agent ends any that are left and starts them anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import http
import http.client
import json
import logging
import os
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any

from hetis.engines.commands import SERVER_STOPS_S
from hetis.runtime.agent.launched.parts import EngineSettingsDocument, LaunchedPart, part_of
from hetis.runtime.agent.launched.processes import NodeProcesses, end_leftovers
from hetis.runtime.agent.launched.steering import LaunchedEngine, MoveRequest, bystander, change_of
from hetis.runtime.agent.outbox import EngineRequest, EngineResponse
from hetis.runtime.agent.pressure import EngineNews, ScrapeState, device_reports, replica_report, scrape
from hetis.runtime.moves.changes import unknown
from hetis.runtime.moves.refusals import (
    RefusedError,
    failure_of,
    generation_mismatch,
    refusal,
    stale_epoch,
    unreachable,
)
from hetis.v1.change_pb2 import ChangeOutcome
from hetis.v1.executor_service_pb2 import (
    AbortMovesRequest,
    AbortMovesResponse,
    ApplyAssignmentRequest,
    ApplyAssignmentResponse,
    CopyMovesResponse,
    ReadHeadMapsRequest,
    ReserveMovesRequest,
    WatchReportsResponse,
)
from hetis.v1.failure_pb2 import ErrorReason, Failure
from hetis.v1.replica_pb2 import AssignmentGoal
from hetis.v1.report_pb2 import AssignmentState, DeviceReport, ReplicaReport

ASK_S = 5.0  # time limit for an answer
_MOST_BYTES = 1 << 20
_KEY_NEEDED = (http.HTTPStatus.UNAUTHORIZED, http.HTTPStatus.FORBIDDEN)
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy: an engine is on this node
LOOK_S, LOADING_LOOK_S, DRAIN_LOOK_S = 2.0, 0.5, 0.2  # interval between polls of an engine
_KILL_S = 5.0  # how long killed processes may take to be gone
_KEY_VARIABLE = "VLLM_API_KEY"
_log = logging.getLogger(__name__)


class Front:
    """Blocking requests to the front end at an address, each for ``ASK_S`` or little more."""

    def __init__(self, endpoint: str, *, api_key: str = "") -> None:
        self._url = f"http://{endpoint}"
        self._api_key = api_key

    def is_well(self) -> bool:
        """Return whether it answers and reports a working engine."""
        return self._get("/health")[0] == http.HTTPStatus.OK

    def serves_a_model(self) -> bool:
        """Return whether it lists a model, or requires an unknown API key for the list."""
        status, body = self._get("/v1/models")
        try:
            return status in _KEY_NEEDED or bool(status == http.HTTPStatus.OK and json.loads(body)["data"])
        except (ValueError, KeyError, TypeError):
            return False

    def news(self, before: EngineNews, now_s: float) -> EngineNews:
        """Return the news after a new scrape of its metrics, given the earlier news."""
        return before.after(scrape(f"{self._url}/metrics", timeout_s=ASK_S), now_s)

    def _get(self, path: str) -> tuple[int, bytes]:
        """Return status and body; the status is 0 if there is no answer."""
        headers = {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {}
        try:
            with _OPENER.open(urllib.request.Request(self._url + path, headers=headers), timeout=ASK_S) as answer:
                return answer.status, answer.read(_MOST_BYTES)
        except urllib.error.HTTPError as error:
            error.close()
            return error.code, b""
        except (OSError, ValueError, http.client.HTTPException):  # urllib's other errors are OSErrors
            return 0, b""


def num_at_work(news: EngineNews) -> int | None:
    """Return how many requests run or wait, or None if the last scrape failed or the engine does not report it."""
    if news.state is not ScrapeState.READ:
        return None
    counts = [count for one in news.readings.values() for count in (one.num_running, one.num_waiting)]
    return None if not counts or None in counts else sum(count or 0 for count in counts)


class LaunchExecutor:
    """An `Executor` whose engines are processes that it has started, with sessions, logs and files in ``folder``."""

    def __init__(
        self, settings: EngineSettingsDocument, *, node: str, folder: Path, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings, self._node, self._folder, self._clock = settings, node, folder, clock
        self._engine_id, self._newest_epoch = str(uuid.uuid4()), 0
        self._replicas: dict[str, LaunchedReplica] = {}
        self._replica_of: dict[str, str] = {}  # by the id of a change that was to be prepared here
        self._leaving: list[LaunchedReplica] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        grace_s = SERVER_STOPS_S + settings.drain_timeout
        ending = asyncio.to_thread(end_leftovers, folder / "sessions", grace_s=grace_s)
        self._cleared = asyncio.ensure_future(ending)
        self._cleared.add_done_callback(self._begin)
        self._is_closing = False

    # --- the agent's calls

    async def call(
        self, request: EngineRequest, progressed: Callable[[CopyMovesResponse], None] = lambda response: None
    ) -> EngineResponse:
        """Apply an assignment, withdraw a replica, or forward a call to the engine of a replica; see
        ``executor_service.proto``. Raises RefusedError: STALE_EPOCH, GENERATION_MISMATCH, what the engine refuses, or
        ENGINE_CANNOT with all the reasons; nothing changed.
        """
        if isinstance(request, ReadHeadMapsRequest):
            replica = self._replicas.get(request.replica)
        else:
            if request.epoch < self._newest_epoch:
                raise RefusedError(stale_epoch(request.epoch, self._newest_epoch))
            self._newest_epoch = request.epoch
            if isinstance(request, ApplyAssignmentRequest):
                return self._apply_assignment(request)
            if isinstance(request, ReserveMovesRequest):
                self._replica_of[change_of(request)] = request.change.replica
            replica = self._replicas.get(self._replica_of.get(change_of(request), ""))
        if replica is not None:
            return await replica.call(request, progressed)
        if isinstance(request, AbortMovesRequest):  # no engine holds anything of it
            return AbortMovesResponse(outcome=ChangeOutcome.CHANGE_OUTCOME_ABORTED)
        if isinstance(request, ReadHeadMapsRequest):
            raise refusal(ErrorReason.ERROR_REASON_NOT_FOUND, f"{request.replica} is not here", name=request.replica)
        raise unknown(change_of(request))

    def _apply_assignment(self, request: ApplyAssignmentRequest) -> ApplyAssignmentResponse:
        if request.WhichOneof("change") == "removed_replica":
            self._withdraw(request.removed_replica)
            return ApplyAssignmentResponse(state=AssignmentState.ASSIGNMENT_STATE_STOPPED)
        assignment = request.assignment
        held = self._replicas.get(assignment.replica)
        if held is not None and request.generation < held.generation:
            raise RefusedError(generation_mismatch(request.generation, held.generation))
        # A draining replica keeps its engine.
        if held is None or assignment.goal != AssignmentGoal.ASSIGNMENT_GOAL_DRAIN:
            part = part_of(assignment, self._settings, node=self._node, folder=self._folder / "replicas")
            if held is None or held.part != part:
                self._withdraw(assignment.replica)
                held = self._replicas[assignment.replica] = LaunchedReplica(
                    assignment.replica,
                    part,
                    self._settings,
                    node=self._node,
                    sessions=self._folder / "sessions",
                    changed=self._changed.set,
                    clock=self._clock,
                )
        held.assign(request, self._clock())
        self._start_waiting()
        self._changed.set()
        return ApplyAssignmentResponse(state=held.state(self._clock()))

    async def watch_reports(self, min_interval_s: float) -> AsyncIterator[WatchReportsResponse]:
        """Yield a report at once and after each change."""
        while True:
            self._changed.clear()
            yield self._report()
            await asyncio.sleep(min_interval_s)
            await self._changed.wait()

    async def close(self) -> None:
        """Let running requests end, then stop every engine. If cancelled, kill all of them."""
        self._is_closing = True
        for name in list(self._replicas):
            self._withdraw(name)
        try:
            await asyncio.gather(self._cleared, *self._tasks, return_exceptions=True)
        finally:
            for one in self._leaving:
                one.kill()
            for one in self._leaving:
                one.join(_KILL_S)

    def _begin(self, cleared: asyncio.Future[list[int]]) -> None:
        if not cleared.cancelled() and (error := cleared.exception()) is not None:
            _log.error("processes left by an earlier agent could not be stopped", exc_info=error)
        self._start_waiting()

    def _withdraw(self, name: str) -> None:
        """Stop a replica once its requests have ended, which frees its GPUs."""
        replica = self._replicas.pop(name, None)
        if replica is not None:
            self._replica_of = {change: of for change, of in self._replica_of.items() if of != name}
            self._leaving.append(replica)
            self._spawn(self._retire(replica))
            self._changed.set()

    async def _retire(self, replica: LaunchedReplica) -> None:
        await replica.retire()
        if replica.engine is not None:
            await replica.engine.close()
        self._leaving.remove(replica)
        self._start_waiting()

    def _start_waiting(self) -> None:
        """Start every waiting replica whose GPUs are free."""
        if not self._cleared.done() or self._is_closing:
            return
        taken = {gpu for one in self._leaving for gpu in one.part.gpus}
        for replica in self._replicas.values():
            if not replica.has_begun and not replica.drains and taken.isdisjoint(replica.part.gpus):
                replica.begin()
                self._spawn(replica.watch())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("monitoring an engine failed", exc_info=error)

    def _report(self) -> WatchReportsResponse:
        now_s = self._clock()
        report = WatchReportsResponse(engine_id=self._engine_id, newest_epoch=self._newest_epoch)
        for replica in self._replicas.values():
            report.replicas.append(replica.report(now_s))
            report.devices.extend(replica.devices())
            report.changes.extend(replica.engine.statuses() if replica.engine else ())
            newest = replica.engine.said.newest_epoch if replica.engine else 0
            report.newest_epoch = max(report.newest_epoch, newest)
        return report


class LaunchedReplica:
    """A replica on this node: its processes and the assignment.

    Attributes:
        part: the processes of the replica on this node, and its endpoint; another part is another `LaunchedReplica`.
        generation: that of the last assignment, repeated in reports; 0 before the first. An earlier one is refused.
        news: the latest news from the metrics of its front end.
        engine: its front end as the agent steers it. None: that is not here, or has no attention workers.
    """

    def __init__(
        self,
        name: str,
        part: LaunchedPart,
        settings: EngineSettingsDocument,
        *,
        node: str,
        sessions: Path,
        changed: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self.name, self.part, self.generation, self.news = name, part, 0, EngineNews()
        self._settings, self._node, self._clock, self._changed = settings, node, clock, changed
        loop, self._notified = asyncio.get_running_loop(), asyncio.Event()

        def notify() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nothing waits any more
                loop.call_soon_threadsafe(self._notified.set)

        self._processes = NodeProcesses(
            name.rpartition("/")[2],
            part,
            sessions=sessions,
            ready_s=settings.ready_timeout,
            silence_s=settings.silence_timeout,
            changed=notify,
            clock=clock,
        )
        key = settings.environment.get(_KEY_VARIABLE, os.environ.get(_KEY_VARIABLE, ""))
        self._front = Front(part.endpoint, api_key=key) if part.endpoint else None
        self.engine = LaunchedEngine(name, part.socket, changed=changed) if part.socket else None
        self._goal = AssignmentGoal.ASSIGNMENT_GOAL_UNSPECIFIED
        self._drains_since_s = 0.0
        self._ready_life = 0  # life of the front end in which it last served
        self._is_primary = self._has_served = self.has_begun = False

    def assign(self, request: ApplyAssignmentRequest, now_s: float) -> None:
        """Take a new assignment for the same processes."""
        assignment = request.assignment
        if assignment.goal == AssignmentGoal.ASSIGNMENT_GOAL_DRAIN != self._goal:
            self._drains_since_s = now_s
        self._goal, self.generation = assignment.goal, request.generation
        self._is_primary = assignment.primary_node == self._node
        if self.engine is not None:
            self.engine.assign(request)

    async def call(
        self, request: MoveRequest | ReadHeadMapsRequest, progressed: Callable[[CopyMovesResponse], None]
    ) -> EngineResponse:
        """Answer a call about the moves of the replica's heads. Raises RefusedError."""
        if self.engine is not None:
            return await self.engine.call(request, progressed)
        if isinstance(request, AbortMovesRequest):
            return AbortMovesResponse(outcome=ChangeOutcome.CHANGE_OUTCOME_ABORTED)
        if self._front is None and not isinstance(request, ReadHeadMapsRequest):
            return bystander(request)
        why = f"{self.name} has no attention workers, so its heads cannot move"
        raise RefusedError(self._why_unsteered or failure_of(ErrorReason.ERROR_REASON_ENGINE_CANNOT, why))

    @property
    def _why_unsteered(self) -> Failure | None:
        """Why its heads cannot move although it has attention workers."""
        if self.engine is not None:
            return self.engine.refusal
        why = self.part.why_unsteered
        return failure_of(ErrorReason.ERROR_REASON_ENGINE_CANNOT, why) if why else None

    def begin(self) -> None:
        """Start the processes. Call it once."""
        self.has_begun = True
        self._processes.start()

    @property
    def drains(self) -> bool:
        """Whether it is to end. One that does not run, as after a restart of the agent, is not started for that."""
        return self._goal == AssignmentGoal.ASSIGNMENT_GOAL_DRAIN

    @property
    def is_ready(self) -> bool:
        """True if the replica serves or, if its front end is on another node, all its processes run."""
        if self._front is None:
            return self.has_begun and self._processes.are_all_up
        return 0 < self._ready_life == self._processes.life

    def state(self, now_s: float) -> AssignmentState.ValueType:
        """Return the state of its assignment."""
        if self._processes.has_failed:
            return AssignmentState.ASSIGNMENT_STATE_FAILED
        if not self.is_ready:
            # A replica that does not serve has no requests to drain.
            return AssignmentState.ASSIGNMENT_STATE_STOPPED if self.drains else AssignmentState.ASSIGNMENT_STATE_LOADING
        if self._goal == AssignmentGoal.ASSIGNMENT_GOAL_LOAD:
            return AssignmentState.ASSIGNMENT_STATE_LOADED
        if self.drains and now_s - self._drains_since_s >= self._settings.router_delay:
            return AssignmentState.ASSIGNMENT_STATE_DRAINING
        return AssignmentState.ASSIGNMENT_STATE_SERVING

    def report(self, now_s: float) -> ReplicaReport:
        """Return the report for the planner."""
        said = self.engine.replica_report() if self.engine is not None and self.is_ready else None
        report = ReplicaReport(replica=self.name)
        if said is not None:
            report.CopyFrom(said)
        else:
            for model, reading in self.news.readings.items():  # an engine that we start serves one model
                report = replica_report(self.name, reading, earlier=self.news.earlier.get(model))
        report.assignment_state, report.generation = self.state(now_s), self.generation
        report.is_primary, report.endpoint = self._is_primary, self.part.endpoint
        report.engine_id = "" if self.engine is None else self.engine.said.engine_id
        if self.is_ready and self._why_unsteered is not None:
            report.failure.CopyFrom(self._why_unsteered)
        has_failed = report.assignment_state == AssignmentState.ASSIGNMENT_STATE_FAILED
        # The planner gives up a replica that fails before it has ever served, so that is reported only once we give up.
        if has_failed or (self._has_served and not self.is_ready):
            report.failure.CopyFrom(unreachable(self._processes.failure or f"{self.name} does not answer"))
        return report

    def devices(self) -> Iterable[DeviceReport]:
        """Return the KV of its GPUs on this node, those of attention workers only if their engine reports them."""
        if self.engine is not None and self.engine.replica_report() is not None:
            return self.engine.said.devices
        return device_reports(self.news.readings.values(), self.part.ranks)

    async def watch(self) -> None:
        """Poll the engine until its processes have ended for good."""
        while not self._processes.is_over:
            if self.engine is not None and not self.is_ready:
                self.engine.ended(self._processes.failure or "the engine ended")
            if self._front is not None and (life := self._processes.life):
                await self._look(self._front, life)
            self._changed()
            self._notified.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S if self.is_ready else LOADING_LOOK_S):
                    await self._notified.wait()
        self._changed()

    async def retire(self) -> None:
        """Wait until no request runs, at most ``drain_timeout``; then stop the processes and wait for their end."""
        if not self.has_begun:
            return
        deadline_s = self._clock() + self._settings.drain_timeout
        while self._front is not None and self.is_ready and self._clock() < deadline_s:
            self.news = await asyncio.to_thread(self._front.news, self.news, self._clock())
            if num_at_work(self.news) == 0:
                break
            await asyncio.sleep(DRAIN_LOOK_S)
        self._processes.stop()
        while not self._processes.is_over:
            await asyncio.sleep(DRAIN_LOOK_S)
        _log.info("%s is stopped", self.name)

    def kill(self) -> None:
        """End the processes at once."""
        self._processes.stop()
        self._processes.stop()

    def join(self, seconds: float) -> None:
        """Block until the processes are gone, for at most ``seconds``."""
        self._processes.join(seconds)

    async def _look(self, front: Front, life: int) -> None:
        if not await asyncio.to_thread(front.is_well):
            self._processes.was_silent(life)
            return
        if self._ready_life != life:
            if not await asyncio.to_thread(front.serves_a_model):
                return
            _log.info("%s serves at %s", self.name, self.part.endpoint)
            self._ready_life, self._has_served, self.news = life, True, EngineNews()
            if self.engine is not None:
                self.engine.began()
        self._processes.answered(life)
        self.news = await asyncio.to_thread(front.news, self.news, self._clock())
