"""Runs ``hetis-profile`` in this process, and as users do, in a separate one."""

from __future__ import annotations

import subprocess
from pathlib import Path

from hetis.profiler.cli.app import run
from tests.command_line import command_of, run_command, run_here

COMMAND = command_of("hetis.profiler.cli")


def hetis_profile(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command at 80 columns; return exit code, stdout and stderr."""
    return run_here(run, *arguments, cwd=cwd)


def hetis_profile_process(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, as a run does that measures."""
    return run_command(COMMAND, *arguments, cwd=cwd)


def invoke(*arguments: str | Path) -> int:
    """Run the command in this process; pytest captures its output."""
    return run([str(argument) for argument in arguments])
