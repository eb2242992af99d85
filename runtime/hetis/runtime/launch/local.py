"""Processes on this machine. They end when this process does, whatever ends it."""

from __future__ import annotations

import errno
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType

from hetis.engines.commands import Command
from hetis.engines.errors import OptionError
from hetis.engines.layout import ProcessKind
from hetis.runtime.launch.supervising import supervise
from hetis.runtime.transport.keys import InvalidKeyError, read_key

_LOOK_S = 0.2
_log = logging.getLogger(__name__)
_PR_SET_PDEATHSIG = 1


def prepare(commands: Sequence[Command], *, may_draw_key: bool) -> dict[str, str]:
    """Write the files that the commands need here, and return the secrets among them, by path.

    Args:
        may_draw_key: generate a missing key, because no other machine needs to know it.

    Raises:
        OptionError: keys are missing or files cannot be written. It names all of them.
    """
    wrong, found = [], {}
    for name in dict.fromkeys(name for command in commands for name in command.secrets):
        try:
            if may_draw_key and not Path(name).exists():
                write_file(name, secrets.token_urlsafe(24), mode=0o600)
            read_key(Path(name), {})
            found[name] = Path(name).read_text(encoding="utf-8")
        except InvalidKeyError as error:
            wrong.append(f"--key-file {error}")
        except OSError as error:
            wrong.append(f"--key-file {name}: {error.strerror}")
    for name, text in {name: text for command in commands for name, text in command.files.items()}.items():
        try:
            write_file(name, text, mode=0o644)
        except OSError as error:
            wrong.append(f"--folder {name}: {error.strerror}")
    if wrong:
        raise OptionError(*wrong)
    return found


def write_file(name: str, text: str, *, mode: int) -> None:
    """Write a file, creating its folder. Raises OSError."""
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    with open(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w", encoding="utf-8") as file:
        file.write(text)


def run_here(commands: Sequence[Command]) -> int:
    """Start the processes and supervise them until vLLM ends or SIGTERM or SIGINT arrives. Returns the exit code."""
    told = Told()
    with told.by_signals():
        return supervise(commands, start, told=lambda: told.times, clock=time.monotonic, wait=told.wait)


def start(command: Command, log: Path | None = None) -> Started:
    """Start a process in its own group, so that Ctrl-C reaches only this one, which forwards it.

    Args:
        log: the file that its output is appended to; None for our own output.

    Raises:
        OSError: there is no such program, or the file cannot be written.
    """
    environment = os.environ | dict(command.environment)
    words = words_of(command)
    if sys.platform == "linux":
        words = _ending_with_parent(words, environment)
    with ExitStack() as stack:
        output = None if log is None else stack.enter_context(log.open("ab"))
        process = subprocess.Popen(
            words, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    _log.info("%s: process %d", command.process.name, process.pid)
    return Started(process)


def words_of(command: Command) -> tuple[str, ...]:
    """Return the command line: a worker runs with the current Python, while vLLM may have its own."""
    if command.process.kind is ProcessKind.ATTENTION_WORKER:
        return (sys.executable, "-m", "hetis.runtime.worker", *command.shown[1:])
    return command.shown


class Started:
    """A process and its descendants, none of which is left when it has ended."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process, self.pid = process, process.pid

    def poll(self) -> int | None:
        code = self._process.poll()
        if code is not None:
            # vLLM's engine and ranks are separate processes, which would keep their GPUs and the front end's port.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        return code

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self.poll()


def names_of_this_machine() -> tuple[str, ...]:
    """Return the names that a plan may use for this node: its host name in full and up to the first dot."""
    name = socket.gethostname()
    return tuple(dict.fromkeys((name, name.partition(".")[0])))


class Told:
    """Counts requests to end, by a signal or `tell`, and provides a wait that they cut short."""

    def __init__(self) -> None:
        self.times = 0
        self._came = threading.Event()

    @contextmanager
    def by_signals(self) -> Iterator[None]:
        """Count SIGTERM and SIGINT while the context is entered."""
        before = {number: signal.signal(number, self.hear) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def hear(self, number: int, frame: FrameType | None) -> None:
        self.tell()

    def tell(self) -> None:
        """Count one more request; safe from any thread."""
        self.times += 1
        self._came.set()

    def wait(self) -> None:
        """Wait a moment, or until a request arrives."""
        if self._came.wait(_LOOK_S):
            self._came.clear()


def _ending_with_parent(words: Sequence[str], environment: Mapping[str, str]) -> tuple[str, ...]:
    """Return words that run the program such that the kernel sends it SIGTERM if we are killed.

    The program asks for that itself, by way of a few lines of Python that become it: nothing can be done safely between
    fork and exec of a process with threads, such as an agent's.
    """
    program = shutil.which(words[0], path=environment.get("PATH"))
    if program is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), words[0])
    return (sys.executable, "-I", "-S", "-c", _BECOME, str(os.getpid()), *words)


_BECOME = f"""
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl({_PR_SET_PDEATHSIG}, signal.SIGTERM, 0, 0, 0)
if os.getppid() == int(sys.argv[1]):  # else it was killed before we could ask
    os.execvp(sys.argv[2], sys.argv[2:])
"""
