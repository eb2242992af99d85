"""`place --survive node`: the demand is served without any one node; every plan says what is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hetis.planner.cli.app import run
from hetis.planner.cli.exit_codes import ExitCode

FLEET = """\
apiVersion: hetis/v1
kind: Cluster
name: small
nodes:
  - {name: l4, count: 6, gpus: [{type: L4, count: 1}]}
network: {bandwidth: 100Gbps, latency: 20us}
"""


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    (tmp_path / "fleet.yaml").write_text(FLEET)
    monkeypatch.chdir(tmp_path)
    return [
        "place",
        "-c",
        "fleet.yaml",
        "-m",
        "Llama-2-7B",
        "-w",
        "1024/256",
        "-q",
        "--no-verify",
        "--no-other-engines",
    ]


def placed(capsys: pytest.CaptureFixture[str], options: list[str]) -> dict[str, Any]:
    assert run([*options, "-o", "json"]) == ExitCode.OK
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_demand_is_served_without_any_one_node(inputs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    goal = ["--objective", "gpus", "--rate", "0.5", "--tpot", "none", "--ttft", "none"]
    alone, kept = placed(capsys, [*inputs, *goal]), placed(capsys, [*inputs, *goal, "--survive", "node"])
    assert 0.9 * alone["inputs"]["losses"]["node"]["rate"] < 0.5
    assert 0.9 * kept["inputs"]["losses"]["node"]["rate"] >= 0.5
    assert kept["result"]["value"] > alone["result"]["value"]
    assert any("are served when any one node is lost" in note for note in kept["notes"])
    Path("plan.json").write_text(json.dumps(kept))
    assert run(["check", "plan.json", "-q"]) == ExitCode.OK
    assert run([*inputs, "--survive", "node"]) == ExitCode.INVALID
    assert "--survive goes with --objective cost or gpus" in " ".join(capsys.readouterr().err.split())


def test_every_plan_says_what_is_served_without_its_worst_node(
    inputs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*inputs, "--engine", "vllm", "--max-gpus", "1"]) == ExitCode.OK
    text = " ".join(capsys.readouterr().out.split())
    assert "any one node lost: 83% still served (the worst is l4-" in text, text[:900]


def test_the_simplest_plan_is_asked_for_with_a_share(inputs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    plan = placed(capsys, [*inputs, "--simplest-within", "2%"])
    assert plan["inputs"]["simplest_within"] == 0.02
    assert any("of the best" in note for note in plan["notes"])
    assert run([*inputs, "--simplest-within", "2%", "--engine", "any"]) == ExitCode.INVALID
    assert "for an engine" in " ".join(capsys.readouterr().err.split())
