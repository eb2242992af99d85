"""Attention workers as processes, started once per test module and met anew by each test, over any channel."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hetis.runtime.kv.shape import KvShape
from hetis.runtime.transport.connecting import ChannelKind, look_up, open_store
from hetis.runtime.worker.joining import join
from hetis.runtime.worker.remote import RemoteDevice


class WorkerProcesses:
    """Some workers, and the store where they say where they are. Each engine gets an epoch above the last."""

    def __init__(self, count: int, logs: Path, *, device: str = "cpu") -> None:
        self.store: Any = open_store("127.0.0.1:0", is_master=True)
        self.names = [f"w{i}" for i in range(count)]
        self._logs, self._device = logs, device
        self.processes = {name: self._launch(name) for name in self.names}
        self.epoch = 0

    def join(
        self, names: list[str], shape: KvShape, *, kind: ChannelKind = ChannelKind.AUTO, timeout_s: float = 30.0
    ) -> list[RemoteDevice]:
        self.epoch += 1
        return [
            join(
                name,
                look_up(self.store, name, timeout_s=60),
                shape,
                epoch=self.epoch,
                kind=kind,
                timeout_s=timeout_s,
            )
            for name in names
        ]

    def restart(self, name: str) -> None:
        """Kills a worker, if it lives, and starts another of its name."""
        self.end(name)
        self.store.delete_key(f"hetis/worker/{name}")
        self.processes[name] = self._launch(name)

    def end(self, name: str) -> None:
        process = self.processes[name]
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait(30)

    def _launch(self, name: str) -> subprocess.Popen[bytes]:
        arguments = ["--name", name, "--store", f"127.0.0.1:{self.store.port}"]
        arguments += ["--kv-memory", "4MiB", "--timeout", "30", "--device", self._device]
        with (self._logs / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "hetis.runtime.worker", *arguments], stdout=log, stderr=log, env=os.environ
            )


@contextmanager
def worker_processes(count: int, logs: Path, *, device: str = "cpu") -> Iterator[WorkerProcesses]:
    workers = WorkerProcesses(count, logs, device=device)
    try:
        yield workers
    finally:
        for name in workers.names:
            workers.end(name)
