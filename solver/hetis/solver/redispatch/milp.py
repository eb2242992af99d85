"""Whole head groups by a small integer program, used if the local search is far from the bound and memory is short.

Steps of one group, each of which must help, get stuck if several devices are equally slow, if groups should change
places, or if using a device pays only when it takes many at once. HiGHS considers all of that together. The program is
kept small: only the requests that the relaxation moves, then those with the most KV on the slowest devices, may move.
The number of search nodes is limited rather than the time, so the same stage gets the same answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import highspy
import numpy as np

from hetis.solver.backends.highs import linear_program, quiet_highs
from hetis.solver.dispatch.dispatch_problem import FloatArray, IntArray
from hetis.solver.redispatch.redispatch_tables import RedispatchTables, device_seconds

MOST_CELLS = 200  # limit on the number of movable requests times devices
MOST_NODES = 50
REL_GAP = 0.005
_Rows: TypeAlias = tuple[Any, list[tuple[Any, Any, Any]]]  # upper limits, entries as (row among them, columns, values)


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
    highs = quiet_highs({"mip_rel_gap": REL_GAP, "mip_max_nodes": MOST_NODES, "mip_allow_restart": False})
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
    """Return whether groups satisfy all limits exactly, since HiGHS keeps rows only within tolerances."""
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
        """Return the program for HiGHS."""
        t, M, D = self.tables, self.M, self.D
        cells = np.arange(M * D).reshape(M, D)
        units, arrivals = self.units + cells, self.arrivals + cells
        total = self.now.sum(axis=1, keepdims=True)
        unit = np.broadcast_to(t.unit, (M, D))
        charge = self.scale * t.charge[self.movable]
        most = np.where(t.takes, total, self.now) // t.unit
        in_use = (self.stays.sum(axis=0) > 0) | np.isneginf(t.open_at)
        blocks: list[_Rows] = [
            (total[:, 0], [(np.arange(M)[:, None], units, unit)]),  # balance, the only equations
            (self.now.reshape(-1), [(cells, units, unit), (cells, arrivals, -1.0)]),
            (np.zeros(M * D), [(cells, units, unit), (cells, self.used + np.arange(D), -total)]),
            *(block for i in range(D) for block in self._rows_of_device(i, units[:, i])),
            *self._card_rows(units),
        ]
        if np.isfinite(t.budget):
            most_bytes = max(t.budget, 1.0)
            blocks.append(
                (np.array([t.budget / most_bytes]), [(0, arrivals, t.num_bytes[self.movable, None] / most_bytes)])
            )
        starts = np.cumsum([0, *(len(upper) for upper, _ in blocks)])
        upper = np.concatenate([upper for upper, _ in blocks]).astype(np.float64)
        lower = np.full(len(upper), -highspy.kHighsInf)
        lower[:M] = upper[:M]
        # Departures are arrivals minus the growth of x: moving costs charge (2 a - x + now).
        cost: list[Any] = [
            [1.0],
            self.scale * t.short_s,
            np.zeros(D + 1),
            (-charge * t.unit).ravel(),
            (2 * charge).ravel(),
        ]
        least: list[Any] = [np.zeros(self.used), in_use, np.zeros(self.num_columns - self.workers)]
        limits: list[Any] = [
            np.full(self.used, highspy.kHighsInf),
            np.ones(D + 1),
            most.ravel(),
            np.repeat(total[:, 0], D),
        ]
        column = np.arange(self.num_columns)
        return linear_program(
            np.concatenate(cost),
            (np.concatenate(least), np.concatenate(limits)),
            (lower, upper),
            [
                (start + rows, columns, values)
                for start, (_, entries) in zip(starts, blocks, strict=False)
                for rows, columns, values in entries
            ],
            whole=(self.used <= column) & (column < self.arrivals),
        )

    def _rows_of_device(self, i: int, units: IntArray) -> Iterator[_Rows]:
        """Yield the rows of a device's time in every piece, and of its blocks now and at the horizons."""
        t, stays, unit = self.tables, self.stays[:, i], self.tables.unit[i]
        context = t.context[self.movable]
        k, h = np.arange(t.alpha.shape[1]), np.arange(len(t.later))
        seconds = self.scale * unit * (t.alpha[i][:, None] + t.beta[i][:, None] * context)
        yield (
            -self.scale * (t.alpha[i] * stays.sum() + t.beta[i] * (t.context @ stays)),
            [(k, 0, -1.0), (k, self.used + i, self.scale * t.base[i]), (k[:, None], units, seconds)],
        )
        yield np.array([t.room[i] - t.blocks @ stays]), [(0, units, unit * t.blocks[self.movable])]
        yield (
            t.limit[:, i] - t.later @ stays,
            [(h[:, None], units, unit * t.later[:, self.movable]), (h, self.short + i, -1.0)],
        )

    def _card_rows(self, units: IntArray) -> Iterator[_Rows]:
        """Yield the row of the network card's time, and the rows that it is in use if any worker is."""
        t = self.tables
        if t.primary < 0:
            return
        workers = np.flatnonzero(np.arange(self.D) != t.primary)
        on_workers = float(self.stays[:, workers].sum())
        group_s = self.scale * t.nic_group_s
        yield (
            np.array([-group_s * on_workers]),
            [(0, 0, -1.0), (0, self.workers, self.scale * t.nic_base), (0, units[:, workers], group_s)],
        )
        yield np.zeros(self.D), [(workers, self.used + workers, 1.0), (workers, self.workers, -1.0)]
