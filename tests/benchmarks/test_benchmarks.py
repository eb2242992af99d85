"""The quick form of every benchmark runs and gives what its rows promise; no time is asserted here."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import pipeline
from benchmarks.measuring import instances, rows, solving
from hetis.solver.budget import Progress
from hetis.solver.plan import Objective, ObjectiveKind, Plan, SolveResult, Status

ROOT = Path(__file__).parents[2]
SOLVES = {"name", "gpus", "types", "status", "value", "bound", "gap", "seconds", "peak_mib", "note"}
PROMISED = {
    "placement": SOLVES | {"to_1_percent_s", "to_half_percent_s"},
    "attention_workers": SOLVES | {"bound_without", "ratio"},
    "dispatch": {
        "name",
        "devices",
        "arrivals",
        "pieces",
        "path",
        "load",
        "p50_ms",
        "p99_ms",
        "highs_p50_ms",
        "cvxpy_p50_ms",
        "speedup_vs_cvxpy",
        "mean_gap_to_relaxation",
        "mean_gap_to_best",
    },
    "redispatch": {
        "name",
        "mean_us",
        "p95_us",
        "refill_us",
        "over_ideal",
        "moved_gib",
        "refilled_gib",
        "saved_us_per_gib",
        "evictions",
        "tokens_per_s",
        "looks",
        "solve_p50_ms",
    },
    "pipeline": {"name", "pipelines", "mean", "p10", "least", "slack", "assumed"},
}


def run(*arguments: str) -> str:
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300).stdout


def quick_rows(name: str) -> list[dict[str, Any]]:
    """Rows of the quick form, read as strict JSON."""

    def refuse(constant: str) -> float:
        raise ValueError(f"{constant} is no JSON")

    only = ["--only", "12 GPUs, "] if name == "placement" else []  # the others take their time limit
    lines = run(f"benchmarks.{name}", "--quick", "--json", *only).splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


@pytest.mark.parametrize("name", sorted(PROMISED))
def test_quick_rows_have_the_promised_keys(name: str) -> None:
    found = quick_rows(name)
    assert found
    for row in found:
        assert PROMISED[name] <= set(row)
        if row.get("bound") is not None:
            assert row["value"] <= row["bound"] * (1 + 1e-9)


@pytest.mark.parametrize("name", sorted(PROMISED))
def test_help_names_the_command(name: str) -> None:
    assert f"python -m benchmarks.{name} [--quick] [--json]" in run(f"benchmarks.{name}", "--help")


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
        progress("whole counts", 2.0, 100.0, 100.4),  # of the smaller family
        progress("column generation", 3.0, 100.0, 103.0),
        progress("column generation", 4.0, 100.0, 100.4),
        progress("whole counts", 5.0, 100.0, 100.4),
    ]
    assert solving.time_to_gap(reports, plan_of_gap(0.004), 6.0, 0.01) == 4.0
    assert solving.time_to_gap(reports[:2], plan_of_gap(0.004), 6.0, 0.01) == 2.0
    assert solving.time_to_gap(reports, plan_of_gap(0.02), 6.0, 0.01) is None
    assert solving.time_to_gap([], plan_of_gap(0.004), 6.0, 0.01) == 6.0


def test_unbounded_gaps_are_null_in_json_and_dashes_in_tables(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"name": "a", "gap": math.inf, "seconds": 1.0}
    as_json = rows.parser("benchmarks.a", None).parse_args(["--json"])
    rows.show([row], as_json, name="a")
    assert json.loads(capsys.readouterr().out) == {"name": "a", "gap": None, "seconds": 1.0}
    assert rows.table([row]).splitlines()[1].split() == ["a", "-", "1.000"]


def test_a_section_of_the_document_is_replaced_and_the_rest_kept(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text("before <!-- a -->old<!-- end a --> after", encoding="utf-8")
    rows.write_section(document, "a", "new")
    rows.write_section(document, "a", "newer")
    assert document.read_text(encoding="utf-8") == "before <!-- a -->\nnewer\n<!-- end a --> after"
    with pytest.raises(ValueError, match="has no section <!-- b -->"):
        rows.write_section(document, "b", "new")


@pytest.mark.parametrize("name", sorted(PROMISED))
def test_the_document_has_a_section_for_every_benchmark(name: str) -> None:
    text = rows.DOCUMENT.read_text(encoding="utf-8")
    assert f"<!-- {name} -->" in text
    assert f"<!-- end {name} -->" in text


@pytest.mark.parametrize("count", range(1, 9))
def test_fleets_of_any_number_of_types_have_the_same_size(count: int) -> None:
    cluster = instances.of_types(count, 1024)
    assert cluster.num_gpus() == 1024
    assert len(instances.gpu_types(cluster)) == count


def test_a_full_pipeline_of_equal_iterations_reaches_the_formula() -> None:
    even = pipeline.Pipeline(plain_s=(1.0, 2.0), chunk_ratio=3.0, copies=(1, 2), in_flight=6, chunk_share=0.0)
    rate, share = pipeline.simulate(even, 500, lambda _: False)
    assert share == 0.0
    assert rate == pytest.approx(even.even_rate(0.0), rel=1e-2)
    assert rate == pytest.approx(1.0, rel=1e-2)  # both stages finish one a second


def test_a_single_micro_batch_waits_for_nobody() -> None:
    rng = np.random.default_rng(3)
    for _ in range(5):
        alone = pipeline.random_pipeline("M = 1", rng)
        assert pipeline.ratio_to_formula(alone, 500, rng, at_random=True) == pytest.approx(1.0, rel=1e-9)
