"""The most that is served after the worst loss of a node or a zone, and the least that keeps a demand through it.

Columns of an engine's family, of which those of one node are chosen by *patterns*: what one node runs together.

    Sets       k columns (rate_k, on a side); p patterns of one-node columns; i what may be lost together: a pattern's
               node, a column over several nodes (or everything in a zone)
    Data       u_i, s_i, d_i  requests/s of unified, sending and receiving replicas that a loss of i takes
    Variables  n_k >= 0 whole, flows F(z, y) >= 0 as in the master;  y_p >= 0 whole  nodes that run pattern p;
               b_i in {0, 1}  whether there is any i;  G >= 0  what is left after the worst loss;  F_i >= 0  flows then
    Maximise   G, then the whole rate W = U + F;  or W with G >= keep W;  or minimise the cost with G >= demand
    Such that  the master's rows;  n_k = sum_p (k in p) y_p  every one-node k;  sum_p y_p <= nodes of every place
               y_p <= nodes b_p,  n_k <= most_k b_k
               G <= U + F_i - u_i b_i;   F_i <= F;   F_i <= S - s_i b_i;   F_i <= D - d_i b_i      every i

The losses themselves are the coefficients of b, so the relaxation is tight. A column over several nodes counts as if
it shared none of them, and flows after a loss may take any route: both only raise the bound. Plans state what
`hetis.solver.advice` derives from their named GPUs.

Some N nodes (zones) of a plan serve W; each set of N - 1 of them at least G, and no replica is used more than fully,
so W >= G N / (N - 1). Only columns that such a plan may contain are listed: those whose reduced cost is within the
distance of the relaxation's bound. With `Survive.keep` the bound is the relaxation's.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import highspy
import numpy as np

from hetis.solver.budget import SearchSettings
from hetis.solver.errors import NoPlanFoundError
from hetis.solver.placement.columns import Columns, padded
from hetis.solver.placement.enumeration import ColumnPrices, EnumeratedColumns
from hetis.solver.placement.fleet import UNIFIED, FloatArray, IntArray
from hetis.solver.placement.master import UNDECIDED, LpSolution, MilpSolution, master_of
from hetis.solver.placement.nodes import add_row
from hetis.solver.placement.outcome import Outcome, sound_bound
from hetis.solver.placement.policy import POLICY
from hetis.solver.placement.replicas.kinds import Kind, least_nodes_of, shared_places
from hetis.solver.placement.replicas.tables import CostTables

FEW = 40  # columns of each side in a first plan
MOST_COLUMNS = 1500  # of a proof
MOST_PATTERNS = 3000  # of all nodes together
NODES = 20_000  # limit on nodes of a search tree
SLACK = 1e-7  # ratio by which what is left may be less while the whole rate is maximised


@dataclass(frozen=True, slots=True, kw_only=True)
class Survive:
    """What a plan must survive: the loss of any one ``node`` or ``zone``.

    ``keep`` is the share of its rate that must be left; None: as much as possible, or the whole demand.
    """

    place: str
    keep: float | None = None


def search_surviving(costs: CostTables, survive: Survive, settings: SearchSettings) -> Outcome | None:
    """Return the plan that serves most after the worst loss, or keeps its demand through it; None: there is none.

    Raises:
        NoPlanFoundError: none was found in time, nor proved impossible.
    """
    return _Search(costs, survive, settings).run()


class _Search:
    """One search. The values of its plans are what is left if that is maximised, otherwise the objective's."""

    def __init__(self, costs: CostTables, survive: Survive, settings: SearchSettings) -> None:
        self.costs, self.survive, self.settings, self.budget = costs, survive, settings, settings.budget
        self.master = master_of(costs)
        cluster = costs.problem.cluster
        num = len(cluster.zones()) if survive.place == "zone" else cluster.num_nodes()
        self.share = (num - 1) / num  # at most this share of a plan is left
        self.leaves_most = self.master.maximises and survive.keep is None
        demand = self.master.demand
        self.demand = demand
        if demand is not None and self.share:
            self.master = replace(self.master, demand=demand / self.share)
        self.enumerated = EnumeratedColumns(costs, self.master.row_costs, self.master.pins)
        self.relaxed: LpSolution | None = None

    def run(self) -> Outcome | None:
        if not self.share:
            return None
        self._relax()
        if self.relaxed is None:
            return None
        self.settings.tell("bound by fractions of replicas")
        found, _ = self._solve(self._chosen(self._likeliest()))
        bound, is_settled = self._bound(), False
        if self.enumerated.num_compositions <= POLICY.most_listed:
            distance = self._distance(found)
            if self.enumerated.list_within(self._prices(self.relaxed), distance, self.budget):
                chosen = self._chosen(np.flatnonzero(self._reduced() <= distance * (1.0 + 1e-6)))
                if len(chosen) <= MOST_COLUMNS:
                    other, is_settled = self._solve(chosen)
                    if other is not None and (found is None or self._is_better(other, found)):
                        found = other
                    # A slower replica takes less of the share that must be left, so none is ruled out by a faster one
                    # then, and the bound is the relaxation's.
                    if other is not None and self.survive.keep is None:
                        bound = self._tighter(other.bound, bound)
        if found is None:
            if is_settled and self.survive.keep is None:
                return None
            raise NoPlanFoundError(UNDECIDED)
        return self._outcome(found, bound)

    def _relax(self) -> None:
        self.enumerated.list_first(self.costs, self.budget)
        for _ in range(POLICY.most_rounds):
            lp = None
            if self.enumerated.columns is not None:
                self.relaxed = self.master.solve_lp(self.enumerated.columns)
                lp = self.relaxed or self.master.solve_lp(self.enumerated.columns, is_elastic=True)
            if self.budget.is_spent():
                raise self.settings.stopped()
            if self.enumerated.list_improving(None if lp is None else self._prices(lp), self.budget):
                return
        raise NoPlanFoundError(UNDECIDED)

    def _prices(self, lp: LpSolution) -> ColumnPrices:
        row_costs = 0.0 if self.relaxed is None else self.master.row_costs
        return ColumnPrices(lp.side_prices + row_costs, lp.replica_price, lp.rate_prices)

    def _reduced(self) -> FloatArray:
        columns, lp = self.enumerated.columns, self.relaxed
        assert lp is not None, "prices say what is lost"
        assert columns is not None, "prices are those of columns"
        return np.asarray(lp.worth(columns) + columns.costs - lp.rate_prices[columns.sides] * columns.rates)

    def _likeliest(self) -> IntArray:
        columns, reduced = self.enumerated.columns, self._reduced()
        assert columns is not None, "prices are those of columns"
        assert self.relaxed is not None, "it has counts"
        inside = padded(self.relaxed.counts, len(reduced)) > 0.0
        ratio = np.array([reduced, reduced / columns.uses.sum(axis=1).clip(1)])
        for side in np.unique(columns.sides):
            here = np.flatnonzero(columns.sides == side)
            for order in ratio:
                inside[here[np.argsort(order[here])[:FEW]]] = True
        return np.flatnonzero(inside)

    def _chosen(self, which: IntArray) -> IntArray:
        columns = self.enumerated.columns
        assert columns is not None, "they are numbered"
        return which if self.master.pins is not None else which[columns.some(which).undominated()]

    def _distance(self, found: _Surviving | None) -> float:
        """Return what a plan that is better than the one found may lose against the relaxation's bound."""
        assert self.relaxed is not None, "it has a value"
        if found is None:
            return float("inf")
        least = found.value / self.share if self.leaves_most else found.value
        return abs(self.relaxed.value - least)

    def _bound(self) -> float:
        assert self.relaxed is not None, "it has a value"
        return self.relaxed.value * (self.share if self.leaves_most else 1.0)

    def _is_better(self, one: _Surviving, other: _Surviving) -> bool:
        return one.value > other.value if self.master.maximises else one.value < other.value

    def _tighter(self, one: float, other: float) -> float:
        return min(one, other) if self.master.maximises else max(one, other)

    def _solve(self, chosen: IntArray) -> tuple[_Surviving | None, bool]:
        """Solve whole counts of columns; return the best, and whether the search of them ended."""
        columns = self.enumerated.columns
        assert columns is not None, "they are numbered"
        if not len(chosen):
            return None, True
        some, kinds = columns.some(chosen), [self.enumerated.kind(int(i)) for i in chosen]
        rows = _Rows(self.costs, some, kinds, self.survive)
        if rows.patterns is None:
            return None, False
        if not self.leaves_most:
            found, is_settled = self._whole(some, lambda highs: rows.keep(highs, self.survive.keep, self.demand))
            if found is None:
                return None, is_settled
            return _Surviving(chosen, found, found.value, found.bound), is_settled
        found, is_settled = self._whole(some, rows.leave_most)
        if found is None or rows.left is None:
            return None, is_settled
        left, bound = rows.left()
        fuller, _ = self._whole(some, lambda highs: rows.leave(highs, left * (1.0 - SLACK)))
        return _Surviving(chosen, fuller or found, left, bound), is_settled

    def _whole(self, columns: Columns, extend: Callable[[Any], object]) -> tuple[MilpSolution | None, bool]:
        end_s = self.budget.elapsed_s() + max(POLICY.least_s, self.budget.remaining_s())
        found, is_settled = self.master.solve_milp(
            columns, time_limit_s=max(POLICY.least_s, self.budget.remaining_s()), gap=self.settings.gap_target / 10,
            seed=self.settings.seed, nodes=NODES, extend=extend,
            stop=lambda: self.budget.cancelled.is_set() or self.budget.elapsed_s() >= end_s,
        )  # fmt: skip
        return (found if self.master.serves(found) else None), is_settled

    def _outcome(self, found: _Surviving, bound: float) -> Outcome:
        assert self.relaxed is not None, "it has prices"
        counts, maximises = found.solution.counts, self.master.maximises
        value = found.solution.value
        whole = max(found.solution.bound, value) if self.leaves_most else sound_bound(bound, value, maximises=maximises)
        self.settings.tell("whole counts", value, whole, abs(whole - value) / max(abs(value), 1e-12))
        return Outcome(
            chosen=tuple(
                (self.enumerated.template(int(found.chosen[i])), int(counts[i])) for i in np.flatnonzero(counts)
            ),
            value=value,
            bound=whole,
            row_prices=self.relaxed.row_prices,
            rate_prices=self.relaxed.rate_prices,
            flows=found.solution.flows,
            interrupted=self.budget.cancelled.is_set(),
            left_bound=max(bound, found.value) if self.leaves_most else None,
        )


@dataclass(frozen=True, slots=True)
class _Surviving:
    """Whole counts of chosen columns, with what is left or costs, and the bound on it."""

    chosen: IntArray
    solution: MilpSolution
    value: float
    bound: float


Pattern = tuple[int, ...]  # columns that one node runs, ascending, a column for each replica


class _Rows:
    """Rows and columns that a model of the master gains: what is left after each loss."""

    def __init__(self, costs: CostTables, columns: Columns, kinds: Sequence[Kind], survive: Survive) -> None:
        self.columns, self.costs = columns, costs
        self.limits = costs.resources.limits
        self.zones = costs.problem.cluster.zones() if survive.place == "zone" else ()
        self.zone_of = [costs.classes[kind[0][0]].zone for kind in kinds]
        self.on_one = [least_nodes_of(costs.classes, kind) == 1 and not self.zones for kind in kinds]
        self.places = self._places(kinds)
        self.patterns = self._patterns(kinds)
        # A rate above all others: without limits, HiGHS 1.12 to 1.15 may call a choice the optimum that is far from it.
        taken = columns.uses.sum(axis=1).clip(1)
        self.most = 2.0 * float(self.limits.sum()) * float((columns.rates / taken).max())
        self.left: Callable[[], tuple[float, float]] | None = None

    def _places(self, kinds: Sequence[Kind]) -> dict[int, list[int]]:
        """Return the one-node columns of each place."""
        of_class, found = shared_places(self.costs.classes), defaultdict[int, list[int]](list)
        for k, kind in enumerate(kinds):
            if self.on_one[k]:
                found[of_class[kind[0][0]]].append(k)
        return found

    def _patterns(self, kinds: Sequence[Kind]) -> dict[int, list[Pattern]] | None:
        """Return the patterns of each place, None if there are too many."""
        found, total = dict[int, list[Pattern]](), 0
        sizes = [c.gpus_per_node for c in self.costs.classes]
        takes = [Counter({c: sum(parts) for c, parts in kind}) for kind in kinds]
        for place, members in self.places.items():
            listed = list[Pattern]()
            stack: list[tuple[Pattern, int, Counter[int]]] = [((), 0, Counter())]
            while stack:
                begun, first, used = stack.pop()
                for position in range(first, len(members)):
                    k = members[position]
                    if any(used[c] + n > sizes[c] for c, n in takes[k].items()):
                        continue
                    listed.append((*begun, k))
                    stack.append(((*begun, k), position, used + takes[k]))
                    if total + len(listed) > MOST_PATTERNS:
                        return None
            found[place], total = listed, total + len(listed)
        return found

    def leave_most(self, highs: Any) -> None:
        """Extend the model and maximise what is left instead."""
        served = np.flatnonzero(np.array(highs.getLp().col_cost_))
        left = self._extend(highs)
        for i in served:
            highs.changeColCost(int(i), 0.0)
        highs.changeColCost(left, 1.0)

        def result() -> tuple[float, float]:
            info = highs.getInfo()
            value, bound = float(info.objective_function_value), float(info.mip_dual_bound)
            return value, max(value, bound) if np.isfinite(bound) else np.inf

        self.left = result

    def leave(self, highs: Any, least: float) -> None:
        """Extend the model and require that so much is left."""
        highs.changeColBounds(self._extend(highs), least, np.inf)

    def keep(self, highs: Any, share: float | None, demand: float | None) -> None:
        """Extend the model and require that a share of what is served is left, and the demand."""
        lp = highs.getLp()
        served, maximises = np.array(lp.col_cost_), lp.sense_ == highspy.ObjSense.kMaximize
        left = self._extend(highs)
        if demand is not None:
            highs.changeColBounds(left, demand, np.inf)
        if share is not None and maximises:
            entries = {int(i): -share * float(served[i]) for i in np.flatnonzero(served)}
            add_row(highs, 0.0, np.inf, entries | {left: 1.0})

    def _extend(self, highs: Any) -> int:
        """Add what is left after each loss; return the number of its column."""
        assert self.patterns is not None, "they were listed"
        columns, routes = self.columns, self.costs.routes
        num, rates, sides = len(columns.rates), columns.rates, columns.sides
        zones = len(routes.zones)
        is_sending = (sides != UNIFIED) & (sides <= 2 * zones)
        roles = np.array([sides == UNIFIED, is_sending, (sides != UNIFIED) & ~is_sending])
        served = rates * roles  # [roles, K]
        flows = range(num, num + (zones**2 if routes.splits_roles else 0))
        left = _variable(highs, self.most)
        totals = [self._total(highs, {int(k): float(rates[k]) for k in np.flatnonzero(role)}) for role in roles]
        flow = self._total(highs, dict.fromkeys(flows, 1.0))

        def loses(lost: dict[int, FloatArray]) -> None:
            """Add the rows of one loss: what each column takes that counts it."""
            after = flow
            if any(lost_of[1:].any() for lost_of in lost.values()):
                after = _variable(highs, self.most)
                add_row(highs, -np.inf, 0.0, {after: 1.0, flow: -1.0})
                for side in (1, 2):
                    gone = {i: float(lost_of[side]) for i, lost_of in lost.items() if lost_of[side]}
                    add_row(highs, -np.inf, 0.0, {after: 1.0, totals[side]: -1.0, **gone})
            gone = {i: float(lost_of[0]) for i, lost_of in lost.items() if lost_of[0]}
            add_row(highs, -np.inf, 0.0, {left: 1.0, totals[0]: -1.0, after: -1.0, **gone})

        if self.zones:
            for zone in self.zones:
                loses({k: served[:, k] for k in range(num) if self.zone_of[k] == zone})
            return left
        classes, of_class = self.costs.classes, shared_places(self.costs.classes)
        chosen = [dict[int, float]() for _ in range(num)]
        for place, patterns in self.patterns.items():
            groups = {g.name: g.count for c, at in zip(classes, of_class, strict=True) if at == place for g in c.groups}
            nodes = float(sum(groups.values()))
            counted = list[int]()
            for pattern in patterns:
                y, b = _variable(highs, nodes, whole=True), _variable(highs, 1.0, whole=True)
                add_row(highs, -np.inf, 0.0, {y: 1.0, b: -nodes})
                lost = np.zeros(3)
                for k, count in Counter(pattern).items():
                    chosen[k][y] = -float(count)
                    lost += count * served[:, k]
                loses({b: lost})
                counted.append(y)
            add_row(highs, -np.inf, nodes, dict.fromkeys(counted, 1.0))
        for k in range(num):
            if self.on_one[k]:
                add_row(highs, 0.0, 0.0, {k: 1.0, **chosen[k]})
                continue
            use = columns.uses[k]
            most = float(np.min(self.limits[use > 0] // use[use > 0]))
            b = _variable(highs, 1.0, whole=True)
            add_row(highs, -np.inf, 0.0, {k: 1.0, b: -most})
            loses({b: served[:, k]})
        return left

    def _total(self, highs: Any, entries: dict[int, float]) -> int:
        total = _variable(highs, self.most)
        add_row(highs, 0.0, 0.0, {total: -1.0, **entries})
        return total


def _variable(highs: Any, most: float, *, whole: bool = False) -> int:
    """Add a variable from 0 to ``most``, and return its number."""
    highs.addVar(0.0, most)
    number = int(highs.getNumCol()) - 1
    if whole:
        highs.changeColIntegrality(number, highspy.HighsVarType.kInteger)
    return number
