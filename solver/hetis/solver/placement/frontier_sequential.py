"""Exact search over usage vectors, compiled, for replicas with a single micro-batch, where t is the sum of stage times.

One dynamic program finds the least sum for every sub-fleet, so there is no search over intervals.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hetis.solver.placement.classes import IntArray
from hetis.solver.placement.compiled import kernel
from hetis.solver.placement.frontier import entry_layers, reach
from hetis.solver.placement.lattice import NOTHING_BEFORE, Entries, Lattice, within
from hetis.solver.placement.options import Options
from hetis.solver.placement.tables import BOTH, FIRST, LAST, PLAIN, BoolArray, FloatArray, Tables


@kernel
def _worth_s(lattice: Lattice, feasible: BoolArray, needed: FloatArray, best_rate: FloatArray) -> FloatArray:
    """Return, per usage u, the longest interval that still improves a feasible sub-fleet containing u; [V]."""
    num_vectors = feasible.shape[0]
    worth = np.zeros(num_vectors, np.float64)
    for v in range(num_vectors - 1, -1, -1):
        if feasible[v]:
            rate = max(needed[v], best_rate[v])
            worth[v] = 1.0 / rate if rate > 0.0 else np.inf
        for row in range(lattice.limits.shape[0]):
            if lattice.digits[v, row] < lattice.limits[row]:
                worth[v] = max(worth[v], worth[v + lattice.strides[row]])
    return worth


class Sums(NamedTuple):
    """The least sums of stage times by usage and layers covered, and where each came from."""

    seconds: FloatArray  # [V, L + 1]
    back_entry: IntArray  # [V, L + 1] entry of the last stage; -1: copied from a smaller usage
    back_usage: IntArray  # [V, L + 1] usage before it, or that smaller usage
    back_position: IntArray  # [V, L + 1] layers before it
    option: IntArray  # [E, 4, L + 1] quickest option of an entry for l layers in a role


@kernel
def _offer(sums: Sums, v: int, pos: int, seconds: float, entry: int, usage: int, before: int) -> None:
    if seconds < sums.seconds[v, pos]:
        sums.seconds[v, pos] = seconds
        sums.back_entry[v, pos], sums.back_usage[v, pos], sums.back_position[v, pos] = entry, usage, before


@kernel
def least_sums(t: Tables, lattice: Lattice, o: Options, entries: Entries, limits_s: FloatArray) -> Sums:
    """Return the least sums of stage times that cover ``pos`` layers with each sub-fleet.

    Partial sums that cannot stay within ``limits_s`` [V] are dropped.
    """
    num_vectors = lattice.digits.shape[0]
    num_layers = t.num_layers
    count = entries.usage.shape[0]
    least = np.full((count, 4, num_layers + 1), np.inf)
    option = np.full((count, 4, num_layers + 1), -1, np.int64)
    most = np.zeros((count, 4), np.int64)
    fastest = np.inf
    for i in range(o.rank.shape[0]):
        e = entries.option[i]
        if e < 0:
            continue
        fastest = min(fastest, o.layer_s[i])
        for role in range(4):
            most[e, role] = max(most[e, role], o.max_layers[i, role])
            for n in range(o.min_layers[i, role], o.max_layers[i, role] + 1):
                took = n * o.layer_s[i] + o.fixed_s[i, role]
                if took < least[e, role, n]:
                    least[e, role, n], option[e, role, n] = took, i
    shape = (num_vectors, num_layers + 1)
    seconds = np.full(shape, np.inf)
    sums = Sums(seconds, np.full(shape, -1, np.int64), np.full(shape, -1, np.int64), np.zeros(shape, np.int64), option)
    for v in range(num_vectors):
        for row in range(lattice.limits.shape[0]):
            if lattice.inherits and lattice.digits[v, row] > 0:
                below = v - lattice.strides[row]
                for pos in range(1, num_layers + 1):
                    _offer(sums, v, pos, sums.seconds[below, pos], -1, below, pos)
        for e in range(count):
            if not within(lattice, entries.usage[e], v):
                continue
            rest = v - entries.usage[e]
            if lattice.inherits or rest == 0:
                _offer(sums, v, num_layers, least[e, BOTH, num_layers], e, NOTHING_BEFORE, 0)
                for n in range(1, min(most[e, FIRST], num_layers - 1) + 1):
                    if t.cut_floor[n] == n:
                        _offer(sums, v, n, least[e, FIRST, n], e, NOTHING_BEFORE, 0)
            for pos in range(1, num_layers):
                so_far = sums.seconds[rest, pos]
                if so_far + (num_layers - pos) * fastest > limits_s[v]:
                    continue
                for n in range(1, min(most[e, PLAIN], num_layers - 1 - pos) + 1):
                    if least[e, PLAIN, n] == np.inf:
                        continue
                    reached_s = so_far + least[e, PLAIN, n]
                    if reached_s + (num_layers - pos - n) * fastest > limits_s[v]:
                        break  # further layers here only take longer
                    if t.cut_floor[pos + n] == pos + n:
                        _offer(sums, v, pos + n, reached_s, e, rest, pos)
                _offer(sums, v, num_layers, so_far + least[e, LAST, num_layers - pos], e, rest, pos)
    return sums


@kernel
def explore_sequential(
    t: Tables, lattice: Lattice, o: Options, entries: Entries, interval_cap_s: float, needed: FloatArray,
    best_rate: FloatArray, best_tag: IntArray, best_interval: FloatArray, tag: int,
) -> None:  # fmt: skip
    """Do what `explore` does for a single micro-batch, where the least t is the least sum of stage times."""
    layers, _ = entry_layers(t, o, entries, np.inf)
    memory = reach(t, lattice, entries, layers, 0)
    worth = np.minimum(_worth_s(lattice, memory.closing >= 0, needed, best_rate), interval_cap_s)
    fastest = np.inf
    for i in range(o.rank.shape[0]):
        if entries.option[i] >= 0:
            fastest = min(fastest, o.layer_s[i])
    if not t.num_layers * fastest < worth[0]:
        return
    sums = least_sums(t, lattice, o, entries, worth)
    for v in range(worth.shape[0]):
        interval = max(sums.seconds[v, t.num_layers], t.t_floor)
        if interval <= interval_cap_s and 1.0 / interval > best_rate[v]:
            best_rate[v], best_tag[v], best_interval[v] = 1.0 / interval, tag, interval


@kernel
def sequential_stages(t: Tables, lattice: Lattice, o: Options, entries: Entries, v: int, interval_s: float) -> IntArray:
    """Return the stages behind the least sum of sub-fleet v, first to last, [., 2] of (option, layers)."""
    sums = least_sums(t, lattice, o, entries, np.full(lattice.digits.shape[0], interval_s * (1.0 + 1e-9)))
    reverse = np.empty((t.num_layers, 2), np.int64)
    pos, count = t.num_layers, 0
    while pos > 0:
        while sums.back_entry[v, pos] < 0:
            v = sums.back_usage[v, pos]
        e, before, usage = sums.back_entry[v, pos], sums.back_position[v, pos], sums.back_usage[v, pos]
        is_first, is_last = usage == NOTHING_BEFORE, pos == t.num_layers
        role = (BOTH if is_first else LAST) if is_last else (FIRST if is_first else PLAIN)
        reverse[count, 0], reverse[count, 1] = sums.option[e, role, pos - before], pos - before
        count += 1
        pos, v = before, usage
    return reverse[:count][::-1].copy()
