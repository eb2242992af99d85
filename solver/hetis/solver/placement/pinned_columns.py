"""Columns for pins, which the relaxation does not need because pricing ignores pins.

For each pin, GPUs that must be used are priced at almost nothing. If the number of replicas is limited, columns are
priced that are fast enough to be one of so few, with each GPU type almost free in turn. If rent or GPUs are limited,
these are the price of a replica.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from hetis.solver.budget import Budget
from hetis.solver.placement.configurations import configurations
from hetis.solver.placement.out_of_reach import rate_bound
from hetis.solver.placement.pins import Pins
from hetis.solver.placement.pricing import Pricer
from hetis.solver.placement.tables import CostTables, FloatArray, Scope
from hetis.solver.placement.template import Template

CHEAP = 1e-3  # price of GPUs that must be used, as a ratio to other prices
KEEP = 0.7  # share of the best ratio that a column must reach
TOLERANCE = 1e-2
QUICK = (0.0, 0.6, 0.4, 0.8, 0.25)  # least rate of a replica, as a share of the highest rate per allowed replica


def pinned_columns(
    costs: CostTables, pins: Pins, row_costs: FloatArray, prices: FloatArray, budget: Budget, threads: int
) -> Iterator[Template]:
    """Yield replicas that pins may require; ``prices`` [rows] are those of GPUs that no pin requires."""
    family, most = costs.problem.family, float(pins.upper[-1])
    each = rate_bound(costs) / most if np.isfinite(most) else 0.0
    free = [row > 0.0 for row in pins.wanted.T if row.any()]
    if each:  # with few replicas, GPUs of any type may be left idle
        rows = costs.resources.rows
        free += [np.zeros(len(rows), dtype=bool)]
        free += [np.array([costs.classes[g].gpu == gpu for g, _ in rows]) for gpu in _types(costs)]
    asked = [np.where(cheap, CHEAP * prices, prices) for cheap in free]
    asked += [np.maximum(row, CHEAP * row.max()) for row in pins.dear.T]  # the best rate per limited unit
    for least in dict.fromkeys(share * each for share in QUICK):
        quick = replace(costs, scopes=tuple(_quick(scope, least) for scope in costs.scopes))
        every = configurations(quick)
        for side in range(quick.routes.num_sides):
            pricer = Pricer(
                quick, [c for c in every if c.side == side], row_costs, max_copies=family.max_copies,
                max_pool=family.max_pool, threads=threads, tolerance=TOLERANCE,
            )  # fmt: skip
            for each_prices in asked:
                if not budget.is_spent():
                    yield from pricer.price(each_prices, 0.0, KEEP, budget, rate_cap=np.inf).templates


def _types(costs: CostTables) -> tuple[str, ...]:
    return tuple(dict.fromkeys(c.gpu for c in costs.classes))


def _quick(scope: Scope, least_rate: float) -> Scope:
    """Return the scope with replicas of at least this rate only."""
    if least_rate <= 0.0:
        return scope
    return scope.changed(lambda tables: tables._replace(t_cap=np.minimum(tables.t_cap, 1.0 / least_rate)))
