"""How wrong a profile may be, by operator: what becomes the predicted range of plans that use it."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from hetis.solver.model import ModelSpec
from hetis.solver.profile import Fit, Op, Profile, Source

# What is said of a fit whose error nobody knows (a modelled transfer or step, a profile written by hand): the largest
# error that modelling makes on the device side of measured GPUs, that of prefill attention.
UNKNOWN_ERROR = 0.25


def error_of(profile: Profile, model: ModelSpec | None = None, tp: int = 1) -> Mapping[Op, float]:
    """Relative error per operator; 0.1 is 10%.

    Of a fitted operator it is the mean error on held-out points in the serving range; of a modelled one the error
    that modelling makes on measured GPUs, the mean over every pair of them; `UNKNOWN_ERROR` where
    neither is known.

    Args:
        model, tp: the fit that this model on a group of ``tp`` uses; without a model the mean over all fits, the
            modelled ones left out where there are others.
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
