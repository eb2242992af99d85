"""Admission: which requests can be placed, in their order, and a packing of their whole head groups."""

from __future__ import annotations

import numpy as np

from hetis.solver.dispatch.compiled import kernel
from hetis.solver.dispatch.packing import FEW, cannot_fit, pack_few, repack
from hetis.solver.dispatch.problem import IntArray

PLACED = 0
SHORT_OF_BLOCKS = 1
SCATTERED = 2  # proven
NOT_FOUND = 3

MOST_WORK = 400_000  # devices visited for repacking in one call, a millisecond at most


@kernel
def admit(
    free_blocks: IntArray, unit: IntArray, blocks: IntArray, head_groups: int, primary: int, reserved: IntArray
) -> tuple[IntArray, IntArray]:
    """Reserve whole groups for each request in order; ``reserved`` [J, D] is written.

    Returns verdicts [J] and what is missing [J]: blocks if all devices together have too few, otherwise groups that
    found no device with room for a whole one. A refused request takes nothing, and later ones are still tried; none is
    dropped for a later one. All verdicts except `NOT_FOUND` are proven, given the requests admitted before.
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
    """Do what `admit` does from request ``first`` on; ``room`` [D] is what the requests before it leave."""
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
            # Element by element: for a copy of a slice numba takes seconds to compile the text of its error.
            for i in range(len(room)):
                room[i] = max(0, free_blocks[i])
                for k in members:
                    reserved[k, i] = packed[k, i]
                    room[i] -= packed[k, i] * blocks[k]


@kernel
def _first_fit(room: IntArray, unit: IntArray, blocks: int, head_groups: int, primary: int, reserved: IntArray) -> int:
    """Reserve the groups of one request where there is room, or nothing; ``reserved`` [D] is 0 before.

    Returns how many found none.
    """
    left = head_groups
    for turn in range(-1, len(room)):
        # The primary comes first, because the multiple of groups that it takes may not be left at the end.
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
