"""Replicas with a single micro-batch, compiled: stages work in turn, so the interval t is the sum of stage times."""

from __future__ import annotations

import numpy as np

from hetis.solver.placement.compiled import kernel
from hetis.solver.placement.fleet import IntArray
from hetis.solver.placement.options import (
    Options,
    excess,
    overdrawn,
    penalised_prices,
    total_price,
    total_seconds,
    traced,
)
from hetis.solver.placement.tables import BOTH, FIRST, LAST, PLAIN, BoolArray, CoverTables, FloatArray


@kernel
def least_weighted(
    t: CoverTables, o: Options, prices: FloatArray, price_weight: float, time_weight: float
) -> tuple[float, float, IntArray]:
    """Find stages that cover all layers with the least ``price_weight price + time_weight sum of stage times``.

    This is a dynamic program over positions that tries every number of layers for every stage.

    Returns (price, seconds, stages): stages [., 2] of (option, layers), first to last; none if nothing fits.
    """
    num_layers = t.num_layers
    least = np.full((4, num_layers + 1), np.inf)
    arg = np.full((4, num_layers + 1), -1, np.int64)
    for i in range(prices.shape[0]):
        for role in range(4):
            base = price_weight * prices[i] + time_weight * o.fixed_s[i, role]
            for l in range(o.min_layers[i, role], o.max_layers[i, role] + 1):
                value = base + time_weight * l * o.layer_s[i]
                if value < least[role, l]:
                    least[role, l], arg[role, l] = value, i
    value_at = np.full(num_layers + 1, np.inf)
    back_pos = np.full(num_layers + 1, -1, np.int64)
    back_opt = np.full(num_layers + 1, -1, np.int64)
    for pos in range(1, num_layers):
        if t.cut_floor[pos] == pos:
            value_at[pos], back_pos[pos], back_opt[pos] = least[FIRST, pos], 0, arg[FIRST, pos]
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
                value_at[target], back_pos[target], back_opt[target] = total, pos, arg[PLAIN, target - pos]
    if final == np.inf:
        return np.inf, np.inf, np.empty((0, 2), np.int64)
    stages = traced(back_pos, back_opt, num_layers, final_pos, final_opt)
    return total_price(prices, stages), max(total_seconds(o, stages), t.t_floor), stages


@kernel
def best_sequential(
    t: CoverTables, o: Options, prices: FloatArray, interval_cap_s: float, ratio_floor: float
) -> tuple[float, float, float]:
    """Find the replica of a single-micro-batch configuration with the best ``rate / price = 1 / (t price)``.

    Price and t of the possible replicas are points in a plane. ``t price`` is quasi-concave, so its minimum over all
    points is a vertex of their lower convex hull. The hull is walked edge by edge, and an edge is opened only while the
    corner below it could beat ``ratio_floor`` and the best found. With a cap on t the minimum may lie inside an edge,
    at the cap; that point bounds what no vertex reaches.

    Returns (ratio, time_weight, bound): `least_weighted` with price weight 1 and this time weight finds the replica.
    `best_within_cap` closes the gap that a cap leaves between ratio and bound.
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


@kernel
def useful_options(
    t: CoverTables, o: Options, prices: FloatArray, interval_cap_s: float, ratio_floor: float
) -> IntArray:
    """Return the options that a replica with ``1 / (t price) > ratio_floor`` and t within the cap can use.

    An option with n layers leaves the other layers to stages that cost at least the cheapest cover and take at least
    the quickest one, each found separately. If even that pair misses cap or floor for every n, the option is useless.
    It is also useless if the least sum of ``sqrt(price seconds)`` of any cover is too large, because its square bounds
    ``t price`` from below (Cauchy-Schwarz). If this holds for every cover, no option is useful.
    """
    num_layers, num_options = t.num_layers, prices.shape[0]
    cheapest = np.full(num_layers + 1, np.inf)  # price of one stage with n layers in any role
    quickest = np.full(num_layers + 1, np.inf)
    least = np.full((4, num_layers + 1), np.inf)  # price times seconds of one stage
    for i in range(num_options):
        price, layer_s = prices[i], o.layer_s[i]
        for role in range(4):
            fixed_s = o.fixed_s[i, role]
            for n in range(o.min_layers[i, role], o.max_layers[i, role] + 1):
                seconds = n * layer_s + fixed_s
                if seconds > interval_cap_s:
                    break
                least[role, n] = min(least[role, n], price * seconds)
                cheapest[n] = min(cheapest[n], price)
                quickest[n] = min(quickest[n], seconds)
    least = np.sqrt(least)
    wanted = 1.0 / np.sqrt(ratio_floor) if ratio_floor > 0.0 else np.inf
    if _least_cover(t, least) >= wanted * (1.0 + 1e-9):
        return np.empty(0, np.int64)
    cheapest_rest = np.full(num_layers + 1, np.inf)
    quickest_rest = np.full(num_layers + 1, np.inf)
    least_rest = np.full(num_layers + 1, np.inf)
    cheapest_rest[0] = quickest_rest[0] = least_rest[0] = 0.0
    for left in range(1, num_layers + 1):
        for n in range(1, left + 1):
            root = min(min(least[0, n], least[1, n]), min(least[2, n], least[3, n]))
            cheapest_rest[left] = min(cheapest_rest[left], cheapest[n] + cheapest_rest[left - n])
            quickest_rest[left] = min(quickest_rest[left], quickest[n] + quickest_rest[left - n])
            least_rest[left] = min(least_rest[left], root + least_rest[left - n])
    useful = np.zeros(num_options, np.bool_)
    for i in range(num_options):
        for role in range(4):
            for n in range(o.min_layers[i, role], o.max_layers[i, role] + 1):
                price = prices[i] + cheapest_rest[num_layers - n]
                own_s = n * o.layer_s[i] + o.fixed_s[i, role]
                seconds = own_s + quickest_rest[num_layers - n]
                if (
                    seconds <= interval_cap_s
                    and price * seconds * ratio_floor < 1.0
                    and np.sqrt(prices[i] * own_s) + least_rest[num_layers - n] < wanted * (1.0 + 1e-9)
                ):
                    useful[i] = True
                    break
            if useful[i]:
                break
    return np.flatnonzero(useful)


@kernel
def _least_cover(t: CoverTables, least: FloatArray) -> float:
    """Return the least sum over stages that cover all layers; ``least`` [4, L + 1] is one stage's by role, layers."""
    num_layers = t.num_layers
    at = np.full(num_layers, np.inf)
    final: float = least[BOTH, num_layers]
    for pos in range(1, num_layers):
        if t.cut_floor[pos] != pos:
            continue
        at[pos] = least[FIRST, pos]
        for before in range(1, pos):
            at[pos] = min(at[pos], at[before] + least[PLAIN, pos - before])
        final = min(final, at[pos] + least[LAST, num_layers - pos])
    return final


@kernel
def best_fitting_sequential(
    t: CoverTables, o: Options, prices: FloatArray, interval_cap_s: float, scarce: BoolArray
) -> tuple[float, IntArray, float]:
    """Return a good single-micro-batch replica that fits in the fleet, and a bound on all that fit.

    For a series of time weights mu, penalties on scarce classes give Lagrangian bounds V(mu) on ``price + mu t``. With
    t within the cap they bound price from below at every t, and therefore ``1 / (t price)``.

    Returns (ratio, stages, bound); ratio 0 and no stages if no fitting replica was found.
    """
    steps = 15
    best, best_stages = 0.0, np.empty((0, 2), np.int64)
    cheapest, _, stages = least_weighted(t, o, prices, 1.0, 0.0)
    if stages.shape[0] == 0:
        return best, best_stages, 0.0
    _, quickest_s, _ = least_weighted(t, o, prices, 0.0, 1.0)
    if quickest_s > interval_cap_s:
        return best, best_stages, 0.0
    weights = np.empty(steps, np.float64)
    values = np.empty(steps, np.float64)
    penalty = np.zeros(scarce.shape[0])
    for k in range(steps):
        weights[k] = cheapest / quickest_s * 3.0 ** (k - 6)
        values[k] = 0.0
        step = 0.0
        for _ in range(20):
            penalised, fleet = penalised_prices(t, o, prices, penalty)
            price, seconds, stages = least_weighted(t, o, penalised, 1.0, weights[k])
            total = price + weights[k] * seconds
            values[k] = max(values[k], total - fleet)
            short, over = overdrawn(t, o, stages, scarce)
            if short < 0:
                true_price = total_price(prices, stages)
                if seconds <= interval_cap_s and 1.0 / (seconds * true_price) > best:
                    best, best_stages = 1.0 / (seconds * true_price), stages
                if fleet <= 1e-3 * total:
                    break
            # Follow the subgradient in ever smaller steps: large penalties would drown the prices in rounding.
            if step == 0.0:
                step = 0.5 * total / max(1, over)
            for g in range(scarce.shape[0]):
                if scarce[g]:
                    penalty[g] = max(0.0, penalty[g] + step * excess(t, o, stages, g) / max(1, t.available[g]))
            step *= 0.8
    bound, at = 0.0, quickest_s
    while at < interval_cap_s:
        following = min(at * 1.002, interval_cap_s)
        least = cheapest
        for k in range(steps):
            least = max(least, values[k] - weights[k] * following)
        bound = max(bound, 1.0 / (at * least))
        if least <= cheapest:
            break  # beyond this, the price falls no further, and longer intervals only lower the rate
        at = following
        if at >= interval_cap_s:
            break
    return best, best_stages, max(bound, best)


# --- under a cap on the interval: an exact shortest path with (price, seconds) labels


MAX_LABELS = 192  # labels per position; if more were needed, `best_within_cap` is not exact


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
                    quickest, option[role, n, count[role, n]] = seconds, i
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
    cheapest_left, quickest_left = _least_completions(o, prices, count, option)
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
    return best, _traced_labels(back, best_pos, best_label, best_option), exact


@kernel
def _least_completions(
    o: Options, prices: FloatArray, count: IntArray, option: IntArray
) -> tuple[FloatArray, FloatArray]:
    """Return the least price and the least seconds of the stages that hold the layers left, including the last stage.

    ``count`` and ``option`` are those of `_pareto_steps`; results are by the number of layers left, each on its own.
    """
    num_layers = count.shape[1] - 1
    cheapest, quickest = np.full(num_layers + 1, np.inf), np.full(num_layers + 1, np.inf)
    for left in range(1, num_layers + 1):
        for n in range(1, left + 1):
            role = LAST if n == left else PLAIN
            rest_price = 0.0 if n == left else cheapest[left - n]
            rest_s = 0.0 if n == left else quickest[left - n]
            for j in range(count[role, n]):
                i = option[role, n, j]
                cheapest[left] = min(cheapest[left], prices[i] + rest_price)
                quickest[left] = min(quickest[left], n * o.layer_s[i] + o.fixed_s[i, role] + rest_s)
    return cheapest, quickest


@kernel
def _traced_labels(back: IntArray, last_pos: int, last_label: int, last_option: int) -> IntArray:
    """Return stages, first to last, from what preceded each label; the last stage begins at ``last_pos``."""
    num_layers = back.shape[0] - 1
    reverse = np.empty((num_layers, 2), np.int64)
    reverse[0, 0], reverse[0, 1] = last_option, num_layers - last_pos
    size, pos, label = 1, last_pos, last_label
    while pos > 0:
        before = back[pos, label, 0]
        reverse[size, 0], reverse[size, 1] = back[pos, label, 2], pos - before
        size += 1
        pos, label = before, back[pos, label, 1]
    return reverse[:size][::-1].copy()


@kernel
def _add_label(
    labels: IntArray, price_at: FloatArray, seconds_at: FloatArray, back: IntArray, pos: int, price: float,
    seconds: float, before_pos: int, before_label: int, option: int,
) -> bool:  # fmt: skip
    """Add a label unless an existing one is as good, and drop those it beats; return False if there was no room.

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
