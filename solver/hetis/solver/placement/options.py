"""Stage options, compiled: every way to build one stage of a replica, with what it carries and what it costs.

Letters are those of `docs/cost-model.md`. A *configuration* is a mix x and a number of micro-batches in flight (index
f). An *option* is a rank type s with c copies, and perhaps p cards of class q per copy that take k head groups of
every rank.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hetis.solver.placement.classes import IntArray
from hetis.solver.placement.compiled import kernel
from hetis.solver.placement.tables import BOTH, FIRST, LAST, PLAIN, FloatArray, Tables

ROUNDING = 1e-9  # room for rounding in floor and ceil, far below one layer or one head group


class Options(NamedTuple):
    """Stage options of one configuration; arrays of equal length, roles in the last axis where there are four."""

    rank: IntArray  # s
    copies: IntArray  # c
    pool_class: IntArray  # q, -1 without a pool
    pool_cards: IntArray  # p
    pool_groups: IntArray  # k
    layer_s: FloatArray  # w, and slack
    fixed_s: FloatArray  # [., 4] hop, step and ends, and slack
    min_layers: IntArray  # [., 4] with fewer, what a chunk takes beside layers is too uneven; 1 where all will do
    max_layers: IntArray  # [., 4] repeated layers that fit in memory and in a round trip with a chunk


@kernel
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
        np.empty((capacity, 4), np.int64),
    )


@kernel
def layers_on_rank(t: Tables, x: int, s: int, kept_bytes: float, role: int) -> float:
    """Repeated layers that fit on a rank in a role, not rounded; ``kept_bytes`` are KV bytes of one layer."""
    room = t.room_bytes[s] - t.act_bytes[x, s]
    if role in (FIRST, BOTH):
        room -= t.first_bytes[s] + t.prefix_layers * kept_bytes
    if role in (LAST, BOTH):
        room -= t.last_bytes[s] + t.logit_bytes[x, s]
    if role == BOTH:
        room += t.tied_bytes[s]
    layers: float = min(room / (t.layer_bytes[s] + kept_bytes) + ROUNDING, float(t.num_layers))
    return max(0.0, layers)


@kernel
def kept_bytes(t: Tables, x: int, f: int, s: int, copies: int, k: int) -> float:
    """KV bytes of one layer on a rank of a stage copy that gives k head groups of every rank to its pool: of those
    only what prompts under way still attend to."""
    tokens, prompts = t.kv_tokens[x, f, copies - 1], t.prompt_tokens[x, f, copies - 1]
    total: float = ((t.rank_groups[s] - k) * tokens + k * prompts) * t.kv_group_bytes
    return total


@kernel
def layers_on_card(t: Tables, q: int, tp: int, k: int, cards: int, requests: int, tokens: float) -> float:
    """Layers whose KV fits on each of ``cards`` attention workers that take k head groups of ``tp`` ranks.

    A card holds a whole number of (request, head group) pairs of every layer.
    """
    pairs = np.ceil(requests * k * tp / cards - ROUNDING)
    layers: float = t.worker_room_bytes[q] / (pairs / requests * tokens * t.kv_group_bytes) + ROUNDING
    return layers


@kernel
def copies_limit(t: Tables, f: int, max_copies: int) -> int:
    """Copies that a stage may have: with one micro-batch in flight they would take no turns."""
    limit: int = 1 if t.in_flight[f] == 1 else min(max_copies, t.in_flight[f])
    return limit


@kernel
def copy_requests(t: Tables, x: int, f: int, copies: int) -> int:
    """Requests D b whose KV each of a stage's copies holds."""
    requests: int = (t.in_flight[f] + copies - 1) // copies * t.micro_batch[x]
    return requests


@kernel
def pool_limit(t: Tables, s: int, copies: int, q: int, max_pool: int) -> int:
    """Attention workers of class q that each copy of a stage of rank type s can have."""
    own = copies * t.rank_tp[s] if q == t.rank_class[s] else 0
    limit: int = min(max_pool, t.available[q] - own) // copies
    return limit


@kernel
def has_pools(t: Tables, x: int, s: int, q: int, max_pool: int) -> bool:
    """Whether stages of rank type s may have attention workers of class q; prefill replicas have nothing for them."""
    return max_pool > 0 and t.micro_batch[x] > 0 and t.pool_start[s, q] >= 0


@kernel
def pool_entry(t: Tables, s: int, q: int, k: int, size: int) -> int:
    """Where the tables hold k head groups of every rank with the ``size``-th number of cards of class q."""
    entry: int = t.pool_start[s, q] + (k - 1) * t.pool_sizes.shape[0] + size
    return entry


@kernel
def pool_wire_seconds(t: Tables, x: int, entry: int) -> float:
    """The least time of a layer with a pool: of decode replicas, what the KV of a prompt takes to arrive."""
    seconds: float = t.pool_wire_s[entry] if t.receives[x] else 0.0
    return seconds


@kernel
def interval_cap(t: Tables, x: int, f: int, unevenness: float) -> float:
    """The longest interval of a configuration: ``sum chunk_s <= unevenness t / n_it`` is to stay within the cap."""
    cap: float = t.t_cap[x, f]
    if unevenness < np.inf:
        cap = min(cap, t.trip_cap[x, f] * t.iterations[x] / unevenness)
    return cap


@kernel
def chunk_cap(t: Tables, x: int, f: int, copies: int) -> float:
    """The longest that a stage of a pipelined replica with at most so many copies may take, by its own copies."""
    cap: float = np.inf if t.in_flight[f] == 1 else t.trip_cap[x, f] / copies
    return cap


@kernel
def stretch(
    t: Tables, x: int, f: int, request_s: float, chunk_s: float, least_slack: float, slack_unevenness: float
) -> float:
    """1 + sigma of a stage: a repeated layer takes a request ``request_s``, an iteration with a chunk ``chunk_s``."""
    slack = least_slack
    plain = t.iterations[x] - t.chunk_iterations[x]
    if slack_unevenness > 0.0 and plain > 0.0 and t.chunk_iterations[x] > 0.0:
        plain_s = (request_s - t.chunk_iterations[x] * chunk_s) / plain
        longest_s = chunk_s - (chunk_s - plain_s) * t.without_chunk[x, f]
        slack = max(slack, slack_unevenness * (longest_s * t.iterations[x] / request_s - 1.0))
    stretched: float = 1.0 + slack
    return stretched


@kernel
def _fill_fixed(
    fixed_s: FloatArray, prefix_layers: int, compute_s: float, wire_s: float, hop_s: float, step_s: float,
    last_s: float, prefix_delta_s: float,
) -> None:  # fmt: skip
    """What a stage takes beside its repeated layers; [4] by role."""
    prefix_s = prefix_layers * max(compute_s + prefix_delta_s, wire_s)
    fixed_s[PLAIN] = step_s + hop_s
    fixed_s[FIRST] = step_s + prefix_s
    fixed_s[LAST] = step_s + hop_s + last_s
    fixed_s[BOTH] = step_s + prefix_s + last_s


@kernel
def _limit_layers(
    floors: IntArray, caps: IntArray, layer_s: float, fixed_s: FloatArray, chunk_layer_s: float,
    chunk_fixed_s: FloatArray, longest_s: float, iterations: float, unevenness: float,
) -> None:  # fmt: skip
    """Narrows ``caps`` and ``floors`` [4] to stages that take at most ``longest_s`` seconds in an iteration with a
    chunk, and at most ``unevenness`` times a mean iteration."""
    for role in range(4):
        floors[role] = 1
        if longest_s < np.inf:
            layers = (longest_s - chunk_fixed_s[role]) / chunk_layer_s + ROUNDING
            caps[role] = int(max(0.0, min(float(caps[role]), layers)))
        if unevenness < np.inf:
            # layers * slope >= rise
            slope = unevenness * layer_s - iterations * chunk_layer_s
            rise = iterations * chunk_fixed_s[role] - unevenness * fixed_s[role]
            if slope >= 0.0 and rise > 0.0:
                least = rise / slope - ROUNDING if slope > 0.0 else np.inf
                if least > caps[role]:
                    caps[role] = 0
                else:
                    floors[role] = max(1, int(np.ceil(least)))
            elif slope < 0.0:
                caps[role] = int(max(0.0, min(float(caps[role]), rise / slope + ROUNDING)))


@kernel
def list_options(
    t: Tables, x: int, f: int, max_copies: int, max_pool: int, least_slack: float, slack_unevenness: float,
    chunk_cap_s: float, unevenness: float,
) -> Options:  # fmt: skip
    """Every stage option of a configuration that fits in memory, fewer those no better than a cheaper one beside it.

    A stage with c copies takes at most ``c chunk_cap_s`` seconds in an iteration with a chunk, and at most
    ``unevenness`` times what it takes in a mean one. Times are stretched by the slack of each option.

    An option with a pool is dropped where the stage without one, or the fastest or the roomiest of the smaller pools
    of the same class, is as fast and has as much room: it would only cost more (unless cards count, `Tables`).
    """
    out = _empty_options(256)
    count = 0
    caps, floors = np.empty(4, np.int64), np.ones(4, np.int64)
    fixed_s, chunk_fixed_s = np.empty(4, np.float64), np.empty(4, np.float64)
    has_chunk_limits = chunk_cap_s < np.inf or unevenness < np.inf
    slack = 1.0 + ROUNDING
    for s in range(t.rank_class.shape[0]):
        g, n, groups = t.rank_class[s], t.rank_tp[s], t.rank_groups[s]
        for c in range(1, copies_limit(t, f, max_copies) + 1):
            if c * n > t.available[g]:
                break
            requests = copy_requests(t, x, f, c)
            tokens = t.kv_tokens[x, f, c - 1]
            on_rank = np.empty((groups + 1, 4), np.float64)
            for k in range(groups + 1):
                for role in range(4):
                    on_rank[k, role] = layers_on_rank(t, x, s, kept_bytes(t, x, f, s, c, k), role)
            without = count
            for q in range(-1, t.available.shape[0]):
                if q >= 0 and not has_pools(t, x, s, q, max_pool):
                    continue
                cards_limit = pool_limit(t, s, c, q, max_pool) if q >= 0 else 0
                first_of_group = fastest = roomiest = count
                for size in range(t.pool_sizes.shape[0] if q >= 0 else 1):
                    p = t.pool_sizes[size] if q >= 0 else 0
                    if p > cards_limit:
                        break
                    # From the roomiest split to the fastest: a split that is neither has been beaten before.
                    for k in range(groups if q >= 0 else 0, 0 if q >= 0 else -1, -1):
                        compute_s, wire_s = t.layer_s[x, s], t.wire_s[x, s]
                        chunk_layer_s = t.chunk.layer_s[x, s]
                        on_card = np.inf
                        if q < 0:
                            compute_s += t.own_s[x, s, groups]
                            chunk_layer_s += t.own_s[x, s, groups] / t.iterations[x]
                        else:
                            entry = pool_entry(t, s, q, k, size)
                            compute_s += t.pool_s[x, entry]
                            chunk_layer_s += t.chunk.pool_s[x, entry]
                            wire_s = pool_wire_seconds(t, x, entry)
                            on_card = layers_on_card(t, q, n, k, p, requests, tokens)
                        layer_s = max(compute_s, wire_s)
                        for role in range(4):
                            prefix = t.prefix_layers if role in (FIRST, BOTH) else 0
                            caps[role] = int(max(0.0, min(on_rank[k, role], on_card - prefix)))
                        if caps.max() == 0:
                            continue
                        _fill_fixed(
                            fixed_s, t.prefix_layers, compute_s, wire_s, t.hop_s[x, s], t.step_s[x, s], t.last_s[x, s],
                            t.prefix_delta_s[x, s],
                        )  # fmt: skip
                        if has_chunk_limits:
                            _fill_fixed(
                                chunk_fixed_s, t.prefix_layers, chunk_layer_s, 0.0, t.chunk.hop_s[x, s],
                                t.chunk.step_s[x, s], t.chunk.last_s[x, s], t.chunk.prefix_delta_s[x, s],
                            )  # fmt: skip
                            _limit_layers(
                                floors, caps, layer_s, fixed_s, chunk_layer_s, chunk_fixed_s, c * chunk_cap_s,
                                t.iterations[x], unevenness * slack,
                            )  # fmt: skip
                            if caps.max() == 0:
                                continue
                        longer = stretch(t, x, f, layer_s, chunk_layer_s, least_slack, slack_unevenness)
                        layer_s *= longer
                        for role in range(4):
                            fixed_s[role] *= longer
                        counts = t.keeps_idle_cards
                        if (
                            not counts
                            and count > first_of_group
                            and (
                                _at_least(out, fastest, layer_s, fixed_s, floors, caps)
                                or _at_least(out, roomiest, layer_s, fixed_s, floors, caps)
                            )
                        ):
                            continue
                        if (
                            not counts
                            and q >= 0
                            and without < first_of_group
                            and _at_least(out, without, layer_s, fixed_s, floors, caps)
                        ):
                            continue
                        if count == out.rank.shape[0]:
                            out = _grown(out)
                        _write(out, count, s, c, q, p, k, layer_s, fixed_s, floors, caps)
                        if count == first_of_group or layer_s < out.layer_s[fastest]:
                            fastest = count
                        if count == first_of_group or caps[PLAIN] > out.max_layers[roomiest, PLAIN]:
                            roomiest = count
                        count += 1
    return _sliced(out, count)


@kernel
def _write(
    out: Options, i: int, s: int, c: int, q: int, p: int, k: int, layer_s: float, fixed_s: FloatArray,
    floors: IntArray, caps: IntArray,
) -> None:  # fmt: skip
    """Fills row i of the options."""
    out.rank[i], out.copies[i], out.pool_class[i], out.pool_cards[i], out.pool_groups[i] = s, c, q, p, k
    out.layer_s[i] = layer_s
    for role in range(4):
        out.fixed_s[i, role] = fixed_s[role]
        out.min_layers[i, role] = floors[role]
        out.max_layers[i, role] = caps[role]


@kernel
def _at_least(o: Options, i: int, layer_s: float, fixed_s: FloatArray, floors: IntArray, caps: IntArray) -> bool:
    """Whether option i is as fast and as roomy, and does with as few layers."""
    if o.layer_s[i] > layer_s:
        return False
    for role in range(4):
        if o.max_layers[i, role] < caps[role] or o.min_layers[i, role] > floors[role]:
            return False
        if o.fixed_s[i, role] > fixed_s[role]:
            return False
    return True


@kernel
def _grown(o: Options) -> Options:
    bigger = _empty_options(2 * o.rank.shape[0])
    count = o.rank.shape[0]
    _copy_options(o, bigger, np.arange(count))
    return bigger


@kernel
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
            target.min_layers[i, role] = source.min_layers[o, role]
            target.max_layers[i, role] = source.max_layers[o, role]


@kernel
def _sliced(o: Options, count: int) -> Options:
    return Options(
        o.rank[:count],
        o.copies[:count],
        o.pool_class[:count],
        o.pool_cards[:count],
        o.pool_groups[:count],
        o.layer_s[:count],
        o.fixed_s[:count],
        o.min_layers[:count],
        o.max_layers[:count],
    )


@kernel
def option_prices(t: Tables, o: Options, group_price: FloatArray, card_price: FloatArray) -> FloatArray:
    """Price of each option: c TP groups and c p attention workers. ``group_price`` [S], ``card_price`` [N]."""
    prices = np.empty(o.rank.shape[0], np.float64)
    for i in range(prices.shape[0]):
        each = group_price[o.rank[i]]
        if o.pool_class[i] >= 0:
            each += o.pool_cards[i] * card_price[o.pool_class[i]]
        prices[i] = o.copies[i] * each
    return prices


@kernel
def penalised_prices(t: Tables, o: Options, prices: FloatArray, penalty: FloatArray) -> tuple[FloatArray, float]:
    """Prices when every GPU of a class costs its ``penalty`` [N] more, and the penalties of the whole fleet.

    A replica that fits in the fleet pays no more penalties than that: the least penalised price of any replica, less
    the penalties of the fleet, bounds its price from below (a Lagrangean bound).
    """
    fleet = 0.0
    for g in range(penalty.shape[0]):
        fleet += penalty[g] * t.available[g]
    penalised = prices.copy()
    if fleet > 0.0:
        for i in range(prices.shape[0]):
            penalised[i] += penalty[t.rank_class[o.rank[i]]] * (o.copies[i] * t.rank_tp[o.rank[i]])
            if o.pool_class[i] >= 0:
                penalised[i] += penalty[o.pool_class[i]] * (o.copies[i] * o.pool_cards[i])
    return penalised, fleet


@kernel
def class_use(t: Tables, o: Options, i: int, device_class: int) -> int:
    """GPUs of a class that option i takes."""
    use = 0
    if t.rank_class[o.rank[i]] == device_class:
        use += o.copies[i] * t.rank_tp[o.rank[i]]
    if o.pool_class[i] == device_class:
        use += o.copies[i] * o.pool_cards[i]
    return use


@kernel
def selected(o: Options, chosen: IntArray) -> Options:
    """The chosen options, in that order."""
    out = _empty_options(max(1, chosen.shape[0]))
    _copy_options(o, out, chosen)
    return _sliced(out, chosen.shape[0])


NO_STAGES = np.empty((0, 6), np.int64)


@kernel
def stage_rows(o: Options, stages: IntArray) -> IntArray:
    """Stages [., 2] of (option, layers) as rows of (s, c, layers, q, p, k) that stand for themselves; [., 6]."""
    rows = np.empty((stages.shape[0], 6), np.int64)
    for i in range(stages.shape[0]):
        option = stages[i, 0]
        rows[i, 0], rows[i, 1], rows[i, 2] = o.rank[option], o.copies[option], stages[i, 1]
        rows[i, 3], rows[i, 4], rows[i, 5] = o.pool_class[option], o.pool_cards[option], o.pool_groups[option]
    return rows
