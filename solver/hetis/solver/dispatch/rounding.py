"""Rounding of fractions to whole head groups: round down, then give every group that is left to the marginal device."""

from __future__ import annotations

import numpy as np

from hetis.solver.dispatch.compiled import kernel
from hetis.solver.dispatch.placement import Placement, card_s, put, seconds_with
from hetis.solver.dispatch.problem import FloatArray, IntArray
from hetis.solver.dispatch.tables import Costs, Running

BLOCK = 16  # devices looked at together: a group changes one of them, and the rest of its block is looked at again


@kernel
def round_down(
    costs: Costs,
    running: Running,
    placement: Placement,
    fractions: FloatArray,
    contexts: IntArray,
    blocks: IntArray,
) -> None:
    """Places the whole groups (of the primary: whole multiples of what it takes at a time) in ``fractions`` [J, D]."""
    for j in range(len(contexts)):
        for i in range(len(costs.unit)):
            unit = costs.unit[i]
            whole = int(np.floor(fractions[j, i] / unit + 1e-9)) * unit
            whole = min(whole, placement.room[i] // blocks[j] // unit * unit)
            if whole > 0:
                put(costs, running, placement, j, i, whole, contexts[j], blocks[j])


@kernel
def place_rest(costs: Costs, running: Running, placement: Placement, contexts: IntArray, blocks: IntArray) -> bool:
    """Gives every group that has no device yet to the one that is the least late with it, long contexts first.

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
    """Places ``left`` groups of one request as `marginal_device` would one by one; ``ends`` [D] is room to work in.

    Groups of a request are alike, so that after each only the device that took it ends at another time.
    """
    num = len(costs.unit)
    for i in range(num):
        ends[i] = _end_with_unit(costs, running, placement, i, context, blocks)
    first = np.empty((num + BLOCK - 1) // BLOCK, np.int64)  # of every block of workers: the one that ends first
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
    """The worker of a block of devices that ends first; -1 if none has room."""
    best, least = -1, np.inf
    for i in range(block * BLOCK, min((block + 1) * BLOCK, len(ends))):
        if ends[i] < least and i != costs.primary:
            best, least = i, ends[i]
    return best


@kernel
def _end_with_unit(
    costs: Costs, running: Running, placement: Placement, device: int, context: int, blocks: int
) -> float:
    """Return when a device ends with one more unit of a request; infinite without room for it."""
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
    """The device, other than ``but`` and ``nor``, that ends first with one more unit; -1 if none has room.

    A unit is of at most ``left`` groups. A worker burdens the primary's network card too and ends with that.
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
