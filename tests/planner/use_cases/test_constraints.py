"""`--pin`, `--forbid`, and the output if no plan exists: the real command line and solver."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hetis.planner.cli.app import run
from hetis.planner.cli.exit_codes import ExitCode
from tests.fleets import fleet

SMALL = fleet("small", "a100: 2 A100-PCIe-80GB", "2 l4: 1 L4")

Run = tuple[ExitCode, dict[str, Any]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "small.yaml").write_text(SMALL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def place(capsys: pytest.CaptureFixture[str], *options: str, model: str = "Meta-Llama-3-8B") -> Run:
    inputs = ["place", "-c", "small.yaml", "-m", model, "-w", "1024/256", "--no-verify", "-q", "-o", "json"]
    code = run([*inputs, *options])
    return ExitCode(code), json.loads(capsys.readouterr().out or "{}")


def test_a_plan_keeps_its_constraints(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    constraints = ("--forbid", "gpu=a100/0", "--pin", "type=L4:use=2", "--out", "plan.json")
    code, plan = place(capsys, *constraints)
    assert code == ExitCode.OK
    used = {name for replica in plan["replicas"] for stage in replica["stages"] for name in stage["devices"]}
    used |= {name for replica in plan["replicas"] for pool in replica["attention_workers"] for name in pool["devices"]}
    assert "a100/0" not in used
    assert {"l4-0/0", "l4-1/0"} <= used
    assert plan["inputs"]["constraints"] == ["--forbid gpu=a100/0", "--pin type=L4:use=2"]
    assert plan["family"].endswith("; --forbid gpu=a100/0; --pin type=L4:use=2")
    assert run(["check", "plan.json", "-q"]) == ExitCode.OK
    assert run(["explain", "plan.json"]) == ExitCode.OK
    assert "they are forbidden" in " ".join(capsys.readouterr().out.split())


def test_a_size_is_forbidden_where_the_fleet_has_others(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, plan = place(capsys, "--forbid", "tp=2", "--engine", "vllm")
    assert code == ExitCode.OK
    assert {stage["tp"] for replica in plan["replicas"] for stage in replica["stages"]} == {1}
    assert set(plan["inputs"]["simple_setups"]) == {"1"}


def test_a_plan_file_with_other_constraints_is_found_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place(capsys, "--pin", "replicas=2", "--out", "plan.json")
    plan = json.loads((folder / "plan.json").read_text())
    plan["inputs"]["constraints"] = ["--pin replicas=1", "--forbid workers"]
    (folder / "plan.json").write_text(json.dumps(plan))
    assert run(["check", "plan.json", "-q"]) == ExitCode.INVALID
    assert "--pin replicas=1: the plan has 2 replicas (constraint)" in " ".join(capsys.readouterr().out.split())
    plan["inputs"]["will"] = plan["inputs"].pop("constraints")  # the name in earlier versions
    (folder / "plan.json").write_text(json.dumps(plan))
    assert run(["check", "plan.json", "-q"]) == ExitCode.INVALID
    assert "--pin replicas=1: the plan has 2 replicas (constraint)" in " ".join(capsys.readouterr().out.split())
    plan["inputs"]["constraints"] = ["--pin type=H100"]
    (folder / "plan.json").write_text(json.dumps(plan))
    assert run(["check", "plan.json"]) == ExitCode.INVALID
    assert "inputs.constraints: --pin type=H100: small has no type H100" in capsys.readouterr().err


def test_constraints_that_make_no_sense_are_listed_together(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = ["place", "-c", "small.yaml", "-m", "Meta-Llama-3-8B", "-w", "1024/256"]
    assert run([*inputs, "--pin", "node=a10", "--forbid", "tp=3", "--forbid", "workes"]) == ExitCode.INVALID
    assert capsys.readouterr().err == (
        "error: 3 problems in the input\n"
        "  --forbid workes: must be written NAME=VALUE, such as node=a100-0, type=L4\n"
        "  --forbid tp=3: TP sizes are 1, 2, 4, 8\n"
        "  --pin node=a10: small has no node a10, did you mean a100?\n"
    )


def test_what_excludes_what_is_data_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    constraints = ("--pin", "type=A100-PCIe-80GB:as=worker", "--forbid", "type=L4", "--pin", "replicas=..4")
    code, document = place(capsys, *constraints)
    assert code == ExitCode.INFEASIBLE
    (conflict,) = document["conflicts"]
    assert conflict["minimal"]
    assert [member["name"] for member in conflict["members"]] == [
        "--forbid type=L4",
        "--pin type=A100-PCIe-80GB:as=worker",
    ]
    assert {relaxation["of"] for relaxation in document["relaxations"]} == {m["name"] for m in conflict["members"]}


def test_strategies_are_compared_under_the_same_constraints(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = ["compare", "-c", "small.yaml", "-m", "Meta-Llama-3-8B", "-w", "1024/256", "-q", "-o", "json"]
    code = run([*inputs, "--strategies", "hetis,uniform,hetis-paper", "--pin", "replicas=1"])
    assert code == ExitCode.OK
    rows = {row["strategy"]: row for row in json.loads(capsys.readouterr().out)["strategies"]}
    assert len(rows["hetis"]["plan"]["replicas"]) == len(rows["uniform"]["plan"]["replicas"]) == 1
    assert rows["hetis-paper"]["plan"] is None
    assert rows["hetis-paper"]["reasons"] == ["it cannot keep --pin replicas=1"]
