"""The processes of the demo: planner, agent, `hetis-serve` and its attention workers."""

from __future__ import annotations

import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from examples.processes import DemoProcesses, ProcessError

START_S = 900  # the first start compiles kernels, which takes minutes on a busy machine


class Processes(DemoProcesses):
    """Everything that the demo starts."""

    def __init__(self, folder: Path, workers: tuple[str, ...]) -> None:
        super().__init__(folder)
        self._workers = workers
        self._store = f"127.0.0.1:{_free_port()}"
        self._engine = folder / "engine.sock"

    def start_agent(self, server: str, *, node: str, devices: str) -> None:
        """It calls the planner, and the engine at its socket as soon as that is there."""
        command = ["hetis-agent", "--server", server, "--node", node, "--engine", f"unix://{self._engine}"]
        command += ["--simulated-devices", devices, "--state-dir", str(self.folder / "agent")]
        self._start("agent", command)

    def start_worker(self, name: str, kv_memory: str) -> None:
        """It says in the store where it is; the server waits for that."""
        command = [Path(sys.executable).name, "-m", "hetis.runtime.worker", "--name", name]
        self._start(_file(name), [*command, "--store", self._store, "--kv-memory", kv_memory])

    def kill_worker(self, name: str) -> None:
        """As a power cut would."""
        self.kill(_file(name))

    def start_server(self, model: Path, *options: str) -> str:
        """Its address, once it serves. Raises ProcessError: it does not."""
        command = ["hetis-serve", "--model", str(model), "--port", "0", "--threads", "1", "--store", self._store]
        command += ["--executor", f"unix:{self._engine}", *options]
        for name in self._workers:
            command += ["--worker", name]
        self._start("server", command)

        def address() -> str:
            found = re.search(r"serving \S+ at (http://\S+)", self.tail("server", 40))
            return found[1] if found else ""

        self.wait_until(address, "hetis-serve serves")
        return address()

    def end_server(self) -> None:
        """As Kubernetes would: SIGTERM. Raises ProcessError: it did not end well."""
        self._running["server"].terminate()
        if self._running["server"].wait(60) != 0:
            raise ProcessError(f"hetis-serve did not end well:\n{self.tail('server', 40)}")

    def wait_until(self, is_so: Callable[[], object], what: str, *, timeout_s: float = START_S) -> float:
        """As `DemoProcesses.wait_until`, for as long as such processes need to start."""
        return super().wait_until(is_so, what, timeout_s=timeout_s)


def _file(name: str) -> str:
    return name.replace("/", "-")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
