"""Rounding of fractions to whole head groups: round down, then give every group left to the marginal device."""

from __future__ import annotations

import numpy as np

from hetis.solver.dispatch.compiled import kernel
from hetis.solver.dispatch.placement import Placement, card_s, put, seconds_with
from hetis.solver.dispatch.problem import FloatArray, IntArray
from hetis.solver.dispatch.tables import Costs, Running

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
