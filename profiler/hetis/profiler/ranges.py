"""The possible error of a profile by operator, which becomes the predicted range of plans that use it."""

from __future__ import annotations

from hetis.solver.profile import Fit

# Assumed for a fit that states no error: a modelled transfer or step, a handwritten profile.
UNKNOWN_ERROR = 0.25
# Nine in ten held-out points of measured engines with dense models are within it (docs/accuracy.md): an engine's
# iterations are further from their kernels' times than fits are from these.
ENGINE_ERROR = 0.14
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
