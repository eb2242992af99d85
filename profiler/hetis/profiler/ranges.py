"""The possible error of a profile by operator, which becomes the predicted range of plans that use it."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from hetis.solver.model import ModelSpec
from hetis.solver.profile import Fit, Op, Profile, Source

# Stated for a fit whose error is unknown (a modelled transfer or step, a handwritten profile): the largest error that
# modelling makes on the device side of measured GPUs, which is that of prefill attention.
UNKNOWN_ERROR = 0.25


def error_of(profile: Profile, model: ModelSpec | None = None, tp: int = 1) -> Mapping[Op, float]:
    """Return the relative error per operator; 0.1 is 10%.

    For a fitted operator it is the mean error on held-out points in the serving range. For a modelled one it is the
    error that modelling makes on measured GPUs, the mean over every pair of them. It is `UNKNOWN_ERROR` if neither is
    known.

    Args:
        model, tp: use the fit for this model on a group of ``tp``. Without a model: the mean over all fits, without
            modelled ones if there are others.
    """
    errors = {}
    for op in Op:
        chosen = None if model is None else profile.fit(op, model, tp)
        fits = _best_known(profile, op) if model is None else [chosen] if chosen else []
        known = [
            UNKNOWN_ERROR if fit.provenance.held_out_mape is None else fit.provenance.held_out_mape for fit in fits
        ]
        if known:
            errors[op] = fmean(known)
    return errors


def _best_known(profile: Profile, op: Op) -> list[Fit]:
    fits = [fit for fit in profile.fits if fit.op is op]
    return [fit for fit in fits if fit.provenance.source is not Source.MODELLED] or fits
