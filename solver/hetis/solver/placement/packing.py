"""An integer program that packs replicas of a device class into equal nodes so that each uses as few as possible.

A replica's GPUs of the class are *parts* (TP groups, attention workers), each of which stays within a node. How a
replica is cut into pieces, one for each node that it uses, and which pieces fill a node are patterns. Equal replicas
and equal nodes are counted, never named, so a class of thousands of nodes is a program of a few hundred columns.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from hetis.solver.highs import quiet_highs

MOST_PATTERNS = 5000  # per node; more than nodes of 16 GPUs have
MOST_CUTS = 300  # per replica
MOST_MIXED = 6  # parts of several sizes up to which all cuts are listed, 203 for six parts
MOST_SEARCHED = 2000  # nodes of the search tree, so that the same parts are packed alike on every machine
GAP = 1e-9

Parts = tuple[int, ...]  # sizes of a replica's parts, the largest first
Cut = tuple[Parts, ...]  # its pieces, each in a node of its own


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """The places of parts: for every replica the node of each of its parts, in the order given.

    Attributes:
        num_pieces: sum over replicas of the number of nodes that each uses.
        least: a lower bound on ``num_pieces``.
    """

    nodes: tuple[tuple[int, ...], ...]
    num_pieces: int
    least: int


def pack(
    replicas: Sequence[Sequence[int]], *, node_size: int, num_nodes: int, time_limit_s: float, seed: int
) -> Packing | None:
    """Put the parts of replicas into nodes of ``node_size`` GPUs.

    Sets       t kinds of replicas (equal parts), n_t of them; w cuts of a kind; p patterns of a node; s sizes of pieces
    Variables  z_tw replicas of kind t that are cut so; y_p nodes that are filled so
    Minimise   sum_tw |w| z_tw
    Such that  sum_w z_tw = n_t every t;  sum_tw (pieces of size s in w) z_tw <= sum_p (those in p) y_p every s;
               sum_p y_p <= nodes

    All cuts of a replica are tried unless there are more than `MOST_CUTS`. Then only those into the fewest pieces and
    the one with every part apart are tried, and the bound is that of replicas packed separately.

    Returns:
        The packing, or None if none was found in time or nodes have too many patterns.
    """
    kinds = Counter(tuple(sorted(parts, reverse=True)) for parts in replicas)
    listed = {kind: cuts_of(kind, node_size) for kind in kinds}
    cuts = {kind: options for kind, (options, _) in listed.items()}
    sizes = sorted({sum(piece) for options in cuts.values() for cut in options for piece in cut}, reverse=True)
    patterns = patterns_of(sizes, node_size)
    if patterns is None:
        return None
    solved = _solve(kinds, cuts, sizes, patterns, num_nodes, time_limit_s, seed)
    if solved is None:
        return None
    chosen, filled, least = solved
    if not all(is_all for _, is_all in listed.values()):
        least = sum(number * -(-sum(kind) // node_size) for kind, number in kinds.items())
    slots = slots_of(patterns, filled)
    nodes = tuple(place_parts(parts, chosen[tuple(sorted(parts, reverse=True))], slots) for parts in replicas)
    return Packing(nodes=nodes, num_pieces=sum(len(set(places)) for places in nodes), least=least)


def slots_of(patterns: Sequence[tuple[int, ...]], filled: Sequence[int]) -> dict[int, list[int]]:
    """Return the nodes with room for pieces of each size, the first at the end; ``filled`` counts nodes per pattern."""
    slots, node = defaultdict[int, list[int]](list), 0
    for pattern, count in zip(patterns, filled, strict=True):
        for _ in range(count):
            for size in pattern:
                slots[size].append(node)
            node += 1
    for free in slots.values():
        free.reverse()  # the first nodes are used first
    return slots


def place_parts(parts: Sequence[int], left: list[Cut], slots: Mapping[int, list[int]]) -> tuple[int, ...]:
    """Return the nodes of a replica's parts, by the next of the cuts that its kind has ``left``."""
    waiting = defaultdict[int, list[int]](list)  # size of a part -> the nodes for parts of this size
    for piece in left.pop():
        node = slots[sum(piece)].pop()
        for size in piece:
            waiting[size].append(node)
    for nodes in waiting.values():
        nodes.reverse()
    return tuple(waiting[size].pop() for size in parts)


def cuts_of(parts: Parts, node_size: int) -> tuple[list[Cut], bool]:
    """Return ways to cut a replica, those into the fewest pieces first, and whether these are all."""
    listed = _equal_cuts(parts, node_size) if len(set(parts)) == 1 else _mixed_cuts(parts, node_size)
    found = list(dict.fromkeys(islice(listed, MOST_CUTS + 1)))
    is_all = len(found) <= MOST_CUTS and (len(set(parts)) == 1 or len(parts) <= MOST_MIXED)
    apart: Cut = tuple((size,) for size in parts)
    return list(dict.fromkeys((*sorted(found[:MOST_CUTS], key=len), apart))), is_all


def _equal_cuts(parts: Parts, node_size: int) -> Iterator[Cut]:
    """Yield the cuts of parts of one size, which differ only in numbers."""
    each, count = parts[0], len(parts)
    most = node_size // each
    for pieces in range(-(-count // most), count + 1):
        for numbers in _partitions(count, pieces, most):
            yield tuple((each,) * number for number in numbers)


def _mixed_cuts(parts: Parts, node_size: int) -> Iterator[Cut]:
    """Yield the cuts of parts of several sizes: all of them if there are few parts, otherwise that of first fit."""
    if len(parts) > MOST_MIXED:
        yield _filled(parts, node_size)
        return

    def add(pieces: tuple[Parts, ...], left: Parts) -> Iterator[Cut]:
        if not left:
            yield tuple(sorted(pieces, reverse=True))
            return
        size, *rest = left
        for i, piece in enumerate(pieces):
            if sum(piece) + size <= node_size:
                yield from add((*pieces[:i], (*piece, size), *pieces[i + 1 :]), tuple(rest))
        yield from add((*pieces, (size,)), tuple(rest))

    yield from add((), parts)


def _partitions(total: int, pieces: int, most: int) -> Iterator[tuple[int, ...]]:
    """Yield non-increasing sequences of numbers from ``most`` down to 1 that sum to ``total``."""
    if pieces == 0:
        if total == 0:
            yield ()
        return
    for first in range(min(most, total - pieces + 1), -(-total // pieces) - 1, -1):
        for rest in _partitions(total - first, pieces - 1, first):
            yield (first, *rest)


def _filled(parts: Parts, node_size: int) -> Cut:
    """Return the first-fit-decreasing cut."""
    pieces: list[list[int]] = []
    for size in parts:
        piece = next((piece for piece in pieces if sum(piece) + size <= node_size), None)
        if piece is None:
            pieces.append([size])
        else:
            piece.append(size)
    return tuple(map(tuple, pieces))


def patterns_of(sizes: Sequence[int], node_size: int) -> list[tuple[int, ...]] | None:
    """Return the sets of pieces that fill a node so that no other fits, or None if there are too many to list."""
    found: list[tuple[int, ...]] = []

    def fill(begun: tuple[int, ...], left: int, first: int) -> bool:
        fits = False
        for position in range(len(sizes)):
            if sizes[position] > left:
                continue
            fits = True
            if position >= first and not fill((*begun, sizes[position]), left - sizes[position], position):
                return False
        if not fits:
            found.append(begun)
        return len(found) <= MOST_PATTERNS

    return found if fill((), node_size, 0) else None


def _solve(
    kinds: Mapping[Parts, int],
    cuts: Mapping[Parts, Sequence[Cut]],
    sizes: Sequence[int],
    patterns: Sequence[tuple[int, ...]],
    num_nodes: int,
    time_limit_s: float,
    seed: int,
) -> tuple[dict[Parts, list[Cut]], list[int], int] | None:
    """Return the cuts of every kind's replicas, the nodes of each pattern, and the bound; None if none in time."""
    import highspy

    highs = quiet_highs(
        {"mip_max_nodes": MOST_SEARCHED, "mip_rel_gap": GAP, "mip_abs_gap": 0.999}, time_limit_s=time_limit_s, seed=seed
    )
    columns = [(kind, cut) for kind in kinds for cut in cuts[kind]]
    for kind, cut in columns:
        highs.addVar(0.0, float(kinds[kind]))
        highs.changeColCost(highs.getNumCol() - 1, float(len(cut)))
    for _ in patterns:
        highs.addVar(0.0, float(num_nodes))
    count = len(columns) + len(patterns)
    highs.changeColsIntegrality(
        count, np.arange(count, dtype=np.int32), np.full(count, int(highspy.HighsVarType.kInteger), dtype=np.uint8)
    )

    def row(least: float, most: float, entries: Mapping[int, float]) -> None:
        indices = np.array(list(entries), dtype=np.int32)
        highs.addRow(least, most, len(entries), indices, np.array(list(entries.values())))

    for kind, number in kinds.items():
        row(number, number, {i: 1.0 for i, (one, _) in enumerate(columns) if one == kind})
    for size in sizes:
        used = {i: float(sum(sum(piece) == size for piece in cut)) for i, (_, cut) in enumerate(columns)}
        held = {len(columns) + i: -float(pattern.count(size)) for i, pattern in enumerate(patterns)}
        row(-np.inf, 0.0, {i: value for i, value in (used | held).items() if value})
    row(-np.inf, num_nodes, {len(columns) + i: 1.0 for i in range(len(patterns))})
    highs.run()
    info = highs.getInfo()
    if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        return None
    values = [round(value) for value in highs.getSolution().col_value]
    chosen = {kind: [] for kind in kinds}  # type: dict[Parts, list[Cut]]
    for (kind, cut), number in zip(columns, values, strict=False):
        chosen[kind] += [cut] * number
    for left in chosen.values():
        left.reverse()  # used from the end: replicas in few pieces come first
    bound = info.mip_dual_bound if np.isfinite(info.mip_dual_bound) else 0.0
    return chosen, values[len(columns) :], int(np.ceil(bound - 1e-6))
