"""The range of a plan's rate and latencies that follows from the errors its profiles state.

Times only grow with coefficients. So the plan is priced twice: with every fit too fast by what it states, and with
every fit too slow (`hetis.profiler.ranges.range_factors`). The plan's result lies between the two if no fit is off by
more; errors of operators are weighted by their share of the time, and never cancel. The error of a fit to measurements
is a mean: single points are further off, but a plan's times are sums over many of them. That of a fit modelled for a
GPU nobody measured holds for nine in ten times of measured GPUs that are left out in turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hetis.planner.use_cases.robustness.fixed_plan import FixedPlan, Reach
from hetis.planner.use_cases.robustness.perturbing import scaled_by, tp_sizes, used_fits
from hetis.profiler.ranges import range_factors, stated_error
from hetis.solver.plan import Plan
from hetis.solver.problem import PlacementProblem
from hetis.solver.profile import Op, Profile

COMPUTE = (Op.DENSE, Op.PREFILL_ATTENTION, Op.DECODE_ATTENTION)


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """A range from the lowest to the highest value."""

    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """The plan's result if its profiles are off by their stated errors.

    Attributes:
        rate: requests/s as the objective counts them; for cost and gpus the goodput.
        ttft_s, tpot_s: of the worst replica, micro-batches as planned.
        errors: the assumed errors by GPU type and operator; 0.1 is 10%.
        assumed: GPU types and operators (``L4 step``) that state no error and were given `UNKNOWN_ERROR`.
    """

    rate: Range
    ttft_s: Range
    tpot_s: Range
    errors: Mapping[str, Mapping[str, float]]
    assumed: tuple[str, ...]


def predicted(plan: Plan, problem: PlacementProblem) -> Predicted | None:
    """Return the range, or None if a GPU type in use states no error of its dense layers and attention."""
    if not plan.replicas:
        return None
    fixed = FixedPlan(plan, problem)
    used = {gpu: problem.profiles[gpu] for gpu in sorted(fixed.gpus)}
    profiles = used_fits(used, problem.model, tp_sizes(plan, problem))
    if not all(map(_states_errors, profiles.values())):
        return None

    def reach(end: int) -> Reach:
        return fixed.as_planned(scaled_by(profiles, lambda _gpu, fit: range_factors(fit)[end]))

    errors: dict[str, dict[str, float]] = {gpu: {} for gpu in profiles}
    assumed = dict[str, None]()  # in order, without duplicates
    for gpu, profile in profiles.items():
        for fit in profile.fits:
            errors[gpu][fit.op.value] = max(errors[gpu].get(fit.op.value, 0.0), stated_error(fit))
            if fit.provenance.held_out_mape is None and fit.provenance.range_error is None:
                assumed[f"{gpu} {fit.op}"] = None
    fast, slow = reach(0), reach(1)
    return Predicted(
        rate=Range(low=slow.rate, high=fast.rate),
        ttft_s=Range(low=fast.ttft_s, high=slow.ttft_s),
        tpot_s=Range(low=fast.tpot_s, high=slow.tpot_s),
        errors=errors,
        assumed=tuple(assumed),
    )


def _states_errors(profile: Profile) -> bool:
    return any(
        fit.op in COMPUTE and (fit.provenance.held_out_mape, fit.provenance.range_error) != (None, None)
        for fit in profile.fits
    )
