"""Copies of KV that are not made: they take as long as the links say."""

from __future__ import annotations

from collections.abc import Sequence

from hetis.runtime.agent.simulated.authority import HeadMapAuthority
from hetis.runtime.executor.change import EngineChange
from hetis.v1.head_map_pb2 import Move

DEFAULT_LINK_BYTES_PER_S = 10e9  # where neither the stage nor the move says how long a copy takes


class TimedCopies:
    """The copies of one replica in one engine, one after the other within a change: `Copies`.

    Args:
        authority: knows the links, where this is the primary's engine.
    """

    def __init__(self, authority: HeadMapAuthority | None) -> None:
        self._authority = authority
        self._seconds: dict[str, float] = {}  # of changes that are open

    def plan(self, change: EngineChange, moves: Sequence[Move]) -> None:
        change.copy_bytes = int(sum(move.kv_bytes for move in moves))
        self._seconds = {change.change.change_id: sum(self._copy_s(change, move) for move in moves)}

    def look(self, change: EngineChange, now_s: float) -> bool:
        if change.copy_begun_s is None:
            return False
        whole_s = self._seconds.get(change.change.change_id, 0.0)
        share = 1.0 if whole_s <= 0 else min(max(now_s - change.copy_begun_s, 0.0) / whole_s, 1.0)
        change.copied_bytes = int(change.copy_bytes * share)
        return share >= 1

    def _copy_s(self, change: EngineChange, move: Move) -> float:
        """Seconds that a copy takes on the slower of its two links."""
        link_byte_s = self._authority.link_byte_s(change, move) if self._authority is not None else 0.0
        if link_byte_s:
            return move.kv_bytes * link_byte_s
        return move.copy_s or move.kv_bytes / DEFAULT_LINK_BYTES_PER_S
