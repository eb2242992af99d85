"""Linear programs over shares x [claimants, types] and a few more columns, by HiGHS."""

from __future__ import annotations

from dataclasses import dataclass, field

import highspy
import numpy as np

from hetis.solver.errors import BrokenProofError
from hetis.solver.highs import quiet_highs
from hetis.solver.shares.problem import FloatArray, IntArray

FREE = np.inf


@dataclass(slots=True)
class Program:
    """``max gain x`` subject to rows, which are added in groups; all columns are >= 0 unless set otherwise."""

    gain: FloatArray
    lower: FloatArray = field(init=False)
    upper: FloatArray = field(init=False)
    whole: IntArray = field(init=False)  # 1: a whole number
    _rows: list[IntArray] = field(default_factory=list)
    _columns: list[IntArray] = field(default_factory=list)
    _values: list[FloatArray] = field(default_factory=list)
    _low: list[FloatArray] = field(default_factory=list)
    _high: list[FloatArray] = field(default_factory=list)
    _count: int = 0

    def __post_init__(self) -> None:
        self.lower = np.zeros(len(self.gain))
        self.upper = np.full(len(self.gain), FREE)
        self.whole = np.zeros(len(self.gain), dtype=np.int64)

    def add_rows(self, columns: IntArray, values: FloatArray, *, low: float = -FREE, high: float = FREE) -> None:
        """Add rows ``low <= sum values x[columns] <= high``; columns and values have shape [rows, entries]."""
        count, entries = columns.shape
        self._rows.append(np.repeat(np.arange(count) + self._count, entries))
        self._columns.append(columns.ravel())
        self._values.append(np.broadcast_to(values, columns.shape).ravel())
        self._low.append(np.full(count, low))
        self._high.append(np.full(count, high))
        self._count += count

    def widened(self, gain: FloatArray) -> Program:
        """Return the same rows with another objective over these columns and more after them."""
        wider = Program(gain)
        more = len(gain) - len(self.gain)
        wider.lower = np.concatenate([self.lower, np.zeros(more)])
        wider.upper = np.concatenate([self.upper, np.full(more, FREE)])
        wider._rows, wider._columns, wider._values = list(self._rows), list(self._columns), list(self._values)
        wider._low, wider._high, wider._count = list(self._low), list(self._high), self._count
        return wider

    def solve(
        self, *, time_limit_s: float = np.inf, seed: int = 0, start: FloatArray | None = None
    ) -> tuple[FloatArray, FloatArray] | None:
        """Return the columns of an optimum and the duals of the rows (meaningless for a program with whole numbers).

        ``start`` is a feasible choice of all columns. Returns None if no solution was found within the time.

        Raises:
            BrokenProofError: HiGHS finds no optimum of a program without whole numbers.
        """
        highs = quiet_highs({"mip_rel_gap": 0.0, "mip_abs_gap": 1e-9}, time_limit_s=time_limit_s, seed=seed)
        highs.passModel(self._model())
        if start is not None:
            given = highspy.HighsSolution()
            given.col_value = start.tolist()
            highs.setSolution(given)
        highs.run()
        if not self.whole.any() and highs.getModelStatus() != highspy.HighsModelStatus.kOptimal:
            status = highs.modelStatusToString(highs.getModelStatus())
            raise BrokenProofError(f"HiGHS ends a program of shares with {status}; please report this")
        if highs.getInfo().primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
            return None
        solution = highs.getSolution()
        return np.array(solution.col_value), np.array(solution.row_dual)

    def _model(self) -> highspy.HighsLp:
        lp = highspy.HighsLp()
        lp.num_col_, lp.num_row_ = len(self.gain), self._count
        lp.sense_ = highspy.ObjSense.kMaximize
        lp.col_cost_, lp.col_lower_, lp.col_upper_ = self.gain, self.lower, self.upper
        lp.row_lower_, lp.row_upper_ = np.concatenate(self._low), np.concatenate(self._high)
        rows, columns, values = (np.concatenate(part) for part in (self._rows, self._columns, self._values))
        order = np.lexsort((columns, rows))
        lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        lp.a_matrix_.start_ = np.searchsorted(rows[order], np.arange(self._count + 1)).astype(np.int32)
        lp.a_matrix_.index_ = columns[order].astype(np.int32)
        lp.a_matrix_.value_ = values[order]
        if self.whole.any():
            kinds = (highspy.HighsVarType.kContinuous, highspy.HighsVarType.kInteger)
            lp.integrality_ = [kinds[int(w)] for w in self.whole]
        return lp
