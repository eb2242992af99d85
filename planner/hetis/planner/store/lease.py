"""The lease from its holder's side: a promise by this machine's clock, which no silence of the server can prolong."""

from __future__ import annotations

import time
from collections.abc import Callable

DECIDING_SHARE = 2 / 3  # of the lease: this long after the last renewal, nothing new is decided


def machine_s() -> float:
    """Return monotonic seconds, which include the time that the machine sleeps where the system counts it."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class Lease:
    """A term and how long it may be used.

    The server counts a lease from the moment it grants it, the holder from before it asked. However long messages take,
    the holder stops first. The clocks need not agree on the time, only on how fast it passes.

    Args:
        lease_s: how long a renewal is good for; 0 means for ever, as when a file lock holds the term.
        clock: monotonic seconds.
    """

    def __init__(self, lease_s: float, clock: Callable[[], float] = machine_s) -> None:
        self.lease_s = lease_s
        self.clock = clock
        self._asked_s: float | None = None

    def grant(self, asked_s: float) -> None:
        """Record that the server granted the renewal that was asked for at ``asked_s``."""
        self._asked_s = asked_s

    def end(self) -> None:
        """End the term, whatever time is left of it."""
        self._asked_s = None

    @property
    def age_s(self) -> float:
        """Return the seconds since the last granted renewal was asked for; 0 without a lease."""
        return self.clock() - self._asked_s if self._asked_s is not None and self.lease_s else 0.0

    @property
    def left_s(self) -> float:
        """Return how long the term may still be used; infinity means as long as the process lives."""
        if self._asked_s is None:
            return 0.0
        return self.lease_s - self.age_s if self.lease_s else float("inf")

    @property
    def is_overdue(self) -> bool:
        """Return whether the lease has expired although nobody has ended the term."""
        return self._asked_s is not None and self.left_s <= 0

    @property
    def is_held(self) -> bool:
        return self.left_s > 0

    @property
    def may_decide(self) -> bool:
        """Return whether new work may begin, which is False in the last third of the lease.

        Work begun so late might not be finished within the term.
        """
        return self.left_s > self.lease_s * (1 - DECIDING_SHARE)
