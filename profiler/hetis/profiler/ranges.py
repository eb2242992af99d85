"""The possible error of a profile by operator, which becomes the predicted range of plans that use it."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from hetis.solver.model import ModelSpec
from hetis.solver.profile import Fit, Op, Profile, Source

# Assumed for a fit that states no error: a modelled transfer or step, a handwritten profile.
UNKNOWN_ERROR = 0.25
# Nine in ten held-out points of measured engines with dense models are within it (docs/accuracy.md): an engine's
# iterations are further from their kernels' times than fits are from these.
ENGINE_ERROR = 0.15
MOST_ERROR = 0.9  # above it "too fast by a mean error" would diverge: ten times slower is taken as the worst


def range_factors(fit: Fit) -> tuple[float, float]:
    """Return the least and the greatest multiple of the times of ``fit`` that its range holds.

    A modelled fit's range is a factor in both directions (``range_error``). A mean error ``e``, or `ENGINE_ERROR` if
    that is larger, is that of predicted / measured, so a measurement lies between ``1 / (1 + e)`` and ``1 / (1 - e)``
    times the fit's value.
    """
    error = stated_error(fit)
    if fit.provenance.range_error is not None:
        return 1.0 / (1.0 + error), 1.0 + error
    error = min(max(error, ENGINE_ERROR), MOST_ERROR)
    return 1.0 / (1.0 + error), 1.0 / (1.0 - error)


def stated_error(fit: Fit) -> float:
    """Return the error that defines the range of ``fit``: its ``range_error``, mean error, or `UNKNOWN_ERROR`."""
    known = (fit.provenance.range_error, fit.provenance.held_out_mape, UNKNOWN_ERROR)
    return next(error for error in known if error is not None)


def error_of(profile: Profile, model: ModelSpec | None = None, tp: int = 1) -> Mapping[Op, float]:
    """Return the relative error per operator; 0.1 is 10%.

    For a fitted operator it is the mean error on held-out points in the serving range. For one that was modelled for an
    unmeasured GPU it is the error that nine in ten times keep where measured GPUs are left out. It is `UNKNOWN_ERROR`
    if neither is known.

    Args:
        model, tp: use the fit for this model on a group of ``tp``. Without a model: the mean over all fits, without
            modelled ones if there are others.
    """
    errors = {}
    for op in Op:
        chosen = None if model is None else profile.fit(op, model, tp)
        fits = _best_known(profile, op) if model is None else [chosen] if chosen else []
        if fits:
            errors[op] = fmean(map(stated_error, fits))
    return errors


def _best_known(profile: Profile, op: Op) -> list[Fit]:
    fits = [fit for fit in profile.fits if fit.op is op]
    return [fit for fit in fits if fit.provenance.source is not Source.MODELLED] or fits
