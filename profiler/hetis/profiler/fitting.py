"""Fits a maximum of a few affine pieces with non-negative coefficients to measured times, in relative error.

Deterministic to the byte on every machine: no BLAS and no random starts; sums are over one-dimensional arrays, and
systems of at most five unknowns are solved here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
Coefficients = tuple[float, ...]

_SHARES = {
    1: ((),),
    2: ((0.3,), (0.5,), (0.7,)),
    3: ((0.33, 0.67), (0.2, 0.5), (0.5, 0.8)),
    4: ((0.25, 0.5, 0.75), (0.1, 0.4, 0.7)),
}
_ROUNDS = 12  # rounds of alternation; partitions settle in fewer in practice
_REWEIGHTS = 3  # rounds of reweighting towards the least absolute relative error
_DIGITS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceFit:
    """``max_k pieces[k] . features`` and its mean absolute percentage error on the points it was fitted to."""

    pieces: tuple[Coefficients, ...]
    mape: float


def fit_pieces(
    features: FloatArray, seconds: FloatArray, *, num_pieces: int, weights: FloatArray | None = None
) -> PieceFit:
    """Fit ``seconds ~ max_k (a_k . features)`` with ``a_k >= 0``, minimising the mean absolute relative error.

    Alternates between assigning every point to the piece that is largest there and refitting each piece on its points
    (Magnani and Boyd, 2009), from partitions along each feature and along the time; the best round counts.

    Args:
        features: shape [points, features]; the caller includes a column of ones if a constant is wanted.
        seconds: measured times, shape [points], all > 0.
        num_pieces: at most 4.
        weights: weight of the error at each point, shape [points]; all equal by default.
    """
    relative = features / seconds[:, None]
    importance = np.ones(len(seconds)) if weights is None else weights
    known: dict[bytes, Coefficients] = {}
    best: PieceFit | None = None
    least = 0.0
    for owner in _partitions(features, seconds, num_pieces):
        for _ in range(_ROUNDS):
            pieces = _refit(relative, owner, num_pieces, importance, known)
            errors = np.abs(predict(pieces, features) / seconds - 1.0)
            error = float((importance * errors).sum())
            if best is None or error < least:
                best, least = PieceFit(pieces=pieces, mape=float(errors.sum()) / len(seconds)), error
            values = np.stack([_evaluate(piece, relative) for piece in pieces])
            new_owner = values.argmax(axis=0)
            if np.array_equal(new_owner, owner):
                break
            owner = new_owner
    assert best is not None
    return best


def predict(pieces: Sequence[Coefficients], features: FloatArray) -> FloatArray:
    """Return the seconds of every point, shape [points]."""
    values: FloatArray = np.stack([_evaluate(piece, features) for piece in pieces]).max(axis=0)
    return values


def mape(pieces: Sequence[Coefficients], features: FloatArray, seconds: FloatArray) -> float:
    """Return the mean absolute percentage error; 0.1 is 10%."""
    return float(np.abs(predict(pieces, features) / seconds - 1.0).sum()) / len(seconds)


def rounded(value: float) -> float:
    """Round to three significant digits: more would be noise, and would differ more often between machines."""
    return float(f"{value:.{_DIGITS - 1}e}")


def _partitions(features: FloatArray, seconds: FloatArray, num_pieces: int) -> Iterator[NDArray[np.intp]]:
    """Yield first guesses of each point's piece: cuts along the time, each feature and their ratios."""
    orders = [seconds]
    columns = [features[:, j] for j in range(features.shape[1]) if np.ptp(features[:, j]) > 0]
    orders += columns
    orders += [a / b for a, b in combinations(columns, 2) if b.min() > 0]
    for order in orders if num_pieces > 1 else orders[:1]:
        rank = np.empty(len(order), dtype=np.intp)
        rank[np.argsort(order, kind="stable")] = np.arange(len(order))
        for shares in _SHARES[num_pieces]:
            cuts = np.array([share * len(order) for share in shares])
            yield np.searchsorted(cuts, rank, side="right")


def _refit(
    relative: FloatArray, owner: NDArray[np.intp], num_pieces: int, importance: FloatArray,
    known: dict[bytes, Coefficients],
) -> tuple[Coefficients, ...]:  # fmt: skip
    """Refit each piece on its points. ``known`` holds pieces of earlier sets of points, which soon repeat."""

    def piece_of(mine: NDArray[np.bool_]) -> Coefficients:
        key = mine.tobytes()
        if key not in known:
            known[key] = _least_absolute(np.ascontiguousarray(relative[mine].T), importance[mine])
        return known[key]

    parts = [owner == k for k in range(num_pieces)]
    unique = tuple(dict.fromkeys(piece_of(mine) for mine in parts if mine.sum() >= relative.shape[1]))
    return unique if unique else (piece_of(np.ones(len(relative), np.bool_)),)


def _least_absolute(columns: FloatArray, importance: FloatArray) -> Coefficients:
    """Return the non-negative a that minimises sum w |a . x - 1| (iteratively reweighted), rounded. ``columns`` has the
    shape [features, points].
    """
    weights, ones = importance, np.ones(columns.shape[1])
    piece: Coefficients = ()
    for _ in range(_REWEIGHTS + 1):
        piece = non_negative_least_squares(columns, ones, weights)
        residual = sum((a * x for a, x in zip(piece, columns, strict=True)), -ones)
        weights = importance / np.maximum(np.abs(residual), 0.02)
    return tuple(rounded(a) for a in piece)


def non_negative_least_squares(columns: FloatArray, wanted: FloatArray, weights: FloatArray) -> Coefficients:
    """Return the a >= 0 that minimises sum w (a . x - wanted)^2: the best over all supports, which are few here.
    ``columns`` has the shape [features, points], ``wanted`` and ``weights`` [points].
    """
    size = len(columns)
    gram = [[float((weights * columns[i] * columns[j]).sum()) for j in range(size)] for i in range(size)]
    target = [float((weights * columns[i] * wanted).sum()) for i in range(size)]
    full = _solve(gram, target)
    if full is not None and min(full) >= 0:  # feasible without the constraint, so the best with it
        return tuple(full)
    best, best_gain = (0.0,) * size, 0.0
    for count in range(1, size):
        for support in combinations(range(size), count):
            solution = _solve([[gram[i][j] for j in support] for i in support], [target[i] for i in support])
            if solution is None or min(solution) < 0:
                continue
            gain = sum(a * target[i] for a, i in zip(solution, support, strict=True))
            if gain > best_gain * (1 + 1e-9):
                values = dict(zip(support, solution, strict=True))
                best, best_gain = tuple(values.get(i, 0.0) for i in range(size)), gain
    return best


def _solve(matrix: list[list[float]], target: list[float]) -> list[float] | None:
    """Solve by Gaussian elimination with scaling to a unit diagonal. Return None if singular."""
    scale = [row[i] ** -0.5 if row[i] > 0 else 0.0 for i, row in enumerate(matrix)]
    if 0.0 in scale:
        return None
    size = len(target)
    rows = [[matrix[i][j] * scale[i] * scale[j] for j in range(size)] + [target[i] * scale[i]] for i in range(size)]
    for i in range(size):
        pivot = max(range(i, size), key=lambda r: abs(rows[r][i]))
        if abs(rows[pivot][i]) < 1e-9:
            return None
        rows[i], rows[pivot] = rows[pivot], rows[i]
        for r in range(i + 1, size):
            factor = rows[r][i] / rows[i][i]
            rows[r] = [a - factor * b for a, b in zip(rows[r], rows[i], strict=True)]
    solution = [0.0] * size
    for i in reversed(range(size)):
        known = sum(rows[i][j] * solution[j] for j in range(i + 1, size))
        solution[i] = (rows[i][size] - known) / rows[i][i]
    return [value * scale[i] for i, value in enumerate(solution)]


def _evaluate(piece: Coefficients, features: FloatArray) -> FloatArray:
    total = np.zeros(len(features))
    for j, a in enumerate(piece):
        total += a * features[:, j]
    return total
