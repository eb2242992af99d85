"""Search from a verb: progress on stderr, no native output on stdout, and Ctrl-C for the best found so far."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from hetis.formats.command_line.terminal import Terminal
from hetis.planner.cli.interruptible import run_interruptibly
from hetis.planner.cli.native_output import no_native_output
from hetis.planner.cli.progress import progress_on_stderr
from hetis.solver.budget import Report

T = TypeVar("T")


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
