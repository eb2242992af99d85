"""Which requests can be placed at all, in their order, and which whole groups of them would fit where."""

from __future__ import annotations

import numpy as np

from hetis.solver.dispatch.compiled import kernel
from hetis.solver.dispatch.problem import IntArray

PLACED = 0
SHORT_OF_BLOCKS = 1
SCATTERED = 2


@kernel
def admit(
    free_blocks: IntArray, unit: IntArray, blocks: IntArray, head_groups: int, primary: int, reserved: IntArray
) -> tuple[IntArray, IntArray]:
    """Reserves whole groups for one request after the other, first fit; ``reserved`` [J, D] is written.

    Returns verdicts [J] and what is missing [J]: blocks where all devices together have too few, else groups that
    found no device with room for a whole one. A request that is refused takes nothing, those after it are still tried.
    That blocks are short is proved; that they are scattered holds for the groups reserved before.
    """
    num_requests, num = reserved.shape
    room = np.maximum(free_blocks, 0)
    total = room.sum()
    verdict = np.zeros(num_requests, np.int64)
    missing = np.zeros(num_requests, np.int64)
    reserved[:] = 0
    for j in range(num_requests):
        needed = blocks[j] * head_groups
        if needed > total:
            verdict[j], missing[j] = SHORT_OF_BLOCKS, needed - total
            continue
        left = head_groups
        for turn in range(-1, num):
            # The primary first: what it takes at a time must not be left over at the end.
            i = primary if turn < 0 else turn
            if i < 0 or reserved[j, i] > 0:
                continue
            fits = min(left, room[i] // blocks[j]) // unit[i] * unit[i]
            reserved[j, i] = fits
            left -= fits
        if left > 0:
            verdict[j], missing[j] = SCATTERED, left
            reserved[j, :] = 0
            continue
        for i in range(num):
            room[i] -= reserved[j, i] * blocks[j]
        total -= needed
    return verdict, missing
