"""What a step brought."""

from __future__ import annotations

from dataclasses import dataclass

from hetis.runtime.engine.request import FinishReason, Logprob


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenOutput:
    """A request's news of one step: a token, or its end, or both.

    Attributes:
        request: its number.
        token: None where it ended without one.
        text: that is certain since the last news; empty without a tokenizer.
        logprob: of the token, where the request asked for it.
        finish_reason: why it ended; None: it goes on.
        error: what went wrong, where that is the reason.
    """

    request: int
    token: int | None
    text: str = ""
    logprob: Logprob | None = None
    finish_reason: FinishReason | None = None
    error: str = ""
