"""Stage options, compiled: every way to build one stage of a replica, with its capacity and its cost.

Letters are those of `docs/cost-model.md`. A *configuration* is a mix x and a number of micro-batches in flight (index
f). An *option* is a rank type s with c copies, optionally with p cards of class q per copy that take k head groups of
every rank.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hetis.solver.placement.compiled import kernel
from hetis.solver.placement.fleet import IntArray
from hetis.solver.placement.stage_cost import (
    ROUNDING,
    PoolTimes,
    Ranks,
    fill_fixed,
    has_pools,
    kept_of_groups,
    layer_alone,
    layer_with_pool,
    layers_in_room,
    layers_on_card,
    least_fixed_s,
    most_layers_with_pool,
    pool_limit,
    ranks_of,
    room_of_role,
    stage_shapes,
    stretch,
)
from hetis.solver.placement.tables import BOTH, FIRST, LAST, PLAIN, BoolArray, CoverTables, FloatArray, Tables


class Options(NamedTuple):
    """Stage options of one configuration: arrays of equal length, with roles in the last axis where it is 4."""

    rank: IntArray  # s
    copies: IntArray  # c
    pool_class: IntArray  # q, -1 without a pool
    pool_cards: IntArray  # p
    pool_groups: IntArray  # k
    layer_s: FloatArray  # w, including slack
    fixed_s: FloatArray  # [., 4] hop, step and ends, including slack
    min_layers: IntArray  # [., 4] with fewer, a chunk's time beside layers is too uneven; 1: no minimum
    max_layers: IntArray  # [., 4] repeated layers that fit in memory and in a round trip with a chunk


class Reach(NamedTuple):
    """Limits on the stages of replicas that are worth searching for (`ceiling.reach_of`); see `is_useful`."""

    effort: float  # r: least price of a layer
    copy_cost: float  # m
    spare: float  # what one stage may cost beyond r for each of its layers; inf: there is no limit
    shortest_s: float  # interval, without slack
    longest_s: float
    copies: int  # K
    sequential: bool


EVERYTHING = Reach(0.0, 0.0, np.inf, 0.0, np.inf, 1 << 20, False)


@kernel
def is_useful(reach: Reach, price: float, copies: int, layer_s: float, fixed_s: float, most: float) -> bool:
    """Return whether a replica within reach may have a stage of at most ``most`` layers; times exclude the least slack.

    In a pipelined replica ``t price + m c - cap(t) r`` is least at one of two intervals. In a sequential one
    ``sqrt(price (l w + f)) - l r`` is least at the fewest or the most layers.
    """
    if reach.spare == np.inf:
        return True
    if most < 1.0 or copies > reach.copies or layer_s + fixed_s > copies * reach.longest_s:
        return False
    limit = reach.spare + 1e-9 * (abs(reach.spare) + reach.effort)
    if reach.sequential:
        layers = min(most, (reach.longest_s - fixed_s) / layer_s)
        one = np.sqrt(price * (layer_s + fixed_s)) - reach.effort
        full = np.sqrt(price * (layers * layer_s + fixed_s)) - layers * reach.effort
    else:
        t_one = max(reach.shortest_s, (layer_s + fixed_s) / copies)
        t_full = max(t_one, min(reach.longest_s, (most * layer_s + fixed_s) / copies))
        one = t_one * price - min(most, (copies * t_one - fixed_s) / layer_s) * reach.effort
        full = t_full * price - min(most, (copies * t_full - fixed_s) / layer_s) * reach.effort
    taken: float = min(one, full) + reach.copy_cost * copies
    return taken <= limit


@kernel
def _empty_options(capacity: int) -> Options:
    return Options(
        np.empty(capacity, np.int64), np.empty(capacity, np.int64), np.empty(capacity, np.int64),
        np.empty(capacity, np.int64), np.empty(capacity, np.int64), np.empty(capacity, np.float64),
        np.empty((capacity, 4), np.float64), np.empty((capacity, 4), np.int64), np.empty((capacity, 4), np.int64),
    )  # fmt: skip


# --- listing the options of a configuration: for every rank type and copies, without a pool and then with every pool


class TimeLimits(NamedTuple):
    """Limits on a stage's seconds, and the slack that lengthens these seconds (see `stretch`).

    A stage with c copies takes at most ``c chunk_cap_s`` in an iteration with a chunk, and at most ``unevenness`` times
    what it takes in a mean one, unless it is the only one of its replica: its iteration is then the whole round trip.
    """

    least_slack: float
    slack_unevenness: float
    chunk_cap_s: float
    unevenness: float


@kernel
def list_options(
    t: Tables, x: int, f: int, max_copies: int, max_pool: int, limits: TimeLimits, reach: Reach,
    group_price: FloatArray, card_price: FloatArray,
) -> Options:  # fmt: skip
    """Return every useful stage option of a configuration that fits in memory, without obviously dominated ones.

    `Reach` determines what is useful at ``group_price`` [S] and ``card_price`` [N]. An option with a pool is dropped if
    the stage without one, or the fastest or the roomiest smaller pool of the same class, is as fast and has as much
    room, because the option would only cost more (unless cards count, see `Tables`).
    """
    out, count = _empty_options(256), 0
    # Scratch space for the numbers of one stage; [4] by role.
    on_rank = np.empty((t.own_s.shape[2], 4), np.float64)
    caps, floors = np.empty(4, np.int64), np.ones(4, np.int64)
    fixed_s, chunk_fixed_s = np.empty(4, np.float64), np.empty(4, np.float64)
    times = PoolTimes(t.pool_s[x], t.chunk.pool_s[x], t.pool_wire_s, t.receives[x])
    gives_all, counts, num_sizes = t.gives_all[x], t.keeps_idle_cards, t.pool_sizes.shape[0]
    has_chunk_limits = limits.chunk_cap_s < np.inf or limits.unevenness < np.inf
    least, unevenness = 1.0 + limits.least_slack, limits.unevenness * (1.0 + ROUNDING)
    alone_s = t.trip_cap[x, f] if unevenness < np.inf else np.inf
    shapes = stage_shapes(t.rank_class, t.rank_tp, t.rank_dp, t.available, t.in_flight[f], max_copies)
    pools = np.empty((1 + t.available.shape[0] * num_sizes, 3), np.int64)
    for j in range(shapes.shape[0]):
        s, c = shapes[j, 0], shapes[j, 1]
        ranks = ranks_of(t, x, f, s, c)
        _fill_on_rank(on_rank, ranks)
        without = first = fastest = roomiest = -1
        for i in range(_fill_pools(pools, t, x, ranks, max_pool, reach, group_price[s], card_price)):
            q, p, size = pools[i, 0], pools[i, 1], pools[i, 2]
            price = c * (group_price[s] + (p * card_price[q] if q >= 0 else 0.0))
            if i == 0 or q != pools[i - 1, 0]:
                first = fastest = roomiest = count
            # From the roomiest split to the fastest: a split that is neither is already dominated.
            most_groups = ranks.groups if q >= 0 else 0
            for k in range(most_groups, most_groups - 1 if gives_all or q < 0 else 0, -1):
                if q < 0:
                    layer, on_cards = layer_alone(ranks), np.inf
                else:
                    layer = layer_with_pool(ranks, times, t.pool_start[s, q] + (k - 1) * num_sizes + size)
                    on_cards = layers_on_card(
                        t.worker_room_bytes[q], t.kv_group_bytes, ranks.tp, k, p, ranks.requests, ranks.tokens
                    )
                if not _fill_caps(caps, on_rank, k, on_cards, ranks):
                    continue
                fill_fixed(fixed_s, ranks.prefix_layers, layer.compute_s, layer.wire_s, ranks.fixed)
                layer_s = max(layer.compute_s, layer.wire_s)
                if has_chunk_limits:
                    fill_fixed(chunk_fixed_s, ranks.prefix_layers, layer.chunk_s, 0.0, ranks.chunk_fixed)
                    most_s, n_it = c * limits.chunk_cap_s, ranks.mix.number
                    if not _limit_layers(
                        floors, caps, layer_s, fixed_s, layer.chunk_s, chunk_fixed_s, most_s, alone_s, n_it, unevenness
                    ):
                        continue
                longer = stretch(ranks.mix, layer_s, layer.chunk_s, limits.least_slack, limits.slack_unevenness)
                layer_s, rest_s = layer_s * longer, _stretch_fixed(fixed_s, longer) / least
                if not is_useful(reach, price, c, layer_s / least, rest_s, float(_most(caps))):
                    continue
                if (
                    q >= 0
                    and not counts
                    and (
                        _is_beaten(out, without, count, layer_s, fixed_s, floors, caps)
                        or _is_beaten(out, fastest, count, layer_s, fixed_s, floors, caps)
                        or _is_beaten(out, roomiest, count, layer_s, fixed_s, floors, caps)
                    )
                ):
                    continue
                if count == out.layer_s.size:
                    out = selected(out, np.arange(2 * count) % count)
                _write(out, count, s, c, q, p, k, layer_s, fixed_s, floors, caps)
                if q < 0:
                    without = count
                if count == first or layer_s < out.layer_s[fastest]:
                    fastest = count
                if count == first or caps[PLAIN] > out.max_layers[roomiest, PLAIN]:
                    roomiest = count
                count += 1
    return selected(out, slice(0, count))


@kernel
def _fill_on_rank(on_rank: FloatArray, ranks: Ranks) -> None:
    """Fill in the layers that fit on a rank that gives k head groups away, in every role; [k, 4]."""
    for role in range(4):
        room = room_of_role(ranks.room, ranks.first_bytes, ranks.last_bytes, ranks.tied_bytes, role)
        others = ranks.prefix_layers if role in (FIRST, BOTH) else 0
        if role in (LAST, BOTH):
            others += ranks.draft_layers
        for k in range(ranks.groups + 1):
            kept = kept_of_groups(ranks.groups, k, ranks.kv_bytes, ranks.prompt_bytes) + ranks.state_bytes
            on_rank[k, role] = layers_in_room(room, ranks.layer_bytes, kept, others, ranks.num_layers)


@kernel
def _fill_pools(
    pools: IntArray, t: Tables, x: int, ranks: Ranks, max_pool: int, reach: Reach, group_price: float,
    card_price: FloatArray,
) -> int:  # fmt: skip
    """Fill in the pools that may make a useful stage of these ranks, and return their number.

    Rows are (q, p, index of p in the tables), by class and then size; the first is (-1, 0, 0), no pool, if allowed.
    """
    count, c, n = 0, ranks.copies, ranks.tp
    if not t.gives_all[x]:
        pools[0, 0], pools[0, 1], pools[0, 2], count = -1, 0, 0, 1
    rest_s = least_fixed_s(ranks)
    for q in range(t.available.shape[0]):
        if not has_pools(max_pool, t.micro_batch[x], t.pool_start[ranks.s, q]):
            continue
        most_cards = pool_limit(c, c * n if q == t.rank_class[ranks.s] else 0, t.available[q], max_pool)
        start, card_bytes, card = t.least_pool_start[ranks.s, q], t.worker_room_bytes[q], card_price[q]
        for size in range(t.pool_sizes.shape[0]):
            p = t.pool_sizes[size]
            if p > most_cards:
                break
            if reach.spare < np.inf:
                most = most_layers_with_pool(ranks, p * card_bytes)
                least_s = ranks.layer_s + t.least_pool_s[x, start + size]
                if not is_useful(reach, c * (group_price + p * card), c, least_s, rest_s, most):
                    continue
            pools[count, 0], pools[count, 1], pools[count, 2] = q, p, size
            count += 1
    return count


@kernel
def _limit_layers(
    floors: IntArray, caps: IntArray, layer_s: float, fixed_s: FloatArray, chunk_layer_s: float,
    chunk_fixed_s: FloatArray, longest_s: float, alone_s: float, iterations: float, unevenness: float,
) -> bool:  # fmt: skip
    """Narrow ``caps`` and ``floors`` [4] to stages within both time limits, and return whether any role has layers.

    A stage may take at most ``longest_s`` seconds in an iteration with a chunk, and at most ``unevenness`` times a mean
    iteration. Instead of the latter, the only stage of a sequential replica may take at most ``alone_s``.
    """
    for role in range(4):
        floors[role] = 1
        most_s = min(longest_s, alone_s) if role == BOTH else longest_s
        if most_s < np.inf:
            layers = (most_s - chunk_fixed_s[role]) / chunk_layer_s + ROUNDING
            caps[role] = int(max(0.0, min(float(caps[role]), layers)))
        if unevenness < np.inf and role != BOTH:
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
    return _most(caps) > 0


@kernel
def _most(caps: IntArray) -> int:
    """Return the largest of the roles' numbers; `max` of an array would count references, which is slow."""
    most: int = max(max(caps[0], caps[1]), max(caps[2], caps[3]))
    return most


@kernel
def _stretch_fixed(fixed_s: FloatArray, longer: float) -> float:
    """Multiply the fixed seconds of every role by ``longer``, and return the least."""
    for role in range(4):
        fixed_s[role] *= longer
    least: float = min(min(fixed_s[0], fixed_s[1]), min(fixed_s[2], fixed_s[3]))
    return least


@kernel
def _write(
    out: Options, i: int, s: int, c: int, q: int, p: int, k: int, layer_s: float, fixed_s: FloatArray,
    floors: IntArray, caps: IntArray,
) -> None:  # fmt: skip
    """Fill row i of the options."""
    out.rank[i], out.copies[i], out.pool_class[i], out.pool_cards[i], out.pool_groups[i] = s, c, q, p, k
    out.layer_s[i] = layer_s
    for role in range(4):
        out.fixed_s[i, role] = fixed_s[role]
        out.min_layers[i, role] = floors[role]
        out.max_layers[i, role] = caps[role]


@kernel
def _fill_caps(caps: IntArray, on_rank: FloatArray, k: int, on_cards: float, ranks: Ranks) -> bool:
    """Fill in the most layers of each role with k head groups in the pool, and return whether any role has one.

    Copies that share their experts hold all layers or none.
    """
    has_any = False
    for role in range(4):
        prefix = ranks.prefix_layers if role in (FIRST, BOTH) else 0
        caps[role] = int(max(0.0, min(on_rank[k, role], on_cards - prefix)))
        if ranks.shares_experts and (role != BOTH or caps[role] < ranks.num_layers):
            caps[role] = 0
        has_any = has_any or caps[role] > 0
    return has_any


@kernel
def _is_beaten(
    out: Options, at: int, count: int, layer_s: float, fixed_s: FloatArray, floors: IntArray, caps: IntArray
) -> bool:
    """Return whether option ``at`` exists among ``count``, is as fast and roomy, and allows as few layers."""
    if at in (-1, count) or out.layer_s[at] > layer_s:
        return False
    for role in range(4):
        if out.max_layers[at, role] < caps[role] or out.min_layers[at, role] > floors[role]:
            return False
        if out.fixed_s[at, role] > fixed_s[role]:
            return False
    return True


def option_prices(o: Options, group_price: FloatArray, card_price: FloatArray) -> FloatArray:
    """Return the price of each option: c TP groups and c p workers. ``group_price`` [S], ``card_price`` [N]."""
    cards = np.where(o.pool_class >= 0, o.pool_cards * card_price[o.pool_class], 0.0)
    return np.asarray(o.copies * (group_price[o.rank] + cards))


@kernel
def penalised_prices(t: CoverTables, o: Options, prices: FloatArray, penalty: FloatArray) -> tuple[FloatArray, float]:
    """Return prices if every GPU of a class costs its ``penalty`` [N] more, and the penalties of the whole fleet.

    A replica that fits in the fleet pays no more penalties than the fleet. Hence the least penalised price of any
    replica, minus the penalties of the fleet, bounds its price from below (a Lagrangian bound).
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
def selected(o: Options, chosen: IntArray | slice) -> Options:
    """Return the chosen options, in that order; a slice makes no copy."""
    return Options(
        o.rank[chosen], o.copies[chosen], o.pool_class[chosen], o.pool_cards[chosen], o.pool_groups[chosen],
        o.layer_s[chosen], o.fixed_s[chosen], o.min_layers[chosen], o.max_layers[chosen],
    )  # fmt: skip


NO_STAGES = np.empty((0, 6), np.int64)


@kernel
def stage_rows(o: Options, stages: IntArray) -> IntArray:
    """Return stages [., 2] of (option, layers) as self-contained rows of (s, c, layers, q, p, k); [., 6]."""
    rows = np.empty((stages.shape[0], 6), np.int64)
    for i in range(stages.shape[0]):
        option = stages[i, 0]
        rows[i, 0], rows[i, 1], rows[i, 2] = o.rank[option], o.copies[option], stages[i, 1]
        rows[i, 3], rows[i, 4], rows[i, 5] = o.pool_class[option], o.pool_cards[option], o.pool_groups[option]
    return rows


# --- sums over the stages of one replica: price, seconds, GPUs. Stages are rows [., 2] of (option, layers)


@kernel
def total_price(prices: FloatArray, stages: IntArray) -> float:
    total = 0.0
    for i in stages[:, 0]:
        total += prices[i]
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
    total, count = 0.0, stages.shape[0]
    for i in range(count):
        option = stages[i, 0]
        total += stages[i, 1] * o.layer_s[option] + o.fixed_s[option, role_of(i, count)]
    return total


@kernel
def excess(t: CoverTables, o: Options, stages: IntArray, device_class: int) -> int:
    """Return the GPUs of a class that a replica takes beyond those available; negative if some are left."""
    use: int = -t.available[device_class]
    for i in stages[:, 0]:
        if t.rank_class[o.rank[i]] == device_class:
            use += o.copies[i] * t.rank_tp[o.rank[i]]
        if o.pool_class[i] == device_class:
            use += o.copies[i] * o.pool_cards[i]
    return use


@kernel
def traced(back_pos: IntArray, back_option: IntArray, num_layers: int, last_pos: int, last_option: int) -> IntArray:
    """Return stages, first to last, from the position before each and its option; the last begins at ``last_pos``."""
    reverse = np.empty((num_layers, 2), np.int64)
    reverse[0, 0], reverse[0, 1] = last_option, num_layers - last_pos
    count, pos = 1, last_pos
    while pos > 0:
        reverse[count, 0], reverse[count, 1] = back_option[pos], pos - back_pos[pos]
        count, pos = count + 1, back_pos[pos]
    return reverse[:count][::-1].copy()


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
