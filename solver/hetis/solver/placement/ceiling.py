"""Ceilings, compiled: upper bounds on the replicas of a configuration, before any search of their stages.

Stages i of a pipelined replica have price p, copies c and, at an interval of t seconds (without the least slack), room
for ``cap(t) = min(n, (c t - f) / w)`` layers: n fit in memory, a layer takes w seconds and the rest of the stage takes
f. They carry L layers with at most K copies in all, so that for every m >= 0

    t price  >=  sum (t p + m c) - m K  >=  L r(m) - m K,        r(m) = min over stages and t of (t p + m c) / cap(t)

and ``rate / price <= 1 / ((1 + slack) (L r(m) - m K))``. The quotient falls with t until the memory is full and rises
from there on, whatever the prices and m, so its minimum is at a t known beforehand. Every stage is therefore a *line*
``(t / cap) p + m (c / cap)`` whose coefficients are computed once per configuration, before any price is known. A line
that another of the same GPU types beats in every coefficient is dropped for good, and a ceiling at given prices only
has to look at the few lines left. m is what a copy costs besides its GPUs: without it, a class that the prices make
nearly free would carry all layers, a few on each of ever more stages.

Stages of a sequential replica take turns of ``l w + f`` seconds. Price and t, divided by L, are a mean of the points
``(p / l, w + f / l)`` of its stages, none of which is below that of the same stage with a full memory. Therefore
``t price`` is at least its value on the lower left boundary of these points' convex hull where t is within the limits;
the least is at a corner or where a limit cuts the boundary. By Cauchy-Schwarz it is also
``>= (sum sqrt(p (l w + f)))^2 >= (L r)^2``, where r is now the least ``sqrt(p (l w + f)) / l``.

A line with attention workers represents all splits of the head groups between a rank and a number of cards: it has the
time of the fastest split, and the memory of the roomiest split into fractions of groups.

Nearly all configurations end here, because their ceiling is below what is known to be possible. In the others, a stage
is *useful* only if its excess over r for each of its layers leaves a replica within reach (`is_useful`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hetis.solver.placement.compiled import kernel
from hetis.solver.placement.fleet import IntArray
from hetis.solver.placement.options import Reach
from hetis.solver.placement.stage_cost import (
    ROUNDING,
    Layer,
    PoolTimes,
    Ranks,
    chunk_cap,
    has_pools,
    interval_cap,
    kept_of_groups,
    layer_alone,
    layer_with_pool,
    layers_in_room,
    least_fixed_s,
    most_layers_with_pool,
    pool_limit,
    ranks_of,
    stage_shapes,
    stretch,
)
from hetis.solver.placement.tables import FloatArray, Tables

ROUNDS = 12  # iterations of the search for m


class Limits(NamedTuple):
    """The limits on the replicas of a configuration, apart from memory."""

    shortest_s: float  # interval, without slack
    longest_s: float
    slack: float  # the least slack of any stage
    slack_unevenness: float
    copies: int  # K
    sequential: bool
    chunk_cap_s: float  # longest iteration with a chunk, divided by a stage's copies
    unevenness: float  # largest ratio of an iteration with a chunk to a mean one, for sequential replicas


class Lines(NamedTuple):
    """The least that a layer takes in stages of a configuration, at any prices; arrays of equal length.

    A layer takes ``group`` times the price of a TP group, ``card`` times that of an attention worker, and ``copies``
    copies. In a sequential replica, whose stages have one copy, ``copies`` is seconds instead.
    """

    rank: IntArray  # s
    pool_class: IntArray  # q, -1 without a pool
    group: FloatArray  # c t / cap; 1 / l of a sequential replica
    card: FloatArray  # p times ``group``
    copies: FloatArray  # c / cap; w + f / l


class Effort(NamedTuple):
    """r and the line that attains it: ``r = price_s + m copies``."""

    value: float
    price_s: float
    copies: float


class Ceiling(NamedTuple):
    """An upper bound ``ratio`` on ``rate / price`` of the configuration's replicas, proved with this m and r."""

    ratio: float
    copy_cost: float
    effort: float


def limits_of(
    t: Tables, x: int, f: int, least_slack: float, slack_unevenness: float, copies: int, unevenness: float,
    t_floor: float,
) -> Limits:  # fmt: skip
    """Return the limits of a configuration whose intervals are no shorter than ``t_floor``."""
    least = 1.0 + least_slack
    return Limits(
        t_floor / least,
        interval_cap(t, x, f, unevenness) / least,
        least_slack,
        slack_unevenness,
        copies,
        bool(t.in_flight[f] == 1),
        chunk_cap(t, x, f, copies),
        unevenness,
    )


@kernel
def _line(copies: float, layer_s: float, fixed_s: float, most: float, limits: Limits) -> tuple[float, float]:
    """Return ``(c t / cap, c / cap)`` of a stage, or ``(1 / l, w + f / l)``; inf if no layer fits within limits."""
    if most < 1.0 or layer_s + fixed_s > copies * limits.longest_s:
        return np.inf, np.inf
    if limits.sequential:
        layers = min(most, (limits.longest_s - fixed_s) / layer_s)
        return 1.0 / layers, layer_s + fixed_s / layers
    t = max(limits.shortest_s, min(limits.longest_s, (most * layer_s + fixed_s) / copies))
    layers = min(most, (copies * t - fixed_s) / layer_s)
    return copies * t / layers, copies / layers


class Found(NamedTuple):
    """Lines found so far, with room for more; in two arrays, because kernels count references to each."""

    stages: IntArray  # [., 3] s, pool class and cards of a TP group
    taken: FloatArray  # [., 4] group, card, copies, and group times the cards of a TP group


@kernel
def lines_of(t: Tables, x: int, f: int, max_copies: int, max_pool: int, limits: Limits) -> Lines:
    """Return the undominated lines of a configuration, over the stages that `list_options` would list.

    A line is compared with those of the same GPU types: stages of one class without a pool, and then, for each class
    of pools, those with such a pool and again those without.
    """
    shapes = stage_shapes(
        t.rank_class, t.rank_tp, t.rank_dp, t.available, t.in_flight[f], min(max_copies, limits.copies)
    )
    found, count, end = _room_for_found(256), 0, 0
    while end < shapes.shape[0]:
        begin, end = end, _end_of_class(shapes, end, t.rank_class)
        plain = plain_end = count
        if not t.gives_all[x]:
            found = _with_room(found, count, end - begin)
            count = _append_alone(found, count, t, x, f, shapes[begin:end], limits)
            plain_end = count = _drop_beaten(found, plain, plain, plain, count)
        for q in range(t.available.shape[0]):
            found = _with_room(found, count, (end - begin) * t.pool_sizes.shape[0])
            pooled = count
            count = _append_with_pools(found, count, t, x, f, shapes[begin:end], q, max_pool, limits)
            count = _drop_beaten(found, plain, plain_end, pooled, count)
    return _lines(found, count)


@kernel
def _end_of_class(shapes: IntArray, begin: int, rank_class: IntArray) -> int:
    """Return the end of the shapes, from ``begin`` on, that are of one class."""
    end = begin
    while end < shapes.shape[0] and rank_class[shapes[end, 0]] == rank_class[shapes[begin, 0]]:
        end += 1
    return end


@kernel
def _append_alone(found: Found, count: int, t: Tables, x: int, f: int, shapes: IntArray, limits: Limits) -> int:
    """Append the lines of stages without a pool, and return how many lines there are."""
    for j in range(shapes.shape[0]):
        ranks = ranks_of(t, x, f, shapes[j, 0], shapes[j, 1])
        layer = layer_alone(ranks)
        kept = kept_of_groups(ranks.groups, 0, ranks.kv_bytes, ranks.prompt_bytes) + ranks.state_bytes
        most = np.floor(layers_in_room(ranks.room, ranks.layer_bytes, kept, 0, ranks.num_layers))
        longer = _longer(ranks, layer, limits)
        layer_s, rest_s = max(layer.compute_s, layer.wire_s) * longer, least_fixed_s(ranks) * longer
        group, copies = _line(ranks.copies, layer_s, rest_s, _within_limits(ranks, layer, most, limits), limits)
        count = _append(found, count, ranks.s, ranks.tp, -1, 0, group, copies)
    return count


@kernel
def _append_with_pools(
    found: Found, count: int, t: Tables, x: int, f: int, shapes: IntArray, q: int, max_pool: int, limits: Limits
) -> int:
    """Append the lines of stages with pools of class q, and return how many lines there are."""
    times = PoolTimes(t.least_pool_s[x], t.chunk.least_pool_s[x], t.least_pool_wire_s, t.receives[x])
    for j in range(shapes.shape[0]):
        s, c = shapes[j, 0], shapes[j, 1]
        if not has_pools(max_pool, t.micro_batch[x], t.pool_start[s, q]):
            continue
        ranks = ranks_of(t, x, f, s, c)
        rest_s, start = least_fixed_s(ranks), t.least_pool_start[s, q]
        most_cards = pool_limit(c, c * ranks.tp if q == t.rank_class[s] else 0, t.available[q], max_pool)
        for i in range(t.pool_sizes.shape[0]):
            p = t.pool_sizes[i]
            if p > most_cards:
                break
            layer = layer_with_pool(ranks, times, start + i)
            most = most_layers_with_pool(ranks, p * t.worker_room_bytes[q])
            layer_s = max(layer.compute_s, layer.wire_s)
            if limits.slack_unevenness <= 1.0:  # above that, a slower layer might be stretched less
                layer_s *= _longer(ranks, layer, limits)
            group, copies = _line(c, layer_s, rest_s, _within_limits(ranks, layer, most, limits), limits)
            count = _append(found, count, s, ranks.tp, q, p, group, copies)
    return count


@kernel
def _within_limits(ranks: Ranks, layer: Layer, most: float, limits: Limits) -> float:
    """Return how many of ``most`` layers, which fit in memory, also fit in the longest iteration with a chunk.

    Copies that share their experts hold all layers or none.
    """
    if ranks.shares_experts and most < ranks.num_layers:
        return 0.0
    if limits.chunk_cap_s < np.inf:
        most = min(most, np.floor(ranks.copies * limits.chunk_cap_s / layer.chunk_s + ROUNDING))
    return most


@kernel
def _longer(ranks: Ranks, layer: Layer, limits: Limits) -> float:
    """Return how many times longer this layer takes than with the least slack."""
    request_s = max(layer.compute_s, layer.wire_s)
    stretched: float = stretch(ranks.mix, request_s, layer.chunk_s, limits.slack, limits.slack_unevenness)
    return stretched / (1.0 + limits.slack)


@kernel
def _append(found: Found, count: int, s: int, tp: int, q: int, p: int, group: float, copies: float) -> int:
    """Append a line with p cards of class q, unless no layer fits, and return how many lines there are."""
    if group == np.inf:
        return count
    found.stages[count, 0], found.stages[count, 1], found.stages[count, 2] = s, q, tp
    found.taken[count, 0], found.taken[count, 1] = group, group * p
    found.taken[count, 2], found.taken[count, 3] = copies, group * tp
    return count + 1


@kernel
def _drop_beaten(found: Found, plain: int, plain_end: int, begin: int, end: int) -> int:
    """Drop each of the lines from ``begin`` on that an earlier one of them or a line without a pool beats.

    Those left close ranks; return where they end.
    """
    stages, taken, count = found.stages, found.taken, begin
    for i in range(begin, end):
        if _is_beaten(stages, taken, i, begin, count) or _is_beaten(stages, taken, i, plain, plain_end):
            continue
        _copy_found(found, found, i, count)
        count += 1
    return count


@kernel
def _is_beaten(stages: IntArray, taken: FloatArray, i: int, begin: int, end: int) -> bool:
    """Return whether one of these lines beats line i in every coefficient.

    A TP group of n cards costs at least n / n' times one of n' < n cards of its class (`Resources`: it takes every
    row that the smaller one takes), so smaller groups can beat larger ones, too.
    """
    for at in range(begin, end):
        if (
            taken[at, 3] <= taken[i, 3] and taken[at, 1] <= taken[i, 1] and taken[at, 2] <= taken[i, 2]
            and stages[at, 2] <= stages[i, 2]
        ):  # fmt: skip
            return True
    return False


@kernel
def _room_for_found(size: int) -> Found:
    return Found(np.empty((size, 3), np.int64), np.empty((size, 4), np.float64))


@kernel
def _with_room(found: Found, count: int, more: int) -> Found:
    """Return the first ``count`` lines with room for ``more``."""
    if count + more <= found.taken.shape[0]:
        return found
    wider = _room_for_found(2 * (count + more))
    for i in range(count):
        _copy_found(found, wider, i, i)
    return wider


@kernel
def _copy_found(source: Found, target: Found, i: int, at: int) -> None:
    """Copy line i to place ``at``."""
    for column in range(3):
        target.stages[at, column] = source.stages[i, column]
    for column in range(4):
        target.taken[at, column] = source.taken[i, column]


@kernel
def _lines(found: Found, count: int) -> Lines:
    """Return the first ``count`` lines."""
    lines = _room_for_lines(count)
    for i in range(count):
        lines.rank[i], lines.pool_class[i] = found.stages[i, 0], found.stages[i, 1]
        lines.group[i], lines.card[i], lines.copies[i] = found.taken[i, 0], found.taken[i, 1], found.taken[i, 2]
    return lines


@kernel
def _least_effort(price_s: FloatArray, copies: FloatArray, copy_cost: float) -> Effort:
    """Return r over lines with these prices."""
    best, value = -1, np.inf
    for i in range(price_s.shape[0]):
        here = price_s[i] + copy_cost * copies[i]
        if here < value:
            best, value = i, here
    return Effort(np.inf, np.inf, np.inf) if best < 0 else Effort(value, price_s[best], copies[best])


@kernel
def ceiling(
    lines: Lines, num_layers: int, group_price: FloatArray, card_price: FloatArray, limits: Limits, enough: float
) -> Ceiling:
    """Return the ceiling of a configuration, or the first proof that it does not exceed ``enough``.

    ``L r(m) - m K`` is concave in m and piecewise linear, with one line per stage. m moves to where the best rising
    line meets the best falling one, until no line lies below that point.
    """
    price_s = np.empty(lines.rank.shape[0], np.float64)
    for i in range(price_s.shape[0]):
        price_s[i] = lines.group[i] * group_price[lines.rank[i]]
        if lines.pool_class[i] >= 0:
            price_s[i] += lines.card[i] * card_price[lines.pool_class[i]]
    if limits.sequential:
        return _sequential_ceiling(price_s, lines.copies, num_layers, limits)
    best = Ceiling(np.inf, 0.0, 0.0)
    wanted = 1.0 / (enough * (1.0 + limits.slack)) if enough > 0.0 else np.inf
    m = wanted / limits.copies if enough > 0.0 else 0.0
    rising = falling = Effort(np.inf, np.inf, np.inf)
    for _ in range(ROUNDS):
        effort = _least_effort(price_s, lines.copies, m)
        work = num_layers * effort.value - m * limits.copies  # bounds t price from below
        if work > 0.0 and 1.0 / (work * (1.0 + limits.slack)) < best.ratio:
            best = Ceiling(1.0 / (work * (1.0 + limits.slack)), m, effort.value)
        if work >= wanted or effort.value == np.inf:
            break
        slope = num_layers * effort.copies - limits.copies
        if slope > 0.0:
            rising = effort
        else:
            falling = effort
            if m == 0.0:
                break
        if rising.value == np.inf:
            following = 0.0
        elif falling.value == np.inf:
            following = max(4.0 * m, num_layers * rising.price_s / limits.copies)
        else:
            following = (rising.price_s - falling.price_s) / (falling.copies - rising.copies)
        if abs(following - m) <= 1e-6 * m:
            break
        m = following
    return best


@kernel
def _sequential_ceiling(price: FloatArray, seconds: FloatArray, num_layers: int, limits: Limits) -> Ceiling:
    """Return the ceiling from the stages' price and seconds per layer, walking their hull from the fastest stage on."""
    shortest_s, longest_s = limits.shortest_s / num_layers, limits.longest_s / num_layers
    at, root = -1, np.inf
    for i in range(price.shape[0]):
        root = min(root, price[i] * seconds[i])
        if at < 0 or seconds[i] < seconds[at] or (seconds[i] == seconds[at] and price[i] < price[at]):
            at = i
    if at < 0 or seconds[at] > longest_s * (1.0 + ROUNDING):
        return Ceiling(0.0, 0.0, np.sqrt(root))
    least = price[at] * max(seconds[at], shortest_s)
    while True:
        following, flattest = -1, np.inf
        for i in range(price.shape[0]):
            if price[i] < price[at]:
                slope = (seconds[i] - seconds[at]) / (price[at] - price[i])
                if slope < flattest:
                    following, flattest = i, slope
        if following < 0:
            break
        for limit_s in (shortest_s, longest_s):
            if seconds[at] < limit_s < seconds[following]:
                least = min(least, (price[at] - (limit_s - seconds[at]) / flattest) * limit_s)
        if seconds[following] > longest_s:
            break
        at = following
        least = min(least, price[at] * max(seconds[at], shortest_s))
    return Ceiling((1.0 + ROUNDING) / (num_layers * num_layers * least), 0.0, np.sqrt(root))


class CeilingQueries(NamedTuple):
    """Configurations of one scope whose ceilings are needed; arrays of equal length."""

    mixes: IntArray
    in_flight: IntArray
    limits: FloatArray  # [., 8] fields of `Limits`


def queries_of(mixes: IntArray, in_flight: IntArray, limits: Sequence[Limits]) -> CeilingQueries:
    """Return these configurations as arrays."""
    return CeilingQueries(mixes, in_flight, np.array(limits, dtype=np.float64).reshape(-1, len(Limits._fields)))


@kernel
def _limits(a: CeilingQueries, i: int) -> Limits:
    of = a.limits[i]
    return Limits(of[0], of[1], of[2], of[3], int(of[4]), of[5] > 0.0, of[6], of[7])


@kernel
def all_lines(t: Tables, a: CeilingQueries, max_copies: int, max_pool: int) -> tuple[Lines, IntArray]:
    """Return `lines_of` many configurations, concatenated, and where those of each begin [configurations + 1]."""
    begins = np.zeros(a.mixes.shape[0] + 1, np.int64)
    size, every = 4096, _room_for_lines(4096)
    for i in range(a.mixes.shape[0]):
        begins[i + 1] = begins[i]
        limits = _limits(a, i)
        if limits.shortest_s > limits.longest_s:
            continue
        found = lines_of(t, a.mixes[i], a.in_flight[i], max_copies, max_pool, limits)
        end = begins[i] + found.rank.shape[0]
        if end > size:
            size = max(2 * size, end)
            wider = _room_for_lines(size)
            _copy_lines(every, wider, 0, begins[i])
            every = wider
        _copy_lines(found, every, begins[i], found.rank.shape[0])
        begins[i + 1] = end
    return _part_of(every, 0, begins[-1]), begins


@kernel
def _room_for_lines(size: int) -> Lines:
    return Lines(
        np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size, np.float64), np.empty(size, np.float64),
        np.empty(size, np.float64),
    )  # fmt: skip


@kernel
def _copy_lines(source: Lines, target: Lines, at: int, count: int) -> None:
    for i in range(count):
        target.rank[at + i], target.pool_class[at + i] = source.rank[i], source.pool_class[i]
        target.group[at + i], target.card[at + i] = source.group[i], source.card[i]
        target.copies[at + i] = source.copies[i]


@kernel
def _part_of(lines: Lines, start: int, end: int) -> Lines:
    return Lines(
        lines.rank[start:end], lines.pool_class[start:end], lines.group[start:end], lines.card[start:end],
        lines.copies[start:end],
    )  # fmt: skip


@kernel
def ceilings(
    num_layers: int, a: CeilingQueries, lines: Lines, begins: IntArray, group_price: FloatArray, card_price: FloatArray,
    enough: FloatArray,
) -> FloatArray:  # fmt: skip
    """Return `ceiling` of many configurations, with ``enough`` for each; [configurations, 3]: ratio, m, r."""
    found = np.zeros((a.mixes.shape[0], 3), np.float64)
    for i in range(a.mixes.shape[0]):
        limits = _limits(a, i)
        if limits.shortest_s <= limits.longest_s and begins[i] < begins[i + 1]:
            own = _part_of(lines, begins[i], begins[i + 1])
            proof = ceiling(own, num_layers, group_price, card_price, limits, enough[i])
            found[i, 0], found[i, 1], found[i, 2] = proof.ratio, proof.copy_cost, proof.effort
    return found


def reach_of(num_layers: int, limits: Limits, proof: Ceiling, floor: float) -> Reach:
    """Return what a stage of a replica with ``rate / price > floor`` may take.

    A stage leaves ``L - cap(t)`` layers to others, which take r each. What it takes itself beyond that must be less
    than the distance between floor and ceiling.
    """
    m, r, least = proof.copy_cost, proof.effort, 1.0 + limits.slack
    spare = np.inf
    if floor > 0.0 and proof.ratio < np.inf:
        if limits.sequential:
            spare = 1.0 / np.sqrt(floor) - num_layers * r
        else:
            spare = 1.0 / (floor * least) - (num_layers * r - m * limits.copies)
    return Reach(r, m, spare, limits.shortest_s, limits.longest_s, limits.copies, limits.sequential)
