"""The clock of a search, which stands still while machine code is made: a caller's time limit is for searching."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class SearchClock:
    """Seconds but for those in which a thread of this process compiled or waited for another process that did.

    Args:
        clock: seconds that only grow.
        on_change: called, in that thread, when compiling begins (True) and when all of it has ended (False).
    """

    def __init__(
        self, *, clock: Callable[[], float] = time.monotonic, on_change: Callable[[bool], None] = lambda _: None
    ) -> None:
        self._clock, self._on_change = clock, on_change
        self._lock = threading.Lock()
        self._num_compiling = 0
        self._since_s = self._compiled_s = 0.0

    def __call__(self) -> float:
        with self._lock:
            return (self._since_s if self._num_compiling else self._clock()) - self._compiled_s

    def note(self, begins: bool) -> None:
        """A compilation begins or ends; one inside another, or beside it in another thread, takes no more time."""
        with self._lock:
            self._num_compiling += 1 if begins else -1
            changes = self._num_compiling == (1 if begins else 0)
            if changes and begins:
                self._since_s = self._clock()
            elif changes:
                self._compiled_s += self._clock() - self._since_s
        if changes:
            self._on_change(begins)
