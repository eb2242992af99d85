"""Wording of explanations: stages, quantities, and option values in three digits, rounded to the safe side."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from hetis.solver.check.replica_shapes import ReplicaShape, StageShape
from hetis.solver.plan import parallel_sizes


def stage_name(replica: ReplicaShape, stage: StageShape) -> str:
    sizes = parallel_sizes(stage.tp, stage.copies, shares_experts=replica.attention_dp > 1)
    return f"{stage.gpu} {sizes}"


def num_layers(count: int) -> str:
    return "1 layer" if count == 1 else f"{count} layers"


def in_time(seconds: float) -> str:
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * factor >= 0.9995:
            value = seconds * factor
            return f"{value:.3g} {unit}" if value < 999.5 else f"{value:,.0f} {unit}"
    return f"{seconds * 1e6:.3g} us"


def in_time_above(seconds: float, limit_s: float) -> str:
    """Return a time above a limit with enough digits to show it: 100.3 ms if the limit is 100 ms."""
    if in_time(seconds) != in_time(limit_s):
        return in_time(seconds)
    return f"{seconds:.4g} s" if seconds >= 1 else f"{seconds * 1e3:.4g} ms"


def in_percent(ratio: float) -> str:
    return f"{ratio:.2%}" if ratio < 0.1 else f"{ratio:.0%}"


def in_bytes(num_bytes: float) -> str:
    gib = num_bytes / 2**30
    return f"{gib:.1f} GiB" if gib >= 0.05 else f"{num_bytes / 2**20:.1f} MiB"


def listed(requirements: Iterable[object]) -> str:
    *most, last = map(str, requirements)
    return f"{', '.join(most)} and {last}" if most else last


def option_up(seconds: float) -> str:
    """Return a time as an option value, rounded up."""
    return _as_option(seconds, lambda value: -rounded_down(-value))


def option_down(seconds: float) -> str:
    """Return a time as an option value, rounded down."""
    return _as_option(seconds, rounded_down)


def _as_option(seconds: float, rounded: Callable[[float], float]) -> str:
    return f"{rounded(seconds):g}s" if seconds >= 1.0 else f"{rounded(seconds * 1e3):g}ms"


def rounded_down(value: float) -> float:
    """Return three digits of a value, not above it."""
    if value == 0.0:
        return 0.0
    places = 2 - math.floor(math.log10(abs(value)))
    return round(math.floor(value * 10.0**places) / 10.0**places, max(0, places))
