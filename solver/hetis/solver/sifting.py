"""Sifting: a linear program with many columns, few of which matter, solved with those few.

The model starts with the columns that prices known beforehand find cheap. Its own prices then name those missing, until
none is. All columns are in sight, so that finding them is arithmetic on arrays and no search. One column is one
(request, device): head groups that are placed, or arrive, there.
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
    """A program that takes more columns."""

    def add(self, highs: Any, requests: IntArray, devices: IntArray) -> None:
        """Adds these columns to the model that ``highs`` holds."""

    def cheaper(self, row_duals: FloatArray) -> BoolArray:
        """Columns that would lower the objective at these prices, [requests, devices]; may name those there already."""


class Sifted(NamedTuple):
    """The optimum: sifted columns in the order they came, values of all columns (others first), prices of rows."""

    requests: IntArray
    devices: IntArray
    values: FloatArray
    row_duals: FloatArray


def sift(highs: Any, model: GrowingModel, *, chosen: BoolArray, allowed: BoolArray) -> Sifted | None:
    """Runs HiGHS until no column is missing; None where it gives up or there is no solution.

    ``highs`` holds the model with the ``chosen`` columns, in the order of `numpy.nonzero`; it may have all ``allowed``.
    """
    chosen = chosen.copy()
    requests, devices = np.nonzero(chosen)
    for _ in range(MOST_SIFTINGS):
        highs.run()
        missing = allowed & ~chosen  # where the model has no solution there are no prices to go by: all of them
        if highs.getModelStatus() == highspy.HighsModelStatus.kOptimal:
            solution = highs.getSolution()
            row_duals = np.array(solution.row_dual)
            missing &= model.cheaper(row_duals)
            if not missing.any():
                return Sifted(requests, devices, np.array(solution.col_value), row_duals)
        elif not missing.any():
            return None
        chosen |= missing
        more_requests, more_devices = np.nonzero(missing)
        model.add(highs, more_requests, more_devices)
        requests, devices = np.append(requests, more_requests), np.append(devices, more_devices)
    return None
