"""Runs ``hetis-plan`` as users do, in a process of its own, and as quickly as tests like, in this one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner, Result

from hetis.planner.cli.app import app

COMMAND = [sys.executable, "-m", "hetis.planner.cli"]
EXAMPLES = Path(__file__).parents[2] / "examples"


def environment(**changes: str) -> dict[str, str]:
    """This process's environment at 80 columns and without colours, changed."""
    kept = {name: value for name, value in os.environ.items() if name not in ("HETIS_DEBUG", "FORCE_COLOR")}
    return kept | {"COLUMNS": "80", "NO_COLOR": "1"} | changes


def hetis_plan(*arguments: str, cwd: Path | None = None, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    """A whole run: exit code, stdout, stderr."""
    return subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        cwd=cwd,
        env=environment(),
        check=False,
    )


def invoke(*arguments: str) -> Result:
    """A run in this process. Errors that `run` would turn into messages come back as ``result.exception``."""
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "80", "NO_COLOR": "1"})
