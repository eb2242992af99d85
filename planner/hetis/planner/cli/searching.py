"""Long-running work in a verb: progress on stderr, no native output on stdout, Ctrl-C for the best result so far."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from hetis.commands.terminal import Terminal
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.report.figures import digits, percent
from hetis.solver.backends.search_clock import search_seconds
from hetis.solver.budget import Budget, Progress, Report

if TYPE_CHECKING:
    from rich.progress import Progress as ProgressBar

T = TypeVar("T")

PLAIN_INTERVAL_S = 2.0  # between the plain lines of a search
REQUESTS_INTERVAL_S = 5.0  # between the plain lines of a simulation
_POLL_S = 0.1  # how often the waiting thread wakes up; signals are handled in between
_ABORTED = 130
_STDOUT = 1


@contextmanager
def news_on_stderr(
    terminal: Terminal, opening: str, line: Callable[[T], str], plain: Callable[[T], None]
) -> Iterator[Callable[[T], None]]:
    """Yield a function that shows news, safe to call from another thread: on a terminal as one live ``line``, which
    begins as ``opening``, elsewhere by ``plain``.
    """
    console = terminal.stderr_console()
    if terminal.verbosity < 0:
        yield lambda news: None
    elif console.is_terminal and not console.is_dumb_terminal:
        with console.status(opening, spinner="dots") as status:
            yield lambda news: status.update(line(news))
    else:
        yield plain


def by_one_clock(report: Report, *, clock: Callable[[], float] = time.monotonic) -> Report:
    """Return a report whose times count from now: each of several consecutive searches starts at zero seconds."""
    started_s = clock()
    return lambda progress: report(replace(progress, elapsed_s=clock() - started_s))


class SparseLines(Generic[T]):
    """Prints a ``line`` about news at most every `PLAIN_INTERVAL_S` seconds, and whenever their ``state`` changes."""

    def __init__(
        self,
        say: Callable[[str], None],
        line: Callable[[T], str],
        *,
        state: Callable[[T], object] = lambda news: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._say, self._line, self._state, self._clock = say, line, state, clock
        self._last: object = None
        self._next_s = -math.inf
        self._lock = threading.Lock()

    def __call__(self, news: T) -> None:
        with self._lock:
            now, now_s = self._state(news), self._clock()
            if now == self._last and now_s < self._next_s:
                return
            self._last, self._next_s = now, now_s + PLAIN_INTERVAL_S
        self._say(self._line(news))


def describe(progress: Progress, unit: str) -> str:
    """Return ``4.1 s  pricing: incumbent 1.61, bound 1.63 requests/s, gap 1.20%``."""
    parts = []
    if progress.incumbent is not None:
        parts.append(f"incumbent {digits(progress.incumbent, 4)}")
    if progress.bound is not None:
        parts.append(f"bound {digits(progress.bound, 4)} {unit}")
    if progress.gap is not None:
        parts.append(f"gap {percent(progress.gap)}")
    news = f": {', '.join(parts)}" if parts else ""
    return f"{progress.elapsed_s:5.1f} s  {progress.phase}{news}"


# --- simulations


class SimulationNews(Protocol):
    """Receives the number of requests that have arrived and their total, and the start of each part; thread-safe."""

    def __call__(self, given: int, total: int) -> None: ...

    def begins(self, part: str) -> None: ...


@contextmanager
def requests_on_stderr(terminal: Terminal) -> Iterator[SimulationNews]:
    """Yield a receiver that shows a simulation's progress in the form that the terminal supports."""
    console = terminal.stderr_console()
    if terminal.verbosity < 0:
        yield SparseRequests(lambda _line: None)
    elif console.is_terminal and not console.is_dumb_terminal:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("requests"))
        with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
            yield _Bar(progress)
    else:
        yield SparseRequests(terminal.say)


class _Bar:
    def __init__(self, progress: ProgressBar) -> None:
        self._progress = progress
        self._task = progress.add_task("simulating", total=None)

    def __call__(self, given: int, total: int) -> None:
        self._progress.update(self._task, completed=given, total=total)

    def begins(self, part: str) -> None:
        self._progress.update(self._task, description=f"simulating {part}", completed=0)


class SparseRequests:
    """Prints at most one line every `REQUESTS_INTERVAL_S`, and none for a simulation that ends within seconds."""

    def __init__(self, say: Callable[[str], None], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._say = say
        self._clock = clock
        self._last_s = clock()
        self._part = ""

    def __call__(self, given: int, total: int) -> None:
        now_s = self._clock()
        if now_s >= self._last_s + REQUESTS_INTERVAL_S:
            self._last_s = now_s
            part = f" {self._part}," if self._part else ""
            self._say(f"simulating:{part} {given:,} of {total:,} requests have arrived")

    def begins(self, part: str) -> None:
        self._part = part


@contextmanager
def no_native_output() -> Iterator[None]:
    """Discard what native libraries write to stdout in the block, which must therefore print no data.

    A command owns its process, so it may redirect the descriptor itself, whatever the C library. The solver's
    `no_stray_lines` must work in the middle of any program, and handles only one C library.
    """
    try:
        kept = os.dup(_STDOUT)
    except OSError:  # closed by the parent process: there is nothing to keep clean
        yield
        return
    sys.stdout.flush()
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, _STDOUT)
        os.close(nowhere)
        yield
    finally:
        with suppress(OSError, TypeError, AttributeError):  # there is no C library to flush
            ctypes.CDLL(None).fflush(None)
        os.dup2(kept, _STDOUT)
        os.close(kept)


class Interruptible:
    """Long-running work of a verb: the first Ctrl-C stops it with what there is by then, the second ends the process.

    ``time_limit_s`` is that of each budget, and ``cancelled`` what the first Ctrl-C sets.
    """

    def __init__(
        self, terminal: Terminal, *, time_limit_s: float = math.inf, cancelled: threading.Event | None = None
    ) -> None:  # fmt: skip
        self._terminal, self._time_limit_s = terminal, time_limit_s
        self.cancelled = threading.Event() if cancelled is None else cancelled

    def budget(self) -> Budget:
        """Return a budget, which begins now."""
        return Budget(time_limit_s=self._time_limit_s, clock=search_seconds, cancelled=self.cancelled)

    def code(self, otherwise: ExitCode = ExitCode.OK) -> ExitCode:
        """Return the exit code of work that was stopped or, if it was not, another one."""
        return ExitCode.INTERRUPTED if self.cancelled.is_set() else otherwise

    def search(self, work: Callable[[Report], T], *, unit: str, so_far: str) -> T:
        """Return the result of ``work``, and show its progress, whose values are in ``unit``.

        The first Ctrl-C announces ``so_far`` ("the best plan", "the plans") as the result.
        """
        line = partial(describe, unit=unit)
        with news_on_stderr(self._terminal, "loading the solver", line, SparseLines(self._terminal.say, line)) as news:
            report = by_one_clock(news)
            return self.do(lambda: work(report), stopping=f"with {so_far} so far")

    def simulate(self, work: Callable[[SimulationNews], T]) -> T:
        """Return the result of ``work``, and show how many of its requests have arrived."""
        with requests_on_stderr(self._terminal) as news:
            return self.do(lambda: work(news), stopping="with what was simulated")

    def do(self, work: Callable[[], T], *, stopping: str) -> T:
        """Return the result of ``work``, which shows no progress; ``stopping`` is announced at the first Ctrl-C."""
        again = "press Ctrl-C again to exit at once"
        with no_native_output():
            return run_interruptibly(
                work, cancelled=self.cancelled, on_cancel=lambda: self._terminal.say(f"stopping {stopping}; {again}")
            )


def run_interruptibly(work: Callable[[], T], *, cancelled: threading.Event, on_cancel: Callable[[], None]) -> T:
    """Run ``work`` in a second thread while this one, the main thread, waits for Ctrl-C.

    Python handles signals only between the bytecodes of the main thread, so a solver that stays in compiled code for
    seconds would not react. The first SIGINT sets ``cancelled`` (the search then returns its incumbent) and calls
    ``on_cancel``; the second one ends the process at once with 130, because nothing can end a thread in compiled code.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()  # signals belong to another part of the program, such as a test runner or a service
    from concurrent.futures import Future

    done = Future[T]()

    def worker() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # reraised in the caller's thread
            done.set_exception(error)

    thread = threading.Thread(target=worker, name="solve", daemon=True)
    with _sigint(cancelled, on_cancel):
        thread.start()
        while thread.is_alive():
            thread.join(_POLL_S)
    return done.result()


@contextmanager
def _sigint(cancelled: threading.Event, on_cancel: Callable[[], None]) -> Iterator[None]:
    def handle(_signal: int, _frame: FrameType | None) -> None:
        if cancelled.is_set():
            show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # a live progress line hides it
            sys.stderr.write(f"{show_cursor}aborted\n")
            sys.stderr.flush()
            os._exit(_ABORTED)
        cancelled.set()
        on_cancel()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
