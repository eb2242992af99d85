"""Ceilings, compiled: upper bounds on the replicas of a configuration, before any search of their stages.

Stages i of a pipelined replica have price p, copies c and, at an interval of t seconds (without the least slack), room
for ``cap(t) = min(n, (c t - f) / w)`` layers: n fit in memory, a layer takes w seconds and the rest of the stage takes
f. They carry L layers with at most K copies in all, so that for every m >= 0

    t price  >=  sum (t p + m c) - m K  >=  L r(m) - m K,        r(m) = min over stages and t of (t p + m c) / cap(t)

and ``rate / price <= 1 / ((1 + slack) (L r(m) - m K))``. The quotient falls with t until the memory is full and rises
from there on, whatever the prices and m, so its minimum is at a t known beforehand. Hence every stage is a *line*
``(t / cap) p + m (c / cap)`` whose coefficients are computed once per configuration, before any price is known. A line
that another of the same GPU types beats in every coefficient is dropped for good. At given prices a ceiling only takes
a look at the few lines left. m is what a copy costs besides its GPUs: without it, a class that the prices make nearly
free would carry all layers, a few on each of ever more stages.

Stages of a sequential replica take turns of ``l w + f`` seconds. Price and t, divided by L, are a mean of the points
``(p / l, w + f / l)`` of its stages, none of which is below that of the same stage with a full memory. Therefore
``t price`` is at least its value on the lower left boundary of these points' convex hull where t is within the limits;
the least is at a corner or where a limit cuts the boundary. By Cauchy-Schwarz it is also
``>= (sum sqrt(p (l w + f)))^2 >= (L r)^2``, where r is now the least ``sqrt(p (l w + f)) / l``.

A line with attention workers represents all splits of the head groups between a rank and a number of cards: it has the
time of the fastest split, and the memory of the roomiest split into fractions of groups.

Nearly all configurations end here, because their ceiling is below what is known to be possible. In the others, a stage
is *useful* only if what it takes beyond r for each of its layers leaves a replica within reach (`is_useful`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from hetis.solver.placement.compiled import kernel
from hetis.solver.placement.fleet import IntArray
from hetis.solver.placement.options import (
    ROUNDING,
    Reach,
    chunk_cap,
    copies_limit,
    has_pools,
    interval_cap,
    iterations_of,
    layers_in_room,
    pool_limit,
    roomiest_split,
    stretch,
)
from hetis.solver.placement.tables import FloatArray, Tables

AnyArray = TypeVar("AnyArray", IntArray, FloatArray)
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
    """The least that a layer takes in stages of a configuration, whatever the prices; arrays of equal length.

    A layer takes ``group`` times the price of a TP group, ``card`` times that of an attention worker, and ``copies``
    copies. In a sequential replica, whose stages have one copy, ``copies`` is seconds instead.
    """

    rank: IntArray  # s
    pool_class: IntArray  # q, -1 without a pool
    group: FloatArray  # c t / cap; 1 / l of a sequential replica
    card: FloatArray  # p times that
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


@kernel
def lines_of(t: Tables, x: int, f: int, max_copies: int, max_pool: int, limits: Limits) -> Lines:
    """Return the undominated lines of a configuration, over the stages that `list_options` would list.

    A TP group of n cards costs at least n / n' times one of n' < n cards of its class (`Resources`: it takes every
    row that the smaller one takes), so smaller groups can beat larger ones, too.
    """
    size = 256
    rank, pool_class = np.empty(size, np.int64), np.empty(size, np.int64)
    group, card, copies = np.empty(size, np.float64), np.empty(size, np.float64), np.empty(size, np.float64)
    own_gpus = np.empty(size, np.float64)  # ``group`` times the cards of a TP group
    count, first = 0, 0
    num_ranks, num_classes, num_layers = t.rank_class.shape[0], t.available.shape[0], t.num_layers
    num_sizes, pool_sizes, kv_group_bytes = t.pool_sizes.shape[0], t.pool_sizes, t.kv_group_bytes
    least_pool_s, chunk_least_pool_s = t.least_pool_s, t.chunk.least_pool_s
    least_pool_wire_s = t.least_pool_wire_s
    receives, n_it, mix, micro_batch = t.receives[x], t.iterations[x], iterations_of(t, x, f), t.micro_batch[x]
    rank_class, rank_tp = t.rank_class, t.rank_tp
    kv_tokens, prompt_tokens, state_bytes = t.kv_tokens[x, f], t.prompt_tokens[x, f], t.state_bytes[x, f]
    least = 1.0 + limits.slack
    most_copies = min(copies_limit(t.in_flight[f], max_copies), limits.copies)
    while first < num_ranks:
        g, last = rank_class[first], first
        while last < num_ranks and rank_class[last] == g:
            last += 1
        plain = count  # first line of this class without pools; lines with a pool of class q begin at ``pooled``
        plain_end = count
        for q in range(-1, num_classes):
            pooled = count
            for s in range(first, last):
                if t.gives_all[x] if q < 0 else not has_pools(max_pool, micro_batch, t.pool_start[s, q]):
                    continue
                n, groups, layer_bytes = rank_tp[s], t.rank_groups[s], t.layer_bytes[s]
                base_s, chunk_s, own_s = t.layer_s[x, s], t.chunk.layer_s[x, s], t.own_s[x, s, groups]
                fixed_s = t.step_s[x, s] + min(t.hop_s[x, s], t.prefix_layers * (base_s + t.prefix_delta_s[x, s]))
                room, wire_s = t.room_bytes[s] - t.act_bytes[x, s], t.wire_s[x, s]
                start = t.least_pool_start[s, q] if q >= 0 else 0
                card_bytes = t.worker_room_bytes[q] if q >= 0 else 0.0
                for c in range(1, most_copies + 1):
                    if c * n > t.available[g]:
                        break
                    kv_bytes, prompt_bytes = kv_group_bytes * kv_tokens[c - 1], kv_group_bytes * prompt_tokens[c - 1]
                    limit = pool_limit(c, c * n if q == g else 0, t.available[q], max_pool) if q >= 0 else 0
                    for i in range(num_sizes if q >= 0 else 1):
                        p, rest_s = 0, fixed_s
                        if q < 0:
                            layer_s, chunk_layer_s = max(base_s + own_s, wire_s), chunk_s + own_s / n_it
                            kept = groups * kv_bytes + state_bytes[c - 1] / n
                            most = np.floor(layers_in_room(room, layer_bytes, kept, 0, num_layers))
                        else:
                            p = pool_sizes[i]
                            if p > limit:
                                break
                            layer_s = base_s + least_pool_s[x, start + i]
                            chunk_layer_s = chunk_s + chunk_least_pool_s[x, start + i]
                            if receives:
                                layer_s = max(layer_s, least_pool_wire_s[start + i])
                            most = roomiest_split(
                                room, layer_bytes, groups, n, p * card_bytes, kv_bytes, prompt_bytes, num_layers
                            )  # fmt: skip
                        if t.rank_dp[s] > 1 and (most < num_layers or not limits.sequential):
                            most = 0.0
                        if limits.chunk_cap_s < np.inf:
                            most = min(most, np.floor(c * limits.chunk_cap_s / chunk_layer_s + ROUNDING))
                        longer = stretch(mix, layer_s, chunk_layer_s, limits.slack, limits.slack_unevenness) / least
                        if q < 0:
                            rest_s *= longer
                        elif limits.slack_unevenness > 1.0:
                            longer = 1.0  # a slower layer might be stretched less
                        each, taken = _line(c, layer_s * longer, rest_s, most, limits)
                        if each == np.inf:
                            continue
                        gpus, cards, beaten = each * n, each * p, False
                        for at in range(pooled, count):
                            if (
                                own_gpus[at] <= gpus and card[at] <= cards and copies[at] <= taken
                                and rank_tp[rank[at]] <= n
                            ):  # fmt: skip
                                beaten = True
                                break
                        if q >= 0 and not beaten:
                            for at in range(plain, plain_end):
                                if own_gpus[at] <= gpus and copies[at] <= taken and rank_tp[rank[at]] <= n:
                                    beaten = True
                                    break
                        if beaten:
                            continue
                        if count == size:
                            size *= 2
                            rank, pool_class = _longer(rank, size), _longer(pool_class, size)
                            group, card = _longer(group, size), _longer(card, size)
                            copies, own_gpus = _longer(copies, size), _longer(own_gpus, size)
                        rank[count], pool_class[count] = s, q
                        group[count], card[count], copies[count], own_gpus[count] = each, cards, taken, gpus
                        count += 1
            if q < 0:
                plain_end = count
        first = last
    return Lines(rank[:count], pool_class[:count], group[:count], card[:count], copies[:count])


@kernel
def _longer(values: AnyArray, size: int) -> AnyArray:
    longer = np.empty(size, values.dtype)
    longer[: values.shape[0]] = values
    return longer


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
    """Return the ceiling of a configuration, or the first proof that it is no higher than ``enough``.

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
    """Return the ceiling from the stages' price and seconds per layer, walking their hull from the quickest on."""
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
    """Configurations of one scope whose ceilings are wanted; arrays of equal length."""

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
