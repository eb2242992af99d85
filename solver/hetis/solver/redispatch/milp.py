"""Whole head groups by a small integer program, used if the local search is far from the bound.

Steps of one group, each of which must help, stop if several devices are equally slow, if groups should change places,
or if a device pays only when it takes much at once. HiGHS considers all of that together. The program is kept small:
only the requests that the relaxation moves, then those with the most KV on the slowest devices, may move. The number of
nodes is limited rather than the time, so the same stage has the same answer.
"""

from __future__ import annotations

from typing import Any

import highspy
import numpy as np

from hetis.solver.dispatch.problem import FloatArray, IntArray
from hetis.solver.highs import quiet_highs
from hetis.solver.redispatch.tables import RedispatchTables, device_seconds

MOST_CELLS = 200  # limit on requests that may move times devices
MOST_NODES = 50
REL_GAP = 0.005


def search(tables: RedispatchTables, fractions: FloatArray) -> IntArray | None:
    """Return whole groups [N, D] with the least objective that HiGHS finds, or None if it finds none.

    Args:
        tables: the problem.
        fractions: groups of the relaxation, [N, D].
    """
    movable = _movable(tables, fractions)
    if not len(movable):
        return None
    program = _MilpProgram(tables, movable)
    highs = quiet_highs({"mip_rel_gap": REL_GAP, "mip_max_nodes": MOST_NODES})
    highs.passModel(program.model())
    highs.run()
    if highs.getInfo().primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        return None
    x = program.groups(np.array(highs.getSolution().col_value))
    return x if _is_allowed(tables, x) else None


def _movable(tables: RedispatchTables, fractions: FloatArray) -> IntArray:
    """Return the requests that may move, few enough to keep the program small."""
    most = MOST_CELLS // max(1, tables.now.shape[1])
    moves = np.abs(fractions - tables.now).sum(axis=1) > 1e-6
    seconds = device_seconds(tables, tables.now)[:-1]
    weight = tables.context * (tables.now @ (seconds / max(float(seconds.max()), 1e-12)) ** 4)
    can_move = tables.now.sum(axis=1) > 0
    ranked = np.lexsort((-weight, ~moves, ~can_move))[:most]
    return np.sort(ranked[can_move[ranked]])


def _is_allowed(tables: RedispatchTables, x: IntArray) -> bool:
    """Return whether groups are allowed exactly, since HiGHS keeps rows only within tolerances."""
    arrives = np.maximum(0, x - tables.now)
    return bool(
        np.all(x >= 0)
        and np.array_equal(x.sum(axis=1), tables.now.sum(axis=1))
        and np.all(tables.blocks @ x <= tables.room)
        and float(arrives.sum(axis=1) @ tables.num_bytes) <= tables.budget
    )


class _MilpProgram:
    """The program with columns z, s [D], y [D] (in use), u (workers in use), units and arrivals [M, D] of M requests.

    Seconds are multiplied by ``scale``, bytes by ``1 / budget``.
    """

    def __init__(self, tables: RedispatchTables, movable: IntArray) -> None:
        self.tables, self.movable = tables, movable
        self.M, self.D = len(movable), tables.now.shape[1]
        self.now = tables.now[movable]
        self.stays = tables.now.copy()
        self.stays[movable] = 0
        self.scale = 1.0 / max(float(device_seconds(tables, tables.now).max()), 1e-12)
        self.short, self.used = 1, 1 + self.D
        self.workers = self.used + self.D
        self.units = self.workers + 1
        self.arrivals = self.units + self.M * self.D
        self.num_columns = self.arrivals + self.M * self.D

    def groups(self, values: FloatArray) -> IntArray:
        """Return the groups [N, D] of a solution."""
        x = self.stays.copy()
        units = np.rint(values[self.units : self.arrivals]).astype(np.int64).reshape(self.M, self.D)
        x[self.movable] = units * self.tables.unit
        return x

    def model(self) -> Any:
        """Return the program for HiGHS, with rows from `_rows`."""
        t, lp = self.tables, highspy.HighsLp()
        matrix, upper = self._rows()
        total = self.now.sum(axis=1, keepdims=True)
        charge = self.scale * t.charge[self.movable]
        lp.num_col_, lp.num_row_ = self.num_columns, len(matrix)
        # Departures are arrivals minus the growth of x: moving costs charge (2 a - x + now).
        lp.col_cost_ = np.concatenate(
            [[1.0], self.scale * t.short_s, np.zeros(self.D + 1), (-charge * t.unit).reshape(-1),
             (2 * charge).reshape(-1)]
        )  # fmt: skip
        in_use = (self.stays.sum(axis=0) > 0) | np.isneginf(t.open_at)
        lp.col_lower_ = np.concatenate(
            [np.zeros(self.used), in_use.astype(np.float64), np.zeros(self.num_columns - self.workers)]
        )
        most = np.where(t.takes, total, self.now) // t.unit
        lp.col_upper_ = np.concatenate(
            [np.full(self.used, highspy.kHighsInf), np.ones(self.D + 1), most.reshape(-1).astype(np.float64),
             np.broadcast_to(total, most.shape).reshape(-1).astype(np.float64)]
        )  # fmt: skip
        whole, real = highspy.HighsVarType.kInteger, highspy.HighsVarType.kContinuous
        lp.integrality_ = (
            [real] * self.used + [whole] * (self.arrivals - self.used) + [real] * (self.num_columns - self.arrivals)
        )
        lower = np.full(len(matrix), -highspy.kHighsInf)
        lower[: self.M] = upper[: self.M]
        lp.row_lower_, lp.row_upper_ = lower, upper
        lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        nonzero = matrix != 0
        lp.a_matrix_.start_ = np.concatenate([[0], np.cumsum(nonzero.sum(axis=1))]).astype(np.int32)
        lp.a_matrix_.index_ = np.nonzero(nonzero)[1].astype(np.int32)
        lp.a_matrix_.value_ = matrix[nonzero]
        return lp

    def _rows(self) -> tuple[FloatArray, FloatArray]:
        """Return coefficients and upper limits: balance (equal), arrivals, x only if in use, devices, card, budget."""
        t, M, D = self.tables, self.M, self.D
        cells = np.arange(M * D).reshape(M, D)
        total = self.now.sum(axis=1)
        unit = np.broadcast_to(t.unit.astype(np.float64), (M, D))
        blocks = [
            self._block(M, total.astype(np.float64)),
            self._block(M * D, self.now.reshape(-1).astype(np.float64)),
            self._block(M * D, np.zeros(M * D)),
        ]
        balance, arrivals, used = (matrix for matrix, _ in blocks)
        balance[np.arange(M)[:, None], self.units + cells] = unit
        flat = cells.reshape(-1)
        arrivals[flat, self.units + flat], arrivals[flat, self.arrivals + flat] = unit.reshape(-1), -1.0
        used[flat, self.units + flat] = unit.reshape(-1)
        used[flat, self.used + flat % D] = -np.repeat(total, D)
        for i in range(D):
            blocks += self._rows_of_device(i, cells[:, i])
        blocks.append(self._card_rows(cells))
        if np.isfinite(t.budget):
            row, _ = budget = self._block(1, np.ones(1))
            row[0, self.arrivals :] = np.repeat(t.num_bytes[self.movable], D) / max(t.budget, 1.0)
            budget[1][0] = t.budget / max(t.budget, 1.0)
            blocks.append(budget)
        return np.concatenate([matrix for matrix, _ in blocks]), np.concatenate([upper for _, upper in blocks])

    def _rows_of_device(self, i: int, cells: IntArray) -> list[tuple[FloatArray, FloatArray]]:
        """Return the rows of a device's time in every piece, and of its blocks now and at the horizons."""
        t, stays, columns = self.tables, self.stays[:, i], self.units + cells
        time = self._block(t.alpha.shape[1], -self.scale * (t.alpha[i] * stays.sum() + t.beta[i] * (t.context @ stays)))
        time[0][:, 0] = -1.0
        time[0][:, self.used + i] = self.scale * t.base[i]
        time[0][:, columns] = (
            self.scale * t.unit[i] * (t.alpha[i][:, None] + t.beta[i][:, None] * t.context[self.movable])
        )
        now = self._block(1, np.array([t.room[i] - t.blocks @ stays], np.float64))
        now[0][0, columns] = t.unit[i] * t.blocks[self.movable]
        later = self._block(len(t.later), t.limit[:, i] - t.later @ stays)
        later[0][:, columns] = t.unit[i] * t.later[:, self.movable]
        later[0][:, self.short + i] = -1.0
        return [time, now, later]

    def _card_rows(self, cells: IntArray) -> tuple[FloatArray, FloatArray]:
        """Return the row of the network card's time, and the rows that it is in use if any worker is."""
        t, D = self.tables, self.D
        if t.primary < 0:
            return self._block(0, np.zeros(0))
        is_worker = np.arange(D) != t.primary
        matrix, upper = self._block(1 + D, np.zeros(1 + D))
        upper[0] = -self.scale * t.nic_group_s * float(self.stays[:, is_worker].sum())
        matrix[0, 0], matrix[0, self.workers] = -1.0, self.scale * t.nic_base
        matrix[0, self.units + cells[:, is_worker].reshape(-1)] = self.scale * t.nic_group_s
        for i in np.flatnonzero(is_worker).tolist():
            matrix[1 + i, self.used + i], matrix[1 + i, self.workers] = 1.0, -1.0
        return matrix, upper

    def _block(self, rows: int, upper: FloatArray) -> tuple[FloatArray, FloatArray]:
        return np.zeros((rows, self.num_columns)), upper
