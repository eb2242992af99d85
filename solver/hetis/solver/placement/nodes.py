"""The nodes of replicas: integer programs that put each on few nodes, alone or together with the choice of replicas.

A replica's GPUs of a class are *parts* (TP groups, attention workers), each of which stays within a node. How a replica
is cut into pieces, one for each node that it uses, and which pieces fill a node are patterns. Equal replicas and equal
nodes are counted, never named, so a class of thousands of nodes is a program of a few hundred columns.

The master's rows ensure that TP groups fit into nodes but not how many nodes a replica then uses. In `NodeProgram`
every kind of replica (the GPUs it takes of each device class) has *ways* to be cut into pieces, and the nodes of a
class are filled by patterns of pieces. The program adds rows and columns to the master's own:

    z_tw >= 0 whole    replicas of kind t that are cut in way w;  y_cp >= 0 whole  nodes of class c filled by pattern p
    sum_w z_tw = sum of the counts of columns of kind t                            every kind t
    sum_tw (pieces of size s in class c of w) z_tw <= sum_p (those in p) y_cp      every class c, size s
    sum_p y_cp <= nodes of the class                                               every class c

A node with GPUs of several classes counts once for each class that a replica uses there, so a solution uses no more
nodes than the program counts.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import highspy
import numpy as np

from hetis.solver.backends.highs import quiet_highs
from hetis.solver.placement.fleet import DeviceClass, IntArray
from hetis.solver.placement.replicas.kinds import Kind, Parts, fewest_nodes, shared_places

MOST_PATTERNS = 5000  # patterns per node, more than nodes of 16 GPUs have
MOST_CUTS_OF_PARTS = 300  # cuts per replica
MOST_MIXED = 6  # parts of several sizes up to which all cuts are listed; six parts have 203
MOST_SEARCHED = 2000  # nodes of the search tree; fixed, so that the same parts are packed alike on every machine
MOST_SEARCHED_WITHIN = 20_000  # the same if all classes are packed at once
GAP = 1e-9

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

    All cuts of a replica are tried unless there are more than `MOST_CUTS_OF_PARTS`. Then only those into the fewest
    pieces and the one with every part apart are tried, and the bound is that of replicas packed separately.

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
    """Return the nodes of a replica's parts, by the next of the cuts ``left`` for its kind."""
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
    found = list(dict.fromkeys(islice(listed, MOST_CUTS_OF_PARTS + 1)))
    is_all = len(found) <= MOST_CUTS_OF_PARTS and (len(set(parts)) == 1 or len(parts) <= MOST_MIXED)
    apart: Cut = tuple((size,) for size in parts)
    return list(dict.fromkeys((*sorted(found[:MOST_CUTS_OF_PARTS], key=len), apart))), is_all


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
    kinds: Mapping[Parts, int], cuts: Mapping[Parts, Sequence[Cut]], sizes: Sequence[int],
    patterns: Sequence[tuple[int, ...]], num_nodes: int, time_limit_s: float, seed: int,
) -> tuple[dict[Parts, list[Cut]], list[int], int] | None:  # fmt: skip
    """Return the cuts of every kind's replicas, the nodes of each pattern, and the bound; None if none in time."""
    highs = quiet_highs(
        {"mip_max_nodes": MOST_SEARCHED, "mip_rel_gap": GAP, "mip_abs_gap": 0.999}, time_limit_s=time_limit_s, seed=seed
    )
    columns = [(kind, cut) for kind in kinds for cut in cuts[kind]]
    for kind, cut in columns:
        highs.addVar(0.0, float(kinds[kind]))
        highs.changeColCost(highs.getNumCol() - 1, float(len(cut)))
    for _ in patterns:
        highs.addVar(0.0, float(num_nodes))
    _make_whole(highs, 0)
    for kind, number in kinds.items():
        add_row(highs, number, number, {i: 1.0 for i, (one, _) in enumerate(columns) if one == kind})
    for size in sizes:
        used = {i: float(sum(sum(piece) == size for piece in cut)) for i, (_, cut) in enumerate(columns)}
        held = {len(columns) + i: -float(pattern.count(size)) for i, pattern in enumerate(patterns)}
        add_row(highs, -np.inf, 0.0, {i: value for i, value in (used | held).items() if value})
    add_row(highs, -np.inf, num_nodes, {len(columns) + i: 1.0 for i in range(len(patterns))})
    highs.run()
    info = highs.getInfo()
    if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        return None
    values = [round(value) for value in highs.getSolution().col_value]
    chosen: dict[Parts, list[Cut]] = {kind: [] for kind in kinds}
    for (kind, cut), number in zip(columns, values, strict=False):
        chosen[kind] += [cut] * number
    for left in chosen.values():
        left.reverse()  # taken from the end: replicas in few pieces come first
    bound = info.mip_dual_bound if np.isfinite(info.mip_dual_bound) else 0.0
    return chosen, values[len(columns) :], int(np.ceil(bound - 1e-6))


# --- replicas of several classes, chosen together with their nodes


Way = Mapping[int, Cut]  # the pieces by device class
MOST_WAYS = 40  # ways per replica: those with the fewest pieces first
MOST_CUTS = {1: MOST_WAYS, 2: 8}  # cuts per device class, by the number of classes
FEW_CUTS = 4  # cuts per device class if there are more classes
MORE_PIECES = 2  # pieces beyond the fewest, if the nodes of a replica are not limited


@dataclass(frozen=True, slots=True)
class NodeProgram:
    """Rows and columns for kinds of replicas; ``is_whole`` if they include every way to put replicas on nodes."""

    classes: Sequence[DeviceClass]
    kinds: tuple[Kind, ...]
    ways: tuple[tuple[Way, ...], ...]
    sizes: Mapping[int, tuple[int, ...]]
    patterns: Mapping[int, Sequence[tuple[int, ...]]]
    is_whole: bool

    @staticmethod
    def of(classes: Sequence[DeviceClass], kinds: Sequence[Kind], most_nodes: int | None) -> NodeProgram | None:
        """Return the program for kinds on at most ``most_nodes`` nodes each (None: any number).

        Kinds that need more nodes have no ways. Return None if nodes have too many patterns.
        """
        listed = [_ways(classes, kind, most_nodes) for kind in kinds]
        pieces = defaultdict[int, set[int]](set)
        for ways, _ in listed:
            for way in ways:
                for c, cut in way.items():
                    pieces[c] |= {sum(piece) for piece in cut}
        sizes = {c: tuple(sorted(found, reverse=True)) for c, found in pieces.items()}
        patterns = dict[int, Sequence[tuple[int, ...]]]()
        for c, found in sizes.items():
            of_class = patterns_of(found, classes[c].gpus_per_node)
            if of_class is None:
                return None
            patterns[c] = of_class
        places = shared_places(classes)
        is_whole = all(is_all for _, is_all in listed) and len(set(places)) == len(places)
        return NodeProgram(classes, tuple(kinds), tuple(ways for ways, _ in listed), sizes, patterns, is_whole)

    @property
    def pieces(self) -> list[int]:
        """Return the number of nodes that a replica uses in every way of every kind, the costs of the columns z."""
        return [_num_pieces(way) for ways in self.ways for way in ways]

    def extend(self, highs: Any, kinds_of_columns: Sequence[int]) -> int:
        """Add the program to a model whose first columns count replicas of these kinds; return the first z's number."""
        first_z, z = highs.getNumCol(), [(kind, way) for kind, ways in enumerate(self.ways) for way in ways]
        y = [(c, pattern) for c, patterns in self.patterns.items() for pattern in patterns]
        most = max((c.num_nodes * c.gpus_per_node for c in self.classes), default=0)
        for _ in range(len(z) + len(y)):
            highs.addVar(0.0, float(most))
        _make_whole(highs, first_z)
        by_kind = [dict[int, float]() for _ in self.kinds]
        for column, kind in enumerate(kinds_of_columns):
            by_kind[kind][column] = -1.0
        by_size = defaultdict[tuple[int, int], dict[int, float]](dict)
        by_class = defaultdict[int, dict[int, float]](dict)
        for i, (kind, way) in enumerate(z):
            by_kind[kind][first_z + i] = 1.0
            for c, cut in way.items():
                for size, count in Counter(map(sum, cut)).items():
                    by_size[c, size][first_z + i] = float(count)
        for i, (c, pattern) in enumerate(y):
            by_class[c][first_z + len(z) + i] = 1.0
            for size, count in Counter(pattern).items():
                by_size[c, size][first_z + len(z) + i] = -float(count)
        for entries in by_kind:
            add_row(highs, 0.0, 0.0, entries)
        for entries in by_size.values():
            add_row(highs, -np.inf, 0.0, entries)
        for c, entries in by_class.items():
            add_row(highs, -np.inf, float(self.classes[c].num_nodes), entries)
        return int(first_z)


def _make_whole(highs: Any, first: int) -> None:
    """Make the columns from ``first`` on whole numbers."""
    columns = np.arange(first, highs.getNumCol(), dtype=np.int32)
    kinds = np.full(len(columns), int(highspy.HighsVarType.kInteger), dtype=np.uint8)
    highs.changeColsIntegrality(len(columns), columns, kinds)


def add_row(highs: Any, least: float, most: float, entries: Mapping[int, float]) -> None:
    """Add a row to a HiGHS model, with entries by column number."""
    indices = np.array(list(entries), dtype=np.int32)
    highs.addRow(least, most, len(entries), indices, np.array(list(entries.values())))


def pack_within(
    classes: Sequence[DeviceClass], kinds: Sequence[Kind], most_nodes: int, *, time_limit_s: float, seed: int
) -> list[dict[int, list[int]]] | None:
    """Put replicas on nodes so that each uses at most ``most_nodes``, and all together as few as possible.

    Return, by replica and device class, the nodes of its parts in the order of its kind, or None if none was found.
    """
    wanted = Counter(kinds)
    program = NodeProgram.of(classes, list(wanted), most_nodes)
    if program is None:
        return None
    options = {"mip_max_nodes": MOST_SEARCHED_WITHIN, "mip_abs_gap": 0.999, "mip_rel_gap": 0.0}
    highs = quiet_highs(options, time_limit_s=time_limit_s, seed=seed)
    for count in wanted.values():
        highs.addVar(float(count), float(count))
    first = program.extend(highs, range(len(wanted)))
    for i, number in enumerate(program.pieces):
        highs.changeColCost(first + i, float(number))
    highs.run()
    if highs.getInfo().primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        return None
    numbers = iter([round(value) for value in highs.getSolution().col_value][first:])
    left = {
        kind: [way for way in ways for _ in range(next(numbers))][::-1]
        for kind, ways in zip(program.kinds, program.ways, strict=True)
    }
    slots = {c: slots_of(patterns, [next(numbers) for _ in patterns]) for c, patterns in program.patterns.items()}
    found = list[dict[int, list[int]]]()
    for kind in kinds:
        way = left[kind].pop()
        found.append({c: list(place_parts(parts, [way[c]], slots[c])) for c, parts in kind})
    return found


def _ways(classes: Sequence[DeviceClass], kind: Kind, most_nodes: int | None) -> tuple[tuple[Way, ...], bool]:
    """Return ways to cut a replica, those into the fewest pieces first, and whether these are all."""
    least = {c: fewest_nodes(parts, classes[c].gpus_per_node) for c, parts in kind}
    most = sum(least.values()) + MORE_PIECES if most_nodes is None else most_nodes
    spare, is_all = most - sum(least.values()), most_nodes is not None
    if spare < 0:
        return (), True
    cuts = list[list[Cut]]()
    for c, parts in kind:
        found, has_all = cuts_of(parts, classes[c].gpus_per_node)
        short, most_cuts = [cut for cut in found if len(cut) <= least[c] + spare], MOST_CUTS.get(len(kind), FEW_CUTS)
        cuts.append(short[:most_cuts])
        is_all &= has_all and len(short) <= most_cuts
    names = [c for c, _ in kind]
    ways = [dict(zip(names, combined, strict=True)) for combined in itertools.product(*cuts)]
    ways = sorted((way for way in ways if _num_pieces(way) <= most), key=_num_pieces)
    return tuple(ways[:MOST_WAYS]), is_all and len(ways) <= MOST_WAYS


def _num_pieces(way: Way) -> int:
    return sum(map(len, way.values()))


def counts_of_kinds(kinds: Sequence[Kind]) -> tuple[list[Kind], IntArray]:
    """Return the different kinds, and each given kind's number among them."""
    different = list(dict.fromkeys(kinds))
    place = {kind: i for i, kind in enumerate(different)}
    return different, np.array([place[kind] for kind in kinds], dtype=np.int64)
