"""Measured tables to points: the features that the cost model hands to a fit (docs/cost-model.md), and seconds.

Absolute units: FLOPs, bytes, tokens, query heads, nominal seconds on the wire.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from hetis.formats.measurements import MeasuredOp, Measurements, Table
from hetis.profiler.work import FloatArray
from hetis.solver.cluster import GpuType
from hetis.solver.profile import FitScope, Op

# Last-level caches. A kernel that is called over and over reads from it what serving reads from memory, as all weights
# and the KV of all other layers pass between two calls.
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
}
MAX_BANDWIDTH = 1.1  # of the nominal peaks; rows above were served by a cache, or their time is wrong
MAX_IMPOSSIBLE = 0.05  # of the rows that no cache can have served; a table with more is not fitted

FEATURES = {
    Op.DENSE: ("fixed_s", "flop_s", "byte_s"),
    Op.PREFILL_ATTENTION: ("fixed_s", "flop_s", "byte_s", "token_s", "head_s"),
    Op.DECODE_ATTENTION: ("fixed_s", "byte_s", "head_s"),
    Op.ALL_REDUCE: ("fixed_s", "wire"),
    Op.TRANSFER: ("fixed_s", "wire"),
    Op.STEP: ("fixed_s", "token_s"),
}
Cells = frozenset[tuple[float, float]]  # (n, k) of the matrix products that a layer was put together from


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """Rows that no fit sees, and why; ``serving_share`` of the rows in the serving range are among them."""

    num_rows: int
    reason: str
    serving_share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Points:
    """Points of one operator and scope, no two of equal shape and sizes (`distinct`).

    Attributes:
        features: shape [points, features], in the order of ``FEATURES[op]``.
        shapes: of each point, the name of the shape that is held out as a whole.
        sizes: of each point, the sizes that a region is stated in (`FitRegion`), each of shape [points].
        least: by size, the lower limit of the region where that is above the smallest point: below it, sizes that no
            point has lie between others.
        given: coefficients by name that are known beforehand, the same in every piece; the others are fitted.
        cells: of each point, the cells of a measured grid that it was put together from, none where it was measured
            itself; left out where all were.
        notes: what a reader of the fit must know.
        scopes: of each point, the scope of the fit of its own shape, where there is one; left out where that is
            ``scope``.
        few_heads: the same on fewer query heads than a fit is made of: never fitted, and reported.
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
        """Which points were put together from others' measurements."""
        return np.array([bool(cells) for cells in self.cells] or [False] * len(self), dtype=np.bool_)

    def served(self, fitted: Collection[FitScope]) -> NDArray[np.bool_]:
        """Return which points a plan would ask the fit of these points for: those without a fit of their own in
        ``fitted``."""
        alone = [scope != self.scope and scope in fitted for scope in self.scopes]
        return ~np.array(alone or [False] * len(self), dtype=np.bool_)

    def kept(self, keep: NDArray[np.bool_] | NDArray[np.intp]) -> Points:
        """Only the points where ``keep``, or with those indices."""
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
    """Repeated measurements of one shape and size become a point each, of their median time.

    Steps stay as they are: those of equal batches are of other models and hosts, which their tables do not name.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfitted:
    """A table that no fit is made of, and why."""

    op: Op
    origin: str
    num_rows: int
    reason: str


@dataclass(slots=True)
class FitPoints:
    """What the measurements of one GPU give: points by operator and scope, and the tables that are not fitted.

    ``others`` are of sources that come after the one fitted: no fit sees them, and what it says of them is reported.
    """

    points: list[Points] = field(default_factory=list)
    others: list[Points] = field(default_factory=list)
    unfitted: list[Unfitted] = field(default_factory=list)


def tables_of(measurements: Sequence[Measurements], op: MeasuredOp) -> Iterator[tuple[str, Table]]:
    """Every table of ``op`` and where it is from."""
    for measurement in measurements:
        for table in measurement.tables:
            if table.op is op:
                kernel = f", {table.kernel}" if table.kernel else ""
                yield f"{measurement.provenance}{kernel}", table


def unknown_cache(table: Table, gpu: GpuType) -> tuple[str, ...]:
    """A note where rows that a cache served cannot be told from others."""
    if table.cold or gpu.name in CACHE_BYTES:
        return ()
    return (
        f"hetis does not know the last-level cache of {gpu.name}, and these rows were measured without flushing it: "
        "those that it served count like all others, and the fit may be too fast",
    )
