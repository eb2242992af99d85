"""A folder in which command lines of pages run as for a reader: in bash, with our programs on the path."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.command_line import environment, with_ctrl_c
from tests.docs.pages import ROOT

MAINS = {
    "hetis-plan": "hetis.planner.cli.entry",
    "hetis-planner": "hetis.planner.service.main",
    "hetis-agent": "hetis.runtime.agent.__main__",
    "hetis-launch": "hetis.runtime.launch.__main__",
    "hetis-worker": "hetis.runtime.worker.__main__",
    "hetis-profile": "hetis.profiler.cli.main",
}
LIMIT_S = 300.0  # limit for a first line or an end, on a busy machine


class Session:
    """A shell's folder and environment. ``replaced`` maps text of pages to its replacement here."""

    def __init__(self, folder: Path, *, replaced: Mapping[str, str] | None = None, **variables: str) -> None:
        self.folder, self.replaced = folder, dict(replaced or {})
        programs = folder / ".programs"
        programs.mkdir()
        for name, module in MAINS.items():
            start = f"import sys; sys.argv[0] = {name!r}; from {module} import main; sys.exit(main())"
            (programs / name).write_text(
                f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -c {shlex.quote(start)} "$@"\n'
            )
            (programs / name).chmod(0o755)
        (folder / "examples").symlink_to(ROOT / "examples")
        here = {"XDG_STATE_HOME": str(folder / "state"), "XDG_CONFIG_HOME": str(folder), **variables}
        self.environment = environment(**here)
        self.environment["PATH"] = f"{programs}:{self.environment['PATH']}"

    def written(self, line: str) -> str:
        """Return the line with the page's text replaced."""
        for there, here in self.replaced.items():
            line = line.replace(there, here)
        return line

    def run(self, line: str, *, codes: tuple[int, ...] = (0,)) -> str:
        """Run a line that ends by itself with one of ``codes``, and return its output."""
        command = ["bash", "-o", "pipefail", "-c", self.written(line)]
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=900, check=False
        )
        assert done.returncode in codes, f"{line}\nends with {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    @contextmanager
    def running(self, line: str, until: str, *, end: signal.Signals = signal.SIGTERM, code: int = 0) -> Iterator[str]:
        """Run a line that does not end by itself, from when it prints the pattern ``until`` to a signal that ends it.

        Yields the output so far.
        """
        process = subprocess.Popen(
            with_ctrl_c(["bash", "-c", f"exec {self.written(line)}"]),
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        watchdog = threading.Timer(LIMIT_S, process.kill)
        watchdog.start()
        try:
            printed = ""
            while not re.search(until, printed):
                read = process.stdout.readline()
                assert read, f"{line}\nended, or said nothing of {until!r} for {LIMIT_S:g} s\n{printed}"
                printed += read
            watchdog.cancel()
            said, output = list[str](), process.stdout
            rest = threading.Thread(target=lambda: said.append(output.read()))  # a full pipe would block the command
            rest.start()
            yield printed
            process.send_signal(end)
            ended = process.wait(LIMIT_S)
            rest.join()
            assert ended == code, f"{line}\nended with {ended}\n{printed}{''.join(said)}"
        finally:
            watchdog.cancel()
            process.kill()
            process.wait()
            process.stdout.close()
