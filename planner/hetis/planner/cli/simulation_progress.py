"""Progress of a simulation on stderr: a bar on a terminal, a plain line now and then anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from hetis.formats.command_line.terminal import Terminal

if TYPE_CHECKING:
    from rich.progress import Progress

PLAIN_INTERVAL_S = 5.0


class SimulationNews(Protocol):
    """Receiver of requests arrived so far and in all, and of parts that begin; safe to call from other threads."""

    def __call__(self, given: int, total: int) -> None: ...

    def begins(self, part: str) -> None: ...


@contextmanager
def requests_on_stderr(terminal: Terminal) -> Iterator[SimulationNews]:
    """Yield the progress of a simulation in the form that the terminal can show."""
    console = terminal.stderr_console()
    if terminal.verbosity < 0:
        yield _Silence()
    elif console.is_terminal and not console.is_dumb_terminal:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("requests"))
        with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
            yield _Bar(progress)
    else:
        yield SparseRequests(terminal.say)


class _Silence:
    def __call__(self, given: int, total: int) -> None:
        pass

    def begins(self, part: str) -> None:
        pass


class _Bar:
    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("simulating", total=None)

    def __call__(self, given: int, total: int) -> None:
        self._progress.update(self._task, completed=given, total=total)

    def begins(self, part: str) -> None:
        self._progress.update(self._task, description=f"simulating {part}", completed=0)


class SparseRequests:
    """News as at most one line every `PLAIN_INTERVAL_S`, and none for what ends within seconds."""

    def __init__(self, say: Callable[[str], None], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._say = say
        self._clock = clock
        self._last_s = clock()
        self._part = ""

    def __call__(self, given: int, total: int) -> None:
        now_s = self._clock()
        if now_s >= self._last_s + PLAIN_INTERVAL_S:
            self._last_s = now_s
            part = f" {self._part}," if self._part else ""
            self._say(f"simulating:{part} {given:,} of {total:,} requests have arrived")

    def begins(self, part: str) -> None:
        self._part = part
