"""One program for replicas and their nodes: the kinds of replicas, how each is cut into pieces, and what fills a node.

The master's rows ensure that TP groups fit into nodes but not how many nodes a replica then uses. Here every kind of
replica (the GPUs it takes of each device class) has *ways* to be cut into pieces, one for each node that it uses, and
the nodes of a class are filled by patterns of pieces (`packing.py`). The program adds rows and columns to the master's
own:

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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import highspy
import numpy as np

from hetis.solver.highs import quiet_highs
from hetis.solver.placement.classes import DeviceClass, IntArray
from hetis.solver.placement.packing import Cut, Parts, cuts_of, patterns_of, place_parts, slots_of
from hetis.solver.placement.tables import CostTables
from hetis.solver.placement.template import Template

Kind = tuple[tuple[int, Parts], ...]  # for every device class that a replica uses, its parts, the largest first
Way = Mapping[int, Cut]  # the pieces by device class
MOST_WAYS = 40  # per replica: those into the fewest pieces first
MOST_CUTS = {1: MOST_WAYS, 2: 8}  # per device class, by the number of classes
FEW_CUTS = 4  # per device class, if there are more classes
SHAPE = 1 / 64  # cost of a replica shape, as a ratio to that of a piece
MORE_PIECES = 2  # beyond the fewest, if the nodes of a replica are not limited


def kind_of(costs: CostTables, template: Template) -> Kind:
    """Return the GPUs that a replica takes."""
    parts = list[tuple[int, int, int]]()
    for stage in template.stages:
        parts.append((*costs.ranks[stage.rank], stage.copies))
        if stage.pool_class >= 0:
            parts.append((stage.pool_class, 1, stage.copies * stage.pool_cards))
    return kind_of_parts(parts)


def kind_of_parts(counted: Iterable[tuple[int, int, int]]) -> Kind:
    """Return the kind of parts that are given as (device class, size, count)."""
    parts = defaultdict[int, list[int]](list)
    for device_class, size, count in counted:
        if count:
            parts[device_class] += [size] * count
    return tuple((c, tuple(sorted(sizes, reverse=True))) for c, sizes in sorted(parts.items()))


def fewest_nodes(sizes: Sequence[int], node_size: int) -> int:
    """Return the fewest nodes for TP groups of one size and single GPUs; ``sizes`` are those of all parts."""
    largest = max(sizes)
    return int(nodes_of_groups(sum(size == largest for size in sizes), largest, sum(sizes), node_size))


def nodes_of_groups(groups: IntArray | int, tp: int, gpus: IntArray | int, node_size: int) -> IntArray:
    """Return the fewest nodes for TP groups with single GPUs next to them; ``gpus`` counts the GPUs of both."""
    return np.maximum(-(-groups // max(1, node_size // tp)), -(-gpus // node_size))


def shared_places(classes: Sequence[DeviceClass]) -> list[int]:
    """Return a number for every class, equal for classes whose GPUs may be in one node."""
    place, of_group = list(range(len(classes))), dict[str, int]()
    for index, c in enumerate(classes):
        for group in c.groups:
            first = of_group.setdefault(group.name, index)
            old, new = place[index], place[first]
            place = [new if number == old else number for number in place]
    return place


def least_nodes_of(classes: Sequence[DeviceClass], kind: Kind) -> int:
    """Return the fewest nodes that a replica takes, whatever else is on them."""
    places, nodes = shared_places(classes), dict[int, int]()
    for c, parts in kind:
        nodes[places[c]] = max(nodes.get(places[c], 0), fewest_nodes(parts, classes[c].gpus_per_node))
    return sum(nodes.values())


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
        first_z, z = highs.getNumCol(), list[tuple[int, Way]]()
        for kind, ways in enumerate(self.ways):
            z += [(kind, way) for way in ways]
        y = [(c, pattern) for c, patterns in self.patterns.items() for pattern in patterns]
        most = max((c.num_nodes * c.gpus_per_node for c in self.classes), default=0)
        for _ in range(len(z) + len(y)):
            highs.addVar(0.0, float(most))
        added = np.arange(first_z, first_z + len(z) + len(y), dtype=np.int32)
        kinds = np.full(len(added), int(highspy.HighsVarType.kInteger), dtype=np.uint8)
        highs.changeColsIntegrality(len(added), added, kinds)
        by_kind = [dict[int, float]() for _ in self.kinds]
        for column, kind in enumerate(kinds_of_columns):
            by_kind[kind][column] = -1.0
        by_size, by_class = (
            defaultdict[tuple[int, int], dict[int, float]](dict),
            defaultdict[int, dict[int, float]](dict),
        )
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

    def simplify(self, highs: Any, kinds_of_columns: Sequence[int], enough: float) -> None:
        """Extend as `extend` does, and turn the objective into a limit ``enough``, a minimum if it was maximised.

        The new objective is the fewest pieces, then the fewest different columns.
        """
        lp = highs.getLp()
        costs, upper = np.array(lp.col_cost_), float(sum(c.num_nodes * c.gpus_per_node for c in self.classes))
        maximises = lp.sense_ == highspy.ObjSense.kMaximize
        first = self.extend(highs, kinds_of_columns)
        entries = {int(i): float(costs[i]) for i in np.flatnonzero(costs)}
        add_row(highs, *((enough, np.inf) if maximises else (-np.inf, enough)), entries)
        highs.changeObjectiveSense(highspy.ObjSense.kMinimize)
        for i in entries:
            highs.changeColCost(i, 0.0)
        for i, number in enumerate(self.pieces):
            highs.changeColCost(first + i, float(number))
        for column in range(len(kinds_of_columns)):
            highs.addVar(0.0, 1.0)
            is_used = highs.getNumCol() - 1
            highs.changeColIntegrality(is_used, highspy.HighsVarType.kInteger)
            highs.changeColCost(is_used, SHAPE)
            add_row(highs, -np.inf, 0.0, {column: 1.0, is_used: -upper})


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
    highs = quiet_highs({"mip_abs_gap": 0.999, "mip_rel_gap": 0.0}, time_limit_s=time_limit_s, seed=seed)
    for count in wanted.values():
        highs.addVar(float(count), float(count))
    first = program.extend(highs, range(len(wanted)))
    pieces = program.pieces
    for i, number in enumerate(pieces):
        highs.changeColCost(first + i, float(number))
    highs.run()
    if highs.getInfo().primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        return None
    values = [round(value) for value in highs.getSolution().col_value][first:]
    return _placed(program, kinds, values[: len(pieces)], values[len(pieces) :])


def _placed(
    program: NodeProgram, kinds: Sequence[Kind], cut: Sequence[int], filled: Sequence[int]
) -> list[dict[int, list[int]]]:  # fmt: skip
    left, numbers = dict[Kind, list[Way]](), iter(cut)
    for kind, ways in zip(program.kinds, program.ways, strict=True):
        left[kind] = [way for way in ways for _ in range(next(numbers))][::-1]
    numbers = iter(filled)
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
