"""Prefill chunks over a past, judged by the one published table with such chunks: added time and KV cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from hetis.formats.measurements import MeasuredOp, Measurements
from hetis.profiler.fit.attention import prefill_points
from hetis.profiler.fit.pieces import fit_points
from hetis.profiler.fit.points import FEATURES, Points, distinct
from hetis.profiler.work import FloatArray
from hetis.solver.cluster import GpuType
from hetis.solver.profile import Fit, Op

_BYTE = FEATURES[Op.PREFILL_ATTENTION].index("byte_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class KvCharge:
    """One way to charge KV, fitted to the table itself and judged on held-out chunks over a past.

    ``readings`` is the time of a KV byte as a multiple of that at the nominal bandwidth, at most over the pieces.
    """

    charge: str
    num_points: int
    mape: float
    bias: float
    readings: float


@dataclass(frozen=True, slots=True, kw_only=True)
class OverPast:
    """Results for the chunks.

    Attributes:
        charges: ways to charge KV.
        num_increments: number of chunks with a past that have a twin without.
        increment: median of the time that the past adds, as predicted by the shipped fit / measured.
        increment_mape: mean error of this time, as a share of the whole time of the chunk.
    """

    charges: tuple[KvCharge, ...]
    num_increments: int
    increment: float
    increment_mape: float


def over_past(measurements: Measurements, gpu: GpuType, shipped: Fit) -> OverPast:
    """Judge the chunks of ``measurements``, to none of which ``shipped`` was fitted.

    Raises:
        StopIteration: there is no table of prefill attention.
    """
    table = next(table for table in measurements.tables if table.op is MeasuredOp.PREFILL_ATTENTION)
    points = distinct(next(prefill_points(table, gpu, str(measurements.provenance))))
    once = points.given["byte_s"]
    ways: tuple[tuple[str, Mapping[str, float]], ...] = (
        ("one reading, as shipped", points.given),
        ("fitted", {}),
        ("nothing", {"byte_s": 0.0}),
    )
    charges = tuple(_charge(name, replace(points, given=given), once) for name, given in ways)
    added_s, predicted_s, whole_s = _increments(points, shipped)
    return OverPast(
        charges=charges,
        num_increments=len(added_s),
        increment=float(np.median(predicted_s / added_s)),
        increment_mape=float((np.abs(predicted_s - added_s) / whole_s).mean()),
    )


def _charge(name: str, points: Points, once: float) -> KvCharge:
    found = fit_points(points)
    past = points.sizes["past_tokens"][found.judges] > 0
    errors = found.predicted[past] / points.seconds[found.judges][past] - 1.0
    return KvCharge(
        charge=name,
        num_points=int(past.sum()),
        mape=float(np.abs(errors).mean()),
        bias=float(errors.mean()),
        readings=max(piece[_BYTE] for piece in found.pieces) / once,
    )


def _increments(points: Points, shipped: Fit) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return the seconds that a past of 512 tokens or more adds, measured and predicted, and the whole chunk's time."""
    tokens, past = points.sizes["tokens"], points.sizes["past_tokens"]
    twins = {size: row for row, size in enumerate(tokens.tolist()) if past[row] == 0}
    rows = [row for row, size in enumerate(tokens.tolist()) if past[row] >= 512 and size in twins]
    at = [twins[tokens[row]] for row in rows]
    names = ("flops", "num_bytes", "tokens", "heads")
    predicted = np.array(
        [shipped.seconds(**dict(zip(names, row[1:], strict=True))) for row in points.features.tolist()]
    )
    seconds = points.seconds
    added = seconds[rows] - seconds[at]
    clear = added > 0
    return added[clear], (predicted[rows] - predicted[at])[clear], seconds[rows][clear]
