"""`layers` from the command line: its output and exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from hetis.formats.documents import load_layers_problem
from hetis.planner.cli.app import run
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.report.layers import layers_document
from hetis.planner.use_cases.layers import place_layers, stages
from hetis.solver.layers import solve
from tests.planner.command_line import EXAMPLES, invoke

FLEET = str(EXAMPLES / "layers-24.yaml")


@pytest.fixture(autouse=True)
def _short_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solve, "MOVES_PER_NODE", 300)
    monkeypatch.setattr(solve, "FINAL_MOVES_PER_NODE", 300)


def test_every_layer_is_held_and_every_node_has_its_flow() -> None:
    result = invoke("layers", FLEET, "--no-compare", "-o", "json")
    assert result.exit_code == ExitCode.OK
    document = json.loads(result.stdout)
    held = {
        layer
        for node in document["nodes"]
        for layer in range(node["first_layer"], node["first_layer"] + node["num_layers"])
    }
    assert held == set(range(80))
    assert len(document["nodes"]) + len(document["idle"]) == 24
    into = {node["name"]: 0.0 for node in document["nodes"]}
    for link in document["links"]:
        if link["to"] is not None:
            into[link["to"]] += link["share"]
    assert into == pytest.approx({node["name"]: node["visits"] for node in document["nodes"]})
    tokens = sum(link["tokens_per_s"] for link in document["links"] if link["from"] is None)
    assert tokens == pytest.approx(document["result"]["rate_rps"] * 1150)
    assert document["result"]["rate_rps"] < document["result"]["bound_rps"]
    assert document["max_flow"] is None


def test_compiling_is_no_part_of_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0

    def compile_slowly() -> None:
        nonlocal now_s
        now_s += 1000.0

    monkeypatch.setattr("hetis.planner.cli.place.search_seconds", lambda: now_s)
    monkeypatch.setattr("hetis.planner.use_cases.layers.is_compiled", lambda: False)
    monkeypatch.setattr("hetis.planner.use_cases.layers.compile_layers", compile_slowly)
    result = invoke("layers", FLEET, "--no-compare", "--time-limit", "60s", "-o", "json")
    assert "compiling the solver" in result.stderr
    found = json.loads(result.stdout)["result"]
    assert (now_s, found["stopped"], found["solver_s"]) == (1000.0, False, 0.0)


def test_the_numbers_are_those_of_the_solver() -> None:
    document = json.loads(invoke("layers", FLEET, "--seed", "2", "-o", "json").stdout)
    found = layers_document(place_layers(load_layers_problem(FLEET), seed=2))
    for one in (document, found):
        one["result"].pop("solver_s")
    assert document == found
    assert document["max_flow"]["rate_rps"] < document["result"]["rate_rps"]


def test_the_table_fits_80_columns_and_says_what_limits() -> None:
    result = invoke("layers", FLEET, "--seed", "1")
    assert max(len(line.rstrip()) for line in result.stdout.splitlines()) <= 80
    for word in ("Rate", "Bound", "Limit", "Max-flow", "Stages", "A100-PCIe-40GB", "in flight"):
        assert word in result.stdout
    plan = place_layers(load_layers_problem(FLEET), seed=1, compare=False).plan
    assert f"{len(list(stages(plan)))} stages" in result.stdout


def test_every_node_is_in_one_stage() -> None:
    plan = place_layers(load_layers_problem(FLEET), compare=False).plan
    assert sorted(load.node.name for stage in stages(plan) for load in stage.loads) == sorted(
        node.name for node in plan.nodes
    )
    assert sum(stage.round_trip_s for stage in stages(plan)) == pytest.approx(plan.judgement.round_trip_s)


@pytest.mark.parametrize(("share", "fits"), [(0.99, False), (1.01, True)])
def test_kv_room_for_no_whole_request_is_told(share: float, fits: bool, tmp_path: Path) -> None:
    data = yaml.safe_load(Path(FLEET).read_text())
    data |= {"num_layers": 2, "mean_prompt_tokens": 900, "mean_output_tokens": 100}
    data["node_types"] = {"T4": {"count": 1, "tokens_per_s": [100, 100], "kv_token_layers": [2000, 2000 * share]}}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(data))
    result = invoke("layers", str(tmp_path / "small.yaml"), "--no-compare")
    assert result.exit_code == ExitCode.OK
    assert ("has none for a whole mean request" in " ".join(result.stdout.split())) is not fits


def test_too_few_nodes_are_told_with_exit_code_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = yaml.safe_load(Path(FLEET).read_text())
    data["node_types"] = {"T4": data["node_types"]["T4"] | {"count": 2}}
    (tmp_path / "few.yaml").write_text(yaml.safe_dump(data))
    assert run(["layers", str(tmp_path / "few.yaml")]) == ExitCode.INFEASIBLE
    assert "the 2 nodes can hold" in capsys.readouterr().err


def test_a_file_of_another_kind_is_refused_with_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["layers", str(EXAMPLES / "paper.yaml")]) == ExitCode.INVALID
    assert "kind: is 'Cluster', expected LayersProblem" in capsys.readouterr().err
