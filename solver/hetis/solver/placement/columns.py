"""Replicas as columns of the master, and the prices that prove a bound."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from hetis.solver.placement.fleet import IntArray
from hetis.solver.placement.master import Columns
from hetis.solver.placement.tables import CostTables, FloatArray
from hetis.solver.placement.template import Template, use_of


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
    return Columns(np.array([template.rate for template in templates]), uses @ row_costs, uses, sides)


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
