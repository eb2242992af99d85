"""An engine in a process of its own, and the CPU seconds that it and all its children take for a batch of prompts."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

ROOT = Path(__file__).parents[2]
LIMIT_S = 900.0  # for one answer; whoever takes longer hangs
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
# One thread each: on few shared cores more of them wait for each other, and what is measured is the neighbours.
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")


class EngineFailedError(Exception):
    """The engine's process ended, or hung; the message is the end of its log."""


class Run(NamedTuple):
    """One batch: token ids of every answer, CPU seconds of the whole process tree, wall seconds."""

    tokens: list[list[int]]
    cpu_s: float
    wall_s: float


class EngineProcess:
    """A process that runs `benchmarks.measuring.engine_answering`; stopped at the end of the context."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        """Starts it; `wait_until_ready` before anything else."""
        self._log = log.open("w+")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=ROOT,
            env={**os.environ, **ONE_THREAD, "HF_HUB_OFFLINE": "1", **environment},
        )

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(BrokenPipeError):  # it has ended, and took nothing of the last request
            self._of("stdin").close()  # which ends it, and lets it end its children
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._of("stdout").close()
        self._log.close()

    def wait_until_ready(self) -> None:
        """Raises EngineFailedError."""
        self._read()

    def generate(self, prompts: list[list[int]], tokens: int) -> Run:
        """Raises EngineFailedError."""
        before_cpu_s, before_s = tree_cpu_s(self._process.pid), time.monotonic()
        try:
            print(json.dumps({"prompts": prompts, "tokens": tokens}), file=self._of("stdin"), flush=True)
        except BrokenPipeError as error:
            raise EngineFailedError(self._end_of_log()) from error
        answered: list[list[int]] = self._read()
        return Run(answered, tree_cpu_s(self._process.pid) - before_cpu_s, time.monotonic() - before_s)

    # --- inside

    def _read(self) -> Any:
        watch = threading.Timer(LIMIT_S, self._process.kill)
        watch.start()
        try:
            line = self._of("stdout").readline()
        finally:
            watch.cancel()
        if not line:
            self._process.wait()
            raise EngineFailedError(self._end_of_log())
        return json.loads(line)

    def _of(self, name: str) -> IO[str]:
        stream: IO[str] | None = getattr(self._process, name)
        assert stream is not None, "it was started with pipes"
        return stream

    def _end_of_log(self) -> str:
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().splitlines() if line.strip()]
        return lines[-1] if lines else f"exit code {self._process.returncode}"


def tree_cpu_s(pid: int) -> float:
    """CPU seconds of a process and all its descendants, those that have ended included."""
    parents: dict[int, list[int]] = {}
    times: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
        parents.setdefault(int(fields[1]), []).append(int(folder.name))
        times[int(folder.name)] = sum(int(field) for field in fields[11:15])
    total, found = 0, [pid]
    while found:
        one = found.pop()
        total += times.get(one, 0)
        found += parents.get(one, [])
    return total / _TICKS_PER_S
