"""The range of a plan by its profiles' errors, and notes on where these profiles are from."""

from __future__ import annotations

import json

import pytest

from hetis.formats.documents import to_data
from hetis.planner.use_cases.place import make_plan
from hetis.planner.use_cases.placement_settings import PlacementSettings
from hetis.planner.use_cases.record.parts import ProfileErrors
from hetis.planner.use_cases.request import objective
from hetis.planner.use_cases.robustness.profile_errors import (
    predicted,
    profile_notes,
    with_profile_errors,
)
from hetis.planner.use_cases.sources import load_inputs
from hetis.profiler.defaults import MODELLED, default_profile
from hetis.profiler.engines import for_engine
from hetis.profiler.ranges import ENGINE_ERROR, MOST_ERROR, UNKNOWN_ERROR
from hetis.profiler.roofline import modelled_profile
from hetis.solver.budget import Budget, silent
from hetis.solver.check import check_plan
from hetis.solver.engine_rules import EngineRules
from hetis.solver.plan import ObjectiveKind
from hetis.solver.problem import PlacementProblem
from hetis.solver.profile import Op, Source
from tests.models import replace
from tests.planner.command_line import EXAMPLES
from tests.planner.use_cases.robustness.studied import FLEETS, planned, posed

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
