"""The processes of a demo, which are commands of this installation and are all stopped at the end."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Self

# Variables of all processes of a demo, for those that compute on CPUs: a thread each, and tensors up to 32 MiB that the
# C library keeps and does not return to the kernel. KV that grows with every token costs half as much CPU time again
# otherwise.
ON_CPUS = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_ports(count: int = 1) -> int:
    """Return the first of ``count`` consecutive ports that nothing listens on.

    The kernel gives none of them away before a server takes it: they lie below those of outgoing connections, where a
    port that was free a second ago may be the local end of another process's connection.
    """
    ephemeral = int(_EPHEMERAL.read_text().split()[0]) if _EPHEMERAL.exists() else 32_768
    while True:
        first = random.randrange(10_000, max(ephemeral, 12_000) - count)
        if all(_can_listen(port) for port in range(first, first + count)):
            return first


def listens(port: int) -> bool:
    """Return whether a server listens on the port of this machine."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=2).close()
    except OSError:
        return False
    return True


def kernel_cache(python: Path) -> dict[str, str]:
    """Return the environment variable that gives a Python of another virtual environment a folder for compiled kernels.

    It is empty if that Python's numba has this one's version, for then both share what either has compiled, or if the
    caller has chosen a folder. Two versions in one folder would each discard what the other has compiled.
    """
    if "NUMBA_CACHE_DIR" in os.environ:
        return {}
    environment = python.parents[1]
    if any(environment.glob(f"lib/python*/site-packages/numba-{version('numba')}.dist-info")):
        return {}
    return {"NUMBA_CACHE_DIR": str(environment / "numba")}


def _can_listen(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


class ProcessError(Exception):
    """A process of the demo did not start, or ended on its own; the message ends with the last lines of its log."""


class DemoProcesses:
    """The processes of a demo. Logs go to ``folder``; leaving the context stops every process by its id.

    A SIGTERM leaves the context, too: its default is to end this process alone.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.status_page = ""  # address of the last planner's status page
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._at_sigterm = signal.getsignal(signal.SIGTERM)

    def __enter__(self) -> Self:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it would leave running what is not stopped yet
        try:
            self.stop(list(self._running))
        finally:
            signal.signal(signal.SIGTERM, self._at_sigterm)

    def start_planner(self, *, listen: str, lease: str, heartbeat: str) -> str:
        """Start the planner and return its address once it serves."""
        command = [
            *("hetis-planner", "--listen", listen, "--status-page", "127.0.0.1:0", "--ready-json"),
            *("--store", f"sqlite:///{self.folder}/planner.db", "--set", "solver.processes=1"),
            *("--set", f"agents.lease={lease}", "--set", f"agents.heartbeat={heartbeat}"),
        ]
        planner = self._start("planner", command, stdout=subprocess.PIPE)
        assert planner.stdout is not None
        line = planner.stdout.readline()
        if not line:
            raise ProcessError(f"the planner did not start\n{self.tail('planner')}")
        ready = json.loads(line)
        address: str = ready["listen"][0]
        self.status_page = ready["status_page"]
        return address

    def kill(self, name: str) -> None:
        """Kill the process like a power cut, without a chance to clean up."""
        process = self._running.pop(name)
        process.kill()
        _wait(process)

    def stop(self, names: Iterable[str]) -> None:
        """Send SIGTERM to all of them, and kill those still running after ten seconds."""
        stopping = [self._running.pop(name) for name in names]
        for process in stopping:
            process.send_signal(signal.SIGTERM)
        for process in stopping:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
            _wait(process)

    def hetis_plan(self, *words: str) -> str:
        """Run ``hetis-plan`` to its end and return its output. Raises ProcessError if it failed."""
        command = [str(Path(sys.executable).with_name("hetis-plan")), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise ProcessError(f"hetis-plan {' '.join(words)} ended with {done.returncode}:\n{done.stderr}")
        return done.stdout

    def check(self) -> None:
        """Raise ProcessError if a process ended without being killed."""
        for name, process in self._running.items():
            if process.poll() is not None:
                raise ProcessError(f"{name} ended with exit code {process.returncode}\n{self.tail(name)}")

    def wait_until(self, is_so: Callable[[], object], what: str, *, timeout_s: float) -> float:
        """Wait until the condition holds, and return the seconds it took.

        Raises:
            ProcessError: it does not hold in time, or a process ended without being killed.
        """
        started_s = time.monotonic()
        while not is_so():
            self.check()
            if time.monotonic() > started_s + timeout_s:
                logs = "\n".join(f"--- {name}\n{self.tail(name)}" for name in self._running)
                raise ProcessError(f"waited {timeout_s:.0f} s in vain until {what}\n{logs}")
            time.sleep(0.2)  # each look is a call to the planner, whose cores engines need while they start
        return time.monotonic() - started_s

    def tail(self, name: str, lines: int = 15) -> str:
        """Return the last lines of a process's log."""
        text = (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def _start(
        self, name: str, command: list[str], stdout: int | None = None, *, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Run a command of this installation, or another one by its full path."""
        program = Path(command[0])
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [program if program.is_absolute() else Path(sys.executable).with_name(command[0]), *command[1:]],
                stdout=log if stdout is None else stdout,
                stderr=log,
                env=os.environ | ON_CPUS | dict(environment or {}),
            )
        self._running[name] = process
        return process


def _wait(process: subprocess.Popen[bytes]) -> None:
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
