"""Converts measured tables to points: the features that the cost model passes to a fit (docs/cost-model.md), and
seconds.

Units are absolute: FLOPs, bytes, tokens, query heads, nominal seconds on the wire.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from hetis.formats.measurements import MeasuredOp, Measurements, Table
from hetis.profiler.fitting import FloatArray, predict
from hetis.solver.cluster import GpuType
from hetis.solver.profile import Fit, FitScope, Op

# Last-level caches. A kernel that is called repeatedly reads from the cache what serving reads from memory, because all
# weights and the KV of all other layers pass between two calls.
CACHE_BYTES = {
    "A100-PCIe-40GB": 40e6,
    "A100-SXM-40GB": 40e6,
    "A100-PCIe-80GB": 40e6,
    "A100-SXM-80GB": 40e6,
    "A40": 6e6,
    "RTX-A6000": 6e6,
    "H100-PCIe-80GB": 50e6,
    "H100-SXM-80GB": 50e6,
    "H200-SXM-141GB": 50e6,
    "L4": 48e6,
    "L40": 96e6,
    "L40S": 96e6,
    "RTX-4090": 72e6,
    "RTX-5090": 96e6,
    "RTX-PRO-6000-Server-96GB": 128e6,
    "B200-SXM-180GB": 126e6,
    "B300-SXM-288GB": 126e6,
    "GB200-per-GPU": 126e6,
    "GB300-per-GPU": 126e6,
    "Arc-Pro-B60-24GB": 18e6,
}
MIN_DISTINCT = 8  # distinct shapes or sizes, for a fit made from three quarters of them
MAX_BANDWIDTH = 1.1  # multiple of the nominal peaks; a row above it was served by a cache, or its time is wrong
MAX_IMPOSSIBLE = 0.05  # share of rows above the peaks among those that no cache served; a table with more is not fitted

FEATURES = {
    Op.DENSE: ("fixed_s", "flop_s", "byte_s"),
    Op.PREFILL_ATTENTION: ("fixed_s", "flop_s", "byte_s", "token_s", "head_s"),
    Op.DECODE_ATTENTION: ("fixed_s", "byte_s", "head_s"),
    Op.ALL_REDUCE: ("fixed_s", "wire"),
    Op.TRANSFER: ("fixed_s", "wire"),
    Op.STEP: ("fixed_s", "token_s"),
}
Cells = frozenset[tuple[float, float]]  # (n, k) of the matrix products that a layer was composed from


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """Rows that no fit sees, and why. They are ``serving_share`` of the rows in the serving range."""

    num_rows: int
    reason: str
    serving_share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Points:
    """Points of one operator and scope, no two of equal shape and sizes (`distinct`).

    Attributes:
        features: shape [points, features], in the order of ``FEATURES[op]``.
        shapes: for each point, the name of the shape that is held out as a whole.
        sizes: for each point, the sizes that a region is stated in (`FitRegion`), each of shape [points].
        least: by size, the lower limit of the region if that is above the smallest point, because below it there is a
            gap without points.
        given: coefficients by name that are known beforehand, the same in every piece; the others are fitted.
        cells: for each point, the cells of a measured grid that it was composed from, none if it was measured itself;
            omitted if all were.
        notes: what a reader of the fit must know.
        scopes: for each point, the scope of the fit of its own shape, if there is one; omitted if that is ``scope``.
        few_heads: the same for fewer query heads than a fit is made from; reported, but never fitted.
    """

    op: Op
    scope: FitScope
    features: FloatArray
    seconds: FloatArray
    shapes: Sequence[str]
    sizes: Mapping[str, FloatArray]
    origin: str
    least: Mapping[str, float] = field(default_factory=dict)
    given: Mapping[str, float] = field(default_factory=dict)
    cells: Sequence[Cells] = ()
    left_out: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = ()
    scopes: Sequence[FitScope] = ()
    few_heads: Points | None = None

    def __len__(self) -> int:
        return len(self.seconds)

    @property
    def composed(self) -> NDArray[np.bool_]:
        """A mask of the points that were composed from other measurements."""
        return np.array([bool(cells) for cells in self.cells] or [False] * len(self), dtype=np.bool_)

    def served(self, fitted: Collection[FitScope]) -> NDArray[np.bool_]:
        """Return a mask of the points for which a plan would use this fit: those without their own in ``fitted``."""
        alone = [scope != self.scope and scope in fitted for scope in self.scopes]
        return ~np.array(alone or [False] * len(self), dtype=np.bool_)

    def kept(self, keep: NDArray[np.bool_] | NDArray[np.intp]) -> Points:
        """Return only the points where ``keep`` is true, or with those indices."""
        rows = np.flatnonzero(keep) if keep.dtype == np.bool_ else keep
        return replace(
            self,
            features=self.features[rows],
            seconds=self.seconds[rows],
            shapes=[self.shapes[row] for row in rows],
            sizes={name: size[rows] for name, size in self.sizes.items()},
            cells=[self.cells[row] for row in rows] if self.cells else (),
            scopes=[self.scopes[row] for row in rows] if self.scopes else (),
        )


def distinct(points: Points) -> Points:
    """Merge repeated measurements of one shape and size into one point with their median time.

    Steps stay as they are: equal batches come from different models and hosts, which their tables do not name.
    """
    if points.op is Op.STEP:
        return points
    keys = zip(points.shapes, points.composed.tolist(), *(size.tolist() for size in points.sizes.values()), strict=True)
    rows: dict[tuple[object, ...], list[int]] = {}
    for row, key in enumerate(keys):
        rows.setdefault(key, []).append(row)
    if len(rows) == len(points):
        return points
    first = points.kept(np.array([same[0] for same in rows.values()]))
    return replace(first, seconds=np.array([np.median(points.seconds[same]) for same in rows.values()]))


def seconds_by(fit: Fit, features: FloatArray) -> FloatArray:
    """Return the seconds of every point by a fit. The features are in the order of ``FEATURES[fit.op]``."""
    return predict([tuple(getattr(piece, name) for name in FEATURES[fit.op]) for piece in fit.pieces], features)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfitted:
    """A table that is not fitted, and why."""

    op: Op
    origin: str
    num_rows: int
    reason: str


def unfitted_mixed(origin: str, num_rows: int, reason: str) -> Unfitted:
    """Return why no factor is made from mixed batches."""
    return Unfitted(op=Op.DECODE_ATTENTION, origin=origin, num_rows=num_rows, reason=f"mixed batches: {reason}")


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedRows:
    """Mixed batches of one kernel, and its tables of either part alone; ``decode`` is the one that is fitted."""

    origin: str
    table: Table
    decode: Table
    prefill: tuple[Table, ...]


@dataclass(slots=True)
class FitPoints:
    """The points of one GPU's measurements by operator and scope, and the tables that are not fitted.

    ``others`` come from sources after the fitted one: no fit sees them, but its errors on them are reported.
    """

    points: list[Points] = field(default_factory=list)
    others: list[Points] = field(default_factory=list)
    unfitted: list[Unfitted] = field(default_factory=list)
    mixed: MixedRows | None = None


def tables_of(measurements: Sequence[Measurements], op: MeasuredOp) -> Iterator[tuple[str, Table]]:
    """Yield every table of ``op`` with its origin."""
    for measurement in measurements:
        for table in measurement.tables:
            if table.op is op:
                kernel = f", {table.kernel}" if table.kernel else ""
                yield f"{measurement.provenance}{kernel}", table


def unknown_cache(table: Table, gpu: GpuType) -> tuple[str, ...]:
    """Return a note if rows that a cache served cannot be distinguished from others."""
    if table.cold or gpu.name in CACHE_BYTES:
        return ()
    return (
        f"hetis does not know the last-level cache of {gpu.name}, and these rows were measured without flushing it: "
        "those that it served count like all others, and the fit may be too fast",
    )
