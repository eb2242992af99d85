"""The most that is served after the worst loss of a node or a zone, and the least that keeps a demand through it.

Columns of an engine's family; a *way* cuts a replica into pieces, one for each node that it uses; a *pattern* is what
one node runs: pieces that fit together.

    Sets       k columns (rate_k, on a side); w ways of k; q pieces; p patterns of pieces; i what may be lost together:
               a pattern's node, a replica that floats (or everything in a zone)
    Data       u_i, s_i, d_i  requests/s of unified, sending and receiving replicas that a loss of i takes
    Variables  n_k >= 0 whole, flows F(z, y) >= 0 as in the master;  z_kw >= 0 whole  replicas cut so;  y_p >= 0 whole
               nodes that run pattern p;  b_i in {0, 1}  whether there is any i;  G >= 0  what is left after the worst
               loss
    Maximise   G, then the whole rate W = U + F;  or W with G >= keep W;  or minimise the cost with G >= demand
    Such that  the master's rows;  n_k = sum_w z_kw  every k;  sum_p y_p <= nodes of every place
               sum_kw (pieces q in w) z_kw = sum_p (those in p) y_p                 every q
               y_p <= nodes b_p
               G <= U + F - u_i b_i;   G <= U + S - (u_i + s_i) b_i;   G <= U + D - (u_i + d_i) b_i      every i

With classes of requests, U, F, S, D and losses are those of a range R, and G is at most, for every class, the sum of
one of its three limits over F_R, for any choice of these, over the ranges with the class. W is then the least that is
served of any class, which binaries of the classes say where a share of it must be left.

The losses themselves are the coefficients of b, so the relaxation is tight; so are rows of the mean loss of a node of
each place, of which a replica is a part on as few nodes as it needs. GPUs are named as the patterns of the solution
say, so that a plan leaves G. Where all ways and patterns are too many, a replica that fits in a node is in one, others
*float*: they are on no node and are lost alone. The bound is then that of a second program, in which all replicas of
several parts may float. Flows after a loss may take any route. Both only raise the bound. Plans state what
`hetis.solver.advice` derives from their named GPUs.

Some N nodes (zones) of a plan serve W; each set of N - 1 of them at least G, and no replica is used more than fully, so
W >= G N / (N - 1), unless links limit the flows. Only columns that such a plan may contain are listed: those whose
reduced cost is within the distance of the relaxation's bound.

Columns are the fastest replicas on their GPUs, and only those that no other on some of these GPUs dominates. A slower
one leaves no more, but may be in a better plan with `Survive.keep`, as it takes less of what must be left. The bound
is then that of plans that promise W <= U + F, with G >= keep W: with faster replicas a plan promises as much.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hetis.solver.budget import SearchSettings
from hetis.solver.errors import NoPlanFoundError
from hetis.solver.placement.columns import Columns
from hetis.solver.placement.enumeration import ColumnPrices, EnumeratedColumns
from hetis.solver.placement.fleet import FloatArray, IntArray
from hetis.solver.placement.losses.loss_rows import LossRows, Within
from hetis.solver.placement.losses.simplicity import (
    MOST_COLUMNS,
    Simplest,
    likeliest,
    promised,
    simplest,
    undominated,
    whole_counts,
)
from hetis.solver.placement.master import UNDECIDED, LpSolution, MilpSolution, master_of
from hetis.solver.placement.outcome import Outcome, sound_bound
from hetis.solver.placement.policy import POLICY
from hetis.solver.placement.replicas.kinds import Layout
from hetis.solver.placement.replicas.tables import CostTables

NODES = 20_000  # limit on nodes of a search tree
FIRST_GAP = 0.01  # of a first plan, which only limits what is listed for the proof


@dataclass(frozen=True, slots=True, kw_only=True)
class Survive:
    """What a plan must survive: the loss of any one ``node`` or ``zone``.

    ``keep`` is the share of its rate that must be left; None: as much as possible, or the whole demand. Of the plans
    that lose at most ``simplest_within`` of the best value, the simplest is chosen (`simplicity.py`).
    """

    place: str
    keep: float | None = None
    simplest_within: float = 0.0


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
        capacity = costs.routes.capacity
        is_limited = costs.routes.has_links and bool(np.any(np.isfinite(capacity) & (capacity > 0.0)))
        # At most this share of a plan is left: what a link carries may be the same after a loss.
        self.share = 0.0 if num < 2 else 1.0 if is_limited else (num - 1) / num
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
        lists_all = self.enumerated.num_compositions <= POLICY.most_listed
        found = self._solve(self._chosen(self._likeliest()), FIRST_GAP if lists_all else self.settings.gap_target).found
        bound, proves_none = self._bound(), False
        if lists_all:
            distance = self._distance(found)
            if self.enumerated.list_within(self._prices(self.relaxed), distance, self.budget):
                chosen = self._chosen(np.flatnonzero(self._reduced() <= distance * (1.0 + 1e-6)))
                if len(chosen) <= MOST_COLUMNS:
                    found, bound, proves_none = self._prove(chosen, found, bound)
        if found is None:
            if proves_none:
                return None
            raise NoPlanFoundError(UNDECIDED)
        return self._outcome(self._fullest(found) if self.leaves_most else found, bound)

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
        assert self.relaxed is not None, "prices say what is lost"
        assert self.enumerated.columns is not None, "prices are those of columns"
        return self.relaxed.reduced(self.enumerated.columns)

    def _likeliest(self) -> IntArray:
        assert self.relaxed is not None, "prices say what is likely"
        return likeliest(self.enumerated, self.relaxed)

    def _chosen(self, which: IntArray) -> IntArray:
        return which if self.master.pins is not None else undominated(self.enumerated, which, self.survive.place)

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

    def _rows(self, chosen: IntArray) -> LossRows:
        columns, kinds = self.enumerated.columns, [self.enumerated.kind(int(i)) for i in chosen]
        assert columns is not None, "they are numbered"
        return LossRows(
            self.costs, columns.some(chosen), kinds, self.survive.place, keep=self.survive.keep, demand=self.demand
        )

    def _solve(self, chosen: IntArray, gap: float, start: _Surviving | None = None) -> _Solved:
        """Solve whole counts of columns, among them those of the ``start``."""
        none = -np.inf if self.master.maximises else np.inf
        rows = self._rows(chosen) if len(chosen) else None
        if rows is None or rows.patterns is None:
            return _Solved(None, none if rows is None else -none)
        counts = None if start is None else _counts_of(start, chosen)
        solution, is_settled = self._whole(rows.columns, rows.pose, gap, counts)
        if solution is None:
            return _Solved(None, none if is_settled else -none)
        if self.survive.keep is not None:
            solution = promised(self.master, rows.columns, solution, rows.reached()[0])
        value, bound = rows.reached() if self.master.maximises else (solution.value, solution.bound)
        return _Solved(_Surviving(chosen, solution, value, rows.layouts()), bound)

    def _prove(self, chosen: IntArray, found: _Surviving | None, bound: float) -> tuple[_Surviving | None, float, bool]:
        """Return the best plan, a bound on all plans of columns, and whether they have none.

        One plan may be known. If it is near the bound of a second program, the first one is not solved.
        """
        none, gap = -np.inf if self.master.maximises else np.inf, self.settings.gap_target
        if found is not None:
            chosen = np.union1d(chosen, found.chosen)
        rows = self._rows(chosen) if len(chosen) else None
        loosens = rows is not None and rows.patterns is not None and (rows.floats_beside or self.survive.keep)
        if loosens and rows is not None:
            known = None if found is None else _counts_of(found, chosen)
            solution, is_settled = self._whole(rows.columns, rows.pose_bound, gap / 2, known)
            bound = self._tighter(rows.reached()[1] if solution is not None else none if is_settled else -none, bound)
            if bound == none:
                return found, bound, found is None
            if found is not None:
                distance = abs(bound - found.value) / max(abs(found.value), 1e-12)
                if distance <= gap:
                    return found, bound, False
                gap = max(gap, distance)  # a plan that is better by less than half of it is not worth the time
        solved = self._solve(chosen, gap / 2, found)
        if solved.found is not None and (found is None or self._is_better(solved.found, found)):
            found = solved.found
        if not loosens:
            bound = self._tighter(solved.bound, bound)
        return found, bound, found is None and solved.bound == none and not loosens  # others may survive

    def _fullest(self, found: _Surviving) -> _Surviving:
        """Return the plan of the same columns that serves most of those that leave as much."""
        used = found.chosen[found.solution.counts > 0]
        chosen = np.union1d(used, self._chosen(self._likeliest()))
        rows, counts = self._rows(chosen), np.zeros(len(chosen), dtype=np.int64)
        counts[np.searchsorted(chosen, used)] = found.solution.counts[found.solution.counts > 0]
        solution, _ = self._whole(
            rows.columns, lambda highs: rows.leave(highs, found.value), self.settings.gap_target / 2, counts
        )
        if rows.patterns is None or solution is None or solution.value < found.solution.value:
            return found
        return _Surviving(chosen, solution, found.value, rows.layouts())

    def _simplest(self, found: _Surviving) -> tuple[_Surviving, Simplest | None]:
        """Return the simplest plan, and its points, of those that lose no more than a share of the best value."""
        share, keep = self.survive.simplest_within, self.survive.keep
        if not share or self.relaxed is None:
            return found, None
        least = found.value * (1.0 - share if self.master.maximises else 1.0 + share)
        within = Within(
            value=None if self.leaves_most else least, left=least if self.leaves_most else self.demand
        )  # fmt: skip
        simple = simplest(
            self.costs, self.master, self.enumerated, self.relaxed, self.settings, within,
            distance=abs(self.relaxed.value - (least / self.share if self.leaves_most else least)),
            known=found.chosen, place=self.survive.place, keep=keep,
        )  # fmt: skip
        if simple is None:
            return found, None
        return _Surviving(simple.chosen, simple.solution, found.value, simple.layouts), simple

    def _whole(
        self, columns: Columns, extend: Callable[[Any], object], gap: float, counts: IntArray | None = None
    ) -> tuple[MilpSolution | None, bool]:
        return whole_counts(self.master, columns, self.settings, extend, gap=gap, nodes=NODES, counts=counts)

    def _outcome(self, found: _Surviving, bound: float) -> Outcome:
        assert self.relaxed is not None, "it has prices"
        best, (found, simple) = found, self._simplest(found)
        counts, maximises = found.solution.counts, self.master.maximises
        value = found.solution.value
        if self.leaves_most:
            whole = max(best.solution.bound, best.solution.value, value)
        else:
            whole = sound_bound(bound, value, maximises=maximises)
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
            left_bound=max(bound, best.value) if self.leaves_most else None,
            layouts={
                self.enumerated.template(int(i)): tuple(nodes)
                for i, nodes in zip(found.chosen, found.layouts, strict=True)
                if nodes
            },
            simplicity=None if simple is None else simple.simplicity,
            best_value=None if simple is None else best.solution.value,
        )


@dataclass(frozen=True, slots=True)
class _Surviving:
    """Whole counts of chosen columns, with what is left, what they serve or what they cost, and their nodes."""

    chosen: IntArray
    solution: MilpSolution
    value: float
    layouts: Sequence[Sequence[Layout]]


@dataclass(frozen=True, slots=True)
class _Solved:
    """The best counts found of some columns, and a bound on the value of all, infinitely bad if there are none."""

    found: _Surviving | None
    bound: float


def _counts_of(start: _Surviving, chosen: IntArray) -> IntArray:
    """Return a plan's counts of other columns, which have its own among them."""
    counts = np.zeros(len(chosen), dtype=np.int64)
    counts[np.searchsorted(chosen, start.chosen)] = start.solution.counts
    return counts
