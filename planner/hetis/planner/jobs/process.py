"""A solver process, and what its end means."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

from hetis.planner.jobs.frames import JobFrame, receive_frame, to_bytes
from hetis.planner.jobs.messages import Crashed

# -P: import nothing from the service's working directory.
WORKER_COMMAND = (sys.executable, "-P", "-m", "hetis.planner.jobs.worker")
_LAST_LINES = 20  # lines of a process's standard error that are kept for the message about its end


class SolverProcess:
    """A running process, which ends when `stop` is called, when it crashes, or with the service."""

    def __init__(self, process: Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        self._process = process
        self._stdin, self._stdout = process.stdin, process.stdout
        self._last_lines: deque[str] = deque(maxlen=_LAST_LINES)
        self._stderr_read = asyncio.create_task(self._read_stderr(process.stderr))
        self.num_searches = 0

    @classmethod
    async def start(cls, command: Sequence[str] = WORKER_COMMAND) -> SolverProcess:
        """Start a process, which sends ``ready`` once it has loaded the solver.

        It has a session of its own, so that Ctrl-C in the service's terminal does not reach it. It is a new program
        rather than a fork of this process, which has threads.
        """
        return cls(
            await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, stderr=PIPE, start_new_session=True)
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.returncode is None

    def send(self, frame: JobFrame) -> None:
        """Send a frame. A process that has ended does not receive it; `receive` then reports the end."""
        if not self._stdin.is_closing():
            self._stdin.write(to_bytes(frame))

    async def receive(self) -> JobFrame | None:
        """Return the next frame, or None if the process has ended."""
        return await receive_frame(self._stdout)

    def kill(self) -> None:
        # Not Process.kill(), which polls the process first, so that asyncio loses its exit code.
        if self.is_alive:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    async def ended(self) -> int:
        """Wait until the process ends and return its exit code, negative for a signal."""
        exit_code = await self._process.wait()
        await self._stderr_read
        return exit_code

    async def stop(self) -> int:
        """End the process, whatever it is doing, and return its exit code."""
        self._stdin.close()
        self.kill()
        return await self.ended()

    def last_words(self) -> str:
        """Return the last line of standard error, which is the error itself if there was a traceback; may be empty."""
        return self._last_lines[-1] if self._last_lines else ""

    def last_lines(self) -> str:
        return "\n".join(self._last_lines)

    async def _read_stderr(self, stderr: asyncio.StreamReader) -> None:
        while piece := await stderr.read(1 << 16):
            self._last_lines.extend(line for line in piece.decode(errors="replace").splitlines() if line.strip())


def crash_of(exit_code: int, why: str) -> Crashed:
    if exit_code >= 0:
        ending = f"the solver process ended with exit code {exit_code}"
    else:
        ending = f"the solver process was ended by {_signal_name(-exit_code)}"
    return Crashed(exit_code=exit_code, message=f"{ending}: {why}" if why else ending)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
