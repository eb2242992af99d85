"""Latest states for watchers: a slow reader misses states in between, never the last one."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

_TERM_BITS = 33  # 2**33 events per term and 2**30 terms, many of which restored stores skip: 63 bits together


@dataclass(frozen=True, slots=True)
class Event(Generic[K, V]):
    """The state of ``key`` after a change; ``value`` is None if it is gone. ``time_s`` is the Unix time."""

    sequence: int
    key: K
    value: V | None
    time_s: float


class LeftBehindError(Exception):
    """A watcher was so slow that removals which it has not seen are forgotten: it must read the present state again."""


class Hub(Generic[K, V]):
    """The last state of every key, and the watchers that wait for the next one. Belongs to one event loop.

    Sequences grow across restarts: each leadership term has numbers of its own. Removed keys are remembered so that
    resuming watchers learn of the removal, up to ``most_gone``; `is_too_old` returns whether a watcher must start over.
    """

    def __init__(self, epoch: int, *, most_gone: int = 10_000) -> None:
        self._first = epoch << _TERM_BITS
        self._last = self._first
        self._oldest_gone = self._first  # removals may have been forgotten up to this sequence
        self._most_gone = most_gone
        self._events: OrderedDict[K, Event[K, V]] = OrderedDict()  # by sequence, ascending
        self._num_gone = 0
        self._changed = asyncio.Event()
        self._closed = False
        self._error: Exception | None = None  # why the hub was closed; None: in an orderly way

    @property
    def sequence(self) -> int:
        """The sequence of the last event."""
        return self._last

    def publish(self, key: K, value: V | None, *, now_s: float) -> int:
        """Make ``value`` the state of ``key`` and wake all watchers; None removes the key."""
        self._last += 1
        before = self._events.pop(key, None)
        self._num_gone += (value is None) - (before is not None and before.value is None)
        self._events[key] = Event(self._last, key, value, now_s)
        if self._num_gone > self._most_gone:
            self._forget_oldest_gone()
        self._wake()
        return self._last

    def newest(self) -> list[Event[K, V]]:
        """Return the last state of every key that was not removed, the latest change first."""
        return [event for event in reversed(self._events.values()) if event.value is not None]

    def is_too_old(self, after: int) -> bool:
        """Return whether a change that a watcher at ``after`` has not seen may have been forgotten."""
        return after != 0 and not max(self._first, self._oldest_gone) <= after <= self._last

    def close(self, error: Exception | None = None) -> None:
        """End all watches, with ``error`` if there is one. A hub that was closed before remains so."""
        if not self._closed:
            self._closed, self._error = True, error
            self._wake()

    async def watch(self, after: int = 0) -> AsyncIterator[list[Event[K, V]]]:
        """Yield the states newer than ``after``, one event per key, the oldest first, then each change as it happens.

        Each list holds the changes since the one before; the first is yielded at once and may be empty. Ends when the
        hub closes, or raises the error with which it was closed. Raises LeftBehindError, also at the start unless
        ``after`` is 0.
        """
        seen = after
        if after:
            self._require_known(after)
        yield (found := self._newer(seen))
        seen = found[-1].sequence if found else max(seen, self._first)
        while not self._closed:
            self._require_known(seen)
            if found := self._newer(seen):
                seen = found[-1].sequence
                yield found
            else:
                await self._changed.wait()
        if self._error is not None:
            raise self._error.with_traceback(None)  # which would grow with every watcher

    def _require_known(self, seen: int) -> None:
        if seen < self._oldest_gone:
            raise LeftBehindError

    def _newer(self, after: int) -> list[Event[K, V]]:
        found = []
        for event in reversed(self._events.values()):
            if event.sequence <= after:
                break
            found.append(event)
        return found[::-1]

    def _forget_oldest_gone(self) -> None:
        gone = next(event for event in self._events.values() if event.value is None)
        del self._events[gone.key]
        self._num_gone -= 1
        self._oldest_gone = gone.sequence

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
