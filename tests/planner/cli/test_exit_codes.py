"""Exit codes, stdout for data alone, and never a traceback."""

from __future__ import annotations

import errno
import re
import subprocess
import sys
from contextvars import copy_context
from pathlib import Path

import pytest

from hetis.commands import verb
from hetis.commands.terminal import in_use
from hetis.planner.cli.app import run
from hetis.planner.cli.exit_codes import ExitCode
from hetis.solver.errors import (
    HetisError,
    InfeasibleError,
    InvalidProblemError,
    NoPlanFoundError,
    UnboundPlanError,
)
from tests.command_line import environment
from tests.planner.command_line import COMMAND, hetis_plan

DOCS = Path(__file__).parents[3] / "docs" / "cli.md"


def failing_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> int:
    def fail(*_: object) -> int:
        raise error

    monkeypatch.setattr(verb, "_invoke", fail)
    alone = copy_context()
    alone.run(in_use.set, None)  # other tests in this process may have left an output format
    return alone.run(run, [])


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidProblemError("count is 0, must be >= 1"), ExitCode.INVALID),
        (InfeasibleError(("weights need 140 GB, the fleet has 48",)), ExitCode.INFEASIBLE),
        (NoPlanFoundError("no plan within 1 s"), ExitCode.NO_PLAN),
        (UnboundPlanError("replica 3 has no node"), ExitCode.INTERNAL),
        (HetisError("something else"), ExitCode.INTERNAL),
        (OSError(errno.ENOSPC, "No space left on device", "plan.json"), ExitCode.INTERNAL),
        (ZeroDivisionError("division by zero"), ExitCode.INTERNAL),
        (RecursionError("maximum recursion depth exceeded"), ExitCode.INTERNAL),
        (MemoryError(), ExitCode.INTERNAL),
        (KeyboardInterrupt("interrupted"), ExitCode.INTERRUPTED),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_every_error_becomes_a_message_and_a_code(
    error: BaseException, code: ExitCode, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HETIS_DEBUG", raising=False)
    assert failing_with(monkeypatch, error) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    said = error.strerror if isinstance(error, OSError) else str(error)
    assert str(said) in captured.err
    assert "Traceback" not in captured.err


def test_a_bug_says_where_and_how_to_see_more(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HETIS_DEBUG", raising=False)
    failing_with(monkeypatch, ZeroDivisionError("division by zero"))
    assert re.search(
        r"internal error: ZeroDivisionError: division by zero \(.*test_exit_codes.py:\d+\)\n.*HETIS_DEBUG=1",
        capsys.readouterr().err,
    )


def test_debugging_lets_errors_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HETIS_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        failing_with(monkeypatch, ZeroDivisionError())


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["place"],
        ["place", "--cluster", "c", "--model", "m", "--workload", "w", "--tpot", "fast"],
        ["place", "--cluster", "c", "--model", "m", "--workload", "w", "--gap", "-1%"],
        ["place", "--cluster", "c", "--model", "m", "--workload", "w", "--strategy", "best"],
        ["schema", "Clustr"],
        ["check"],
    ],
)
def test_wrong_usage_exits_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == ExitCode.INVALID
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Usage: hetis-plan" in captured.err


def test_help_and_no_arguments_explain_and_list_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == ExitCode.OK
    text = " ".join(capsys.readouterr().out.split())
    for code in ExitCode:
        assert f"{code.value} {code.meaning.partition(',')[0]}" in text


def test_the_documentation_lists_every_exit_code() -> None:
    rows = DOCS.read_text(encoding="utf-8").replace("`", "")
    for code in ExitCode:
        assert f"| {code.value} | {code.meaning.partition(',')[0]}" in rows


def test_the_process_ends_with_the_code_and_leaves_stdout_to_data(tmp_path: Path) -> None:
    done = hetis_plan("validate", "missing.yaml", "-o", "json", cwd=tmp_path)
    assert done.returncode == ExitCode.INVALID
    assert done.stderr == "missing.yaml: no such file\n"
    assert '"no such file"' in done.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("output", ["table", "json"])
def test_a_full_disk_behind_stdout_is_told(output: str, unbuffered: str) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, "catalog", "gpus", "-o", output],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(PYTHONUNBUFFERED=unbuffered),
            check=False,
        )
    assert done.returncode == ExitCode.INTERNAL
    assert done.stderr == "error: No space left on device\n"


def test_help_loads_no_solver_and_no_parser() -> None:
    program = (
        "import sys; from hetis.planner.cli.app import run; run(['--help']); heavy = "
        "{'numpy', 'numba', 'highspy', 'pydantic', 'yaml'}; print(heavy & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment(), check=True
    )
    assert done.stderr == "set()\n"
