"""Progress of the search on stderr: one live line on a terminal, a few plain lines anywhere else."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from hetis.formats.command_line.terminal import Terminal
from hetis.planner.report.figures import digits, percent
from hetis.solver.budget import Progress, Report, silent

PLAIN_INTERVAL_S = 2.0  # between plain lines


@contextmanager
def progress_on_stderr(terminal: Terminal, unit: str) -> Iterator[Report]:
    """Yield a `Report` for the solver, safe to call from another thread. Times are those of the whole command."""
    console = terminal.stderr_console()
    if terminal.verbosity < 0:
        yield silent
    elif console.is_terminal and not console.is_dumb_terminal:
        with console.status("loading the solver", spinner="dots") as status:
            yield by_one_clock(lambda progress: status.update(describe(progress, unit)))
    else:
        yield by_one_clock(SparseLines(terminal.say, unit))


def by_one_clock(report: Report, *, clock: Callable[[], float] = time.monotonic) -> Report:
    """Return a report with the time since now: searches one after another each start at zero seconds."""
    started_s = clock()
    return lambda progress: report(replace(progress, elapsed_s=clock() - started_s))


class SparseLines:
    """A report that prints at most one line every `PLAIN_INTERVAL_S` seconds, however often phases change."""

    def __init__(
        self, say: Callable[[str], None], unit: str, *, clock: Callable[[], float] = time.monotonic
    ) -> None:  # fmt: skip
        self._say = say
        self._unit = unit
        self._clock = clock
        self._next_s = -math.inf
        self._lock = threading.Lock()

    def __call__(self, progress: Progress) -> None:
        with self._lock:
            now_s = self._clock()
            if now_s < self._next_s:
                return
            self._next_s = now_s + PLAIN_INTERVAL_S
        self._say(describe(progress, self._unit))


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
