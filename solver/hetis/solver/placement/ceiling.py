"""Ceilings, compiled: how good a replica of a configuration can be at all, before any search of its stages.

Stages i of a pipelined replica have price p, copies c and, at an interval of t seconds (the least slack taken off),
room for ``cap(t) = min(n, (c t - f) / w)`` layers: n fit in memory, a layer takes w and the rest of the stage f
seconds. They carry L layers with at most K copies in all, so that for every m >= 0

    t price  >=  sum (t p + m c) - m K  >=  L r(m) - m K,        r(m) = min over stages and t of (t p + m c) / cap(t)

and ``rate / price <= 1 / ((1 + slack) (L r(m) - m K))``. The quotient falls with t until the memory is full, and rises
from there on: its minimum is known in closed form. m is what a copy costs beside its GPUs: without it, a class that
the prices make nearly free would carry all layers, a few on each of ever more stages.

Stages of a sequential replica take turns of ``l w + f`` seconds. By Cauchy-Schwarz

    t price  >=  (sum sqrt(p (l w + f)))^2  >=  (L r)^2,         r = min over stages and l of sqrt(p (l w + f)) / l

All but a few configurations end here: their ceiling is below what is known to be possible. In those that remain, a
stage is *useful* only if its own ``t p + m c - cap(t) r`` leaves a replica within reach.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hetis.solver.placement.classes import IntArray
from hetis.solver.placement.compiled import kernel
from hetis.solver.placement.options import (
    ROUNDING,
    Options,
    chunk_cap,
    copies_limit,
    copy_requests,
    has_pools,
    interval_cap,
    kept_bytes,
    layers_on_card,
    layers_on_rank,
    pool_entry,
    pool_limit,
    pool_wire_seconds,
    stretch,
)
from hetis.solver.placement.tables import PLAIN, FloatArray, Tables

ROUNDS = 12  # of the search for m


class Limits(NamedTuple):
    """What bounds the replicas of a configuration beside memory."""

    shortest_s: float  # interval, slack taken off
    longest_s: float
    slack: float  # the least of any stage
    slack_unevenness: float
    copies: int  # K
    sequential: bool
    chunk_cap_s: float  # in an iteration with a chunk, over a stage's copies
    unevenness: float  # of an iteration with a chunk over a mean one; of sequential replicas


class Effort(NamedTuple):
    """r and the stage that attains it, as a line over m: ``r = (t p + m c) / cap``."""

    value: float
    price_s: float  # t p / cap
    copies: float  # c / cap


class Ceiling(NamedTuple):
    """No replica of the configuration has ``rate / price`` above ``ratio``; proved with this m and r."""

    ratio: float
    copy_cost: float
    effort: float


@kernel
def limits_of(
    t: Tables, x: int, f: int, least_slack: float, slack_unevenness: float, copies: int, unevenness: float
) -> Limits:
    """The limits of a configuration."""
    least = 1.0 + least_slack
    longest_s = interval_cap(t, x, f, unevenness) / least
    sequential = t.in_flight[f] == 1
    return Limits(
        t.t_floor / least,
        longest_s,
        least_slack,
        slack_unevenness,
        copies,
        sequential,
        chunk_cap(t, x, f, copies),
        unevenness,
    )


@kernel
def _effort(
    price: float, copies: float, layer_s: float, fixed_s: float, most: float, copy_cost: float, limits: Limits
) -> Effort:
    """Of one stage, at its best interval and number of layers; inf where it carries no layer within the limits."""
    nothing = Effort(np.inf, np.inf, np.inf)
    if most < 1.0 or layer_s + fixed_s > copies * limits.longest_s:
        return nothing
    if limits.sequential:
        layers = min(most, (limits.longest_s - fixed_s) / layer_s)
        return Effort(np.sqrt(price * (layers * layer_s + fixed_s)) / layers, 0.0, 0.0)
    t = max(limits.shortest_s, min(limits.longest_s, (most * layer_s + fixed_s) / copies))
    layers = min(most, (copies * t - fixed_s) / layer_s)
    return Effort((t * price + copy_cost * copies) / layers, t * price / layers, copies / layers)


@kernel
def _beyond_least(t: Tables, x: int, f: int, request_s: float, chunk_s: float, limits: Limits) -> float:
    """By how much a stage's slack stretches it more than the least slack does."""
    longer: float = stretch(t, x, f, request_s, chunk_s, limits.slack, limits.slack_unevenness) / (1.0 + limits.slack)
    return longer


@kernel
def _least_effort(
    t: Tables, x: int, f: int, max_copies: int, max_pool: int, group_price: FloatArray, card_price: FloatArray,
    limits: Limits, copy_cost: float,
) -> Effort:  # fmt: skip
    """r of a configuration, over the stages that `list_options` would list.

    A class and number of attention workers too dear even if attention took no time is left without a look at its
    splits.
    """
    least = Effort(np.inf, np.inf, np.inf)
    for s in range(t.rank_class.shape[0]):
        g, n, groups = t.rank_class[s], t.rank_tp[s], t.rank_groups[s]
        base_s = t.layer_s[x, s]
        fixed_s = t.step_s[x, s] + min(t.hop_s[x, s], t.prefix_layers * (base_s + t.prefix_delta_s[x, s]))
        roomiest = np.floor(layers_on_rank(t, x, s, 0.0, PLAIN))
        for c in range(1, copies_limit(t, f, max_copies) + 1):
            if c * n > t.available[g] or c > limits.copies:
                break
            requests = copy_requests(t, x, f, c)
            tokens = t.kv_tokens[x, f, c - 1]
            most = np.floor(layers_on_rank(t, x, s, kept_bytes(t, x, f, s, c, 0), PLAIN))
            in_time = roomiest
            if limits.chunk_cap_s < np.inf:
                chunk_s, own_chunk_s = t.chunk.layer_s[x, s], t.own_s[x, s, groups] / t.iterations[x]
                most = min(most, np.floor(c * limits.chunk_cap_s / (chunk_s + own_chunk_s) + ROUNDING))
                in_time = min(roomiest, np.floor(c * limits.chunk_cap_s / chunk_s + ROUNDING))
            own_s = max(base_s + t.own_s[x, s, groups], t.wire_s[x, s])
            longer = _beyond_least(
                t, x, f, own_s, t.chunk.layer_s[x, s] + t.own_s[x, s, groups] / t.iterations[x], limits
            )
            effort = _effort(c * group_price[s], c, own_s * longer, fixed_s * longer, most, copy_cost, limits)
            if effort.value < least.value:
                least = effort
            for q in range(t.available.shape[0]):
                if not has_pools(t, x, s, q, max_pool):
                    continue
                cards_limit = pool_limit(t, s, c, q, max_pool)
                for size in range(t.pool_sizes.shape[0]):
                    p = t.pool_sizes[size]
                    price = c * (group_price[s] + p * card_price[q])
                    if p > cards_limit or (
                        _effort(price, c, base_s, fixed_s, in_time, copy_cost, limits).value >= least.value
                    ):
                        break
                    for k in range(1, groups + 1):
                        entry = pool_entry(t, s, q, k, size)
                        layer_s = max(base_s + t.pool_s[x, entry], pool_wire_seconds(t, x, entry))
                        chunk_layer_s = t.chunk.layer_s[x, s] + t.chunk.pool_s[x, entry]
                        longer = _beyond_least(t, x, f, layer_s, chunk_layer_s, limits)
                        layer_s *= longer
                        if (
                            _effort(price, c, layer_s, fixed_s * longer, in_time, copy_cost, limits).value
                            >= least.value
                        ):
                            continue
                        on_rank = layers_on_rank(t, x, s, kept_bytes(t, x, f, s, c, k), PLAIN)
                        on_card = layers_on_card(t, q, n, k, p, requests, tokens)
                        most = min(in_time, np.floor(min(on_rank, on_card)))
                        effort = _effort(price, c, layer_s, fixed_s * longer, most, copy_cost, limits)
                        if effort.value < least.value:
                            least = effort
    return least


@kernel
def ceiling(
    t: Tables, x: int, f: int, max_copies: int, max_pool: int, group_price: FloatArray, card_price: FloatArray,
    limits: Limits, enough: float,
) -> Ceiling:  # fmt: skip
    """The ceiling of a configuration, or the first proof that it is no higher than ``enough``.

    ``L r(m) - m K`` is concave in m and made of lines, one per stage. m moves to where the best line that rises and
    the best that falls meet, until nothing lies below that.
    """
    num_layers = t.num_layers
    if limits.sequential:
        only = _least_effort(t, x, f, max_copies, max_pool, group_price, card_price, limits, 0.0)
        return Ceiling(1.0 / (num_layers * only.value) ** 2, 0.0, only.value)
    best = Ceiling(np.inf, 0.0, 0.0)
    wanted = 1.0 / (enough * (1.0 + limits.slack)) if enough > 0.0 else np.inf
    m = wanted / limits.copies if enough > 0.0 else 0.0
    rising = falling = Effort(np.inf, np.inf, np.inf)
    for _ in range(ROUNDS):
        effort = _least_effort(t, x, f, max_copies, max_pool, group_price, card_price, limits, m)
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
def ceilings(
    t: Tables, mixes: IntArray, in_flight: IntArray, slacks: FloatArray, copies: IntArray,
    unevenness: FloatArray, max_copies: int, max_pool: int, group_price: FloatArray, card_price: FloatArray,
    enough: float,
) -> FloatArray:  # fmt: skip
    """`ceiling` of many configurations; shape [configurations, 3]: ratio, m, r."""
    found = np.zeros((mixes.shape[0], 3), np.float64)
    for i in range(mixes.shape[0]):
        limits = limits_of(t, mixes[i], in_flight[i], slacks[i, 0], slacks[i, 1], copies[i], unevenness[i])
        if limits.shortest_s <= limits.longest_s:
            proof = ceiling(
                t, mixes[i], in_flight[i], max_copies, max_pool, group_price, card_price, limits, enough
            )  # fmt: skip
            found[i, 0], found[i, 1], found[i, 2] = proof.ratio, proof.copy_cost, proof.effort
    return found


@kernel
def within_reach(
    o: Options, prices: FloatArray, num_layers: int, limits: Limits, proof: Ceiling, floor: float
) -> IntArray:
    """The options that a pipelined replica with ``rate / price > floor`` can have a stage of.

    A stage leaves ``L - cap(t)`` layers to others, which take r each. What it takes itself beyond that must be less
    than what is left between floor and ceiling; it is least at one of two intervals: that of a single layer, or that
    of a full memory.
    """
    if floor <= 0.0 or proof.ratio == np.inf:
        return np.arange(prices.shape[0])
    m, r, least = proof.copy_cost, proof.effort, 1.0 + limits.slack
    spare = 1.0 / (floor * least) - (num_layers * r - m * limits.copies)
    kept = np.empty(prices.shape[0], np.int64)
    count = 0
    for i in range(prices.shape[0]):
        c, fixed_s, most = o.copies[i], np.inf, 0
        for role in range(4):
            fixed_s = min(fixed_s, o.fixed_s[i, role])
            most = max(most, o.max_layers[i, role])
        layer_s, fixed_s = o.layer_s[i] / least, fixed_s / least
        t_one = (layer_s + fixed_s) / c
        if c > limits.copies or t_one > limits.longest_s:
            continue
        t_full = min(limits.longest_s, (most * layer_s + fixed_s) / c)
        layers = min(float(most), (c * t_full - fixed_s) / layer_s)
        taken = min(t_one * prices[i] - r, t_full * prices[i] - layers * r) + m * c
        if taken < spare * (1.0 + 1e-9):
            kept[count] = i
            count += 1
    return kept[:count]
