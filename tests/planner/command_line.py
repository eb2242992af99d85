"""Runs ``hetis-plan`` as users do, in a process of its own, and as quickly as tests like, in this one."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from contextlib import chdir
from pathlib import Path
from unittest import mock

from typer.testing import CliRunner, Result

from hetis.planner.cli.app import app, run
from tests.command_line import command_of, environment, run_command

COMMAND = command_of("hetis.planner.cli")
EXAMPLES = Path(__file__).parents[2] / "examples"


def hetis_plan(*arguments: str, cwd: Path | None = None, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    """A whole run: exit code, stdout, stderr."""
    return run_command(COMMAND, *arguments, cwd=cwd, timeout_s=timeout_s)


def hetis_plan_here(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A whole run with its exit code and messages, in this process: imports and kernels are loaded once for all."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    with (
        chdir(cwd or Path.cwd()),
        mock.patch.dict(os.environ, environment(), clear=True),
        mock.patch.object(sys, "stdout", out),
        mock.patch.object(sys, "stderr", err),
    ):
        code = run(arguments)
    stdout, stderr = (stream.buffer.getvalue().decode() for stream in (out, err))  # type: ignore[attr-defined]
    return subprocess.CompletedProcess(arguments, code, stdout, stderr)


def invoke(*arguments: str) -> Result:
    """A run in this process. Errors that `run` would turn into messages come back as ``result.exception``."""
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "80", "NO_COLOR": "1"})
