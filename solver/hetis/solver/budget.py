"""Time budgets and progress reports of a search. The solver has no clock of its own; the caller provides one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any

from hetis.solver.errors import NoPlanFoundError

WORK_PER_S = 5_000.0  # of a search on a usual core: iterations of the simplex method, and replicas evaluated
PER_NODE = 4.0  # least work of a node of a search tree, by which the nodes of one program are limited


def _no_clock() -> float:
    return 0.0


@dataclass(slots=True, kw_only=True)
class Budget:
    """A caller's time limit, and a way to cancel.

    ``clock`` returns seconds (``time.monotonic``); without one, no time limit applies and reported times are zero.
    ``cancelled`` may be set from a signal handler or another thread; the search then returns its incumbent. If no plan
    exists, the time left is spent on finding out why, unless ``explains`` is false. Work that is the same on any
    machine is limited by ``work_limit``, in units of the search (`WORK_PER_S`) or of a simulation: only then is the
    result the same, too, and the time limit just guards.
    """

    time_limit_s: float = float("inf")
    clock: Callable[[], float] = _no_clock
    cancelled: threading.Event = field(default_factory=threading.Event)
    explains: bool = True
    callers: Budget | None = None  # a budget whose end also ends this one
    work_limit: float = float("inf")
    work: float = 0.0  # done so far
    started_s: float = field(init=False)

    def __post_init__(self) -> None:
        self.started_s = self.clock()

    def elapsed_s(self) -> float:
        return self.clock() - self.started_s

    def remaining_s(self) -> float:
        return self.time_limit_s - self.elapsed_s()

    def remaining_work(self) -> float:
        """Return the work that is left, also of the callers'."""
        own = self.work_limit - self.work
        return own if self.callers is None else min(own, self.callers.remaining_work())

    def nodes(self, most: int) -> int:
        """Return how many nodes of a search tree there is work left for, up to ``most``, at least one."""
        return max(1, int(min(most, self.remaining_work() / PER_NODE)))

    def charge(self, work: float) -> None:
        """Count work that was done, also as that of the callers' budgets."""
        self.work += work
        if self.callers is not None:
            self.callers.charge(work)

    def share(self, of_rest: float, *, explains: bool = True) -> Budget:
        """Return a budget for this share of the time and work left, with this one's start and cancellation."""
        limit_s = self.elapsed_s() + of_rest * self.remaining_s()
        part = replace(
            self, time_limit_s=limit_s, explains=self.explains and explains, callers=self, work=0.0,
            work_limit=of_rest * self.remaining_work(),
        )  # fmt: skip
        part.started_s = self.started_s
        return part

    def of_its_own(self) -> Budget:
        """Return a budget for the time left that ends with this one but is cancelled separately."""
        return Budget(time_limit_s=self.remaining_s(), clock=self.clock, callers=self)

    def is_spent(self) -> bool:
        if self.callers is not None and self.callers.is_spent():
            return True
        return self.cancelled.is_set() or self.remaining_work() <= 0 or self.remaining_s() <= 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A progress report of the search: its phase, the best value so far, the bound, the gap."""

    phase: str
    elapsed_s: float
    incumbent: float | None = None
    bound: float | None = None
    gap: float | None = None


Report = Callable[[Progress], None]


def silent(_: Progress) -> None:
    """Report nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSettings:
    """The settings of a search: when it ends (``budget``, ``gap_target``), what it may use, and where it reports.

    Searches of similar problems that have one ``evaluated`` do not evaluate the same stages again
    (`CostTables.evaluated`).
    """

    strategy: str = "hetis"
    budget: Budget = field(default_factory=Budget)
    gap_target: float = 0.001
    seed: int = 0
    report: Report = silent
    evaluated: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)

    def within(self, of_rest: float) -> SearchSettings:
        """Return the settings for a search in this share of the time left."""
        return replace(self, budget=self.budget.share(of_rest))

    def tell(
        self, phase: str, incumbent: float | None = None, bound: float | None = None, gap: float | None = None
    ) -> None:
        """Report the progress of the search."""
        elapsed_s = self.budget.elapsed_s()
        self.report(Progress(phase=phase, elapsed_s=elapsed_s, incumbent=incumbent, bound=bound, gap=gap))

    def stopped(self) -> NoPlanFoundError:
        """Return the error for a search that ran out of time before it had a plan."""
        return NoPlanFoundError(f"no plan found within {self.budget.elapsed_s():.1f} s; allow more time")


def one_of_several(report: Report, number: int, count: int, what: str = "") -> Report:
    """Return a report for one of several searches that adds its number (from 1), their count and its subject."""
    return lambda progress: report(replace(progress, phase=f"{number} of {count}, {what}{progress.phase}"))
