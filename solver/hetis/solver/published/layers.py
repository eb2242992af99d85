"""The number of layers per stage of a given pipeline, compiled: the best split, and the setting at which it is best.

A *setting* is a mix x and a number of micro-batches in flight (index f). Stages are in order, each one TP group.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hetis.solver.cost import Regime
from hetis.solver.placement.classes import IntArray
from hetis.solver.placement.tables import FloatArray
from hetis.solver.published.compiled import kernel


class Pipeline(NamedTuple):
    """S stages under X mixes and F numbers in flight, in the cost model.

    ``card_*`` are for attention workers that all stages share: the busiest card's seconds and the fullest card's share
    of memory per layer of each stage; zeros without them.
    """

    num_layers: int
    cut_floor: IntArray  # [num_layers + 1] the last allowed cut at or before each position
    layer_s: FloatArray  # [X, S] seconds of a request in one layer
    fixed_s: FloatArray  # [X, S] seconds of a stage whatever its layers
    chunk_layer_s: FloatArray  # [X, S] both for one iteration with a chunk; zeros except for unified mixes
    chunk_fixed_s: FloatArray  # [X, S]
    room: IntArray  # [X, F, S] layers that fit in memory
    card_s: FloatArray  # [X, S]
    card_share: FloatArray  # [X, F, S]
    prefix_layers: int  # of the first stage, not counted above; on the cards they are layers like any other
    in_flight: IntArray  # [F]
    t_cap: FloatArray  # [X, F] the longest interval that meets the latency limits
    trip_cap: FloatArray  # [X, F] the longest round trip with a chunk that meets them
    iterations: FloatArray  # [X]
    chunk_iterations: FloatArray  # [X]
    without_chunk: FloatArray  # [X, F] the probability that no micro-batch in flight carries a chunk
    full: Regime
    tight: Regime


class LayerSplit(NamedTuple):
    """A split of layers; ``interval_s`` is infinite if none fits, and x and f index the pipeline's arrays."""

    interval_s: float
    x: int
    f: int
    layers: IntArray  # [S]


@kernel
def best_split(p: Pipeline) -> LayerSplit:
    """Return the setting and the split of layers with the shortest interval between completions.

    In a full pipeline each layer goes to the stage that is quickest with it, which makes the slowest stage as quick as
    possible. With a single micro-batch, whose stages work in turn, it goes to the stage where it costs least.
    """
    num_mixes, num_stages = p.layer_s.shape
    best = LayerSplit(np.inf, -1, -1, np.zeros(num_stages, np.int64))
    for x in range(num_mixes):
        for f in range(p.in_flight.shape[0]):
            m = p.in_flight[f]
            if 1 < m < num_stages:
                continue
            layers = _filled(p, x, f)
            if layers.shape[0] == 0 or not _move_cuts(p, x, f, layers):
                continue
            interval = _interval(p, x, f, layers)
            if (
                interval <= p.t_cap[x, f]
                and interval < best.interval_s
                and _chunk_trip(p, x, layers) <= p.trip_cap[x, f]
            ):
                best = LayerSplit(interval, x, f, layers)
    return best


@kernel
def _filled(p: Pipeline, x: int, f: int) -> IntArray:
    """Return the layers of every stage, at least one each, or an empty array if they do not fit."""
    num_stages = p.layer_s.shape[1]
    layers = np.ones(num_stages, np.int64)
    left, total = p.num_layers - num_stages, 0
    for s in range(num_stages):
        if p.room[x, f, s] < 1:
            return np.empty(0, np.int64)
        total += p.room[x, f, s]
    if left < 0 or total < p.num_layers:
        return np.empty(0, np.int64)
    sequential = p.in_flight[f] == 1
    for _ in range(left):
        chosen, least = -1, np.inf
        for s in range(num_stages):
            if layers[s] < p.room[x, f, s]:
                late = p.layer_s[x, s] if sequential else p.fixed_s[x, s] + (layers[s] + 1) * p.layer_s[x, s]
                if late < least:
                    chosen, least = s, late
        layers[chosen] += 1
    return layers


@kernel
def _move_cuts(p: Pipeline, x: int, f: int, layers: IntArray) -> bool:
    """Move every forbidden cut to the last allowed one before it; return whether that leaves a valid split."""
    start, held = 0, 0
    for s in range(layers.shape[0]):
        held += layers[s]
        end = held if s == layers.shape[0] - 1 else p.cut_floor[held]
        layers[s] = end - start
        start = end
        if layers[s] < 1 or layers[s] > p.room[x, f, s]:
            return False
    share = p.prefix_layers * p.card_share[x, f, 0]
    for s in range(layers.shape[0]):
        share += layers[s] * p.card_share[x, f, s]
    fits: bool = share <= 1.0 + 1e-9
    return fits


@kernel
def _chunk_trip(p: Pipeline, x: int, layers: IntArray) -> float:
    """Return the seconds of an iteration with a chunk at all stages."""
    total = 0.0
    for s in range(layers.shape[0]):
        total += layers[s] * p.chunk_layer_s[x, s] + p.chunk_fixed_s[x, s]
    return total


@kernel
def _interval(p: Pipeline, x: int, f: int, layers: IntArray) -> float:
    m = p.in_flight[f]
    regime = p.full if m >= 2 * layers.shape[0] else p.tight
    least = 0.0 if m == 1 else regime.least
    busiest, total, card = 0.0, 0.0, p.prefix_layers * p.card_s[x, 0]
    for s in range(layers.shape[0]):
        longer = 1.0 + (0.0 if m == 1 else _slack(p, x, f, s, regime))
        seconds = longer * (layers[s] * p.layer_s[x, s] + p.fixed_s[x, s])
        busiest = max(busiest, seconds)
        total += seconds
        card += layers[s] * p.card_s[x, s]
    interval: float = max(max(busiest, (1.0 + least) * card), total / m)
    return interval


@kernel
def _slack(p: Pipeline, x: int, f: int, s: int, regime: Regime) -> float:
    """Return sigma of a stage."""
    slack = regime.least
    plain = p.iterations[x] - p.chunk_iterations[x]
    if p.chunk_layer_s[x, s] > 0.0 and plain > 0.0:
        request_s, chunk_s = p.layer_s[x, s], p.chunk_layer_s[x, s]
        plain_s = (request_s - p.chunk_iterations[x] * chunk_s) / plain
        longest_s = chunk_s - (chunk_s - plain_s) * p.without_chunk[x, f]
        slack = max(slack, regime.unevenness * (longest_s * p.iterations[x] / request_s - 1.0))
    return slack
