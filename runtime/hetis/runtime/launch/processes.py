"""The processes of a replica on this machine: started, kept running as long as vLLM is to run, and ended with this one.

All decisions are in `Supervision`, which has no processes and no clock. `supervise` applies them.
"""

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hetis.engines.commands import STOPS_S, Command
from hetis.engines.errors import OptionError
from hetis.engines.layout import ProcessKind
from hetis.runtime.transport.keys import InvalidKeyError, read_key

FAILED, INVALID = 1, 2
VLLM = (ProcessKind.SERVER, ProcessKind.SERVER_STAGE)
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 30.0  # wait before a process is restarted, doubled each time
SETTLED_S = 60.0  # after running this long, a process may fail as if for the first time
MOST_FAILURES = 5  # failures of vLLM in quick succession after which it is given up
_FINAL = (0, INVALID)  # vLLM ended as it should, or would end the same way again
_log = logging.getLogger(__name__)
_LOOK_S = 0.2
_PR_SET_PDEATHSIG = 1
_BECOME = f"""
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl({_PR_SET_PDEATHSIG}, signal.SIGTERM, 0, 0, 0)
if os.getppid() == int(sys.argv[1]):  # else it was killed before we could ask
    os.execvp(sys.argv[2], sys.argv[2:])
"""


class Running(Protocol):
    """A started process; `subprocess.Popen` satisfies this."""

    def poll(self) -> int | None:
        """Return its exit code, below 0 for a signal, or None while it runs."""

    def terminate(self) -> None: ...

    def kill(self) -> None: ...


@dataclass(slots=True)
class _Watch:
    """One process across its restarts."""

    kind: ProcessKind
    due_s: float | None  # time to start the process; None: it runs
    started_s: float = 0.0
    failures: int = 0
    ends: int = 0


class Supervision:
    """Decides which process is started when.

    A worker that ends is restarted indefinitely, because vLLM serves without it. The processes of vLLM live and end
    together: if one fails, all are restarted a few times, and rejoin the existing workers. When the front end exits as
    requested, or a process cannot start at all, everything ends. A worker that has started once with the same options
    can: if it now fails to start, its memory is taken for the moment or its card is gone, and vLLM serves on.
    """

    def __init__(self, kinds: dict[str, ProcessKind], *, now_s: float, until_stopped: bool = False) -> None:
        """Initialise with all processes due now. ``kinds`` has that of every process by its name. With
        ``until_stopped`` vLLM must not end by itself: it is restarted even if it ends with 0.
        """
        self._final = (INVALID,) if until_stopped else _FINAL
        self._watched = {name: _Watch(kind=kind, due_s=now_s) for name, kind in kinds.items()}
        self.outcome: int | None = None  # the exit code, once everything has ended

    def due(self, now_s: float) -> list[str]:
        """Return the names of the processes to start now."""
        return [name for name, one in self._watched.items() if one.due_s is not None and one.due_s <= now_s]

    def started(self, name: str, now_s: float) -> None:
        one = self._watched[name]
        one.due_s, one.started_s = None, now_s

    def together(self, name: str) -> list[str]:
        """Return the processes that cannot continue without this one, including itself."""
        is_vllm = self._watched[name].kind in VLLM
        return [other for other, one in self._watched.items() if one.kind in VLLM] if is_vllm else [name]

    def ended(self, name: str, code: int, now_s: float) -> float | None:
        """Record the end of a process. Returns how long all `together` with it must wait; None: nothing restarts."""
        one = self._watched[name]
        one.ends += 1
        group = [self._watched[other] for other in self.together(name)]
        failures = 1 if now_s - one.started_s >= SETTLED_S else max(other.failures for other in group) + 1
        if one.kind is ProcessKind.SERVER:
            is_final = code in self._final
        else:  # a further process of vLLM also ends with 0 when the one with the front end is gone
            is_final = code == INVALID and (one.kind in VLLM or one.ends == 1)
        if is_final or (one.kind in VLLM and failures > MOST_FAILURES):
            self.outcome = code if is_final else FAILED
            return None
        wait_s = min(FIRST_WAIT_S * 2.0 ** min(failures - 1, 10), LONGEST_WAIT_S)
        for other in group:
            other.failures, other.due_s = failures, now_s + wait_s
        return wait_s


def supervise(
    commands: Sequence[Command],
    start: Callable[[Command], Running],
    *,
    num_stops: Callable[[], int],
    clock: Callable[[], float],
    wait: Callable[[], None],
    until_stopped: bool = False,
) -> int:
    """Run the processes until vLLM has ended, or a stop is requested; return the exit code.

    Args:
        commands: those of the processes that run here; vLLM may be elsewhere.
        start: starts one. An OSError counts as an immediate failure of the process.
        num_stops: returns the number of stop requests. Once: vLLM ends first, then the workers. Twice: without waiting.
        wait: pauses between two checks.
        until_stopped: as in `Supervision`.
    """
    by_name = {command.process.name: command for command in commands}
    kinds = {name: command.process.kind for name, command in by_name.items()}
    supervision = Supervision(kinds, now_s=clock(), until_stopped=until_stopped)
    running: dict[str, Running] = {}

    def end(names: Sequence[str], *, within_s: float = STOPS_S) -> int:
        """Let processes end, and return the worst of their exit codes.

        They are killed on another stop request, or when their time is over.
        """
        ending = {name: running.pop(name) for name in names if name in running}
        codes = dict[str, int]()
        for process in ending.values():
            process.terminate()
        deadline_s = clock() + within_s
        while True:
            left = {name: process for name, process in ending.items() if name not in codes}
            codes |= {name: code for name, process in left.items() if (code := process.poll()) is not None}
            if len(codes) == len(ending):
                return max((FAILED if code < 0 else code for code in codes.values()), default=0)
            if num_stops() > 1 or clock() >= deadline_s:
                break
            wait()
        for name in ending.keys() - codes.keys():
            _log.warning("%s has not stopped and is being killed", name)
            ending[name].kill()
        return FAILED

    def gone(name: str, how: str, code: int) -> None:
        end(supervision.together(name))
        if (wait_s := supervision.ended(name, code, clock())) is not None:
            _log.warning("%s %s; restarting it in %g s", name, how, wait_s)
        elif code:
            _log.error("%s %s; stopping everything", name, how)

    try:
        while supervision.outcome is None and not num_stops():
            for name in supervision.due(clock()):
                supervision.started(name, clock())
                try:
                    running[name] = start(by_name[name])
                except OSError as error:
                    gone(name, f"did not start: {error}", FAILED)
                    break
            for name, process in list(running.items()):
                if name in running and (code := process.poll()) is not None:
                    del running[name]
                    gone(name, f"was ended by signal {-code}" if code < 0 else f"ended with {code}", code)
            wait()
        fronts = [name for name, kind in kinds.items() if kind is ProcessKind.SERVER]
        codes = [end([name], within_s=by_name[name].stops_s) for name in fronts]
        return supervision.outcome if supervision.outcome is not None else max(codes, default=0)
    finally:
        end(list(running))


def require_programs(commands: Sequence[Command]) -> None:
    """Raise OptionError with every program that is not on this machine: starting it again would not help."""
    missing = dict.fromkeys(words[0] for words, environment in map(_called, commands) if not _found(words, environment))
    if missing:
        raise OptionError(
            *(f"there is no program {name!r} on PATH: install it, or name another (--vllm)" for name in missing)
        )


def prepare(commands: Sequence[Command], *, may_draw_key: bool) -> dict[str, str]:
    """Write the files that the commands need here, and return the secrets among them, by path. Raises OptionError if
    keys are missing or files cannot be written. It names all of them.

    With ``may_draw_key`` a missing key is generated, because no other machine needs to know it.
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
    """Write a whole file or nothing, creating its folder. The mode is that of an existing file, too. Raises OSError."""
    target = Path(os.path.realpath(name))  # follow a symbolic link, so that the link is kept
    target.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: other processes may write the same file, on this node or on another one with the same folder.
    beside = target.with_name(f".{target.name[:100]}.{secrets.token_hex(8)}.tmp")
    try:
        with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(target)
    except BaseException:  # also on a signal
        beside.unlink(missing_ok=True)
        raise


def run_here(commands: Sequence[Command]) -> int:
    """Start the processes and supervise them until vLLM ends or SIGTERM or SIGINT arrives. Returns the exit code."""
    stop = StopRequests()
    with stop.by_signals():
        return supervise(commands, start, num_stops=lambda: stop.times, clock=time.monotonic, wait=stop.wait)


def start(command: Command, log: Path | None = None) -> Started:
    """Start a process in its own group, so that Ctrl-C reaches only this process, which forwards it. Raises OSError if
    there is no such program, or the file cannot be written.

    Its output is appended to ``log``; None: to that of this process.
    """
    words, environment = _called(command)
    words = _ending_with_parent(words, environment)
    with ExitStack() as stack:
        output = None if log is None else stack.enter_context(log.open("ab"))
        process = subprocess.Popen(
            words, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    _log.info("%s: process %d", command.process.name, process.pid)
    return Started(process)


def _called(command: Command) -> tuple[tuple[str, ...], Mapping[str, str]]:
    """Return command line and environment: a worker runs with the current Python, while vLLM may have its own."""
    environment = os.environ | dict(command.environment)
    if command.process.kind is ProcessKind.ATTENTION_WORKER:
        return (sys.executable, "-m", "hetis.runtime.worker", *command.shown[1:]), environment
    return command.shown, environment


def _found(words: Sequence[str], environment: Mapping[str, str]) -> str | None:
    return shutil.which(words[0], path=environment.get("PATH"))


class Started:
    """A process and its descendants, none of which is left when it has ended."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process, self.pid = process, process.pid
        self._has_ended = False

    def poll(self) -> int | None:
        code = self._process.poll()
        if code is not None and not self._has_ended:
            self._has_ended = True
            # vLLM's engine and ranks are separate processes, which would keep their GPUs and the front end's port.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            # They are now children of process 1, which is this one in a container without an init. They may take
            # seconds to end.
            threading.Thread(target=_reap, args=(self.pid,), name=f"reaper {self.pid}", daemon=True).start()
        return code

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self.poll()


def _reap(group: int) -> None:
    """Wait for all processes of a group that are children of this process; otherwise they would stay as zombies."""
    with suppress(ChildProcessError):  # there are none, or no more
        while True:
            os.waitpid(-group, 0)


def names_of_this_machine() -> tuple[str, ...]:
    """Return the names that a plan may use for this node: its host name in full and up to the first dot."""
    name = socket.gethostname()
    return tuple(dict.fromkeys((name, name.partition(".")[0])))


class StopRequests:
    """Counts requests to end, by a signal or `request`, and provides a wait that they cut short."""

    def __init__(self) -> None:
        self.times = 0
        self._came = threading.Event()

    @contextmanager
    def by_signals(self) -> Iterator[None]:
        """Count SIGTERM and SIGINT while the context is entered."""
        before = {number: signal.signal(number, self.request) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def request(self, *_: object) -> None:
        """Count one more request; safe from any thread, and as a handler of signals."""
        self.times += 1
        self._came.set()

    def wait(self) -> None:
        """Wait a moment, or until a request arrives."""
        if self._came.wait(_LOOK_S):
            self._came.clear()


def _ending_with_parent(words: Sequence[str], environment: Mapping[str, str]) -> tuple[str, ...]:
    """Return a command line that runs the program such that the kernel sends it SIGTERM if this process is killed.

    A few lines of Python request this signal and then become the program: nothing can be done safely between fork and
    exec of a process with threads, such as an agent's.
    """
    if _found(words, environment) is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), words[0])
    return (sys.executable, "-I", "-S", "-c", _BECOME, str(os.getpid()), *words)
