"""The processes of a replica on this node: a thread starts them, keeps their logs and restarts them.

`hetis.runtime.launch.processes` decides what is started when, as for ``hetis-launch``. Every process leads a session of
its own, which is recorded in a file: the next agent finds and ends what a killed one has left behind.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from hetis.engines.commands import Command
from hetis.engines.errors import OptionError
from hetis.engines.layout import ProcessKind
from hetis.runtime.agent.disk import machine_boot_id
from hetis.runtime.agent.launched.parts import LaunchedPart
from hetis.runtime.launch.processes import FAILED, Running, Started, StopRequests, prepare, start, supervise

OLD_LOGS = 3  # logs of earlier starts that are kept besides the current one
_TAIL_LINES, _TAIL_BYTES = 15, 1500  # limits on the end of a log that is quoted in the message of a failure
_LOOK_S = 0.1
_log = logging.getLogger(__name__)


class NodeProcesses:
    """The processes of one replica on this node.

    The thread that starts a process must live as long as it does, since the kernel ends a process when the *thread*
    that started it ends. All methods may be called from any thread.

    Args:
        part: what to run.
        sessions: folder where running processes are recorded.
        ready_s, silence_s: time limits for the first answer of the front end, and for any later one; then it is killed.
        changed: called in the thread when a process has started or ended.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        name: str,
        part: LaunchedPart,
        *,
        sessions: Path,
        ready_s: float,
        silence_s: float,
        changed: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self._part, self._sessions = name, part, sessions
        self._ready_s, self._silence_s = ready_s, silence_s
        self._notify, self._clock = changed, clock
        self._stop = StopRequests()
        self._lock = threading.Lock()
        kinds = {command.process.name: command.process.kind for command in part.commands}
        self._front = next((name for name, kind in kinds.items() if kind is ProcessKind.SERVER), "")
        self._running: set[str] = set()
        self._lives = 0  # number of starts of the front end
        self._is_ready = False
        self._waits_since_s: float | None = None  # since when an answer of the front end is missing. None: it is not.
        self._failure = ""
        self._outcome: int | None = None
        # A daemon: an agent that ends without stopping it must not wait for it. The kernel then ends the processes.
        self._thread = threading.Thread(target=self._run, name=f"engine {name}", daemon=True)

    def start(self) -> None:
        """Start the thread. Call it once."""
        self._thread.start()

    def stop(self) -> None:
        """End the front end, then the others. A second call kills all of them."""
        self._stop.request()

    def join(self, seconds: float) -> None:
        """Block until nothing runs any more, for at most ``seconds``."""
        if self._thread.ident is not None:
            self._thread.join(seconds)

    @property
    def is_over(self) -> bool:
        """True if all processes have ended for good."""
        return self._thread.ident is not None and not self._thread.is_alive()

    @property
    def has_failed(self) -> bool:
        """True if the replica was given up after repeated failures or one that a restart cannot mend."""
        return self._outcome is not None and not self._stop.times

    @property
    def failure(self) -> str:
        """How a process last ended, with the last lines of its log; empty if none has."""
        with self._lock:
            return self._failure

    @property
    def are_all_up(self) -> bool:
        with self._lock:
            return len(self._running) == len(self._part.commands)

    @property
    def life(self) -> int:
        """The number of starts of the front end, or 0 if it does not run now."""
        with self._lock:
            return self._lives if self._front in self._running else 0

    def answered(self, life: int) -> None:
        """Record an answer of the front end in this life."""
        with self._lock:
            if life == self._lives:
                self._is_ready, self._waits_since_s = True, None

    def was_silent(self, life: int) -> None:
        """Record a request that the front end left unanswered in this life."""
        with self._lock:
            if life == self._lives and self._waits_since_s is None:
                self._waits_since_s = self._clock()

    # --- in the thread

    def _run(self) -> None:
        try:
            self._part.folder.mkdir(parents=True, exist_ok=True)
            self._sessions.mkdir(parents=True, exist_ok=True)
            prepare(self._part.commands, may_draw_key=self._part.is_whole)
            self._outcome = supervise(
                self._part.commands,
                self._start,
                num_stops=lambda: self._stop.times,
                clock=self._clock,
                wait=self._stop.wait,
                until_stopped=True,
            )
        except Exception as error:
            if isinstance(error, OptionError | OSError):
                self._note_failure(str(error))
            else:
                _log.exception("%s: the thread that runs it failed", self.name)
                self._note_failure(f"{type(error).__name__}: {error}")
            self._outcome = FAILED
        if self.has_failed:
            _log.error("giving up %s", self.name)
        self._notify()

    def _start(self, command: Command) -> Running:
        log = self._part.folder / f"{command.process.name.replace('/', '-')}.log"
        for number in range(OLD_LOGS, 0, -1):  # rename the logs of earlier starts and drop the oldest
            newer = log.with_name(f"{log.name}.{number - 1}") if number > 1 else log
            with suppress(FileNotFoundError):
                newer.replace(log.with_name(f"{log.name}.{number}"))
        try:
            started = start(command, log)
        except OSError as error:
            self._note_failure(f"{command.shown[0]}: {error.strerror}")
            raise
        session = self._sessions / str(started.pid)
        try:
            session.write_text(f"{machine_boot_id()} {_birth(started.pid)}", encoding="ascii")
        except OSError as error:  # the next agent would not find it, and a second start would not find its GPUs free
            started.kill()
            self._note_failure(f"{session}: {error.strerror}")
            raise
        with self._lock:
            self._running.add(command.process.name)
            if command.process.name == self._front:
                self._lives += 1
                self._is_ready, self._waits_since_s = False, self._clock()
        self._notify()
        return _Watched(self, command, started, log, session)

    def late(self, name: str) -> str:
        """Return why the process must be killed; empty if it need not be."""
        with self._lock:
            if name != self._front or self._waits_since_s is None:
                return ""
            limit_s = self._silence_s if self._is_ready else self._ready_s
            if self._clock() - self._waits_since_s < limit_s:
                return ""
            since = "has not answered" if self._is_ready else "did not answer"
            return f"{since} http://{self._part.endpoint}/health for {limit_s:g} s"

    def ended(self, name: str, how: str, log: Path, session: Path) -> None:
        """Record the end of a process."""
        session.unlink(missing_ok=True)
        with self._lock:
            self._running.discard(name)
        if not self._stop.times:
            self._note_failure(f"{name} {how}; the end of {log}:\n{tail(log)}")
        self._notify()

    def _note_failure(self, text: str) -> None:
        _log.warning("%s: %s", self.name, text)
        with self._lock:
            self._failure = text


class _Watched:
    """A process that is killed if it does not answer in time, and whose end is recorded once."""

    def __init__(self, of: NodeProcesses, command: Command, started: Started, log: Path, session: Path) -> None:
        self._of, self._name, self._started = of, command.process.name, started
        self._log, self._session = log, session
        self._has_ended = False
        self._why = ""

    def poll(self) -> int | None:
        code = self._started.poll()
        if code is None and not self._why and (why := self._of.late(self._name)):
            self._why = why
            self._started.kill()
            code = FAILED
        if code is not None:
            self._end(self._why or (f"was ended by signal {-code}" if code < 0 else f"ended with {code}"))
        return FAILED if self._why and code is not None else code

    def terminate(self) -> None:
        self._started.terminate()

    def kill(self) -> None:
        self._started.kill()
        self._end("was killed")

    def _end(self, how: str) -> None:
        if not self._has_ended:
            self._has_ended = True
            self._of.ended(self._name, how, self._log, self._session)


def tail(log: Path) -> str:
    """Return the last lines of a log."""
    try:
        with log.open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - _TAIL_BYTES, 0))
            text = file.read().decode("utf-8", errors="replace")
    except OSError as error:
        return f"(it cannot be read: {error.strerror})"
    return "\n".join(text.splitlines()[-_TAIL_LINES:])


# --- what a killed agent has left behind


def end_leftovers(sessions: Path, *, grace_s: float) -> list[int]:
    """End the processes that an earlier agent has left behind, and return the leaders of their sessions. Blocks. The
    kernel has signalled them to end when the agent did; leaders have ``grace_s`` for that before they are killed.
    """
    noted = {int(file.name): file for file in sessions.glob("*") if file.name.isdecimal()}
    left = {leader: file for leader, file in noted.items() if _members(leader, file)}
    for leader in left:
        _log.warning("stopping process %d, which an earlier agent left", leader)
        _kill(leader, signal.SIGTERM)
    deadline_s = time.monotonic() + grace_s
    while there := {leader: found for leader, file in left.items() if (found := _members(leader, file))}:
        for leader, members in there.items():
            # A process that has lost its leader does nothing useful any more, and may keep a GPU or a port.
            if leader not in members or time.monotonic() >= deadline_s:
                for member in members:
                    _kill(member, signal.SIGKILL)
        time.sleep(_LOOK_S)
    for file in noted.values():
        file.unlink(missing_ok=True)
    return sorted(left)


def _kill(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def _members(leader: int, file: Path) -> list[int]:
    """Return the processes of a recorded session; none if its leader's id now belongs to another process."""
    try:
        boot, _, birth = file.read_text(encoding="ascii").partition(" ")
    except (OSError, ValueError):
        return []
    # While a session has members, no new process gets the number of its leader.
    if boot != machine_boot_id() or _birth(leader) not in ("", birth):
        return []
    return [pid for pid, (state, session) in _processes().items() if session == str(leader) and state != "Z"]


def _processes() -> Mapping[int, tuple[str, str]]:
    """Return state and session of every process by its id."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError):
            fields = _status(int(folder.name))
            found[int(folder.name)] = (fields[0], fields[3])
    return found


def _birth(pid: int) -> str:
    """Return when a process started, in ticks since boot; empty if it is gone or the system has no /proc."""
    try:
        return _status(pid)[19]
    except (OSError, IndexError):
        return ""


def _status(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the state on; the name before it may contain any characters."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
