"""Ties between shares of equal total value: a claimant should have few GPU types, adjacent in speed.

A job on fast and slow GPUs waits for the slow ones. OEF's paper states that its optimum gives every claimant adjacent
types; for arbitrary speed-ups a vertex of the program does not (190 of 300 random instances do), so ties are broken.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt

from hetis.solver.shares.linear import Program
from hetis.solver.shares.problem import FloatArray, IntArray, ShareProblem

T = TypeVar("T", bound=np.generic)

SHARE_OF_NOTHING = 1e-7  # of a type's GPUs: anything smaller is rounding
LOSS = 1e-9  # of the total value, within which shares count as equal


def by_speed(problem: ShareProblem) -> IntArray:
    """Return GPU types from slow to fast, by their mean speed-up over claimants, [K]."""
    order: IntArray = np.argsort(problem.speedups.mean(axis=0), kind="stable")
    return order


def spans(problem: ShareProblem, amounts: FloatArray) -> IntArray:
    """Return the number of types from the slowest to the fastest, both included, in each claimant's share, [V]."""
    used = amounts[:, by_speed(problem)] > SHARE_OF_NOTHING * problem.counts[by_speed(problem)]
    first = np.argmax(used, axis=1)
    last = used.shape[1] - 1 - np.argmax(used[:, ::-1], axis=1)
    return np.where(used.any(axis=1), last - first + 1, 0)


def fewest_types(
    problem: ShareProblem, program: Program, amounts: FloatArray, *, time_limit_s: float, seed: int
) -> FloatArray:  # fmt: skip
    """Return shares as good as ``amounts`` under the rows of ``program`` with the fewest types found in the time.

    A mixed program over x and three marks per claimant and type, in order of speed: *used* or faster than a used one,
    *used* or slower than one, and both: between the ends. The sum of the last is minimised.
    """
    count, types = amounts.shape
    if types < 2 or int(spans(problem, amounts).sum()) <= count:
        return amounts
    cells = count * types
    gain = np.concatenate([np.zeros(3 * cells), np.full(cells, -1.0)])
    wider = program.widened(gain)
    wider.upper[cells:] = 1.0
    wider.whole[cells : 3 * cells] = 1
    order = by_speed(problem)
    cell = np.arange(cells).reshape(count, types)[:, order]
    above, below, between = cell + cells, cell + 2 * cells, cell + 3 * cells
    limits = np.broadcast_to(problem.counts[order], (count, types))
    for mark in (above, below):  # x_lj <= m_j mark
        wider.add_rows(_table(cell, mark), _table(np.ones((count, types)), -limits), high=0.0)
    ones = np.ones((count, types - 1))
    wider.add_rows(_table(above[:, :-1], above[:, 1:]), _table(ones, -ones), high=0.0)  # stays on towards fast
    wider.add_rows(_table(below[:, 1:], below[:, :-1]), _table(ones, -ones), high=0.0)  # and towards slow
    wider.add_rows(  # between >= above + below - 1
        np.stack([between.ravel(), above.ravel(), below.ravel()], axis=1), np.array([1.0, -1.0, -1.0]), low=-1.0
    )
    value = float(problem.values(amounts).sum())
    wider.add_rows(np.arange(cells)[None, :], problem.speedups.ravel()[None, :], low=value * (1.0 - LOSS))
    found = wider.solve(time_limit_s=time_limit_s, seed=seed, start=_marked(problem, amounts))
    if found is None:
        return amounts
    better = np.maximum(0.0, found[0][:cells].reshape(count, types))
    return better if int(spans(problem, better).sum()) < int(spans(problem, amounts).sum()) else amounts


def _table(first: npt.NDArray[T], second: npt.NDArray[T]) -> npt.NDArray[T]:
    """Return two entries per row, from arrays of equal shape."""
    return np.stack([first.ravel(), second.ravel()], axis=1)


def _marked(problem: ShareProblem, amounts: FloatArray) -> FloatArray:
    """Return the columns of the program that represent ``amounts``."""
    order = by_speed(problem)
    used = (amounts > 0.0)[:, order]
    above, below = np.logical_or.accumulate(used, axis=1), np.logical_or.accumulate(used[:, ::-1], axis=1)[:, ::-1]
    marks = []
    for mark in (above, below, above & below):
        restored = np.empty_like(mark)
        restored[:, order] = mark
        marks.append(restored.ravel().astype(float))
    return np.concatenate([amounts.ravel(), *marks])
