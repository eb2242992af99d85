"""Which points a fit may see. Whole shapes and single points are held out, chosen by checksums, never by order."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hetis.profiler.fit.points import Points

Mask = NDArray[np.bool_]
SHAPES_IN = 4  # one in so many shapes is held out whole
POINTS_IN = 6  # and of the other shapes' points one in so many
_FOLDS = 4  # the points fitted judge the number of pieces in turns of a quarter, before the last fit sees them all
_FEW = 40  # points of a table that is too small to hold out by chance
_ONE_FOLD = 200  # points from which a single quarter says enough


@dataclass(frozen=True, slots=True)
class Split:
    """Masks over the points; ``shapes`` names the shapes that are held out whole."""

    fitted: Mask
    held_out: Mask
    tuning: tuple[Mask, ...]  # parts of ``fitted``
    shapes: tuple[str, ...]


def split(points: Points) -> Split:
    """A quarter of the shapes (none of fewer than four), and a sixth of the points of the others.

    The same points in another order are split alike, and so are points whose times changed.
    """
    names = sorted(set(points.shapes), key=lambda shape: (zlib.crc32(shape.encode()), shape))
    whole = tuple(sorted(names[: len(names) // SHAPES_IN]))
    sizes = np.stack([*points.sizes.values(), *points.features.T[1:]], axis=1)
    checksums = np.array(
        [
            zlib.crc32(f"{shape} {' '.join(f'{size:.6g}' for size in row)}".encode())
            for shape, row in zip(points.shapes, sizes.tolist(), strict=True)
        ],
        dtype=np.int64,
    )
    in_shape = np.array([shape in whole for shape in points.shapes])
    held_out = in_shape | (checksums % POINTS_IN == 0)
    if len(points) < _FEW or held_out.all() or not held_out.any():  # one in four, by rank of the checksum
        whole = ()
        rank = np.argsort(np.argsort(checksums, kind="stable"), kind="stable")
        held_out = rank % SHAPES_IN == 0
    folds = [~held_out & (checksums // POINTS_IN % _FOLDS == fold) for fold in range(_FOLDS)]
    folds = [fold for fold in folds if fold.any() and not fold[~held_out].all()]
    return Split(~held_out, held_out, tuple(folds[:1] if (~held_out).sum() >= _ONE_FOLD else folds), whole)
