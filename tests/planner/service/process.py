"""`hetis-planner` as a separate process; run as a module, it serves a `FakePlanner`, with the same options."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from hetis.commands.process import command_process
from tests.command_line import run_here

FAKE = "tests.planner.service.process"
REAL = "hetis.planner.service.main"
ROOT = Path(__file__).parents[3]
LIMIT_S = 300.0  # limit for steps that take seconds, on a busy machine


class Process:
    """A started planner and its output. Use it as a context manager: it is killed at the end."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        folder: Path,
        module: str = FAKE,
        environment: dict[str, str] | None = None,
        within: Sequence[str] = (),
    ) -> None:
        """``within``: a command that replaces itself by the rest of its line, such as `unshare`."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HETIS_", "GRPC_"))}
        # A file, because a pipe that is not read would block the planner when it is full.
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed at the end of the context
        self._process = subprocess.Popen(
            [*within, sys.executable, "-m", module, *arguments],
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            cwd=folder,
            env=kept | {"PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(folder)} | (environment or {}),
        )

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()
        self._stderr.close()

    def ready(self, timeout_s: float = LIMIT_S) -> Any:
        """Return what ``--ready-json`` printed."""
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], timeout_s)
        line = self._process.stdout.readline() if readable else ""
        if not line:
            self._process.kill()
            raise AssertionError(f"not ready: {self.end()[1]}")
        return json.loads(line)

    @property
    def pid(self) -> int:
        return self._process.pid

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def said(self) -> str:
        """Return the stderr so far."""
        # Not by seek and read: the planner writes at the position of the same open file.
        return os.pread(self._stderr.fileno(), 1 << 24, 0).decode(errors="replace")

    def until_said(self, words: str, timeout_s: float = LIMIT_S) -> None:
        end_s = time.monotonic() + timeout_s
        while words not in (said := self.said()):
            assert time.monotonic() < end_s, said
            time.sleep(0.02)

    def end(self, timeout_s: float = LIMIT_S) -> tuple[int, str]:
        """Wait for the end; return exit code and stderr."""
        self._process.communicate(timeout=timeout_s)
        self._stderr.seek(0)
        return self._process.returncode, self._stderr.read()


def finished(arguments: Sequence[str], *, folder: Path, **environment: str) -> tuple[int, str, str, float]:
    """Return exit code, stdout, stderr and seconds of a real `hetis-planner` that ends by itself."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HETIS_")}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", REAL, *arguments],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        cwd=folder,
        env=kept | {"COLUMNS": "120", "NO_COLOR": "1", "XDG_STATE_HOME": str(folder)} | environment,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr, time.monotonic() - began


def finished_here(arguments: Sequence[str], *, folder: Path, **changes: str) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr of a command line that ends by itself, in this process."""
    from hetis.planner.service.command import run

    with mock.patch.dict(os.environ):
        for name in [name for name in os.environ if name.startswith("HETIS_")]:
            del os.environ[name]
        done = run_here(run, *arguments, cwd=folder, COLUMNS="120", XDG_STATE_HOME=str(folder), **changes)
    return done.returncode, done.stdout, done.stderr


if __name__ == "__main__":
    from hetis.planner.service import actions, command
    from tests.planner.service import fakes

    opened = fakes.open_held if os.environ.get("FAKE_STORE") == "held" else fakes.open_fake

    def serve(path: str | None, flags: Sequence[Any], *, ready_json: bool) -> None:
        actions.serve_with(opened, path, flags, ready_json=ready_json)

    setattr(actions, "serve", serve)  # noqa: B010  # the command looks it up there
    with command_process("hetis-planner", extra="planner"):
        sys.exit(command.run(sys.argv[1:]))
