"""A gate that calls wait at while a term begins, and pass a few at a time once it is open."""

from __future__ import annotations

import asyncio
from collections import deque

_AT_ONCE, _PAUSE_S = 8, 0.01  # those that waited: at most 800 per second, fewer if the loop has other work


class Gate:
    """Open at first. Those that come while others wait pass after them: thousands at once would stall the loop."""

    def __init__(self) -> None:
        self._is_open = True
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._opening: asyncio.TimerHandle | None = None

    def set(self, is_open: bool) -> None:
        """Open or close the gate."""
        self._is_open = is_open
        if is_open and self._opening is None and self._waiting:
            self._let_pass()

    async def passed(self, *, is_first: bool) -> None:
        """Wait until the gate lets the caller pass. ``is_first``: before all others that wait."""
        if self._is_open and (is_first or not self._waiting):
            return
        turn = asyncio.get_running_loop().create_future()
        (self._waiting.appendleft if is_first else self._waiting.append)(turn)
        await turn

    def _let_pass(self) -> None:
        self._opening, left = None, _AT_ONCE
        while self._is_open and self._waiting and left:
            turn = self._waiting.popleft()
            if not turn.done():  # its call may have ended
                turn.set_result(None)
                left -= 1
        if self._is_open and self._waiting:
            self._opening = asyncio.get_running_loop().call_later(_PAUSE_S, self._let_pass)
