"""Runs ``hetis-profile`` as users do, in a separate process, and faster, in this process."""

from __future__ import annotations

import subprocess
from pathlib import Path

from hetis.profiler.cli.app import run
from tests.command_line import command_of, run_command

COMMAND = command_of("hetis.profiler.cli")


def hetis_profile(*arguments: str, cwd: Path | None = None, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    """Run the command to its end; return exit code, stdout and stderr."""
    return run_command(COMMAND, *arguments, cwd=cwd, timeout_s=timeout_s)


def invoke(*arguments: str | Path) -> int:
    """Run the command in this process; pytest captures its output."""
    return run([str(argument) for argument in arguments])
