"""Runs our commands as users do, in a separate process, at 80 columns, without colours."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import chdir
from pathlib import Path
from unittest import mock


def command_of(module: str) -> list[str]:
    """Return the command line of a package such as ``hetis.planner.cli``."""
    return [sys.executable, "-m", module]


def with_ctrl_c(command: list[str]) -> list[str]:
    """Return a command that Ctrl-C ends as in a terminal; tests in the background and their children ignore it.

    A `preexec_fn` would run in a fork of this process, which gRPC's threads do not survive.
    """
    start = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execvp(sys.argv[1], sys.argv[1:])"
    return [sys.executable, "-c", start, *command]


def environment(**changes: str) -> dict[str, str]:
    """Return this process's environment at 80 columns, without colours, with changes."""
    kept = {name: value for name, value in os.environ.items() if name not in ("HETIS_DEBUG", "FORCE_COLOR")}
    return kept | {"COLUMNS": "80", "NO_COLOR": "1"} | changes


def run_command(
    command: list[str], *arguments: str, cwd: Path | None = None, timeout_s: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run a command and return its exit code, stdout and stderr."""
    return subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        cwd=cwd,
        env=environment(),
        check=False,
    )


def run_here(
    run: Callable[[Sequence[str]], int], *arguments: str, cwd: Path | None = None, **changes: str
) -> subprocess.CompletedProcess[str]:
    """Run a command's function in this process and return what `run_command` would; imports are loaded only once."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    with (
        chdir(cwd or Path.cwd()),
        mock.patch.dict(os.environ, environment(**changes), clear=True),
        mock.patch.object(sys, "stdout", out),
        mock.patch.object(sys, "stderr", err),
    ):
        code = run(arguments)
    stdout, stderr = (stream.buffer.getvalue().decode() for stream in (out, err))  # type: ignore[attr-defined]
    return subprocess.CompletedProcess(arguments, code, stdout, stderr)
