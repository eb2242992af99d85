"""Search from a verb: progress on stderr, no native output on stdout, and Ctrl-C for the best found so far."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

from hetis.formats.command_line.terminal import Terminal
from hetis.planner.cli.native_output import no_native_output
from hetis.planner.cli.progress import progress_on_stderr
from hetis.solver.budget import Report

T = TypeVar("T")

_POLL_S = 0.1  # how often the waiting thread wakes up; signals are handled in between
_ABORTED = 130


def search_interruptibly(
    terminal: Terminal, work: Callable[[Report], T], *, unit: str, cancelled: threading.Event, so_far: str
) -> T:
    """Return the result of ``work``, and show its progress with values in ``unit``.

    The first Ctrl-C sets ``cancelled`` and announces ``so_far`` (the best plan, the plans) as the result.
    """
    with no_native_output(), progress_on_stderr(terminal, unit) as report:
        return run_interruptibly(
            lambda: work(report),
            cancelled=cancelled,
            on_cancel=lambda: terminal.say(f"stopping with {so_far} so far; Ctrl-C again leaves at once"),
        )


def run_interruptibly(work: Callable[[], T], *, cancelled: threading.Event, on_cancel: Callable[[], None]) -> T:
    """Run ``work`` in a second thread while this one, the main thread, listens for Ctrl-C.

    Python handles signals only between the bytecodes of the main thread, so a solver that stays in compiled code for
    seconds would not react. The first SIGINT sets ``cancelled`` (the search then returns its incumbent) and calls
    ``on_cancel``; the second one ends the process at once with 130, because nothing can end a thread in compiled code.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()  # signals belong to somebody else: a test runner, a service
    result: list[T] = []
    failure: list[BaseException] = []

    def worker() -> None:
        try:
            result.append(work())
        except BaseException as error:  # reraised in the caller's thread
            failure.append(error)

    thread = threading.Thread(target=worker, name="solve", daemon=True)
    with _sigint(cancelled, on_cancel):
        thread.start()
        while thread.is_alive():
            thread.join(_POLL_S)
    if failure:
        raise failure[0]
    return result[0]


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
