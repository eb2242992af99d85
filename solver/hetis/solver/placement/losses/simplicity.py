"""The simplest of the plans that lose little: fewest points, with a bound.

    Sets       as in `survival.py`: columns k that a plan within the limits may contain, ways w, patterns p, losses i
    Data       R  requests/s that are wanted: the least rate, or the demand
    Variables  those of `survival.py`;  m in [0, 1]  the share of R that is missing after the worst loss
               x_s in {0, 1}  whether there are replicas of shape s: a role, and TP groups of GPU types
    Minimise   100 m + 2 sum_kw (replicas cut into several pieces) z_kw + 5 sum_s x_s
    Such that  the value within the limit;  m >= 1 - G / R
               n_k <= (replicas of k that fit) x_s     every k of every shape s
               and the rows of `survival.py`

Of the plans with as few points, the one of the best value is chosen, of the same shapes if columns are many. A point is
a percent of R that depends on one node; a replica over several nodes counts 2, and a shape 5, so that another one must
save 5 percent. Replicas are not counted, nor their nodes, which would reward giants.

A plan whose value is within the limit has only columns whose reduced cost is at most the distance of the relaxation's
bound from the limit. All of these are listed, without those that have a shape of their own and that another dominates:
with a faster replica on some of the same GPUs more is left, on no more nodes, in no more shapes. So HiGHS's bound on
their points is one on the points of all plans. Where they are too many, the likeliest are searched, and the bound is
one shape.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from hetis.solver.budget import SearchSettings
from hetis.solver.placement.columns import Columns, padded
from hetis.solver.placement.enumeration import ColumnPrices, EnumeratedColumns
from hetis.solver.placement.fleet import IntArray
from hetis.solver.placement.losses.loss_rows import POINTS, LossRows, Within, shape_of
from hetis.solver.placement.master import LpSolution, Master, MilpSolution
from hetis.solver.placement.outcome import Simplicity
from hetis.solver.placement.policy import POLICY
from hetis.solver.placement.replicas.kinds import Kind, Layout
from hetis.solver.placement.replicas.tables import CostTables

FEW = 40  # columns of each side in a first plan, for each order; up to as many, the best value is proven
MOST_COLUMNS = 1500  # of a proof
NODES = 60  # limit on nodes of a search tree: some seconds for 700 columns
ROUGHER = 10.0  # gap of points, a percent each, to that of values
SAME = 1e-6  # tolerance of points while the value is improved, and of reduced costs


@dataclass(frozen=True, slots=True, kw_only=True)
class Simplest:
    """Whole counts of chosen columns, the nodes of each column's replicas, and their points."""

    chosen: IntArray
    solution: MilpSolution
    layouts: Sequence[Sequence[Layout]]
    simplicity: Simplicity


def simplest(
    costs: CostTables, master: Master, enumerated: EnumeratedColumns, relaxed: LpSolution, settings: SearchSettings,
    within: Within, *, distance: float, known: IntArray, place: str = "node", keep: float | None = None,
) -> Simplest | None:  # fmt: skip
    """Return the simplest plan within limits, None if none was found in time.

    A plan within them has no column whose reduced cost in the relaxation exceeds ``distance``. ``known`` are the
    columns of one such plan. ``place`` and ``keep`` are those of `Survive`.
    """
    prices = ColumnPrices(relaxed.side_prices + master.row_costs, relaxed.replica_price, relaxed.rate_prices)
    lists_all = enumerated.num_compositions <= POLICY.most_listed and enumerated.list_within(
        prices, distance * (1.0 + SAME), settings.budget
    )
    columns = enumerated.columns
    assert columns is not None, "a plan is known"

    def rows_of(which: IntArray) -> tuple[IntArray, LossRows]:
        if master.pins is None:
            shapes = [shape_of(costs, int(columns.sides[i]), enumerated.kind(int(i))) for i in which]
            number_of = Counter(shapes)
            shared = which[[number_of[shape] > 1 for shape in shapes]]
            which = np.union1d(undominated(enumerated, which, place), shared)
        chosen = np.union1d(which, known)
        kinds = [enumerated.kind(int(i)) for i in chosen]
        return chosen, LossRows(costs, columns.some(chosen), kinds, place, keep=keep, demand=master.demand)

    proves = False
    if lists_all:
        chosen, rows = rows_of(np.flatnonzero(relaxed.reduced(columns) <= distance * (1.0 + SAME)))
        proves = len(chosen) <= MOST_COLUMNS and rows.patterns is not None
    if not proves:
        chosen, rows = rows_of(likeliest(enumerated, relaxed))
    if rows.patterns is None:
        return None
    solve = partial(whole_counts, master, rows.columns, settings, gap=ROUGHER * settings.gap_target, nodes=NODES)
    found, _ = solve(lambda highs: rows.simplify(highs, within, floats=rows.floats_beside))
    bound = rows.reached()[1] if proves and found is not None else POINTS[-1]
    if found is None or rows.has_floated():
        found, _ = solve(lambda highs: rows.simplify(highs, within))
    if found is None:
        return None
    points, layouts, parts = rows.reached()[0], rows.layouts(), rows.points()
    only = None if len(chosen) <= FEW else {rows.shape(int(k)) for k in np.flatnonzero(found.counts)}
    better, _ = solve(lambda highs: rows.simplify(highs, within, points + SAME, only=only))
    if better is not None and keep is not None:
        better = promised(master, rows.columns, better, rows.reached()[0])
    if better is not None and (keep is not None or master.prefers(better.value, found)):
        found, layouts, parts = better, rows.layouts(), rows.points()
    simplicity = Simplicity(*parts, min(sum(parts), max(POINTS[-1], bound)))
    return Simplest(chosen=chosen, solution=found, layouts=layouts, simplicity=simplicity)


def promised(master: Master, columns: Columns, found: MilpSolution, value: float) -> MilpSolution:
    """Return counts with flows of which a share is left: all that they could carry may be more than may be lost."""
    unified = master.served_of_each(columns, found.counts, np.zeros_like(found.flows))
    by_flows = master.served_of_each(columns, found.counts, found.flows) - unified
    needed = np.maximum(0.0, value - unified)
    # Of the class that is served least, no more than the value is: it is enough to reduce the flows for one.
    shares = np.divide(needed, by_flows, out=np.ones_like(needed), where=by_flows > 0.0)
    flows = found.flows * float(shares.max().clip(0.0, 1.0))
    return replace(found, flows=flows, value=master.served(columns, found.counts, flows))


def whole_counts(
    master: Master, columns: Columns, settings: SearchSettings, extend: Callable[[Any], object], *, gap: float,
    nodes: int, counts: IntArray | None = None,
) -> tuple[MilpSolution | None, bool]:  # fmt: skip
    """Return whole counts of an extended master, and whether that is settled; ``counts`` are feasible ones."""
    budget = settings.budget
    limit_s = max(POLICY.least_s, budget.remaining_s())
    end_s = budget.elapsed_s() + limit_s

    def extended(highs: Any) -> None:
        extend(highs)
        if counts is not None:
            highs.setSolution(len(counts), np.arange(len(counts), dtype=np.int32), counts.astype(float))

    found, is_settled = master.solve_milp(
        columns, time_limit_s=limit_s, gap=gap, seed=settings.seed, nodes=budget.nodes(nodes), extend=extended,
        stop=lambda: budget.cancelled.is_set() or budget.elapsed_s() >= end_s, charge=budget.charge,
    )  # fmt: skip
    return (found if master.serves(found) else None), is_settled


def likeliest(enumerated: EnumeratedColumns, relaxed: LpSolution) -> IntArray:
    """Return the numbers of the columns of each side that lose least, in all and per GPU, and of the relaxation's."""
    columns = enumerated.columns
    assert columns is not None, "they are numbered"
    reduced = relaxed.reduced(columns)
    inside = padded(relaxed.counts, len(reduced)) > 0.0
    for side in np.unique(columns.sides):
        here = np.flatnonzero(columns.sides == side)
        for order in (reduced, reduced / columns.uses.sum(axis=1).clip(1)):
            inside[here[np.argsort(order[here])[:FEW]]] = True
    return np.flatnonzero(inside)


def undominated(enumerated: EnumeratedColumns, which: IntArray, place: str) -> IntArray:
    """Return those of some columns that no other of them could replace, in programs that count losses of a place.

    A replica may stand for another on the same ``node`` if its parts fit beside the same others, in the same ``zone``
    if it takes no more of any row.
    """
    if not len(which) or enumerated.columns is None:
        return which
    some = enumerated.columns.some(which)
    uses = some.uses if place == "zone" else _numbers_of_parts([enumerated.kind(int(i)) for i in which])
    return which[Columns(some.rates, some.costs, uses, some.sides).undominated()]


def _numbers_of_parts(kinds: Sequence[Kind]) -> IntArray:
    """Return how many parts of at least every size replicas have of each class; [K, .].

    A replica with no more of any fits on the nodes of another, each part on that of a part as large.
    """
    sizes = sorted({(c, size) for kind in kinds for c, parts in kind for size in parts})
    parts_of = [dict(kind) for kind in kinds]
    return np.array([[sum(part >= size for part in parts.get(c, ())) for c, size in sizes] for parts in parts_of])
