"""Where the news of one call arrive: of all its answers together, so that one wait is enough however many there are."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from hetis.runtime.engine.news import TokenOutput
from hetis.runtime.engine.request import SamplingParams
from hetis.runtime.server.errors import ApiError


class Inbox:
    """News of a call's answers, by their indices; to be used in the event loop only."""

    def __init__(self) -> None:
        self._news: dict[int, list[TokenOutput]] = {}
        self._error: ApiError | None = None
        self._changed = asyncio.Event()

    async def take(self) -> dict[int, list[TokenOutput]]:
        """Waits until there is any; all that has come since the last time, in the order of the answers.

        Raises:
            ApiError: the engine refused a request, or has ended.
        """
        while not self._news and self._error is None:
            self._changed.clear()
            await self._changed.wait()
        if not self._news and self._error is not None:
            raise self._error
        news, self._news = self._news, {}
        return dict(sorted(news.items()))

    def put(self, index: int, news: Sequence[TokenOutput]) -> None:
        self._news.setdefault(index, []).extend(news)
        self._changed.set()

    def refuse(self, error: ApiError) -> None:
        self._error = error
        self._changed.set()


class Ticket:
    """One request at the engine.

    Attributes:
        name: of the call it belongs to.
        index: of its answer in the call.
        inbox: of the call.
        prompt, params: what was asked.
        arrived_s: when, on the desk's clock.
        number: the engine's; None until it has taken the request.
        token_s: when its last token came; None: there was none. The engine's thread keeps it.
        is_over: nothing more comes, or nobody wants it.
    """

    __slots__ = ("arrived_s", "inbox", "index", "is_over", "name", "number", "params", "prompt", "token_s")

    def __init__(
        self, name: str, index: int, inbox: Inbox, prompt: Sequence[int], params: SamplingParams, arrived_s: float
    ) -> None:
        self.name, self.index, self.inbox = name, index, inbox
        self.prompt, self.params, self.arrived_s = prompt, params, arrived_s
        self.number: int | None = None
        self.token_s: float | None = None
        self.is_over = False
