"""An engine that the agent has started, as the agent steers it: `ExecutorService` on the engine's socket.

Every life of the engine begins with the newest assignment. If the engine cannot run it as planned (`bind` in
`hetis.runtime.vllm.steering`), it serves without being steered, and every request to move heads is answered with the
reason. A change that a life leaves open when it ends is aborted: its KV is gone.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path

from hetis.runtime.agent.executor import SocketExecutor
from hetis.runtime.agent.outbox import EngineResponse
from hetis.runtime.agent.replica import CALL_S, UNREACHABLE
from hetis.runtime.moves.changes import MOST_ABORTED, unknown
from hetis.runtime.moves.refusals import RefusedError, refusal, unreachable
from hetis.v1.change_pb2 import ChangeOutcome, ChangePhase, ChangeStatus
from hetis.v1.changes import FLIPPED, OPEN, PHASE_OF_OUTCOME
from hetis.v1.executor_service_pb2 import (
    AbortMovesRequest,
    AbortMovesResponse,
    ApplyAssignmentRequest,
    CopyMovesRequest,
    CopyMovesResponse,
    FlipMovesRequest,
    FlipMovesResponse,
    ReadHeadMapsRequest,
    ReleaseMovesRequest,
    ReleaseMovesResponse,
    ReserveMovesRequest,
    ReserveMovesResponse,
    WatchReportsResponse,
)
from hetis.v1.failure_pb2 import ErrorReason, Failure
from hetis.v1.report_pb2 import ReplicaReport

LEAST_REPORT_S, AGAIN_S = 0.2, 0.5  # least time between two reports, and before an unreachable engine is called again
_log = logging.getLogger(__name__)
MoveRequest = ReserveMovesRequest | CopyMovesRequest | FlipMovesRequest | ReleaseMovesRequest | AbortMovesRequest


def change_of(request: MoveRequest) -> str:
    """Return the id of the change that a request is about."""
    return request.change.change_id if isinstance(request, ReserveMovesRequest) else request.change_id


def bystander(request: MoveRequest) -> EngineResponse:
    """Return the answer of a node without the replica's front end, where nothing is to be done: the ranks of the engine
    reserve, copy and free KV on the attention workers themselves.
    """
    match request:
        case ReserveMovesRequest():
            return ReserveMovesResponse()
        case CopyMovesRequest():
            return CopyMovesResponse()
        case ReleaseMovesRequest():
            return ReleaseMovesResponse()
    why = "the front end of the replica, which decides about its moves, is on another node"
    raise refusal(ErrorReason.ERROR_REASON_ENGINE_CANNOT, why)


class LaunchedEngine:
    """The front end of one replica, across its lives.

    Attributes:
        generation: that of the replica's state, as last assigned or flipped here.
        refusal: why the present life serves without being steered; None: it is steered, or not yet assigned.
    """

    def __init__(self, replica: str, socket: Path, *, changed: Callable[[], None]) -> None:
        """``changed`` is called after each report of the engine."""
        self.generation = 0
        self.refusal: Failure | None = None
        self._replica, self._changed = replica, changed
        self._executor = SocketExecutor(socket)
        self._wanted: ApplyAssignmentRequest | None = None
        self._following: asyncio.Task[None] | None = None  # runs during a life
        self._said = WatchReportsResponse()  # the last report of this life
        # Changes of this life, as it answered last: reports come later
        self._phases: dict[str, ChangePhase.ValueType] = {}
        self._ended: dict[str, ChangeStatus] = {}  # changes of earlier lives, the newest last

    @property
    def is_alive(self) -> bool:
        return self._following is not None

    def assign(self, request: ApplyAssignmentRequest) -> None:
        """Run an assignment, in this life and in later ones."""
        self._wanted, self.generation = request, max(self.generation, request.generation)
        if self._following is not None:
            self._following.cancel()
            self._begin_to_follow(request)

    def began(self) -> None:
        """Steer a life of the engine, which now answers."""
        assert self._wanted is not None, "it was assigned before it was started"
        self.ended("the engine was started again")
        request = ApplyAssignmentRequest()
        request.CopyFrom(self._wanted)
        request.generation = self.generation  # that of a flip in an earlier life, which the planner knows
        self._begin_to_follow(request)

    def ended(self, why: str) -> None:
        """Abort what the life that has ended left open."""
        if self._following is None:
            return
        self._following.cancel()
        self._following, self.refusal = None, None
        said = {status.change_id: status for status in self._said.changes if status.replica == self._replica}
        for change_id, phase in ({one: status.phase for one, status in said.items()} | self._phases).items():
            status = said.get(change_id, ChangeStatus(change_id=change_id))
            if phase in OPEN:
                status.phase = ChangePhase.CHANGE_PHASE_ABORTED
                status.failure.CopyFrom(unreachable(why))
            else:
                status.phase = ChangePhase.CHANGE_PHASE_RELEASED if phase in FLIPPED else phase
            status.replica, status.generation = self._replica, self.generation
            self._ended[change_id] = status
        for change_id in list(self._ended)[: max(len(self._ended) - MOST_ABORTED, 0)]:
            del self._ended[change_id]
        self._said = WatchReportsResponse()
        self._phases.clear()

    async def close(self) -> None:
        """End all calls."""
        self.ended("the engine is stopped")
        await self._executor.close()

    # --- calls

    async def call(
        self, request: MoveRequest | ReadHeadMapsRequest, progressed: Callable[[CopyMovesResponse], None]
    ) -> EngineResponse:
        """Forward a call to the present life. A change of an earlier one has ended. Raises RefusedError."""
        change_id = "" if isinstance(request, ReadHeadMapsRequest) else change_of(request)
        if isinstance(request, AbortMovesRequest) and (change_id in self._ended or not self.is_steered):
            return self._outcome(change_id)
        if change_id in self._ended:  # the caller then learns its end from a report
            raise unknown(change_id)
        if self.refusal is not None:
            raise RefusedError(self.refusal)
        if not self.is_alive:
            raise RefusedError(unreachable(f"the engine of {self._replica} does not answer yet"))
        if isinstance(request, ReserveMovesRequest):
            self._phases[change_id] = ChangePhase.CHANGE_PHASE_PREPARING
        answer = await self._executor.call(request, progressed)
        if isinstance(answer, FlipMovesResponse | AbortMovesResponse):
            self.generation = max(self.generation, answer.generation)
            self._phases[change_id] = PHASE_OF_OUTCOME[answer.outcome]
        return answer

    @property
    def is_steered(self) -> bool:
        """Whether the present life moves heads."""
        return self.is_alive and self.refusal is None

    def _outcome(self, change_id: str) -> AbortMovesResponse:
        """Return how a change ended of which no running engine holds anything."""
        status = self._ended.get(change_id)
        if status is None or status.phase not in FLIPPED:
            return AbortMovesResponse(outcome=ChangeOutcome.CHANGE_OUTCOME_ABORTED, generation=self.generation)
        flipped = ChangeOutcome.CHANGE_OUTCOME_FLIPPED
        return AbortMovesResponse(outcome=flipped, generation=self.generation, moves=status.moves)

    # --- reports

    @property
    def said(self) -> WatchReportsResponse:
        """The last report of the present life; empty before the first."""
        return self._said

    def replica_report(self) -> ReplicaReport | None:
        """Return the engine's report on the replica, or None if it does not run it."""
        return next((one for one in self._said.replicas if one.replica == self._replica), None)

    def statuses(self) -> list[ChangeStatus]:
        """Return the changes of all lives, whose ends an agent may have missed."""
        return [*self._ended.values(), *(one for one in self._said.changes if one.change_id not in self._ended)]

    # --- a life

    def _begin_to_follow(self, request: ApplyAssignmentRequest) -> None:
        self._following = asyncio.create_task(self._follow(request))
        self._following.add_done_callback(self._note_failure)

    def _note_failure(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("steering %s failed", self._replica, exc_info=error)

    async def _follow(self, request: ApplyAssignmentRequest) -> None:
        """Apply the assignment, then take the engine's reports until the life ends."""
        is_applied, warned_s = False, float("-inf")
        while True:
            try:
                if not is_applied:
                    async with asyncio.timeout(CALL_S):
                        await self._executor.call(request)
                    is_applied, self.refusal = True, None
                    _log.info("%s is steered", self._replica)
                async for report in self._executor.watch_reports(LEAST_REPORT_S):
                    self._said = report
                    self._changed()
            except (RefusedError, TimeoutError) as error:
                if isinstance(error, RefusedError) and error.failure.reason not in UNREACHABLE:
                    self._refuse(error.failure)
                    return
                if time.monotonic() - warned_s > 60:
                    warned_s = time.monotonic()
                    _log.warning("%s: its engine cannot be steered now: %s", self._replica, error or "no answer")
            await asyncio.sleep(AGAIN_S)

    def _refuse(self, failure: Failure) -> None:
        _log.warning("%s serves, but the planner cannot move its heads: %s", self._replica, failure.message)
        self.refusal = failure
        self._changed()
