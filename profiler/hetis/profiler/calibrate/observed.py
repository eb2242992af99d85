"""Observed work of an engine and its duration, from any source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class ObservedKind(StrEnum):
    """Kinds of observations, whose errors are told apart."""

    DECODE = "decode"
    PREFILL = "prefill"
    MIXED = "mixed"
    INTERVAL = "interval"  # the mean iteration between two scrapes


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservedWork:
    """The contents of an iteration. Numbers need not be whole, since there are means of several iterations."""

    decoding: float = 0.0  # requests with one token each
    attended_tokens: float = 0.0  # KV tokens of all of them together
    prompts: float = 0.0  # requests with a chunk of their prompt
    chunk_tokens: float = 0.0  # of all chunks together
    past_tokens: float = 0.0  # of one of these prompts, computed in earlier iterations

    @property
    def kind(self) -> ObservedKind:
        if not self.chunk_tokens:
            return ObservedKind.DECODE
        return ObservedKind.MIXED if self.decoding else ObservedKind.PREFILL


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """Seconds of an iteration, or mean seconds of several. ``parts`` are shares and works; the shares sum to one."""

    kind: ObservedKind
    seconds: float
    parts: tuple[tuple[float, ObservedWork], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """All observations of a source in order of time."""

    what: str  # the things observed, in the plural
    origin: str  # the engine, for people who read the profile
    least: int  # observations below which nothing is fitted
    observations: tuple[Observation, ...]
    # the number of things that are no observations, by reason
    left_out: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what a reader of the result must know
    tp: int | None = None  # tensor-parallel degree; None: the source does not say
