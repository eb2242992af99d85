"""The same verbs against the real `hetis-planner`, to verify what the fake planner only assumes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from shutil import copy

import pytest

import hetis
from hetis.planner.cli.exit_codes import ExitCode
from tests.docs.pages import ROOT, fences
from tests.planner.cli_server.conftest import EXAMPLES, Run
from tests.planner.service.process import REAL, Process

PAPER = str(EXAMPLES / "paper.yaml")


@pytest.fixture
def hetis_plan(anywhere: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Run a command line against a planner that was just started."""
    options = ["--listen", "127.0.0.1:0", "--status-page", "off", "--ready-json"]
    with Process(options, folder=tmp_path, module=REAL) as it:
        monkeypatch.setenv("HETIS_SERVER", it.ready()["listen"][0])
        yield anywhere


def test_a_fleet_is_applied_a_plan_solved_saved_imported_and_looked_at(hetis_plan: Run, tmp_path: Path) -> None:
    def said(code: ExitCode, *arguments: str) -> str:
        return hetis_plan(*arguments, code=code).out

    assert said(ExitCode.OK, "apply", PAPER, "--dry-run") == "clusters/paper  created\n"
    assert said(ExitCode.OK, "get", "clusters") == "no clusters\n"
    assert said(ExitCode.OK, "apply", PAPER) == "clusters/paper  created\n"
    assert said(ExitCode.OK, "apply", PAPER) == "clusters/paper  unchanged\n"

    saved = tmp_path / "plan.json"
    solve = ["apply", "--cluster", "paper", "--model", "Llama-2-13B", "--workload", "500/100", "--time-limit", "30s"]
    out = said(ExitCode.OK, *solve, "--name", "night", "--out", str(saved), "-o", "json")
    plan = json.loads(out)
    assert plan["state"] == "PLAN_STATE_READY"
    assert plan["result"]["value"] > 0
    assert said(ExitCode.OK, "check", str(saved))  # the offline commands read what the planner made

    assert (
        "read the existing one: hetis-plan get plans/night"
        in hetis_plan(*solve, "--name", "night", code=ExitCode.CONFLICT).err
    )

    assert "READY" in said(ExitCode.OK, "apply", "--plan", str(saved), "--name", "offline")
    assert said(ExitCode.OK, "get", "plans", "-o", "name").split() == ["plans/offline", "plans/night"]
    assert "wave" in said(ExitCode.OK, "apply", "plans/night")
    assert "READY" in said(ExitCode.OK, "cancel", "night")
    assert "EXPECTED" in said(ExitCode.OK, "agents")
    assert said(ExitCode.OK, "status").startswith("The planner serves.")
    assert said(ExitCode.CONFLICT, "rollback") == ""

    drained = hetis_plan("drain", "a100")
    assert drained.out == "clusters/paper/nodes/a100 drains\n"
    undo = drained.err.rpartition("undo: hetis-plan ")[2].split()  # what it says works
    assert "draining" in said(ExitCode.OK, "agents")
    assert said(ExitCode.OK, *undo) == "clusters/paper/nodes/a100 takes work again\n"
    assert "draining" not in said(ExitCode.OK, "agents")

    assert "no agent is connected" in hetis_plan("disconnect", "a100", code=ExitCode.INVALID).err

    assert said(ExitCode.OK, "apply", "--activate", "plans/night", "--no-wait")
    replicas = said(ExitCode.OK, "get", "replicas", "-o", "name").split()
    assert "no agent ever connected as node" in said(ExitCode.OK, "why", replicas[0])
    captured = hetis_plan("delete", "plans", "night", "offline", code=ExitCode.CONFLICT)
    assert captured.out == "plans/offline  deleted\n"
    assert "error: plans/night is in force in clusters/paper" in captured.err
    assert "hetis-plan cancel plans/night\n" in hetis_plan("delete", "clusters/paper", code=ExitCode.CONFLICT).err
    assert said(ExitCode.OK, "cancel", "night")
    assert said(ExitCode.OK, "delete", "plans/night") == "plans/night  deleted\n"
    shown = hetis_plan("delete", "plans", "night", code=ExitCode.INVALID)
    assert "list what exists: hetis-plan get plans\n" in shown.err


def test_what_cannot_be_is_infeasible_there_too(hetis_plan: Run, tmp_path: Path) -> None:
    small = tmp_path / "small.yaml"
    small.write_text(
        "apiVersion: hetis/v1\nkind: Cluster\nname: small\nnodes:\n"
        "  - {name: t4, gpus: [{type: T4, count: 1}]}\nnetwork: {bandwidth: 25Gbps, latency: 20us}\n"
    )
    words = ("apply", "-c", str(small), "-m", "Llama-2-70B", "-w", "500/100", "--activate")
    assert "error: no feasible plan exists (plans/" in hetis_plan(*words, code=ExitCode.INFEASIBLE).err


def test_the_program_on_the_page_about_python_runs(tmp_path: Path) -> None:
    page = ROOT / "docs" / "python.md"
    [program] = [text for _, text in fences(page.read_text(encoding="utf-8")) if "AsyncClient" in text]
    copy(PAPER, tmp_path / "cluster.yaml")
    with Process(
        ["--listen", "127.0.0.1:0", "--status-page", "off", "--ready-json"], folder=tmp_path, module=REAL
    ) as it:
        small = program.replace("127.0.0.1:8470", it.ready()["listen"][0]).replace("Llama-2-70B", "Llama-2-13B")
        small = small.replace('"azure_conv_2023"', '"500/100", skip_verification=True')
        done = subprocess.run([sys.executable, "-c", small], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "clusters/night/nodes/a100 NODE_STATE_EXPECTED" in done.stdout.splitlines()
    assert hetis.load_plan(tmp_path / "night.json").replicas
