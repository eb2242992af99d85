"""Pipelined replicas, compiled: the cheapest stages that cover all layers, and the column of best rate per price."""

from __future__ import annotations

import numpy as np

from hetis.solver.placement.compiled import kernel
from hetis.solver.placement.fleet import IntArray
from hetis.solver.placement.options import (
    Options,
    overdrawn,
    penalised_prices,
    selected,
    stage_rows,
    total_price,
    traced,
)
from hetis.solver.placement.stage_cost import ROUNDING
from hetis.solver.placement.tables import BOTH, FIRST, LAST, PLAIN, BoolArray, CoverTables, FloatArray


@kernel
def layers_in_time(o: Options, i: int, role: int, interval_s: float) -> int:
    """Return the repeated layers that option i carries in a role if completions are ``interval_s`` apart."""
    time_left = o.copies[i] * interval_s - o.fixed_s[i, role]
    if time_left <= 0.0:
        return 0
    return int(min(float(o.max_layers[i, role]), time_left / o.layer_s[i] + ROUNDING))


@kernel
def cheapest_per_layers(
    o: Options, prices: FloatArray, interval_s: float, num_layers: int, best: FloatArray, arg: IntArray
) -> None:
    """Fill best, arg [4, num_layers + 1]: for each role and l, the cheapest option that carries at least l layers."""
    best[:], arg[:] = np.inf, -1
    for i in range(prices.shape[0]):
        per_second, busy = 1.0 / o.layer_s[i], o.copies[i] * interval_s
        for role in range(4):
            layers = min(float(o.max_layers[i, role]), (busy - o.fixed_s[i, role]) * per_second + ROUNDING)
            if layers >= 1.0:
                l = int(layers)
                if prices[i] < best[role, l]:
                    best[role, l], arg[role, l] = prices[i], i
    for role in range(4):
        for l in range(num_layers - 1, -1, -1):
            if best[role, l + 1] < best[role, l]:
                best[role, l], arg[role, l] = best[role, l + 1], arg[role, l + 1]


@kernel
def cheapest_cover(
    t: CoverTables, o: Options, prices: FloatArray, interval_s: float, max_copies: int
) -> tuple[float, IntArray]:
    """Return the cheapest stages that cover all layers within an interval, with at most ``max_copies`` copies in all.

    This is a dynamic program over positions: ``cost[pos]`` is the least price of stages that reach at least ``pos``.
    Stages take as many layers as they can, since reaching further is never worse. If the cheapest cover has too many
    copies, a second program counts them.

    Returns (price, stages): stages [., 2] of (option, layers), first to last; price inf and no stages if none covers.
    """
    num_layers = t.num_layers
    best = np.empty((4, num_layers + 1), np.float64)
    arg = np.empty((4, num_layers + 1), np.int64)
    cheapest_per_layers(o, prices, interval_s, num_layers, best, arg)
    price, stages = _cover(t, best, arg)
    copies = 0
    for i in stages[:, 0]:
        copies += o.copies[i]
    if copies > max_copies:
        # A cover with fewer copies may use options that the first table omits, so tabulate per copy count.
        return _cover_counted(t, o, prices, interval_s, max_copies)
    return price, stages


@kernel
def _cover(t: CoverTables, best: FloatArray, arg: IntArray) -> tuple[float, IntArray]:
    num_layers = t.num_layers
    cost = np.full(num_layers + 1, np.inf)
    back_pos = np.full(num_layers + 1, -1, np.int64)
    back_opt = np.full(num_layers + 1, -1, np.int64)
    for l in range(1, num_layers):
        if best[FIRST, l] < np.inf and (best[FIRST, l] < best[FIRST, l + 1] or l == num_layers - 1):
            pos = t.cut_floor[l]
            if pos > 0 and best[FIRST, l] < cost[pos]:
                cost[pos], back_pos[pos], back_opt[pos] = best[FIRST, l], 0, arg[FIRST, l]
    final, final_pos, final_opt = best[BOTH, num_layers], 0, arg[BOTH, num_layers]
    for pos in range(1, num_layers):
        if cost[pos] == np.inf:
            continue
        closing = cost[pos] + best[LAST, num_layers - pos]
        if closing < final:
            final, final_pos, final_opt = closing, pos, arg[LAST, num_layers - pos]
        for l in range(1, num_layers - pos):
            if best[PLAIN, l] == np.inf:
                break
            if best[PLAIN, l] < best[PLAIN, l + 1] or l == num_layers - pos - 1:
                target = t.cut_floor[pos + l]
                total = cost[pos] + best[PLAIN, l]
                if target > pos and total < cost[target]:
                    cost[target], back_pos[target], back_opt[target] = total, pos, arg[PLAIN, l]
    if final == np.inf:
        return np.inf, np.empty((0, 2), np.int64)
    return final, traced(back_pos, back_opt, num_layers, final_pos, final_opt)


@kernel
def _cover_counted(
    t: CoverTables, o: Options, prices: FloatArray, interval_s: float, max_copies: int
) -> tuple[float, IntArray]:
    """Return `cheapest_cover` with the copies counted: ``cost[K, pos]`` is the price with exactly K copies so far.

    This is separate from `_cover` because a joint program, though as fast, would be inlined wherever `_cover` is, and
    column generation took 1 to 3 s longer to compile.
    """
    num_layers = t.num_layers
    widest = 1
    for i in range(prices.shape[0]):
        widest = max(widest, o.copies[i])
    widest = min(widest, max_copies)
    best = np.full((widest + 1, 4, num_layers + 1), np.inf)
    arg = np.full((widest + 1, 4, num_layers + 1), -1, np.int64)
    for i in range(prices.shape[0]):
        c = o.copies[i]
        if c > widest:
            continue
        for role in range(4):
            l = layers_in_time(o, i, role, interval_s)
            if l > 0 and prices[i] < best[c, role, l]:
                best[c, role, l], arg[c, role, l] = prices[i], i
    for c in range(1, widest + 1):
        for role in range(4):
            for l in range(num_layers - 1, -1, -1):
                if best[c, role, l + 1] < best[c, role, l]:
                    best[c, role, l], arg[c, role, l] = best[c, role, l + 1], arg[c, role, l + 1]
    cost = np.full((max_copies + 1, num_layers + 1), np.inf)
    back_pos = np.full((max_copies + 1, num_layers + 1), -1, np.int64)
    back_opt = np.full((max_copies + 1, num_layers + 1), -1, np.int64)
    final, final_pos, final_opt, final_k = np.inf, 0, np.int64(-1), 0
    for c in range(1, widest + 1):
        if best[c, BOTH, num_layers] < final:
            final, final_opt, final_k = best[c, BOTH, num_layers], arg[c, BOTH, num_layers], c
        for l in range(1, num_layers):
            pos = t.cut_floor[l]
            if pos > 0 and best[c, FIRST, l] < cost[c, pos]:
                cost[c, pos], back_pos[c, pos], back_opt[c, pos] = best[c, FIRST, l], 0, arg[c, FIRST, l]
    for pos in range(1, num_layers):
        for k in range(1, max_copies):
            if cost[k, pos] == np.inf:
                continue
            for c in range(1, min(widest, max_copies - k) + 1):
                closing = cost[k, pos] + best[c, LAST, num_layers - pos]
                if closing < final:
                    final, final_pos, final_opt, final_k = closing, pos, arg[c, LAST, num_layers - pos], k + c
                for l in range(1, num_layers - pos):
                    if best[c, PLAIN, l] == np.inf:
                        break
                    target = t.cut_floor[pos + l]
                    total = cost[k, pos] + best[c, PLAIN, l]
                    if target > pos and total < cost[k + c, target]:
                        cost[k + c, target], back_pos[k + c, target] = total, pos
                        back_opt[k + c, target] = arg[c, PLAIN, l]
    if final == np.inf:
        return np.inf, np.empty((0, 2), np.int64)
    reverse = np.empty((max_copies + 1, 2), np.int64)
    reverse[0, 0], reverse[0, 1] = final_opt, num_layers - final_pos
    count, pos, k = 1, final_pos, final_k - o.copies[final_opt]
    while pos > 0:
        option, before = back_opt[k, pos], back_pos[k, pos]
        reverse[count, 0], reverse[count, 1] = option, pos - before
        count, pos, k = count + 1, before, k - o.copies[option]
    return final, reverse[:count][::-1].copy()


@kernel
def _penalised_cover(
    t: CoverTables, o: Options, prices: FloatArray, interval_s: float, max_copies: int, penalty: FloatArray
) -> tuple[float, IntArray]:
    """Return (bound, stages): the cheapest cover at `penalised_prices`, and its bound on covers that fit the fleet."""
    penalised, fleet = penalised_prices(t, o, prices, penalty)
    price, stages = cheapest_cover(t, o, penalised, interval_s, max_copies)
    return price - fleet, stages


@kernel
def fitting_cover(
    t: CoverTables, o: Options, prices: FloatArray, interval_s: float, max_copies: int, scarce: BoolArray,
    penalty: FloatArray, enough: float,
) -> tuple[float, float, IntArray]:  # fmt: skip
    """Return `cheapest_cover` among replicas that fit in the fleet, with a bound if that is not found at once.

    A class of which one replica could take more than there is (a *scarce* one) gets a penalty on its GPUs, which gives
    a Lagrangian bound. Penalties rise on overdrawn classes, and fall back by half a step if the bound stops rising or
    the cover fits. A bound of ``enough`` ends the search. ``penalty`` [N] is filled with those of the best bound.

    Returns (lower bound on the price, price, stages); price inf and no stages if no fitting cover was found.
    """
    price, stages = cheapest_cover(t, o, prices, interval_s, max_copies)
    short, over = overdrawn(t, o, stages, scarce)
    penalty[:] = 0.0
    if short < 0:
        return price, price, stages
    lower, best_price, best_stages = price, np.inf, np.empty((0, 2), np.int64)
    trial = np.zeros(penalty.shape[0])
    step = price / (over + t.available[short])
    for _ in range(24):
        trial[short] += step
        bound, stages = _penalised_cover(t, o, prices, interval_s, max_copies, trial)
        excess, _ = overdrawn(t, o, stages, scarce)
        if bound > lower:
            lower, penalty[:] = bound, trial
        if bound == np.inf or lower >= enough or lower >= best_price:
            break
        if excess < 0:
            price = total_price(prices, stages)
            if price < best_price:
                best_price, best_stages = price, stages
            if best_price - lower <= 1e-3 * best_price:
                break
        if excess < 0 or bound < lower:
            trial[short] = max(0.0, trial[short] - step)
            step *= 0.5
        else:
            short = excess
    return min(lower, best_price), best_price, best_stages


@kernel
def _options_within(
    t: CoverTables, o: Options, prices: FloatArray, best: FloatArray, interval_s: float, price_limit: float
) -> IntArray:
    """Return the options that a cover of price below ``price_limit`` at this or a shorter interval can use.

    ``best`` [4, L + 1] is the cheapest option per role and layers at ``interval_s``. The layers that an option cannot
    carry fall to others, which cost at least the cheapest cover of that many layers by stages of any role.
    """
    num_layers = t.num_layers
    rest = np.full(num_layers + 1, np.inf)
    rest[0] = 0.0
    for left in range(1, num_layers + 1):
        for n in range(1, left + 1):
            cheapest = min(min(best[0, n], best[1, n]), min(best[2, n], best[3, n]))
            rest[left] = min(rest[left], cheapest + rest[left - n])
    kept = np.empty(prices.shape[0], np.int64)
    count = 0
    for i in range(prices.shape[0]):
        if prices[i] >= price_limit:
            continue
        most = 0
        for role in range(4):
            most = max(most, layers_in_time(o, i, role, interval_s))
        if most > 0 and prices[i] + rest[num_layers - most] < price_limit:
            kept[count], count = i, count + 1
    return kept[:count]


PANEL = 1.1  # ratio of the ends of an interval that is searched with one selection of options
MAX_HALVINGS = 64  # per panel; narrower intervals would not close a gap that a scarce class leaves


@kernel
def best_column(
    t: CoverTables, o: Options, prices: FloatArray, interval_cap_s: float, max_copies: int, scarce: BoolArray,
    ratio_floor: float, tolerance: float,
) -> tuple[float, IntArray, float]:  # fmt: skip
    """Return the replica of a pipelined configuration with the best ``rate / price``.

    This is branch and bound over intervals.

    Let C(t) be the price of the cheapest cover at interval t, which never rises with t. Every t in [t_lo, t_hi] has
    ``1 / (t C(t)) <= 1 / (t_lo C(t_hi))``. From the longest interval down, those that cannot beat ``ratio_floor`` or
    the best found are skipped. The others are searched panel by panel (`_best_in_panel`) with the options that a
    sufficiently cheap cover can use.

    Returns (ratio, rows of its stages, bound): no replica of this configuration that fits in the fleet has a ratio
    above ``max(bound, ratio_floor)``.
    """
    best_ratio, best_rows, bound = 0.0, np.empty((0, 6), np.int64), 0.0
    if prices.shape[0] == 0:
        return best_ratio, best_rows, bound
    slowest, fastest_layer = 0.0, np.inf
    for i in range(prices.shape[0]):
        fastest_layer = min(fastest_layer, o.layer_s[i])
        for role in range(4):
            slowest = max(slowest, (o.max_layers[i, role] * o.layer_s[i] + o.fixed_s[i, role]) / o.copies[i])
    hi = min(interval_cap_s, max(t.t_floor, slowest * (1.0 + 1e-9)))
    t_lo = max(t.t_floor, t.num_layers * fastest_layer / max_copies * (1.0 - 1e-9))
    best = np.empty((4, t.num_layers + 1), np.float64)
    arg = np.empty((4, t.num_layers + 1), np.int64)
    penalty = np.zeros(scarce.shape[0])
    while hi >= t_lo:
        cheapest_per_layers(o, prices, hi, t.num_layers, best, arg)
        price, stages = _cover(t, best, arg)
        wanted = max(ratio_floor, best_ratio)
        if overdrawn(t, o, stages, scarce)[0] >= 0 and 1.0 / (t_lo * price) > wanted:
            # The penalties of the previous interval often suffice here too.
            price = max(price, _penalised_cover(t, o, prices, hi, max_copies, penalty)[0])
            if wanted * price * hi <= 1.0 + tolerance:
                enough = (1.0 + 2.0 * tolerance) / (hi * max(wanted, 1e-300))
                fitting, _, _ = fitting_cover(t, o, prices, hi, max_copies, scarce, penalty, enough)
                price = max(price, fitting)
        if price == np.inf or 1.0 / (t_lo * price) <= wanted:
            break
        if wanted > 0.0 and wanted * price * hi > 1.0 + tolerance:
            hi = 1.0 / (wanted * price)  # no cover in between is cheaper than at the upper end
            continue
        lo = max(t_lo, hi / PANEL)
        limit = 1.0 / (lo * wanted) if wanted > 0.0 else np.inf
        few = _options_within(t, o, prices, best, hi, limit)
        ratio, rows, left = _best_in_panel(
            t, selected(o, few), prices[few], lo, hi, price, max_copies, scarce, wanted, tolerance
        )  # fmt: skip
        if ratio > best_ratio:
            best_ratio, best_rows = ratio, rows
        bound = max(bound, left)
        if lo <= t_lo:
            break
        hi = lo
    return best_ratio, best_rows, max(bound, best_ratio)


@kernel
def _best_in_panel(
    t: CoverTables, o: Options, prices: FloatArray, lo: float, hi: float, price_hi: float, max_copies: int,
    scarce: BoolArray, ratio_floor: float, tolerance: float,
) -> tuple[float, IntArray, float]:  # fmt: skip
    """Search [lo, hi] as `best_column` does for replicas that fit in the fleet.

    Intervals are halved until they are narrower than ``tolerance`` or cannot win.
    """
    best_ratio, best_rows, bound = 0.0, np.empty((0, 6), np.int64), 0.0
    stack = np.empty((MAX_HALVINGS + 2, 3), np.float64)
    size, halvings, penalty = 0, 0, np.zeros(scarce.shape[0])
    middle = hi  # no cover is cheaper than ``price_hi`` at this interval
    while True:
        halvings += 1
        enough = 1.0 / (lo * max(ratio_floor, best_ratio, 1e-300))
        lower, price, stages = fitting_cover(t, o, prices, middle, max_copies, scarce, penalty, enough)
        if price < np.inf and 1.0 / (middle * price) > best_ratio:
            best_ratio, best_rows = 1.0 / (middle * price), stage_rows(o, stages)
        lower = max(lower, price_hi)
        if middle < hi and price > price_hi:
            stack[size, 0], stack[size, 1], stack[size, 2] = middle, hi, price_hi
            size += 1
        if lower < np.inf:
            stack[size, 0], stack[size, 1], stack[size, 2] = lo, middle, lower
            size += 1
        while size > 0:
            size -= 1
            lo, hi, price_hi = stack[size, 0], stack[size, 1], stack[size, 2]
            ceiling = 1.0 / (lo * price_hi)
            wanted = max(ratio_floor, best_ratio)
            if ceiling <= wanted:
                continue
            if wanted > 0.0:
                hi = min(hi, 1.0 / (wanted * price_hi))
            if hi > lo * (1.0 + tolerance) and halvings < MAX_HALVINGS:
                break
            bound = max(bound, ceiling)
        else:
            return best_ratio, best_rows, max(bound, best_ratio)
        middle = np.sqrt(lo * hi)
