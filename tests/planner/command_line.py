"""Runs ``hetis-plan`` as users do, in a separate process, and faster, in this process."""

from __future__ import annotations

import subprocess
from pathlib import Path
from unittest import mock

from typer.testing import CliRunner, Result

from hetis.commands.verb import click_command
from hetis.planner.cli.app import app, run
from tests.command_line import command_of, run_command, run_here

COMMAND = command_of("hetis.planner.cli")
EXAMPLES = Path(__file__).parents[2] / "examples"


def hetis_plan(*arguments: str, cwd: Path | None = None, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    """Run the command to its end; return exit code, stdout and stderr."""
    return run_command(COMMAND, *arguments, cwd=cwd, timeout_s=timeout_s)


def hetis_plan_here(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command to its end in this process, with exit code and messages; imports are loaded only once."""
    return run_here(run, *arguments, cwd=cwd)


def invoke(*arguments: str, columns: int = 80) -> Result:
    """Run the command in this process. Errors that `run` would turn into messages come back as ``result.exception``."""
    with mock.patch("typer.testing._get_command", click_command):  # built once
        return CliRunner().invoke(app, list(arguments), env={"COLUMNS": str(columns), "NO_COLOR": "1"})


def unfolded(frame: str) -> str:
    """Return the words in a framed message on the terminal."""
    return " ".join(frame.replace("│", " ").split())
