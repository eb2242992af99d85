"""Columns for pins: what the relaxation has no reason to ask for, because pricing knows no GPU that must be used."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hetis.solver.budget import Budget
from hetis.solver.placement.pins import Pins
from hetis.solver.placement.pricing import Pricer
from hetis.solver.placement.tables import Atlas, FloatArray
from hetis.solver.placement.template import Template, configurations

CHEAP = 1e-3  # what GPUs that must be used cost, beside what others do
KEEP = 0.5  # of the best ratio: what columns must have
TOLERANCE = 1e-2


def pinned_columns(
    atlas: Atlas, pins: Pins, row_costs: FloatArray, prices: FloatArray, budget: Budget, threads: int
) -> Iterator[Template]:
    """Replicas that look good where the GPUs of a pin are all but free; ``prices`` [rows] are those of all others."""
    family = atlas.problem.family
    every = configurations(atlas)
    asked = [p for p in range(pins.of_rows.shape[1]) if pins.of_rows[:, p].any()]
    for side in range(atlas.routes.num_sides if asked else 0):
        pricer = Pricer(
            atlas, [c for c in every if c.side == side], row_costs, max_copies=family.max_copies,
            max_pool=family.max_pool, threads=threads, tolerance=TOLERANCE,
        )  # fmt: skip
        for p in asked:
            if not budget.is_spent():
                cheap = np.where(pins.of_rows[:, p] > 0.0, CHEAP * prices, prices)
                yield from pricer.price(cheap, 0.0, KEEP, budget, rate_cap=np.inf).templates
