"""A search's clock, which stops while a kernel is compiled: that takes up to a minute once per installation.

This imports neither numba nor a kernel, as a command's start must not wait for them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

Watcher = Callable[[bool], None]
_watchers: list[Watcher] = []


@contextmanager
def reporting_compilations(watcher: Watcher) -> Iterator[None]:
    """Call ``watcher`` with True before a kernel is loaded, compiled or waited for, and with False afterwards.

    The calls come from the thread that does so, of which there may be several. Calls nest, because kernels that a
    kernel calls are compiled within its compilation.
    """
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


@contextmanager
def compiling() -> Iterator[None]:
    """Tell all watchers that a kernel is loaded, compiled or waited for in this context."""
    # Whoever is notified of the beginning is notified of the end, even if another watcher raises.
    with ExitStack() as ends:
        for watcher in list(_watchers):
            ends.callback(watcher, False)
            watcher(True)
        yield


class SearchClock:
    """A clock that stops while a thread of this process compiles, or waits for another process to compile.

    Args:
        clock: monotonic seconds.
        on_change: called in that thread, with True when compiling begins and with False when all compiling has ended.
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
        """Record that a compilation begins or ends; nested or concurrent ones are not counted twice."""
        with self._lock:
            self._num_compiling += 1 if begins else -1
            changes = self._num_compiling == (1 if begins else 0)
            if changes and begins:
                self._since_s = self._clock()
            elif changes:
                self._compiled_s += self._clock() - self._since_s
        if changes:
            self._on_change(begins)


search_seconds = SearchClock()
_watchers.append(search_seconds.note)
