"""Replicas with a single micro-batch, compiled: stages take turns, so that the interval t is the sum of stage times."""

from __future__ import annotations

import numpy as np
from numba import njit

from hetis.solver.placement.classes import IntArray
from hetis.solver.placement.options import Options
from hetis.solver.placement.tables import BOTH, FIRST, LAST, PLAIN, FloatArray, Tables


@njit(cache=True, nogil=True)
def least_weighted(
    t: Tables, o: Options, prices: FloatArray, price_weight: float, time_weight: float
) -> tuple[float, float, IntArray]:
    """Stages that cover all layers with the least ``price_weight price + time_weight sum of stage times``.

    A dynamic program over positions, every number of layers tried for every stage.

    Returns (price, seconds, stages): stages [., 2] of (option, layers), first to last; none if nothing fits.
    """
    num_layers = t.num_layers
    least = np.full((4, num_layers + 1), np.inf)
    arg = np.full((4, num_layers + 1), -1, np.int64)
    for i in range(prices.shape[0]):
        for role in range(4):
            base = price_weight * prices[i] + time_weight * o.fixed_s[i, role]
            for l in range(1, o.max_layers[i, role] + 1):
                value = base + time_weight * l * o.layer_s[i]
                if value < least[role, l]:
                    least[role, l] = value
                    arg[role, l] = i
    value_at = np.full(num_layers + 1, np.inf)
    back_pos = np.full(num_layers + 1, -1, np.int64)
    back_opt = np.full(num_layers + 1, -1, np.int64)
    for pos in range(1, num_layers):
        if t.cut_floor[pos] == pos:
            value_at[pos] = least[FIRST, pos]
            back_pos[pos] = 0
            back_opt[pos] = arg[FIRST, pos]
    final, final_pos, final_opt = least[BOTH, num_layers], 0, arg[BOTH, num_layers]
    for pos in range(1, num_layers):
        if value_at[pos] == np.inf:
            continue
        closing = value_at[pos] + least[LAST, num_layers - pos]
        if closing < final:
            final, final_pos, final_opt = closing, pos, arg[LAST, num_layers - pos]
        for target in range(pos + 1, num_layers):
            total = value_at[pos] + least[PLAIN, target - pos]
            if total < value_at[target] and t.cut_floor[target] == target:
                value_at[target] = total
                back_pos[target] = pos
                back_opt[target] = arg[PLAIN, target - pos]
    if final == np.inf:
        return np.inf, np.inf, np.empty((0, 2), np.int64)
    reverse = np.empty((num_layers, 2), np.int64)
    reverse[0, 0], reverse[0, 1] = final_opt, num_layers - final_pos
    count, pos = 1, final_pos
    while pos > 0:
        reverse[count, 0], reverse[count, 1] = back_opt[pos], pos - back_pos[pos]
        count += 1
        pos = back_pos[pos]
    stages = reverse[:count][::-1].copy()
    return total_price(prices, stages), total_seconds(o, stages), stages


@njit(cache=True, nogil=True)
def total_price(prices: FloatArray, stages: IntArray) -> float:
    total = 0.0
    for i in range(stages.shape[0]):
        total += prices[stages[i, 0]]
    return total


@njit(cache=True, nogil=True)
def role_of(index: int, count: int) -> int:
    """Role of stage ``index`` out of ``count``."""
    if count == 1:
        return BOTH
    if index == 0:
        return FIRST
    return LAST if index == count - 1 else PLAIN


@njit(cache=True, nogil=True)
def total_seconds(o: Options, stages: IntArray) -> float:
    """Sum of stage times of one request."""
    total = 0.0
    count = stages.shape[0]
    for i in range(count):
        option = stages[i, 0]
        total += stages[i, 1] * o.layer_s[option] + o.fixed_s[option, role_of(i, count)]
    return total


@njit(cache=True, nogil=True)
def best_sequential(
    t: Tables, o: Options, prices: FloatArray, interval_cap_s: float, ratio_floor: float
) -> tuple[float, float, float]:
    """The replica of a single-micro-batch configuration with the best ``rate / price = 1 / (t price)``.

    Price and t of the possible replicas are points of a plane; ``t price`` is quasi-concave, so its minimum over all
    points is a vertex of their lower convex hull. The hull is walked edge by edge, an edge being opened only while the
    corner below it could beat ``ratio_floor`` and the best found. With a cap on t the minimum may lie inside an edge,
    at the cap: that point bounds what no vertex reaches.

    Returns (ratio, time_weight, bound): `least_weighted` with price weight 1 and this time weight finds the replica.
    """
    if prices.shape[0] == 0:
        return 0.0, 0.0, 0.0
    price_a, t_a, stages = least_weighted(t, o, prices, 1.0, 0.0)
    if stages.shape[0] == 0:
        return 0.0, 0.0, 0.0
    price_b, t_b, _ = least_weighted(t, o, prices, 0.0, 1.0)
    best, best_weight, bound = 0.0, 0.0, 0.0
    if t_b > interval_cap_s:
        return best, best_weight, bound
    if t_a <= interval_cap_s:
        best, best_weight = 1.0 / (t_a * price_a), 0.0
    if 1.0 / (t_b * price_b) > best:
        best, best_weight = 1.0 / (t_b * price_b), 1e9 * price_b / t_b
    bound = best
    stack = np.empty((128, 4), np.float64)
    stack[0, 0], stack[0, 1], stack[0, 2], stack[0, 3] = price_a, t_a, price_b, t_b
    size = 1
    while size > 0:
        size -= 1
        price_a, t_a, price_b, t_b = stack[size, 0], stack[size, 1], stack[size, 2], stack[size, 3]
        if t_b > interval_cap_s or t_a <= t_b or price_b <= price_a:
            continue
        if 1.0 / (price_a * t_b) <= max(ratio_floor, best):
            continue
        weight = (price_b - price_a) / (t_a - t_b)
        price_m, t_m, _ = least_weighted(t, o, prices, 1.0, weight)
        on_edge = price_m + weight * t_m >= (price_a + weight * t_a) * (1.0 - 1e-12)
        if on_edge or size + 2 >= stack.shape[0]:
            if t_a > interval_cap_s:  # the edge crosses the cap
                price_at_cap = price_a + weight * (t_a - interval_cap_s)
                bound = max(bound, 1.0 / (price_at_cap * interval_cap_s))
            if not on_edge:
                bound = max(bound, 1.0 / (price_a * t_b))
            continue
        if t_m <= interval_cap_s and 1.0 / (price_m * t_m) > best:
            best, best_weight = 1.0 / (price_m * t_m), weight
            bound = max(bound, best)
        stack[size, 0], stack[size, 1], stack[size, 2], stack[size, 3] = price_a, t_a, price_m, t_m
        size += 1
        stack[size, 0], stack[size, 1], stack[size, 2], stack[size, 3] = price_m, t_m, price_b, t_b
        size += 1
    return best, best_weight, bound
