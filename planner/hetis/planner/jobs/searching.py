"""The searches of a solver process, one at a time."""

from __future__ import annotations

import threading
from typing import Protocol

from hetis.planner.jobs.frames import JobFrame
from hetis.planner.jobs.kernels import load_kernels
from hetis.planner.jobs.outcomes import answer_to_frame
from hetis.planner.jobs.posed import posed_from_json
from hetis.planner.jobs.progress import ProgressReporter
from hetis.planner.jobs.search_clock import SearchClock
from hetis.planner.jobs.solving import solve
from hetis.solver.compiled import compilations_told_to


class Sender(Protocol):
    def send(self, frame: JobFrame) -> None: ...


class Searcher:
    """Solves in the thread that calls; `cancel` comes from another one."""

    def __init__(self, outbox: Sender) -> None:
        self._outbox = outbox
        self._cancelled = threading.Event()

    def expect(self) -> threading.Event:
        """Makes ready for the next search: what `cancel` does from now on is meant for it."""
        self._cancelled = threading.Event()
        return self._cancelled

    def solve(self, posed_json: bytes, cancelled: threading.Event) -> None:
        """Searches and sends the answer. The time limit counts from ``searching``: compiling is not the caller's.

        Most of it is done before. What is left to be compiled while it searches, because a part of the machine code was
        on disk, stops the clock, and is told as ``compiling``.
        """
        posed = posed_from_json(posed_json)
        report = ProgressReporter(self._outbox.send)
        load_kernels(posed.loaded.inputs.cluster.num_gpus(), report=report)

        def tell(compiles: bool) -> None:
            if compiles:
                self._outbox.send(JobFrame(kind="compiling", fields={}))
            else:
                self._outbox.send(JobFrame(kind="searching", fields={"spent_s": clock() - began_s}))

        clock = SearchClock(on_change=tell)
        began_s = clock()
        self._outbox.send(JobFrame(kind="searching", fields={"spent_s": 0.0}))
        with compilations_told_to(clock.note):
            answer = solve(posed, cancelled=cancelled, report=report, clock=clock)
        self._outbox.send(answer_to_frame(answer))

    def cancel(self) -> None:
        """Makes the search return its incumbent; nothing if there is none."""
        self._cancelled.set()
