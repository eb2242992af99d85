"""Fits pieces to a set of points: their number, their coefficients, and predictions for points they never saw.

Checksums of the shapes, not order or time, split the points into those that a fit may see and those that judge it.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hetis.profiler.fit.errors import SERVING, Mask, within
from hetis.profiler.fit.points import FEATURES, Cells, Points
from hetis.profiler.fitting import Coefficients, FloatArray, fit_pieces, predict, rounded

Rows = NDArray[np.intp]
MAX_PIECES = 4
_SERVING_WEIGHT = 4.0  # weight of a point in the serving range relative to others
_WORTH = 0.005  # a further piece costs the solver a row, so it must gain half a point of error on the tuning points
_LEAST_LEFT = 0.05  # share of a time that must be left to fit besides given coefficients, or the point is not fitted
SHAPES_IN = 4  # one in this many shapes is held out whole
POINTS_IN = 6  # and one in this many points of the other shapes
_FOLDS = 4  # the fitted points choose the number of pieces in turns of a quarter, before the last fit sees them all
FEW = 60  # a table with fewer points is too small to hold a part of it out for good
_ONE_FOLD = 200  # points from which a single quarter suffices
_LEAST = 60  # points that must remain for a turn over disjoint cells


@dataclass(frozen=True, slots=True, kw_only=True)
class PointsFit:
    """Pieces, and seconds predicted for points by fits that did not see them."""

    pieces: tuple[Coefficients, ...]  # coefficients in the order of ``FEATURES[op]``
    single: tuple[Coefficients, ...]  # the best single piece
    fitted: Mask  # the points that ``pieces`` were fitted to
    judges: Rows  # indices of the points that judge, shape [judges]
    # seconds of these points by pieces that did not see them, shape [judges]; with several turns, each turn's own
    predicted: FloatArray
    predicted_single: FloatArray  # the same by single pieces
    shapes: tuple[str, ...]  # shapes unseen by every fit that they judge


def fit_points(points: Points) -> PointsFit:
    """Fit ``points``: in one turn those not held out or, if every turn has other judges, all of them.

    The number of pieces is chosen within each turn on parts of what it fits, so no judge influences anything.
    """
    parts = split(points)
    fits = [_fit_turn(points, turn) for turn in parts.turns]
    shipped = parts.turns[0] if len(parts.turns) == 1 else whole(points)
    pieces, single = fits[0] if len(parts.turns) == 1 else _fit_turn(points, shipped)
    predicted, predicted_single = np.zeros(len(points)), np.zeros(len(points))
    for turn, (many, one) in zip(parts.turns, fits, strict=True):
        predicted[turn.judged] = predict(many, points.features[turn.judged])
        predicted_single[turn.judged] = predict(one, points.features[turn.judged])
    judges = np.flatnonzero(parts.judged)
    return PointsFit(
        pieces=pieces,
        single=single,
        fitted=shipped.fitted,
        judges=judges,
        predicted=predicted[judges],
        predicted_single=predicted_single[judges],
        shapes=parts.shapes,
    )


def _fit_turn(points: Points, turn: Turn) -> tuple[tuple[Coefficients, ...], tuple[Coefficients, ...]]:
    """Return the pieces and the best single one. Pieces are added while each cuts the tuning error by half a point."""
    names = FEATURES[points.op]
    free = [column for column, name in enumerate(names) if name not in points.given]
    known = np.array([rounded(points.given.get(name, 0.0)) for name in names])
    left_s = points.seconds - (points.features * known).sum(axis=1)
    clear = left_s > _LEAST_LEFT * points.seconds
    left_s = np.maximum(left_s, _LEAST_LEFT * points.seconds)
    order = _order(points)  # the same points in any order give the same bytes
    if (clear & turn.fitted).sum() >= 2 * len(free):
        order = order[clear[order]]
    weights = np.where(within(SERVING[points.op], points.sizes, len(points)), _SERVING_WEIGHT, 1.0)

    def fit(mask: Mask, num_pieces: int) -> tuple[Coefficients, ...]:
        rows = order[mask[order]]
        # Errors are relative to what is left of the time; the weight makes them relative to the whole time again.
        counts = weights[rows] * left_s[rows] / points.seconds[rows]
        found = fit_pieces(points.features[rows][:, free], left_s[rows], num_pieces=num_pieces, weights=counts).pieces
        return tuple(_with_given(piece, free, known) for piece in found)

    def tuning_error(num_pieces: int) -> float:
        total = 0.0
        for fold in turn.tuning:
            rows = order[fold[order]]
            if not len(rows):
                continue
            pieces = fit(turn.fitted & ~fold, num_pieces)
            errors = np.abs(predict(pieces, points.features[rows]) / points.seconds[rows] - 1.0)
            total += float((weights[rows] * errors).sum() / weights[rows].sum())
        return total / max(1, len(turn.tuning))

    count, least = 1, float("inf")
    for tried in range(1, MAX_PIECES + 1):
        if turn.fitted.sum() < 2 * tried * len(free):
            break
        error = tuning_error(tried)
        if error > least - _WORTH:
            break
        count, least = tried, error
    best = fit(turn.fitted, count)
    return best, best if count == 1 else fit(turn.fitted, 1)


def _with_given(piece: Coefficients, free: list[int], known: NDArray[np.float64]) -> Coefficients:
    values = known.tolist()
    for column, value in zip(free, piece, strict=True):
        values[column] = value
    return tuple(values)


def _order(points: Points) -> Rows:
    return np.lexsort((np.array(points.shapes), points.seconds, *points.features.T))


# --- what a fit sees, and what judges it


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
