"""A plan's notes on its profiles: their origin, the effect of their errors, and use outside the measured range."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hetis.planner.use_cases.json_values import json_value
from hetis.planner.use_cases.robustness.perturbing import used_fits
from hetis.planner.use_cases.robustness.ranges import COMPUTE, Predicted, Range, predicted
from hetis.planner.use_cases.robustness.regions import outside_regions
from hetis.planner.use_cases.robustness.study import Robustness
from hetis.solver.plan import Plan
from hetis.solver.problem import PlacementProblem
from hetis.solver.profile import Fit, Profile, Source

PROFILE_ERRORS = "profile_errors"  # entry of `Plan.inputs`: `predicted`, and `robustness` if requested


def profile_notes(problem: PlacementProblem) -> tuple[str, ...]:
    """Return notes on profiles that are not measurements of this fleet, by the fits that the model uses."""
    profiles = used_fits(problem.profiles, problem.model, problem.family.tp_sizes)
    modelled = sorted(gpu for gpu, profile in profiles.items() if _is_modelled(profile))
    fitted = sorted(gpu for gpu, profile in profiles.items() if gpu not in modelled and _is_fitted(profile))
    notes = []
    if modelled:
        names = ", ".join(modelled)
        parts = [f"; {', '.join(_fitted_ops(profiles[g]))} of {g} fitted" for g in modelled if _is_fitted(profiles[g])]
        notes.append(
            f"modelled, not measured: the profiles of {names}; real rates may differ (--profile FILE){''.join(parts)}"
        )
    if fitted:
        ops = sorted({fit.op.value for gpu in fitted for fit in profiles[gpu].fits if _modelled(fit)})
        but = f"; modelled: {', '.join(ops)}" if ops else ""
        notes.append(f"fitted to measurements: the profiles of {', '.join(fitted)}{but}")
    return tuple(notes)


def with_profile_errors(plan: Plan, problem: PlacementProblem) -> Plan:
    """Return the plan with the range that its profiles' errors leave, and notes on fits used out of range."""
    inputs = dict(plan.inputs)
    if (found := predicted(plan, problem)) is not None:
        inputs[PROFILE_ERRORS] = {"predicted": json_value(found)}
    return replace(plan, inputs=inputs, notes=plan.notes + outside_regions(plan, problem))


def with_robustness(plan: Plan, robustness: Robustness) -> Plan:
    """Return the plan with the result of a study."""
    errors = {**plan.inputs.get(PROFILE_ERRORS, {}), "robustness": json_value(robustness)}
    return replace(plan, inputs={**plan.inputs, PROFILE_ERRORS: errors})


def predicted_of(plan: Plan) -> Predicted | None:
    """Return what `with_profile_errors` wrote, or None if there is nothing readable."""
    found = _mapping(_mapping(plan.inputs.get(PROFILE_ERRORS)).get("predicted"))
    rate, ttft_s, tpot_s = (_range(found.get(name)) for name in ("rate", "ttft_s", "tpot_s"))
    if rate is None or ttft_s is None or tpot_s is None:
        return None
    return Predicted(
        rate=rate,
        ttft_s=ttft_s,
        tpot_s=tpot_s,
        errors=_mapping(found.get("errors")),
        assumed=tuple(found.get("assumed", ())),
    )


def _range(value: Any) -> Range | None:
    low, high = _mapping(value).get("low"), _mapping(value).get("high")
    return Range(low=low, high=high) if isinstance(low, int | float) and isinstance(high, int | float) else None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _is_modelled(profile: Profile) -> bool:
    """Return whether a computing operator is modelled."""
    return any(fit.op in COMPUTE and _modelled(fit) for fit in profile.fits)


def _is_fitted(profile: Profile) -> bool:
    return bool(_fitted_ops(profile))


def _fitted_ops(profile: Profile) -> list[str]:
    return sorted({fit.op.value for fit in profile.fits if fit.provenance.source in (Source.FITTED, Source.IMPORTED)})


def _modelled(fit: Fit) -> bool:
    return fit.provenance.source is Source.MODELLED
