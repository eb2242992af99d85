"""Progress reports of a search from its process to the service, rate-limited for the sake of both."""

from __future__ import annotations

import math
from collections.abc import Callable

from hetis.planner.jobs.frames import JobFrame
from hetis.solver.budget import Progress

PROGRESS_INTERVAL_S = 0.2  # between two reports of one phase


class ProgressReporter:
    """Sends every new phase, and at most one report per `PROGRESS_INTERVAL_S` within a phase."""

    def __init__(self, send: Callable[[JobFrame], None]) -> None:
        self._send = send
        self._phase = ""
        self._last_s = -math.inf

    def __call__(self, progress: Progress) -> None:
        if progress.phase == self._phase and progress.elapsed_s < self._last_s + PROGRESS_INTERVAL_S:
            return
        self._phase, self._last_s = progress.phase, progress.elapsed_s
        self._send(progress_to_frame(progress))


def progress_to_frame(progress: Progress) -> JobFrame:
    """Return a frame with the finite numbers; others are unknown and left out."""
    numbers = {"incumbent": progress.incumbent, "bound": progress.bound, "gap": progress.gap}
    known = {name: float(value) for name, value in numbers.items() if value is not None and math.isfinite(value)}
    return JobFrame(kind="progress", fields={"phase": progress.phase, "elapsed_s": progress.elapsed_s, **known})


def progress_from_frame(frame: JobFrame) -> Progress:
    return Progress(**frame.fields)
