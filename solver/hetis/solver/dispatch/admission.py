"""Admission: which requests can be placed, in their order, and a packing of their whole head groups.

Deciding whether whole groups fit is bin packing. First fit in the order of devices is tried first. `repack` looks for a
packing (best fit by falling size, then swaps that gather free blocks) and may miss one. `cannot_fit` proves that none
exists and may miss a proof. For two or three requests `pack_few` is exact.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hetis.solver.dispatch.dispatch_problem import IntArray
from hetis.solver.dispatch.loaded_stage import kernel

PLACED = 0
SHORT_OF_BLOCKS = 1
SCATTERED = 2  # proven: enough blocks in total, but too scattered for whole groups
NOT_FOUND = 3

MOST_WORK = 400_000  # devices visited for repacking in one call; takes a millisecond at most
MOST_TRIES = 64  # packings from scratch
MOST_SWAPS = 8  # swaps that gather room for one group on one device
FEW = 3  # requests up to which packing is exact


class PackingProblem(NamedTuple):
    """The requests to be packed, in order of admission, each in whole head groups."""

    free_blocks: IntArray  # [D] KV blocks; negative numbers count as 0
    unit: IntArray  # [D] head groups that a device takes at once
    primary: int  # index of the primary; -1: none
    blocks: IntArray  # [J] KV blocks per head group of each request
    head_groups: int  # head groups of each request


class Admission(NamedTuple):
    """The requests that are placed, what the others lack, and the head groups reserved for those placed."""

    verdict: IntArray  # [J]
    missing: IntArray  # [J] blocks, or groups without room
    reserved: IntArray  # [J, D]


@kernel
def cannot_fit(packing: PackingProblem, members: IntArray, most_work: int) -> tuple[int, int]:
    """Return groups that provably have no room if all ``members`` are placed, and the work done; 0 proves nothing.

    For the size of each member, the last one's first, this compares the groups of at least that size with the number
    of groups of that size that would fit, until ``most_work`` is done.
    """
    unit, blocks, work = packing.unit, packing.blocks, 0
    for k in members[::-1]:
        size, missing = blocks[k], 0
        for j in members:
            missing += packing.head_groups if blocks[j] >= size else 0
        for i in range(len(unit)):
            missing -= max(0, packing.free_blocks[i]) // size // unit[i] * unit[i]
        work += len(members) + 4 * len(unit)
        if missing > 0:
            return missing, work
        if work >= most_work:
            break
    return 0, work


@kernel
def pack_few(packing: PackingProblem, members: IntArray, x: IntArray, most_work: int) -> tuple[int, int]:
    """Pack two or three ``members`` or prove that they do not fit; write a packing to their rows of ``x`` [J, D].

    This is a dynamic program over devices for the most groups of the last member that find room, given numbers of the
    others' groups that do. A device that takes several groups at once comes first, so that more is never worse. Returns
    the fewest groups without room, or -1 if that would take more than ``most_work``, and the work done in devices
    visited.
    """
    unit, blocks = packing.unit, packing.blocks
    num, G = len(unit), packing.head_groups
    one, last = members[0], members[len(members) - 1]
    two = members[1] if len(members) == FEW else -1
    width = G + 1 if two >= 0 else 1
    pairs = (G + 1) * (G + 2) // 2
    work = num * pairs * (pairs if two >= 0 and pairs <= most_work else 1)
    if max(pairs, work) > most_work:
        return -1, 0
    order = np.argsort(-unit.astype(np.float64))
    most = np.full((num + 1, G + 1, width), -1)  # groups of the last member
    of_one, of_two = np.zeros((num, G + 1, width), np.int64), np.zeros((num, G + 1, width), np.int64)
    most[0, 0, 0] = 0
    for step in range(num):
        i = order[step]
        room = max(0, packing.free_blocks[i])
        for n in range(G + 1):
            for m in range(width):
                before = most[step, n, m]
                if before < 0:
                    continue
                for a in range(0, min(G - n, room // blocks[one]) + 1, unit[i]):
                    left = room - a * blocks[one]
                    fits = min(G - m, left // blocks[two]) if two >= 0 else 0
                    for b in range(0, fits + 1, unit[i]):
                        spare = left - b * blocks[two] if two >= 0 else left
                        after = before + min(G - before, spare // blocks[last]) // unit[i] * unit[i]
                        if after > most[step + 1, n + a, m + b]:
                            most[step + 1, n + a, m + b] = after
                            of_one[step, n + a, m + b], of_two[step, n + a, m + b] = a, b
    n, m, homes = 0, 0, -1
    for i in range(G + 1):
        for k in range(width):
            if most[num, i, k] >= 0 and i + k + most[num, i, k] > homes:
                n, m, homes = i, k, i + k + most[num, i, k]
    missing = len(members) * G - homes
    if missing == 0:
        for step in range(num - 1, -1, -1):
            i, a, b = order[step], of_one[step, n, m], of_two[step, n, m]
            x[one, i] = a
            if two >= 0:
                x[two, i] = b
            x[last, i] = most[step + 1, n, m] - most[step, n - a, m - b]
            n, m = n - a, m - b
    return missing, work


@kernel
def repack(packing: PackingProblem, members: IntArray, x: IntArray, most_work: int) -> tuple[int, int]:
    """Look for a packing of all ``members`` and write it to ``x`` [J, D], leaving other rows unchanged.

    Returns the fewest groups that were left without room (0: ``x`` is complete, otherwise it is useless) and the work
    done in devices visited; it ends soon after ``most_work``.
    """
    left = np.zeros(len(packing.blocks), np.int64)
    fewest, work, state = packing.head_groups * len(members) + 1, 0, 1
    size = packing.blocks[members].astype(np.float64)
    for turn in range(MOST_TRIES):
        weights = size.copy()
        share = 1.0 if turn == 1 else 0.0  # share of the most that the primary could take
        if turn > 1:
            for m in range(len(members)):
                state = (state * 1103515245 + 12345) % 2147483648
                weights[m] *= 1.0 + 0.5 * state / 2147483648
            share = (turn % 3) / 2
        order = members[np.argsort(-weights)]
        room = np.maximum(packing.free_blocks, 0)
        work += _best_fit(packing, room, order, share, x, left)
        missing = 0
        for j in order:
            while left[j] > 0 and work < most_work:
                found, done = _gather_room(packing, room, order, j, x, most_work - work)
                work += done
                if not found:
                    break
                left[j] -= 1
            missing += left[j]
        fewest = min(fewest, missing)
        if missing == 0 or work >= most_work:
            break
    return fewest, work


@kernel
def _best_fit(
    packing: PackingProblem, room: IntArray, order: IntArray, share: float, x: IntArray, left: IntArray
) -> int:
    """Place groups in ``order``, each where the least room remains, and count those without room in ``left`` [J].

    On a device that takes several groups at once, a request gets what it needs there and ``share`` of the rest.
    """
    unit, blocks, head_groups = packing.unit, packing.blocks, packing.head_groups
    num, work = len(unit), 0
    for j in order:
        x[j, :] = 0
        left[j] = head_groups
        fit = 0
        for i in range(num):
            fit += room[i] // blocks[j] if unit[i] == 1 else 0
        for i in range(num):
            if unit[i] > 1:
                most = min(head_groups, room[i] // blocks[j]) // unit[i]
                least = min(most, -(-max(0, head_groups - fit) // unit[i]))
                taken = int(least + np.floor(share * (most - least) + 0.5)) * unit[i]
                x[j, i] = taken
                left[j] -= taken
                room[i] -= taken * blocks[j]
        work += 2 * num
        while left[j] > 0:
            best = -1
            for i in range(num):
                if unit[i] == 1 and room[i] >= blocks[j] and (best < 0 or room[i] < room[best]):
                    best = i
            work += num
            if best < 0:
                break
            taken = min(left[j], room[best] // blocks[j])
            x[j, best] += taken
            left[j] -= taken
            room[best] -= taken * blocks[j]
    return work


@kernel
def _gather_room(
    packing: PackingProblem, room: IntArray, order: IntArray, request: int, x: IntArray, most_work: int
) -> tuple[bool, int]:
    """Place one group of ``request`` on a device that first gives groups away or swaps them for smaller ones."""
    unit, blocks = packing.unit, packing.blocks
    num, work = len(unit), 0
    for target in np.argsort(-room.astype(np.float64)):  # floats, so that one compiled sort serves all callers
        if unit[target] > 1:
            continue
        for _ in range(MOST_SWAPS):
            short = blocks[request] - room[target]
            if short <= 0:
                x[request, target] += 1
                room[target] -= blocks[request]
                return True, work
            if work >= most_work:
                return False, work
            given, taken, to, best = -1, -1, -1, 0
            for j in order:
                if x[j, target] == 0:
                    continue
                work += num
                for i in range(num):
                    if i == target or unit[i] > 1 or room[i] == 0:
                        continue
                    for k in range(-1, len(order)):
                        other = -1 if k < 0 else order[k]
                        if other >= 0 and x[other, i] == 0:
                            continue
                        gain = blocks[j] if other < 0 else blocks[j] - blocks[other]
                        if gain <= 0 or gain > room[i]:
                            continue
                        # The smallest gain that is enough, or else the largest.
                        if best == 0 or (gain > best if best < short else short <= gain < best):
                            given, taken, to, best = j, other, i, gain
                    work += len(order)
            if given < 0:
                break
            x[given, target] -= 1
            x[given, to] += 1
            room[target] += blocks[given]
            room[to] -= blocks[given]
            if taken >= 0:
                x[taken, to] -= 1
                x[taken, target] += 1
                room[target] -= blocks[taken]
                room[to] += blocks[taken]
    return False, work


@kernel
def admit(packing: PackingProblem) -> Admission:
    """Reserve whole groups for each request in order.

    What is missing is blocks if all devices together have too few, otherwise groups for which no device had room. A
    refused request takes nothing, and later ones are still tried; none is dropped for a later one. All verdicts except
    `NOT_FOUND` are proven, given the requests admitted before.
    """
    blocks, room = packing.blocks, np.maximum(packing.free_blocks, 0)
    verdict, missing = np.full(len(blocks), NOT_FOUND), np.zeros(len(blocks), np.int64)
    reserved = np.zeros((len(blocks), len(packing.unit)), np.int64)
    total, work = room.sum(), 0
    for j in range(len(blocks)):
        needed = blocks[j] * packing.head_groups
        if needed > total:
            verdict[j], missing[j] = SHORT_OF_BLOCKS, needed - total
            continue
        missing[j] = _first_fit(packing, room, j, reserved[j])
        if missing[j] == 0:
            verdict[j] = PLACED
            total -= needed
            continue
        members = np.append(np.flatnonzero(verdict[:j] == PLACED), j)
        proved, done = cannot_fit(packing, members, (MOST_WORK - work) // 8)
        work += done
        if proved > 0:
            verdict[j], missing[j] = SCATTERED, proved
            continue
        verdict[j] = NOT_FOUND
        packed, known = np.empty_like(reserved), -1
        if len(members) <= FEW:
            known, done = pack_few(packing, members, packed, MOST_WORK - work)
            work += done
        if known > 0:
            verdict[j], missing[j] = SCATTERED, known
            continue
        if known == 0:
            missing[j] = 0
        elif work + len(members) * len(room) > MOST_WORK:
            continue
        else:
            missing[j], done = repack(packing, members, packed, (MOST_WORK - work) // 2)
            work += done
        if missing[j] == 0:
            verdict[j] = PLACED
            total -= needed
            # Element by element, because numba takes seconds to compile the error text of a slice copy.
            for i in range(len(room)):
                room[i] = max(0, packing.free_blocks[i])
                for k in members:
                    reserved[k, i] = packed[k, i]
                    room[i] -= packed[k, i] * blocks[k]
    return Admission(verdict, missing, reserved)


@kernel
def _first_fit(packing: PackingProblem, room: IntArray, request: int, reserved: IntArray) -> int:
    """Reserve the groups of one request where there is room, or nothing; ``reserved`` [D] is 0 before.

    Returns how many groups found none.
    """
    left, blocks, unit = packing.head_groups, packing.blocks[request], packing.unit
    for turn in range(-1, len(room)):
        # The primary comes first, because the multiple of groups that it takes may not be left at the end.
        i = packing.primary if turn < 0 else turn
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
