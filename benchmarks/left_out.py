"""How often measurements lie in the range stated for an unmeasured GPU: every measured GPU is left out in turn.

    python -m benchmarks.left_out [--quick] [--json]

A GPU is modelled from its relatives alone: efficiencies and ranges are derived again without any of its measurements
(`tools.left_out`). Rows of operators compare every measured time in the serving range, ``count`` of them: `nine_in_ten`
is the error that nine in ten do not exceed, in either direction (0.5: between 1/1.5 and 1.5 times the modelled time),
``range`` the stated error, and ``covered`` the share of times within it. ``mean_error`` is the mean error of the
relatives, and ``covered_by_mean`` the share that a range of that size would cover. Rows of plans do the same with
rates: plans are made with the modelled profile, and their rate by the measured profile is compared with the stated
range. ``range`` is its median upper end there. In rows called all, each trial counts once and ``covered`` is the mean.

Without the published tables (``--data``) the shipped profiles' fits on a grid stand in for the measurements.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.measuring import rows
from benchmarks.measuring.instances import NO_LIMITS, fleet, problem
from benchmarks.measuring.rows import Cell, Row
from benchmarks.measuring.shipped_points import shipped_points
from hetis.formats import catalogue
from hetis.planner.use_cases.record_forms import Predicted
from hetis.planner.use_cases.robustness.fixed_plan import FixedPlan
from hetis.planner.use_cases.robustness.profile_errors import predicted
from hetis.profiler.defaults import shipped_profile
from hetis.profiler.fitting import FloatArray
from hetis.profiler.ranges import MOST_ERROR, UNKNOWN_ERROR
from hetis.profiler.roofline import modelled_profile
from hetis.solver.budget import Budget
from hetis.solver.planning import solve_placement
from hetis.solver.problem import PlacementProblem
from hetis.solver.profile import Profile
from tools.efficiency import measured_tables, relative_points, without
from tools.left_out import Tables, Trial

DATA = Path(__file__).parents[2] / "shared" / "data" / "profiles"
COMPUTE = ("dense", "prefill_attention", "decode_attention")
MODELS = ("Llama-3.1-8B", "Llama-2-70B")
LENGTHS = ("1024/256", "8000/300")
PARTNERS = {"A100-SXM-80GB": "H100-SXM-80GB", "H100-SXM-80GB": "A100-SXM-80GB", "L40S": "A100-SXM-80GB"}
LIMIT_S, GAP = 10.0, 0.01


def main() -> None:
    """Print all rows."""
    parser = rows.parser("benchmarks.left_out", __doc__)
    parser.add_argument("--data", type=Path, default=DATA if DATA.exists() else None, help="the published tables")
    parser.add_argument("--shipped", action="store_true", help="the shipped profiles' fits, even where the tables are")
    arguments = parser.parse_args()
    folder = None if arguments.shipped or arguments.quick else arguments.data
    if folder is None:
        print("without the published tables: measured times are those of the shipped fits", file=sys.stderr)
    measured = measured_tables(shipped_points() if folder is None else relative_points(folder))
    rows.show(all_rows(measured, quick=arguments.quick, only=arguments.only), arguments, name="left_out")


def all_rows(measured: Tables, *, quick: bool, only: str = "") -> Iterator[Row]:
    """Yield a row per operator, GPU and relative, a row per GPU and relative for plans, and the totals of both."""
    found = list[Row]()
    for trial in measured.trials():
        row = operator_row(measured, trial)
        if only in str(row["name"]):
            found.append(row)
            yield row
    if found:
        yield total("all operators", found)
    found = []
    for gpu, relative in plan_trials(measured, quick=quick):
        name = f"plans: {gpu} from {relative}"
        if only in name:
            found.append(plans_row(name, measured, gpu, relative, quick=quick))
            yield found[-1]
    if found:
        yield total("all plans", found)


def operator_row(measured: Tables, trial: Trial) -> Row:
    """Return the row of one operator on one GPU."""
    mean_error = measured.mean_error(trial.op, without={trial.gpu})
    stated = measured.range_error(trial.op, without={trial.gpu})
    error = UNKNOWN_ERROR if mean_error is None else mean_error
    return {
        "name": f"{trial.op}: {trial.gpu} from {trial.relative}",
        "count": len(trial.ratios),
        "nine_in_ten": _nine_in_ten(trial.factors),
        "mean_error": error,
        "covered_by_mean": float((np.abs(trial.ratios - 1.0) <= min(error, MOST_ERROR)).mean()),
        "range": UNKNOWN_ERROR if stated is None else stated,
        # A range that is assumed is one of mean errors.
        "covered": float((np.abs(trial.ratios - 1.0) <= UNKNOWN_ERROR).mean())
        if stated is None
        else trial.covered(stated),
    }


def plan_trials(measured: Tables, *, quick: bool) -> Iterator[tuple[str, str]]:
    """Yield each GPU whose layers and attention were measured, with each architecture that can model its attention."""
    whole = [gpu for gpu in PARTNERS if all(gpu in measured.operators[op].points for op in COMPUTE)]
    for gpu in whole[: 1 if quick else None]:
        yield from ((gpu, relative) for relative in measured.relatives("decode_attention", gpu))


def plans_row(name: str, measured: Tables, gpu: str, relative: str, *, quick: bool) -> Row:
    """Return the row of the plans that are made with a modelled profile of ``gpu``."""
    kind, true = catalogue.find_gpu(gpu).gpu, shipped_profile(gpu)
    assert true is not None
    modelled = modelled_profile(kind, without(measured, kind, relative))
    ratios, reaches, covered, by_mean = [], list[float](), [], []
    for posed in _problems(gpu, modelled, quick=quick):
        budget = Budget(time_limit_s=LIMIT_S, clock=time.monotonic)
        plan = solve_placement(posed, gap_target=GAP, budget=budget)
        fixed = FixedPlan(plan, posed)
        if gpu not in fixed.gpus:
            continue  # the plan shows nothing about this GPU
        planned, rate = fixed.as_planned(posed.profiles).rate, fixed.as_planned({**posed.profiles, gpu: true}).rate
        stated = predicted(plan, posed)
        mean = predicted(plan, replace(posed, profiles={**posed.profiles, gpu: _by_mean(modelled)}))
        assert stated is not None
        assert mean is not None
        ratios.append(rate / planned)
        reaches.append(stated.rate.high / planned - 1.0)
        covered.append(_holds(stated, rate))
        by_mean.append(_holds(mean, rate))
    factors = np.maximum(ratios, 1.0 / np.array(ratios)) - 1.0
    return {
        "name": name,
        "count": len(ratios),
        "nine_in_ten": _nine_in_ten(factors),
        "mean_error": None,
        "covered_by_mean": float(np.mean(by_mean)),
        "range": float(np.median(reaches)),
        "covered": float(np.mean(covered)),
    }


def total(name: str, found: list[Row]) -> Row:
    """Return the mean over trials."""

    def mean(column: str) -> Cell:
        return float(np.mean([float(row[column] or 0.0) for row in found]))

    return {
        "name": name,
        "count": len(found),
        "nine_in_ten": None,
        "mean_error": None,
        "covered_by_mean": mean("covered_by_mean"),
        "range": None,
        "covered": mean("covered"),
    }


def _problems(gpu: str, modelled: Profile, *, quick: bool) -> Iterator[PlacementProblem]:
    """Yield models and lengths on eight of the GPU, and on four beside four that were measured."""
    partner = PARTNERS[gpu]
    profiles: Mapping[str, Profile | None] = {gpu: modelled, partner: shipped_profile(partner)}
    fleets = (fleet("alone", (1, 8, gpu)), fleet("mixed", (1, 4, gpu), (1, 4, partner)))
    for cluster in fleets[: 1 if quick else None]:
        for model in MODELS[: 1 if quick else None]:
            for lengths in LENGTHS[: 1 if quick else None]:
                posed = problem(cluster, model=model, workload=lengths, objective=NO_LIMITS)
                used = {name: profile for name in posed.profiles if (profile := profiles[name]) is not None}
                yield replace(posed, profiles=used)


def _by_mean(profile: Profile) -> Profile:
    """Return the profile with its mean errors alone, or `UNKNOWN_ERROR` with fewer than two relatives."""
    fits = []
    for fit in profile.fits:
        known = fit.provenance.held_out_mape
        error = UNKNOWN_ERROR if known is None else known
        fits.append(replace(fit, provenance=replace(fit.provenance, held_out_mape=error, range_error=None)))
    return replace(profile, fits=tuple(fits))


def _holds(stated: Predicted, rate: float) -> bool:
    return stated.rate.low * (1.0 - 1e-9) <= rate <= stated.rate.high * (1.0 + 1e-9)


def _nine_in_ten(factors: FloatArray) -> float:
    return float(np.quantile(factors, 0.9, method="higher"))


if __name__ == "__main__":
    main()
