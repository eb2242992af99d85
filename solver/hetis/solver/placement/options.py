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
from hetis.solver.placement.tables import (
    BOTH,
    FIRST,
    LAST,
    PLAIN,
    BoolArray,
    CoverTables,
    FloatArray,
    Tables,
)

ROUNDING = 1e-9  # tolerance for rounding in floor and ceil, far below one layer or one head group


class Options(NamedTuple):
    """Stage options of one configuration: arrays of equal length, with roles in the last axis where it is 4."""

    rank: IntArray  # s
    copies: IntArray  # c
    pool_class: IntArray  # q, -1 without a pool
    pool_cards: IntArray  # p
    pool_groups: IntArray  # k
    layer_s: FloatArray  # w, including slack
    fixed_s: FloatArray  # [., 4] hop, step and ends, including slack
    min_layers: IntArray  # [., 4] with fewer, a chunk's time beside layers is too uneven; 1 if any number will do
    max_layers: IntArray  # [., 4] repeated layers that fit in memory and in a round trip with a chunk


class Reach(NamedTuple):
    """Limits on the stages of replicas that are worth looking for (`ceiling.reach_of`); see `is_useful`."""

    effort: float  # r: least price of a layer
    copy_cost: float  # m
    spare: float  # what one stage may cost beyond r for each of its layers; inf: any stage will do
    shortest_s: float  # interval, without slack
    longest_s: float
    copies: int  # K
    sequential: bool


EVERYTHING = Reach(0.0, 0.0, np.inf, 0.0, np.inf, 1 << 20, False)


@kernel
def is_useful(reach: Reach, price: float, copies: int, layer_s: float, fixed_s: float, most: float) -> bool:
    """Return whether a replica within reach may have a stage with at most ``most`` layers; times exclude least slack.

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


@kernel
def room_of_role(room: float, first: float, last: float, tied: float, role: int) -> float:
    """Return the bytes of a rank left for repeated layers and the KV of prefix layers after its role's ends."""
    if role in (FIRST, BOTH):
        room -= first
    if role in (LAST, BOTH):
        room -= last
    if role == BOTH:
        room += tied
    return room


@kernel
def layers_on_rank(t: Tables, x: int, s: int, kept_bytes: float, role: int) -> float:
    """Return the repeated layers that fit on a rank in a role, unrounded; ``kept_bytes`` is KV bytes of one layer."""
    others = t.prefix_layers if role in (FIRST, BOTH) else 0
    if role in (LAST, BOTH):
        others += t.draft_layers
    last = t.last_bytes[s] + t.logit_bytes[x, s]
    room = room_of_role(t.room_bytes[s] - t.act_bytes[x, s], t.first_bytes[s], last, t.tied_bytes[s], role)
    layers: float = layers_in_room(room, t.layer_bytes[s], kept_bytes, others, t.num_layers)
    return layers


@kernel
def kept_bytes(t: Tables, x: int, f: int, s: int, copies: int, k: int) -> float:
    """Return bytes of KV and states of one layer on a rank of a stage copy that gives k head groups to its pool."""
    tokens, prompts = t.kv_tokens[x, f, copies - 1], t.prompt_tokens[x, f, copies - 1]
    kept: float = kept_of_groups(t.rank_groups[s], k, tokens * t.kv_group_bytes, prompts * t.kv_group_bytes)
    return kept + state_on_rank(t, x, f, s, copies)


@kernel
def state_on_rank(t: Tables, x: int, f: int, s: int, copies: int) -> float:
    """Return the bytes of one layer on a rank of a stage copy that requests keep whatever their context."""
    state: float = t.state_bytes[x, f, copies - 1] / t.rank_tp[s]
    return state


# The functions below run in inner loops and take numbers only: a call with `Tables` counts references to all of them.


@kernel
def layers_in_room(room: float, layer_bytes: float, kept_bytes: float, other_layers: int, num_layers: int) -> float:
    """Return the repeated layers that fit in a rank's ``room``, unrounded; ``kept_bytes`` is KV bytes of one layer.

    ``other_layers`` are those whose weights are not in ``room`` already, but whose KV is: of the prefix, and drafting.
    """
    layers: float = min((room - other_layers * kept_bytes) / (layer_bytes + kept_bytes) + ROUNDING, float(num_layers))
    return max(0.0, layers)


@kernel
def kept_of_groups(groups: int, k: int, kv_bytes: float, prompt_bytes: float) -> float:
    """Return KV bytes of one layer on a rank that gives k of its head groups to a pool.

    A group that stays takes ``kv_bytes``; one given away takes ``prompt_bytes``, for prompts still being prefilled.
    """
    total: float = (groups - k) * kv_bytes + k * prompt_bytes
    return total


@kernel
def layers_on_card(
    card_bytes: float, kv_group_bytes: float, tp: int, k: int, cards: int, requests: int, tokens: float
) -> float:
    """Return the layers whose KV (k groups of ``tp`` ranks, in whole request-group pairs) fits on each of ``cards``."""
    pairs = np.ceil(requests * k * tp / cards - ROUNDING)
    layers: float = card_bytes / (pairs / requests * tokens * kv_group_bytes) + ROUNDING
    return layers


@kernel
def roomiest_split(
    room: float, layer_bytes: float, groups: int, tp: int, cards_bytes: float, kv_bytes: float, prompt_bytes: float,
    num_layers: int,
) -> float:  # fmt: skip
    """Return the layers that fit with the best split of head groups, in fractions, between a rank and its cards.

    ``kv_bytes`` are those of one head group and layer, of which ``prompt_bytes`` always stay on the rank. With more
    groups on the cards, more layers fit on the rank and fewer on the cards; the best split is where the two meet.
    """
    if room <= 0.0 or cards_bytes <= 0.0:
        return 0.0
    per_group = tp * kv_bytes / cards_bytes  # of one layer, as a share of the cards' bytes
    k = (layer_bytes + groups * kv_bytes) / (room * per_group + kv_bytes - prompt_bytes)
    k = min(max(k, 1.0), float(groups))
    kept_bytes = (groups - k) * kv_bytes + k * prompt_bytes
    on_rank, on_cards = room / (layer_bytes + kept_bytes), 1.0 / (k * per_group)
    layers: float = np.floor(min(min(on_rank, on_cards) + ROUNDING, float(num_layers)))
    return layers


class Iterations(NamedTuple):
    """The numbers of a mix's iterations that `stretch` needs."""

    number: float  # n_it
    with_chunk: float  # nc
    none_carries: float  # (1 - phi)^M


@kernel
def iterations_of(t: Tables, x: int, f: int) -> Iterations:
    """Return the iteration numbers of a mix with f's number of micro-batches in flight."""
    return Iterations(t.iterations[x], t.chunk_iterations[x], t.without_chunk[x, f])


@kernel
def stretch(n: Iterations, request_s: float, chunk_s: float, least_slack: float, slack_unevenness: float) -> float:
    """Return 1 + sigma of a stage whose repeated layer takes ``request_s`` per request and ``chunk_s`` with a chunk."""
    slack = least_slack
    plain = n.number - n.with_chunk
    if slack_unevenness > 0.0 and plain > 0.0 and n.with_chunk > 0.0:
        plain_s = (request_s - n.with_chunk * chunk_s) / plain
        longest_s = chunk_s - (chunk_s - plain_s) * n.none_carries
        slack = max(slack, slack_unevenness * (longest_s * n.number / request_s - 1.0))
    stretched: float = 1.0 + slack
    return stretched


@kernel
def copies_limit(in_flight: int, max_copies: int) -> int:
    """Return the copies that a stage may have; with one micro-batch in flight more would never take turns."""
    limit: int = 1 if in_flight == 1 else min(max_copies, in_flight)
    return limit


@kernel
def pool_limit(copies: int, own_cards: int, available: int, max_pool: int) -> int:
    """Return the attention workers of a class for each stage copy; ``own_cards`` of the class are the stage's ranks."""
    limit: int = min(max_pool, available - own_cards) // copies
    return limit


@kernel
def has_pools(max_pool: int, micro_batch: int, start: int) -> bool:
    """Return whether stages may have attention workers; prefill replicas have no use for them. ``start``: `Tables`."""
    return max_pool > 0 and micro_batch > 0 and start >= 0


@kernel
def pool_entry(t: Tables, s: int, q: int, k: int, size: int) -> int:
    """Return the table index of k head groups of every rank with the ``size``-th number of cards of class q."""
    entry: int = t.pool_start[s, q] + (k - 1) * t.pool_sizes.shape[0] + size
    return entry


def interval_cap(t: Tables, x: int, f: int, unevenness: float) -> float:
    """Return the longest interval of a configuration that keeps ``sum chunk_s <= unevenness t / n_it`` in the cap."""
    cap = float(t.t_cap[x, f])
    if unevenness < np.inf:
        cap = min(cap, float(t.trip_cap[x, f] * t.iterations[x]) / unevenness)
    return cap


def chunk_cap(t: Tables, x: int, f: int, copies: int) -> float:
    """Return the longest seconds of a stage per copy, in a pipelined replica whose stages have at most ``copies``."""
    return float("inf") if t.in_flight[f] == 1 else float(t.trip_cap[x, f]) / copies


class FixedTimes(NamedTuple):
    """Seconds of a stage besides its repeated layers, in a mean iteration or in one with a chunk (see `Tables`)."""

    hop_s: float
    step_s: float
    last_s: float
    prefix_delta_s: float


@kernel
def fill_fixed(fixed_s: FloatArray, prefix_layers: int, compute_s: float, wire_s: float, times: FixedTimes) -> None:
    """Fill the seconds that a stage takes besides its repeated layers; [4] by role."""
    prefix_s = prefix_layers * max(compute_s + times.prefix_delta_s, wire_s)
    fixed_s[PLAIN] = times.step_s + times.hop_s
    fixed_s[FIRST] = times.step_s + prefix_s
    fixed_s[LAST] = times.step_s + times.hop_s + times.last_s
    fixed_s[BOTH] = times.step_s + prefix_s + times.last_s


# --- what a stage takes; shared by the options of a configuration and by its ceilings


class Ranks(NamedTuple):
    """The ranks of a stage, c copies of rank type s, in one configuration: what does not depend on the pool."""

    s: int
    copies: int
    tp: int
    groups: int
    shares_experts: bool
    room: float  # bytes of a plain stage's rank
    first_bytes: float
    last_bytes: float
    tied_bytes: float
    layer_bytes: float
    state_bytes: float  # of a layer on a rank
    requests: int  # of a copy
    tokens: float  # of KV, of a copy
    kv_bytes: float  # of a head group and layer
    prompt_bytes: float  # the part of these that stays on a rank in any case
    prefix_layers: int
    draft_layers: int
    num_layers: int
    mix: Iterations
    layer_s: float  # without decode attention
    chunk_layer_s: float
    own_s: float  # decode attention without a pool
    wire_s: float  # without a pool
    fixed: FixedTimes
    chunk_fixed: FixedTimes


class PoolTimes(NamedTuple):
    """The times of a mix's stages with a pool, by `pool_entry` or the least over k; see `Tables`."""

    layer_s: FloatArray
    chunk_layer_s: FloatArray
    wire_s: FloatArray
    receives: bool


class Layer(NamedTuple):
    """Seconds of a repeated layer."""

    compute_s: float
    wire_s: float  # to receive its KV
    chunk_s: float  # in an iteration with a chunk


@kernel
def stage_shapes(
    rank_class: IntArray, rank_tp: IntArray, rank_dp: IntArray, available: IntArray, in_flight: int, max_copies: int
) -> IntArray:
    """Return the rank types with the copies that stages may have, as rows of (s, c); a class's are in one run."""
    most = copies_limit(in_flight, max_copies)
    rows, count = np.empty((rank_class.shape[0] * most, 2), np.int64), 0
    for s in range(rank_class.shape[0]):
        if rank_dp[s] > 1 and in_flight > 1:
            continue  # copies that share their experts are one replica, of one stage
        for c in range(1, min(most, available[rank_class[s]] // rank_tp[s]) + 1):
            rows[count, 0], rows[count, 1] = s, c
            count += 1
    return rows[:count]


@kernel
def ranks_of(t: Tables, x: int, f: int, s: int, c: int) -> Ranks:
    """Return the numbers of a stage with c copies of rank type s."""
    tokens, prompts = t.kv_tokens[x, f, c - 1], t.prompt_tokens[x, f, c - 1]
    return Ranks(
        s, c, t.rank_tp[s], t.rank_groups[s], t.rank_dp[s] > 1, t.room_bytes[s] - t.act_bytes[x, s],
        t.first_bytes[s], t.last_bytes[s] + t.logit_bytes[x, s], t.tied_bytes[s], t.layer_bytes[s],
        t.state_bytes[x, f, c - 1] / t.rank_tp[s], (t.in_flight[f] + c - 1) // c * t.micro_batch[x], tokens,
        tokens * t.kv_group_bytes, prompts * t.kv_group_bytes, t.prefix_layers, t.draft_layers, t.num_layers,
        iterations_of(t, x, f), t.layer_s[x, s], t.chunk.layer_s[x, s], t.own_s[x, s, t.rank_groups[s]],
        t.wire_s[x, s], FixedTimes(t.hop_s[x, s], t.step_s[x, s], t.last_s[x, s], t.prefix_delta_s[x, s]),
        FixedTimes(t.chunk.hop_s[x, s], t.chunk.step_s[x, s], t.chunk.last_s[x, s], t.chunk.prefix_delta_s[x, s]),
    )  # fmt: skip


@kernel
def least_fixed_s(ranks: Ranks) -> float:
    """Return a lower bound on the seconds that a stage of these ranks takes besides its repeated layers."""
    fixed = ranks.fixed
    least: float = fixed.step_s + min(fixed.hop_s, ranks.prefix_layers * (ranks.layer_s + fixed.prefix_delta_s))
    return least


@kernel
def most_layers_with_pool(ranks: Ranks, cards_bytes: float) -> float:
    """Return the layers that fit with the best split of head groups between these ranks and cards."""
    most: float = roomiest_split(
        ranks.room, ranks.layer_bytes, ranks.groups, ranks.tp, cards_bytes, ranks.kv_bytes, ranks.prompt_bytes,
        ranks.num_layers,
    )  # fmt: skip
    return most


@kernel
def layer_alone(ranks: Ranks) -> Layer:
    """Return a layer of a stage without a pool."""
    chunk_s = ranks.chunk_layer_s + ranks.own_s / ranks.mix.number
    return Layer(ranks.layer_s + ranks.own_s, ranks.wire_s, chunk_s)


@kernel
def layer_with_pool(ranks: Ranks, times: PoolTimes, entry: int) -> Layer:
    """Return a layer of a stage with the pool whose times are at ``entry``."""
    wire_s = times.wire_s[entry] if times.receives else 0.0
    return Layer(ranks.layer_s + times.layer_s[entry], wire_s, ranks.chunk_layer_s + times.chunk_layer_s[entry])


# --- listing the options of a configuration: for every rank type and copies, without a pool and then with every pool


class TimeLimits(NamedTuple):
    """Limits on a stage's seconds, and the slack by which these are stretched (see `stretch`).

    A stage with c copies takes at most ``c chunk_cap_s`` in an iteration with a chunk, and at most ``unevenness`` times
    what it takes in a mean one.
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

    `Reach` says what is useful at ``group_price`` [S] and ``card_price`` [N]. An option with a pool is dropped if the
    stage without one, or the fastest or the roomiest smaller pool of the same class, is as fast and has as much room,
    because the option would only cost more (unless cards count, see `Tables`).
    """
    out, count = _empty_options(256), 0
    # What is worked out about one stage; [4] by role.
    on_rank = np.empty((t.own_s.shape[2], 4), np.float64)
    caps, floors = np.empty(4, np.int64), np.ones(4, np.int64)
    fixed_s, chunk_fixed_s = np.empty(4, np.float64), np.empty(4, np.float64)
    times = PoolTimes(t.pool_s[x], t.chunk.pool_s[x], t.pool_wire_s, t.receives[x])
    gives_all, counts, num_sizes = t.gives_all[x], t.keeps_idle_cards, t.pool_sizes.shape[0]
    has_chunk_limits = limits.chunk_cap_s < np.inf or limits.unevenness < np.inf
    least, unevenness = 1.0 + limits.least_slack, limits.unevenness * (1.0 + ROUNDING)
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
                    longest_s, n_it = c * limits.chunk_cap_s, ranks.mix.number
                    if not _limit_layers(
                        floors, caps, layer_s, fixed_s, layer.chunk_s, chunk_fixed_s, longest_s, n_it, unevenness
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
    chunk_fixed_s: FloatArray, longest_s: float, iterations: float, unevenness: float,
) -> bool:  # fmt: skip
    """Narrow ``caps`` and ``floors`` [4] to stages within both time limits, and return whether any role has layers.

    A stage may take at most ``longest_s`` seconds in an iteration with a chunk, and at most ``unevenness`` times a mean
    iteration.
    """
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
    return _most(caps) > 0


@kernel
def _most(caps: IntArray) -> int:
    """Return the largest of the roles' numbers; `max` of an array would count references."""
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
    """Return whether option ``at``, if it is one of ``count``, is as fast and roomy, and allows as few layers."""
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
    """Return the chosen options, in that order; a slice is no copy."""
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
