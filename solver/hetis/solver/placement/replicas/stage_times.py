"""Times of the stages of a shape's replicas under every mix, and lower bounds on their intervals.

A shape is a scope, a kind of rank and a depth. What limits on latency do not change is computed once (`FreeTimes`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hetis.solver.placement.fleet import IntArray
from hetis.solver.placement.replicas.stage_cost import (
    ROUNDING,
    fixed_by_role,
    iterations_of,
    kept_bytes,
    layers_on_cards,
    layers_on_rank,
    pool_entry,
    slack,
)
from hetis.solver.placement.replicas.tables import BOTH, FIRST, BoolArray, CostTables, FloatArray

EXACT = 1e-12  # ratio by which rounding may affect a bound on an interval


@dataclass(frozen=True, slots=True)
class Workers:
    """The attention workers of every stage of a replica: a device class and their number."""

    device_class: int
    size: int  # index of the number of cards in `CostTables.pool_sizes`


@dataclass(frozen=True, slots=True)
class Shape:
    """Replicas of one scope, kind of rank and depth, with the same attention workers at every stage, or none.

    ``ranks`` are the rank types that stages may have; ``counts`` [C, ranks] are the compositions.
    """

    scope: int
    depth: int
    ranks: IntArray
    counts: IntArray

    @property
    def in_flight_index(self) -> int:
        return self.depth - 1


@dataclass(frozen=True, slots=True)
class MixSweep:
    """Settings with which replicas of a shape are tried, one per row.

    Rows have a mix [X] and the head groups of every rank that workers take [X], 0 without workers. ``least_slack`` and
    ``unevenness`` [X] are those of the regime.
    """

    mixes: IntArray
    groups: IntArray
    least_slack: FloatArray
    unevenness: FloatArray


def sweep_of(costs: CostTables, depth: int, mixes: IntArray, groups: IntArray) -> MixSweep:
    """Return every mix with every given number of head groups."""
    # Deeper pipelines have as many micro-batches as stages; a single stage waits only for its own copies.
    kinds = [(costs.mixes[x].role, costs.mixes[x].attention_dp) for x in mixes.tolist()]
    of_kind = {
        kind: costs.regime_together(x) if depth == 1 else costs.regimes(kind[0])[1]
        for kind, x in zip(kinds, mixes.tolist(), strict=True)
    }
    each = len(groups)
    return MixSweep(
        mixes=np.repeat(mixes, each),
        groups=np.tile(groups, len(mixes)),
        least_slack=np.repeat([of_kind[kind].least for kind in kinds], each),
        unevenness=np.repeat([of_kind[kind].unevenness for kind in kinds], each),
    )


class StageTimes(NamedTuple):
    """Stages of rank types R under the X rows of a sweep, including slack.

    Seconds per repeated layer [X, R], seconds besides layers [X, R, 4] by role, and the most repeated layers that fit
    in memory and in a round trip with a chunk [X, R, 4].
    """

    layer_s: FloatArray
    fixed_s: FloatArray
    most: IntArray

    def of_rows(self, rows: IntArray) -> StageTimes:
        """Return those of some rows of the sweep."""
        return StageTimes(self.layer_s[rows], self.fixed_s[rows], self.most[rows])

    def shortest_s(self, num_layers: int, counts: IntArray) -> FloatArray:
        """Return lower bounds on each composition's interval, from fractional layers and the cheapest role; [C, X].

        The bound is inf if the stages have no room for all layers.
        """
        return np.where(self.have_room(num_layers, counts), self.fractional_s(num_layers, counts), np.inf)

    def have_room(self, num_layers: int, counts: IntArray) -> BoolArray:
        """Return whether the stages of compositions have room for all layers; [C, X]."""
        room = counts.astype(float) @ self.most.max(axis=2).T.astype(float)  # numpy multiplies integers slowly
        return np.asarray(room >= num_layers)

    def fractional_s(self, num_layers: int, counts: IntArray) -> FloatArray:
        """Return the lower bounds wherever there is room; [C, X]."""
        return shortest_fractional_s(num_layers, counts, self.layer_s, self.fixed_s.min(2))


class FreeTimes(NamedTuple):
    """`StageTimes` without limits on latency.

    ``most`` [X, R, 4] are the repeated layers that fit in memory, and of an iteration with a chunk there are seconds
    per layer [X, R] and besides [X, R, 4].
    """

    layer_s: FloatArray
    fixed_s: FloatArray
    most: FloatArray
    chunk_s: FloatArray
    beside_s: FloatArray

    def within(self, chunk_cap_s: FloatArray) -> StageTimes:
        """Return the times with the layers that fit in the longest time of a stage with a chunk; [X]."""
        most, cap_s = self.most, chunk_cap_s[:, None, None]
        if np.isfinite(cap_s).any():
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                in_time = (cap_s - self.beside_s) / self.chunk_s[:, :, None] + ROUNDING
            most = np.where(np.isfinite(cap_s), np.minimum(most, in_time), most)
        return StageTimes(self.layer_s, self.fixed_s, np.maximum(0.0, most).astype(np.int64))


def stage_times(costs: CostTables, shape: Shape, sweep: MixSweep, workers: Workers | None) -> StageTimes:
    """Return the times of a shape's stages for a whole sweep; workers need unified mixes."""
    return free_times(costs, shape, sweep, workers).within(chunk_caps(costs, shape, sweep))


def chunk_caps(costs: CostTables, shape: Shape, sweep: MixSweep) -> FloatArray:
    """Return the longest time of a stage with a chunk that keeps the limits; [X]."""
    tables = costs.scopes[shape.scope].tables
    return np.asarray(tables.trip_cap[sweep.mixes, shape.in_flight_index] / shape.depth)


def free_times(costs: CostTables, shape: Shape, sweep: MixSweep, workers: Workers | None) -> FreeTimes:
    """Return the times of a shape's stages for a whole sweep, whatever the limits on latency are."""
    t, f, s, x = costs.scopes[shape.scope].tables, shape.in_flight_index, shape.ranks, sweep.mixes[:, None]
    groups, given = t.rank_groups[s], sweep.groups[:, None]
    kept, on_cards = kept_bytes(t, x, f, s, given), np.full((len(x), len(s)), np.inf)
    if workers is None:
        attention_s, chunk_attention_s = t.own_s[x, s, groups], t.chunk.own_s[x, s, groups]
    else:
        entries = pool_entry(t, s, workers.device_class, given, workers.size)
        attention_s, chunk_attention_s = t.pool_s[x, entries], t.chunk.pool_s[x, entries]
        requests, cards = shape.depth * t.micro_batch[x], int(t.pool_sizes[workers.size])
        on_cards = layers_on_cards(t, workers.device_class, t.rank_tp[s], given, cards, requests, t.kv_tokens[x, f])
    compute_s, chunk_s = t.layer_s[x, s] + attention_s, t.chunk.layer_s[x, s] + chunk_attention_s
    layer_s, has_pool = np.maximum(compute_s, t.wire_s[x, s]), workers is not None
    fixed_s = fixed_by_role(t, t, x, s, compute_s, t.wire_s[x, s], has_pool)
    most = np.minimum(layers_on_rank(t, x, f, s, kept), on_cards[:, :, None])
    if workers is not None:
        most[:, :, [FIRST, BOTH]] = np.minimum(most[:, :, [FIRST, BOTH]], on_cards[:, :, None] - t.prefix_layers)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        beside_s = fixed_by_role(t, t.chunk, x, s, chunk_s, 0.0, has_pool)
    longer = 1.0 + slack(
        iterations_of(t, x, f), layer_s, chunk_s, sweep.least_slack[:, None], sweep.unevenness[:, None]
    )
    return FreeTimes(
        layer_s=layer_s * longer, fixed_s=fixed_s * longer[:, :, None], most=most, chunk_s=chunk_s, beside_s=beside_s
    )


def shortest_fractional_s(num_layers: int, counts: IntArray, layer_s: FloatArray, beside_s: FloatArray) -> FloatArray:
    per_s, stages = 1.0 / layer_s, counts.astype(float)
    found: FloatArray = (num_layers + stages @ (beside_s * per_s).T) / (stages @ per_s.T)
    return found * (1.0 - EXACT)
