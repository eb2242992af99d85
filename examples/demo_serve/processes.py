"""The processes of the demo: `hetis-serve` and its attention workers."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

START_S = 120
_QUIET = {"OMP_NUM_THREADS": "1"}


class ProcessError(RuntimeError):
    """A process did not do what the demo needs; the message has its log."""


class Processes:
    """Starts them, knows their logs, and ends them all, whatever happens."""

    def __init__(self, folder: Path, workers: tuple[str, ...]) -> None:
        self._folder, self._workers = folder, workers
        self._store = f"127.0.0.1:{_free_port()}"
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._running.values():
            if process.poll() is None:
                process.kill()
            process.wait()

    def start_worker(self, name: str, kv_memory: str) -> None:
        """It says in the store where it is; the server waits for that."""
        self._start(name, "hetis.runtime.worker", "--name", name, "--store", self._store, "--kv-memory", kv_memory)

    def kill(self, name: str) -> None:
        self._running[name].kill()
        self._running[name].wait()

    def start_server(self, model: Path, *options: str) -> str:
        """Its address, once it serves.

        Raises:
            ProcessError: it does not.
        """
        arguments = ["--model", str(model), "--port", "0", "--threads", "1", "--store", self._store, *options]
        for name in self._workers:
            arguments += ["--worker", name]
        self._start("server", "hetis.runtime.server.main", *arguments)
        deadline_s = time.monotonic() + START_S
        while time.monotonic() < deadline_s and self._running["server"].poll() is None:
            if found := re.search(r"serving \S+ at (http://\S+)", self._log("server")):
                return found[1]
            time.sleep(0.05)
        raise ProcessError(f"hetis-serve did not start:\n{self._log('server')}")

    def end_server(self) -> None:
        """As Kubernetes would: SIGTERM. Raises ProcessError: it did not end well."""
        self._running["server"].terminate()
        if self._running["server"].wait(60) != 0:
            raise ProcessError(f"hetis-serve did not end well:\n{self._log('server')}")

    def _start(self, name: str, module: str, *arguments: str) -> None:
        with (self._folder / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(
                [sys.executable, "-m", module, *arguments], stdout=log, stderr=log, env=os.environ | _QUIET
            )

    def _log(self, name: str) -> str:
        return (self._folder / f"{name}.log").read_text(encoding="utf-8")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
