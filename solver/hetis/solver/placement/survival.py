"""The most that is served after the worst loss of a node or a zone, and the least that keeps a demand through it.

Columns of an engine's family; a *way* cuts a replica into pieces, one for each node that it uses; a *pattern* is what
one node runs: pieces that fit together.

    Sets       k columns (rate_k, on a side); w ways of k; q pieces; p patterns of pieces; i what may be lost together:
               a pattern's node, a replica that floats (or everything in a zone)
    Data       u_i, s_i, d_i  requests/s of unified, sending and receiving replicas that a loss of i takes
    Variables  n_k >= 0 whole, flows F(z, y) >= 0 as in the master;  z_kw >= 0 whole  replicas cut so;  y_p >= 0 whole
               nodes that run pattern p;  b_i in {0, 1}  whether there is any i;  G >= 0  what is left after the worst
               loss;  F_i >= 0  flows then
    Maximise   G, then the whole rate W = U + F;  or W with G >= keep W;  or minimise the cost with G >= demand
    Such that  the master's rows;  n_k = sum_w z_kw  every k;  sum_p y_p <= nodes of every place
               sum_kw (pieces q in w) z_kw = sum_p (those in p) y_p                 every q
               y_p <= nodes b_p
               G <= U + F_i - u_i b_i;   F_i <= F;   F_i <= S - s_i b_i;   F_i <= D - d_i b_i      every i

The losses themselves are the coefficients of b, so the relaxation is tight; so are rows of the mean loss of a node of
each place, of which a replica is a part on as few nodes as it needs. Where all ways and patterns are too many, a
replica that fits in a node is in one, others *float*: they are on no node and are lost alone. The bound is then that of
a second program, in which all replicas of several parts may float. Flows after a loss may take any route. Both only
raise the bound. Plans state what `hetis.solver.advice` derives from their named GPUs.

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
from hetis.solver.placement.columns import Columns, padded
from hetis.solver.placement.enumeration import ColumnPrices, EnumeratedColumns
from hetis.solver.placement.fleet import FloatArray, IntArray
from hetis.solver.placement.master import UNDECIDED, LpSolution, MilpSolution, master_of
from hetis.solver.placement.outcome import Outcome, sound_bound
from hetis.solver.placement.policy import POLICY
from hetis.solver.placement.replicas.kinds import Kind
from hetis.solver.placement.replicas.tables import CostTables
from hetis.solver.placement.survival_rows import LossRows

FEW = 40  # columns of each side in a first plan
MOST_COLUMNS = 1500  # of a proof
NODES = 20_000  # limit on nodes of a search tree


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
        found = self._solve(self._chosen(self._likeliest())).found
        bound, proves_none = self._bound(), False
        if self.enumerated.num_compositions <= POLICY.most_listed:
            distance = self._distance(found)
            if self.enumerated.list_within(self._prices(self.relaxed), distance, self.budget):
                chosen = self._chosen(np.flatnonzero(self._reduced() <= distance * (1.0 + 1e-6)))
                if len(chosen) <= MOST_COLUMNS:
                    solved = self._solve(chosen, proves=True)
                    if solved.found is not None and (found is None or self._is_better(solved.found, found)):
                        found = solved.found
                    bound, proves_none = self._tighter(solved.bound, bound), solved.proves_none
        if found is None:
            if proves_none:
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
        if self.master.pins is not None or not len(which):
            return which
        some = columns.some(which)
        if self.survive.place == "node":  # a replica may stand for another where its parts fit beside the same others
            some = replace(some, uses=_numbers_of_parts([self.enumerated.kind(int(i)) for i in which]))
        return which[some.undominated()]

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

    def _solve(self, chosen: IntArray, *, proves: bool = False) -> _Solved:
        """Solve whole counts of columns; if it ``proves``, the bound holds for all plans of these columns."""
        columns, none = self.enumerated.columns, -np.inf if self.master.maximises else np.inf
        assert columns is not None, "they are numbered"
        if not len(chosen):
            return _Solved(None, none, proves_none=True)
        some, kinds = columns.some(chosen), [self.enumerated.kind(int(i)) for i in chosen]
        rows = LossRows(self.costs, some, kinds, self.survive.place, keep=self.survive.keep, demand=self.demand)
        if rows.patterns is None:
            return _Solved(None, -none, proves_none=False)
        solution, is_settled = self._whole(some, rows.pose)
        found, bound = None, none if is_settled else -none
        if solution is not None:
            if self.survive.keep is not None:
                solution = self._promised(some, solution, rows.reached()[0])
            value, bound = rows.reached() if self.master.maximises else (solution.value, solution.bound)
            fuller = self._whole(some, lambda highs: rows.leave(highs, value))[0] if self.leaves_most else None
            found = _Surviving(chosen, fuller or solution, value)
        if proves and (rows.floats_beside or self.survive.keep is not None):
            solution, is_settled = self._whole(some, rows.pose_bound)
            bound = none if is_settled else -none
            if solution is not None:
                bound = rows.reached()[1]
        return _Solved(found, bound, proves_none=found is None and solution is None and is_settled)

    def _promised(self, columns: Columns, found: MilpSolution, value: float) -> MilpSolution:
        """Return counts with flows of which a share is left: all that they could carry may be more than may be lost."""
        most, unified = found.flows.sum(), self.master.served(columns, found.counts, np.zeros_like(found.flows))
        flows = found.flows * (min(1.0, max(0.0, value - unified) / most) if most else 1.0)
        return replace(found, flows=flows, value=unified + float(flows.sum()))

    def _whole(self, columns: Columns, extend: Callable[[Any], object]) -> tuple[MilpSolution | None, bool]:
        limit_s = max(POLICY.least_s, self.budget.remaining_s())
        end_s = self.budget.elapsed_s() + limit_s
        found, is_settled = self.master.solve_milp(
            columns, time_limit_s=limit_s, gap=self.settings.gap_target / 10,
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
    """Whole counts of chosen columns, with what is left, what they serve or what they cost."""

    chosen: IntArray
    solution: MilpSolution
    value: float


@dataclass(frozen=True, slots=True)
class _Solved:
    """The best counts found of some columns, if any, and a bound on the value of all."""

    found: _Surviving | None
    bound: float
    proves_none: bool


def _numbers_of_parts(kinds: Sequence[Kind]) -> IntArray:
    """Return how many parts of at least every size replicas have of each class; [K, .].

    A replica with no more of any fits on the nodes of another, each part on that of a part as large.
    """
    sizes = sorted({(c, size) for kind in kinds for c, parts in kind for size in parts})
    parts_of = [dict(kind) for kind in kinds]
    return np.array([[sum(part >= size for part in parts.get(c, ())) for c, size in sizes] for parts in parts_of])
