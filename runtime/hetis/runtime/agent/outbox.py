"""The actions that `hetis.runtime.agent.core.AgentCore` requests, as values, and the outbox that collects them.

The core's driver carries them out in their order."""

from __future__ import annotations

from copy import deepcopy
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
    | messages.CopyMovesResponse  # the last one of the stream
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
    """A call to the engine; the request's type determines the method. The answer goes to `AgentCore.answered`."""

    number: int  # identifies the call; never reused in this run
    request: EngineRequest
    timeout_s: float | None  # the answer becomes ENGINE_UNREACHABLE after this time. None: no limit.


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
    """Close the stream and connect again."""

    failure: Failure | None  # why it is closed; None for a Goodbye
    within_s: float | None = None  # connect at a random moment within this time; None: with the usual backoff


Action = Send | EngineCall | Cancel | Persist | EndStream


class Outbox:
    """Collects actions."""

    def __init__(self) -> None:
        # Whether the planner's Welcome has arrived on the open stream, so that messages may be sent
        self.is_connected = False
        self.stream_epoch = 0  # epoch of that Welcome
        self._sequence, self._next_call = 0, 1
        self._actions: list[Action] = []

    def open_stream(self, hello: ConnectNodeRequest) -> ConnectNodeRequest:
        """Restart the numbering. Until the planner's Welcome, nothing is sent but ``hello``."""
        self._actions = [action for action in self._actions if not isinstance(action, Send | EndStream)]
        self.is_connected, self.stream_epoch, self._sequence = False, 0, 1
        hello.sequence = 1
        return hello

    def welcome(self, epoch: int) -> None:
        """Start sending: the planner's Welcome, with ``epoch``, has arrived on the open stream."""
        self.is_connected, self.stream_epoch = True, epoch

    def stream_ended(self) -> None:
        self.is_connected = False

    def send(self, message: ConnectNodeRequest) -> None:
        """Send a message on the stream, or drop it if none is open: what matters is sent after the next Welcome."""
        if self.is_connected:
            self._sequence += 1
            numbered = deepcopy(message)
            numbered.sequence, numbered.epoch = self._sequence, self.stream_epoch
            self._actions.append(Send(numbered))

    def call(self, request: EngineRequest, *, timeout_s: float | None) -> int:
        """Call the engine and return the number of the call."""
        self._actions.append(EngineCall(number := self._next_call, request, timeout_s))
        self._next_call += 1
        return number

    def cancel(self, number: int) -> None:
        self._actions.append(Cancel(number))

    def persist(self, part: str, body: bytes | None) -> None:
        self._actions.append(Persist(part, body))

    def end_stream(self, failure: Failure | None, *, within_s: float | None = None) -> None:
        if not any(isinstance(action, EndStream) for action in self._actions):
            self._actions.append(EndStream(failure, within_s))
        self.is_connected = False

    def take(self) -> list[Action]:
        """Return the actions in order and empty the outbox."""
        taken, self._actions = self._actions, []
        return taken
