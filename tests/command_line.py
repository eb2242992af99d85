"""Runs a command of ours as users do: in a process of its own, at 80 columns, without colours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def command_of(module: str) -> list[str]:
    """Return what starts the command of a package: ``hetis.planner.cli``."""
    return [sys.executable, "-m", module]


def with_ctrl_c(command: list[str]) -> list[str]:
    """Starts a command that Ctrl-C ends as in a terminal: tests in the background ignore it, and so would the command.

    Not by a `preexec_fn`, which would run in a fork of this process: gRPC's threads do not survive that.
    """
    start = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    return [sys.executable, "-c", start, *command]


def environment(**changes: str) -> dict[str, str]:
    """This process's environment at 80 columns and without colours, changed."""
    kept = {name: value for name, value in os.environ.items() if name not in ("HETIS_DEBUG", "FORCE_COLOR")}
    return kept | {"COLUMNS": "80", "NO_COLOR": "1"} | changes


def run_command(
    command: list[str], *arguments: str, cwd: Path | None = None, timeout_s: float = 300
) -> subprocess.CompletedProcess[str]:
    """A whole run: exit code, stdout, stderr."""
    return subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        cwd=cwd,
        env=environment(),
        check=False,
    )
