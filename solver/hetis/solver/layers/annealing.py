"""Simulated annealing over placements, compiled: the layers that every node holds, and its weight for requests.

All layers cost the same, so what matters is how long ranges are and which nodes share them. Moves keep ranges together:
nodes that begin or end at one layer move with it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hetis.solver.layers.compiled import kernel
from hetis.solver.layers.sweep import SweepRoom, rate_of
from hetis.solver.layers.tables import FloatArray, IntArray, LayerTables

MOST_TILT, MOST_WILD_TILT = 8.0, 1000.0  # largest ratio of a node's weight to its KV room per layer, or its inverse
NEW_TILT = 0.2  # share of nodes in a new place that get any weight, with wild weights


class LayerPlacement(NamedTuple):
    """Node i holds ``held[i]`` layers from ``first[i]``, none if 0; ``tilt[i]`` multiplies its weight."""

    first: IntArray
    held: IntArray
    tilt: FloatArray


def copy_of(placement: LayerPlacement) -> LayerPlacement:
    """Return a copy of a placement."""
    return LayerPlacement(placement.first.copy(), placement.held.copy(), placement.tilt.copy())


@kernel
def weights(
    placement: LayerPlacement, kind: IntArray, tables: LayerTables, flow_only: bool, weight: FloatArray
) -> None:
    """Fill ``weight``: KV room per layer, or the measured rate if only flow counts, times tilt."""
    for i in range(weight.shape[0]):
        if placement.held[i] > 0:
            t, k = kind[i], placement.held[i] - 1
            even = 1.0 / tables.rate_s[t, k] if flow_only else tables.kv[t, k] / placement.held[i]
            weight[i] = even * placement.tilt[i]


@kernel
def worth(
    placement: LayerPlacement,
    kind: IntArray,
    tables: LayerTables,
    flow_only: bool,
    weight: FloatArray,
    sweep: SweepRoom,
) -> float:
    """Return the requests per second of a placement."""
    weights(placement, kind, tables, flow_only, weight)
    return rate_of(placement.first, placement.held, weight, kind, tables, flow_only, sweep)


@kernel
def anneal(
    placement: LayerPlacement,
    best: LayerPlacement,
    kind: IntArray,
    tables: LayerTables,
    flow_only: bool,
    sweep: SweepRoom,
    num_moves: int,
    hot: float,
    cold: float,
    wild: bool,
    seed: int,
) -> float:
    """Change ``placement`` by random moves and ``best`` to the best one found; return the rate of ``best``.

    A move that loses a share x of the rate is kept with probability exp(-x / temperature). The temperature falls
    geometrically from ``hot`` to ``cold``. With ``wild``, weights may be far from KV room per layer, which fleets of
    very different nodes need and which costs others time.
    """
    np.random.seed(seed)
    n = placement.first.shape[0]
    weight = np.ones(n)
    trial = LayerPlacement(placement.first.copy(), placement.held.copy(), placement.tilt.copy())
    rate = worth(placement, kind, tables, flow_only, weight, sweep)
    best_rate = worth(best, kind, tables, flow_only, weight, sweep)
    for step in range(num_moves):
        temperature = hot * (cold / hot) ** (step / num_moves)
        _copy(placement, trial)
        if not _move(trial, kind, tables, wild):
            continue
        found = worth(trial, kind, tables, flow_only, weight, sweep)
        if found >= rate or (found > 0.0 and np.random.random() < np.exp(np.log(found / rate) / temperature)):
            rate = found
            _copy(trial, placement)
            if rate > best_rate:
                best_rate = rate
                _copy(placement, best)
    return best_rate


@kernel
def polish(
    placement: LayerPlacement, kind: IntArray, tables: LayerTables, flow_only: bool, sweep: SweepRoom, num_rounds: int
) -> float:
    """Tilt weights one by one, in ever smaller steps, as long as that pays; return the rate."""
    weight = np.ones(placement.first.shape[0])
    rate = worth(placement, kind, tables, flow_only, weight, sweep)
    step = 0.5
    for _ in range(num_rounds):
        gained = False
        for i in range(placement.first.shape[0]):
            if placement.held[i] == 0:
                continue
            before = placement.tilt[i]
            for factor in (1 + step, 1 / (1 + step)):
                placement.tilt[i] = before * factor
                found = worth(placement, kind, tables, flow_only, weight, sweep)
                if found > rate * (1 + 1e-12):
                    rate, gained = found, True
                    break
                placement.tilt[i] = before
        if not gained:
            step *= 0.5
        if step < 1e-4:
            break
    return rate


@kernel
def _copy(source: LayerPlacement, target: LayerPlacement) -> None:
    for i in range(len(source.first)):
        target.first[i], target.held[i], target.tilt[i] = source.first[i], source.held[i], source.tilt[i]


@kernel
def _move(trial: LayerPlacement, kind: IntArray, tables: LayerTables, wild: bool) -> bool:
    """Change ``trial`` at random; return False if the move is not possible."""
    first, held = trial.first, trial.held
    n = first.shape[0]
    i, j = np.random.randint(n), np.random.randint(n)
    which = np.random.random()
    if which < 0.22:
        return _join(trial, kind, tables, i, j, wild)
    if which < 0.36:
        return _swap(trial, kind, tables, i, j, wild)
    if which < 0.52:
        return _trade(trial, kind, tables, i, j)
    if which < 0.66:
        return _shift_boundary(trial, kind, tables, first[i] + held[i], 1 if np.random.random() < 0.5 else -1)
    if which < 0.76:
        return _stretch(trial, kind, tables, i)
    if which < 0.86:
        most = MOST_WILD_TILT if wild else MOST_TILT
        trial.tilt[i] = min(max(trial.tilt[i] * np.exp(0.4 * np.random.randn()), 1 / most), most)
        return bool(held[i] > 0)
    if which < 0.92:
        return _split(trial, i)
    if which < 0.98:
        return _merge(trial, kind, tables, i, j)
    held[i] = 0
    return True


@kernel
def _new_tilt(wild: bool) -> float:
    """Draw the tilt of a node in a new place: 1, by its KV room, or any."""
    if wild and np.random.random() < NEW_TILT:
        return float(MOST_WILD_TILT ** np.random.uniform(-1.0, 1.0))
    return 1.0


@kernel
def _join(trial: LayerPlacement, kind: IntArray, tables: LayerTables, i: int, j: int, wild: bool) -> bool:
    """Give node i the range of node j, or as much of its beginning as node i can hold."""
    if i == j or trial.held[j] == 0:
        return False
    trial.first[i] = trial.first[j]
    trial.held[i] = min(trial.held[j], tables.most[kind[i]])
    trial.tilt[i] = _new_tilt(wild)
    return True


@kernel
def _swap(trial: LayerPlacement, kind: IntArray, tables: LayerTables, i: int, j: int, wild: bool) -> bool:
    """Swap the places of two nodes of different types."""
    if kind[i] == kind[j] or trial.held[i] > tables.most[kind[j]] or trial.held[j] > tables.most[kind[i]]:
        return False
    trial.first[i], trial.first[j] = trial.first[j], trial.first[i]
    trial.held[i], trial.held[j] = trial.held[j], trial.held[i]
    trial.tilt[i], trial.tilt[j] = _new_tilt(wild), _new_tilt(wild)
    return True


@kernel
def _trade(trial: LayerPlacement, kind: IntArray, tables: LayerTables, i: int, j: int) -> bool:
    """Move one layer from the range of node i to that of node j, and shift all ranges in between."""
    first, held = trial.first, trial.held
    if held[i] < 2 or held[j] == 0 or (first[i] == first[j] and held[i] == held[j]):
        return False
    giver, given = first[i], held[i]
    taker, taken = first[j], held[j]
    if giver + given > taker and taker + taken > giver:
        return False  # they overlap
    for m in range(first.shape[0]):
        if held[m] == 0:
            continue
        if first[m] == giver and held[m] == given:
            held[m] -= 1
            if taker < giver:
                first[m] += 1
        elif first[m] == taker and held[m] == taken:
            if held[m] == tables.most[kind[m]]:
                return False
            held[m] += 1
            if taker > giver:
                first[m] -= 1
        elif giver + given <= first[m] and first[m] + held[m] <= taker:
            first[m] -= 1
        elif taker + taken <= first[m] and first[m] + held[m] <= giver:
            first[m] += 1
    return True


@kernel
def _shift_boundary(trial: LayerPlacement, kind: IntArray, tables: LayerTables, boundary: int, by: int) -> bool:
    """Shift the end or the beginning of all ranges at a layer by ``by``."""
    first, held = trial.first, trial.held
    if boundary <= 0 or boundary >= tables.num_layers:
        return False
    for m in range(first.shape[0]):
        if held[m] == 0:
            continue
        if first[m] + held[m] == boundary:
            held[m] += by
        elif first[m] == boundary:
            first[m] += by
            held[m] -= by
        else:
            continue
        if held[m] < 1 or held[m] > tables.most[kind[m]] or first[m] + held[m] > tables.num_layers:
            return False
    return True


@kernel
def _stretch(trial: LayerPlacement, kind: IntArray, tables: LayerTables, i: int) -> bool:
    """Shift the beginning or the end of node i alone, or both, by one layer."""
    if trial.held[i] == 0:
        return False
    by, which = 1 if np.random.random() < 0.5 else -1, np.random.randint(3)
    if which != 0:
        trial.first[i] += by
        trial.held[i] -= by
    if which != 1:
        trial.held[i] += by
    end = trial.first[i] + trial.held[i]
    return bool(trial.first[i] >= 0 and end <= tables.num_layers and 1 <= trial.held[i] <= tables.most[kind[i]])


@kernel
def _split(trial: LayerPlacement, i: int) -> bool:
    """Split the nodes of one range into two stages."""
    first, held = trial.first[i], trial.held[i]
    if held < 2:
        return False
    left = np.random.randint(1, held)
    for m in range(trial.first.shape[0]):
        if trial.first[m] == first and trial.held[m] == held:
            if np.random.random() * held < left:
                trial.held[m] = left
            else:
                trial.first[m] += left
                trial.held[m] -= left
    return True


@kernel
def _merge(trial: LayerPlacement, kind: IntArray, tables: LayerTables, i: int, j: int) -> bool:
    """Let the nodes of two adjacent ranges hold both."""
    first, held = trial.first, trial.held
    if held[i] == 0 or held[j] == 0 or first[i] + held[i] != first[j]:
        return False
    begin, left, middle, right = first[i], held[i], first[j], held[j]
    for m in range(first.shape[0]):
        if (first[m] == begin and held[m] == left) or (first[m] == middle and held[m] == right):
            if left + right > tables.most[kind[m]]:
                return False
            first[m], held[m] = begin, left + right
    return True
