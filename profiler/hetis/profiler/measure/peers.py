"""Two processes on this host that exchange messages at the request of this one."""

from __future__ import annotations

import json
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO

from hetis.solver.errors import HetisError

START_LIMIT_S = 60.0
CALL_LIMIT_S = 120.0


class PeersLostError(HetisError):
    """The two processes did not answer. The message holds their last output."""


class PeerProcesses:
    """Starts both processes. A context manager that ends them."""

    def __init__(self, devices: tuple[str, str], command: list[str] | None = None) -> None:
        """Initialise with each process's device, ``cpu`` (gloo) or ``cuda:N`` (NCCL), and, for tests, a command."""
        self._command = command or [sys.executable, "-m", "hetis.profiler.measure.peer"]
        self._devices = devices
        self._folder = tempfile.TemporaryDirectory(prefix="hetis-peers-")
        self._processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> PeerProcesses:
        store = Path(self._folder.name) / "store"
        with open(self._log, "w", encoding="utf-8") as log:
            for rank, device in enumerate(self._devices):
                self._processes.append(
                    subprocess.Popen(
                        [*self._command, str(rank), str(store), device],
                        stdin=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                        stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                        stderr=log,
                        text=True,
                        start_new_session=True,  # this process handles Ctrl-C
                    )
                )
        return self

    def on(self, device: str) -> set[int]:
        """Return the processes that have ``device`` open."""
        return {process.pid for process, theirs in zip(self._processes, self._devices, strict=True) if theirs == device}

    def wait_until_ready(self) -> None:
        """Wait until both have connected. Raises PeersLostError if one of them failed, or took more than a minute."""
        self._answer(START_LIMIT_S)

    def timer(self, op: str, num_bytes: int) -> Callable[[int], float]:
        """Return a function for the seconds of n messages one way (``transfer``) or n all-reduces."""

        def time_calls(count: int) -> float:
            self._pipe("stdin").write(json.dumps({"op": op, "num_bytes": num_bytes, "count": count}) + "\n")
            try:
                self._pipe("stdin").flush()
            except OSError:
                raise self._lost("ended") from None
            return float(self._answer(CALL_LIMIT_S)["seconds"])

        return time_calls

    def _answer(self, limit_s: float) -> dict[str, float]:
        out = self._pipe("stdout")
        ready, _, _ = select.select([out], [], [], limit_s)
        line = out.readline() if ready else ""
        if not line:
            raise self._lost("ended" if ready else f"did not answer for {limit_s:.0f} s")
        answer: dict[str, float] = json.loads(line)
        return answer

    def _lost(self, what: str) -> PeersLostError:
        said = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = f": {said[-1]}" if said else ""
        return PeersLostError(
            f"the two processes that send messages between {' and '.join(self._devices)} {what}{last}"
        )

    def _pipe(self, name: str) -> IO[str]:
        pipe: IO[str] | None = getattr(self._processes[0], name)
        assert pipe is not None
        return pipe

    @property
    def _log(self) -> Path:
        return Path(self._folder.name) / "log"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    try:
                        pipe.close()
                    except OSError:  # no process reads it any more
                        continue
        for process in self._processes:
            try:
                process.wait(timeout=5 if error is None else 0.2)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._folder.cleanup()
