"""Measured traffic in a few hundred numbers that add up: arrivals, lengths and latencies as histograms on fixed edges.

An engine counts since its start, so the traffic of a time is the difference of two readings (`TrafficSketch.since`).
Sketches of one time add over replicas (`beside`), those of one replica over times (``+``). Sums of values are kept
beside the counts: means are exact, and only the place of values within a bucket is unknown.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from hetis.solver.errors import InvalidProblemError
from hetis.solver.workload import LengthBin, Workload

STRATA = 16  # pieces of equal weight into which lengths are divided, beyond the division by buckets
MOST_HIT_RATE = 0.99  # a prompt has at least one token that is computed


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """The edges of a histogram. Bucket k has values above edge k-1 and at most edge k; the last is open above.

    Attributes:
        least: the least value that there can be.
    """

    unit: str
    least: float
    edges: tuple[float, ...]

    def bounds(self, bucket: int) -> tuple[float, float]:
        """Return the least and the largest value of a bucket; the open one ends at twice the last edge."""
        high = self.edges[bucket] if bucket < len(self.edges) else 2 * self.edges[-1]
        return max(self.least, self.edges[bucket - 1]) if bucket else self.least, high


# Tokens: the 1-2-5 series, which is vLLM's. Seconds: the edges of vLLM's TTFT and TPOT together.
TOKENS = Scale(unit="tokens", least=1.0, edges=(*(m * 10.0**e for e in range(7) for m in (1, 2, 5)), 1e7))
SECONDS = Scale(
    unit="s",
    least=0.0,
    edges=(
        *(0.001, 0.005, 0.01, 0.02, 0.025, 0.04, 0.05, 0.06, 0.075, 0.08, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75),
        *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """Counts of values in the buckets of a scale, and their sum.

    Where values are within their buckets is taken as the same everywhere: a share u of a bucket's values is below
    ``low + (high - low) u^s``, with the exponent s for which the mean is exact (`skew`).

    Attributes:
        counts: one more than the scale has edges. Empty: no values.
    """

    scale: Scale
    counts: tuple[float, ...] = ()
    total: float = 0.0

    def __post_init__(self) -> None:
        if not self.counts:
            object.__setattr__(self, "counts", (0.0,) * (len(self.scale.edges) + 1))
        if len(self.counts) != len(self.scale.edges) + 1:
            raise InvalidProblemError(
                f"a histogram has {len(self.counts)} counts, must be {len(self.scale.edges) + 1} for {self.scale.unit}"
            )
        if not (min(self.counts) >= 0 and 0 <= sum(self.counts) + self.total < math.inf and self.total >= 0):
            wrong = next((one for one in (*self.counts, self.total) if not 0 <= one < math.inf), math.inf)
            raise InvalidProblemError(f"a histogram of {self.scale.unit} has {wrong}, must be >= 0 and finite")

    @classmethod
    def of_buckets(cls, scale: Scale, buckets: Mapping[float, float], total: float) -> Histogram:
        """Return a histogram of Prometheus: counts of values at most each bound, and the sum of all values.

        Counts are exact where the scale has the same edges; a wider bucket is spread evenly over those of the scale.
        Values above the last finite bound count in the bucket above it.
        """
        counts, below, low = [0.0] * (len(scale.edges) + 1), 0.0, scale.least
        for bound, count in sorted(buckets.items()):
            high = bound
            if not math.isfinite(bound):
                high = scale.bounds(bisect_right(scale.edges, low))[1]
            added, below = max(0.0, count - below), max(below, count)
            bucket = bisect_left(scale.edges, high)
            while added and bucket and scale.edges[bucket - 1] > low:
                share = (high - scale.edges[bucket - 1]) / (high - low)
                counts[bucket] += added * share
                added, high, bucket = added * (1 - share), scale.edges[bucket - 1], bucket - 1
            counts[bucket] += added
            low = max(low, bound)
        return cls(scale=scale, counts=tuple(counts), total=max(0.0, total))

    @classmethod
    def of_values(cls, scale: Scale, values: Iterable[float]) -> Histogram:
        counts, total = [0.0] * (len(scale.edges) + 1), 0.0
        for value in values:
            counts[bisect_left(scale.edges, value)] += 1
            total += value
        return cls(scale=scale, counts=tuple(counts), total=total)

    @classmethod
    def unpacked(cls, scale: Scale, first: int, counts: Sequence[float], total: float) -> Histogram:
        """Return what `packed` gave. Raises InvalidProblemError if the scale has no such buckets."""
        behind = len(scale.edges) + 1 - first - len(counts)
        if behind < 0:
            raise InvalidProblemError(f"a histogram of {scale.unit} has {-behind} counts beyond its scale")
        return cls(scale=scale, counts=(*[0.0] * first, *counts, *[0.0] * behind), total=total)

    def packed(self) -> dict[str, Any]:
        """Return the first bucket with values, the counts from there to the last with any, and their sum."""
        filled = [k for k, n in enumerate(self.counts) if n] or [0, -1]
        return {"first": filled[0], "counts": self.counts[filled[0] : filled[-1] + 1], "total": self.total}

    @property
    def count(self) -> float:
        return math.fsum(self.counts)

    @property
    def mean(self) -> float:
        """The exact mean; 0 without values."""
        count = self.count
        return self.total / count if count else 0.0

    def __add__(self, other: Histogram) -> Histogram:
        if other.scale != self.scale:
            raise InvalidProblemError(f"{self.scale.unit} and {other.scale.unit} do not add")
        counts = tuple(a + b for a, b in zip(self.counts, other.counts, strict=True))
        return Histogram(scale=self.scale, counts=counts, total=self.total + other.total)

    def times(self, factor: float) -> Histogram:
        return Histogram(scale=self.scale, counts=tuple(one * factor for one in self.counts), total=self.total * factor)

    def since(self, earlier: Histogram) -> Histogram:
        """Return the values that came after an earlier reading; all, if it has more: its engine has started again."""
        if earlier.count > self.count:
            return self
        counts = tuple(max(0.0, a - b) for a, b in zip(self.counts, earlier.counts, strict=True))
        return Histogram(scale=self.scale, counts=counts, total=max(0.0, self.total - earlier.total))

    @property
    def skew(self) -> float:
        """The exponent s of values within buckets. Their mean is ``low + (high - low) / (1 + s)``."""
        rows = [(*self.scale.bounds(k), n) for k, n in enumerate(self.counts) if n]
        width = math.fsum((high - low) * n for low, high, n in rows)
        place = (self.total - math.fsum(low * n for low, _, n in rows)) / width if width > 0 else 0.5
        return 1 / min(1.0, max(1e-3, place)) - 1  # out of these, counts and sum contradict each other

    def quantile(self, share: float) -> float:
        """Return a value that ``share`` (from 0 to 1) of all are at most; 0 without values."""
        left, skew, high = share * self.count, self.skew, 0.0
        for k, n in enumerate(self.counts):
            if n:
                low, high = self.scale.bounds(k)
                if left <= n:
                    return low + (high - low) * math.pow(max(0.0, left / n), skew)
                left -= n
        return high

    def share_within(self, limit: float) -> float:
        """Return the share of values that are at most ``limit``; 1 without values."""
        count, within, skew = self.count, 0.0, self.skew
        for k, n in enumerate(self.counts):
            low, high = self.scale.bounds(k)
            if high <= limit:
                within += n
            elif low < limit:
                within += n * (((limit - low) / (high - low)) ** (1 / skew) if skew else 0.0)
        return within / count if count else 1.0

    def strata(self, pieces: int = STRATA) -> list[tuple[float, float]]:
        """Return means and weights of consecutive pieces of the distribution, each within a bucket; the least first.

        A piece has about one ``pieces``-th of the weight at most. The mean of all is exact.
        """
        count, skew = self.count, self.skew
        found = list[tuple[float, float]]()
        for k, n in enumerate(self.counts):
            low, high = self.scale.bounds(k)
            parts = math.ceil(pieces * n / count) if n else 0
            for i in range(parts):  # the mean of u^s between i/parts and (i+1)/parts
                mean = (((i + 1) / parts) ** (skew + 1) - (i / parts) ** (skew + 1)) * parts / (skew + 1)
                found.append((low + (high - low) * mean, n / parts))
        mean, least = math.fsum(x * n for x, n in found) / count if found else 0.0, self.scale.least
        factor = max(0.0, (self.mean - least) / (mean - least)) if mean > least else 1.0
        return [(least + (x - least) * factor, n) for x, n in found]


def _tokens() -> Histogram:
    return Histogram(scale=TOKENS)


def _seconds() -> Histogram:
    return Histogram(scale=SECONDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficSketch:
    """The traffic of a time. Lengths and latencies are of requests that ended in it.

    Attributes:
        seconds: how long it was observed. In a cumulative reading of an engine, a clock that only rises.
        arrivals: requests that arrived.
        cached_tokens: prompt tokens that were found in prefix caches.
        ttft_s: from arrival to the first token; tpot_s: between tokens; wait_s: in the queue.
    """

    seconds: float = 0.0
    arrivals: float = 0.0
    prompt_tokens: Histogram = field(default_factory=_tokens)
    output_tokens: Histogram = field(default_factory=_tokens)
    cached_tokens: float = 0.0
    ttft_s: Histogram = field(default_factory=_seconds)
    tpot_s: Histogram = field(default_factory=_seconds)
    wait_s: Histogram = field(default_factory=_seconds)

    def __post_init__(self) -> None:
        for name in ("seconds", "arrivals", "cached_tokens"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise InvalidProblemError(f"{name} of a sketch is {value}, must be >= 0 and finite")
        for name in SCALES:
            if (found := getattr(self, name).scale) != SCALES[name]:
                raise InvalidProblemError(f"{name} of a sketch is in {found.unit}, must be in {SCALES[name].unit}")

    def packed(self) -> dict[str, Any]:
        """Return the fields of the message `Traffic`."""
        histograms = {name: getattr(self, name).packed() for name in SCALES if getattr(self, name).count}
        return {
            "observed_s": self.seconds,
            "arrivals": self.arrivals,
            "cached_tokens": self.cached_tokens,
            **histograms,
        }

    @property
    def rate_per_s(self) -> float:
        """Arrivals per second; 0 if nothing was observed."""
        return self.arrivals / self.seconds if self.seconds else 0.0

    @property
    def prefix_hit_rate(self) -> float:
        """Share of the prompts' tokens that were found in prefix caches."""
        total = self.prompt_tokens.total
        return min(MOST_HIT_RATE, self.cached_tokens / total) if total else 0.0

    def __add__(self, other: TrafficSketch) -> TrafficSketch:
        """Return the traffic of two times together."""
        return TrafficSketch(**{one.name: getattr(self, one.name) + getattr(other, one.name) for one in fields(self)})

    def beside(self, other: TrafficSketch) -> TrafficSketch:
        """Return the traffic of two replicas, or two models, in one time."""
        seconds = max(self.seconds, other.seconds)
        both = {one: getattr(self, one) + getattr(other, one) for one in _ADDED}
        return TrafficSketch(seconds=seconds, **both)

    def since(self, earlier: TrafficSketch) -> TrafficSketch:
        """Return the traffic between two cumulative readings of an engine. One that has started again begins at 0."""
        if earlier.prompt_tokens.count > self.prompt_tokens.count:
            earlier = TrafficSketch(seconds=earlier.seconds)
        spent_s = self.seconds - earlier.seconds
        return TrafficSketch(
            seconds=spent_s if spent_s >= 0 else self.seconds,
            arrivals=max(0.0, self.arrivals - earlier.arrivals),
            cached_tokens=max(0.0, self.cached_tokens - earlier.cached_tokens),
            **{name: getattr(self, name).since(getattr(earlier, name)) for name in SCALES},
        )

    def times(self, factor: float) -> TrafficSketch:
        """Return the same traffic over ``factor`` times as long: a part of it, such as the last minute of an hour."""
        return TrafficSketch(
            **{name: getattr(self, name).times(factor) for name in SCALES},
            **{name: getattr(self, name) * factor for name in ("seconds", "arrivals", "cached_tokens")},
        )

    def workload(self, name: str, *, strata: int = STRATA) -> Workload:
        """Return it as the solver takes it: prompts and outputs independent of each other, with their exact means.

        Raises InvalidProblemError if no request has ended.
        """
        prompts, outputs = (one.strata(strata) for one in (self.prompt_tokens, self.output_tokens))
        if not prompts or not outputs:
            raise InvalidProblemError(f"traffic {name} has no requests that have ended")
        total = self.prompt_tokens.count * self.output_tokens.count
        bins = (
            LengthBin(prompt_tokens=prompt, output_tokens=output, weight=weight * share / total)
            for prompt, weight in prompts
            for output, share in outputs
        )
        rate = self.rate_per_s or None
        return Workload(name=name, bins=tuple(bins), rate_rps=rate, prefix_hit_rate=self.prefix_hit_rate)


SCALES = {
    "prompt_tokens": TOKENS,
    "output_tokens": TOKENS,
    "ttft_s": SECONDS,
    "tpot_s": SECONDS,
    "wait_s": SECONDS,
}
_ADDED = ("arrivals", "cached_tokens", *SCALES)


class TrafficCounter:
    """The traffic of an engine since its start, which it counts request by request."""

    def __init__(self) -> None:
        self.num_arrivals = 0
        self._counted = TrafficSketch()
        self._values = {name: list[float]() for name in SCALES}

    def add(self, **values: float) -> None:
        """Count values by the names of their histograms, such as ``ttft_s=0.3``."""
        for name, value in values.items():
            self._values[name].append(value)

    def sketch(self, now_s: float) -> TrafficSketch:
        """Return a cumulative reading."""
        counted = {
            name: getattr(self._counted, name) + Histogram.of_values(SCALES[name], values)
            for name, values in self._values.items()
        }
        self._values = {name: [] for name in SCALES}
        self._counted = TrafficSketch(seconds=now_s, arrivals=self.num_arrivals, **counted)
        return self._counted
