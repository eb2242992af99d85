"""A pipeline of TP groups priced under the cost model: the search's tables, gathered for the given stages."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hetis.solver.placement.classes import IntArray
from hetis.solver.placement.options import kept_bytes, layers_on_rank
from hetis.solver.placement.tables import Atlas, FloatArray, Tables
from hetis.solver.placement.template import roles
from hetis.solver.plan import Role
from hetis.solver.published.compiled import kernel
from hetis.solver.published.layers import Pipeline

Ranks = tuple[int, ...]  # rank type (index into `Atlas.ranks`) of every stage in order


@dataclass(frozen=True, slots=True)
class ReplicaDuty:
    """The role and zone of wanted replicas, and the mixes of the family that serve them."""

    role: Role
    scope: int  # index into `Atlas.scopes`, of one zone
    mixes: tuple[int, ...]  # indices into `Atlas.mixes`


def duty_of(atlas: Atlas, role: Role, zone: str, *, sends_afar: bool = False) -> ReplicaDuty:
    """Return the duty of a role in a zone; with ``sends_afar`` a prefill replica may send KV to all zones."""
    scope = next(i for i, scope in enumerate(atlas.scopes) if scope.zones == (zone,) and role in scope.roles)
    mixes = [x for x, mix in enumerate(atlas.mixes) if mix.role is role and mix.sends_afar == sends_afar]
    return ReplicaDuty(role, scope, tuple(mixes))


def pipeline_of(atlas: Atlas, duty: ReplicaDuty, ranks: Ranks) -> Pipeline:
    """Return times and room of a pipeline without attention workers under every mix of a duty."""
    t = atlas.scopes[duty.scope].tables
    x, s = np.array(duty.mixes, dtype=np.int64), np.array(ranks, dtype=np.int64)
    compute_s = t.layer_s[x[:, None], s] + t.own_s[x[:, None], s, t.rank_groups[s]]
    chunk_s = t.chunk.layer_s[x[:, None], s] + t.own_s[x[:, None], s, t.rank_groups[s]] / t.iterations[x][:, None]
    return priced(atlas, duty, ranks, compute_s, chunk_s, np.zeros(len(ranks), dtype=np.int64))


def priced(
    atlas: Atlas, duty: ReplicaDuty, ranks: Ranks, compute_s: FloatArray, chunk_s: FloatArray, given: IntArray
) -> Pipeline:
    """Return a pipeline of layers with ``compute_s`` [X, S] per request and ``chunk_s`` [X, S] with a chunk.

    Its stages give away ``given`` [S] head groups per rank.
    """
    t = atlas.scopes[duty.scope].tables
    x, s = np.array(duty.mixes, dtype=np.int64), np.array(ranks, dtype=np.int64)
    places = np.array(roles(len(ranks)), dtype=np.int64)
    is_first, is_last = np.arange(len(s)) == 0, np.arange(len(s)) == len(s) - 1
    at = x[:, None], s
    layer_s = np.maximum(compute_s, t.wire_s[at])
    prefix_s = t.prefix_layers * np.maximum(compute_s + t.prefix_delta_s[at], t.wire_s[at])
    fixed_s = t.step_s[at] + np.where(is_first, prefix_s, t.hop_s[at])
    fixed_s = fixed_s + np.where(is_last, t.last_s[at], 0.0)
    chunk_fixed_s = t.chunk.step_s[at] + np.where(
        is_first, t.prefix_layers * (chunk_s + t.chunk.prefix_delta_s[at]), t.chunk.hop_s[at]
    )
    chunk_fixed_s = chunk_fixed_s + np.where(is_last, t.chunk.last_s[at], 0.0)
    room = np.empty((len(x), len(t.in_flight), len(s)), dtype=np.int64)
    _fill_rooms(t, x, s, places, given, room)
    full, tight = atlas.regimes(duty.role)
    return Pipeline(
        num_layers=t.num_layers,
        cut_floor=t.cut_floor,
        layer_s=layer_s,
        fixed_s=fixed_s,
        chunk_layer_s=chunk_s,
        chunk_fixed_s=chunk_fixed_s,
        room=room,
        card_s=np.zeros_like(layer_s),
        card_share=np.zeros(room.shape),
        prefix_layers=t.prefix_layers,
        in_flight=t.in_flight,
        t_cap=t.t_cap[x],
        trip_cap=t.trip_cap[x],
        iterations=t.iterations[x],
        chunk_iterations=t.chunk_iterations[x],
        without_chunk=t.without_chunk[x],
        full=full,
        tight=tight,
    )


@kernel
def _fill_rooms(t: Tables, x: IntArray, s: IntArray, places: IntArray, given: IntArray, room: IntArray) -> None:
    """Fill the layers that fit on a rank of every stage, for every mix and number in flight."""
    for i in range(x.shape[0]):
        for f in range(t.in_flight.shape[0]):
            for j in range(s.shape[0]):
                kept = kept_bytes(t, x[i], f, s[j], 1, given[j])
                room[i, f, j] = int(layers_on_rank(t, x[i], s[j], kept, places[j]))
