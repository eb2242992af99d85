"""An executor for tests that succeeds at everything and records its requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

from google.protobuf.message import Message

from hetis.runtime.agent.outbox import EngineRequest, EngineResponse
from hetis.runtime.moves.refusals import RefusedError, unreachable
from hetis.v1.change_pb2 import ChangeOutcome
from hetis.v1.executor_service_pb2 import (
    AbortMovesRequest,
    AbortMovesResponse,
    ApplyAssignmentRequest,
    ApplyAssignmentResponse,
    CopyMovesRequest,
    CopyMovesResponse,
    FlipMovesRequest,
    FlipMovesResponse,
    ReadHeadMapsRequest,
    ReadHeadMapsResponse,
    ReleaseMovesRequest,
    ReleaseMovesResponse,
    ReserveMovesRequest,
    ReserveMovesResponse,
    WatchReportsResponse,
)
from hetis.v1.failure_pb2 import Failure
from hetis.v1.report_pb2 import AssignmentState

ResponseT = TypeVar("ResponseT", bound=Message)
Answer = Message | Failure | None


class RecordingExecutor:
    """Answers every request with success, unless ``answer`` overrides that.

    Attributes:
        asked: all requests, in order.
        reports: what `watch_reports` yields; put a report in to send it, or None to let the engine die.
    """

    def __init__(self, answer: Callable[[EngineRequest], Answer] = lambda request: None) -> None:
        self.asked: list[EngineRequest] = []
        self.reports: asyncio.Queue[WatchReportsResponse | None] = asyncio.Queue()
        self._is_dead = False
        self._answer = answer

    async def call(
        self, request: EngineRequest, progressed: Callable[[CopyMovesResponse], None] = lambda response: None
    ) -> EngineResponse:
        self.asked.append(request)
        match request:
            case ApplyAssignmentRequest():
                removed = request.HasField("removed_replica")
                state = AssignmentState.ASSIGNMENT_STATE_STOPPED if removed else AssignmentState.ASSIGNMENT_STATE_LOADED
                return self._answered(request, ApplyAssignmentResponse(state=state))
            case ReserveMovesRequest():
                return self._answered(request, ReserveMovesResponse())
            case CopyMovesRequest():
                answer = self._answered(request, CopyMovesResponse(copied_bytes=1, total_bytes=1))
                progressed(answer)
                return answer
            case FlipMovesRequest():
                return self._answered(request, FlipMovesResponse(outcome=ChangeOutcome.CHANGE_OUTCOME_FLIPPED, step=1))
            case ReleaseMovesRequest():
                return self._answered(request, ReleaseMovesResponse())
            case AbortMovesRequest():
                return self._answered(request, AbortMovesResponse(outcome=ChangeOutcome.CHANGE_OUTCOME_ABORTED))
            case ReadHeadMapsRequest():
                return [self._answered(request, ReadHeadMapsResponse())]

    async def watch_reports(self, min_interval_s: float) -> AsyncIterator[WatchReportsResponse]:
        while not self._is_dead:
            report = await self.reports.get()
            if report is not None:
                yield report
            self._is_dead = report is None
        raise RefusedError(unreachable("the engine is gone"))

    async def close(self) -> None:
        """Do nothing, because nothing is open."""

    def _answered(self, request: EngineRequest, usual: ResponseT) -> ResponseT:
        answer = self._answer(request)
        if isinstance(answer, Failure):
            raise RefusedError(answer)
        if answer is not None:
            assert isinstance(answer, type(usual)), f"{type(answer).__name__} is no {type(usual).__name__}"
            return answer
        return usual
