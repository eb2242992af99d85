"""Exact search over usage vectors, compiled: the best replica of *every* sub-fleet of a small fleet.

A usage vector counts what a replica takes of each master row. Vectors are numbered in mixed radix, so a vector below
another in every component has the smaller number. Stage options are grouped by their use of a sub-fleet.

For one pipelined configuration and one interval t, a dynamic program determines for all sub-fleets at once whether they
carry the model (`reach`). Bisection over t then closes in on the best rate of each sub-fleet that still matters
(`explore`). With a single micro-batch t is the sum of stage times: one dynamic program finds the least sum for every
sub-fleet, without a search over intervals (`explore_sequential`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hetis.solver.placement.compiled import kernel
from hetis.solver.placement.cover import layers_in_time
from hetis.solver.placement.fleet import IntArray
from hetis.solver.placement.options import Options
from hetis.solver.placement.tables import BOTH, FIRST, LAST, PLAIN, BoolArray, FloatArray, Tables

NOTHING_BEFORE = -2  # in place of a usage vector: the stage is the first one


class Lattice(NamedTuple):
    """All usage vectors up to the fleet: R rows, V vectors."""

    limits: IntArray  # [R]
    strides: IntArray  # [R]
    digits: IntArray  # [V, R]
    inherits: bool  # whether a vector inherits the replicas of smaller ones; False: replicas use all of their vector


class Entries(NamedTuple):
    """Options of one configuration grouped by their use: E distinct pairs of (usage, copies)."""

    usage: IntArray  # [E] number of the usage vector
    copies: IntArray  # [E]
    option: IntArray  # [O] entry of each option, -1 if it does not fit in the fleet


def lattice_of(limits: IntArray, *, inherits: bool = True) -> Lattice:
    """Return the usage vectors of a fleet with these row limits."""
    sizes = limits + 1
    strides = np.concatenate([[1], np.cumprod(sizes)[:-1]]).astype(np.int64)
    numbers = np.arange(int(np.prod(sizes)), dtype=np.int64)
    digits = (numbers[:, None] // strides[None, :]) % sizes[None, :]
    return Lattice(limits.astype(np.int64), strides, digits.astype(np.int64), inherits)


@kernel
def entries_of(lattice: Lattice, o: Options, group_use: IntArray, card_use: IntArray) -> Entries:
    """Group options by usage and copies."""
    num_options, count = o.rank.shape[0], 0
    usage, copies = np.empty(num_options, np.int64), np.empty(num_options, np.int64)
    entry_of = np.full(num_options, -1, np.int64)
    for i in range(num_options):
        number, fits = 0, True
        for row in range(lattice.limits.shape[0]):
            each = group_use[o.rank[i], row]
            if o.pool_class[i] >= 0:
                each += o.pool_cards[i] * card_use[o.pool_class[i], row]
            used = each * o.copies[i]
            if used > lattice.limits[row]:
                fits = False
                break
            number += used * lattice.strides[row]
        if not fits:
            continue
        for e in range(count):
            if usage[e] == number and copies[e] == o.copies[i]:
                entry_of[i] = e
                break
        if entry_of[i] < 0:
            usage[count], copies[count], entry_of[i] = number, o.copies[i], count
            count += 1
    return Entries(usage[:count], copies[:count], entry_of)


@kernel
def within(lattice: Lattice, small: int, large: int) -> bool:
    """Return whether one usage vector is below another in every component."""
    if small > large:
        return False
    for row in range(lattice.limits.shape[0]):  # noqa: SIM110  (compiled: a comparison of arrays would allocate)
        if lattice.digits[small, row] > lattice.digits[large, row]:
            return False
    return True


# --- pipelined replicas


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
                layers[e, role], option[e, role] = l, i
    return layers, option


class SubfleetReach(NamedTuple):
    """How far the stages of each sub-fleet reach, by the most copies used, and where each value came from."""

    position: IntArray  # [K + 1, V] furthest position with a first stage and any plain ones; 0: no first stage fits
    back_entry: IntArray  # [K + 1, V] entry of the last stage so far; -1: copied from a smaller usage or K
    back_from: IntArray  # [K + 1, V] usage before it, or the smaller usage copied from; -1: copied from fewer copies
    closing: IntArray  # [V] entry of the last stage of a full cover; -1: none
    closing_copies: IntArray  # [V] copies of the cover
    closing_from: IntArray  # [V] usage left for the stages before it


@kernel
def reach(t: Tables, lattice: Lattice, entries: Entries, layers: IntArray, max_copies: int) -> SubfleetReach:
    """Determine which sub-fleets cover all layers if entries carry ``layers`` [E, 4], with at most ``max_copies``.

    Copies are not counted if ``max_copies`` is 0.
    """
    num_vectors, num_rows = lattice.digits.shape
    num_layers, levels = t.num_layers, max(1, max_copies)
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
                        position[k, v], back_entry[k, v], back_from[k, v] = position[k, below], -1, below
        for row in range(num_rows):
            if lattice.inherits and closing[v] < 0 and lattice.digits[v, row] > 0:
                below = v - lattice.strides[row]
                if closing[below] >= 0:
                    closing[v], closing_copies[v] = closing[below], closing_copies[below]
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
    return SubfleetReach(position, back_entry, back_from, closing, closing_copies, closing_from)


@kernel
def stages_from(
    t: Tables, entries: Entries, layers: IntArray, option: IntArray, r: SubfleetReach, v: int, counted: bool
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
    slowest, fastest_layer = 0.0, np.inf
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

    Replicas of rate ``needed[v]`` or less are not searched for. On return, ``best_rate`` [V] is reached by the
    configuration ``best_tag`` at ``best_interval``, and no replica of this configuration on sub-fleet v has a rate
    above ``max(bound[v], needed[v], best_rate[v] (1 + tolerance))``. Returns the number of dynamic programs run.
    """
    num_vectors, total, depth = lattice.digits.shape[0], lattice.limits.sum(), 160
    counted = max_copies if max_copies < total else 0
    t_lo, t_hi = _interval_range(t, o, entries, interval_cap_s, t.t_floor, min(max_copies, total))
    if t_lo > t_hi:
        return 0
    lows, highs = np.empty(depth, np.float64), np.empty(depth, np.float64)
    feasible_low = np.zeros((depth, num_vectors), np.bool_)
    feasible_high = np.ones((depth, num_vectors), np.bool_)
    closing, nothing = np.zeros(num_vectors, np.bool_), np.zeros(num_vectors, np.bool_)
    lows[0], highs[0] = t_lo, t_hi
    size, runs, middle = 1, 0, t_hi
    while size > 0:
        low, high = lows[size - 1], highs[size - 1]
        if runs > 0:
            rate = 1.0 / low
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
        rate = 1.0 / middle
        layers, _ = entry_layers(t, o, entries, middle)
        r = reach(t, lattice, entries, layers, 0)
        runs += 1
        closing[:] = r.closing >= 0
        if _any_above(closing, nothing, rate, needed, best_rate, 0.0):
            if counted > 0:
                r = reach(t, lattice, entries, layers, counted)
                runs += 1
                closing[:] = r.closing >= 0
            for v in range(num_vectors):
                if closing[v] and rate > best_rate[v]:
                    best_rate[v], best_tag[v], best_interval[v] = rate, tag, middle
        # Otherwise `closing` may be too generous, because copies are not counted. Slower intervals then offer nothing
        # better for those sub-fleets either, and faster ones are examined again.
        if middle == t_hi:
            feasible_high[0, :] = closing
            continue
        feasible_low[size, :] = feasible_low[size - 1]
        feasible_high[size, :] = closing
        feasible_low[size - 1, :] = closing
        lows[size - 1] = middle
        lows[size], highs[size] = low, middle  # the faster half is on top and examined first
        size += 1
    return runs


# --- replicas with a single micro-batch


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
    num_vectors, num_layers, count = lattice.digits.shape[0], t.num_layers, entries.usage.shape[0]
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
    back_entry, back_usage = np.full(shape, -1, np.int64), np.full(shape, -1, np.int64)
    sums = Sums(np.full(shape, np.inf), back_entry, back_usage, np.zeros(shape, np.int64), option)
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
    """Do what `explore` does for a single micro-batch, for which the least t is the least sum of stage times."""
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
