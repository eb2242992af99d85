"""Measured traffic: sketches and their windows to messages and back, and as rows of tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hetis.planner.convert.names import duration, seconds_of, timestamp
from hetis.planner.report.figures import digits, percent, seconds
from hetis.solver.traffic import SCALES, Histogram, TrafficSketch
from hetis.v1 import traffic_pb2

if TYPE_CHECKING:
    from hetis.planner.loop.speeds import Speed


def traffic_to_proto(sketch: TrafficSketch) -> traffic_pb2.Traffic:
    return traffic_pb2.Traffic(**sketch.packed())


def traffic_from_proto(message: traffic_pb2.Traffic) -> TrafficSketch:
    """Return the sketch of a message. Raises InvalidProblemError if it has counts that cannot be."""
    found = {name: getattr(message, name) for name in SCALES if message.HasField(name)}  # type: ignore[arg-type]
    histograms = {
        name: Histogram.unpacked(SCALES[name], one.first, one.counts, one.total) for name, one in found.items()
    }
    return TrafficSketch(
        seconds=message.observed_s, arrivals=message.arrivals, cached_tokens=message.cached_tokens, **histograms
    )


MINUTE_S, HOUR_S, DAY_S = 60, 3600, 86400


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficWindow:
    """What was observed of a model's traffic in ``span_s`` from ``start_s`` (Unix time) on."""

    model: str
    span_s: int
    start_s: int
    traffic: TrafficSketch

    def to_proto(self) -> traffic_pb2.TrafficWindow:
        return traffic_pb2.TrafficWindow(
            model=self.model,
            start_time=timestamp(self.start_s),
            span=duration(self.span_s),
            traffic=traffic_to_proto(self.traffic),
        )

    @classmethod
    def from_proto(cls, message: traffic_pb2.TrafficWindow) -> TrafficWindow:
        return cls(
            model=message.model,
            span_s=int(seconds_of(message.span)),
            start_s=int(seconds_of(message.start_time)),
            traffic=traffic_from_proto(message.traffic),
        )


class ModelTraffic:
    """The windows of one model, as the traffic of any time."""

    def __init__(self, name: str, windows: Sequence[TrafficWindow]) -> None:
        self.name, self.windows = name, windows
        self.now_s = max(one.start_s + one.traffic.seconds for one in windows)

    def last(self, last_s: float) -> TrafficSketch:
        """Return the traffic of the last seconds: of minutes where they are kept, else of hours, as wholes."""
        since_s = self.now_s - last_s
        minutes = [one for one in self.windows if one.span_s == MINUTE_S and one.start_s >= since_s - MINUTE_S / 2]
        first_s = min((one.start_s for one in minutes), default=self.now_s) - HOUR_S / 2
        hours = (one for one in self.windows if one.span_s == HOUR_S and since_s - HOUR_S / 2 <= one.start_s < first_s)
        return sum((one.traffic for one in (*hours, *minutes)), TrafficSketch())

    def same_hour(self, days: int) -> TrafficSketch | None:
        """Return the traffic of the clock's hour so many days ago, if it was measured."""
        hour = HOUR_S, (self.now_s - days * DAY_S) // HOUR_S * HOUR_S
        return next((one.traffic for one in self.windows if (one.span_s, one.start_s) == hour), None)

    def periods(self) -> Iterator[tuple[str, TrafficSketch]]:
        """Yield what people compare: the last minutes, and the same hour earlier."""
        yield "last 5 min", self.last(300)
        yield "last hour", self.last(HOUR_S)
        for name, days in (("hour yesterday", 1), ("hour last week", 7)):
            if (found := self.same_hour(days)) is not None:
                yield name, found


def models_of(windows: Iterable[TrafficWindow]) -> list[ModelTraffic]:
    """Return the traffic of every model, that of the newest windows first."""
    by_model: dict[str, list[TrafficWindow]] = {}
    for one in windows:
        by_model.setdefault(one.model, []).append(one)
    return sorted((ModelTraffic(*one) for one in by_model.items()), key=lambda one: -one.now_s)


# --- for people


TRAFFIC_COLUMNS = ("'time", "requests/s", "prompt", "p95", "output", "p95", "hits", "TTFT p95", "TPOT")


def traffic_cells(name: str, one: TrafficSketch) -> Iterator[str]:
    """Yield the cells of a row: rate, mean and p95 lengths, prefix hits, latencies."""
    yield name
    yield digits(one.rate_per_s) if one.seconds else "-"
    for lengths in (one.prompt_tokens, one.output_tokens):
        yield f"{lengths.mean:.0f}" if lengths.count else "-"
        yield f"{lengths.quantile(0.95):.0f}" if lengths.count else "-"
    yield percent(one.prefix_hit_rate) if one.prompt_tokens.count else "-"
    yield seconds(one.ttft_s.quantile(0.95)) if one.ttft_s.count else "-"
    yield seconds(one.tpot_s.mean) if one.tpot_s.count else "-"


SPEED_COLUMNS = ("'replica", "'GPUs", "TPOT", "expected", "measured / expected", "'")


def speed_cells(one: Speed) -> Iterator[str]:
    """Yield the cells of a row: whose speed, beside what, the correction with its error, and what is slow."""
    yield one.replica.rpartition("/")[2] or "all"
    yield ", ".join(one.gpus)
    yield seconds(one.tpot_s)
    yield seconds(one.expected_s)
    yield f"{one.correction:.2f} ± {one.error:.2f}" if math.isfinite(one.error) else f"{one.correction:.2f}"
    yield "" if not one.is_slow else f"slow: {', '.join(one.devices)}" if one.replica else "slower than the profile"


def decision_lines(decision: traffic_pb2.TrafficDecision) -> Iterator[str]:
    """Yield what the planner would do about the traffic, why, and with which replicas."""
    yield decision.reason
    if decision.plan:
        yield f"Proposed: {decision.plan}."
    for one in decision.desired:
        yield f"{one.desired} (in force: {one.in_force}) × {one.shape}"
