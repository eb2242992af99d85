"""Measured traffic in a table."""

from __future__ import annotations

import math
from collections.abc import Iterator

from hetis.planner.report.figures import digits, percent, seconds
from hetis.planner.use_cases.speeds import Speed
from hetis.solver.traffic import TrafficSketch
from hetis.v1.traffic_pb2 import TrafficDecision

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


def decision_lines(decision: TrafficDecision) -> Iterator[str]:
    """Yield what the planner would do about the traffic, why, and with which replicas."""
    yield decision.reason
    if decision.plan:
        yield f"Proposed: {decision.plan}."
    for one in decision.desired:
        yield f"{one.desired} (in force: {one.in_force}) × {one.shape}"
