"""Sifting: the solution of a linear program with many columns through the few columns that matter.

The model starts with the columns that are cheap at prices known beforehand. Its own prices then identify missing
columns, until none is missing. All columns are known, so finding them is array arithmetic rather than a search. One
column is one (request, device): the head groups that are placed, or arrive, there.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, TypeAlias

import highspy
import numpy as np
import numpy.typing as npt

BoolArray: TypeAlias = npt.NDArray[np.bool_]
FloatArray: TypeAlias = npt.NDArray[np.float64]
IntArray: TypeAlias = npt.NDArray[np.int64]

MOST_SIFTINGS = 30


class GrowingModel(Protocol):
    """A program that accepts more columns."""

    def add(self, highs: Any, requests: IntArray, devices: IntArray) -> None:
        """Add these columns to the model that ``highs`` holds."""

    def cheaper(self, row_duals: FloatArray) -> BoolArray:
        """Return columns that would lower the objective at these prices, [requests, devices], possibly known ones."""


class SiftedSolution(NamedTuple):
    """The optimum: sifted columns in order of arrival, values of all columns (others first), prices of rows."""

    requests: IntArray
    devices: IntArray
    values: FloatArray
    row_duals: FloatArray


def sift_columns(highs: Any, model: GrowingModel, *, chosen: BoolArray, allowed: BoolArray) -> SiftedSolution | None:
    """Run HiGHS until no column is missing; return None if it gives up or there is no solution.

    ``highs`` holds the model with the ``chosen`` columns, in the order of `numpy.nonzero`; it may use all ``allowed``.
    """
    chosen = chosen.copy()
    requests, devices = np.nonzero(chosen)
    for _ in range(MOST_SIFTINGS):
        highs.run()
        missing = allowed & ~chosen  # if the model has no solution, there are no prices, so all of them
        if highs.getModelStatus() == highspy.HighsModelStatus.kOptimal:
            solution = highs.getSolution()
            row_duals = np.array(solution.row_dual)
            missing &= model.cheaper(row_duals)
            if not missing.any():
                return SiftedSolution(requests, devices, np.array(solution.col_value), row_duals)
        elif not missing.any():
            return None
        chosen |= missing
        more_requests, more_devices = np.nonzero(missing)
        model.add(highs, more_requests, more_devices)
        requests, devices = np.append(requests, more_requests), np.append(devices, more_devices)
    return None
