"""The cost of stages: the memory and the seconds that they take on their GPUs, looked up in `Tables`.

Letters are those of `docs/cost-model.md`. A stage is a rank type s under a mix x with the f-th number of micro-batches
in flight, optionally with p cards of class q, its pool, that take k head groups of every rank.
How many layers fit and how long they take is computed only here, for pipelines that are searched, for equal stages, for
published heuristics and for replicas that are known. Arguments are numbers or arrays that are broadcast together.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from hetis.solver.placement.fleet import IntArray
from hetis.solver.placement.replicas.tables import BOTH, FIRST, LAST, PLAIN, ChunkTables, FloatArray, Tables

ROUNDING = 1e-9  # tolerance for rounding in floor and ceil, far below one layer or one head group
Indices = int | IntArray
Numbers = float | FloatArray | IntArray


def stage_roles(count: int) -> list[int]:
    """Return the roles of ``count`` stages in order."""
    return [BOTH] if count == 1 else [FIRST, *[PLAIN] * (count - 2), LAST]


def layers_on_rank(t: Tables, x: Indices, f: Indices, s: Indices, kept_bytes: Numbers) -> FloatArray:
    """Return the repeated layers that fit on a rank in every role, unrounded; [.., 4].

    ``kept_bytes`` is KV bytes of one layer. Of prefix and drafting layers it counts beside their weights.
    """
    kept = np.asarray(kept_bytes)
    first = t.first_bytes[s] + t.prefix_layers * kept
    last = t.last_bytes[s] + t.logit_bytes[x, f, s] + t.draft_layers * kept
    plain = t.room_bytes[s] - t.act_bytes[x, f, s] + 0.0 * kept
    room = np.stack([plain, plain - first, plain - last, plain - first - last + t.tied_bytes[s]], axis=-1)
    layers = room / (t.layer_bytes[s] + kept)[..., None] + ROUNDING
    return np.asarray(np.clip(layers, 0.0, float(t.num_layers)))


def kept_bytes(t: Tables, x: Indices, f: Indices, s: Indices, k: Indices) -> FloatArray:
    """Return bytes of KV and states of one layer on a rank that gives k head groups to its pool.

    A group that stays takes all its KV; one given away takes that of prompts still being prefilled.
    """
    kept = ((t.rank_groups[s] - k) * t.kv_tokens[x, f] + k * t.prompt_tokens[x, f]) * t.kv_group_bytes
    return np.asarray(kept + state_on_rank(t, x, f, s))


def state_on_rank(t: Tables, x: Indices, f: Indices, s: Indices) -> FloatArray:
    """Return the bytes per layer that requests occupy on a rank independently of their context."""
    return np.asarray(t.state_bytes[x, f] / t.state_ranks[s])


def layers_on_cards(
    t: Tables, q: int, tp: Indices, k: Indices, cards: int, requests: Numbers, tokens: Numbers
) -> FloatArray:
    """Return the layers whose KV (k groups of ``tp`` ranks, in whole request-group pairs) fits on each of ``cards``."""
    pairs = np.ceil(np.asarray(requests) * k * tp / cards - ROUNDING)
    return np.asarray(t.worker_room_bytes[q] / (pairs / requests * tokens * t.kv_group_bytes) + ROUNDING)


def pool_entry(t: Tables, s: Indices, q: int, k: Indices, size: int) -> Any:
    """Return the table index of k head groups of every rank with the ``size``-th number of cards of class q."""
    return t.pool_start[s, q] + (np.asarray(k) - 1) * t.pool_sizes.shape[0] + size


def fixed_by_role(
    t: Tables, times: Tables | ChunkTables, x: Indices, s: Indices, compute_s: Numbers, wire_s: Numbers,
    has_pool: Numbers | bool,
) -> FloatArray:  # fmt: skip
    """Return the seconds that a stage takes besides its repeated layers, in every role; [.., 4].

    They are those of a mean iteration, or with ``times`` of a chunk those of one with a chunk, of a stage whose layers
    compute for ``compute_s`` while their KV is on the wire for ``wire_s``.
    """
    hop_s, step_s = times.hop_s[x, s], times.step_s[x, s] + has_pool * times.plugin_step_s[x]
    last_s = times.last_s[x, s] + has_pool * times.plugin_last_s[x]
    prefix_s = t.prefix_layers * np.maximum(compute_s + times.prefix_delta_s[x, s], wire_s)
    return np.stack([step_s + hop_s, step_s + prefix_s, step_s + hop_s + last_s, step_s + prefix_s + last_s], axis=-1)


class Iterations(NamedTuple):
    """The numbers of mixes' iterations that `slack` needs."""

    number: FloatArray  # n_it
    with_chunk: FloatArray  # nc
    none_carries: FloatArray  # (1 - phi)^M


def iterations_of(t: Tables, x: Indices, f: Indices) -> Iterations:
    """Return the iteration numbers of mixes with f's number of micro-batches in flight."""
    return Iterations(t.iterations[x], t.chunk_iterations[x], t.without_chunk[x, f])


def slack(
    iterations: Iterations, request_s: FloatArray, chunk_s: FloatArray, least: Numbers, unevenness: Numbers
) -> FloatArray:
    """Return sigma of stages whose repeated layer takes ``request_s`` per request and ``chunk_s`` with a chunk.

    ``least`` and ``unevenness`` are those of the regime.
    """
    n_it, nc, none_carries = iterations
    plain = n_it - nc
    with np.errstate(divide="ignore", invalid="ignore"):
        plain_s = (request_s - nc * chunk_s) / plain
        longest_s = chunk_s - (chunk_s - plain_s) * none_carries
        uneven = np.asarray(unevenness) * (longest_s * n_it / request_s - 1.0)
    applies = (np.asarray(unevenness) > 0.0) & (plain > 0.0) & (nc > 0.0)
    return np.where(applies, np.maximum(least, uneven), least)
