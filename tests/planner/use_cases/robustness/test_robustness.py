"""Plans under other coefficients: rates and latencies change as they must, and the same seed gives the same results."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest

from hetis.formats.documents import load_plan, to_data
from hetis.planner.cli.app import run
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.use_cases.place import make_plan
from hetis.planner.use_cases.placement_settings import PlacementSettings
from hetis.planner.use_cases.record.parts import ProfileErrors
from hetis.planner.use_cases.request import objective
from hetis.planner.use_cases.robustness import study as robustness
from hetis.planner.use_cases.robustness.fixed_plan import FixedPlan, Performance, Profiles, structure_of
from hetis.planner.use_cases.robustness.profile_errors import (
    corners,
    perturbed,
    predicted,
    profile_notes,
    with_profile_errors,
)
from hetis.planner.use_cases.robustness.study import (
    Alternative,
    Robustness,
    default_search,
    regret,
    smaller_families,
    study,
)
from hetis.planner.use_cases.sources import load_inputs
from hetis.profiler.defaults import MODELLED, default_profile
from hetis.profiler.engines import for_engine
from hetis.profiler.ranges import ENGINE_ERROR, MOST_ERROR, UNKNOWN_ERROR
from hetis.profiler.roofline import modelled_profile
from hetis.solver.budget import Budget, Progress, silent
from hetis.solver.check import check_plan
from hetis.solver.plan import Objective, ObjectiveKind, Plan
from hetis.solver.planning import solve_placement
from hetis.solver.problem import EngineRules, PlacementProblem
from hetis.solver.profile import Op, Source
from tests.models import replace
from tests.planner.command_line import EXAMPLES
from tests.planner.use_cases.robustness.studied import FLEETS, never, planned, posed


def studied(fleet: str, error: float, *, seed: int = 0, samples: int = 12) -> Robustness:
    """Return the study without searches, which other tests cover."""
    return study(planned(fleet), posed(fleet), error=error, seed=seed, samples=samples, searches=0, search=never)


# --- pricing


# --- perturbing


def test_every_coefficient_stays_within_the_error() -> None:
    problem = posed("paper")
    new = perturbed(problem.profiles, 0.2, np.random.default_rng(3))
    ratios = [
        getattr(changed, name) / getattr(old, name)
        for gpu, profile in problem.profiles.items()
        for fit, other in zip(profile.fits, new[gpu].fits, strict=True)
        for old, changed in zip(fit.pieces, other.pieces, strict=True)
        for name in ("fixed_s", "flop_s", "byte_s", "token_s", "head_s", "wire")
        if getattr(old, name) > 0
    ]
    assert 0.8 <= min(ratios) < 0.85
    assert 1.15 < max(ratios) <= 1.2
    assert len(set(ratios)) == len(ratios), "each has a factor of its own"


def test_corner_cases_name_every_gpu_type_and_operator_both_ways() -> None:
    problem = posed("h100-p100")
    names = [corner.name for corner in corners(problem.profiles, 0.2, gpus=list(problem.profiles))]
    known = {fit.op for profile in problem.profiles.values() for fit in profile.fits}
    assert len(names) == len(set(names)) == 2 * (1 + 2 + len(known))
    assert {"everything slower", "P100-PCIe-12GB faster", "dense slower"} <= set(names)


# --- the study


@pytest.mark.parametrize("fleet", FLEETS)
def test_no_error_gives_no_spread(fleet: str) -> None:
    found = studied(fleet, 0.0)
    for spread in (found.rate, found.ttft_s, found.tpot_s, found.rate_within):
        values = [spread.p5, spread.median, spread.p95, spread.worst]
        assert values == pytest.approx([spread.planned] * 4, rel=1e-12)
    assert found.missed == 0.0
    assert not any(corner.misses for corner in found.corners)


@pytest.mark.parametrize("fleet", FLEETS)
def test_the_spread_grows_with_the_error(fleet: str) -> None:
    spreads = [studied(fleet, error) for error in (0.05, 0.2, 0.5)]
    for spread in ("rate", "ttft_s", "tpot_s"):
        widths = [getattr(found, spread).p95 - getattr(found, spread).p5 for found in spreads]
        assert widths == sorted(widths)
        assert widths[0] > 0
    assert [found.rate.worst for found in spreads] == sorted((f.rate.worst for f in spreads), reverse=True)


def test_everything_slower_is_the_worst_there_is() -> None:
    """Times only grow with coefficients: no sample is worse than all coefficients at their bounds."""
    found = studied("paper", 0.2, samples=40)
    worst = next(corner for corner in found.corners if corner.name == "everything slower")
    assert found.rate.worst == worst.rate
    assert found.tpot_s.worst == worst.tpot_s


def test_the_same_seed_says_the_same_and_another_does_not() -> None:
    found = studied("paper", 0.2, seed=5, samples=4)
    assert found == studied("paper", 0.2, seed=5, samples=4)
    assert found.rate != studied("paper", 0.2, seed=6, samples=4).rate


def test_a_spent_budget_ends_the_study_with_what_there_is() -> None:
    budget = Budget()
    budget.cancelled.set()
    found = study(planned("paper"), posed("paper"), error=0.2, budget=budget, search=never)
    assert found.samples == 1
    assert not found.complete
    assert found.regret is None


def test_perturbed_profiles_are_counted_and_ctrl_c_between_them_keeps_what_there_is() -> None:
    budget, told = Budget(), list[str]()

    def report(progress: Progress) -> None:
        told.append(progress.phase)
        if len(told) == 3:
            budget.cancelled.set()

    found = study(planned("paper"), posed("paper"), error=0.2, samples=20, budget=budget, search=never, report=report)
    assert told == [f"plan under perturbed profile {number} of 20" for number in (1, 2, 3)]
    assert (found.samples, found.complete) == (3, False)


def test_ctrl_c_during_the_searches_ends_the_study_at_once_with_what_they_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    budget, told, priced = Budget(), list[str](), list[Performance]()
    within_limits = FixedPlan.within_limits

    def counted(self: FixedPlan, profiles: Profiles) -> Performance:
        if budget.cancelled.is_set():
            priced.append(within_limits(self, profiles))
        return within_limits(self, profiles)

    def search(problem: PlacementProblem, strategy: str, given: Budget) -> Plan:
        searched = default_search(0)(problem, strategy, given)
        if "search 6 of" in told[-1]:  # three in smaller families, two under perturbed profiles, and this one
            budget.cancelled.set()
        return searched

    monkeypatch.setattr(FixedPlan, "within_limits", counted)
    found = study(
        planned("h100-p100"), posed("h100-p100"), error=0.2, samples=20, searches=8, budget=budget, search=search,
        report=lambda progress: told.append(progress.phase),
    )  # fmt: skip
    assert 1 <= found.regret.searches < 8
    assert found.runner_up is None
    assert not found.complete
    assert len(priced) == 1  # the plan itself, under the unchanged profiles


def test_a_runner_up_has_other_replicas_and_is_no_better() -> None:
    found = study(planned("h100-p100"), posed("h100-p100"), error=0.2, samples=20, searches=2)
    assert found.runner_up.replicas != structure_of(planned("h100-p100"))
    assert found.runner_up.rate <= planned("h100-p100").result.value * (1 + 1e-6)
    assert found.regret.searches == 2
    assert 0 <= found.regret.mean <= found.regret.worst <= found.regret.bound < 1


def test_smaller_families_lack_what_the_plan_has() -> None:
    plan, problem = planned("h100-p100"), posed("h100-p100")
    assert any(replica.attention_workers for replica in plan.replicas)
    families = list(smaller_families(plan, problem.family))
    assert families[0][0].max_pool == 0
    assert families[1][1] == "uniform"
    used = {stage.tp for replica in plan.replicas for stage in replica.stages}
    assert [set(problem.family.tp_sizes) - set(f.tp_sizes) for f, _ in families[2:]] == [{tp} for tp in sorted(used)]


@pytest.mark.parametrize("fleet", FLEETS)
def test_a_plan_with_the_same_replicas_is_as_good_whatever_profiles_it_was_made_with(fleet: str) -> None:
    problem, plan = posed(fleet), planned(fleet)
    wrong = perturbed(problem.profiles, 0.2, np.random.default_rng(2))
    claims_less = replace(plan, replicas=tuple(replace(r, rate=0.8 * r.rate) for r in plan.replicas))
    own, other = FixedPlan(plan, problem), FixedPlan(claims_less, problem, made_with=wrong)
    assert other.structure == own.structure
    assert other.within_limits(problem.profiles) == own.within_limits(problem.profiles)
    assert other.as_planned(problem.profiles) == own.as_planned(problem.profiles)


def test_regret_is_nothing_where_the_search_finds_the_same_plan() -> None:
    problem, plan = posed("paper"), planned("paper")
    fixed = FixedPlan(plan, problem)
    again = Alternative(profiles=problem.profiles, plan=plan, fixed=fixed)
    found = regret([again], fixed, threading.Event())
    assert found.other_replicas == 0
    assert found.worst == pytest.approx(0.0, abs=1e-6)


def test_objectives_that_fix_the_demand_say_how_often_it_is_missed() -> None:
    problem = posed("h100-p100")
    cheap = replace(problem, objective=Objective(kind=ObjectiveKind.GPUS, demand_rps=3.0))
    plan = solve_placement(cheap)
    found = study(plan, cheap, error=0.2, samples=50, search=never)
    assert found.short is not None
    assert 0 < found.short < 1
    assert found.regret is None
    assert found.runner_up is None


# --- predicted ranges


def with_errors(problem: PlacementProblem, error: float | None) -> PlacementProblem:
    profiles = {
        gpu: replace(
            profile,
            fits=tuple(
                replace(fit, provenance=replace(fit.provenance, held_out_mape=error, range_error=None))
                for fit in profile.fits
            ),
        )
        for gpu, profile in problem.profiles.items()
    }
    return replace(problem, profiles=profiles)


@pytest.mark.parametrize("fleet", FLEETS)
def test_the_range_holds_the_plan_and_grows_with_the_errors(fleet: str) -> None:
    plan, widths = planned(fleet), []
    for error in (0.0, 0.1, 0.3, 0.946):
        found = predicted(plan, with_errors(posed(fleet), error))
        assert found.rate.low <= plan.result.value * (1 + 1e-9)
        assert found.rate.high >= plan.result.value * (1 - 1e-9)
        counted = min(max(error, ENGINE_ERROR), MOST_ERROR)
        slowest = 1 - counted  # measured = predicted / (1 - e) where predictions are too fast
        assert found.rate.low >= plan.result.value * slowest * (1 - 1e-9), "no error counts for more than itself"
        assert found.tpot_s.low <= found.tpot_s.high
        widths.append(found.rate.high - found.rate.low)
    assert widths == sorted(widths)
    assert widths[0] == pytest.approx(widths[1]), "errors below an engine's own count as that"
    assert widths[0] > 0.0


def test_the_range_of_modelled_gpus_is_the_factor_that_they_state() -> None:
    plan, problem = planned("paper"), posed("paper")
    found = predicted(plan, problem)
    stated = {op: error for errors in found.errors.values() for op, error in errors.items()}
    worst = max(error for op, error in stated.items() if op != "step")
    assert stated["dense"] == 0.6
    assert plan.result.value / (1 + worst) <= found.rate.low < plan.result.value
    assert plan.result.value < found.rate.high <= plan.result.value * (1 + worst)


def test_operators_that_state_no_error_get_the_one_of_what_nobody_measured() -> None:
    found = predicted(planned("paper"), posed("paper"))
    assert found.errors["A100-PCIe-80GB"]["step"] == UNKNOWN_ERROR
    assert found.assumed == ("A100-PCIe-80GB transfer", "A100-PCIe-80GB step")


def test_profiles_without_errors_give_no_range() -> None:
    assert predicted(planned("paper"), with_errors(posed("paper"), None)) is None
    plan = with_profile_errors(planned("paper"), with_errors(posed("paper"), None))
    assert "profile_errors" not in plan.inputs
    assert ProfileErrors.of(plan).errors.predicted is None


def test_what_is_written_into_a_plan_is_read_again() -> None:
    plan = with_profile_errors(planned("paper"), posed("paper"))
    assert ProfileErrors.of(plan).errors.predicted == predicted(planned("paper"), posed("paper"))
    for strange in ({}, {"predicted": 3}, {"predicted": {"rate": {"low": "a"}}}, 7):
        assert ProfileErrors.of(replace(plan, inputs={"profile_errors": strange})).errors.predicted is None


# --- regions and origins


def test_notes_name_the_origin_of_profiles() -> None:
    problem = posed("h100-p100")
    assert profile_notes(problem)[0].startswith("modelled, not measured: the profiles of H100-SXM-80GB, P100-PCIe-12GB")
    h100 = problem.profiles["H100-SXM-80GB"]
    fitted = replace(
        h100,
        fits=tuple(
            replace(fit, provenance=replace(fit.provenance, source=Source.FITTED)) if fit.op is not Op.STEP else fit
            for fit in h100.fits
        ),
    )
    notes = profile_notes(replace(problem, profiles={**problem.profiles, "H100-SXM-80GB": fitted}))
    assert notes[0].startswith("modelled, not measured: the profiles of P100-PCIe-12GB;")
    assert notes[1] == "fitted to measurements: the profiles of H100-SXM-80GB; modelled: step"
    reduced = replace(
        h100,
        fits=tuple(
            replace(fit, provenance=replace(fit.provenance, source=Source.FITTED)) if fit.op is Op.ALL_REDUCE else fit
            for fit in h100.fits
        ),
    )
    (note,) = profile_notes(replace(problem, profiles={**problem.profiles, "H100-SXM-80GB": reduced}))
    assert note.endswith("(--profile FILE); all_reduce of H100-SXM-80GB fitted")


def test_a_card_that_only_shares_a_name_with_the_catalogue_is_modelled() -> None:
    for gpu in posed("h100-p100").cluster.gpu_types.values():
        smaller = replace(gpu, memory_bytes=gpu.memory_bytes // 2)
        assert default_profile(smaller) == (MODELLED, for_engine(modelled_profile(smaller), smaller, "vllm"))


# --- the command


def test_a_plan_carries_its_range_and_still_passes_its_checks() -> None:
    loaded = load_inputs(cluster=str(EXAMPLES / "h100-p100.yaml"), model="Llama-2-70B", workload="azure_conv_2023")
    goal = objective(ObjectiveKind.GOODPUT, ttft_s=None, tpot_s=None, demand_rps=None)
    settings = PlacementSettings(engine=EngineRules(name="vllm-hetis"))
    problem = loaded.inputs.problem(goal, "hetis", engine=settings.engine)
    made = make_plan(loaded, problem, settings, budget=Budget(), report=silent)
    plan, problem = made.plan, made.problem
    assert ProfileErrors.of(plan).errors.predicted is not None
    assert not check_plan(plan, problem)
    assert json.loads(json.dumps(to_data(plan), allow_nan=False)) == to_data(plan)


def test_place_prints_and_saves_the_study(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(robustness, "SEARCHES", 1)  # instead of 12 searches, which take half a minute
    defaults = robustness.study.__kwdefaults__
    assert defaults["samples"] == 200
    monkeypatch.setitem(defaults, "samples", 5)  # the default number takes six seconds
    path = tmp_path / "plan.json"
    arguments = ["place", "-c", str(EXAMPLES / "h100-p100.yaml"), "-m", "Llama-2-70B", "-w", "azure_conv_2023"]
    assert run([*arguments, "--profile-error", "20%", "--no-verify", "--out", str(path)]) == ExitCode.OK
    printed = capsys.readouterr().out
    for part in ("by the profiles' errors", "off by up to 20%", "within limits", "Runner-up", "Regret", "slower"):
        assert part in " ".join(printed.split())
    assert max(map(len, printed.splitlines())) <= 80
    saved = load_plan(path).inputs["profile_errors"]["robustness"]
    assert saved["samples"] == 5
    assert saved["error"] == 0.2


@pytest.mark.parametrize("text", ["100%", "-1%", "2", "much"])
def test_an_error_out_of_range_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["place", "-c", str(EXAMPLES / "paper.yaml"), "-m", "Llama-2-70B", "-w", "1024/256"]
    assert run([*arguments, "--profile-error", text]) == ExitCode.INVALID
    assert "--profile-error" in capsys.readouterr().err
