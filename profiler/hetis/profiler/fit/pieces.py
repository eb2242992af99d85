"""Fits pieces to a set of points: their number, their coefficients, and predictions for points they never saw."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hetis.profiler.fit.errors import SERVING, Mask, within
from hetis.profiler.fit.points import FEATURES, Points
from hetis.profiler.fit.split import Turn, split, whole
from hetis.profiler.fitting import Coefficients, FloatArray, fit_pieces, predict, rounded

Rows = NDArray[np.intp]
MAX_PIECES = 4
_SERVING_WEIGHT = 4.0  # weight of a point in the serving range relative to others
_WORTH = 0.005  # a further piece costs the solver a row, so it must gain half a point of error on the tuning points
_LEAST_LEFT = 0.05  # share of a time that must be left to fit besides given coefficients, or the point is not fitted


@dataclass(frozen=True, slots=True, kw_only=True)
class PointsFit:
    """Pieces, and seconds predicted for points by fits that did not see them."""

    pieces: tuple[Coefficients, ...]  # coefficients in the order of ``FEATURES[op]``
    single: tuple[Coefficients, ...]  # the best single piece
    fitted: Mask  # the points that ``pieces`` were fitted to
    judges: Rows  # indices of the points that judge, shape [judges]
    # their seconds by pieces that did not see them, shape [judges]; with several turns, each turn's own
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
