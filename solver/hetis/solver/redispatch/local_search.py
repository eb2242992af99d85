"""From fractions to whole head groups, and step by step to a lower objective."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hetis.solver.dispatch.problem import FloatArray, IntArray
from hetis.solver.redispatch.compiled import kernel
from hetis.solver.redispatch.tables import Tables

MOST_STEPS = 2000


class Placement(NamedTuple):
    """Mutable arrays; scalars are arrays of one."""

    x: IntArray  # [N, D] groups
    groups: IntArray  # [D]
    tokens: FloatArray  # [D]
    used: IntArray  # [D] blocks now
    later: FloatArray  # [H, D] blocks at the horizons
    seconds: FloatArray  # [D]
    workers: IntArray  # groups on workers
    spent: FloatArray  # bytes of arrivals


@kernel
def placement_of(tables: Tables, x: IntArray) -> Placement:
    """Sums of groups ``x`` [N, D], which is kept and changed."""
    num_requests, num = x.shape
    horizons = tables.later.shape[0]
    placement = Placement(
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
def seconds_with(tables: Tables, placement: Placement, device: int, groups: int, tokens: float) -> float:
    """Time of a device if it held so many more groups and tokens; 0 when it holds no heads."""
    n, t = placement.groups[device] + groups, placement.tokens[device] + tokens
    if n <= 0 and tables.open_at[device] != -np.inf:
        return 0.0
    most = 0.0
    for k in range(tables.alpha.shape[1]):
        most = max(most, tables.base[device, k] + tables.alpha[device, k] * n + tables.beta[device, k] * t)
    return most


@kernel
def card_s(tables: Tables, workers: int) -> float:
    """Time of the primary's network card with so many groups on workers."""
    if tables.primary < 0 or workers + tables.on_workers == 0:
        return 0.0
    return tables.nic_base + tables.nic_group_s * workers


@kernel
def short_with(tables: Tables, placement: Placement, device: int, request: int, groups: int) -> float:
    """Price of the blocks above the limit of a device if it held so many more groups of a request."""
    most = 0.0
    for t in range(tables.later.shape[0]):
        most = max(most, placement.later[t, device] + groups * tables.later[t, request] - tables.limit[t, device])
    price: float = most * tables.short_s[device]
    return price


@kernel
def shift(tables: Tables, placement: Placement, request: int, source: int, target: int, count: int) -> None:
    """Moves groups of a request."""
    for i, n in ((source, -count), (target, count)):
        before = max(0, placement.x[request, i] - tables.now[request, i])
        placement.x[request, i] += n
        after = max(0, placement.x[request, i] - tables.now[request, i])
        placement.spent[0] += (after - before) * tables.num_bytes[request]
        placement.groups[i] += n
        placement.tokens[i] += n * tables.context[request]
        placement.used[i] += n * tables.blocks[request]
        for t in range(tables.later.shape[0]):
            placement.later[t, i] += n * tables.later[t, request]
        if i != tables.primary:
            placement.workers[0] += n
        placement.seconds[i] = seconds_with(tables, placement, i, 0, 0.0)


@kernel
def round_to_groups(tables: Tables, fractions: FloatArray) -> IntArray:
    """Whole groups near ``fractions`` [N, D]: the primary's to the nearest multiple, the others by largest remainder.

    A request whose new home has no room for it stays where it is.
    """
    num_requests, num = fractions.shape
    x = tables.now.copy()
    for j in range(num_requests):
        moved = 0.0
        for i in range(num):
            moved += abs(fractions[j, i] - tables.now[j, i])
        if moved < 1e-7:
            continue
        left = 0
        for i in range(num):
            left += tables.now[j, i]
        row = np.zeros(num, np.int64)
        if tables.primary >= 0:
            i = tables.primary
            unit = tables.unit[i]
            row[i] = min(int(np.floor(fractions[j, i] / unit + 0.5)), left // unit) * unit
            left -= row[i]
        for i in range(num):
            if i != tables.primary:
                row[i] = min(left, int(np.floor(fractions[j, i] + 1e-7)))
                left -= row[i]
        while left > 0:
            best, most = -1, -np.inf
            for i in range(num):
                if i == tables.primary or (row[i] >= tables.now[j, i] and not tables.takes[i]):
                    continue
                if fractions[j, i] > 1e-9 and fractions[j, i] - row[i] > most:
                    best, most = i, fractions[j, i] - row[i]
            if best < 0:
                break
            row[best] += 1
            left -= 1
        if left == 0:
            x[j] = row
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
    return x


@kernel
def improve(tables: Tables, x: IntArray) -> int:
    """Moves single groups, or takes whole moves back, as long as the objective falls; changes ``x`` [N, D].

    A step looks at the slowest device, at those short of blocks, and at all groups that are not where they were. It
    takes the change that lowers the objective most. Where the primary takes several groups at a time, these may come
    from several devices, or go to several. Returns the number of steps.
    """
    num_requests, num = x.shape
    if num_requests == 0:
        return 0
    placement = placement_of(tables, x)
    for step in range(MOST_STEPS):
        first, second, third = -1, -1, -1
        for i in range(num):
            s = placement.seconds[i]
            if first < 0 or s > placement.seconds[first]:
                first, second, third = i, first, second
            elif second < 0 or s > placement.seconds[second]:
                second, third = i, second
            elif third < 0 or s > placement.seconds[third]:
                third = i
        card = card_s(tables, placement.workers[0])
        slowest_s = max(card, placement.seconds[first])
        best_gain = 1e-9 * slowest_s
        best_j, best_i, best_k, best_n = -1, -1, -1, 0
        for i in range(num):
            short_i = short_with(tables, placement, i, 0, 0)
            presses = i == first or short_i > 0.0 or (card >= slowest_s and i != tables.primary)
            for j in range(num_requests):
                moved = x[j, i] - tables.now[j, i]
                if x[j, i] == 0 or not (presses or moved > 0):
                    continue
                for k in range(num):
                    if k == i:
                        continue
                    unit = max(tables.unit[i], tables.unit[k])
                    for whole in range(2):
                        n = unit if whole == 0 else moved
                        if n <= 0 or n > x[j, i] or n % unit != 0 or (whole == 1 and n == unit):
                            continue
                        there = x[j, k] - tables.now[j, k]
                        if there + n > 0 and not tables.takes[k]:
                            continue
                        if placement.used[k] + n * tables.blocks[j] > tables.room[k]:
                            continue
                        late = seconds_with(tables, placement, i, -n, -n * tables.context[j])
                        late = max(late, seconds_with(tables, placement, k, n, n * tables.context[j]))
                        for other in (first, second, third):
                            if other >= 0 and other != i and other != k:
                                late = max(late, placement.seconds[other])
                                break
                        workers = placement.workers[0] + (n if i == tables.primary else 0)
                        workers -= n if k == tables.primary else 0
                        gain = slowest_s - max(late, card_s(tables, workers))
                        gain -= tables.charge[j, i] * (abs(moved - n) - abs(moved))
                        gain -= tables.charge[j, k] * (abs(there + n) - abs(there))
                        if gain <= best_gain - short_i:
                            continue
                        relief = short_i - short_with(tables, placement, i, j, -n)
                        relief += short_with(tables, placement, k, j, 0) - short_with(tables, placement, k, j, n)
                        gain += relief
                        if gain <= best_gain:
                            continue
                        spent = max(0, moved - n) - max(0, moved) + max(0, there + n) - max(0, there)
                        if placement.spent[0] + spent * tables.num_bytes[j] > tables.budget and spent > 0:
                            continue
                        best_gain, best_j, best_i, best_k, best_n = gain, j, i, k, n
        if tables.primary >= 0 and tables.unit[tables.primary] > 1:
            j, row = _best_exchange(tables, placement, first, best_gain)
            if j >= 0:
                _set_row(tables, placement, j, row)
                continue
        if best_j < 0:
            return step
        shift(tables, placement, best_j, best_i, best_k, best_n)
    return MOST_STEPS


@kernel
def _best_exchange(tables: Tables, placement: Placement, slowest: int, least_gain: float) -> tuple[int, IntArray]:
    """The request, and its new row [D], for which one unit on the primary more or less gains most; -1: none does.

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
                    best[:] = placement.x[j]
            _set_row(tables, placement, j, before)
    return best_j, best


@kernel
def _partner(tables: Tables, placement: Placement, request: int, arrives: bool) -> int:
    """The worker to take a group of a request from, or to give one to; -1: none."""
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
def _part_of_objective(tables: Tables, placement: Placement, request: int) -> float:
    """The objective but for what other requests' moves cost."""
    value: float = max(card_s(tables, placement.workers[0]), placement.seconds.max())
    for i in range(len(tables.unit)):
        value += tables.charge[request, i] * abs(placement.x[request, i] - tables.now[request, i])
        value += short_with(tables, placement, i, request, 0)
    return value


@kernel
def _set_row(tables: Tables, placement: Placement, request: int, row: IntArray) -> None:
    """Moves a request's groups so that they lie as in ``row`` [D]."""
    for i in range(len(row)):
        for k in range(len(row)):
            n = min(placement.x[request, i] - row[i], row[k] - placement.x[request, k])
            if n > 0:
                shift(tables, placement, request, i, k, n)
