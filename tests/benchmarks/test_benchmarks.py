"""The quick form of every benchmark runs, and its rows keep their promises. No time is asserted here."""

from __future__ import annotations

import importlib
import json
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.measuring import solving
from hetis.solver.budget import Progress
from hetis.solver.plan import Objective, ObjectiveKind, Plan, SolveResult, Status
from tools import tables

ROOT = Path(__file__).parents[2]
QUICK = ("attention_workers", "coverage", "dispatch", "sharing")
# Their quick forms take ten CPU seconds and more, so that only `make soak` runs them.
SLOW = ("classes", "kept", "loop", "paper", "placement", "published", "rungs")
WITHOUT_TABLE = ("kept", "loop")  # not measured on an idle machine yet
LIMIT_S = 300  # far above any benchmark's time; ends only one that hangs


def quick_rows(name: str) -> list[dict[str, Any]]:
    """Return the rows of the quick form."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=LIMIT_S)
    return rows_of(done.stdout.splitlines())


def rows_of(lines: Sequence[str]) -> list[dict[str, Any]]:
    """Return the rows, read as strict JSON."""

    def refuse(constant: str) -> float:
        raise ValueError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in lines]


@pytest.mark.parametrize("name", QUICK)
def test_quick_rows_make_a_table(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run in this process, which has already loaded the kernels."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [name, "--quick", "--json"])
    runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr()
    if "--data says where the tables are" in printed.err:
        pytest.skip(f"NOT RUN: {printed.err.strip()}")
    assert_table(rows_of(printed.out.splitlines()))


@pytest.mark.soak
@pytest.mark.parametrize("name", SLOW)
def test_slow_quick_rows_make_a_table(name: str) -> None:
    assert_table(quick_rows(name))


def assert_table(found: list[dict[str, Any]]) -> None:
    assert found
    for row in found:
        assert row.keys() == found[0].keys() >= {"name"}
        if row.get("bound") is not None:
            assert row["value"] <= row["bound"] * (1 + 1e-9)


@pytest.mark.parametrize("name", [*QUICK, *SLOW])
def test_help_names_the_command(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"benchmarks.{name}").main()
    assert ended.value.code == 0
    assert f"python -m benchmarks.{name} [--quick] [--json]" in capsys.readouterr().out


def progress(phase: str, elapsed_s: float, incumbent: float | None, bound: float) -> Progress:
    return Progress(phase=phase, elapsed_s=elapsed_s, incumbent=incumbent, bound=bound)


def plan_of_gap(gap: float) -> Plan:
    result = SolveResult(
        status=Status.FEASIBLE,
        objective=ObjectiveKind.GOODPUT,
        value=100.0,
        bound=100.0 * (1 + gap),
        gap=gap,
        unit="requests/s",
        solve_s=9.0,
    )
    return Plan(strategy="hetis", family="", result=result, objective=Objective(), replicas=())


def test_a_gap_counts_only_against_a_bound_of_the_whole_family() -> None:
    reports = [
        progress("column generation", 1.0, None, 100.4),
        progress("whole counts", 2.0, 100.0, 100.4),  # in the smaller family
        progress("column generation", 3.0, 100.0, 103.0),
        progress("column generation", 4.0, 100.0, 100.4),
        progress("whole counts", 5.0, 100.0, 100.4),
    ]
    assert solving.time_to_gap(reports, plan_of_gap(0.004), 6.0, 0.01) == 4.0
    assert solving.time_to_gap(reports[:2], plan_of_gap(0.004), 6.0, 0.01) == 2.0
    assert solving.time_to_gap(reports, plan_of_gap(0.02), 6.0, 0.01) is None
    assert solving.time_to_gap([], plan_of_gap(0.004), 6.0, 0.01) == 6.0


@pytest.mark.parametrize("name", sorted({*QUICK, *SLOW} - {*WITHOUT_TABLE}))
def test_every_benchmark_has_a_table(name: str) -> None:
    assert tables.path_of(name).is_file()
