"""Profiles whose dense layers have a long fixed time."""

from __future__ import annotations

from dataclasses import replace

from hetis.solver.profile import Op, Profile


def with_slow_starts(profile: Profile) -> Profile:
    """Return the profile with a millisecond of fixed time in every piece of its dense layers."""
    return replace(
        profile,
        fits=tuple(
            replace(fit, pieces=tuple(replace(piece, fixed_s=1e-3) for piece in fit.pieces))
            if fit.op is Op.DENSE
            else fit
            for fit in profile.fits
        ),
    )
