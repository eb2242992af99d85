"""What `hetis.runtime.agent.core.AgentCore` wants done, as values: whoever drives it does them, in their order."""

from __future__ import annotations

from dataclasses import dataclass

from hetis.v1.agent_service_pb2 import ConnectNodeRequest
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
)
from hetis.v1.failure_pb2 import Failure

EngineRequest = (
    ApplyAssignmentRequest
    | ReserveMovesRequest
    | CopyMovesRequest
    | FlipMovesRequest
    | ReleaseMovesRequest
    | AbortMovesRequest
    | ReadHeadMapsRequest
)
EngineResponse = (
    ApplyAssignmentResponse
    | ReserveMovesResponse
    | CopyMovesResponse  # the last one
    | FlipMovesResponse
    | ReleaseMovesResponse
    | AbortMovesResponse
    | list[ReadHeadMapsResponse]
)


@dataclass(frozen=True, slots=True)
class Send:
    """Send a message to the planner, on the stream that is open."""

    message: ConnectNodeRequest


@dataclass(frozen=True, slots=True)
class EngineCall:
    """A call to the engine; the type of the request says which method. Its answer goes to `AgentCore.answered`.

    Attributes:
        number: names the call; never used again in this run.
        timeout_s: after so long the answer is ENGINE_UNREACHABLE. None: as long as it takes.
    """

    number: int
    request: EngineRequest
    timeout_s: float | None


@dataclass(frozen=True, slots=True)
class Cancel:
    """A call that nobody waits for any more; its answer may still come and is ignored."""

    number: int


@dataclass(frozen=True, slots=True)
class Persist:
    """Durably on disk before any later action is done. ``body`` None: the part is gone."""

    part: str
    body: bytes | None


@dataclass(frozen=True, slots=True)
class EndStream:
    """Close the stream and connect again.

    Attributes:
        failure: why; unset for a Goodbye.
        within_s: connect at a random moment within this time; None: with the usual backoff.
    """

    failure: Failure | None
    within_s: float | None = None


Action = Send | EngineCall | Cancel | Persist | EndStream
