"""The quick form of every benchmark runs, and its rows keep their promises. No time is asserted here."""

from __future__ import annotations

import importlib
import json
import math
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import redispatch as redispatch_benchmark
from benchmarks.measuring import drift, instances, rows, solving
from hetis.solver.budget import Progress
from hetis.solver.plan import Objective, ObjectiveKind, Plan, SolveResult, Status
from tools import tables

ROOT = Path(__file__).parents[2]
SOLVES = {"name", "gpus", "types", "status", "value", "bound", "gap", "seconds", "peak_mib", "note"}
PROMISED = {
    "placement": SOLVES | {"to_1_percent_s", "to_half_percent_s"},
    "attention_workers": SOLVES | {"bound_without", "ratio"},
    "engines": {"name", "gpus", "status"}
    | {f"{name}{mark}" for name in ("vllm", "vllm-hetis") for mark in ("", "_gap", "_s")}
    | {"hetis_over_vllm"},
    "rungs": {"name", "requests", "planned", "exports", "keeps", "survives", "of", "user s"}
    | {f"{rung}{mark}" for rung in ("node", "pipelines", "apart", "workers") for mark in ("", " left %")},
    "coverage": {"name", "inputs", "read", "right", "refused", "wrong"},
    "published": {"name", "gpus", "types", "status", "value", "proven_value", "proven_bound", "ratio"}
    | {"seconds", "proof_s", "note"},
    "sharing": {"name", "status", "value", "gap", "lost", "least", "least_gap", "over_part", "envy"}
    | {"rates", "gpus", "promise", "envy_seconds"},
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
        "judged",
    }
    | {f"{mark}_gap_to_{what}" for mark in ("p50", "p95", "p99", "max") for what in ("relaxation", "best")},
    "redispatch": {
        "name",
        "mean_us",
        "p95_us",
        "refill_us",
        "over_ideal",
        "moved_gib",
        "refilled_gib",
        "saved_us",
        "saved_us_per_gib",
        "more_us",
        "more_us_error",
        "more_us_per_gib",
        "more_us_per_gib_error",
        "evictions",
        "tokens_per_s",
        "looks",
        "solve_p50_ms",
    },
    "paper": {"name", "planned_rps", "throughput_rps", "half_width_rps", "kv_blocks", "ttft_p95_s", "tpot_p95_s"}
    | {"hetis_over", "kv_over", "ttft_over", "tpot_over", "no_worse", "clipped", "note"}
    | {f"paper_{figure}" for figure in ("throughput", "kv", "ttft", "tpot")},
    "simulation": {"name", "shape", "planned", "simulated", "ratio", "alternating", "requests", "preemptions"}
    | {"ttft", "ttft_at_plan", "ttft_all_seats", "ttft_at_half"},
    "goodput": {"name", "replicas", "prefill", "decode", "planned_rps", "kept", "ttft", "tpot", "best_rps"}
    | {"planned_over_best", "kept_over_best"},
}
# Their quick forms take 10 to 50 CPU seconds. `make soak` runs them to the end, other runs only to the first row.
LONG = ("placement", "published", "simulation")
# Their first row takes 10 CPU seconds or more, so that only `make soak` runs them.
SLOW = ("paper", "goodput")


LIMIT_S = 300  # far above any benchmark's time; ends only one that hangs


def run(*arguments: str) -> str:
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=LIMIT_S).stdout


def first_line(command: Sequence[str], *, limit_s: float = LIMIT_S) -> str:
    """Return the first line that a command prints, then stop it and its children. Fails without a line."""
    with (
        tempfile.TemporaryFile("w+") as complaints,
        subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=complaints, text=True, start_new_session=True
        ) as running,
    ):
        ended = threading.Event()

        def end() -> None:
            ended.set()
            os.killpg(running.pid, signal.SIGKILL)

        deadline = threading.Timer(limit_s, end)
        deadline.start()
        try:
            line = running.stdout.readline()
        finally:
            deadline.cancel()
            deadline.join()  # kills nothing once the process has been waited for
            os.killpg(running.pid, signal.SIGKILL)
        if not line.endswith("\n"):
            complaints.seek(0)
            why = f"was ended after {limit_s:g} s" if ended.is_set() else "ended"
            pytest.fail(f"{' '.join(command)} {why} without a whole line on stdout; stderr:\n{complaints.read()}")
        return line


def quick_rows(name: str) -> list[dict[str, Any]]:
    """Return the rows of the quick form."""
    return rows_of(run(f"benchmarks.{name}", "--quick", "--json").splitlines())


def rows_of(lines: Sequence[str]) -> list[dict[str, Any]]:
    """Return the rows, read as strict JSON."""

    def refuse(constant: str) -> float:
        raise ValueError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in lines]


@pytest.mark.parametrize("name", sorted(PROMISED.keys() - {*LONG, *SLOW}))
def test_quick_rows_have_the_promised_keys(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run in this process, which has already loaded the kernels."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [name, "--quick", "--json"])
    runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr()
    if "--data says where the tables are" in printed.err:
        pytest.skip(f"NOT RUN: {printed.err.strip()}")
    assert_promised(name, rows_of(printed.out.splitlines()))


@pytest.mark.parametrize("name", LONG)
def test_the_first_quick_row_has_the_promised_keys(name: str) -> None:
    assert_promised(name, rows_of([first_line([sys.executable, "-m", f"benchmarks.{name}", "--quick", "--json"])]))


def test_a_command_that_prints_nothing_is_ended_with_all_that_it_started() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"was ended after 0\.2 s without a whole line on stdout"):
        first_line(["sh", "-c", "sleep 600 & sleep 600"], limit_s=0.2)


def test_a_command_that_fails_says_why() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"ended without a whole line on stdout; stderr:\nno such fleet"):
        first_line(["sh", "-c", "echo no such fleet >&2; exit 1"])


@pytest.mark.soak
@pytest.mark.parametrize("name", [*LONG, *SLOW])
def test_all_quick_rows_have_the_promised_keys(name: str) -> None:
    assert_promised(name, quick_rows(name))


def assert_promised(name: str, found: list[dict[str, Any]]) -> None:
    assert found
    for row in found:
        assert PROMISED[name] <= set(row)
        if row.get("bound") is not None:
            assert row["value"] <= row["bound"] * (1 + 1e-9)


@pytest.mark.parametrize("name", sorted(PROMISED))
def test_help_names_the_command(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"benchmarks.{name}").main()
    assert ended.value.code == 0
    assert f"python -m benchmarks.{name} [--quick] [--json]" in capsys.readouterr().out


def tally(makespan_s: float, moved_bytes: float) -> drift.Tally:
    return drift.Tally(
        makespans_s=[makespan_s, makespan_s], ideals_s=[1e-6, 1e-6], moved_bytes=moved_bytes, seconds=1.0
    )


def test_a_policy_is_compared_with_the_papers_rule_seed_by_seed() -> None:
    gib = redispatch_benchmark.GIB
    nothing, paper = [tally(10e-6, 0.0), tally(20e-6, 0.0)], [tally(9e-6, gib), tally(18e-6, gib)]
    ours = [tally(8e-6, gib), tally(13e-6, 2 * gib)]
    beside = redispatch_benchmark._beside(ours, paper, nothing)
    # Saved: 2 and 7 us, the paper's rule 1 and 2; per GiB 9/3 and 3/2.
    assert beside["more_us"] == pytest.approx((1 + 5) / 2)
    assert beside["more_us_error"] == pytest.approx(2.0)
    assert beside["more_us_per_gib"] == pytest.approx(3 - 1.5)
    # Without the first seed 7/2 - 2, without the second 2 - 1.
    assert beside["more_us_per_gib_error"] == pytest.approx(0.25)


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


def test_unbounded_gaps_are_null_in_json_and_dashes_in_tables(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"name": "a", "gap": math.inf, "seconds": 1.0}
    as_json = rows.parser("benchmarks.a", None).parse_args(["--json"])
    rows.show([row], as_json, name="a")
    assert json.loads(capsys.readouterr().out) == {"name": "a", "gap": None, "seconds": 1.0}
    assert rows.table([row]).splitlines()[1].split() == ["a", "-", "1.000"]


@pytest.mark.parametrize("name", sorted(PROMISED))
def test_every_benchmark_has_a_table(name: str) -> None:
    assert tables.path_of(name).is_file()


@pytest.mark.parametrize("count", range(1, 9))
def test_fleets_of_any_number_of_types_have_the_same_size(count: int) -> None:
    cluster = instances.of_types(count, 1024)
    assert cluster.num_gpus() == 1024
    assert len(instances.gpu_types(cluster)) == count
