"""How long a search may take. The solver has no clock of its own: the caller brings one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace


def _no_clock() -> float:
    return 0.0


@dataclass(slots=True, kw_only=True)
class Budget:
    """Time and patience of a caller.

    ``clock`` returns seconds (``time.monotonic``); without one, no time limit applies and reported times are zero.
    ``cancelled`` may be set from a signal handler or another thread: the search then returns its incumbent.
    """

    time_limit_s: float = float("inf")
    clock: Callable[[], float] = _no_clock
    cancelled: threading.Event = field(default_factory=threading.Event)
    callers: Budget | None = None  # a budget that ends this one, too
    started_s: float = field(init=False)

    def __post_init__(self) -> None:
        self.started_s = self.clock()

    def elapsed_s(self) -> float:
        return self.clock() - self.started_s

    def remaining_s(self) -> float:
        return self.time_limit_s - self.elapsed_s()

    def share(self, of_rest: float) -> Budget:
        """A budget that ends after this share of the time that is left, begun and cancelled with this one."""
        limit_s = self.elapsed_s() + of_rest * self.remaining_s()
        part = Budget(time_limit_s=limit_s, clock=self.clock, cancelled=self.cancelled, callers=self.callers)
        part.started_s = self.started_s
        return part

    def of_its_own(self) -> Budget:
        """The time that is left, to be cancelled apart: spent when this one is, but not the other way round."""
        return Budget(time_limit_s=self.remaining_s(), clock=self.clock, callers=self)

    def is_spent(self) -> bool:
        if self.callers is not None and self.callers.is_spent():
            return True
        return self.cancelled.is_set() or self.remaining_s() <= 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A line of news from the search: what it does, the best value so far, the bound, the gap."""

    phase: str
    elapsed_s: float
    incumbent: float | None = None
    bound: float | None = None
    gap: float | None = None


Report = Callable[[Progress], None]


def silent(_: Progress) -> None:
    """Reports to nobody."""


def one_of_several(report: Report, number: int, count: int, what: str = "") -> Report:
    """News of one search of several, with its place among them, from 1, and what it is for."""
    return lambda progress: report(replace(progress, phase=f"{number} of {count}, {what}{progress.phase}"))
