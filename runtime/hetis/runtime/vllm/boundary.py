"""Access to the scheduler's state: by vLLM's thread while anything runs, by any thread while nothing does.

vLLM's engine sleeps while it has no request, so work queued for the time between two steps would never run. Work of
other threads is therefore done by vLLM's thread between two steps, or at once if there are none.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

MOST_WORKS, MOST_S = 8, 0.002  # of other threads' work between two steps; at least one piece of work is done

T = TypeVar("T")


class Boundary:
    """Hands the scheduler's state from thread to thread.

    Attributes:
        lock: held by the thread at work on the state. vLLM's thread holds it between two steps, others for one short
            piece of work, and only while nothing runs.
        num_steps: boundaries that vLLM's thread has reached.
    """

    def __init__(self, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self.lock = threading.Lock()
        self.num_steps = 0
        self._clock = clock
        self._is_busy = False
        self._works: deque[Callable[[], None]] = deque()
        self._waiting: set[Callable[[], None]] = set()

    # --- vLLM's thread

    def enter(self) -> None:
        """Reserve the state for vLLM's thread until `leave`, because something is about to run."""
        if not self._is_busy:
            with self.lock:
                self._is_busy = True

    def leave(self, *, is_idle: bool) -> None:
        """Do other threads' work at a boundary, with `lock` held; all of it if nothing will run (``is_idle``)."""
        self.num_steps += 1
        begun_s, done = self._clock(), 0
        while self._works and (is_idle or not done or (done < MOST_WORKS and self._clock() - begun_s < MOST_S)):
            self._works.popleft()()
            done += 1
        self._is_busy = not is_idle
        waiting, self._waiting = self._waiting, set()
        for wake in waiting:
            wake()

    # --- other threads

    def call(self, work: Callable[[], T]) -> Future[T]:
        """Run ``work`` and return a future with its result or exception."""
        future: Future[T] = Future()

        def do() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(work())
            except Exception as error:
                future.set_exception(error)

        with self.lock:
            if self._is_busy:
                self._works.append(do)
            else:
                do()
        return future

    def on_step(self, wake: Callable[[], None]) -> None:
        """Call ``wake`` once, on vLLM's thread, at the next boundary."""
        with self.lock:
            self._waiting.add(wake)

    def off_step(self, wake: Callable[[], None]) -> None:
        """Undo `on_step`. The call may have happened already."""
        with self.lock:
            self._waiting.discard(wake)
