"""A request, from the moment it is added until it ends."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from hetis.solver.errors import HetisError


class RequestError(HetisError):
    """A request cannot be served as it is; the message names field, value and limit."""


class DevicesAwayError(RequestError):
    """A request cannot be served now: devices are away, and those that are left have too few KV pages for it."""


class FinishReason(StrEnum):
    """Why a request ended: an end token or a stop text, its limit of tokens, its sender, or the engine.

    ``unavailable``: devices that it cannot do without are away, and were waited for long enough.
    """

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    UNAVAILABLE = "unavailable"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen.

    Attributes:
        max_tokens: output tokens at most.
        temperature: 0 takes the likeliest token.
        top_k: only so many of the likeliest tokens; 0: all.
        top_p: only the likeliest tokens that together reach this probability.
        seed: of this request's own random numbers, which depend on nothing else. None: another one each time.
        stop: texts that end the output; the text ends before them.
        stop_token_ids: tokens that end it, beside the model's own.
        ignore_eos: the model's own end tokens do not end it.
        logprobs: how many of the likeliest tokens are told with their log probability; None: no log probabilities.
    """

    max_tokens: int = 16
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)}, must be {limit}"
            for name, limit, holds in (
                ("max_tokens", ">= 1", self.max_tokens >= 1),
                ("temperature", ">= 0 and finite", 0 <= self.temperature < float("inf")),
                ("top_k", ">= 0", self.top_k >= 0),
                ("top_p", "> 0 and <= 1", 0 < self.top_p <= 1),
                ("seed", ">= 0 and < 2**63", self.seed is None or 0 <= self.seed < 2**63),
                ("stop", "texts of at least one character", all(self.stop)),
                ("logprobs", ">= 0 and <= 20", self.logprobs is None or 0 <= self.logprobs <= 20),
            )
            if not holds
        ]
        if problems:
            raise RequestError("; ".join(problems))

    @property
    def is_greedy(self) -> bool:
        """Nothing but the likeliest token is wanted."""
        return self.temperature == 0 and self.logprobs is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Logprob:
    """Log probability of the chosen token, and of the likeliest ones, likeliest first."""

    chosen: float
    likeliest: tuple[tuple[int, float], ...]


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """One request.

    Attributes:
        number: unique in the engine, rising.
        prompt: token ids.
        params: how tokens are chosen.
        max_tokens: output tokens at most, within the model's context.
        output: token ids so far.
        incarnation: how often it lost its KV.
        cohort: those it runs with.
        heads: device of each KV head on each stage, by the stage's number; empty while it waits.
        computed: positions whose KV is held.
        awaits_kv: its prompt is computed elsewhere, and no step has a part of it until the KV has come.
        finish_reason: None while it is not over.
        error: what went wrong, where that is the reason.
        num_preempted: how often it had to make room for others.
    """

    number: int
    prompt: tuple[int, ...]
    params: SamplingParams
    max_tokens: int
    output: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    incarnation: int = 0
    cohort: int = 0
    heads: dict[int, tuple[int, ...]] = field(default_factory=dict)
    computed: int = 0
    prefill_tokens: int = 0
    awaits_kv: bool = False
    finish_reason: FinishReason | None = None
    error: str = ""
    num_preempted: int = 0

    @property
    def num_tokens(self) -> int:
        """Prompt and output so far."""
        return len(self.prompt) + len(self.output)

    @property
    def is_prefilling(self) -> bool:
        """Its KV is not yet that of all it began with."""
        return self.computed < self.prefill_tokens

    def token(self, position: int) -> int:
        begin = len(self.prompt)
        return self.prompt[position] if position < begin else self.output[position - begin]

    def tokens(self, first: int, last: int) -> list[int]:
        """Ids at positions ``first`` to ``last - 1``."""
        begin = len(self.prompt)
        if last <= begin:
            return list(self.prompt[first:last])
        return [*self.prompt[first:], *self.output[max(first - begin, 0) : last - begin]]

    def lose_kv(self) -> None:
        """Everything has to be computed again."""
        self.incarnation += 1
        self.heads.clear()
        self.computed, self.awaits_kv = 0, False
