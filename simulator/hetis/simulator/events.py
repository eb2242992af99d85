"""Virtual time: a heap of scheduled events, ordered by time and then by order of scheduling; and links.

Background transfers share links one at a time, at the speed of the slower end. Every GPU has two ends, one outgoing
and one incoming, shared by all uses: KV sent from prefill to decode replicas and head groups moved by re-dispatch
wait for one another. All ranks of a tensor-parallel group share the ends of the first one.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from typing import Any

Action = Callable[..., None]


class Events:
    """The event loop of a simulation. An action is called with the time and the arguments scheduled for it.

    Attributes:
        now_s: time of the current event; ``before_s``: that of the one before it.
    """

    __slots__ = ("_cancelled", "_heap", "_order", "before_s", "now_s")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Action, tuple[Any, ...]]] = []
        self._order = 0
        self._cancelled: set[int] = set()
        self.now_s = self.before_s = 0.0

    @property
    def is_empty(self) -> bool:
        """Return whether nothing more is scheduled."""
        return len(self._heap) == len(self._cancelled)

    def at(self, time_s: float, action: Action, *arguments: Any) -> int:
        """Schedule ``action(time_s, *arguments)`` and return its number; the time must not be in the past."""
        self._order += 1
        heapq.heappush(self._heap, (time_s, self._order, action, arguments))
        return self._order

    def cancel(self, number: int) -> None:
        """Cancel an event that is scheduled."""
        self._cancelled.add(number)

    def run(self, until_s: float = math.inf) -> float:
        """Run all events up to ``until_s``; return the time of the end."""
        heap, pop, cancelled = self._heap, heapq.heappop, self._cancelled
        while heap:
            if cancelled and heap[0][1] in cancelled:
                cancelled.discard(pop(heap)[1])
                continue
            if heap[0][0] > until_s:
                self.now_s = until_s
                break
            time_s, _, action, arguments = pop(heap)
            self.before_s, self.now_s = self.now_s, time_s
            action(time_s, *arguments)
        return self.now_s


class SharedLink:
    """One end of transfers: a direction of a network card, or the link between two zones. First come, first served."""

    __slots__ = ("busy_s", "free_s")

    def __init__(self) -> None:
        self.free_s = self.busy_s = 0.0


class FleetLinks:
    """The ends of a whole fleet, created on first use."""

    def __init__(self) -> None:
        self._leaving: dict[str, SharedLink] = {}
        self._coming: dict[str, SharedLink] = {}
        self._between: dict[tuple[str, str], SharedLink] = {}

    def leaving(self, device: str) -> SharedLink:
        return self._leaving.setdefault(device, SharedLink())

    def coming(self, device: str) -> SharedLink:
        return self._coming.setdefault(device, SharedLink())

    def between(self, source: str, target: str) -> SharedLink:
        """Return the links from one zone to another."""
        return self._between.setdefault((source, target), SharedLink())


def transfer(now_s: float, seconds: float, *ends: SharedLink) -> float:
    """Occupy all ``ends`` for ``seconds`` as soon as all of them are free; return the time of completion."""
    start_s = now_s
    for end in ends:
        start_s = end.free_s if end.free_s > start_s else start_s
    for end in ends:
        end.free_s = start_s + seconds
        end.busy_s += seconds
    return start_s + seconds
