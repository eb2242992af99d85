"""The master's columns: replicas by rate, use, cost and side, and the prices that prove a bound."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from hetis.solver.placement.fleet import IntArray
from hetis.solver.placement.replicas.tables import BoolArray, CostTables, FloatArray
from hetis.solver.placement.replicas.template import Template, use_of

Number = TypeVar("Number", np.int64, np.float64)
COMPARED = 256  # columns that are compared with one another at once


@dataclass(frozen=True, slots=True)
class Columns:
    """The known columns: rates [K] in requests/s, costs [K], uses [K, rows], sides [K] (see `Routes`)."""

    rates: FloatArray
    costs: FloatArray
    uses: IntArray
    sides: IntArray

    def some(self, which: IntArray) -> Columns:
        """Return the columns with these numbers."""
        return Columns(*(getattr(self, field.name)[which] for field in fields(self)))

    def undominated(self) -> IntArray:
        """Return the numbers of columns that no other column on the same side dominates.

        A column dominates if it has at least the rate and takes no more of any row; it then costs no more either, since
        costs follow from rows. Presolve finds the same but takes a hundred times as long.
        """
        order, found = np.lexsort((self.uses.sum(axis=1), -self.rates)), [np.zeros(0, dtype=np.int64)]
        for side in np.unique(self.sides):
            of_side = order[self.sides[order] == side]
            found.append(of_side[_undominated(self.uses[of_side])])
        return np.sort(np.concatenate(found))

    def followed_by(self, more: Columns) -> Columns:
        """Return these columns followed by others."""
        pairs = ((getattr(self, field.name), getattr(more, field.name)) for field in fields(self))
        return Columns(*map(np.concatenate, pairs))


def _undominated(uses: IntArray) -> IntArray:
    """Return the numbers of columns that take less of some row than any earlier one; ``uses`` is [K, rows]."""
    found = np.zeros(0, dtype=np.int64)
    for begin in range(0, len(uses), COMPARED):
        block = np.arange(begin, min(begin + COMPARED, len(uses)))
        block = block[~np.any(_take_no_more(uses[found], uses[block]), axis=0)]
        block = block[~np.any(np.triu(_take_no_more(uses[block], uses[block]), 1), axis=0)]
        found = np.concatenate([found, block])
    return found


def _take_no_more(some: IntArray, others: IntArray) -> BoolArray:
    """Return whether each of some columns takes no more of any row than each other column; [some, others]."""
    takes_no_more = np.ones((len(some), len(others)), dtype=bool)
    for of_some, of_others in zip(some.T, others.T, strict=True):  # row by row, in far less memory than at once
        takes_no_more &= of_some[:, None] <= of_others
    return takes_no_more


def padded(counts: npt.NDArray[Number], num: int) -> npt.NDArray[Number]:
    """Return counts of the first columns extended with zeros to ``num`` columns."""
    return np.pad(counts, (0, num - len(counts)))


def distinct(costs: CostTables, templates: Iterable[Template]) -> list[Template]:
    """Return the templates that fit in the fleet, the first of each shape."""
    found = dict[tuple[object, ...], Template]()
    for template in templates:
        if np.all(use_of(costs, template) <= costs.resources.limits):
            found.setdefault(template.shape, template)
    return list(found.values())


def columns_of(costs: CostTables, templates: Sequence[Template], row_costs: FloatArray) -> Columns:
    """Return templates as columns; ``row_costs`` [rows] are the costs of what they take."""
    uses: IntArray = np.array([use_of(costs, template) for template in templates], dtype=np.int64)
    uses = uses.reshape(len(templates), len(costs.resources.rows))
    sides = np.array([costs.side_of(template.scope, template.mix) for template in templates], dtype=np.int64)
    load = costs.problem.assumptions.lanes.load
    rates = [template.rate * load(costs.mixes[template.mix].role) for template in templates]
    return Columns(np.array(rates), uses @ row_costs, uses, sides)


@dataclass(frozen=True, slots=True)
class Bound:
    """A bound on all plans, with the dual feasible prices that prove it.

    ``link_prices`` [Z, Z] and ``rate_prices`` [sides] are those of a request/s.
    """

    value: float
    row_prices: FloatArray
    link_prices: FloatArray
    rate_prices: FloatArray


def first_prices(costs: CostTables) -> FloatArray:
    """Return initial row prices, at which a GPU is worth about its memory bandwidth; [rows]."""
    types, rows = costs.problem.cluster.gpu_types, costs.resources.rows
    worth = np.array([types[costs.classes[g].gpu].mem_bytes_per_s for g, _ in rows])
    return np.asarray(worth / worth.max() * costs.resources.counts_gpus)
