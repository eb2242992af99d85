"""Answers that are costly to make and may be a second old: however many ask, each is made once, and one at a time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")
FRESH_S = 1.0


class Recent(Generic[T]):
    """The answers of the last second by key. Belongs to one event loop.

    An answer counts as new from when it was finished: whatever it takes to make one, the loop does other work as well.
    """

    def __init__(self, *, fresh_s: float = FRESH_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._fresh_s, self._clock = fresh_s, clock
        self._made = asyncio.Lock()
        self._kept: dict[Hashable, tuple[float, T]] = {}  # with the times at which they were finished

    async def of(self, key: Hashable, make: Callable[[], Awaitable[T]]) -> T:
        """Return the answer for ``key``, made now unless one was made less than a second ago."""
        if (found := self._fresh(key)) is not None:
            return found[1]
        async with self._made:
            if (found := self._fresh(key)) is not None:  # made while this one waited
                return found[1]
            answer = await make()
            now_s = self._clock()
            self._kept = {one: kept for one, kept in self._kept.items() if now_s < kept[0] + self._fresh_s}
            self._kept[key] = now_s, answer
            return answer

    def _fresh(self, key: Hashable) -> tuple[float, T] | None:
        kept = self._kept.get(key)
        return kept if kept is not None and self._clock() < kept[0] + self._fresh_s else None
