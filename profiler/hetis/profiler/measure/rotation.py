"""Rotation of operands, so that each call finds its own where serving does: in memory, not in a cache. Pure.

Between two uses of the same bytes, at least `TIMES` the last-level cache of other bytes are read. That has the effect
of a flush between calls, without its time in the loop. The cache size is read from the device, never underestimated.
"""

from __future__ import annotations

from dataclasses import dataclass

TIMES = 2  # replacement is not strictly by age, and caches hash addresses: once would leave some lines behind
MAX_SETS = 16384  # of operands; each is a node of a CUDA graph


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """A device's last-level cache, and the origin of its size: ``as the driver says``, ``assumed``."""

    num_bytes: int
    origin: str

    def sets(self, num_bytes: int) -> int:
        """Return how many sets of operands of ``num_bytes`` each to rotate through."""
        if num_bytes >= TIMES * self.num_bytes:
            return 1  # one pass over them already empties the cache
        return min(MAX_SETS, 1 + -(-TIMES * self.num_bytes // num_bytes))

    def is_evicted(self, sets: int, num_bytes: int) -> bool:
        """Return whether one of ``sets`` has left the cache by its next turn."""
        others = num_bytes * (sets - 1) if sets > 1 else num_bytes
        return others >= TIMES * self.num_bytes
