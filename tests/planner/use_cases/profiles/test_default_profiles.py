"""Default profiles have the host times of vLLM, for every engine; profiles from files stay unchanged."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from hetis.formats import catalogue
from hetis.planner.use_cases.request import objective
from hetis.planner.use_cases.sources import LoadedInputs, engine_rules, load_inputs
from hetis.profiler.cli.app import run as profile_run
from hetis.profiler.defaults import FITTED, MODELLED, default_profile, profile_text
from hetis.profiler.engines import ENGINES
from hetis.profiler.ranges import ENGINE_ERROR, range_factors
from hetis.profiler.roofline import modelled_profile
from hetis.solver.plan import ObjectiveKind
from hetis.solver.planning import solve_placement
from hetis.solver.profile import Fit, Op, Piece, Provenance, Source

SMALL = "Qwen/Qwen3-0.6B"  # a model with iterations so short that the host's time shows

SILICON = Path(__file__).parents[4] / "docs" / "data" / "silicon.csv"


def inputs(*profiles: str) -> LoadedInputs:
    return load_inputs(cluster="examples/h100-p100.yaml", model=SMALL, workload="512/128", profiles=profiles)


@pytest.fixture(scope="module")
def a_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("profiles") / "p100.json"
    path.write_text(profile_text(modelled_profile(inputs().inputs.cluster.gpu_types["P100-PCIe-12GB"])))
    return str(path)


def host_s(loaded: LoadedInputs, gpu: str, tokens: float) -> float:
    """Return the host's seconds of an iteration with this many tokens."""
    fits = (loaded.inputs.profiles[gpu].fit(op, loaded.inputs.model, 1) for op in (Op.STEP, Op.SAMPLE))
    return sum(fit.seconds(tokens=tokens) for fit in fits if fit is not None)


def test_default_profiles_have_the_times_of_vllm() -> None:
    loaded, host = inputs(), ENGINES["vllm"]
    for gpu in loaded.inputs.profiles:
        assert host_s(loaded, gpu, 64) == pytest.approx(host.step_s + 64 * host.sequence_s)
    assert loaded.notes == ()


def test_a_profile_of_a_file_is_taken_as_it_is_and_a_note_says_what_it_lacks(a_file: str) -> None:
    loaded = inputs(a_file)
    assert host_s(loaded, "P100-PCIe-12GB", 64) < ENGINES["vllm"].step_s < host_s(loaded, "H100-SXM-80GB", 64)
    (note,) = loaded.notes
    assert "P100-PCIe-12GB has no host time of an engine" in note


def test_a_modelled_profile_of_a_file_is_the_default_one(tmp_path: Path) -> None:
    """`hetis-profile model` writes what plans use, so no note misses the host in it."""
    path = tmp_path / "p100.json"
    assert profile_run(["model", "P100-PCIe-12GB", "--out", str(path), "-q"]) == 0
    loaded = inputs(str(path))
    assert loaded.notes == ()
    assert loaded.inputs.profiles == inputs().inputs.profiles


def test_a_plan_promises_less_where_the_host_takes_time(a_file: str) -> None:
    """The P100 alone: with its default profile, and with one of kernels alone."""
    goal = objective(ObjectiveKind.GOODPUT, ttft_s=float("inf"), tpot_s=0.1, demand_rps=None)
    engine = engine_rules("vllm", "hetis")
    values = [
        solve_placement(loaded.inputs.problem(goal, "hetis", engine=engine), strategy="hetis").result.value
        for loaded in (inputs(), inputs(a_file))
    ]
    assert values[0] < 0.995 * values[1]


def test_a_type_under_a_catalogue_name_with_other_peaks_has_the_errors_of_a_card_that_nobody_measured() -> None:
    """With less memory alone, its kernels take the same times."""
    listed = catalogue.find_gpu("H100-SXM-80GB").gpu
    smaller, slower = replace(listed, memory_bytes=40 << 30), replace(listed, mem_bytes_per_s=1e12)
    assert default_profile(listed)[0] == FITTED
    for gpu, is_measured in ((smaller, True), (slower, False)):
        origin, profile = default_profile(gpu)
        assert (origin, profile.gpu) == (MODELLED, "H100-SXM-80GB")
        decode = next(fit for fit in profile.fits if fit.op is Op.DECODE_ATTENTION)
        assert (decode.provenance.range_error is None) is is_measured


def test_the_least_range_is_what_nine_in_ten_points_of_measured_engines_keep() -> None:
    with open(SILICON, encoding="utf-8", newline="") as file:
        [whole] = [row for row in csv.DictReader(file) if (row["gpu"], row["kind"]) == ("all", "dense")]
    assert pytest.approx(float(whole["tpot p90"].rstrip("%")) / 100, abs=0.01) == ENGINE_ERROR
    provenance = Provenance(source=Source.FITTED, origin="a table", held_out_mape=0.02)
    fit = Fit(op=Op.DENSE, pieces=(Piece(fixed_s=1.0),), provenance=provenance)
    assert range_factors(fit) == pytest.approx((1 / 1.14, 1 / 0.86))
    rough = replace(fit, provenance=replace(fit.provenance, held_out_mape=0.3))
    assert range_factors(rough) == pytest.approx((1 / 1.3, 1 / 0.7))
