"""Runs ``hetis-profile`` as users do, in a process of its own, and as quickly as tests like, in this one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from hetis.profiler.cli.app import run

COMMAND = [sys.executable, "-m", "hetis.profiler.cli"]


def environment(**changes: str) -> dict[str, str]:
    """This process's environment at 80 columns and without colours, changed."""
    kept = {name: value for name, value in os.environ.items() if name not in ("HETIS_DEBUG", "FORCE_COLOR")}
    return kept | {"COLUMNS": "80", "NO_COLOR": "1"} | changes


def hetis_profile(*arguments: str, cwd: Path | None = None, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
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


def invoke(*arguments: str | Path) -> int:
    """A run in this process; what it prints is captured by pytest."""
    return run([str(argument) for argument in arguments])
