"""Rows of a survival program: what is left after each loss, by what nodes run together (`survival.py` states it)."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import highspy
import numpy as np

from hetis.solver.placement.columns import Columns
from hetis.solver.placement.constraint_rows import class_rows
from hetis.solver.placement.fleet import DeviceClass, FloatArray
from hetis.solver.placement.nodes import add_row
from hetis.solver.placement.replicas.kinds import Kind, Layout, Piece, least_nodes_of, shared_places
from hetis.solver.placement.replicas.tables import CostTables
from hetis.solver.plan import Role

MOST_PATTERNS = 3000  # of all nodes together
MOST_PARTS = 5  # of a replica of which all cuts are listed: 52
POINTS = 100.0, 2.0, 5.0  # of all that is wanted, of a replica over several nodes, and of a shape
SLACK = 1e-7  # ratio by which what is left may be less while the whole rate is maximised

Way = tuple[Piece, ...]  # the pieces of a replica, one for each node; none: it floats
Pattern = tuple[tuple[int, Piece], ...]  # what one node runs, ascending: a column and a piece for each replica


@dataclass(frozen=True, slots=True, kw_only=True)
class Within:
    """What a plan must reach for a choice among such plans; None: nothing.

    ``value`` is the objective's, at least if the rate is maximised, at most if cost is minimised; ``left`` must be left
    after the worst loss. ``wanted`` are the requests/s of which none should be missing then.
    """

    value: float | None
    left: float | None = None
    wanted: float = 0.0


def _cuts(classes: Sequence[DeviceClass], kind: Kind, most_nodes: int | None) -> set[Way] | None:
    """Return all ways to cut a replica, None if they are too many to list."""
    places, parts = shared_places(classes), [(c, size) for c, sizes in kind for size in sizes]
    if len(parts) > MOST_PARTS:
        return None
    found = set[Way]()

    def put(nodes: tuple[Counter[int], ...], number: int) -> None:
        if number == len(parts):
            found.add(tuple(sorted(tuple(sorted(node.items())) for node in nodes)))
            return
        c, size = parts[number]
        for i, node in enumerate(nodes):
            if places[next(iter(node))] == places[c] and node[c] + size <= classes[c].gpus_per_node:
                put((*nodes[:i], node + Counter({c: size}), *nodes[i + 1 :]), number + 1)
        if most_nodes is None or len(nodes) < most_nodes:
            put((*nodes, Counter({c: size})), number + 1)

    put((), 0)
    return found


def shape_of(costs: CostTables, side: int, kind: Kind) -> Hashable:
    """Return the shape of a replica: its role, its range, and its parts on every GPU type, in whatever nodes."""
    role, number = costs.routes.roles[side], int(costs.routes.ranges[side])
    return role, number, tuple(sorted((costs.classes[c].gpu, size) for c, parts in kind for size in parts))


class LossRows:
    """Rows and columns that a model of the master gains: what is left after each loss."""

    def __init__(
        self,
        costs: CostTables,
        columns: Columns,
        kinds: Sequence[Kind],
        place: str,
        *,
        keep: float | None,
        demand: float | None,
    ) -> None:
        self.columns, self.costs, self.kinds = columns, costs, kinds
        self.keep, self.demand, self.limits = keep, demand, costs.resources.limits
        self.zones = costs.problem.cluster.zones() if place == "zone" else ()
        self.places = shared_places(costs.classes)
        self.floats_beside = False  # whether replicas that float may serve more than ``ways`` allow
        self.ways = list[list[Way]]()
        self.patterns: dict[int, list[Pattern]] | None = {}
        if not self.zones:
            self._cut()
        # A rate above all others: without limits, HiGHS 1.12 to 1.15 may call a choice the optimum that is far from it.
        taken = columns.uses.sum(axis=1).clip(1)
        self.classes = class_rows(costs)
        self.covers: FloatArray = np.ones((1, 1)) if self.classes is None else self.classes.covers
        self.most = 2.0 * float(self.limits.sum()) * float((columns.rates / taken).max() * self.covers.max())
        self.reached: Callable[[], tuple[float, float]] = lambda: (0.0, np.inf)
        # Of the model that was extended last:
        self._solved: Any = None
        self._several = list[int]()  # columns that count replicas over several nodes
        self._cuts = list[tuple[int, Way, int]]()  # replicas' columns, ways, and the columns that count these
        self._counted = tuple[list[int], ...]()  # columns of points
        self._filled = list[tuple[int, Pattern, int]]()  # places, patterns, and the columns that count nodes

    def _cut(self) -> None:
        """List all ways and patterns, or if these are too many, those with replicas in one node."""
        classes, engine = self.costs.classes, self.costs.problem.family.engine
        most_nodes = None if engine is None else engine.max_nodes
        every = [_cuts(classes, kind, most_nodes) for kind in self.kinds]
        if sum(MOST_PATTERNS if ways is None else len(ways) for ways in every) <= MOST_PATTERNS:
            self.ways = [sorted(ways or ()) for ways in every]
            self.patterns = self._patterns()
            if self.patterns is not None:
                return
        is_apart = [sum(len(parts) for _, parts in kind) > 1 and most_nodes != 1 for kind in self.kinds]
        on_one = [least_nodes_of(classes, kind) == 1 for kind in self.kinds]
        self.floats_beside = any(one and apart for one, apart in zip(on_one, is_apart, strict=True))
        self.ways = [
            [(tuple((c, sum(parts)) for c, parts in kind),)] if one else [()]
            for one, kind in zip(on_one, self.kinds, strict=True)
        ]
        self.patterns = self._patterns()

    def _patterns(self) -> dict[int, list[Pattern]] | None:
        """Return the patterns of each place, None if there are too many."""
        members = defaultdict[int, set[tuple[int, Piece]]](set)
        for k, ways in enumerate(self.ways):
            for piece in (piece for way in ways for piece in way):
                members[self.places[piece[0][0]]].add((k, piece))
        found, total = dict[int, list[Pattern]](), 0
        sizes = [c.gpus_per_node for c in self.costs.classes]
        for place, pieces in members.items():
            listed, ordered = list[Pattern](), sorted(pieces)
            stack: list[tuple[Pattern, int, Counter[int]]] = [((), 0, Counter())]
            while stack:
                begun, first, used = stack.pop()
                for position in range(first, len(ordered)):
                    k, piece = ordered[position]
                    if any(used[c] + n > sizes[c] for c, n in piece):
                        continue
                    listed.append((*begun, (k, piece)))
                    stack.append((listed[-1], position, used + Counter(dict(piece))))
                    if total + len(listed) > MOST_PATTERNS:
                        return None
            found[place], total = listed, total + len(listed)
        return found

    def pose(self, highs: Any) -> None:
        """Extend the model and maximise what is left, or require that a share of what is served is left, or demand."""
        served, maximises = np.array(highs.getLp().col_cost_), self.demand is None
        left = self._extend(highs)
        if self.demand is not None:
            highs.changeColBounds(left, self.demand, np.inf)
        elif self.keep is not None:
            self._keep_share(highs, left, {int(i): float(served[i]) for i in np.flatnonzero(served)})
            self._reach(highs)
        if maximises and self.keep is None:
            self._aim_at(highs, left)

    def pose_bound(self, highs: Any) -> None:
        """Extend the model as `pose` does, for a bound on all plans: replicas may float and plans promise less."""
        served = np.array(highs.getLp().col_cost_)
        left = self._extend(highs, floats=True)
        if self.demand is not None:
            highs.changeColBounds(left, self.demand, np.inf)
            self._reach(highs)
        elif self.keep is None:
            self._aim_at(highs, left)
        else:
            promised = _variable(highs, self.most)
            add_row(highs, 0.0, np.inf, {left: 1.0, promised: -self.keep})
            add_row(highs, 0.0, np.inf, {int(i): float(served[i]) for i in np.flatnonzero(served)} | {promised: -1.0})
            self._aim_at(highs, promised)

    def leave(self, highs: Any, least: float) -> None:
        """Extend the model and require that so much is left."""
        highs.changeColBounds(self._extend(highs), least * (1.0 - SLACK), np.inf)

    def simplify(
        self, highs: Any, within: Within, most: float | None = None, *, only: Collection[Hashable] | None = None,
        floats: bool = False,
    ) -> None:  # fmt: skip
        """Extend the model to plans ``within`` limits and minimise their points, or allow ``most`` points.

        They have shapes of ``only`` these (None: any). ``floats`` is as in `pose_bound`.
        """
        lp = highs.getLp()
        objective, maximises = np.array(lp.col_cost_), lp.sense_ == highspy.ObjSense.kMaximize
        entries = {int(i): float(objective[i]) for i in np.flatnonzero(objective)}
        left = self._extend(highs, floats=floats)
        if within.value is not None:
            add_row(highs, *((within.value, np.inf) if maximises else (-np.inf, within.value)), entries)
        if within.left is not None:
            highs.changeColBounds(left, within.left, np.inf)
        if self.keep is not None:
            self._keep_share(highs, left, entries)
        missing = _variable(highs, 1.0)
        if within.wanted:
            add_row(highs, 1.0, np.inf, {missing: 1.0, left: 1.0 / within.wanted})
        shapes = defaultdict[object, int](lambda: _variable(highs, 1.0, whole=True))
        for k in range(len(self.kinds)):
            add_row(highs, -np.inf, 0.0, {k: 1.0, shapes[self.shape(k)]: -self._most_of(k)})
        if only is not None:
            for shape, number in shapes.items():
                highs.changeColBounds(number, 0.0, float(shape in only))
        self._counted = ([missing], self._several, [*shapes.values()])
        weights = {i: weight for some, weight in zip(self._counted, POINTS, strict=True) for i in some}
        points = _variable(highs, np.inf)
        add_row(highs, 0.0, 0.0, {points: -1.0, **weights})
        if most is None:
            highs.changeObjectiveSense(highspy.ObjSense.kMinimize)
            self._aim_at(highs, points)
        else:
            highs.changeColBounds(points, 0.0, most)
            self._reach(highs)

    def shape(self, k: int) -> Hashable:
        """Return the shape of a column's replicas."""
        return shape_of(self.costs, int(self.columns.sides[k]), self.kinds[k])

    def has_floated(self) -> bool:
        """Return whether replicas float that ``ways`` do not allow to, in the model that was solved last."""
        values = self._solved.getSolution().col_value
        return any(values[z] > 0.5 for k, way, z in self._cuts if not way and () not in self.ways[k])

    def points(self) -> tuple[float, float, float]:
        """Return the points of each kind in the model that was simplified last: missing, over several nodes, shapes."""
        values = self._solved.getSolution().col_value
        missing, several, shapes = (
            sum(weight * values[i] for i in some) for some, weight in zip(self._counted, POINTS, strict=True)
        )
        return missing, several, shapes

    def layouts(self) -> list[list[Layout]]:
        """Return the nodes of each column's replicas in the model that was solved last; empty: anywhere."""
        values, free = np.rint(self._solved.getSolution().col_value), defaultdict[Any, list[tuple[int, int]]](list)
        used, found = Counter[int](), [list[Layout]() for _ in self.kinds]
        for place, pattern, y in self._filled:
            for _ in range(int(values[y])):
                for key in pattern:
                    free[key].append((place, used[place]))
                used[place] += 1
        for k, way, z in self._cuts:
            for _ in range(int(values[z])):
                found[k].append(tuple((*free[k, piece].pop(0), piece) for piece in way))
        return found

    def _aim_at(self, highs: Any, column: int) -> None:
        for i in np.flatnonzero(np.array(highs.getLp().col_cost_)):
            highs.changeColCost(int(i), 0.0)
        highs.changeColCost(column, 1.0)
        self._reach(highs)

    def _reach(self, highs: Any) -> None:
        """Let ``reached`` return the value and the bound of this model, once it is solved."""

        def reached() -> tuple[float, float]:
            info, maximises = highs.getInfo(), highs.getLp().sense_ == highspy.ObjSense.kMaximize
            value, bound = float(info.objective_function_value), float(info.mip_dual_bound)
            if not np.isfinite(bound):
                return value, np.inf if maximises else 0.0
            return value, max(value, bound) if maximises else min(value, bound)

        self.reached = reached

    def _keep_share(self, highs: Any, left: int, served: dict[int, float]) -> None:
        """Require that a share of what is served is left.

        With classes, what is served is a column that may be less than of every class is: it must be that of one class.
        """
        assert self.keep is not None, "it is the share"
        add_row(highs, 0.0, np.inf, {i: -self.keep * value for i, value in served.items()} | {left: 1.0})
        if self.classes is None:
            return
        (level,), is_least = served, list[int]()
        for of_class in self.classes.rows(self.columns, self.costs.routes.num_flows, 0)[:-1].T:
            is_least.append(_variable(highs, 1.0, whole=True))
            entries = {int(i): float(of_class[i]) for i in np.flatnonzero(of_class)}
            add_row(highs, -self.most, np.inf, entries | {level: 1.0, is_least[-1]: -self.most})
        add_row(highs, 1.0, 1.0, dict.fromkeys(is_least, 1.0))

    def _served(self) -> tuple[FloatArray, FloatArray]:
        """Return what the requests/s of each class are at most, by column and by flow; [bounds, K] and [bounds, flows].

        A range serves what its unified replicas do and, at most, as much as flows, as is sent, and as is received.
        """
        routes, columns = self.costs.routes, self.columns
        of_flow = np.repeat(routes.ranges_of_zones, len(routes.zones))[: routes.num_flows]
        apart = Role.PREFILL, Role.DECODE
        is_role = {role: np.array([each is role for each in routes.roles]) for role in Role}
        options = list[list[tuple[FloatArray, FloatArray]]]()
        for number in range(len(self.covers)):
            rates = {role: columns.rates * (is_role[role] & (routes.ranges == number))[columns.sides] for role in Role}
            limits = [(rates[Role.UNIFIED], (of_flow == number).astype(float))]
            if any(rates[role].any() for role in apart):
                limits += [(rates[Role.UNIFIED] + rates[role], np.zeros(len(of_flow))) for role in apart]
            options.append(limits)
        found = list[tuple[FloatArray, FloatArray]]()
        for weights in self.covers.T:
            those = np.flatnonzero(weights)
            for of_ranges in itertools.product(*(options[number] for number in those)):
                replicas, flows = (weights[those] @ np.array(each) for each in zip(*of_ranges, strict=True))
                found.append((replicas, flows))
        return np.array([replicas for replicas, _ in found]), np.array([flows for _, flows in found])

    def _extend(self, highs: Any, *, floats: bool = False) -> int:
        """Add what is left after each loss; return the number of its column.

        A loss leaves no more than each bound on what is served (`_served`), less what it takes of it, so that of each
        only the most that any loss takes is a variable. If it ``floats``, every replica of several parts may.
        """
        highs.setOptionValue("mip_allow_restart", False)  # restarts took most of the time
        num, (served, flows) = len(self.kinds), self._served()
        left, most_lost = _variable(highs, self.most), [_variable(highs, self.most) for _ in served]
        for whole, lost in zip(np.concatenate([served, flows], axis=1), most_lost, strict=True):
            entries = {int(k): float(whole[k]) for k in np.flatnonzero(whole)}
            add_row(highs, 0.0, np.inf, {left: -1.0, lost: -1.0, **entries})
        self._solved, self._several, self._cuts, self._filled = highs, list[int](), [], []

        def loses(taken: dict[int, FloatArray]) -> None:
            """Add the rows of one loss: what each column takes that counts it."""
            for number, lost in enumerate(most_lost):
                entries = {i: -float(of[number]) for i, of in taken.items() if of[number]}
                if entries:
                    add_row(highs, 0.0, np.inf, {lost: 1.0, **entries})

        if self.zones:
            for zone in self.zones:
                here = [any(self.costs.classes[c].zone == zone for c, _ in kind) for kind in self.kinds]
                loses({k: served[:, k] for k in range(num) if here[k]})
            self._several = [k for k, kind in enumerate(self.kinds) if least_nodes_of(self.costs.classes, kind) > 1]
            return left
        for place in dict.fromkeys(self.places):
            mean = np.array([self._least_on(place, kind) for kind in self.kinds]) / self._nodes_of(place)
            loses({k: served[:, k] * mean[k] for k in np.flatnonzero(mean).tolist()})
        pieces = defaultdict[tuple[int, Piece], dict[int, float]](dict)
        for k, listed in enumerate(self.ways):
            most, ways = self._most_of(k), list(listed)
            if floats and () not in ways and sum(len(parts) for _, parts in self.kinds[k]) > 1:
                ways.append(())
            cut = [k] if len(ways) == 1 else [_variable(highs, most, whole=True) for _ in ways]
            if len(ways) != 1:
                add_row(highs, 0.0, 0.0, {k: -1.0, **dict.fromkeys(cut, 1.0)})
            for z, way in zip(cut, ways, strict=True):
                self._cuts.append((k, way, z))
                if len(way) != 1:
                    self._several.append(z)
                for piece, count in Counter(way).items():
                    pieces[k, piece][z] = float(count)
                if not way:
                    b = _variable(highs, 1.0, whole=True)
                    add_row(highs, -np.inf, 0.0, {z: 1.0, b: -most})
                    loses({b: served[:, k]})
        assert self.patterns is not None, "they were listed"
        for place, patterns in self.patterns.items():
            nodes = float(self._nodes_of(place))
            counted = list[int]()
            for pattern in patterns:
                y, b = _variable(highs, nodes, whole=True), _variable(highs, 1.0, whole=True)
                add_row(highs, -np.inf, 0.0, {y: 1.0, b: -nodes})
                for key, count in Counter(pattern).items():
                    pieces[key][y] = -float(count)
                loses({b: np.sum([served[:, k] for k, _ in pattern], axis=0)})
                self._filled.append((place, pattern, y))
                counted.append(y)
            add_row(highs, -np.inf, nodes, dict.fromkeys(counted, 1.0))
        for entries in pieces.values():
            add_row(highs, 0.0, 0.0, entries)
        return left

    def _most_of(self, k: int) -> float:
        """Return the most replicas of a column that fit."""
        use = self.columns.uses[k]
        return float(np.min(self.limits[use > 0] // use[use > 0]))

    def _nodes_of(self, place: int) -> int:
        at = [c for c, other in zip(self.costs.classes, self.places, strict=True) if other == place]
        return sum({g.name: g.count for c in at for g in c.groups}.values())

    def _least_on(self, place: int, kind: Kind) -> int:
        """Return the fewest nodes of a place that a replica uses."""
        here = tuple(one for one in kind if self.places[one[0]] == place)
        return least_nodes_of(self.costs.classes, here) if here else 0


def _variable(highs: Any, most: float, *, whole: bool = False) -> int:
    """Add a variable from 0 to ``most``, and return its number."""
    highs.addVar(0.0, most)
    number = int(highs.getNumCol()) - 1
    if whole:
        highs.changeColIntegrality(number, highspy.HighsVarType.kInteger)
    return number
