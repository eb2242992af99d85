"""Progress of a run on stderr: a bar with the time left on a terminal, otherwise a plain line every few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hetis.formats.command_line.terminal import Terminal
from hetis.profiler.cli.words import duration

if TYPE_CHECKING:
    from hetis.profiler.measure.session import RunProgress

PLAIN_INTERVAL_S = 5.0

Report = Callable[["RunProgress"], None]


@contextmanager
def run_progress(terminal: Terminal) -> Iterator[Report]:
    """Yield the function to pass to `measure`."""
    console = terminal.stderr_console()
    if terminal.verbosity < 0:
        yield lambda _: None
    elif console.is_terminal and not console.is_dumb_terminal:
        from rich.progress import BarColumn, Progress, TextColumn

        # Ten wide: with the longest description and the time left that makes 80 columns.
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=10), TextColumn("{task.fields[left]}"))
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("starting torch", total=None, left="")

            def update(news: RunProgress) -> None:
                # An adaptive run ends when it knows enough: the bar follows whichever limit is nearer.
                progress.update(
                    task, description=describe(news), completed=news.done, total=news.total, left=_left(news)
                )

            yield update
    else:
        yield RunLines(terminal.say, time.monotonic)


class RunLines:
    """Prints a line at most every `PLAIN_INTERVAL_S` seconds."""

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float]) -> None:
        self._say = say
        self._clock = clock
        self._next_s = clock()

    def __call__(self, news: RunProgress) -> None:
        if self._clock() >= self._next_s:
            self._next_s = self._clock() + PLAIN_INTERVAL_S
            self._say(f"{describe(news)}, {_left(news)}")


def describe(news: RunProgress) -> str:
    """Return ``37 points, next GEMM (known to 12%)``."""
    known = "new" if news.uncertainty >= 1 else f"known to {news.uncertainty:.0%}"
    return f"{news.done} points, next {news.what} ({known})"


def _left(news: RunProgress) -> str:
    return f"at most {duration(news.left_s)} left"
