"""Values read from files that change under a running process: certificates, tokens."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, Protocol, TypeVar

from hetis.formats.errors import DocumentError

T = TypeVar("T")
_log = logging.getLogger("hetis.planner.reloading")
Signature = tuple[tuple[int, int, int] | None, ...]


class Refreshable(Protocol):
    """Something that may be outdated."""

    def refresh(self) -> bool:
        """Refresh the value if it is outdated; return whether it was."""
        ...


class Reloaded(Generic[T]):
    """The value of some files, loaded again when they change.

    If new files are bad, that is logged and the old value kept.

    Raises:
        DocumentError: when made, if the files are bad from the start.
    """

    def __init__(self, what: str, paths: Sequence[str], load: Callable[[], T]) -> None:
        self._what = what
        self._paths = tuple(paths)
        self._load = load
        self._seen = self._signature()
        self.value = load()
        self.version = 1

    def refresh(self) -> bool:
        now = self._signature()
        if now == self._seen:
            return False
        try:
            value = self._load()
        except DocumentError as error:
            if None not in now:  # a file that is gone for a moment is being replaced
                self._seen = now
            _log.error("%s: the new files are bad, the old ones stay in force: %s", self._what, error)
            return False
        if self._signature() != now:
            return False  # they changed while being read: next time
        self._seen = now
        self.value = value
        self.version += 1
        _log.info("%s: read again from %s", self._what, ", ".join(self._paths))
        return True

    def _signature(self) -> Signature:
        return tuple(_stat(path) for path in self._paths)


async def keep_fresh(
    sources: Iterable[Refreshable], interval_s: float, *, then: Callable[[], None] = lambda: None
) -> None:
    """Refresh sources periodically until cancelled; call ``then`` after each round, in the loop."""
    kept = tuple(sources)
    while True:
        await asyncio.sleep(interval_s)
        for source in kept:
            try:
                await asyncio.to_thread(source.refresh)
            except Exception:
                _log.exception("looking for new files failed")
        try:
            then()
        except Exception:  # one failure must not end the loop for ever
            _log.exception("what follows from files failed")


def _stat(path: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)  # through links: Kubernetes changes the link
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
