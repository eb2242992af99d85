"""Wording of stages and quantities in explanations."""

from __future__ import annotations

from hetis.solver.check.fleet import ReplicaShape, StageShape
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
