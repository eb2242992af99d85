"""Splits points into those a fit may see and those that judge it, by checksums of the shapes, not order or time."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hetis.profiler.fit.errors import Mask
from hetis.profiler.fit.points import Cells, Points

SHAPES_IN = 4  # one in this many shapes is held out whole
POINTS_IN = 6  # and one in this many points of the other shapes
_FOLDS = 4  # the fitted points choose the number of pieces in turns of a quarter, before the last fit sees them all
FEW = 60  # a table with fewer points is too small to hold a part of it out for good
_ONE_FOLD = 200  # points from which a single quarter suffices
_LEAST = 60  # points that must remain for a turn over disjoint cells


@dataclass(frozen=True, slots=True)
class Turn:
    """One fit that sees ``fitted`` and is judged by ``judged``. Parts of ``fitted``, ``tuning``, choose its pieces."""

    fitted: Mask
    judged: Mask
    tuning: tuple[Mask, ...]


@dataclass(frozen=True, slots=True)
class Holdout:
    """One turn, or several whose judges are disjoint. ``shapes`` names the shapes that are held out whole."""

    turns: tuple[Turn, ...]
    shapes: tuple[str, ...]

    @property
    def judged(self) -> Mask:
        """A mask of the points that judge some turn."""
        some: Mask = np.any([turn.judged for turn in self.turns], axis=0)
        return some


def split(points: Points) -> Holdout:
    """Hold out a quarter of the shapes (none if there are fewer than four), and a sixth of the points of the others.

    Fewer than `FEW` points are all judges, in four turns. Layers composed from a grid of matrix products judge nothing
    if whole layers were measured. Otherwise a quarter of them judge, in one turn each, a fit that saw no layer with any
    of their products. The split does not depend on the order of the points or on their times.
    """
    checksums = _checksums(points)
    if len(points) < FEW:
        rank = np.argsort(np.argsort(checksums, kind="stable"), kind="stable")
        return Holdout(
            tuple(_turn(rank % _FOLDS != part, rank % _FOLDS == part, checksums) for part in range(_FOLDS)), ()
        )
    names = sorted(set(points.shapes), key=lambda shape: (zlib.crc32(shape.encode()), shape))
    composed = points.composed
    if composed.all() and (turns := _by_cells(points, names, checksums)):
        return turns
    measured = {shape for shape, put_together in zip(points.shapes, composed, strict=True) if not put_together}
    names = [name for name in names if name in measured] or names
    whole = tuple(sorted(names[: len(names) // SHAPES_IN]))
    held_out = np.array([shape in whole for shape in points.shapes]) | (checksums % POINTS_IN == 0)
    judged = held_out if composed.all() else held_out & ~composed
    return Holdout((_turn(~held_out, judged, checksums),), whole)


def _checksums(points: Points) -> NDArray[np.int64]:
    sizes = np.stack(list(points.sizes.values()), axis=1)
    named = zip(points.shapes, sizes.tolist(), strict=True)
    return np.array(
        [zlib.crc32(f"{shape} {' '.join(f'{size:.6g}' for size in row)}".encode()) for shape, row in named],
        dtype=np.int64,
    )


def _by_cells(points: Points, names: list[str], checksums: NDArray[np.int64]) -> Holdout | None:
    """Return a turn for each of a quarter of the shapes, or None if their cells leave too little to fit."""
    cells: dict[str, Cells] = {}
    for shape, of_point in zip(points.shapes, points.cells, strict=True):
        cells[shape] = cells.get(shape, frozenset()) | of_point
    turns, judges = list[Turn](), list[str]()
    for name in names:
        fitted = np.array([not cells[shape] & cells[name] for shape in points.shapes])
        if fitted.sum() >= _LEAST and len(judges) < len(names) // SHAPES_IN:
            turns.append(_turn(fitted, np.array([shape == name for shape in points.shapes]), checksums))
            judges.append(name)
    return Holdout(tuple(turns), tuple(sorted(judges))) if turns else None


def _turn(fitted: Mask, judged: Mask, checksums: NDArray[np.int64]) -> Turn:
    folds = [fitted & (checksums // POINTS_IN % _FOLDS == fold) for fold in range(_FOLDS)]
    folds = [fold for fold in folds if fold.any() and not fold[fitted].all()]
    return Turn(fitted, judged, tuple(folds[:1] if fitted.sum() >= _ONE_FOLD else folds))


def whole(points: Points) -> Turn:
    """Return a turn that sees every point and is judged by none."""
    everything = np.ones(len(points), dtype=np.bool_)
    return _turn(everything, ~everything, _checksums(points))
