"""The head maps of a replica, which its agent sends in pieces."""

from __future__ import annotations

from dataclasses import dataclass

from hetis.planner.failures import Reason, ServiceError
from hetis.v1 import agent_service_pb2, failure_pb2, head_map_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadMaps:
    """The owners of all head groups of a replica: one map per copy of each stage."""

    replica: str
    generation: int  # generation of the replica's state at its authority
    step: int  # decode step at which all maps were read
    maps: tuple[head_map_pb2.HeadMap, ...]


class HeadMapPieces:
    """The pieces received so far for one request, which may arrive in any order and repeatedly."""

    def __init__(self, replica: str, *, most_bytes: int) -> None:
        self._replica = replica
        self._most_bytes = most_bytes
        self._num_bytes = 0
        self._pieces: dict[int, agent_service_pb2.HeadMapPiece] = {}
        self._last: int | None = None  # index of the last piece; None if it has not arrived

    def add(self, piece: agent_service_pb2.HeadMapPiece) -> HeadMaps | None:
        """Add a piece; return the maps once all pieces have arrived, else None.

        Raises ServiceError if the agent has no map, or its pieces are inconsistent.
        """
        if piece.HasField("failure"):
            raise _failed(piece.failure)
        if piece.replica != self._replica:
            raise self._nonsense(f"piece {piece.index} belongs to {piece.replica}")
        if piece.index in self._pieces:
            return None
        self._num_bytes += piece.ByteSize()
        if self._num_bytes > self._most_bytes:
            message = f"the head maps of {self._replica} are larger than {self._most_bytes} bytes"
            raise ServiceError(Reason.ERROR_REASON_MESSAGE_TOO_LARGE, message, metadata={"max_bytes": self._most_bytes})
        self._pieces[piece.index] = piece
        if piece.is_last:
            self._last = piece.index
        if self._last is None or len(self._pieces) <= self._last:
            return None
        return self._joined()

    def _joined(self) -> HeadMaps:
        pieces = [piece for _, piece in sorted(self._pieces.items())]
        first = pieces[0]
        maps: dict[tuple[int, int], head_map_pb2.HeadMap] = {}
        for piece in pieces:
            if (piece.generation, piece.step) != (first.generation, first.step):
                raise self._nonsense(f"pieces belong to steps {first.step} and {piece.step}")
            for one in piece.head_maps:
                known = maps.get((one.stage, one.copy))
                if known is None:
                    maps[one.stage, one.copy] = one
                    continue
                if list(known.devices) != list(one.devices):
                    raise self._nonsense(f"stage {one.stage}, copy {one.copy} has two different lists of devices")
                known.requests.extend(one.requests)
        return HeadMaps(replica=self._replica, generation=first.generation, step=first.step, maps=tuple(maps.values()))

    def _nonsense(self, what: str) -> ServiceError:
        return ServiceError(Reason.ERROR_REASON_INTERNAL, f"the head maps of {self._replica} are inconsistent: {what}")


def _failed(failure: failure_pb2.Failure) -> ServiceError:
    """Return the agent's failure as an error; reasons that only newer versions know become ENGINE_CANNOT."""
    if failure.reason in Reason.values() and failure.reason:
        return ServiceError(failure.reason, failure.message, metadata=failure.metadata)
    message = f"the agent cannot report the head maps, for reason {failure.reason}: {failure.message}"
    return ServiceError(Reason.ERROR_REASON_ENGINE_CANNOT, message)
