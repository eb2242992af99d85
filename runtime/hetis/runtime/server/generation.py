"""One answer as it grows: tokens of the engine to pieces of text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from hetis.runtime.engine.news import TokenOutput
from hetis.runtime.engine.request import FinishReason, Logprob


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


def piece_of(news: Iterable[TokenOutput]) -> Piece:
    """What news of one request bring, taken together: a reader that is late gets fewer and longer pieces."""
    found = list(news)
    return Piece(
        text="".join(output.text for output in found),
        tokens=tuple(
            ChosenToken(token=output.token, logprob=output.logprob) for output in found if output.token is not None
        ),
        finish_reason=found[-1].finish_reason,
        error=found[-1].error,
    )
