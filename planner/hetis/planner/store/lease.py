"""The lease as its holder sees it: a promise about this machine's clock, which no silence of the server prolongs."""

from __future__ import annotations

import time
from collections.abc import Callable

DECIDING_SHARE = 2 / 3  # of the lease: after so long without a renewal nothing new is decided


def machine_s() -> float:
    """Seconds that only grow and go on while the machine sleeps, where the system counts them."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class Lease:
    """A term and until when it may be used.

    The server counts a lease from when it grants it, the holder from before it asked: whatever happens to questions and
    answers on the way, the holder stops first. Clocks need not agree on the time, only on how fast it passes.

    Args:
        lease_s: how long a renewal is good for. 0: for ever, where a file's lock holds the term.
        clock: seconds that only grow.
    """

    def __init__(self, lease_s: float, clock: Callable[[], float] = machine_s) -> None:
        self.lease_s = lease_s
        self.clock = clock
        self._asked_s: float | None = None

    def grant(self, asked_s: float) -> None:
        """The server granted what it was asked for at ``asked_s``."""
        self._asked_s = asked_s

    def end(self) -> None:
        """The term is over, whatever time is left of it."""
        self._asked_s = None

    @property
    def age_s(self) -> float:
        """Since the last renewal was asked for; 0 without a lease."""
        return self.clock() - self._asked_s if self._asked_s is not None and self.lease_s else 0.0

    @property
    def left_s(self) -> float:
        """How long the term may still be used; infinity: as long as the process lives."""
        if self._asked_s is None:
            return 0.0
        return self.lease_s - self.age_s if self.lease_s else float("inf")

    @property
    def is_overdue(self) -> bool:
        """The time is over, and nobody has ended the term."""
        return self._asked_s is not None and self.left_s <= 0

    @property
    def is_held(self) -> bool:
        return self.left_s > 0

    @property
    def may_decide(self) -> bool:
        """False in the last third, too: what is begun so late may not be finished in the term."""
        return self.left_s > self.lease_s * (1 - DECIDING_SHARE)
