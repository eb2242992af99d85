"""The relaxation over all choices of devices in use: fractions to round from, and a bound on every placement.

An idle device offers nothing until the makespan exceeds its constants. Between two such thresholds the usable devices
are known and the relaxation is one linear program. Dispatch of all running requests to idle devices bounds the makespan
from below, and the objective of the programs solved so far bounds it from above. Few thresholds, usually none, lie
between.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hetis.solver.dispatch.problem import FloatArray
from hetis.solver.redispatch.certificate import Prices, proven_bound
from hetis.solver.redispatch.lp import MoveLp
from hetis.solver.redispatch.tables import RedispatchTables, objective_s


class JointRelaxation(NamedTuple):
    """The best fractional groups [N, D], the certified bound on the objective, and multipliers of that program."""

    x: FloatArray
    bound_s: float
    prices: Prices


def relax(tables: RedispatchTables, lp: MoveLp, *, floor_s: float, guess: FloatArray) -> JointRelaxation:
    """Solve the relaxation.

    Args:
        floor_s: a lower bound on the makespan of any placement.
        guess: multipliers of the affine pieces near the optimal ones, shape [D, K].
    """
    prices = Prices(
        piece=guess, nic=0.0, now=np.zeros(len(guess)), later=np.zeros((len(tables.later), len(guess))), budget=0.0
    )
    best_s, bound_s = objective_s(tables, tables.now), np.inf
    best = tables.now.astype(np.float64)
    starts = [floor_s, *np.unique(tables.open_at[tables.open_at > floor_s]).tolist()]
    for start_s in starts:
        if start_s >= best_s:
            bound_s = min(bound_s, start_s)
            break
        is_open = tables.open_at <= start_s
        solution = lp.solve(tables, is_open, prices)
        if solution is None:
            bound_s = min(bound_s, start_s)
            continue
        bound_s = min(bound_s, max(start_s, proven_bound(tables, solution.prices, is_open)))
        if solution.value_s < best_s:
            best_s, best, prices = solution.value_s, solution.x, solution.prices
    return JointRelaxation(best, min(bound_s, best_s), prices)
