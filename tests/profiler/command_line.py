"""Runs ``hetis-profile`` as users do, in a process of its own, and as quickly as tests like, in this one."""

from __future__ import annotations

import subprocess
from pathlib import Path

from hetis.profiler.cli.app import run
from tests.command_line import command_of, run_command

COMMAND = command_of("hetis.profiler.cli")


def hetis_profile(*arguments: str, cwd: Path | None = None, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    """A whole run: exit code, stdout, stderr."""
    return run_command(COMMAND, *arguments, cwd=cwd, timeout_s=timeout_s)


def invoke(*arguments: str | Path) -> int:
    """A run in this process; what it prints is captured by pytest."""
    return run([str(argument) for argument in arguments])
