"""Virtual time: a heap of scheduled events, in order of time and, at the same time, in order of scheduling."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from typing import Any

Action = Callable[..., None]


class Events:
    """The loop of a simulation. An action is called with the time and with the arguments scheduled for it."""

    __slots__ = ("_heap", "_order", "now_s")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Action, tuple[Any, ...]]] = []
        self._order = 0
        self.now_s = 0.0

    @property
    def is_empty(self) -> bool:
        """Return whether nothing more is scheduled."""
        return not self._heap

    def at(self, time_s: float, action: Action, *arguments: Any) -> None:
        """Schedule ``action(time_s, *arguments)``; never before the present."""
        self._order += 1
        heapq.heappush(self._heap, (time_s, self._order, action, arguments))

    def run(self, until_s: float = math.inf) -> float:
        """Run all events up to ``until_s``; return the time at which it ended."""
        heap, pop = self._heap, heapq.heappop
        while heap:
            if heap[0][0] > until_s:
                self.now_s = until_s
                break
            time_s, _, action, arguments = pop(heap)
            self.now_s = time_s
            action(time_s, *arguments)
        return self.now_s
