"""Which requests can be placed at all, in their order, and which whole groups of them would fit where."""

from __future__ import annotations

import numpy as np

from hetis.solver.dispatch.compiled import kernel
from hetis.solver.dispatch.packing import FEW, cannot_fit, pack_few, repack
from hetis.solver.dispatch.problem import IntArray

PLACED = 0
SHORT_OF_BLOCKS = 1
SCATTERED = 2  # proved
NOT_FOUND = 3

MOST_WORK = 400_000  # devices looked at to pack again, by one call: a millisecond or less


@kernel
def admit(
    free_blocks: IntArray, unit: IntArray, blocks: IntArray, head_groups: int, primary: int, reserved: IntArray
) -> tuple[IntArray, IntArray]:
    """Reserves whole groups for one request after the other; ``reserved`` [J, D] is written.

    Returns verdicts [J] and what is missing [J]: blocks where all devices together have too few, else groups that
    found no device with room for a whole one. A request that is refused takes nothing, those after it are still tried;
    none is dropped for a later one. All verdicts but `NOT_FOUND` are proved, given those admitted before.
    """
    verdict, missing = np.full(len(blocks), NOT_FOUND), np.zeros(len(blocks), np.int64)
    reserved[:] = 0
    room = np.maximum(free_blocks, 0)
    admit_from(0, free_blocks, unit, blocks, head_groups, primary, reserved, room, verdict, missing)
    return verdict, missing


@kernel
def admit_from(
    first: int, free_blocks: IntArray, unit: IntArray, blocks: IntArray, head_groups: int, primary: int,
    reserved: IntArray, room: IntArray, verdict: IntArray, missing: IntArray,
) -> None:  # fmt: skip
    """`admit` for the requests from ``first`` on, those before being decided; ``room`` [D] is what they leave."""
    total, work = room.sum(), 0
    for j in range(first, len(blocks)):
        needed = blocks[j] * head_groups
        if needed > total:
            verdict[j], missing[j] = SHORT_OF_BLOCKS, needed - total
            continue
        missing[j] = _first_fit(room, unit, int(blocks[j]), head_groups, primary, reserved[j])
        if missing[j] == 0:
            verdict[j] = PLACED
            total -= needed
            continue
        members = np.append(np.flatnonzero(verdict[:j] == PLACED), j)
        proved, done = cannot_fit(free_blocks, unit, blocks, head_groups, members, (MOST_WORK - work) // 8)
        work += done
        if proved > 0:
            verdict[j], missing[j] = SCATTERED, proved
            continue
        verdict[j] = NOT_FOUND
        packed, known = np.empty_like(reserved), -1
        if len(members) <= FEW:
            known, done = pack_few(free_blocks, unit, blocks, head_groups, members, packed, MOST_WORK - work)
            work += done
        if known > 0:
            verdict[j], missing[j] = SCATTERED, known
            continue
        if known == 0:
            missing[j] = 0
        elif work + len(members) * len(unit) > MOST_WORK:
            continue
        else:
            missing[j], done = repack(free_blocks, unit, blocks, head_groups, members, packed, (MOST_WORK - work) // 2)
            work += done
        if missing[j] == 0:
            verdict[j] = PLACED
            total -= needed
            # Element by element: with a copy of a slice numba compiles seconds of text for its error.
            for i in range(len(room)):
                room[i] = max(0, free_blocks[i])
                for k in members:
                    reserved[k, i] = packed[k, i]
                    room[i] -= packed[k, i] * blocks[k]


@kernel
def _first_fit(room: IntArray, unit: IntArray, blocks: int, head_groups: int, primary: int, reserved: IntArray) -> int:
    """Reserves the groups of one request where there is room, or nothing; ``reserved`` [D] is 0 before.

    Returns how many found none.
    """
    left = head_groups
    for turn in range(-1, len(room)):
        # The primary first: what it takes at a time must not be left over at the end.
        i = primary if turn < 0 else turn
        if i < 0 or reserved[i] > 0:
            continue
        fits = min(left, room[i] // blocks) // unit[i] * unit[i]
        reserved[i] = fits
        left -= fits
        if left == 0:
            break
    if left > 0:
        reserved[:] = 0
        return left
    for i in range(len(room)):
        room[i] -= reserved[i] * blocks
    return 0
