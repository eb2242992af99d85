"""The cost of one stage, compiled: the memory and the seconds that it takes on its GPUs, looked up in `Tables`.

Letters are those of `docs/cost-model.md`. A *configuration* is a mix x and a number of micro-batches in flight (index
f). A stage is c copies of a rank type s, optionally with p cards of class q per copy, its pool, that take k head groups
of every rank. How many layers fit and how long they take is computed only here, for the options of a configuration, its
ceilings, and replicas whose stages are known.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hetis.solver.placement.compiled import kernel
from hetis.solver.placement.fleet import IntArray
from hetis.solver.placement.tables import BOTH, FIRST, LAST, PLAIN, FloatArray, Tables

ROUNDING = 1e-9  # tolerance for rounding in floor and ceil, far below one layer or one head group


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
def layers_on_rank(t: Tables, x: int, f: int, s: int, kept_bytes: float, role: int) -> float:
    """Return the repeated layers that fit on a rank in a role, unrounded; ``kept_bytes`` is KV bytes of one layer."""
    others = t.prefix_layers if role in (FIRST, BOTH) else 0
    if role in (LAST, BOTH):
        others += t.draft_layers
    last = t.last_bytes[s] + t.logit_bytes[x, f, s]
    room = room_of_role(t.room_bytes[s] - t.act_bytes[x, f, s], t.first_bytes[s], last, t.tied_bytes[s], role)
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
    """Return the bytes per layer that requests occupy on a rank of a stage copy independently of their context."""
    state: float = t.state_bytes[x, f, copies - 1] / t.state_ranks[s]
    return state


# The functions below run in inner loops and take only numbers: passing `Tables` would count references to every array.


@kernel
def layers_in_room(room: float, layer_bytes: float, kept_bytes: float, other_layers: int, num_layers: int) -> float:
    """Return the repeated layers that fit in a rank's ``room``, unrounded; ``kept_bytes`` is KV bytes of one layer.

    ``other_layers`` are those whose weights are not counted in ``room`` but whose KV is: prefix and drafting layers.
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
    per_group = tp * kv_bytes / cards_bytes  # for one layer, as a share of the cards' bytes
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
    """Return the copies that a stage may have; with one micro-batch in flight further copies would never take turns."""
    limit: int = 1 if in_flight == 1 else min(max_copies, in_flight)
    return limit


@kernel
def pool_limit(copies: int, own_cards: int, available: int, max_pool: int) -> int:
    """Return the attention workers of a class per stage copy; ``own_cards`` GPUs of the class are the stage's ranks."""
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
    """Return the longest interval of a configuration that keeps ``sum chunk_s <= unevenness t / n_it`` in the cap.

    A single stage keeps its own limit, and then this one, too, where ``unevenness`` is 1.
    """
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


# --- a stage of given ranks, without and with a pool; shared by the options of a configuration and its ceilings


class Ranks(NamedTuple):
    """The ranks of a stage, c copies of rank type s, in one configuration: what does not depend on the pool."""

    s: int
    copies: int
    tp: int
    groups: int
    shares_experts: bool
    room: float  # bytes on a rank of a plain stage
    first_bytes: float
    last_bytes: float
    tied_bytes: float
    layer_bytes: float
    state_bytes: float  # state bytes of a layer on a rank
    requests: int  # requests of a copy
    tokens: float  # KV tokens of a copy
    kv_bytes: float  # KV bytes of a head group and layer
    prompt_bytes: float  # the part of ``kv_bytes`` that stays on a rank in any case
    prefix_layers: int
    draft_layers: int
    num_layers: int
    mix: Iterations
    layer_s: float  # excludes decode attention
    chunk_layer_s: float
    own_s: float  # decode attention without a pool
    chunk_own_s: float
    wire_s: float  # wire time without a pool
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
    wire_s: float  # seconds to receive its KV
    chunk_s: float  # seconds in an iteration with a chunk


@kernel
def stage_shapes(
    rank_class: IntArray, rank_tp: IntArray, rank_dp: IntArray, available: IntArray, in_flight: int, max_copies: int
) -> IntArray:
    """Return the rank types with the copies that stages may have, as rows of (s, c), those of a class in sequence."""
    most = copies_limit(in_flight, max_copies)
    rows, count = np.empty((rank_class.shape[0] * most, 2), np.int64), 0
    for s in range(rank_class.shape[0]):
        if rank_dp[s] > 1 and in_flight > 1:
            continue  # copies that share their experts form a replica of one stage
        for c in range(1, min(most, available[rank_class[s]] // rank_tp[s]) + 1):
            rows[count, 0], rows[count, 1] = s, c
            count += 1
    return rows[:count]


@kernel
def ranks_of(t: Tables, x: int, f: int, s: int, c: int) -> Ranks:
    """Return the numbers of a stage with c copies of rank type s."""
    tokens, prompts = t.kv_tokens[x, f, c - 1], t.prompt_tokens[x, f, c - 1]
    return Ranks(
        s, c, t.rank_tp[s], t.rank_groups[s], t.rank_dp[s] > 1, t.room_bytes[s] - t.act_bytes[x, f, s],
        t.first_bytes[s], t.last_bytes[s] + t.logit_bytes[x, f, s], t.tied_bytes[s], t.layer_bytes[s],
        t.state_bytes[x, f, c - 1] / t.state_ranks[s], (t.in_flight[f] + c - 1) // c * t.micro_batch[x], tokens,
        tokens * t.kv_group_bytes, prompts * t.kv_group_bytes, t.prefix_layers, t.draft_layers, t.num_layers,
        iterations_of(t, x, f), t.layer_s[x, s], t.chunk.layer_s[x, s], t.own_s[x, s, t.rank_groups[s]],
        t.chunk.own_s[x, s, t.rank_groups[s]], t.wire_s[x, s],
        FixedTimes(t.hop_s[x, s], t.step_s[x, s], t.last_s[x, s], t.prefix_delta_s[x, s]),
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
    return Layer(ranks.layer_s + ranks.own_s, ranks.wire_s, ranks.chunk_layer_s + ranks.chunk_own_s)


@kernel
def layer_with_pool(ranks: Ranks, times: PoolTimes, entry: int) -> Layer:
    """Return a layer of a stage with the pool whose times are at ``entry``."""
    wire_s = times.wire_s[entry] if times.receives else 0.0
    return Layer(ranks.layer_s + times.layer_s[entry], wire_s, ranks.chunk_layer_s + times.chunk_layer_s[entry])
