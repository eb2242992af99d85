"""The errors of a fit on points it never saw: over all of them, in the serving range, and by region."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hetis.profiler.fitting import FloatArray, rounded
from hetis.solver.profile import FitRegion, Op

Mask = NDArray[np.bool_]

MIN_P95 = 20  # minimum number of points for a meaningful 95th percentile
# The range of serving, in which `hetis-profile fit` states `held_out_mape`.
SERVING: Mapping[Op, FitRegion] = {
    Op.DENSE: FitRegion(tokens=(1, 8192)),
    Op.PREFILL_ATTENTION: FitRegion(context_tokens=(256, 16384), tokens=(256, 16384)),
    Op.DECODE_ATTENTION: FitRegion(batch=(4, 1e9), context_tokens=(256, 16384)),
    Op.ALL_REDUCE: FitRegion(num_bytes=(8192, 2.0**28)),
    Op.TRANSFER: FitRegion(num_bytes=(1024, 2.0**28)),
    Op.STEP: FitRegion(),
}
# Limits of a report's regions, by size; the last one is open.
_CUTS: Mapping[str, tuple[float, ...]] = {
    "batch": (4, 16, 64),
    "context_tokens": (256, 1024, 4096, 16385),
    "tokens": (64, 512, 2048),
    "num_bytes": (2.0**16, 2.0**20, 2.0**24),
}
_CROSSED = {
    Op.DECODE_ATTENTION: ("batch", "context_tokens"),
    Op.PREFILL_ATTENTION: ("batch", "context_tokens"),
    Op.DENSE: ("tokens",),
    Op.ALL_REDUCE: ("num_bytes",),
    Op.TRANSFER: ("num_bytes",),
    Op.STEP: ("batch",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorStats:
    """Relative errors, predicted / measured - 1: mean and median of their absolute values, 95th percentile, mean.

    0.1 is 10%; a positive ``bias`` means that the fit is too slow. All are zero if ``num_points`` is. ``p95`` is None
    for fewer than `MIN_P95` points, where it would be one of the worst two.
    """

    num_points: int
    mape: float
    median: float
    p95: float | None
    bias: float


def error_stats(predicted: FloatArray, seconds: FloatArray) -> ErrorStats:
    """Return the errors of ``predicted`` against the measured ``seconds``, both of shape [points]."""
    if not len(seconds):
        return ErrorStats(num_points=0, mape=0.0, median=0.0, p95=None, bias=0.0)
    # Sorted, so that sums do not depend on the order of the points.
    signed = np.sort(predicted / seconds - 1.0)
    sizes = np.sort(np.abs(signed))
    return ErrorStats(
        num_points=len(signed),
        mape=rounded(float(sizes.sum()) / len(sizes)),
        median=rounded(float(np.median(sizes))),
        p95=rounded(float(sizes[math.ceil(0.95 * len(sizes)) - 1])) if len(sizes) >= MIN_P95 else None,
        bias=rounded(float(signed.sum()) / len(signed)),
    )


def within(region: FitRegion, sizes: Mapping[str, FloatArray], count: int) -> Mask:
    """Return a mask of the points inside ``region``."""
    inside = np.ones(count, dtype=np.bool_)
    for name, size in sizes.items():
        limits = getattr(region, name)
        if limits is not None:
            inside &= (size >= limits[0]) & (size <= limits[1])
    return inside


def regions(op: Op, sizes: Mapping[str, FloatArray]) -> Iterator[tuple[str, Mask]]:
    """Yield name and points of every region of a report except empty ones."""
    names = _CROSSED[op]
    cells = np.stack([np.searchsorted(_CUTS[name], sizes[name], side="right") for name in names], axis=1)
    for cell in sorted(set(map(tuple, cells.tolist()))):
        label = ", ".join(_label(name, index) for name, index in zip(names, cell, strict=True))
        yield label, (cells == np.array(cell)).all(axis=1)


def covered(sizes: Mapping[str, FloatArray], least: Mapping[str, float]) -> FitRegion:
    """Return the range of the measurements, starting at ``least`` for sizes that have one."""
    return FitRegion(
        **{name: (max(float(size.min()), least.get(name, 0.0)), float(size.max())) for name, size in sizes.items()}
    )


def _label(name: str, index: int) -> str:
    cuts = _CUTS[name]
    unit = {"context_tokens": "context", "num_bytes": "bytes"}.get(name, name)
    if index == 0:
        return f"{unit} < {cuts[0]:,.0f}"
    low = cuts[index - 1]
    return f"{unit} >= {low:,.0f}" if index == len(cuts) else f"{unit} {low:,.0f} to {cuts[index] - 1:,.0f}"
