"""`--max-num-seqs`, `--chunk-tokens` and `--kv-blocks`: the real command line, plans, simulations and exports."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hetis.formats.documents import load_plan
from hetis.formats.errors import DocumentError
from hetis.planner.cli.app import run
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.cli.parameters.values import MOST_SETTING as MOST_GIVEN
from hetis.planner.use_cases.saved_plans import load_plan_and_problem, problem_of_plan
from hetis.planner.use_cases.simulation.engine_settings import at_settings
from hetis.simulator.simulate import simulate
from hetis.solver.check import check_plan
from hetis.solver.engine_rules import MOST_SETTING, EngineRules, EngineSettings
from hetis.solver.errors import InvalidProblemError
from hetis.solver.placement.families import run_by
from hetis.solver.plan import Role
from tests.fleets import fleet
from tests.planner.command_line import invoke
from tests.simulator.replica.test_lockstep import problem_of, sharing
from tests.simulator.small_plans import equal_requests, pipeline, plan_of, small_problem

CLUSTER = fleet("small", "a100: 2 A100-PCIe-80GB")
INPUTS = ("-c", "small.yaml", "-m", "Meta-Llama-3-8B", "-w", "1024/256")
FAST = ("--no-verify", "-q", "-o", "json")
KEPT = {"max_num_seqs": 24, "chunk_tokens": [384], "kv_blocks": 2000}
GIVEN = ("--max-num-seqs", "24", "--chunk-tokens", "384", "--kv-blocks", "2000")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the best plan of unified replicas for vLLM, one at fixed settings, and one with roles apart."""
    folder = tmp_path_factory.mktemp("settings")
    (folder / "small.yaml").write_text(CLUSTER)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, options in (
            ("free.json", ("--roles", "unified")),
            ("kept.json", GIVEN),
            ("apart.json", ("--roles", "prefill,decode")),
        ):
            placed = invoke("place", *INPUTS, *FAST, "--engine", "vllm", *options, "--out", name)
            assert placed.exit_code == 0, placed.output
    return folder


@pytest.fixture(autouse=True)
def in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def document(*arguments: str) -> dict[str, Any]:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(arguments) == ExitCode.INVALID
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return " ".join(err.replace("│", " ").split())


# --- plans


def test_a_plan_keeps_to_the_settings_and_says_so() -> None:
    found = load_plan_and_problem("kept.json")
    assert found.plan.inputs["engine_settings"] == KEPT
    assert check_plan(found.plan, found.problem) == ()
    text = "at most 24 requests at once, chunks of 384 tokens, at most 2000 KV blocks"
    assert found.plan.family.endswith(f"; engines started with {text}")
    for replica in found.plan.replicas:
        assert replica.micro_batch * replica.in_flight <= 24
        assert replica.chunk_tokens == 384
        assert replica.kv_tokens <= 2000 * 16
    assert run(["check", "kept.json", "-q"]) == ExitCode.OK
    shown = " ".join(invoke("place", *INPUTS, *GIVEN, "--engine", "vllm", *FAST[:2]).output.split())
    assert f"Settings engines started with {text}" in shown


def test_a_plan_without_settings_names_none_and_is_refused_at_them() -> None:
    free, kept = load_plan_and_problem("free.json"), load_plan_and_problem("kept.json")
    assert "engine_settings" not in free.plan.inputs
    assert "engines started" not in free.plan.family
    assert kept.plan.result.value < free.plan.result.value
    broken = {violation.rule.name for violation in check_plan(free.plan, kept.problem)}
    assert {"MAX_NUM_SEQS", "SETTING", "FAMILY"} <= broken


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs is 0, must be 1 to 1000000000"),
        ({"seats": 4}, "unexpected keyword argument 'seats'"),
        ({"kv_blocks": "9"}, "has a value that is not a whole number"),
        ({"chunk_tokens": 64}, "has a value that is not a whole number"),
        ([1], "is a list, must have names and numbers"),
    ],
)
def test_settings_of_a_plan_file_that_cannot_be_are_one_error(data: object, message: str) -> None:
    plan = load_plan("kept.json")
    with pytest.raises(DocumentError) as refused:
        problem_of_plan(replace(plan, inputs={**plan.inputs, "engine_settings": data}), "kept.json")
    assert len(refused.value.problems) == 1
    start = "kept.json: inputs.engine_settings must be engine settings: "
    assert start in str(refused.value.problems[0])
    assert message in str(refused.value.problems[0])


def test_what_is_no_setting_is_one_error(capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        (("--max-num-seqs", "0"), "Invalid value for '--max-num-seqs'"),
        (("--chunk-tokens", "512,x"), "'x' is not a whole number of tokens, 1 to 1000000000"),
        (("--chunk-tokens", "-5"), "'-5' is not a whole number of tokens, 1 to 1000000000"),
        (("--chunk-tokens", ",".join(map(str, range(1, 18)))), "17 sizes are given, at most 16 are allowed"),
        (("--kv-blocks", "many"), "Invalid value for '--kv-blocks'"),
    ):
        for verb in (("place", *INPUTS), ("compare", *INPUTS)):
            assert message in refusal(capsys, *verb, *options)
    assert "Invalid value for '--chunk-tokens'" in refusal(capsys, "simulate", "free.json", "--chunk-tokens", "1,2")


def test_plans_that_are_compared_keep_to_the_settings() -> None:
    Path("compared").mkdir()
    found = document(
        "compare", *INPUTS, *GIVEN, "--strategies", "hetis,uniform", "--engine", "vllm,sglang", "--no-verify", "-q",
        "-o", "json", "--out", "compared",
    )  # fmt: skip
    assert all(row["status"] != "failed" for row in found["strategies"])
    plans = sorted(Path("compared").glob("*.json"))
    assert len(plans) == 4
    for path in plans:
        one = load_plan_and_problem(str(path))
        assert one.plan.inputs["engine_settings"] == KEPT
        assert check_plan(one.plan, one.problem) == ()


def test_a_plan_that_is_made_again_keeps_to_them() -> None:
    document("replan", "--from", "kept.json", "-c", "small.yaml", "-q", "-o", "json", "--out", "next.json")
    found = load_plan_and_problem("next.json")
    assert found.plan.inputs["engine_settings"] == KEPT
    assert check_plan(found.plan, found.problem) == ()


def test_a_change_of_the_fleet_is_planned_at_them() -> None:
    asked = ("what-if", *INPUTS, "--add", "1xL4", "-q", "-o", "json")
    free, kept = document(*asked), document(*asked, *GIVEN)
    assert kept["before"]["result"]["value"] < free["before"]["result"]["value"]


# --- simulations


def simulated(plan: str, *options: str) -> dict[str, Any]:
    return document("simulate", plan, "--threads", "1", "--saturate", "--requests", "600", *options, "-o", "json")


def test_a_plan_is_simulated_with_engines_started_otherwise() -> None:
    free = simulated("free.json")
    assert "engine_settings" not in free
    (replica,) = {(one.micro_batch * one.in_flight, one.chunk_tokens) for one in load_plan("free.json").replicas}
    found = simulated("free.json", "--max-num-seqs", "8", "--chunk-tokens", "128")
    assert found["engine_settings"] == {
        "max_num_seqs": 8,
        "chunk_tokens": [128],
        "changes": [f"8 requests at once (planned: {replica[0]})", f"chunks of 128 tokens (planned: {replica[1]})"],
    }
    assert found["throughput_rps"] < 0.5 * free["throughput_rps"]
    # The prediction is the cost model's for these settings.
    assert found["planned"]["rate_rps"] < 0.5 * free["planned"]["rate_rps"]
    assert found["ratios"]["throughput"] == pytest.approx(1.0, abs=0.25)
    shown = " ".join(invoke("simulate", "free.json", "--requests", "50", "--max-num-seqs", "8").output.split())
    assert f"Engines started with at most 8 requests at once: 8 requests at once (planned: {replica[0]})" in shown


def test_blocks_of_a_simulation_hold_what_they_hold() -> None:
    (room,) = {one.kv_tokens for one in load_plan("free.json").replicas}
    free, few = simulated("free.json"), simulated("free.json", "--kv-blocks", "300")
    assert few["throughput_rps"] < 0.5 * free["throughput_rps"]
    assert few["engine_settings"]["changes"] == [f"room for KV of {300 * 16} tokens (planned: {room})"]
    many = simulated("free.json", "--kv-blocks", "100000000")
    assert many["throughput_rps"] == free["throughput_rps"]
    assert many["planned"]["rate_rps"] == pytest.approx(free["planned"]["rate_rps"])


def test_the_planned_settings_change_nothing_that_is_planned() -> None:
    found = load_plan_and_problem("apart.json")
    loose = at_settings(found.plan, found.problem, EngineSettings(kv_blocks=10**9))
    for one, other in zip(found.plan.replicas, loose.plan.replicas, strict=True):
        assert other.rate == pytest.approx(one.rate)
        assert other.ttft_s == pytest.approx(one.ttft_s)
        assert other.tpot_s == pytest.approx(one.tpot_s)
        assert abs(other.kv_tokens - one.kv_tokens) <= 1
    for route, same in zip(found.plan.kv_routes, loose.plan.kv_routes, strict=True):
        assert same.rate == pytest.approx(route.rate)


def test_settings_of_copies_that_share_experts_are_those_of_each() -> None:
    problem = problem_of()
    plan = plan_of(sharing(problem, copies=4, micro_batch=4))
    same = at_settings(plan, problem, EngineSettings(max_num_seqs=4))
    assert same.changes == ("4 requests at once (planned: 4)",)
    assert (same.plan.replicas[0].micro_batch, same.plan.replicas[0].in_flight) == (4, 4)
    half = at_settings(plan, problem, EngineSettings(max_num_seqs=2))
    assert (half.plan.replicas[0].micro_batch, half.plan.replicas[0].in_flight) == (2, 4)
    assert half.changes == ("2 requests at once (planned: 4)",)


def test_a_pipeline_of_an_engine_may_run_fewer_requests_than_it_has_stages() -> None:
    problem = small_problem()
    problem = replace(problem, family=run_by(problem.family, EngineRules(name="vllm", min_layers=1)))
    plan = plan_of(pipeline(problem, 2, 2, 2, in_flight=3))
    served_rps = []
    for most in (1, 2, 3, 6):
        few = at_settings(plan, problem, EngineSettings(max_num_seqs=most))
        run = simulate(few.plan, few.problem, equal_requests(20, prompt=9, output=9))
        assert not np.isnan(run.finished_s).any()
        served_rps.append(20 / run.end_s)
    assert served_rps == sorted(set(served_rps))
    with pytest.raises(InvalidProblemError, match="has 2 micro-batches in flight, must have one for each of its 3"):
        simulate(plan_of(pipeline(problem, 2, 2, 2, in_flight=2)), problem, equal_requests(1, prompt=9, output=9))


def test_blocks_without_room_for_a_mean_request_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, "simulate", "free.json", "--kv-blocks", "79", "--requests", "10")
    assert "KV has room for 1264 tokens, not for a single mean request of 1280 tokens" in said
    assert simulated("free.json", "--kv-blocks", "81")["planned"]["rate_rps"] > 0


def test_prefill_and_decode_replicas_are_started_with_them_too() -> None:
    found = load_plan_and_problem("apart.json")
    few = at_settings(found.plan, found.problem, EngineSettings(max_num_seqs=5, chunk_tokens=(128,)))
    for one in few.plan.replicas:
        assert max(1, one.micro_batch) * one.in_flight <= 5
        assert one.chunk_tokens == (0 if one.role is Role.DECODE else 128)
    for number, one in enumerate(few.plan.replicas):
        routed = sum(route.rate for route in few.plan.kv_routes if number in (route.prefill, route.decode))
        assert routed <= one.rate * (1 + 1e-9)
    assert sum(route.rate for route in few.plan.kv_routes) < sum(route.rate for route in found.plan.kv_routes)
    assert simulated("apart.json", "--max-num-seqs", "5")["summary"]["counts"]["finished"] == 600


def test_a_plan_at_settings_is_simulated_at_them() -> None:
    found = load_plan_and_problem("kept.json")
    assert found.problem.family.engine_settings == EngineSettings(max_num_seqs=24, chunk_tokens=(384,), kv_blocks=2000)
    other = at_settings(found.plan, found.problem, EngineSettings(kv_blocks=500))
    assert other.problem.family.engine_settings == replace(found.problem.family.engine_settings, kv_blocks=500)
    with pytest.raises(InvalidProblemError, match="chunk_tokens has 2 sizes, an engine accepts only one"):
        at_settings(found.plan, found.problem, EngineSettings(chunk_tokens=(1, 2)))
    lost = replace(found.plan, replicas=(replace(found.plan.replicas[0], in_flight=0),))
    with pytest.raises(InvalidProblemError, match="plan cannot be simulated: replica 0"):
        at_settings(lost, found.problem, EngineSettings(kv_blocks=5))


def test_the_command_line_has_the_solvers_limit() -> None:
    assert MOST_GIVEN == MOST_SETTING
