"""Rounding of fractions to whole head groups, and a stepwise descent of the objective."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hetis.solver.dispatch.dispatch_problem import FloatArray, IntArray
from hetis.solver.dispatch.loaded_stage import device_s
from hetis.solver.dispatch.local_search import next_random
from hetis.solver.redispatch.redispatch_tables import RedispatchTables, card_s, kernel

MOST_STEPS = 2000


class JointPlacement(NamedTuple):
    """Mutable arrays of a placement; scalars are arrays of one element."""

    x: IntArray  # [N, D] groups
    groups: IntArray  # [D]
    tokens: FloatArray  # [D]
    used: IntArray  # [D] blocks now
    later: FloatArray  # [H, D] blocks at the horizons
    seconds: FloatArray  # [D]
    workers: IntArray  # groups on workers
    spent: FloatArray  # bytes of arrivals


@kernel
def placement_of(tables: RedispatchTables, x: IntArray) -> JointPlacement:
    """Return the placement with groups ``x`` [N, D], an array that it keeps and changes."""
    num_requests, num = x.shape
    horizons = tables.later.shape[0]
    placement = JointPlacement(
        x, np.zeros(num, np.int64), np.zeros(num), np.zeros(num, np.int64), np.zeros((horizons, num)),
        np.zeros(num), np.zeros(1, np.int64), np.zeros(1),
    )  # fmt: skip
    for i in range(num):
        for j in range(num_requests):
            n = x[j, i]
            placement.groups[i] += n
            placement.tokens[i] += n * tables.context[j]
            placement.used[i] += n * tables.blocks[j]
            for t in range(horizons):
                placement.later[t, i] += n * tables.later[t, j]
            placement.spent[0] += max(0, n - tables.now[j, i]) * tables.num_bytes[j]
        if i != tables.primary:
            placement.workers[0] += placement.groups[i]
        placement.seconds[i] = seconds_with(tables, placement, i, 0, 0.0)
    return placement


@kernel
def seconds_with(tables: RedispatchTables, placement: JointPlacement, device: int, groups: int, tokens: float) -> float:
    """Return the time of a device with ``groups`` and ``tokens`` more than it holds; 0 if it then holds no heads."""
    n, t = placement.groups[device] + groups, placement.tokens[device] + tokens
    return device_s(tables, device, float(n), float(t))


@kernel
def short_with(tables: RedispatchTables, placement: JointPlacement, device: int, request: int, groups: int) -> float:
    """Return the price of a device's blocks above its limit with ``groups`` more of a request."""
    most = 0.0
    for t in range(tables.later.shape[0]):
        most = max(most, placement.later[t, device] + groups * tables.later[t, request] - tables.limit[t, device])
    price: float = most * tables.short_s[device]
    return price


@kernel
def put(tables: RedispatchTables, placement: JointPlacement, request: int, device: int, count: int) -> None:
    """Add groups of a request to a device, or remove them if ``count`` is negative."""
    before = max(0, placement.x[request, device] - tables.now[request, device])
    placement.x[request, device] += count
    after = max(0, placement.x[request, device] - tables.now[request, device])
    placement.spent[0] += (after - before) * tables.num_bytes[request]
    placement.groups[device] += count
    placement.tokens[device] += count * tables.context[request]
    placement.used[device] += count * tables.blocks[request]
    for t in range(tables.later.shape[0]):
        placement.later[t, device] += count * tables.later[t, request]
    if device != tables.primary:
        placement.workers[0] += count
    placement.seconds[device] = seconds_with(tables, placement, device, 0, 0.0)


@kernel
def shift(
    tables: RedispatchTables, placement: JointPlacement, request: int, source: int, target: int, count: int
) -> None:
    """Move groups of a request."""
    put(tables, placement, request, source, -count)
    put(tables, placement, request, target, count)


@kernel
def round_to_groups(tables: RedispatchTables, fractions: FloatArray) -> IntArray:
    """Return whole groups near ``fractions`` [N, D].

    The primary's groups are rounded to the nearest multiple, the others by largest remainder. A request stays where it
    is if its new devices have no room for it.
    """
    x = tables.now.copy()
    for j in range(len(x)):
        if np.abs(fractions[j] - tables.now[j]).sum() >= 1e-7:
            _round_row(tables, fractions[j], tables.now[j], x[j])
    _take_back_what_does_not_fit(tables, x)
    return x


@kernel
def _round_row(tables: RedispatchTables, fractions: FloatArray, now: IntArray, row: IntArray) -> None:
    """Write whole groups of one request to ``row`` [D], or leave it unchanged if the remainders do not suffice."""
    whole, left = np.zeros(len(now), np.int64), now.sum()
    if tables.primary >= 0:
        i = tables.primary
        unit = tables.unit[i]
        whole[i] = min(int(np.floor(fractions[i] / unit + 0.5)), left // unit) * unit
        left -= whole[i]
    for i in range(len(now)):
        if i != tables.primary:
            whole[i] = min(left, int(np.floor(fractions[i] + 1e-7)))
            left -= whole[i]
    while left > 0:
        best, most = -1, -np.inf
        for i in range(len(now)):
            if i == tables.primary or (whole[i] >= now[i] and not tables.takes[i]):
                continue
            if fractions[i] > 1e-9 and fractions[i] - whole[i] > most:
                best, most = i, fractions[i] - whole[i]
        if best < 0:
            return
        whole[best] += 1
        left -= 1
    for i in range(len(whole)):
        row[i] = whole[i]


@kernel
def _take_back_what_does_not_fit(tables: RedispatchTables, x: IntArray) -> None:
    """Move requests back to where they were, those with the most bytes moved first, until blocks and budget suffice."""
    num_requests, num = x.shape
    placement = placement_of(tables, x)
    for _ in range(num_requests):
        over = -1
        for i in range(num):
            if placement.used[i] > tables.room[i]:
                over = i
        if over < 0 and placement.spent[0] <= tables.budget:
            break
        worst, most = -1, 0.0
        for j in range(num_requests):
            for i in range(num):
                if (i == over or over < 0) and x[j, i] > tables.now[j, i]:
                    size = (x[j, i] - tables.now[j, i]) * tables.num_bytes[j]
                    if size > most:
                        worst, most = j, size
        x[worst] = tables.now[worst]
        placement = placement_of(tables, x)


@kernel
def improve(tables: RedispatchTables, x: IntArray) -> int:
    """Move single groups, or undo whole moves, as long as the objective falls; changes ``x`` [N, D].

    A step takes the change that lowers the objective most: that of `_best_shift` or, if the primary takes several
    groups at once, of `_best_exchange`. Returns the number of steps.
    """
    if len(x) == 0:
        return 0
    placement = placement_of(tables, x)
    for step in range(MOST_STEPS):
        slowest = _slowest(placement)
        gain, j, source, target, count = _best_shift(tables, placement, slowest)
        if tables.primary >= 0 and tables.unit[tables.primary] > 1:
            exchanged, row = _best_exchange(tables, placement, slowest[0], gain)
            if exchanged >= 0:
                _set_row(tables, placement, exchanged, row)
                continue
        if j < 0:
            return step
        shift(tables, placement, j, source, target, count)
    return MOST_STEPS


@kernel
def _slowest(placement: JointPlacement) -> tuple[int, int, int]:
    """Return the three slowest devices (-1 if fewer): after removing any two, the slowest of the rest is among them."""
    first, second, third = -1, -1, -1
    for i in range(len(placement.seconds)):
        s = placement.seconds[i]
        if first < 0 or s > placement.seconds[first]:
            first, second, third = i, first, second
        elif second < 0 or s > placement.seconds[second]:
            second, third = i, second
        elif third < 0 or s > placement.seconds[third]:
            third = i
    return first, second, third


@kernel
def _best_shift(
    tables: RedispatchTables, placement: JointPlacement, slowest: tuple[int, int, int]
) -> tuple[float, int, int, int, int]:  # fmt: skip
    """Return the best move of one unit, or of all groups that a request has moved to a device.

    Sources are the slowest device, devices short of blocks, and all groups that are not where they were. Returns the
    gain, the request, source, target and groups; -1 for the request if nothing gains.
    """
    num_requests, num = placement.x.shape
    card = card_s(tables, float(placement.workers[0]))
    slowest_s = max(card, float(placement.seconds[slowest[0]]))
    most, best_j, best_i, best_k, best_n = 1e-9 * slowest_s, -1, -1, -1, 0
    for i in range(num):
        short_i = short_with(tables, placement, i, 0, 0)
        presses = i == slowest[0] or short_i > 0.0 or (card >= slowest_s and i != tables.primary)
        for j in range(num_requests):
            moved = placement.x[j, i] - tables.now[j, i]
            if placement.x[j, i] == 0 or not (presses or moved > 0):
                continue
            for k in range(num):
                if k == i:
                    continue
                unit, there = max(tables.unit[i], tables.unit[k]), placement.x[j, k] - tables.now[j, k]
                for n in (unit, moved):
                    # Inlined, because functions of these tuples, called for every candidate, take three times as long.
                    if n <= 0 or n > placement.x[j, i] or n % unit != 0 or (there + n > 0 and not tables.takes[k]):
                        continue
                    if placement.used[k] + n * tables.blocks[j] > tables.room[k]:
                        continue
                    late = seconds_with(tables, placement, i, -n, -n * tables.context[j])
                    late = max(late, seconds_with(tables, placement, k, n, n * tables.context[j]))
                    for other in slowest:
                        if other >= 0 and other != i and other != k:
                            late = max(late, placement.seconds[other])
                            break
                    workers = placement.workers[0] + (n if i == tables.primary else 0)
                    workers -= n if k == tables.primary else 0
                    gain = slowest_s - max(late, card_s(tables, float(workers)))
                    gain -= tables.charge[j, i] * (abs(moved - n) - abs(moved))
                    gain -= tables.charge[j, k] * (abs(there + n) - abs(there))
                    if gain <= most - short_i:  # relief is at most short_i
                        continue
                    gain += short_i - short_with(tables, placement, i, j, -n)
                    gain += short_with(tables, placement, k, j, 0) - short_with(tables, placement, k, j, n)
                    arrive = max(0, moved - n) - max(0, moved) + max(0, there + n) - max(0, there)
                    within = arrive <= 0 or placement.spent[0] + arrive * tables.num_bytes[j] <= tables.budget
                    if gain > most and within:
                        most, best_j, best_i, best_k, best_n = gain, j, i, k, n
    return most, best_j, best_i, best_k, best_n


@kernel
def _best_exchange(
    tables: RedispatchTables, placement: JointPlacement, slowest: int, least_gain: float
) -> tuple[int, IntArray]:
    """Return the request, and its new row [D], that gains most by one unit more or less on the primary; -1 if none.

    The primary's groups go one by one to the device that then ends first, or come from those that end last.
    """
    num_requests, num = placement.x.shape
    primary = tables.primary
    unit = tables.unit[primary]
    best_j, best_gain = -1, least_gain
    best = np.zeros(num, np.int64)
    for j in range(num_requests):
        before = placement.x[j].copy()
        now_s = _part_of_objective(tables, placement, j)
        on_primary = before[primary]
        for arrives in (False, True):
            if arrives and not (tables.takes[primary] or on_primary < tables.now[j, primary]):
                continue
            if (arrives and before.sum() - on_primary < unit) or (not arrives and on_primary < unit):
                continue
            if not arrives and primary != slowest and on_primary <= tables.now[j, primary]:
                continue
            if arrives and before[slowest] == 0 and on_primary >= tables.now[j, primary]:
                continue
            for _ in range(unit):
                i = _partner(tables, placement, j, arrives)
                if i < 0:
                    break
                if arrives:
                    shift(tables, placement, j, i, primary, 1)
                else:
                    shift(tables, placement, j, primary, i, 1)
            complete = abs(placement.x[j, primary] - on_primary) == unit
            fits = placement.used[primary] <= tables.room[primary] and placement.spent[0] <= tables.budget
            if complete and fits:
                gain = now_s - _part_of_objective(tables, placement, j)
                if gain > best_gain:
                    best_gain, best_j = gain, j
                    for i in range(num):
                        best[i] = placement.x[j, i]
            _set_row(tables, placement, j, before)
    return best_j, best


@kernel
def _partner(tables: RedispatchTables, placement: JointPlacement, request: int, arrives: bool) -> int:
    """Return the worker from which a group of a request is taken, or to which it is given; -1 if there is none."""
    best, most = -1, -np.inf
    for i in range(len(tables.unit)):
        if i == tables.primary:
            continue
        if arrives:
            if placement.x[request, i] > 0 and placement.seconds[i] > most:
                best, most = i, placement.seconds[i]
        elif tables.takes[i] and placement.used[i] + tables.blocks[request] <= tables.room[i]:
            late = seconds_with(tables, placement, i, 1, tables.context[request])
            if -late > most:
                best, most = i, -late
    return best


@kernel
def _part_of_objective(tables: RedispatchTables, placement: JointPlacement, request: int) -> float:
    """Return the objective without the cost of other requests' moves."""
    value: float = max(card_s(tables, float(placement.workers[0])), placement.seconds.max())
    for i in range(len(tables.unit)):
        value += tables.charge[request, i] * abs(placement.x[request, i] - tables.now[request, i])
        value += short_with(tables, placement, i, request, 0)
    return value


@kernel
def _set_row(tables: RedispatchTables, placement: JointPlacement, request: int, row: IntArray) -> None:
    """Move a request's groups so that they are placed as in ``row`` [D]."""
    for i in range(len(row)):
        for k in range(len(row)):
            n = min(placement.x[request, i] - row[i], row[k] - placement.x[request, k])
            if n > 0:
                shift(tables, placement, request, i, k, n)


# --- ruin and recreate: groups are placed again, partly at random, and improved; the better placement is kept


@kernel
def perturb(tables: RedispatchTables, x: IntArray, rounds: int, bound_s: float, state: int) -> int:
    """Make up to ``rounds`` attempts to improve ``x`` [N, D], which is replaced by the best placement found.

    They end when the objective reaches ``bound_s``, below which there is nothing. ``state`` is that of the random
    numbers; the next one is returned.
    """
    if len(x) == 0:
        return state
    least_s = _objective_s(tables, placement_of(tables, x))
    for _ in range(rounds):
        if least_s <= bound_s * (1.0 + 1e-9):
            break
        trial = x.copy()
        placement = placement_of(tables, trial)
        complete, state = _replace_some(tables, placement, state)
        if not complete:
            continue
        improve(tables, trial)
        found_s = _objective_s(tables, placement_of(tables, trial))
        if found_s < least_s * (1.0 - 1e-9):
            least_s = found_s
            for j in range(x.shape[0]):
                for i in range(x.shape[1]):
                    x[j, i] = trial[j, i]
    return state


@kernel
def _replace_some(tables: RedispatchTables, placement: JointPlacement, state: int) -> tuple[bool, int]:
    """Take some units of one to four random requests from their devices, or all, and place them again.

    Returns whether all found a device, with blocks and budget as permitted.
    """
    num_requests, num = placement.x.shape
    state = next_random(state)
    hits = 1 + state % 4
    state = next_random(state)
    everything = state % 2 == 0
    for _ in range(hits):
        state = next_random(state)
        j = state % num_requests
        for i in range(num):
            state = next_random(state)
            if everything or state % 3 == 0:
                put(tables, placement, j, i, -placement.x[j, i])
    state = next_random(state)
    at = state % num_requests
    for turn in range(num_requests):
        j = (at + turn) % num_requests
        left = tables.now[j].sum() - placement.x[j].sum()
        while left > 0:
            state = next_random(state)
            i = _place_for(tables, placement, j, left, state)
            if i < 0:
                return False, state
            put(tables, placement, j, i, tables.unit[i])
            left -= tables.unit[i]
    return placement.spent[0] <= tables.budget, state


@kernel
def _place_for(tables: RedispatchTables, placement: JointPlacement, request: int, left: int, state: int) -> int:
    """Return the device for one more unit of a request that costs least, now and then any; -1 if none has room."""
    num = len(tables.unit)
    any_one, at = state % 8 == 0, state // 8 % num
    best, least = -1, np.inf
    for turn in range(num):
        i = (at + turn) % num
        unit = tables.unit[i]
        there = placement.x[request, i] - tables.now[request, i]
        if unit > left or (there + unit > 0 and not tables.takes[i]):
            continue
        if placement.used[i] + unit * tables.blocks[request] > tables.room[i]:
            continue
        if any_one:
            return i
        cost = seconds_with(tables, placement, i, unit, unit * tables.context[request])
        cost += tables.charge[request, i] * (abs(there + unit) - abs(there))
        cost += short_with(tables, placement, i, request, unit) - short_with(tables, placement, i, request, 0)
        if cost < least:
            best, least = i, cost
    return best


@kernel
def _objective_s(tables: RedispatchTables, placement: JointPlacement) -> float:
    """Return `hetis.solver.redispatch.redispatch_tables.objective_s`."""
    value: float = max(card_s(tables, float(placement.workers[0])), placement.seconds.max())
    for i in range(len(tables.unit)):
        value += short_with(tables, placement, i, 0, 0)
        for j in range(len(placement.x)):
            value += tables.charge[j, i] * abs(placement.x[j, i] - tables.now[j, i])
    return value
