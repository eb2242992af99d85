"""From measurements to a profile: maxima of a few affine pieces, judged on points they never saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hetis.formats.measurements import Measurements
from hetis.profiler.fit.attention import attention_points
from hetis.profiler.fit.errors import SERVING, covered, error_stats, regions, within
from hetis.profiler.fit.layers import dense_points
from hetis.profiler.fit.links import link_points, step_points
from hetis.profiler.fit.pieces import fit_points
from hetis.profiler.fit.points import FEATURES, Points, Selection, Unfitted, distinct
from hetis.profiler.fit.report import FitReport, OpReport, OtherSource, remark, stated_error
from hetis.profiler.fitting import predict
from hetis.profiler.plausibility import doubts_of_units
from hetis.profiler.roofline import modelled_profile
from hetis.solver.cluster import GpuType
from hetis.solver.errors import InvalidProblemError
from hetis.solver.profile import Fit, FitScope, Op, Piece, Profile, Provenance, Source

__all__ = ["FitReport", "FittedProfile", "fit_profile", "selected_points"]

MIN_DISTINCT = 8  # points of different shape or size, for a fit that three quarters of them make
_WORST_STEP = 0.10  # a step fit that is further off than this is no better than the modelled constant


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedProfile:
    """A profile, and how wrong its fits are."""

    profile: Profile
    report: FitReport


def fit_profile(measurements: Sequence[Measurements], gpu: GpuType) -> FittedProfile:
    """Fits every operator that was measured; the others are the roofline's, marked ``modelled``.

    Where several sources measured an operator, the first of ``measurements`` counts and the others judge. Modelled
    fits of any scope stay below fitted ones of a head shape or TP size, so that every model finds a fit.

    Raises:
        InvalidProblemError: nothing that can be fitted, measurements of another GPU, times that look like those of
            another unit, or an unknown architecture.
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
    for points in selection.points:
        fit, report = _fit_op(points)
        if points.op is Op.STEP and report.held_out.mape > _WORST_STEP:
            reason = f"neither batch nor tokens explain it: held-out error {report.held_out.mape:.0%}"
            selection.unfitted.append(Unfitted(op=points.op, origin=points.origin, num_rows=len(points), reason=reason))
        else:
            fitted.append((fit, report))
    checks = [check for others in selection.others if (check := _against(others, [fit for fit, _ in fitted]))]
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
        report=FitReport(
            gpu=gpu.name,
            ops=tuple(report for _, report in fitted),
            unfitted=tuple(selection.unfitted),
            other_sources=tuple(checks),
        ),
    )


def selected_points(measurements: Sequence[Measurements], gpu: GpuType) -> Selection:
    """What is fitted, and what is not."""
    selection = Selection()
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


def _fit_op(points: Points) -> tuple[Fit, OpReport]:
    found = fit_points(points)
    seen, unseen = points.kept(found.fitted), points.kept(found.judges)
    serving = within(SERVING[points.op], unseen.sizes, len(unseen))
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
        serving=error_stats(found.predicted[serving], unseen.seconds[serving]),
        one_piece=error_stats(found.predicted_single[serving], unseen.seconds[serving]),
        by_region=tuple(
            (name, error_stats(found.predicted[cell], unseen.seconds[cell]))
            for name, cell in regions(points.op, unseen.sizes)
        ),
        region=covered(points.sizes),
        left_out=points.left_out,
        notes=points.notes,
    )
    report = replace(report, remark=remark(report))
    mine = tuple(Piece(**dict(zip(FEATURES[points.op], piece, strict=True))) for piece in found.pieces)
    provenance = Provenance(source=Source.FITTED, origin=points.origin, held_out_mape=stated_error(report))
    return Fit(op=points.op, pieces=mine, provenance=provenance, scope=points.scope, region=report.region), report


def _against(others: Points, fits: Sequence[Fit]) -> OtherSource | None:
    """What the fit of the same scope says of points in the serving range from another source; None without either."""
    fit = next((fit for fit in fits if (fit.op, fit.scope) == (others.op, others.scope)), None)
    served = others.kept(within(SERVING[others.op], others.sizes, len(others)))
    if fit is None or not len(served):
        return None
    pieces = [tuple(getattr(piece, name) for name in FEATURES[others.op]) for piece in fit.pieces]
    stats = error_stats(predict(pieces, served.features), served.seconds)
    return OtherSource(op=others.op, scope=others.scope, origin=others.origin, serving=stats)


def _scope_key(scope: FitScope) -> tuple[float, ...]:
    return tuple(getattr(scope, name) or 0.0 for name in ("weight_bytes", "tp", "head_dim", "queries_per_group"))
