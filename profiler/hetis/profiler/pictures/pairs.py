"""Measured rows with the profile's predictions for them and the region each row lies in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hetis.formats.measurements import Measurements
from hetis.profiler.fit import selected_points
from hetis.profiler.fit.points import FEATURES, Points
from hetis.solver.cluster import GpuType
from hetis.solver.profile import Fit, FitScope, Op, Profile

FloatArray = NDArray[np.float64]

# The rows and columns of a picture of residuals; "" for none.
_AXES = {
    Op.DENSE: ("", "tokens"),
    Op.PREFILL_ATTENTION: ("batch", "context_tokens"),
    Op.DECODE_ATTENTION: ("batch", "context_tokens"),
    Op.ALL_REDUCE: ("", "num_bytes"),
    Op.TRANSFER: ("", "num_bytes"),
    Op.STEP: ("", "batch"),
}
_NEAR = 1.25  # an axis is divided by powers of two: a value this close to one counts as it


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pairs:
    """One operator: measured and fitted seconds, shape [rows], and each row's region.

    Attributes:
        title: the operator and its shapes.
        regions: (row label, column label) of each row; the second is empty if one axis is enough.
        axes: meaning of the two labels.
    """

    title: str
    measured: FloatArray
    fitted: FloatArray
    regions: tuple[tuple[str, str], ...]
    axes: tuple[str, str]

    @property
    def residual(self) -> FloatArray:
        """Fitted over measured time minus one: above 0 the fit is too slow."""
        value: FloatArray = self.fitted / self.measured - 1.0
        return value

    @property
    def mape(self) -> float:
        return float(np.abs(self.residual).mean())

    def by_region(self) -> tuple[list[str], list[str], FloatArray, NDArray[np.intp]]:
        """Return row and column labels, mean signed residual of each cell (NaN: nothing measured), and number of
        points.
        """
        rows, columns = (sorted({pair[i] for pair in self.regions}, key=_size) for i in (0, 1))
        total, count = np.zeros((len(rows), len(columns))), np.zeros((len(rows), len(columns)), dtype=np.intp)
        for (row, column), value in zip(self.regions, self.residual, strict=True):
            cell = rows.index(row), columns.index(column)
            total[cell] += value
            count[cell] += 1
        mean = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
        return rows, columns, mean, count


def pairs_of(profile: Profile, measurements: Sequence[Measurements], gpu: GpuType) -> list[Pairs]:
    """Return every measured operator with the points that a fit would select, each point by its own fit.

    Shapes that differ in TP size or queries per group share a picture. A fit of all of them is omitted if there are
    fits of each, because it sees the same points.
    """
    families: dict[tuple[Op, int | None, float | None], list[tuple[FitScope, Pairs]]] = {}
    for points in selected_points(measurements, gpu).points:
        if fit := _fit(profile, points):
            scope = points.scope
            family = families.setdefault((points.op, scope.head_dim, scope.weight_bytes), [])
            family.append((scope, _pairs(fit, points)))
    found = []
    for (op, head_dim, weight_bytes), members in families.items():
        single = [one for scope, one in members if scope.queries_per_group or scope.tp] or [one for _, one in members]
        conditions = [f"head {head_dim}"] if head_dim else []
        conditions += [f"{weight_bytes:g} bytes/weight"] if weight_bytes else []
        conditions += [f"{len(single)} fits"] if len(single) > 1 else []
        found.append(_joined(op.value.replace("_", " "), conditions, single))
    return found


def _joined(name: str, conditions: Sequence[str], members: Sequence[Pairs]) -> Pairs:
    return Pairs(
        title=f"{name} ({', '.join(conditions)})" if conditions else name,
        measured=np.concatenate([one.measured for one in members]),
        fitted=np.concatenate([one.fitted for one in members]),
        regions=tuple(region for one in members for region in one.regions),
        axes=members[0].axes,
    )


def _fit(profile: Profile, points: Points) -> Fit | None:
    """Return the fit of the same scope, or one without a scope."""
    of_op = [fit for fit in profile.fits if fit.op is points.op]
    same = [fit for fit in of_op if fit.scope == points.scope]
    return next(iter([*same, *(fit for fit in of_op if fit.scope == FitScope())]), None)


def _pairs(fit: Fit, points: Points) -> Pairs:
    names = FEATURES[points.op]
    columns = [[getattr(piece, name) for name in names] for piece in fit.pieces]
    fitted: FloatArray = (points.features @ np.array(columns).T).max(axis=1)
    first, second = _AXES[points.op]
    rows, cells = (
        [_bucket(size) for size in points.sizes[axis]] if axis in points.sizes else [""] * len(points)
        for axis in (first, second)
    )
    return Pairs(
        title=points.op.value,
        measured=points.seconds,
        fitted=fitted,
        regions=tuple(zip(rows, cells, strict=True)),
        axes=(first, second),
    )


def _bucket(value: float) -> str:
    """Return the power of two at or below, as ``4k``. Sizes that miss the next one by little belong to it."""
    if value < 1:
        return "0"
    power = 2 ** int(np.floor(np.log2(value * _NEAR)))
    for limit, unit in ((2**30, "G"), (2**20, "M"), (2**10, "k")):
        if power >= limit:
            return f"{power // limit}{unit}"
    return str(power)


def _size(label: str) -> float:
    """Return a key that sorts buckets by size."""
    factor = {"k": 2**10, "M": 2**20, "G": 2**30}.get(label[-1:], 1)
    digits = label.rstrip("kMG")
    return float(digits) * factor if digits else 0.0
