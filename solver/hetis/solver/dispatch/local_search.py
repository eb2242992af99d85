"""Local search on whole head groups: the slowest device gives a group away or swaps one, as long as that helps.

A step looks at the slowest device that is not known to be stuck, and takes the move of one unit, or the swap of two
groups, after which the slower of both devices is least slow. If there is none, it moves a group to a device that passes
some of its own groups on. A device that no step helps is stuck and stays as it is; further steps improve the next
bottleneck (lexicographic min-max).
"""

from __future__ import annotations

import numpy as np

from hetis.solver.dispatch.problem import FloatArray, IntArray
from hetis.solver.dispatch.tables import (
    Costs,
    Placement,
    Running,
    card_s,
    empty_placement,
    kernel,
    makespan,
    put,
    seconds_with,
)

# --- Rounding of fractions to whole head groups: round down, then give every group left to the marginal device.


BLOCK = 16  # devices compared together: a group changes one of them, and only its block is compared again


@kernel
def round_down(
    costs: Costs,
    running: Running,
    placement: Placement,
    fractions: FloatArray,
    contexts: IntArray,
    blocks: IntArray,
) -> None:
    """Place the whole groups in ``fractions`` [J, D]; on the primary, whole multiples of what it takes at once."""
    for j in range(len(contexts)):
        for i in range(len(costs.unit)):
            unit = costs.unit[i]
            whole = int(np.floor(fractions[j, i] / unit + 1e-9)) * unit
            whole = min(whole, placement.room[i] // blocks[j] // unit * unit)
            if whole > 0:
                put(costs, running, placement, j, i, whole, contexts[j], blocks[j])


@kernel
def place_rest(costs: Costs, running: Running, placement: Placement, contexts: IntArray, blocks: IntArray) -> bool:
    """Give every group without a device to the one that ends earliest with it, long contexts first.

    Returns whether all found room.
    """
    complete = True
    ends = np.empty(len(costs.unit))
    for j in range(len(contexts) - 1, -1, -1):
        left = costs.head_groups
        for i in range(len(costs.unit)):
            left -= placement.x[j, i]
        if left > 0:
            complete = _place(costs, running, placement, j, left, contexts[j], blocks[j], ends) and complete
    return complete


@kernel
def _place(
    costs: Costs, running: Running, placement: Placement, request: int, left: int, context: int, blocks: int,
    ends: FloatArray,
) -> bool:  # fmt: skip
    """Place ``left`` groups of one request as repeated `marginal_device` would; ``ends`` [D] is scratch space.

    Groups of a request are alike, so after each one only the device that took it ends at another time.
    """
    num = len(costs.unit)
    for i in range(num):
        ends[i] = _end_with_unit(costs, running, placement, i, context, blocks)
    first = np.empty((num + BLOCK - 1) // BLOCK, np.int64)  # for every block, the worker that ends first
    for block in range(len(first)):
        first[block] = _first_to_end(costs, ends, block)
    while left > 0:
        best, least = -1, np.inf
        for block in range(len(first)):
            if first[block] >= 0 and ends[first[block]] < least:
                best, least = int(first[block]), ends[first[block]]
        if costs.primary >= 0 and costs.unit[costs.primary] <= left:
            least = max(least, card_s(costs, running, placement.on_workers[0] + 1))
            if ends[costs.primary] <= least:
                best = costs.primary
        if best < 0 or ends[best] == np.inf:
            return False
        put(costs, running, placement, request, best, costs.unit[best], context, blocks)
        left -= costs.unit[best]
        ends[best] = _end_with_unit(costs, running, placement, best, context, blocks)
        first[best // BLOCK] = _first_to_end(costs, ends, best // BLOCK)
    return True


@kernel
def _first_to_end(costs: Costs, ends: FloatArray, block: int) -> int:
    """Return the worker of a block of devices that ends first, or -1 if none has room."""
    best, least = -1, np.inf
    for i in range(block * BLOCK, min((block + 1) * BLOCK, len(ends))):
        if ends[i] < least and i != costs.primary:
            best, least = i, ends[i]
    return best


@kernel
def _end_with_unit(
    costs: Costs, running: Running, placement: Placement, device: int, context: int, blocks: int
) -> float:
    """Return when a device ends with one more unit of a request, or infinity without room for it."""
    unit = costs.unit[device]
    if placement.room[device] < unit * blocks:
        return np.inf
    return seconds_with(costs, running, placement, device, unit, unit * context)


@kernel
def marginal_device(
    costs: Costs,
    running: Running,
    placement: Placement,
    left: int,
    context: int,
    blocks: int,
    but: int,
    nor: int,
) -> int:
    """Return the device other than ``but`` and ``nor`` that ends first with one more unit, or -1 if none has room.

    A unit has at most ``left`` groups. A worker also loads the primary's network card and ends no earlier than that.
    """
    best, least = -1, np.inf
    card = card_s(costs, running, placement.on_workers[0] + 1) if costs.primary >= 0 else 0.0
    for i in range(len(costs.unit)):
        unit = costs.unit[i]
        if i in (but, nor) or unit > left or placement.room[i] < unit * blocks or placement.seconds[i] >= least:
            continue
        late = seconds_with(costs, running, placement, i, unit, unit * context)
        if i != costs.primary:
            late = max(late, card)
        if late < least:
            best, least = i, late
    return best


BETTER = 1.0 - 1e-9
MOST_HANDED_ON = 16
MOST_TRIES = 64


@kernel
def improve(
    costs: Costs, running: Running, placement: Placement, contexts: IntArray, blocks: IntArray, goal_s: float,
    most_stuck: int, most_steps: int,
) -> int:  # fmt: skip
    """Improve until ``most_stuck`` devices are stuck, all are below ``goal_s``, or steps run out; return the steps."""
    num = len(costs.unit)
    stuck = np.zeros(num, np.bool_)
    is_full = _any_is_full(placement, blocks)
    num_stuck = 0
    for step in range(most_steps):
        slowest, most = -1, goal_s
        for i in range(num):
            if not stuck[i] and placement.seconds[i] > most:
                slowest, most = i, placement.seconds[i]
        card = card_s(costs, running, placement.on_workers[0])
        if card > most and _relieve_card(costs, running, placement, contexts, blocks, card):
            continue
        if slowest < 0:
            return step
        helped = False
        if placement.groups[slowest] > 0:
            if costs.unit[slowest] == 1:
                helped = _move_or_swap(costs, running, placement, contexts, blocks, slowest)
            else:
                helped = _leave_primary(costs, running, placement, contexts, blocks, slowest)
            # Too expensive for breaking ties.
            if not helped and is_full and num_stuck == 0 and costs.unit[slowest] == 1:
                helped = _make_room(costs, running, placement, contexts, blocks, slowest)
            if not helped and costs.primary >= 0 and slowest != costs.primary and costs.unit[costs.primary] > 1:
                helped = _join_primary(costs, running, placement, contexts, blocks, slowest)
        if not helped:
            stuck[slowest] = True
            num_stuck += 1
            if num_stuck >= most_stuck:
                return step
    return most_steps


@kernel
def _move_or_swap(
    costs: Costs, running: Running, placement: Placement, contexts: IntArray, blocks: IntArray, slowest: int
) -> bool:
    """Make the best move of one group away from ``slowest``, or swap of one for a group with a shorter context."""
    num, num_requests = len(costs.unit), len(contexts)
    now = placement.seconds[slowest]
    least = now * BETTER
    card = card_s(costs, running, placement.on_workers[0] + 1)
    given, taken, to = -1, -1, -1
    for j in range(num_requests):
        if placement.x[j, slowest] == 0:
            continue
        without = seconds_with(costs, running, placement, slowest, -1, -contexts[j])
        if slowest == costs.primary:
            without = max(without, card)
        if without < least:
            for i in range(num):
                if placement.seconds[i] >= least or placement.room[i] < blocks[j] or costs.unit[i] > 1 or i == slowest:
                    continue
                late = max(without, seconds_with(costs, running, placement, i, 1, contexts[j]))
                if late < least:
                    least, given, taken, to = late, j, -1, i
        for other in range(j - 1, -1, -1):
            longer, more = contexts[j] - contexts[other], blocks[j] - blocks[other]
            if longer == 0 or placement.room[slowest] < -more:
                continue
            shorter = seconds_with(costs, running, placement, slowest, 0, -longer)
            if shorter >= least:
                continue
            for i in range(num):
                if placement.x[other, i] == 0 or placement.seconds[i] >= least or placement.room[i] < more:
                    continue
                if costs.unit[i] > 1 or i == slowest:
                    continue
                late = max(shorter, seconds_with(costs, running, placement, i, 0, longer))
                if late < least:
                    least, given, taken, to = late, j, other, i
    if given < 0:
        return False
    put(costs, running, placement, given, slowest, -1, contexts[given], blocks[given])
    put(costs, running, placement, given, to, 1, contexts[given], blocks[given])
    if taken >= 0:
        put(costs, running, placement, taken, to, -1, contexts[taken], blocks[taken])
        put(costs, running, placement, taken, slowest, 1, contexts[taken], blocks[taken])
    return True


@kernel
def _any_is_full(placement: Placement, blocks: IntArray) -> bool:
    """Return whether some device has no room for one more group of the request with the most blocks."""
    most = blocks.max()
    for i in range(len(placement.room)):  # noqa: SIM110  (compiled)
        if placement.room[i] < most:
            return True
    return False


@kernel
def _make_room(
    costs: Costs, running: Running, placement: Placement, contexts: IntArray, blocks: IntArray, slowest: int
) -> bool:
    """Move a group from ``slowest`` to a device that passes some of its own on to others, in the first way that helps.

    If memory is short there is seldom room for a group with a long context, but often for several short ones.
    """
    num, num_requests = len(costs.unit), len(contexts)
    least = placement.seconds[slowest] * BETTER
    if costs.primary >= 0 and card_s(costs, running, placement.on_workers[0] + 1) >= least:
        return False
    can_go_on = False
    for j in range(num_requests):
        i = marginal_device(costs, running, placement, 1, contexts[j], blocks[j], slowest, -1)
        can_go_on = can_go_on or (i >= 0 and seconds_with(costs, running, placement, i, 1, contexts[j]) < least)
    if not can_go_on:
        return False
    handed, takers = np.empty(MOST_HANDED_ON, np.int64), np.empty(MOST_HANDED_ON, np.int64)
    tries = 0
    for j in range(num_requests - 1, -1, -1):
        if placement.x[j, slowest] == 0 or seconds_with(costs, running, placement, slowest, -1, -contexts[j]) >= least:
            continue
        for i in range(num):
            if i == slowest or placement.groups[i] == 0 or costs.unit[i] > 1:
                continue
            tries += 1
            if tries > MOST_TRIES:
                return False
            put(costs, running, placement, j, slowest, -1, contexts[j], blocks[j])
            put(costs, running, placement, j, i, 1, contexts[j], blocks[j])
            count = 0
            while placement.room[i] < 0 or placement.seconds[i] >= least:
                other = _group_to_hand_on(placement, contexts, blocks, i, j)
                if other < 0 or count == MOST_HANDED_ON:
                    break
                third = marginal_device(costs, running, placement, 1, contexts[other], blocks[other], i, slowest)
                if third < 0 or seconds_with(costs, running, placement, third, 1, contexts[other]) >= least:
                    break
                put(costs, running, placement, other, i, -1, contexts[other], blocks[other])
                put(costs, running, placement, other, third, 1, contexts[other], blocks[other])
                handed[count], takers[count] = other, third
                count += 1
            if placement.room[i] >= 0 and placement.seconds[i] < least:
                return True
            for n in range(count - 1, -1, -1):
                put(costs, running, placement, handed[n], takers[n], -1, contexts[handed[n]], blocks[handed[n]])
                put(costs, running, placement, handed[n], i, 1, contexts[handed[n]], blocks[handed[n]])
            put(costs, running, placement, j, i, -1, contexts[j], blocks[j])
            put(costs, running, placement, j, slowest, 1, contexts[j], blocks[j])
    return False


@kernel
def _group_to_hand_on(placement: Placement, contexts: IntArray, blocks: IntArray, device: int, but: int) -> int:
    """Return the smallest group other than ``but`` that frees the missing blocks, or else the largest, or -1 if none.

    If no blocks are missing, time is, and the largest is returned.
    """
    short = -placement.room[device]
    best = -1
    for j in range(len(contexts)):
        if placement.x[j, device] == 0 or j == but:
            continue
        enough = 0 < short <= blocks[j]
        if (
            best < 0
            or (enough and (blocks[best] < short or blocks[j] < blocks[best]))
            or (not enough and (short <= 0 or blocks[best] < short) and blocks[j] > blocks[best])
        ):
            best = j
    return best


@kernel
def _leave_primary(
    costs: Costs, running: Running, placement: Placement, contexts: IntArray, blocks: IntArray, primary: int
) -> bool:
    """Take the unit whose loss relieves a tensor-parallel primary most, and spread it over workers."""
    unit = costs.unit[primary]
    before = max(placement.seconds[primary], card_s(costs, running, placement.on_workers[0]))
    best, least = -1, before * BETTER
    to = np.empty(unit, np.int64)
    for turn in range(len(contexts) + 1):
        j = turn if turn < len(contexts) else best
        if j < 0:
            return False
        if placement.x[j, primary] < unit:
            continue
        put(costs, running, placement, j, primary, -unit, contexts[j], blocks[j])
        late = placement.seconds[primary]
        count = 0
        while count < unit:
            i = marginal_device(costs, running, placement, 1, contexts[j], blocks[j], primary, -1)
            if i < 0:
                late = np.inf
                break
            put(costs, running, placement, j, i, 1, contexts[j], blocks[j])
            to[count] = i
            count += 1
            late = max(late, placement.seconds[i])
        late = max(late, card_s(costs, running, placement.on_workers[0]))
        if turn == len(contexts):
            return True
        if late < least:
            best, least = j, late
        for n in range(count):
            put(costs, running, placement, j, to[n], -1, contexts[j], blocks[j])
        put(costs, running, placement, j, primary, unit, contexts[j], blocks[j])
    return False


@kernel
def _join_primary(
    costs: Costs, running: Running, placement: Placement, contexts: IntArray, blocks: IntArray, slowest: int
) -> bool:
    """Move one unit of a request to a tensor-parallel primary: one group of ``slowest``, the others of slow workers."""
    primary = costs.primary
    unit = costs.unit[primary]
    best, least = -1, placement.seconds[slowest] * BETTER
    for j in range(len(contexts)):
        on_workers = costs.head_groups - placement.x[j, primary]
        if placement.x[j, slowest] == 0 or on_workers < unit or placement.room[primary] < unit * blocks[j]:
            continue
        late = seconds_with(costs, running, placement, primary, unit, unit * contexts[j])
        if late < least:
            best, least = j, late
    if best < 0:
        return False
    _gather(costs, running, placement, best, contexts[best], blocks[best])
    return True


@kernel
def _gather(costs: Costs, running: Running, placement: Placement, request: int, context: int, blocks: int) -> None:
    """Move one unit of a request from the slowest workers that hold it to the primary."""
    unit = costs.unit[costs.primary]
    for _ in range(unit):
        source, most = -1, -1.0
        for i in range(len(costs.unit)):
            if i != costs.primary and placement.x[request, i] > 0 and placement.seconds[i] > most:
                source, most = i, placement.seconds[i]
        put(costs, running, placement, request, source, -1, context, blocks)
    put(costs, running, placement, request, costs.primary, unit, context, blocks)


@kernel
def _relieve_card(
    costs: Costs, running: Running, placement: Placement, contexts: IntArray, blocks: IntArray, card: float
) -> bool:
    """Move the cheapest unit from the workers to the primary if that stays below the network card's time."""
    primary = costs.primary
    unit = costs.unit[primary]
    best, least = -1, card * BETTER
    for j in range(len(contexts)):
        on_workers = costs.head_groups - placement.x[j, primary]
        if on_workers < unit or placement.room[primary] < unit * blocks[j]:
            continue
        late = seconds_with(costs, running, placement, primary, unit, unit * contexts[j])
        if late < least:
            best, least = j, late
    if best < 0:
        return False
    _gather(costs, running, placement, best, contexts[best], blocks[best])
    return True


# --- Longer local search (ruin and recreate): remove groups, return them to marginal devices, improve, keep the better.


MOST_STUCK = 3


@kernel
def perturb(
    costs: Costs, running: Running, free_blocks: IntArray, contexts: IntArray, blocks: IntArray, groups: IntArray,
    goal_s: float, rounds: int, state: int,
) -> tuple[IntArray, float, int]:  # fmt: skip
    """Make ``rounds`` attempts from the placement ``groups`` [J, D] of requests sorted by context.

    Returns the best placement, its makespan, and the state of the random numbers for the next call. Ends early at
    ``goal_s``, which no placement beats.
    """
    best = groups.copy()
    placement = placement_of(costs, running, free_blocks, contexts, blocks, best)
    least = makespan(costs, running, placement)
    for _ in range(rounds):
        if least <= goal_s * (1.0 + 1e-12):
            break
        state = _ruin(costs, running, placement, contexts, blocks, state)
        complete, state = _recreate(costs, running, placement, contexts, blocks, state)
        if complete:
            improve(costs, running, placement, contexts, blocks, goal_s, MOST_STUCK, 200)
        if complete and makespan(costs, running, placement) < least * (1.0 - 1e-12):
            least = makespan(costs, running, placement)
            best = placement.x.copy()
        elif not complete or makespan(costs, running, placement) > least * (1.0 + 1e-3):
            placement = placement_of(costs, running, free_blocks, contexts, blocks, best)
    return best, least, state


@kernel
def placement_of(
    costs: Costs, running: Running, free_blocks: IntArray, contexts: IntArray, blocks: IntArray, groups: IntArray
) -> Placement:
    """Return the placement with these ``groups`` [J, D]."""
    placement = empty_placement(costs, running, free_blocks, len(contexts))
    for j in range(len(contexts)):
        for i in range(len(costs.unit)):
            if groups[j, i] > 0:
                put(costs, running, placement, j, i, groups[j, i], contexts[j], blocks[j])
    return placement


@kernel
def _ruin(
    costs: Costs, running: Running, placement: Placement, contexts: IntArray, blocks: IntArray, state: int
) -> int:
    """Remove one or two units from the slowest device with new groups, and from a few random others."""
    num, num_requests = placement.x.shape[1], len(contexts)
    slowest, most = -1, -1.0
    for i in range(num):
        if placement.groups[i] > 0 and placement.seconds[i] > most:
            slowest, most = i, placement.seconds[i]
    state = _next(state)
    hits = 2 + (state >> 33) % 5
    for hit in range(hits):
        state = _next(state)
        i = slowest if hit == 0 else (state >> 33) % num
        if placement.groups[i] == 0:
            continue
        state = _next(state)
        at = (state >> 33) % num_requests
        for turn in range(num_requests):
            j = (at + turn) % num_requests
            if placement.x[j, i] > 0:
                put(costs, running, placement, j, i, -costs.unit[i], contexts[j], blocks[j])
                break
    return state


@kernel
def _recreate(
    costs: Costs, running: Running, placement: Placement, contexts: IntArray, blocks: IntArray, state: int
) -> tuple[bool, int]:
    """Give groups without a device to the marginal one, taking the requests in turn from a random one on."""
    num_requests = len(contexts)
    state = _next(state)
    at = (state >> 33) % num_requests
    for turn in range(num_requests):
        j = (at + turn) % num_requests
        left = costs.head_groups - placement.x[j].sum()
        while left > 0:
            i = marginal_device(costs, running, placement, left, contexts[j], blocks[j], -1, -1)
            if i < 0:
                return False, state
            put(costs, running, placement, j, i, costs.unit[i], contexts[j], blocks[j])
            left -= costs.unit[i]
    return True, state


@kernel
def _next(state: int) -> int:
    """Return the next number of a linear congruential generator (Knuth's MMIX), kept positive."""
    return (state * 6364136223846793005 + 1442695040888963407) & 0x7FFFFFFFFFFFFFFF
