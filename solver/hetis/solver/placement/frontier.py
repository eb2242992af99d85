"""Exact search over usage vectors, compiled: the best pipelined replica of *every* sub-fleet of a small fleet.

For one configuration and one interval t, a dynamic program determines for all sub-fleets at once whether they carry the
model (`reach`). Bisection over t then closes in on the best rate of each sub-fleet that still matters (`explore`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hetis.solver.placement.classes import IntArray
from hetis.solver.placement.compiled import kernel
from hetis.solver.placement.cover import layers_in_time
from hetis.solver.placement.lattice import NOTHING_BEFORE, Entries, Lattice, within
from hetis.solver.placement.options import Options
from hetis.solver.placement.tables import BOTH, FIRST, LAST, PLAIN, BoolArray, FloatArray, Tables


@kernel
def entry_layers(t: Tables, o: Options, entries: Entries, interval_s: float) -> tuple[IntArray, IntArray]:
    """Return the most layers of each entry in each role, and the option that carries them; shapes [E, 4]."""
    count = entries.usage.shape[0]
    layers = np.zeros((count, 4), np.int64)
    option = np.full((count, 4), -1, np.int64)
    for i in range(o.rank.shape[0]):
        e = entries.option[i]
        if e < 0:
            continue
        for role in range(4):
            l = layers_in_time(o, i, role, interval_s)
            if l > layers[e, role]:
                layers[e, role] = l
                option[e, role] = i
    return layers, option


class Reach(NamedTuple):
    """The reach of each sub-fleet's stages, by the most copies used, and where each value came from."""

    position: IntArray  # [K + 1, V] furthest position with a first stage and any plain ones; 0: no first stage fits
    back_entry: IntArray  # [K + 1, V] entry of the last stage so far; -1: copied from a smaller usage or K
    back_from: IntArray  # [K + 1, V] usage before it, or the smaller usage copied from; -1: copied from fewer copies
    closing: IntArray  # [V] entry of the last stage of a full cover; -1: none
    closing_copies: IntArray  # [V] copies of the cover
    closing_from: IntArray  # [V] usage left for the stages before it


@kernel
def reach(t: Tables, lattice: Lattice, entries: Entries, layers: IntArray, max_copies: int) -> Reach:
    """Determine which sub-fleets cover all layers if entries carry ``layers`` [E, 4], with at most ``max_copies``.

    Copies are not counted if ``max_copies`` is 0.
    """
    num_vectors = lattice.digits.shape[0]
    num_rows = lattice.limits.shape[0]
    num_layers = t.num_layers
    levels = max(1, max_copies)
    position = np.zeros((levels + 1, num_vectors), np.int64)
    back_entry = np.full((levels + 1, num_vectors), -1, np.int64)
    back_from = np.full((levels + 1, num_vectors), -1, np.int64)
    closing = np.full(num_vectors, -1, np.int64)
    closing_copies = np.zeros(num_vectors, np.int64)
    closing_from = np.zeros(num_vectors, np.int64)
    for v in range(num_vectors):
        for k in range(1, levels + 1):
            if k > 1:
                position[k, v] = position[k - 1, v]
            for row in range(num_rows):
                if lattice.inherits and lattice.digits[v, row] > 0:
                    below = v - lattice.strides[row]
                    if position[k, below] > position[k, v]:
                        position[k, v] = position[k, below]
                        back_entry[k, v] = -1
                        back_from[k, v] = below
        for row in range(num_rows):
            if lattice.inherits and closing[v] < 0 and lattice.digits[v, row] > 0:
                below = v - lattice.strides[row]
                if closing[below] >= 0:
                    closing[v] = closing[below]
                    closing_copies[v] = closing_copies[below]
                    closing_from[v] = closing_from[below]
        for e in range(entries.usage.shape[0]):
            u = entries.usage[e]
            if not within(lattice, u, v):
                continue
            rest = v - u
            c = entries.copies[e] if max_copies > 0 else 1
            if c > levels:
                continue
            may_begin = lattice.inherits or rest == 0
            if may_begin and closing[v] < 0 and layers[e, BOTH] >= num_layers:
                closing[v], closing_copies[v], closing_from[v] = e, c, NOTHING_BEFORE
            for k in range(c, levels + 1):
                if may_begin and layers[e, FIRST] > 0:
                    reached = t.cut_floor[min(layers[e, FIRST], num_layers - 1)]
                    if reached > position[k, v]:
                        position[k, v], back_entry[k, v], back_from[k, v] = reached, e, NOTHING_BEFORE
                before = k - c if max_copies > 0 else 1
                if before < 1:
                    continue
                start = position[before, rest]
                if start > 0:
                    if layers[e, PLAIN] > 0:
                        reached = t.cut_floor[min(start + layers[e, PLAIN], num_layers - 1)]
                        if reached > position[k, v]:
                            position[k, v], back_entry[k, v], back_from[k, v] = reached, e, rest
                    if closing[v] < 0 and start + layers[e, LAST] >= num_layers:
                        closing[v], closing_copies[v], closing_from[v] = e, k, rest
    return Reach(position, back_entry, back_from, closing, closing_copies, closing_from)


@kernel
def stages_from(
    t: Tables, entries: Entries, layers: IntArray, option: IntArray, r: Reach, v: int, counted: bool
) -> IntArray:
    """Return the stages behind ``r.closing[v]``, first to last, [., 2] of (option, layers)."""
    num_layers = t.num_layers
    reverse = np.empty((num_layers + 1, 2), np.int64)
    e = r.closing[v]
    if r.closing_from[v] == NOTHING_BEFORE:
        reverse[0, 0], reverse[0, 1] = option[e, BOTH], num_layers
        return reverse[:1].copy()
    u = r.closing_from[v]
    k = r.closing_copies[v] - (entries.copies[e] if counted else 0)
    end = r.position[k, u]
    reverse[0, 0], reverse[0, 1] = option[e, LAST], num_layers - end
    count = 1
    while True:
        # Go to where this position was first reached: with fewer copies, or else with a smaller usage.
        while r.back_entry[k, u] < 0 or (k > 1 and r.position[k - 1, u] == r.position[k, u]):
            if k > 1 and r.position[k - 1, u] == r.position[k, u]:
                k -= 1
            else:
                u = r.back_from[k, u]
        e = r.back_entry[k, u]
        if r.back_from[k, u] == NOTHING_BEFORE:
            reverse[count, 0], reverse[count, 1] = option[e, FIRST], end
            count += 1
            break
        before_k = k - (entries.copies[e] if counted else 0)
        before_u = r.back_from[k, u]
        start = r.position[before_k, before_u]
        reverse[count, 0], reverse[count, 1] = option[e, PLAIN], end - start
        count += 1
        end, u, k = start, before_u, before_k
    return reverse[:count][::-1].copy()


@kernel
def _interval_range(
    t: Tables, o: Options, entries: Entries, cap_s: float, floor_s: float, copies: int
) -> tuple[float, float]:
    """Return the intervals between which covers can change: none exists below, and nothing is gained above."""
    slowest = 0.0
    fastest_layer = np.inf
    for i in range(o.rank.shape[0]):
        if entries.option[i] < 0:
            continue
        fastest_layer = min(fastest_layer, o.layer_s[i])
        for role in range(4):
            slowest = max(slowest, (o.max_layers[i, role] * o.layer_s[i] + o.fixed_s[i, role]) / o.copies[i])
    shortest = max(floor_s, t.num_layers * fastest_layer / copies * (1.0 - 1e-9))
    return shortest, min(cap_s, max(floor_s, slowest * (1.0 + 1e-9)))


@kernel
def _any_above(
    feasible: BoolArray, already: BoolArray, rate: float, needed: FloatArray, best_rate: FloatArray, tolerance: float
) -> bool:
    """Return whether a sub-fleet, feasible but not ``already``, could improve by more than the ratio ``tolerance``."""
    for v in range(feasible.shape[0]):
        if feasible[v] and not already[v] and rate > needed[v] and rate > best_rate[v] * (1.0 + tolerance):
            return True
    return False


@kernel
def explore(
    t: Tables, lattice: Lattice, o: Options, entries: Entries, interval_cap_s: float, max_copies: int,
    needed: FloatArray, tolerance: float, best_rate: FloatArray, best_tag: IntArray, best_interval: FloatArray,
    tag: int, bound: FloatArray,
) -> int:  # fmt: skip
    """Raise the best rate of every sub-fleet with the pipelined replicas of one configuration.

    Replicas of rate ``needed[v]`` or less are not looked for. On return ``best_rate`` [V] is reached by the
    configuration ``best_tag`` at ``best_interval``, and no replica of this configuration on sub-fleet v has a rate
    above ``max(bound[v], needed[v], best_rate[v] (1 + tolerance))``.

    Returns the number of dynamic programs run.
    """
    num_vectors = lattice.digits.shape[0]
    total = 0
    for row in range(lattice.limits.shape[0]):
        total += lattice.limits[row]
    counted = max_copies if max_copies < total else 0
    t_lo, t_hi = _interval_range(
        t, o, entries, interval_cap_s, t.t_floor, min(max_copies, total)
    )  # fmt: skip
    if t_lo > t_hi:
        return 0
    depth = 160
    lows = np.empty(depth, np.float64)
    highs = np.empty(depth, np.float64)
    feasible_low = np.zeros((depth, num_vectors), np.bool_)
    feasible_high = np.ones((depth, num_vectors), np.bool_)
    closing = np.zeros(num_vectors, np.bool_)
    nothing = np.zeros(num_vectors, np.bool_)
    lows[0], highs[0] = t_lo, t_hi
    size, runs = 1, 0
    middle = t_hi
    while size > 0:
        low, high = lows[size - 1], highs[size - 1]
        if runs > 0:
            rate = 1.0 / (low)
            if not _any_above(feasible_high[size - 1], feasible_low[size - 1], rate, needed, best_rate, tolerance):
                size -= 1
                continue
            if high <= low * (1.0 + tolerance) or size + 1 >= depth:
                for v in range(num_vectors):
                    if feasible_high[size - 1, v] and not feasible_low[size - 1, v]:
                        bound[v] = max(bound[v], rate)
                size -= 1
                continue
            middle = np.sqrt(low * high)
        rate = 1.0 / (middle)
        layers, _ = entry_layers(t, o, entries, middle)
        r = reach(t, lattice, entries, layers, 0)
        runs += 1
        for v in range(num_vectors):
            closing[v] = r.closing[v] >= 0
        if _any_above(closing, nothing, rate, needed, best_rate, 0.0):
            if counted > 0:
                r = reach(t, lattice, entries, layers, counted)
                runs += 1
                for v in range(num_vectors):
                    closing[v] = r.closing[v] >= 0
            for v in range(num_vectors):
                if closing[v] and rate > best_rate[v]:
                    best_rate[v], best_tag[v], best_interval[v] = rate, tag, middle
        # Otherwise `closing` may be too generous because copies are not counted. Slower intervals then hold nothing
        # better for those sub-fleets either, and faster ones are looked at again.
        if middle == t_hi:
            feasible_high[0, :] = closing
            continue
        feasible_low[size, :] = feasible_low[size - 1]
        feasible_high[size, :] = closing
        feasible_low[size - 1, :] = closing
        lows[size - 1] = middle
        lows[size], highs[size] = low, middle  # the faster half is on top and looked at first
        size += 1
    return runs
