"""Head maps that the planner asked for: read from the engine and forwarded in pieces."""

from __future__ import annotations

from collections.abc import Collection

from hetis.runtime.agent.actions import EngineResponse
from hetis.runtime.agent.outbox import Outbox
from hetis.runtime.agent.replica import CALL_S
from hetis.runtime.moves.engine import pieces_of
from hetis.runtime.moves.refusals import failure_of
from hetis.v1.agent_service_pb2 import AgentCapability, ConnectNodeRequest, HeadMapPiece, StateRequest
from hetis.v1.executor_service_pb2 import ReadHeadMapsRequest
from hetis.v1.failure_pb2 import ErrorReason, Failure


class HeadMapCalls:
    """The requests of one stream that wait for the engine."""

    def __init__(self, outbox: Outbox, can: Collection[AgentCapability.ValueType]) -> None:
        self._outbox = outbox
        self._can = can
        self._waiting: dict[int, tuple[str, str]] = {}  # call number -> (request id, replica)

    def forget(self) -> None:
        """Forget the requests of a stream that is gone."""
        self._waiting.clear()

    def ask(self, request: StateRequest, *, is_held: bool) -> None:
        """Ask the engine for the head maps of a replica, or tell the planner why that is impossible."""
        replica = request.head_map_of
        if not is_held:
            missing = failure_of(ErrorReason.ERROR_REASON_NOT_FOUND, f"{replica} is not held here", name=replica)
            self._send(request.request_id, replica, missing)
        elif AgentCapability.AGENT_CAPABILITY_HEAD_MAP not in self._can:
            cannot = failure_of(ErrorReason.ERROR_REASON_ENGINE_CANNOT, "the engine of this node tells no head map")
            self._send(request.request_id, replica, cannot)
        else:
            number = self._outbox.call(ReadHeadMapsRequest(replica=replica), timeout_s=CALL_S)
            self._waiting[number] = (request.request_id, replica)

    def waits_for(self, number: int) -> bool:
        return number in self._waiting

    def answered(self, number: int, answer: EngineResponse | Failure) -> None:
        """Handle the engine's answer to a call for which `waits_for` is true."""
        self._send(*self._waiting.pop(number), answer)

    def _send(self, request_id: str, replica: str, answer: EngineResponse | Failure) -> None:
        if isinstance(answer, Failure) or not isinstance(answer, list) or not answer:
            failure = (
                answer
                if isinstance(answer, Failure)
                else failure_of(ErrorReason.ERROR_REASON_INTERNAL, "the engine answered without a head map")
            )
            piece = HeadMapPiece(request_id=request_id, replica=replica, is_last=True, failure=failure)
            self._outbox.send(ConnectNodeRequest(head_map=piece))
            return
        pieces = list(pieces_of(head_map for response in answer for head_map in response.head_maps))
        for index, head_maps in enumerate(pieces):
            piece = HeadMapPiece(
                request_id=request_id,
                replica=replica,
                generation=answer[0].generation,
                step=answer[0].step,
                index=index,
                is_last=index == len(pieces) - 1,
                head_maps=head_maps,
            )
            self._outbox.send(ConnectNodeRequest(head_map=piece))
