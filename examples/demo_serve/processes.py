"""The processes of the demo: planner, agent, `hetis-serve` and its attention workers."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Self

START_S = 900  # the first start compiles kernels, which takes minutes on a busy machine
_QUIET = {"OMP_NUM_THREADS": "1"}


class ProcessError(RuntimeError):
    """A process did not do what the demo needs; the message has its log."""


class Processes:
    """Starts them, knows their logs, and ends them all, whatever happens."""

    def __init__(self, folder: Path, workers: tuple[str, ...]) -> None:
        self._folder, self._workers = folder, workers
        self._store = f"127.0.0.1:{_free_port()}"
        self._engine = folder / "engine.sock"
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
            if process.stdout is not None:
                process.stdout.close()

    def start_planner(self) -> str:
        """Its address, once it serves. Raises ProcessError: it does not."""
        command = ["hetis-planner", "--listen", "127.0.0.1:0", "--status-page", "off", "--ready-json"]
        command += ["--store", f"sqlite:///{self._folder}/planner.db", "--set", "solver.processes=1"]
        command += ["--set", "agents.heartbeat=250ms", "--set", "agents.lease=10s"]
        planner = self._start("planner", _installed(command), stdout=subprocess.PIPE)
        assert planner.stdout is not None
        line = planner.stdout.readline()
        if not line:
            raise ProcessError(f"hetis-planner did not start:\n{self._log('planner')}")
        address: str = json.loads(line)["listen"][0]
        return address

    def start_agent(self, server: str, *, node: str, devices: str) -> None:
        """It calls the planner, and the engine at its socket as soon as that is there."""
        command = ["hetis-agent", "--server", server, "--node", node, "--engine", f"unix://{self._engine}"]
        command += ["--simulated-devices", devices, "--state-dir", str(self._folder / "agent")]
        self._start("agent", _installed(command))

    def start_worker(self, name: str, kv_memory: str) -> None:
        """It says in the store where it is; the server waits for that."""
        command = ["-m", "hetis.runtime.worker", "--name", name, "--store", self._store, "--kv-memory", kv_memory]
        self._start(_file(name), [sys.executable, *command])

    def kill(self, name: str) -> None:
        """A worker, as a power cut would."""
        self._running[_file(name)].kill()
        self._running[_file(name)].wait()

    def start_server(self, model: Path, *options: str) -> str:
        """Its address, once it serves. Raises ProcessError: it does not."""
        command = ["hetis-serve", "--model", str(model), "--port", "0", "--threads", "1", "--store", self._store]
        command += ["--executor", f"unix:{self._engine}", *options]
        for name in self._workers:
            command += ["--worker", name]
        self._start("server", _installed(command))

        def address() -> str:
            found = re.search(r"serving \S+ at (http://\S+)", self._log("server"))
            return found[1] if found else ""

        self.wait_until(address, "hetis-serve serves")
        return address()

    def end_server(self) -> None:
        """As Kubernetes would: SIGTERM. Raises ProcessError: it did not end well."""
        self._running["server"].terminate()
        if self._running["server"].wait(60) != 0:
            raise ProcessError(f"hetis-serve did not end well:\n{self._log('server')}")

    def wait_until(self, holds: Callable[[], object], what: str) -> None:
        """Raises ProcessError: it does not hold in time, or a process that is needed has ended."""
        deadline_s = time.monotonic() + START_S
        while not holds():
            for name in ("planner", "agent", "server"):
                process = self._running.get(name)
                if process is not None and process.poll() is not None:
                    raise ProcessError(f"{name} has ended:\n{self._log(name)}")
            if time.monotonic() > deadline_s:
                logs = "\n".join(f"--- {name}\n{self._log(name)}" for name in self._running)
                raise ProcessError(f"waited {START_S} s in vain until {what}\n{logs}")
            time.sleep(0.05)

    def _start(self, name: str, command: list[str], stdout: IO[bytes] | int | None = None) -> subprocess.Popen[bytes]:
        with (self._folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(command, stdout=stdout or log, stderr=log, env=os.environ | _QUIET)
        self._running[name] = process
        return process

    def _log(self, name: str, lines: int = 40) -> str:
        text = (self._folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.splitlines()[-lines:])


def _installed(command: list[str]) -> list[str]:
    """A command of this installation."""
    return [str(Path(sys.executable).with_name(command[0])), *command[1:]]


def _file(name: str) -> str:
    return name.replace("/", "-")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
