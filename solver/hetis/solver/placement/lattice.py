"""The sub-fleets of a small fleet, numbered, and stage options grouped by their use of a sub-fleet.

A usage vector counts what a replica takes of each master row. Vectors are numbered in mixed radix, so a vector below
another in every component has the smaller number.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hetis.solver.placement.classes import IntArray
from hetis.solver.placement.compiled import kernel
from hetis.solver.placement.options import Options

NOTHING_BEFORE = -2  # instead of a usage vector: the stage is the first one


class Lattice(NamedTuple):
    """All usage vectors up to the fleet: R rows, V vectors."""

    limits: IntArray  # [R]
    strides: IntArray  # [R]
    digits: IntArray  # [V, R]
    inherits: bool  # a vector inherits from smaller ones; False: replicas use all of their vector


class Entries(NamedTuple):
    """Options of one configuration grouped by use: E distinct (usage, copies)."""

    usage: IntArray  # [E] number of the usage vector
    copies: IntArray  # [E]
    option: IntArray  # [O] entry of each option, -1 if it does not fit in the fleet


def lattice_of(limits: IntArray, *, inherits: bool = True) -> Lattice:
    """Return the usage vectors of a fleet with these row limits."""
    sizes = limits + 1
    strides = np.concatenate([[1], np.cumprod(sizes)[:-1]]).astype(np.int64)
    numbers = np.arange(int(np.prod(sizes)), dtype=np.int64)
    digits = (numbers[:, None] // strides[None, :]) % sizes[None, :]
    return Lattice(limits.astype(np.int64), strides, digits.astype(np.int64), inherits)


@kernel
def entries_of(lattice: Lattice, o: Options, group_use: IntArray, card_use: IntArray) -> Entries:
    """Group options by usage and copies."""
    num_rows = lattice.limits.shape[0]
    num_options = o.rank.shape[0]
    usage = np.empty(num_options, np.int64)
    copies = np.empty(num_options, np.int64)
    entry_of = np.full(num_options, -1, np.int64)
    count = 0
    for i in range(num_options):
        number = 0
        fits = True
        for row in range(num_rows):
            each = group_use[o.rank[i], row]
            if o.pool_class[i] >= 0:
                each += o.pool_cards[i] * card_use[o.pool_class[i], row]
            used = each * o.copies[i]
            if used > lattice.limits[row]:
                fits = False
                break
            number += used * lattice.strides[row]
        if not fits:
            continue
        for e in range(count):
            if usage[e] == number and copies[e] == o.copies[i]:
                entry_of[i] = e
                break
        if entry_of[i] < 0:
            usage[count] = number
            copies[count] = o.copies[i]
            entry_of[i] = count
            count += 1
    return Entries(usage[:count], copies[:count], entry_of)


@kernel
def within(lattice: Lattice, small: int, large: int) -> bool:
    """Return whether one usage vector is below another in every component."""
    if small > large:
        return False
    for row in range(lattice.limits.shape[0]):  # noqa: SIM110  (compiled: a comparison of arrays would allocate)
        if lattice.digits[small, row] > lattice.digits[large, row]:
            return False
    return True
