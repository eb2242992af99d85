"""From measurements to a profile: maxima of a few affine pieces, judged on points they never saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hetis.formats.measurements import Measurements
from hetis.profiler.fit.errors import SERVING, covered, error_stats, regions, within
from hetis.profiler.fit.layers import dense_points
from hetis.profiler.fit.points import FEATURES, Points, Selection, Unfitted, attention_points, link_points, step_points
from hetis.profiler.fit.report import FitReport, OpReport, remark
from hetis.profiler.fit.split import Split, split
from hetis.profiler.fitting import Coefficients, fit_pieces, predict
from hetis.profiler.roofline import modelled_profile
from hetis.solver.cluster import GpuType
from hetis.solver.errors import InvalidProblemError
from hetis.solver.profile import Fit, FitScope, Op, Piece, Profile, Provenance, Source

__all__ = ["FitReport", "FittedProfile", "fit_profile", "selected_points"]

Rows = NDArray[np.intp]
Mask = NDArray[np.bool_]
MAX_PIECES = 4
_SERVING_WEIGHT = 4.0  # what a point in the serving range counts beside one outside of it
_WORST_STEP = 0.15  # a step fit that is further off than this is no better than the modelled constant
_WORTH = 0.005  # a further piece costs the solver a row; it must earn half a point of error on the tuning points


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedProfile:
    """A profile, and how wrong its fits are."""

    profile: Profile
    report: FitReport


def fit_profile(measurements: Sequence[Measurements], gpu: GpuType) -> FittedProfile:
    """Fits every operator that was measured; the others are the roofline's, marked ``modelled``.

    Where several sources measured attention, collectives or transfers, the first of ``measurements`` counts. Modelled
    fits of any scope stay below fitted ones of a head shape or TP size, so that every model finds a fit.

    Raises:
        InvalidProblemError: nothing that can be fitted, measurements of another GPU, or an unknown architecture.
    """
    others = sorted({m.gpu for m in measurements} - {gpu.name})
    if others:
        raise InvalidProblemError(f"measurements of {', '.join(others)} cannot be fitted to {gpu.name}")
    selection = selected_points(measurements, gpu)
    if not selection.points:
        reasons = "; ".join(f"{table.op} of {table.origin}: {table.reason}" for table in selection.unfitted)
        raise InvalidProblemError(f"{gpu.name}: nothing that can be fitted" + (f" ({reasons})" if reasons else ""))
    fitted = []
    for points in selection.points:
        fit, report = _fit_op(points)
        if points.op is Op.STEP and report.held_out.mape > _WORST_STEP:
            reason = f"neither batch nor tokens explain it: held-out error {report.held_out.mape:.0%}"
            selection.unfitted.append(Unfitted(op=points.op, origin=points.origin, num_rows=len(points), reason=reason))
        else:
            fitted.append((fit, report))
    modelled = modelled_profile(gpu)
    replaced = {(fit.op, fit.scope) for fit, _ in fitted}
    kept = [fit for fit in modelled.fits if (fit.op, fit.scope) not in replaced]
    order = list(Op)
    fits = sorted([*(fit for fit, _ in fitted), *kept], key=lambda fit: (order.index(fit.op), _scope_key(fit.scope)))
    return FittedProfile(
        profile=Profile(
            gpu=gpu.name,
            usable_bytes=modelled.usable_bytes,
            reserve_bytes=modelled.reserve_bytes,
            fits=tuple(fits),
        ),
        report=FitReport(gpu=gpu.name, ops=tuple(report for _, report in fitted), unfitted=tuple(selection.unfitted)),
    )


def selected_points(measurements: Sequence[Measurements], gpu: GpuType) -> Selection:
    """What is fitted, and what is not."""
    selection = Selection()
    dense_points(measurements, gpu, selection)
    attention_points(measurements, gpu, selection)
    link_points(measurements, gpu, selection)
    step_points(measurements, selection)
    return selection


def fit_points(points: Points) -> tuple[tuple[Coefficients, ...], tuple[Coefficients, ...], Split]:
    """The pieces, the best single piece, and the split.

    Pieces are added while each takes half a point off the error on the tuning points, a part of the fitted ones that
    is left out until then. Held-out points take no part.
    """
    parts = split(points)
    order = _order(points)  # the same points in any order give the same bytes
    weights = np.where(within(SERVING[points.op], points.sizes, len(points)), _SERVING_WEIGHT, 1.0)

    def fit(mask: Mask, num_pieces: int) -> tuple[Coefficients, ...]:
        rows = order[mask[order]]
        features, seconds = points.features[rows], points.seconds[rows]
        return fit_pieces(features, seconds, num_pieces=num_pieces, weights=weights[rows]).pieces

    def tuning_error(num_pieces: int) -> float:
        total = 0.0
        for fold in parts.tuning:
            rows = order[fold[order]]
            pieces = fit(parts.fitted & ~fold, num_pieces)
            errors = np.abs(predict(pieces, points.features[rows]) / points.seconds[rows] - 1.0)
            total += float((weights[rows] * errors).sum() / weights[rows].sum())
        return total / max(1, len(parts.tuning))

    count, least = 1, float("inf")
    for tried in range(1, MAX_PIECES + 1):
        if parts.fitted.sum() < 2 * tried * points.features.shape[1]:
            break
        error = tuning_error(tried)
        if error > least - _WORTH:
            break
        count, least = tried, error
    best = fit(parts.fitted, count)
    return best, best if count == 1 else fit(parts.fitted, 1), parts


def _order(points: Points) -> Rows:
    return np.lexsort((np.array(points.shapes), points.seconds, *points.features.T))


def _fit_op(points: Points) -> tuple[Fit, OpReport]:
    pieces, single, parts = fit_points(points)
    seen, unseen = points.kept(parts.fitted), points.kept(parts.held_out)
    serving = unseen.kept(within(SERVING[points.op], unseen.sizes, len(unseen)))
    report = OpReport(
        op=points.op,
        scope=points.scope,
        origin=points.origin,
        num_pieces=len(pieces),
        num_fitted=len(seen),
        num_held_out=len(unseen),
        held_out_shapes=parts.shapes,
        fitted=error_stats(pieces, seen.features, seen.seconds),
        held_out=error_stats(pieces, unseen.features, unseen.seconds),
        serving=error_stats(pieces, serving.features, serving.seconds),
        one_piece=error_stats(single, serving.features, serving.seconds),
        by_region=tuple(
            (name, error_stats(pieces, unseen.features[cell], unseen.seconds[cell]))
            for name, cell in regions(points.op, unseen.sizes)
        ),
        region=covered(points.sizes),
        left_out=points.left_out,
    )
    report = replace(report, remark=remark(report))
    mine = tuple(Piece(**dict(zip(FEATURES[points.op], piece, strict=True))) for piece in pieces)
    error = report.serving.mape if report.serving.num_points else report.held_out.mape
    provenance = Provenance(source=Source.FITTED, origin=points.origin, held_out_mape=error)
    return Fit(op=points.op, pieces=mine, provenance=provenance, scope=points.scope, region=report.region), report


def _scope_key(scope: FitScope) -> tuple[float, ...]:
    return tuple(getattr(scope, name) or 0.0 for name in ("weight_bytes", "tp", "head_dim", "queries_per_group"))
