"""Whole head groups: rounding of fractions, a local search that relieves the slowest device, ruin and recreate.

A step of the local search looks at the slowest device that is not known to be stuck, and takes the move of one unit, or
the swap of two groups, after which the slower of both devices is least slow. If there is none, it moves a group to a
device that passes some of its own groups on. A device that no step helps is stuck and stays as it is; further steps
improve the next bottleneck (lexicographic min-max).
"""

from __future__ import annotations

import numpy as np

from hetis.solver.dispatch.dispatch_problem import FloatArray, IntArray
from hetis.solver.dispatch.loaded_stage import (
    LoadedStage,
    Placement,
    card_s,
    kernel,
    makespan,
    put,
    put_all,
    seconds_with,
)

BLOCK = 16  # devices compared together: a group changes one of them, and only its block is compared again
BETTER = 1.0 - 1e-9
MOST_HANDED_ON = 16
MOST_TRIES = 64
MOST_STUCK = 3  # stuck devices in every round of ruin and recreate

# --- rounding: round down, then give every group left to the marginal device


@kernel
def round_down(stage: LoadedStage, placement: Placement, fractions: FloatArray) -> None:
    """Place the whole groups in ``fractions`` [J, D]; on the primary, whole multiples of what it takes at once."""
    for j in range(len(placement.contexts)):
        for i in range(len(stage.unit)):
            unit = stage.unit[i]
            whole = int(np.floor(fractions[j, i] / unit + 1e-9)) * unit
            whole = min(whole, placement.room[i] // placement.blocks[j] // unit * unit)
            if whole > 0:
                put(stage, placement, j, i, whole)


@kernel
def place_rest(stage: LoadedStage, placement: Placement) -> bool:
    """Give every group without a device to the one that ends earliest with it, long contexts first.

    Returns whether all found room.
    """
    complete = True
    ends = np.empty(len(stage.unit))
    for j in range(len(placement.contexts) - 1, -1, -1):
        left = stage.head_groups
        for i in range(len(stage.unit)):
            left -= placement.x[j, i]
        if left > 0:
            complete = _place(stage, placement, j, left, ends) and complete
    return complete


@kernel
def _place(stage: LoadedStage, placement: Placement, request: int, left: int, ends: FloatArray) -> bool:
    """Place ``left`` groups of one request as repeated `marginal_device` would; ``ends`` [D] is scratch space.

    Groups of a request are alike, so after each one only the device that took it ends at another time.
    """
    num = len(stage.unit)
    for i in range(num):
        ends[i] = _end_with_unit(stage, placement, request, i)
    first = np.empty((num + BLOCK - 1) // BLOCK, np.int64)  # for every block, the worker that ends first
    for block in range(len(first)):
        first[block] = _first_to_end(stage, ends, block)
    while left > 0:
        best, least = -1, np.inf
        for block in range(len(first)):
            if first[block] >= 0 and ends[first[block]] < least:
                best, least = int(first[block]), ends[first[block]]
        if stage.primary >= 0 and stage.unit[stage.primary] <= left:
            least = max(least, card_s(stage, placement.on_workers[0] + 1))
            if ends[stage.primary] <= least:
                best = stage.primary
        if best < 0 or ends[best] == np.inf:
            return False
        put(stage, placement, request, best, stage.unit[best])
        left -= stage.unit[best]
        ends[best] = _end_with_unit(stage, placement, request, best)
        first[best // BLOCK] = _first_to_end(stage, ends, best // BLOCK)
    return True


@kernel
def _first_to_end(stage: LoadedStage, ends: FloatArray, block: int) -> int:
    """Return the worker of a block of devices that ends first, or -1 if none has room."""
    best, least = -1, np.inf
    for i in range(block * BLOCK, min((block + 1) * BLOCK, len(ends))):
        if ends[i] < least and i != stage.primary:
            best, least = i, ends[i]
    return best


@kernel
def _end_with_unit(stage: LoadedStage, placement: Placement, request: int, device: int) -> float:
    """Return when a device ends with one more unit of a request, or infinity without room for it."""
    unit = stage.unit[device]
    if placement.room[device] < unit * placement.blocks[request]:
        return np.inf
    return seconds_with(stage, placement, device, unit, unit * placement.contexts[request])


@kernel
def marginal_device(stage: LoadedStage, placement: Placement, request: int, left: int, but: int, nor: int) -> int:
    """Return the device other than ``but`` and ``nor`` that ends first with one more unit, or -1 if none has room.

    A unit has at most ``left`` groups. A worker also loads the primary's network card and ends no earlier than that.
    """
    best, least = -1, np.inf
    context, blocks = placement.contexts[request], placement.blocks[request]
    card = card_s(stage, placement.on_workers[0] + 1) if stage.primary >= 0 else 0.0
    for i in range(len(stage.unit)):
        unit = stage.unit[i]
        if i in (but, nor) or unit > left or placement.room[i] < unit * blocks or placement.seconds[i] >= least:
            continue
        late = seconds_with(stage, placement, i, unit, unit * context)
        if i != stage.primary:
            late = max(late, card)
        if late < least:
            best, least = i, late
    return best


# --- moves and swaps


@kernel
def improve(stage: LoadedStage, placement: Placement, goal_s: float, most_stuck: int, most_steps: int) -> int:
    """Improve until ``most_stuck`` devices are stuck, all are below ``goal_s``, or steps run out; return the steps."""
    num = len(stage.unit)
    stuck = np.zeros(num, np.bool_)
    is_full = placement.room.min() < placement.blocks.max()  # no room for one more group of some request
    num_stuck = 0
    for step in range(most_steps):
        slowest, most = -1, goal_s
        for i in range(num):
            if not stuck[i] and placement.seconds[i] > most:
                slowest, most = i, placement.seconds[i]
        card = card_s(stage, placement.on_workers[0])
        if card > most and _join_primary(stage, placement, -1, card):
            continue
        if slowest < 0:
            return step
        helped = False
        if placement.groups[slowest] > 0:
            if stage.unit[slowest] == 1:
                helped = _move_or_swap(stage, placement, slowest)
            else:
                helped = _leave_primary(stage, placement, slowest)
            # Too expensive for breaking ties.
            if not helped and is_full and num_stuck == 0 and stage.unit[slowest] == 1:
                helped = _make_room(stage, placement, slowest)
            if not helped and stage.primary >= 0 and slowest != stage.primary and stage.unit[stage.primary] > 1:
                helped = _join_primary(stage, placement, slowest, most)
        if not helped:
            stuck[slowest] = True
            num_stuck += 1
            if num_stuck >= most_stuck:
                return step
    return most_steps


@kernel
def _move_or_swap(stage: LoadedStage, placement: Placement, slowest: int) -> bool:
    """Make the best move of one group away from ``slowest``, or swap of one for a group with a shorter context."""
    contexts, blocks = placement.contexts, placement.blocks
    num, num_requests = placement.x.shape[1], len(contexts)
    least = placement.seconds[slowest] * BETTER
    card = card_s(stage, placement.on_workers[0] + 1)
    given, taken, to = -1, -1, -1
    for j in range(num_requests):
        if placement.x[j, slowest] == 0:
            continue
        without = seconds_with(stage, placement, slowest, -1, -contexts[j])
        if slowest == stage.primary:
            without = max(without, card)
        if without < least:
            for i in range(num):
                if placement.seconds[i] >= least or placement.room[i] < blocks[j] or stage.unit[i] > 1 or i == slowest:
                    continue
                late = max(without, seconds_with(stage, placement, i, 1, contexts[j]))
                if late < least:
                    least, given, taken, to = late, j, -1, i
        for other in range(j - 1, -1, -1):
            longer, more = contexts[j] - contexts[other], blocks[j] - blocks[other]
            if longer == 0 or placement.room[slowest] < -more:
                continue
            shorter = seconds_with(stage, placement, slowest, 0, -longer)
            if shorter >= least:
                continue
            for i in range(num):
                if placement.x[other, i] == 0 or placement.seconds[i] >= least or placement.room[i] < more:
                    continue
                if stage.unit[i] > 1 or i == slowest:
                    continue
                late = max(shorter, seconds_with(stage, placement, i, 0, longer))
                if late < least:
                    least, given, taken, to = late, j, other, i
    if given < 0:
        return False
    _move(stage, placement, given, slowest, to, 1)
    if taken >= 0:
        _move(stage, placement, taken, to, slowest, 1)
    return True


@kernel
def _make_room(stage: LoadedStage, placement: Placement, slowest: int) -> bool:
    """Move a group from ``slowest`` to a device that passes some of its own on to others, in the first way that helps.

    If memory is short there is seldom room for a group with a long context, but often for several short ones.
    """
    contexts = placement.contexts
    num, num_requests = placement.x.shape[1], len(contexts)
    least = placement.seconds[slowest] * BETTER
    if stage.primary >= 0 and card_s(stage, placement.on_workers[0] + 1) >= least:
        return False
    can_go_on = False
    for j in range(num_requests):
        i = marginal_device(stage, placement, j, 1, slowest, -1)
        can_go_on = can_go_on or (i >= 0 and seconds_with(stage, placement, i, 1, contexts[j]) < least)
    if not can_go_on:
        return False
    handed, takers = np.empty(MOST_HANDED_ON, np.int64), np.empty(MOST_HANDED_ON, np.int64)
    tries = 0
    for j in range(num_requests - 1, -1, -1):
        if placement.x[j, slowest] == 0 or seconds_with(stage, placement, slowest, -1, -contexts[j]) >= least:
            continue
        for i in range(num):
            if i == slowest or placement.groups[i] == 0 or stage.unit[i] > 1:
                continue
            tries += 1
            if tries > MOST_TRIES:
                return False
            _move(stage, placement, j, slowest, i, 1)
            count = 0
            while placement.room[i] < 0 or placement.seconds[i] >= least:
                other = _group_to_hand_on(placement, i, j)
                if other < 0 or count == MOST_HANDED_ON:
                    break
                third = marginal_device(stage, placement, other, 1, i, slowest)
                if third < 0 or seconds_with(stage, placement, third, 1, contexts[other]) >= least:
                    break
                _move(stage, placement, other, i, third, 1)
                handed[count], takers[count] = other, third
                count += 1
            if placement.room[i] >= 0 and placement.seconds[i] < least:
                return True
            for n in range(count - 1, -1, -1):
                _move(stage, placement, handed[n], takers[n], i, 1)
            _move(stage, placement, j, i, slowest, 1)
    return False


@kernel
def _group_to_hand_on(placement: Placement, device: int, but: int) -> int:
    """Return the smallest group other than ``but`` that frees the missing blocks, or else the largest, or -1 if none.

    If no blocks are missing, time is, and the largest is returned.
    """
    blocks, short = placement.blocks, -placement.room[device]
    best = -1
    for j in range(len(blocks)):
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
def _leave_primary(stage: LoadedStage, placement: Placement, primary: int) -> bool:
    """Take the unit whose loss relieves a tensor-parallel primary most, and spread it over workers."""
    unit, num_requests = stage.unit[primary], len(placement.contexts)
    before = max(placement.seconds[primary], card_s(stage, placement.on_workers[0]))
    best, least = -1, before * BETTER
    to = np.empty(unit, np.int64)
    for turn in range(num_requests + 1):
        j = turn if turn < num_requests else best
        if j < 0:
            return False
        if placement.x[j, primary] < unit:
            continue
        put(stage, placement, j, primary, -unit)
        late = placement.seconds[primary]
        count = 0
        while count < unit:
            i = marginal_device(stage, placement, j, 1, primary, -1)
            if i < 0:
                late = np.inf
                break
            put(stage, placement, j, i, 1)
            to[count] = i
            count += 1
            late = max(late, placement.seconds[i])
        late = max(late, card_s(stage, placement.on_workers[0]))
        if turn == num_requests:
            return True
        if late < least:
            best, least = j, late
        for n in range(count):
            put(stage, placement, j, to[n], -1)
        put(stage, placement, j, primary, unit)
    return False


@kernel
def _join_primary(stage: LoadedStage, placement: Placement, slowest: int, before: float) -> bool:
    """Move the cheapest unit of a request to a primary that then ends before ``before``.

    One of its groups comes from ``slowest``, the others from slow workers; with -1 for that all do, which relieves the
    network card.
    """
    contexts, primary = placement.contexts, stage.primary
    unit = stage.unit[primary]
    best, least = -1, before * BETTER
    for j in range(len(contexts)):
        on_workers = stage.head_groups - placement.x[j, primary]
        if on_workers < unit or placement.room[primary] < unit * placement.blocks[j]:
            continue
        if slowest >= 0 and placement.x[j, slowest] == 0:
            continue
        late = seconds_with(stage, placement, primary, unit, unit * contexts[j])
        if late < least:
            best, least = j, late
    if best < 0:
        return False
    for _ in range(unit):
        source, most = -1, -1.0
        for i in range(len(stage.unit)):
            if i != primary and placement.x[best, i] > 0 and placement.seconds[i] > most:
                source, most = i, placement.seconds[i]
        put(stage, placement, best, source, -1)
    put(stage, placement, best, primary, unit)
    return True


@kernel
def _move(stage: LoadedStage, placement: Placement, request: int, source: int, target: int, count: int) -> None:
    put(stage, placement, request, source, -count)
    put(stage, placement, request, target, count)


# --- ruin and recreate: remove groups, return them to marginal devices, improve, keep the better


@kernel
def perturb(
    stage: LoadedStage, placement: Placement, goal_s: float, rounds: int, state: int
) -> tuple[IntArray, float, int]:
    """Make ``rounds`` attempts from a placement, which is changed.

    Returns the best groups [J, D], their makespan, and the state of the random numbers for the next call. Ends early at
    ``goal_s``, which no placement beats.
    """
    best, least = placement.x.copy(), makespan(stage, placement)
    for _ in range(rounds):
        if least <= goal_s * (1.0 + 1e-12):
            break
        state = _ruin(stage, placement, state)
        complete, state = _recreate(stage, placement, state)
        if complete:
            improve(stage, placement, goal_s, MOST_STUCK, 200)
        if complete and makespan(stage, placement) < least * (1.0 - 1e-12):
            least = makespan(stage, placement)
            best = placement.x.copy()
        elif not complete or makespan(stage, placement) > least * (1.0 + 1e-3):
            put_all(stage, placement, best)
    return best, least, state


@kernel
def _ruin(stage: LoadedStage, placement: Placement, state: int) -> int:
    """Remove one or two units from the slowest device with new groups, and from a few random others."""
    num_requests, num = placement.x.shape
    slowest, most = -1, -1.0
    for i in range(num):
        if placement.groups[i] > 0 and placement.seconds[i] > most:
            slowest, most = i, placement.seconds[i]
    state = next_random(state)
    hits = 2 + state % 5
    for hit in range(hits):
        state = next_random(state)
        i = slowest if hit == 0 else state % num
        if placement.groups[i] == 0:
            continue
        state = next_random(state)
        at = state % num_requests
        for turn in range(num_requests):
            j = (at + turn) % num_requests
            if placement.x[j, i] > 0:
                put(stage, placement, j, i, -stage.unit[i])
                break
    return state


@kernel
def _recreate(stage: LoadedStage, placement: Placement, state: int) -> tuple[bool, int]:
    """Give groups without a device to the marginal one, taking the requests in turn from a random one on."""
    num_requests = len(placement.contexts)
    state = next_random(state)
    at = state % num_requests
    for turn in range(num_requests):
        j = (at + turn) % num_requests
        left = stage.head_groups - placement.x[j].sum()
        while left > 0:
            i = marginal_device(stage, placement, j, left, -1, -1)
            if i < 0:
                return False, state
            put(stage, placement, j, i, stage.unit[i])
            left -= stage.unit[i]
    return True, state


@kernel
def next_random(state: int) -> int:
    """Return the next number, from 1 to 2**31 - 2, of a linear congruential generator (MINSTD of Park and Miller).

    Its products fit in 64 bits: in kernels an overflow of signed integers is undefined, and what follows from it, too.
    """
    return state * 48271 % 0x7FFFFFFF
