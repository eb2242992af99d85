"""Sums over the stages of one replica, compiled: price, seconds, GPUs. Stages are rows [., 2] of (option, layers)."""

from __future__ import annotations

from hetis.solver.placement.classes import IntArray
from hetis.solver.placement.compiled import kernel
from hetis.solver.placement.options import Options, class_use
from hetis.solver.placement.tables import BOTH, FIRST, LAST, PLAIN, BoolArray, CoverTables, FloatArray


@kernel
def total_price(prices: FloatArray, stages: IntArray) -> float:
    total = 0.0
    for i in range(stages.shape[0]):
        total += prices[stages[i, 0]]
    return total


@kernel
def role_of(index: int, count: int) -> int:
    """Return the role of stage ``index`` out of ``count``."""
    if count == 1:
        return BOTH
    if index == 0:
        return FIRST
    return LAST if index == count - 1 else PLAIN


@kernel
def total_seconds(o: Options, stages: IntArray) -> float:
    """Return the sum of the stage times of one request."""
    total = 0.0
    count = stages.shape[0]
    for i in range(count):
        option = stages[i, 0]
        total += stages[i, 1] * o.layer_s[option] + o.fixed_s[option, role_of(i, count)]
    return total


@kernel
def excess(t: CoverTables, o: Options, stages: IntArray, device_class: int) -> int:
    """Return the GPUs of a class that a replica takes beyond those available; negative if some are left."""
    use: int = -t.available[device_class]
    for i in range(stages.shape[0]):
        use += class_use(t, o, stages[i, 0], device_class)
    return use


@kernel
def overdrawn(t: CoverTables, o: Options, stages: IntArray, scarce: BoolArray) -> tuple[int, int]:
    """Return the scarce class that a replica overdraws most and by how many GPUs; -1 if it fits in the fleet."""
    worst, most = -1, 0
    for g in range(scarce.shape[0]):
        if scarce[g]:
            over = excess(t, o, stages, g)
            if over > most:
                worst, most = g, over
    return worst, most
