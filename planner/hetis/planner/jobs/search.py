"""One search on its way through the pool: a place is reserved, then it waits, runs and ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from enum import Enum
from typing import Protocol

from hetis.planner.jobs.outcomes import Outcome
from hetis.solver.budget import Progress


class Begun(Enum):
    """A process has taken the search up."""

    BEGUN = "begun"


News = Begun | Progress | Outcome


class SearchPool(Protocol):
    """What a search asks of its pool."""

    def enqueue(self, search: Search) -> None: ...
    def give_back(self, search: Search) -> None: ...
    def call_off(self, search: Search) -> None: ...


class Search:
    """A place in the pool, and what became of it. `SolverPool.reserve` makes them."""

    def __init__(self, pool: SearchPool, caller: str) -> None:
        self._pool = pool
        self.caller = caller
        self._news: asyncio.Queue[News] = asyncio.Queue()
        self.posed_json = b""
        self.time_limit_s = 0.0
        self.is_called_off = False

    def begin(self, posed_json: bytes, *, time_limit_s: float) -> None:
        """Puts it into the queue."""
        self.posed_json, self.time_limit_s = posed_json, time_limit_s
        self._pool.enqueue(self)

    def abandon(self) -> None:
        """Gives the reserved place back: it will not begin after all."""
        self._pool.give_back(self)

    def cancel(self) -> None:
        """Calls it off: the best plan so far, if there is one, is its answer. Without effect once it has ended."""
        if not self.is_called_off:
            self.is_called_off = True
            self._pool.call_off(self)

    async def news(self) -> AsyncIterator[News]:
        """Everything that happens to it, for one reader; the last is its outcome."""
        while True:
            news = await self._news.get()
            yield news
            if not isinstance(news, Begun | Progress):
                return

    def tell(self, news: News) -> None:
        """Adds news; of the pool."""
        self._news.put_nowait(news)
