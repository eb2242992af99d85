"""The master problem in HiGHS: how many replicas of each column.

    max  sum_k rate_k n_k                     or   min  sum_k cost_k n_k
    s.t. sum_k use_kr n_k <= limit_r   every row r          s.t. the same, and  sum_k rate_k n_k >= demand
         n_k >= 0 (LP) and whole (MILP)

This module is the only one of placement that talks to highspy; its functions return our own values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import highspy
import numpy as np

from hetis.solver.highs import quiet_highs
from hetis.solver.placement.classes import IntArray
from hetis.solver.placement.tables import FloatArray


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns known so far: rates [K] in requests/s, costs [K], uses [K, rows]."""

    rates: FloatArray
    costs: FloatArray
    uses: IntArray


@dataclass(frozen=True, slots=True)
class LpSolution:
    """Optimum of the relaxation; ``row_prices`` [rows] >= 0 and ``demand_price`` are its duals, ``counts`` [K]."""

    value: float
    row_prices: FloatArray
    demand_price: float
    counts: FloatArray


@dataclass(frozen=True, slots=True)
class MilpSolution:
    """Whole counts [K], their value, and HiGHS's proven bound over whole counts of these columns."""

    counts: IntArray
    value: float
    bound: float


@dataclass(frozen=True, slots=True)
class Master:
    """Rows of the master: limits of the packing rows, and the demanded rate where cost is minimised."""

    limits: IntArray
    demand: float | None  # None: maximise the rate

    @property
    def maximises(self) -> bool:
        return self.demand is None

    def solve_lp(self, columns: Columns) -> LpSolution | None:
        """The relaxation; None if the demand cannot be met by these columns."""
        highs = quiet_highs()
        highs.passModel(self._model(columns, whole=False))
        highs.run()
        if highs.getModelStatus() != highspy.HighsModelStatus.kOptimal:
            return None
        solution = highs.getSolution()
        sign = 1.0 if self.maximises else -1.0
        duals = np.array(solution.row_dual)
        return LpSolution(
            value=float(highs.getInfo().objective_function_value),
            row_prices=np.maximum(0.0, sign * duals[: len(self.limits)]),
            demand_price=0.0 if self.maximises else max(0.0, float(duals[-1])),
            counts=np.array(solution.col_value),
        )

    def solve_milp(
        self, columns: Columns, *, time_limit_s: float, gap: float, start: IntArray | None = None, seed: int = 0
    ) -> MilpSolution | None:
        """Whole counts within a relative gap; None if none was found in time.

        ``start`` [K] is a known feasible choice: the result is never worse.
        """
        highs = quiet_highs({"mip_rel_gap": gap, "mip_abs_gap": 0.0}, time_limit_s=time_limit_s, seed=seed)
        highs.passModel(self._model(columns, whole=True))
        if start is not None:
            given = highspy.HighsSolution()
            given.col_value = start.astype(float).tolist()
            highs.setSolution(given)
        highs.run()
        info = highs.getInfo()
        worst = -np.inf if self.maximises else np.inf
        value, counts = worst, start
        if info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible:
            counts = np.rint(np.array(highs.getSolution().col_value)).astype(np.int64)
        if counts is None:
            return None
        value = float(counts @ (columns.rates if self.maximises else columns.costs))
        bound = float(info.mip_dual_bound)
        if not np.isfinite(bound):
            bound = np.inf if self.maximises else 0.0
        return MilpSolution(counts, value, max(bound, value) if self.maximises else min(bound, value))

    def _model(self, columns: Columns, *, whole: bool) -> Any:
        """The master as a HiGHS model. Column-wise arrays go in at once; nothing is modelled term by term."""
        num_columns, num_rows = columns.uses.shape
        matrix = columns.uses.astype(float)
        if not self.maximises:
            matrix = np.concatenate([matrix, columns.rates[:, None]], axis=1)
        entry_columns, entry_rows = np.nonzero(matrix)
        lp = highspy.HighsLp()
        lp.num_col_, lp.num_row_ = num_columns, matrix.shape[1]
        lp.sense_ = highspy.ObjSense.kMaximize if self.maximises else highspy.ObjSense.kMinimize
        lp.col_cost_ = columns.rates if self.maximises else columns.costs
        lp.col_lower_ = np.zeros(num_columns)
        lp.col_upper_ = np.full(num_columns, highspy.kHighsInf)
        lp.row_lower_ = np.full(matrix.shape[1], -highspy.kHighsInf)
        lp.row_upper_ = self.limits.astype(float)
        if self.demand is not None:
            lp.row_lower_ = np.append(np.full(num_rows, -highspy.kHighsInf), self.demand)
            lp.row_upper_ = np.append(self.limits.astype(float), highspy.kHighsInf)
        lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
        lp.a_matrix_.start_ = np.searchsorted(entry_columns, np.arange(num_columns + 1)).astype(np.int32)
        lp.a_matrix_.index_ = entry_rows.astype(np.int32)
        lp.a_matrix_.value_ = matrix[entry_columns, entry_rows]
        if whole:
            lp.integrality_ = [highspy.HighsVarType.kInteger] * num_columns
        return lp
