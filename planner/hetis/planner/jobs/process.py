"""The service's side of one solver process."""

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

# -P: what lies in the service's working directory is not imported.
WORKER_COMMAND = (sys.executable, "-P", "-m", "hetis.planner.jobs.worker")
_LAST_LINES = 20  # of what a process writes to its standard error, for the message about its end


class SolverProcess:
    """A process that was started; it ends when `stop` is called, when it crashes, or with the service."""

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
        """Starts a process; it says ``ready`` when it has loaded the solver.

        A session of its own keeps Ctrl-C in the service's terminal away from it. No fork of this process, which has
        threads: a new program.
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
        """Tells the process; one that has ended hears nothing, and `receive` says so."""
        if not self._stdin.is_closing():
            self._stdin.write(to_bytes(frame))

    async def receive(self) -> JobFrame | None:
        """The next frame; None: the process has ended."""
        return await receive_frame(self._stdout)

    def kill(self) -> None:
        # Not Process.kill(): that looks after the process first, and takes its exit code away from asyncio.
        if self.is_alive:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    async def ended(self) -> int:
        """Waits for the end of the process and returns its exit code, negative for a signal."""
        exit_code = await self._process.wait()
        await self._stderr_read
        return exit_code

    async def stop(self) -> int:
        """Ends the process, whatever it does, and returns its exit code."""
        self._stdin.close()
        self.kill()
        return await self.ended()

    def last_words(self) -> str:
        """The last line that it wrote to standard error, which is the error's own in a traceback; may be empty."""
        return self._last_lines[-1] if self._last_lines else ""

    def last_lines(self) -> str:
        return "\n".join(self._last_lines)

    async def _read_stderr(self, stderr: asyncio.StreamReader) -> None:
        while piece := await stderr.read(1 << 16):
            self._last_lines.extend(line for line in piece.decode(errors="replace").splitlines() if line.strip())
