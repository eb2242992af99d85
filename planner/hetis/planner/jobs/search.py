"""One search in the pool: it gets a place, waits, runs and ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from enum import Enum
from typing import Protocol

from hetis.planner.jobs.outcomes import Outcome
from hetis.solver.budget import Progress


class Begun(Enum):
    """Sent when a process begins the search."""

    BEGUN = "begun"


News = Begun | Progress | Outcome


class SearchPool(Protocol):
    """The methods of the pool that a search calls."""

    def enqueue(self, search: Search) -> None: ...
    def give_back(self, search: Search) -> None: ...
    def call_off(self, search: Search) -> None: ...


class Search:
    """A search with its place in the pool and its outcome. `SolverPool.reserve` makes them."""

    def __init__(self, pool: SearchPool, caller: str) -> None:
        self._pool = pool
        self.caller = caller
        self._news: asyncio.Queue[News] = asyncio.Queue()
        self.posed_json = b""
        self.time_limit_s = 0.0
        self.is_called_off = False

    def begin(self, posed_json: bytes, *, time_limit_s: float) -> None:
        """Put the search into the queue."""
        self.posed_json, self.time_limit_s = posed_json, time_limit_s
        self._pool.enqueue(self)

    def abandon(self) -> None:
        """Give the reserved place back; the search will not begin."""
        self._pool.give_back(self)

    def cancel(self) -> None:
        """Cancel the search, which answers with its best plan so far, if any. No effect once it has ended."""
        if not self.is_called_off:
            self.is_called_off = True
            self._pool.call_off(self)

    async def news(self) -> AsyncIterator[News]:
        """Yield everything that happens to the search, for one reader; the last item is its outcome."""
        while True:
            news = await self._news.get()
            yield news
            if not isinstance(news, Begun | Progress):
                return

    def tell(self, news: News) -> None:
        """Append news; called by the pool."""
        self._news.put_nowait(news)
