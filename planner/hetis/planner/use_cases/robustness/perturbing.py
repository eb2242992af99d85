"""Profiles with changed coefficients."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from hetis.solver.model import ModelSpec
from hetis.solver.plan import Plan
from hetis.solver.problem import PlacementProblem
from hetis.solver.profile import Fit, Op, Piece, Profile

Profiles = Mapping[str, Profile]
Factor = Callable[[str, Fit], float]  # the multiplier of a fit's times on a GPU type

COEFFICIENTS = ("fixed_s", "flop_s", "byte_s", "token_s", "head_s", "wire")


@dataclass(frozen=True, slots=True, kw_only=True)
class Corner:
    """A corner case: everything of one kind is off by the whole error in one direction."""

    name: str
    profiles: Profiles


def tp_sizes(plan: Plan, problem: PlacementProblem) -> frozenset[int]:
    """Return every TP size that a plan of the problem may price, including 1 for attention workers."""
    return frozenset(
        {
            1,
            *problem.family.tp_sizes,
            *(s.tp * dp for r in plan.replicas for s in r.stages for dp in (1, r.attention_dp)),
        }
    )


def used_fits(profiles: Profiles, model: ModelSpec, sizes: Iterable[int]) -> dict[str, Profile]:
    """Return the profiles without fits for other models and TP sizes; the pricing of ``model`` does not change.

    Attention workers compute in the precision of their primary, so fits for each precision are kept.

    A fitted profile holds dozens of these, and every sample would perturb and search them all.
    """
    sizes, models = tuple(sizes), tuple(dict.fromkeys(map(model.on, profiles)))

    def kept(profile: Profile) -> tuple[Fit, ...]:
        every = (profile.fit(op, one, tp) for one in models for op in Op for tp in sizes)
        found = [fit for fit in every if fit is not None]
        ops = {fit.op for fit in found}
        return tuple(fit for fit in profile.fits if fit.op not in ops or any(fit is one for one in found))

    return {gpu: replace(profile, fits=kept(profile)) for gpu, profile in profiles.items()}


def scaled(profiles: Profiles, factor: float, *, only: Op | None = None) -> dict[str, Profile]:
    """Multiply all times, or those of one operator, by ``factor``."""
    return scaled_by(profiles, lambda _gpu, fit: factor if only in (None, fit.op) else 1.0)


def scaled_by(profiles: Profiles, factor: Factor) -> dict[str, Profile]:
    """Multiply all times of every fit by its ``factor``."""
    return {
        gpu: replace(profile, fits=tuple(_scaled(fit, factor(gpu, fit)) for fit in profile.fits))
        for gpu, profile in profiles.items()
    }


def perturbed(profiles: Profiles, error: float, rng: np.random.Generator) -> dict[str, Profile]:
    """Multiply every coefficient of every fit by its own factor, uniform between ``1 - error`` and ``1 + error``.

    Numbers are drawn in the order of GPU names and fits, even for coefficients that are zero, so that equal seeds give
    equal errors to a GPU type.
    """

    def piece(old: Piece) -> Piece:
        factors = rng.uniform(1.0 - error, 1.0 + error, len(COEFFICIENTS))
        return Piece(**{name: getattr(old, name) * float(f) for name, f in zip(COEFFICIENTS, factors, strict=True)})

    return {
        gpu: replace(
            profiles[gpu],
            fits=tuple(replace(fit, pieces=tuple(map(piece, fit.pieces))) for fit in profiles[gpu].fits),
        )
        for gpu in sorted(profiles)
    }


def corners(profiles: Profiles, error: float, *, gpus: Collection[str]) -> Iterator[Corner]:
    """Yield cases in which everything, one operator, or one of ``gpus`` is slower or faster by ``error``."""
    ops = [op for op in Op if any(fit.op is op for profile in profiles.values() for fit in profile.fits)]
    for word, factor in (("slower", 1.0 + error), ("faster", 1.0 - error)):
        yield Corner(name=f"everything {word}", profiles=scaled(profiles, factor))
        for name in sorted(gpus) if len(gpus) > 1 else ():
            yield Corner(name=f"{name} {word}", profiles={**profiles, **scaled({name: profiles[name]}, factor)})
        for op in ops:
            yield Corner(name=f"{op.value} {word}", profiles=scaled(profiles, factor, only=op))


def _scaled(fit: Fit, factor: float) -> Fit:
    if factor == 1.0:
        return fit
    return replace(
        fit,
        pieces=tuple(Piece(**{name: factor * getattr(old, name) for name in COEFFICIENTS}) for old in fit.pieces),
    )
