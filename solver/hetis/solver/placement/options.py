"""Stage options, compiled: every way to build one stage of a replica, with what it carries and what it costs.

Letters are those of `docs/cost-model.md`. A *configuration* is a mix x and a number of micro-batches in flight (index
f). An *option* is a rank type s with c copies, and perhaps p cards of class q per copy that take k head groups of
every rank.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from hetis.solver.placement.classes import IntArray
from hetis.solver.placement.tables import BOTH, FIRST, LAST, PLAIN, FloatArray, Tables

ROUNDING = 1e-9  # room for rounding in floor and ceil, far below one layer or one head group


class Options(NamedTuple):
    """Stage options of one configuration; arrays of equal length, roles in the last axis where there are four."""

    rank: IntArray  # s
    copies: IntArray  # c
    pool_class: IntArray  # q, -1 without a pool
    pool_cards: IntArray  # p
    pool_groups: IntArray  # k
    layer_s: FloatArray  # w
    fixed_s: FloatArray  # [., 4] hop, step and ends
    max_layers: IntArray  # [., 4] repeated layers that fit in memory


@njit(cache=True, nogil=True)
def _empty_options(capacity: int) -> Options:
    return Options(
        np.empty(capacity, np.int64),
        np.empty(capacity, np.int64),
        np.empty(capacity, np.int64),
        np.empty(capacity, np.int64),
        np.empty(capacity, np.int64),
        np.empty(capacity, np.float64),
        np.empty((capacity, 4), np.float64),
        np.empty((capacity, 4), np.int64),
    )


@njit(cache=True, nogil=True)
def _layers_in_memory(
    t: Tables, x: int, s: int, kept_bytes: float, worker_bytes: float, worker_room: float, role: int
) -> int:
    """Repeated layers that fit on a rank (and its pool) in a role; ``*_bytes`` are KV bytes of one layer."""
    room = t.room_bytes[s] - t.act_bytes[x, s]
    prefix = 0
    if role == FIRST or role == BOTH:
        room -= t.first_bytes[s] + t.prefix_layers * kept_bytes
        prefix = t.prefix_layers
    if role == LAST or role == BOTH:
        room -= t.last_bytes[s] + t.logit_bytes[x, s]
    if role == BOTH:
        room += t.tied_bytes[s]
    if room < 0.0:
        return 0
    layers = room / (t.layer_bytes[s] + kept_bytes)
    if worker_bytes > 0.0:
        layers = min(layers, worker_room / worker_bytes - prefix)
    return int(max(0.0, min(layers + ROUNDING, float(t.num_layers))))


@njit(cache=True, nogil=True)
def list_options(t: Tables, x: int, f: int, max_copies: int, max_pool: int, pool_stride: int) -> Options:
    """Every stage option of a configuration that fits in memory, fewer those no better than a cheaper one beside it.

    An option with a pool is kept only if it beats the stage without one, and every smaller pool of the same class,
    in layer time or in room: a larger pool that does neither only costs more.
    """
    b, m = t.micro_batch[x], t.in_flight[f]
    out = _empty_options(256)
    count = 0
    caps = np.empty(4, np.int64)
    for s in range(t.rank_class.shape[0]):
        g, n, groups = t.rank_class[s], t.rank_tp[s], t.rank_groups[s]
        copies_limit = 1 if m == 1 else min(max_copies, m)
        for c in range(1, copies_limit + 1):
            if c * n > t.available[g]:
                break
            held = (m + c - 1) // c  # D
            tokens = t.kv_tokens[x, f, c - 1]
            first = count
            for q in range(-1, t.available.shape[0]):
                if q >= 0 and (max_pool == 0 or t.pool_start[s, q] < 0):
                    continue
                group_first = count
                cards_limit = 0 if q < 0 else min(max_pool, (t.available[q] - (c * n if q == g else 0)) // c)
                for p in range(0 if q < 0 else 1, cards_limit + 1):
                    for k in range(0 if q < 0 else 1, (0 if q < 0 else groups) + 1):
                        kept_bytes = (groups - k) * t.kv_group_bytes * tokens
                        worker_bytes = 0.0
                        worker_room = 0.0
                        layer_s = t.layer_s[x, s]
                        if q < 0:
                            layer_s += t.own_s[x, s, groups]
                        else:
                            layer_s += t.pool_s[x, t.pool_start[s, q] + (k - 1) * pool_stride + p - 1]
                            pairs = np.ceil(held * b * k * n / p - ROUNDING)
                            worker_bytes = pairs / (held * b) * tokens * t.kv_group_bytes
                            worker_room = t.worker_room_bytes[q]
                        fits = False
                        for role in range(4):
                            caps[role] = _layers_in_memory(t, x, s, kept_bytes, worker_bytes, worker_room, role)
                            fits = fits or caps[role] > 0
                        if not fits:
                            continue
                        dominated = False
                        for o in range(group_first, count):
                            if _at_least(out, o, layer_s, caps):
                                dominated = True
                                break
                        if not dominated and q >= 0 and first < count and out.pool_class[first] < 0:
                            dominated = _at_least(out, first, layer_s, caps)
                        if dominated:
                            continue
                        if count == out.rank.shape[0]:
                            out = _grown(out)
                        out.rank[count] = s
                        out.copies[count] = c
                        out.pool_class[count] = q
                        out.pool_cards[count] = p
                        out.pool_groups[count] = k
                        out.layer_s[count] = layer_s
                        stage_s = t.step_s[x, s]
                        prefix_s = t.prefix_layers * (layer_s + t.prefix_delta_s[x, s])
                        out.fixed_s[count, PLAIN] = stage_s + t.hop_s[x, s]
                        out.fixed_s[count, FIRST] = stage_s + prefix_s
                        out.fixed_s[count, LAST] = stage_s + t.hop_s[x, s] + t.last_s[x, s]
                        out.fixed_s[count, BOTH] = stage_s + prefix_s + t.last_s[x, s]
                        for role in range(4):
                            out.max_layers[count, role] = caps[role]
                        count += 1
    return _sliced(out, count)


@njit(cache=True, nogil=True)
def _at_least(o: Options, i: int, layer_s: float, caps: IntArray) -> bool:
    """Whether option i is as fast and as roomy."""
    if o.layer_s[i] > layer_s:
        return False
    for role in range(4):
        if o.max_layers[i, role] < caps[role]:
            return False
    return True


@njit(cache=True, nogil=True)
def _grown(o: Options) -> Options:
    bigger = _empty_options(2 * o.rank.shape[0])
    count = o.rank.shape[0]
    _copy_options(o, bigger, np.arange(count))
    return bigger


@njit(cache=True, nogil=True)
def _copy_options(source: Options, target: Options, chosen: IntArray) -> None:
    for i in range(chosen.shape[0]):
        o = chosen[i]
        target.rank[i] = source.rank[o]
        target.copies[i] = source.copies[o]
        target.pool_class[i] = source.pool_class[o]
        target.pool_cards[i] = source.pool_cards[o]
        target.pool_groups[i] = source.pool_groups[o]
        target.layer_s[i] = source.layer_s[o]
        for role in range(4):
            target.fixed_s[i, role] = source.fixed_s[o, role]
            target.max_layers[i, role] = source.max_layers[o, role]


@njit(cache=True, nogil=True)
def _sliced(o: Options, count: int) -> Options:
    return Options(
        o.rank[:count],
        o.copies[:count],
        o.pool_class[:count],
        o.pool_cards[:count],
        o.pool_groups[:count],
        o.layer_s[:count],
        o.fixed_s[:count],
        o.max_layers[:count],
    )


@njit(cache=True, nogil=True)
def option_prices(t: Tables, o: Options, group_price: FloatArray, card_price: FloatArray) -> FloatArray:
    """Price of each option: c TP groups and c p attention workers. ``group_price`` [S], ``card_price`` [N]."""
    prices = np.empty(o.rank.shape[0], np.float64)
    for i in range(prices.shape[0]):
        each = group_price[o.rank[i]]
        if o.pool_class[i] >= 0:
            each += o.pool_cards[i] * card_price[o.pool_class[i]]
        prices[i] = o.copies[i] * each
    return prices


@njit(cache=True, nogil=True)
def undominated(o: Options, prices: FloatArray) -> IntArray:
    """Options that no other beats in price, speed per copy, fixed time per copy, room and copies at once; by price."""
    order = np.argsort(prices)
    kept = np.empty(order.shape[0], np.int64)
    count = 0
    for i in range(order.shape[0]):
        o_i = order[i]
        dominated = False
        for j in range(count):
            k = kept[j]
            if (
                o.copies[k] > o.copies[o_i]
                or o.layer_s[k] * o.copies[o_i] > o.layer_s[o_i] * o.copies[k]
            ):  # fmt: skip
                continue
            beats = True
            for role in range(4):
                if (
                    o.max_layers[k, role] < o.max_layers[o_i, role]
                    or o.fixed_s[k, role] * o.copies[o_i] > o.fixed_s[o_i, role] * o.copies[k]
                ):
                    beats = False
                    break
            if beats:
                dominated = True
                break
        if not dominated:
            kept[count] = o_i
            count += 1
    return kept[:count]


@njit(cache=True, nogil=True)
def selected(o: Options, chosen: IntArray) -> Options:
    """The chosen options, in that order."""
    out = _empty_options(max(1, chosen.shape[0]))
    _copy_options(o, out, chosen)
    return _sliced(out, chosen.shape[0])
