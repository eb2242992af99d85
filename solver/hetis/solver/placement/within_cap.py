"""Sequential replicas under a cap on the interval, compiled: an exact shortest path with (price, seconds) labels."""

from __future__ import annotations

import numpy as np

from hetis.solver.placement.classes import IntArray
from hetis.solver.placement.compiled import kernel
from hetis.solver.placement.options import Options
from hetis.solver.placement.tables import BOTH, FIRST, LAST, PLAIN, CoverTables, FloatArray

MAX_LABELS = 192  # per position; if more were needed, `best_within_cap` is not exact


@kernel
def _pareto_steps(t: CoverTables, o: Options, prices: FloatArray) -> tuple[IntArray, IntArray]:
    """Return the options per role and number of layers that no other beats in both price and time.

    Returns (count [4, L + 1], option [4, L + 1, options]); options are sorted by rising price.
    """
    num_layers, num_options = t.num_layers, prices.shape[0]
    order = np.argsort(prices)
    count = np.zeros((4, num_layers + 1), np.int64)
    option = np.empty((4, num_layers + 1, num_options), np.int64)
    for role in range(4):
        for n in range(1, num_layers + 1):
            quickest = np.inf
            for i in order:
                seconds = n * o.layer_s[i] + o.fixed_s[i, role]
                if o.min_layers[i, role] <= n <= o.max_layers[i, role] and seconds < quickest:
                    quickest = seconds
                    option[role, n, count[role, n]] = i
                    count[role, n] += 1
    return count, option


@kernel
def best_within_cap(
    t: CoverTables, o: Options, prices: FloatArray, interval_cap_s: float, ratio_floor: float
) -> tuple[float, IntArray, bool]:
    """Return the best ``1 / (t price)`` above ``ratio_floor`` with t within a cap, by a shortest path with labels.

    A label at a position is a (price, seconds) pair that no other label there beats in both. It is dropped if even the
    cheapest and the quickest completions, taken separately, exceed the cap or miss the floor.

    Returns (ratio, stages, exact): ratio 0 if there is none; not exact if some position had too many labels.
    """
    num_layers = t.num_layers
    count, option = _pareto_steps(t, o, prices)
    cheapest_left = np.full(num_layers + 1, np.inf)  # by layers left, including the last stage
    quickest_left = np.full(num_layers + 1, np.inf)
    for left in range(1, num_layers + 1):
        for n in range(1, left + 1):
            role = LAST if n == left else PLAIN
            rest_price = 0.0 if n == left else cheapest_left[left - n]
            rest_s = 0.0 if n == left else quickest_left[left - n]
            for j in range(count[role, n]):
                i = option[role, n, j]
                cheapest_left[left] = min(cheapest_left[left], prices[i] + rest_price)
                quickest_left[left] = min(quickest_left[left], n * o.layer_s[i] + o.fixed_s[i, role] + rest_s)
    labels = np.zeros(num_layers + 1, np.int64)
    price_at = np.empty((num_layers + 1, MAX_LABELS), np.float64)
    seconds_at = np.empty((num_layers + 1, MAX_LABELS), np.float64)
    back = np.empty((num_layers + 1, MAX_LABELS, 3), np.int64)  # position before, label before, option
    best, best_pos, best_label, best_option = 0.0, 0, -1, -1
    exact = True
    for pos in range(num_layers):
        for label in range(labels[pos] if pos > 0 else 1):
            price = price_at[pos, label] if pos > 0 else 0.0
            seconds = seconds_at[pos, label] if pos > 0 else 0.0
            for n in range(1, num_layers - pos + 1):
                target = pos + n
                if t.cut_floor[target] != target and target < num_layers:
                    continue
                role = (BOTH if pos == 0 else LAST) if target == num_layers else (FIRST if pos == 0 else PLAIN)
                for j in range(count[role, n]):
                    i = option[role, n, j]
                    new_price = price + prices[i]
                    new_s = seconds + n * o.layer_s[i] + o.fixed_s[i, role]
                    if target == num_layers:
                        new_s = max(new_s, t.t_floor)
                        if new_s <= interval_cap_s and 1.0 / (new_s * new_price) > max(best, ratio_floor):
                            best, best_pos, best_label, best_option = 1.0 / (new_s * new_price), pos, label, i
                        continue
                    least_s = new_s + quickest_left[num_layers - target]
                    least_price = new_price + cheapest_left[num_layers - target]
                    if least_s > interval_cap_s or least_s * least_price * max(best, ratio_floor) >= 1.0:
                        continue
                    exact = _add_label(
                        labels, price_at, seconds_at, back, target, new_price, new_s, pos, label, i
                    ) and exact  # fmt: skip
    if best == 0.0:
        return best, np.empty((0, 2), np.int64), exact
    reverse = np.empty((num_layers, 2), np.int64)
    reverse[0, 0], reverse[0, 1] = best_option, num_layers - best_pos
    size, pos, label = 1, best_pos, best_label
    while pos > 0:
        before = back[pos, label, 0]
        reverse[size, 0], reverse[size, 1] = back[pos, label, 2], pos - before
        size += 1
        pos, label = before, back[pos, label, 1]
    return best, reverse[:size][::-1].copy(), exact


@kernel
def _add_label(
    labels: IntArray, price_at: FloatArray, seconds_at: FloatArray, back: IntArray, pos: int, price: float,
    seconds: float, before_pos: int, before_label: int, option: int,
) -> bool:  # fmt: skip
    """Add a label unless an existing one is as good, drop those it beats, and return False if there was no room.

    Labels already expanded are never dropped, because a position only gains labels from earlier positions.
    """
    kept = 0
    for i in range(labels[pos]):
        if price_at[pos, i] <= price and seconds_at[pos, i] <= seconds:
            return True
    for i in range(labels[pos]):
        if price <= price_at[pos, i] and seconds <= seconds_at[pos, i]:
            continue
        price_at[pos, kept], seconds_at[pos, kept] = price_at[pos, i], seconds_at[pos, i]
        back[pos, kept, :] = back[pos, i, :]
        kept += 1
    labels[pos] = kept
    if kept == price_at.shape[1]:
        return False
    price_at[pos, kept], seconds_at[pos, kept] = price, seconds
    back[pos, kept, 0], back[pos, kept, 1], back[pos, kept, 2] = before_pos, before_label, option
    labels[pos] = kept + 1
    return True
