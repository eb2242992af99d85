"""How far a simulation is, on stderr: a bar on a terminal, a plain line now and then anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hetis.formats.command_line.terminal import Terminal

PLAIN_INTERVAL_S = 5.0


@contextmanager
def requests_on_stderr(terminal: Terminal) -> Iterator[Callable[[int, int], None]]:
    """A report of requests that have arrived and that will; safe to call from another thread."""
    console = terminal.stderr_console()
    if terminal.verbosity < 0:
        yield lambda _given, _total: None
    elif console.is_terminal and not console.is_dumb_terminal:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("simulating"), BarColumn(), MofNCompleteColumn(), TextColumn("requests"))
        with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
            task = progress.add_task("requests", total=None)
            yield lambda given, total: progress.update(task, completed=given, total=total)
    else:
        yield _SparseLines(terminal.say)


class _SparseLines:
    """Says nothing of what is over within seconds."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._last_s = time.monotonic()

    def __call__(self, given: int, total: int) -> None:
        now_s = time.monotonic()
        if now_s >= self._last_s + PLAIN_INTERVAL_S:
            self._last_s = now_s
            self._say(f"simulating: {given:,} of {total:,} requests have arrived")
