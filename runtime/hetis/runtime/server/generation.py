"""One answer as it grows: tokens of the engine to pieces of text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from hetis.runtime.engine.engine import TokenOutput
from hetis.runtime.engine.request import FinishReason, Logprob
from hetis.runtime.server.stopping import StopTexts
from hetis.runtime.server.text import TextStream, Tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenToken:
    """A token of the answer; ``logprob`` where it was asked for."""

    token: int
    logprob: Logprob | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What one answer got since the piece before.

    Attributes:
        text: to be told now; it may lag behind the tokens.
        tokens: that were generated.
        finish_reason: why the answer ends with this piece; None: it goes on.
        error: what went wrong, where that is the reason.
    """

    text: str = ""
    tokens: tuple[ChosenToken, ...] = ()
    finish_reason: FinishReason | None = None
    error: str = ""


@dataclass(slots=True, kw_only=True)
class Generation:
    """One answer. Attributes: ``text`` and ``tokens`` so far, ``finish_reason`` once it is over."""

    text: str = ""
    tokens: list[ChosenToken] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str = ""


class Writer:
    """Turns news of one request into pieces; the pieces' texts together are the answer."""

    def __init__(self, tokens: Tokens, prompt: Sequence[int], stops: Sequence[str]) -> None:
        self._stream = TextStream(tokens, prompt)
        self._stops = StopTexts(stops)
        self._is_over = False

    def write(self, news: Iterable[TokenOutput]) -> Piece:
        """What these news bring. After a piece with a finish reason nothing more comes."""
        texts: list[str] = []
        tokens: list[ChosenToken] = []
        reason, error = None, ""
        for output in news:
            if self._is_over:
                break
            if output.token is not None:
                tokens.append(ChosenToken(token=output.token, logprob=output.logprob))
                # A token that ends the answer is not part of its text.
                told = [] if output.finish_reason is FinishReason.STOP else [output.token]
                stopped = self._stops.add(self._stream.add(told))
                texts.append(stopped.text)
                if stopped.is_over:
                    reason, self._is_over = FinishReason.STOP, True
                    break
            if output.finish_reason is not None:
                reason, error, self._is_over = output.finish_reason, output.error, True
                stopped = self._stops.add(self._stream.end())
                texts.append(stopped.text)
                if stopped.is_over:
                    reason = FinishReason.STOP
                texts.append(self._stops.end())
        return Piece(text="".join(texts), tokens=tuple(tokens), finish_reason=reason, error=error)
