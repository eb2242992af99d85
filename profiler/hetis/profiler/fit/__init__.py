"""Fits measurements to a profile: maxima of a few affine pieces, judged on points they never saw."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hetis.formats.measurements import Measurements
from hetis.profiler.fit.attention import attention_points
from hetis.profiler.fit.errors import SERVING, ErrorStats, covered, error_stats, regions, within
from hetis.profiler.fit.layers import dense_points
from hetis.profiler.fit.links import link_points, step_points
from hetis.profiler.fit.mixed import MixedReport, fit_mixed
from hetis.profiler.fit.pieces import fit_points
from hetis.profiler.fit.points import (
    FEATURES,
    MIN_DISTINCT,
    FitPoints,
    Points,
    Unfitted,
    distinct,
    seconds_by,
    unfitted_mixed,
)
from hetis.profiler.fit.report import (
    SMALL_BATCH,
    FewHeads,
    FitReport,
    OpReport,
    OtherSource,
    Served,
    remark,
    stated_error,
)
from hetis.profiler.fitting import predict
from hetis.profiler.plausibility import doubts_of_units
from hetis.profiler.roofline import modelled_profile
from hetis.solver.cluster import GpuType
from hetis.solver.errors import InvalidProblemError
from hetis.solver.profile import Fit, FitScope, Op, Piece, Profile, Provenance, Source

__all__ = ["FitReport", "FittedProfile", "fit_profile", "selected_points"]

_WORST_STEP = 0.10  # a step fit with a larger error is no better than the modelled constant


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedProfile:
    """A profile with the errors of its fits."""

    profile: Profile
    report: FitReport


def fit_profile(measurements: Sequence[Measurements], gpu: GpuType) -> FittedProfile:
    """Fit every operator that was measured. The others are the roofline's, marked ``modelled``.

    If several sources measured an operator, the first in ``measurements`` counts and the others judge. Modelled fits of
    any scope stay in addition to fitted ones of a head shape or TP size, so that every model finds a fit. Raises
    InvalidProblemError if there is nothing to fit, measurements are of another GPU, times look as if in another unit,
    or the architecture is unknown.
    """
    others = sorted({m.gpu for m in measurements} - {gpu.name})
    if others:
        raise InvalidProblemError(f"measurements of {', '.join(others)} cannot be fitted to {gpu.name}")
    if doubts := list(doubts_of_units(measurements, gpu)):
        raise InvalidProblemError(f"{gpu.name}: " + "; ".join(doubts))
    selection = selected_points(measurements, gpu)
    if not selection.points:
        reasons = "; ".join(f"{table.op} of {table.origin}: {table.reason}" for table in selection.unfitted)
        raise InvalidProblemError(f"{gpu.name}: nothing that can be fitted" + (f" ({reasons})" if reasons else ""))
    fitted = []
    scopes = {(points.op, points.scope) for points in selection.points}
    for points in selection.points:
        fit, report = _fit_op(points, {scope for op, scope in scopes if op is points.op})
        if points.op is Op.STEP and report.held_out.mape > _WORST_STEP:
            reason = f"neither batch nor tokens explain it: held-out error {report.held_out.mape:.0%}"
            selection.unfitted.append(Unfitted(op=points.op, origin=points.origin, num_rows=len(points), reason=reason))
        else:
            fitted.append((fit, report))
    few_heads = [few for points in selection.points if (few := _on_few_heads(points, [fit for fit, _ in fitted]))]
    checks = [check for others in selection.others if (check := _against(others, [fit for fit, _ in fitted]))]
    modelled = modelled_profile(gpu)
    replaced = {(fit.op, fit.scope) for fit, _ in fitted}
    kept = [fit for fit in modelled.fits if (fit.op, fit.scope) not in replaced]
    made, mixed = _with_factors([fit for fit, _ in fitted], kept, selection, gpu)
    order = list(Op)
    fits = sorted([*made, *kept], key=lambda fit: (order.index(fit.op), _scope_key(fit.scope)))
    return FittedProfile(
        profile=Profile(
            gpu=gpu.name, usable_bytes=modelled.usable_bytes, reserve_bytes=modelled.reserve_bytes, fits=tuple(fits)
        ),
        report=FitReport(
            gpu=gpu.name,
            ops=tuple(report for _, report in fitted),
            unfitted=tuple(selection.unfitted),
            other_sources=tuple(checks),
            few_heads=tuple(few_heads),
            mixed=tuple(mixed),
        ),
    )


def selected_points(measurements: Sequence[Measurements], gpu: GpuType) -> FitPoints:
    """Return the points to fit, and what is not fitted."""
    selection = FitPoints()
    dense_points(measurements, gpu, selection)
    attention_points(measurements, gpu, selection)
    link_points(measurements, gpu, selection)
    step_points(measurements, selection)
    every = [distinct(points) for points in selection.points]
    selection.points = [points for points in every if len(points) >= MIN_DISTINCT]
    selection.unfitted += [
        Unfitted(
            op=points.op, origin=points.origin, num_rows=len(points), reason=f"under {MIN_DISTINCT} distinct points"
        )
        for points in every
        if len(points) < MIN_DISTINCT
    ]
    selection.others = [distinct(points) for points in selection.others]
    return selection


def _fit_op(points: Points, scopes: Collection[FitScope]) -> tuple[Fit, OpReport]:
    """Return the fit of ``points`` and its errors. ``scopes`` are those of all fits of the operator."""
    found = fit_points(points)
    seen, unseen = points.kept(found.fitted), points.kept(found.judges)
    serving, served = within(SERVING[points.op], unseen.sizes, len(unseen)), unseen.served(scopes)

    def errors(where: NDArray[np.bool_], *, one_piece: bool = False) -> ErrorStats:
        predicted = found.predicted_single if one_piece else found.predicted
        return error_stats(predicted[where], unseen.seconds[where])

    cells = list(regions(points.op, unseen.sizes))
    report = OpReport(
        op=points.op,
        scope=points.scope,
        origin=points.origin,
        num_pieces=len(found.pieces),
        num_fitted=len(seen),
        num_held_out=len(unseen),
        held_out_shapes=found.shapes,
        fitted=error_stats(predict(found.pieces, seen.features), seen.seconds),
        held_out=error_stats(found.predicted, unseen.seconds),
        serving=errors(serving),
        one_piece=errors(serving, one_piece=True),
        by_region=tuple((name, errors(cell)) for name, cell in cells),
        region=covered(points.sizes, points.least),
        served=Served(
            num_fitted=int(seen.served(scopes).sum()),
            serving=errors(serving & served),
            one_piece=errors(serving & served, one_piece=True),
            by_region=tuple((name, errors(cell & served)) for name, cell in cells if (cell & served).any()),
        ),
        left_out=points.left_out,
        notes=points.notes,
    )
    report = replace(report, remark=remark(report))
    mine = tuple(Piece(**dict(zip(FEATURES[points.op], piece, strict=True))) for piece in found.pieces)
    provenance = Provenance(source=Source.FITTED, origin=points.origin, held_out_mape=stated_error(report))
    return Fit(op=points.op, pieces=mine, provenance=provenance, scope=points.scope, region=report.region), report


def _with_factors(
    fitted: Sequence[Fit], modelled: Sequence[Fit], selection: FitPoints, gpu: GpuType
) -> tuple[list[Fit], list[MixedReport]]:
    """Return the fits, those of decode attention with a factor if it was measured beside chunks, and the reports."""
    rows, fits, reports = selection.mixed, list[Fit](), list[MixedReport]()
    for fit in fitted:
        found = None
        if rows is not None and fit.op is Op.DECODE_ATTENTION:
            found = fit_mixed(fit, rows, [*fitted, *modelled], gpu)
        if found is not None:
            reports.append(found[1])
        fits.append(fit if found is None else replace(fit, mixed=found[0]))
    if rows is not None and not reports:
        reason = f"no fitted head shape has {MIN_DISTINCT} distinct points in the serving range"
        selection.unfitted.append(unfitted_mixed(rows.origin, len(rows.table), reason))
    return fits, reports


def _against(others: Points, fits: Sequence[Fit]) -> OtherSource | None:
    """Return the errors of the fit of the same scope on another source's points in the serving range, if any."""
    fit = next((fit for fit in fits if (fit.op, fit.scope) == (others.op, others.scope)), None)
    served = others.kept(within(SERVING[others.op], others.sizes, len(others)))
    if fit is None or not len(served):
        return None
    return OtherSource(op=others.op, scope=others.scope, origin=others.origin, serving=_errors_of(fit, served))


def _on_few_heads(points: Points, fits: Sequence[Fit]) -> FewHeads | None:
    """Return the errors of the fit of ``points`` for fewer query heads, where a plan would use it, if there are any."""
    fit = next((fit for fit in fits if (fit.op, fit.scope) == (points.op, points.scope)), None)
    if fit is None or points.few_heads is None:
        return None
    few = distinct(points.few_heads)
    few = few.kept(few.served({fit.scope for fit in fits if fit.op is points.op}))
    few = few.kept(within(SERVING[few.op], few.sizes, len(few)))
    if not len(few):
        return None
    small = few.kept(few.sizes["batch"] < SMALL_BATCH)
    return FewHeads(op=few.op, scope=few.scope, serving=_errors_of(fit, few), small_batch=_errors_of(fit, small))


def _errors_of(fit: Fit, points: Points) -> ErrorStats:
    return error_stats(seconds_by(fit, points.features), points.seconds)


def _scope_key(scope: FitScope) -> tuple[float, ...]:
    return tuple(getattr(scope, name) or 0.0 for name in ("weight_bytes", "tp", "head_dim", "queries_per_group"))
