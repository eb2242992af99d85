"""Observed work of an engine and its duration, from any source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class ObservedKind(StrEnum):
    """Kinds of observations, whose errors are reported separately."""

    DECODE = "decode"
    PREFILL = "prefill"
    MIXED = "mixed"
    INTERVAL = "interval"  # the mean iteration between two scrapes


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservedWork:
    """The contents of an iteration. Numbers need not be whole, since they may be means of several iterations."""

    decoding: float = 0.0  # requests with one token each
    attended_tokens: float = 0.0  # KV tokens of all of them together
    prompts: float = 0.0  # requests with a chunk of their prompt
    chunk_tokens: float = 0.0  # tokens of all chunks together
    past_tokens: float = 0.0  # tokens of one of these prompts that were computed in earlier iterations

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

    what: str  # what was observed, in the plural
    origin: str  # description of the engine for readers of the profile
    least: int  # number of observations below which nothing is fitted
    observations: tuple[Observation, ...]
    # number of records that are not observations, by reason
    left_out: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # remarks for the reader of the result
    tp: int | None = None  # tensor-parallel degree; None: the source does not state it
