"""One call: its requests at the engine, their pieces in the order they come, and its limit of time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from hetis.runtime.engine.request import FinishReason, SamplingParams
from hetis.runtime.server.answers import Json, usage
from hetis.runtime.server.desk import Desk
from hetis.runtime.server.errors import ApiError, AwayError
from hetis.runtime.server.generation import Generation, Piece, piece_of


class Form(Protocol):
    """How answers are written down for one call: `CompletionForm` or `ChatForm`."""

    def whole(self, answers: Sequence[Generation], use: Json) -> Json: ...

    def opening(self, index: int) -> Json | None: ...

    def chunk(self, index: int, piece: Piece) -> Json: ...

    def usage_chunk(self, use: Json) -> Json: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """One answer that is wanted."""

    prompt: Sequence[int]
    params: SamplingParams


class Call:
    """The answers of one call. Whatever ends it, no request of it stays at the engine: use `close`."""

    def __init__(
        self,
        desk: Desk,
        form: Form,
        wishes: Sequence[Wish],
        *,
        name: str,
        prompts: int,
        answer_s: float,
    ) -> None:
        """``prompts``: how many of them ``wishes`` has, each as often as the others, counted once in the usage.

        ``answer_s``: seconds for all of it.

        Raises:
            ApiError: the requests are not taken.
        """
        self._desk, self._form, self._answer_s = desk, form, answer_s
        self._tickets = desk.submit(name, [(wish.prompt, wish.params) for wish in wishes])
        each = len(wishes) // prompts
        self._prompt_tokens = sum(len(wish.prompt) for wish in wishes[::each])
        self._output_tokens = 0
        self._deadline_s = asyncio.get_running_loop().time() + answer_s

    async def whole(self) -> Json:
        """The answers as one object.

        Raises:
            ApiError: an answer failed, or took too long.
        """
        answers = [Generation() for _ in self._tickets]
        async for index, piece in self._pieces():
            answer = answers[index]
            answer.text += piece.text
            answer.tokens += piece.tokens
            answer.finish_reason = piece.finish_reason
        return self._form.whole(answers, self._usage())

    async def events(self, *, with_usage: bool) -> AsyncIterator[Json]:
        """The answers as chunks, each as soon as it is there.

        Raises:
            ApiError: as above; before the first chunk where the engine refuses the request.
        """
        opened: set[int] = set()
        async for index, piece in self._pieces():
            if index not in opened:
                opened.add(index)
                opening = self._form.opening(index)
                if opening is not None:
                    yield opening
            if piece.text or piece.tokens or piece.finish_reason:
                yield self._form.chunk(index, piece)
        if with_usage:
            yield self._form.usage_chunk(self._usage())

    def close(self) -> None:
        """Whatever still runs is cancelled."""
        for ticket in self._tickets:
            self._desk.cancel(ticket)

    def _usage(self) -> Json:
        return usage(self._prompt_tokens, self._output_tokens)

    async def _pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Pieces of all answers as they come, until each is over."""
        inbox, going = self._tickets[0].inbox, len(self._tickets)
        while going:
            try:
                async with asyncio.timeout_at(self._deadline_s):
                    news = await inbox.take()
            except TimeoutError:
                self._desk.metrics.cancelled("timeout")
                message = f"the answer took longer than {self._answer_s:g} s"
                raise ApiError(message, status=504, kind="server_error", code="timeout") from None
            for index, outputs in news.items():
                piece = piece_of(outputs)
                _refuse_failed(piece)
                self._output_tokens += len(piece.tokens)
                going -= piece.finish_reason is not None
                yield index, piece


def _refuse_failed(piece: Piece) -> None:
    if piece.finish_reason is FinishReason.UNAVAILABLE:
        raise AwayError(piece.error)
    if piece.finish_reason is FinishReason.ERROR:
        raise ApiError(piece.error or "the request failed", status=500, kind="server_error", code="request_failed")
