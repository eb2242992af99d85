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
def pool_entry(t: Tables, s: int, q: int, k: int, size: int) -> int:
    """Return the table index of k head groups of every rank with the ``size``-th number of cards of class q."""
    entry: int = t.pool_start[s, q] + (k - 1) * t.pool_sizes.shape[0] + size
    return entry


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
