"""`dispatch` and `redispatch` from the command line: their output, files and results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from hetis.formats.documents import dump, load_state
from hetis.planner.cli.app import run
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.use_cases.dispatch.answers import dispatch_requests, redispatch_stage
from hetis.planner.use_cases.dispatch.stages import GIVEN, load_new_requests, load_stage, load_stage_of_plan, times_of
from hetis.profiler.roofline import modelled_profile
from hetis.solver.dispatch.dispatch_problem import DispatchProblem
from hetis.solver.dispatch.dispatcher import solve_dispatch
from tests.planner.command_line import EXAMPLES, invoke

STAGES = EXAMPLES / "dispatch"
A100_L4, DRIFTED, DRAINING = (str(STAGES / f"{name}.yaml") for name in ("a100-l4", "drifted", "draining"))
REQUESTS = str(STAGES / "requests.yaml")
BAD_INPUT = sorted(path for path in (Path(__file__).parents[2] / "bad_input").iterdir() if path.suffix != ".expected")
# Other kinds of files are refused in the same way: every fifth of those is enough.
BAD_FILES = [path for i, path in enumerate(BAD_INPUT) if path.name.startswith("state_") or i % 5 == 0]


def answer(*arguments: str) -> tuple[int, dict[str, Any]]:
    """Return exit code and the JSON document on stdout."""
    result = invoke(*arguments, "-o", "json")
    return result.exit_code, json.loads(result.stdout)


def changed(path: str, tmp_path: Path, **changes: Any) -> str:
    """Write a copy of a state file with changed devices."""
    data = yaml.safe_load(Path(path).read_text())
    for device in data["devices"]:
        device.update(changes.get(device["name"].replace("-", "_"), {}))
    (tmp_path / "state.yaml").write_text(yaml.safe_dump(data))
    return str(tmp_path / "state.yaml")


# --- dispatch


def test_the_numbers_are_those_of_the_solver() -> None:
    _, document = answer("dispatch", "--state", A100_L4, "--requests", REQUESTS)
    stage = load_stage(A100_L4)
    requests = load_new_requests(stage, file=REQUESTS, words=()).to_solver()
    problem = DispatchProblem(stage=stage.snapshot.stage, load=stage.snapshot.load(), requests=requests)
    plan = solve_dispatch(problem)
    result = document["result"]
    assert (result["makespan_s"], result["bound_s"]) == (plan.makespan_s, plan.bound_s)
    assert result["path"] == plan.path.value
    assert result["gap"] == pytest.approx(plan.gap)
    assert max(device["after_s"] for device in document["devices"]) == pytest.approx(plan.makespan_s)
    assert [device["block_price_s"] for device in document["devices"]] == plan.prices.block_s.tolist()


def test_times_of_devices_agree_with_the_makespan_of_the_plan() -> None:
    stage = load_stage(A100_L4)
    found = dispatch_requests(stage, load_new_requests(stage, file=REQUESTS, words=["9000/100"]))
    assert found.after.makespan_s == pytest.approx(found.plan.makespan_s, rel=1e-12)
    assert times_of(found.reached) == found.after
    moved = redispatch_stage(stage)
    assert moved.before.makespan_s == pytest.approx(moved.plan.makespan_before_s, rel=1e-12)
    assert moved.after.makespan_s == pytest.approx(moved.plan.makespan_after_s, rel=1e-12)


def test_costs_are_fitted_where_a_profile_is_shipped_else_the_roofline_and_reports_say_which() -> None:
    _, document = answer("dispatch", "--state", A100_L4)
    assert [device["costs"] for device in document["devices"]] == ["fitted", *["modelled"] * 4]
    stage = load_stage(A100_L4)
    # L4: 4.03 ps per byte; llama-2-70b reads 512 bytes per token and group and does 4 x 128 x 8 FLOPs for them.
    assert stage.snapshot.stage.kv_byte_s[1, :2].tolist() == pytest.approx([4.0333e-12, 8 * 1.5454e-14], rel=1e-3)
    assert load_stage(DRIFTED).origins == dict.fromkeys([device.name for device in load_state(DRIFTED).devices], GIVEN)


def test_a_profile_file_goes_before_the_model(tmp_path: Path) -> None:
    from hetis.formats.catalogue import find_gpu

    path = tmp_path / "l4.yaml"
    path.write_text(dump(modelled_profile(find_gpu("L4").gpu)))
    _, document = answer("dispatch", "--state", A100_L4, "--profile", str(path))
    assert [device["costs"] for device in document["devices"]] == ["fitted", *[str(path)] * 4]
    twice = invoke("dispatch", "--state", A100_L4, *["--profile", str(path)] * 2)
    assert "second profile of L4" in str(twice.exception)
    path.write_text(dump(modelled_profile(find_gpu("T4").gpu)))
    result = invoke("dispatch", "--state", A100_L4, "--profile", str(path))
    assert run(["dispatch", "--state", A100_L4, "--profile", str(path)]) == ExitCode.INVALID
    assert result.exit_code != 0


def test_a_request_that_does_not_fit_is_told_and_the_others_are_placed() -> None:
    code, document = answer("dispatch", "--state", DRIFTED, "--request", "2000000/10", "--request", "500/10")
    assert code == ExitCode.INFEASIBLE
    (unplaced,) = document["unplaced"]
    assert (unplaced["id"], unplaced["resource"]) == ("new-0", "kv_blocks")
    assert unplaced["missing"] > 0
    assert sum(document["requests"][1]["groups"].values()) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dispatch"], "give one of --state and --plan"),
        (["dispatch", "--state", A100_L4, "--plan", "plan.json"], "give one of --state and --plan"),
        (["dispatch", "--state", "missing.yaml"], "missing.yaml: no such file"),
        (["dispatch", "--state", A100_L4, "--request", "8000"], "'8000' is not a pair of context and expected output"),
        (["dispatch", "--state", str(EXAMPLES / "paper.yaml")], "is 'Cluster', expected DispatchState"),
        (["redispatch"], "Missing option"),
        (["redispatch", "--state", DRIFTED, "--patience", "0"], "must be above 0 and at most 100%"),
        (["redispatch", "--state", DRIFTED, "--budget", "10"], "is not a size"),
        (["redispatch", "--state", DRIFTED, "--least-gain", "150%"], "least_gain is 1.5, must be >= 0 and < 1"),
    ],
)
def test_wrong_usage_exits_2_with_a_message(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == ExitCode.INVALID
    captured = capsys.readouterr()
    assert captured.out == ""
    words = " ".join(captured.err.replace("│", " ").split())  # usage errors are drawn in a box
    assert message in words


@pytest.mark.parametrize("verb", ["dispatch", "redispatch"])
@pytest.mark.parametrize("path", BAD_FILES, ids=lambda path: path.name)
def test_a_broken_file_is_refused_with_a_message(verb: str, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([verb, "--state", str(path)]) == ExitCode.INVALID
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "in the input" in captured.err


# --- from a plan


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small plan with attention workers, solved once."""
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    cluster = str(EXAMPLES / "h100-l4.yaml")
    goal = ["--tpot", "50ms", "--ttft", "none", "--gap", "20%", "--no-verify", "--out", str(path), "-q"]
    inputs = ["--cluster", cluster, "--model", "Llama-3.1-70B", "--workload", "8000/300"]
    assert invoke("place", *inputs, *goal).exit_code == 0
    return str(path)


def test_a_stage_of_a_plan_becomes_an_empty_state(plan_file: str) -> None:
    code, document = answer("dispatch", "--plan", plan_file, "--request", "8000/300")
    assert code == ExitCode.OK
    plan = json.loads(Path(plan_file).read_text())["replicas"][0]
    first = load_stage_of_plan(plan_file, replica=0, stage=1).saved
    assert first.requests == ()
    assert first.devices[0].tp == plan["stages"][0]["tp"]
    workers = [name for pool in plan["attention_workers"] if pool["stage"] == 0 for name in pool["devices"]]
    assert [device.name for device in first.devices[1:]] == workers
    assert all(device.total_blocks > 0 for device in first.devices)
    assert [request["id"] for request in document["requests"]] == ["new-0"]


def test_requests_longer_than_the_context_are_refused(
    plan_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An engine would refuse them, too; a state with the sizes of its heads alone tells nothing of a context."""
    listed = tmp_path / "requests.yaml"
    long_one = "[{id: long, context_tokens: 131000, output_tokens: 100}]"
    listed.write_text(f"{{apiVersion: hetis/v1, kind: DispatchRequests, requests: {long_one}}}")
    long = ["--request", "131000/72", "--request", "131000/73", "--requests", str(listed)]
    for source in (["--plan", plan_file], ["--state", A100_L4]):
        assert run(["dispatch", *source, *long]) == ExitCode.INVALID
        told = " ".join(capsys.readouterr().err.split())
        context = "tokens with its output, and the context of meta-llama/Meta-Llama-3.1-70B has 131,072"
        assert f"{listed}: request 'long' has 131,100 {context}" in told
        assert f"--request: request 'new-1' has 131,073 {context}" in told
        assert "new-0" not in told


@pytest.mark.parametrize(("option", "message"), [("--replica", "has no replica 99"), ("--stage", "has no stage 99")])
def test_a_plan_without_such_a_stage_is_refused(
    option: str, message: str, plan_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["dispatch", "--plan", plan_file, option, "99"]) == ExitCode.INVALID
    assert message in capsys.readouterr().err


# --- redispatch


def test_a_drifted_stage_gets_moves_that_pay() -> None:
    code, document = answer("redispatch", "--state", DRIFTED)
    assert code == ExitCode.OK
    assert [trigger["kind"] for trigger in document["triggers"]] == ["deviation"]
    assert document["moves"]
    result = document["result"]
    assert result["makespan_s"] < result["makespan_before_s"]
    assert result["bound_s"] <= result["objective_s"] <= result["objective_before_s"]
    assert result["moved_bytes"] == pytest.approx(sum(move["bytes"] for move in document["moves"]))
    assert sorted(move["wave"] for move in document["moves"]) == [move["wave"] for move in document["moves"]]


def test_a_draining_device_that_nobody_can_relieve_misses_strict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = {"a100": 5200, "l4_0": 2700, "l4_1": 4100, "l4_2": 2900}  # a few more blocks than are in use
    full = {name: {"kv_memory": None, "blocks": count} for name, count in blocks.items()}
    path = changed(DRAINING, tmp_path, **full)
    assert run(["redispatch", "--state", path, "-q", "-o", "json"]) == ExitCode.OK
    document = json.loads(capsys.readouterr().out)
    assert document["result"]["short_blocks"] > 1
    assert run(["redispatch", "--state", path, "--strict"]) == ExitCode.MISSED
    assert "KV blocks remain short or on draining devices" in capsys.readouterr().err


def test_a_budget_is_spent_on_two_devices_that_are_equally_slow() -> None:
    plan = redispatch_stage(load_stage(DRIFTED), budget_bytes=4 * 2**30).plan
    assert plan.num_bytes <= 4 * 2**30
    assert plan.objective_s == pytest.approx(563e-6, rel=0.005)  # improving one device after the other ends at 614 us


# --- output

RUNS = {
    "dispatch": ["dispatch", "--state", A100_L4, "--requests", REQUESTS],
    "empty": ["dispatch", "--state", A100_L4],
    "unplaced": ["dispatch", "--state", DRIFTED, "--request", "2000000/10"],
    "drifted": ["redispatch", "--state", DRIFTED],
    "draining": ["redispatch", "--state", DRAINING],
}


@pytest.mark.parametrize("arguments", RUNS.values(), ids=RUNS.keys())
def test_tables_fit_80_columns_and_yaml_is_the_json(arguments: list[str]) -> None:
    table = invoke(*arguments).stdout
    assert max(len(line) for line in table.splitlines()) <= 80
    code, document = answer(*arguments)
    assert yaml.safe_load(invoke(*arguments, "-o", "yaml").stdout) == document
    assert code in (ExitCode.OK, ExitCode.INFEASIBLE)
