"""Actions that `hetis.runtime.agent.core.AgentCore` asks for, as values. Its driver carries them out in their order."""

from __future__ import annotations

from dataclasses import dataclass

from hetis.v1 import executor_service_pb2 as messages
from hetis.v1.agent_service_pb2 import ConnectNodeRequest
from hetis.v1.failure_pb2 import Failure

EngineRequest = (
    messages.ApplyAssignmentRequest
    | messages.ReserveMovesRequest
    | messages.CopyMovesRequest
    | messages.FlipMovesRequest
    | messages.ReleaseMovesRequest
    | messages.AbortMovesRequest
    | messages.ReadHeadMapsRequest
)
EngineResponse = (
    messages.ApplyAssignmentResponse
    | messages.ReserveMovesResponse
    | messages.CopyMovesResponse  # the last one
    | messages.FlipMovesResponse
    | messages.ReleaseMovesResponse
    | messages.AbortMovesResponse
    | list[messages.ReadHeadMapsResponse]
)


@dataclass(frozen=True, slots=True)
class Send:
    """Send a message to the planner, on the stream that is open."""

    message: ConnectNodeRequest


@dataclass(frozen=True, slots=True)
class EngineCall:
    """A call to the engine; the request's type says which method. The answer goes to `AgentCore.answered`.

    Attributes:
        number: identifies the call; never reused in this run.
        timeout_s: the answer becomes ENGINE_UNREACHABLE after this time. None: no limit.
    """

    number: int
    request: EngineRequest
    timeout_s: float | None


@dataclass(frozen=True, slots=True)
class Cancel:
    """Cancel a call whose answer is no longer wanted. An answer that still arrives is ignored."""

    number: int


@dataclass(frozen=True, slots=True)
class Persist:
    """Write a part of the state durably to disk before any later action. A ``body`` of None deletes the part."""

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
