"""A bounded pool of solver processes with a queue and quotas per caller."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from hetis.planner.failures import Reason, ServiceError, quota_exceeded
from hetis.planner.jobs.outcomes import CalledOff, Outcome
from hetis.planner.jobs.process import SolverProcess
from hetis.planner.jobs.search import Search
from hetis.planner.jobs.slot import Slot, StartProcess

LEAST_RETRY_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSettings:
    """The share of the machine that searches may use.

    Attributes:
        num_processes: concurrent searches.
        queue_size: searches that wait, in addition to those that run.
        running_per_caller: concurrent searches of one caller, so that others need not wait for all of them; None: any.
        queued_per_caller: waiting searches of one caller; None: any.
        searches_per_process: how many searches a process does before it is replaced, so that no leak grows for ever.
        grace_s: how long a search may take to answer after its time limit or after it was cancelled.
        preparation_s: how long a process may load and compile before a search's time limit starts to run.
    """

    num_processes: int = 1
    queue_size: int = 16
    running_per_caller: int | None = None
    queued_per_caller: int | None = None
    searches_per_process: int = 50
    grace_s: float = 60.0
    preparation_s: float = 600.0


class SolverPool:
    """Slots that keep one process each and work through the common queue. Belongs to one event loop."""

    def __init__(
        self,
        settings: PoolSettings,
        *,
        start_process: StartProcess = SolverProcess.start,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._places: set[Search] = set()  # reserved, waiting or running
        self._waiting: dict[str, deque[Search]] = {}  # by caller, the caller whose turn is next first
        self._arrived = asyncio.Event()
        self._running: dict[Search, tuple[Slot, float]] = {}  # its slot, and when it began
        self._tasks: list[asyncio.Task[None]] = []
        self._slots = [
            Slot(
                start_process,
                searches_per_process=settings.searches_per_process,
                preparation_s=settings.preparation_s,
                grace_s=settings.grace_s,
            )
            for _ in range(settings.num_processes)
        ]

    # --- for the owner

    def start(self) -> None:
        """Start the processes, so that they are warm when the first search comes."""
        self._tasks = [
            asyncio.create_task(self._work(slot), name=f"solver slot {number}")
            for number, slot in enumerate(self._slots)
        ]

    async def until_failed(self) -> None:
        """Wait until the pool is stopped; raise the error that ended a slot, which takes no more searches."""
        done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            if not task.cancelled():
                task.result()

    async def stop(self) -> None:
        """End all processes at once. Unfinished searches get no outcome: they are started again elsewhere."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for slot in self._slots:
            await slot.stop()

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    @property
    def pids(self) -> list[int]:
        """Process ids of the present processes."""
        return [slot.pid for slot in self._slots if slot.pid is not None]

    def searches_of(self) -> dict[str, dict[str, int]]:
        """Return the number of ``running`` and ``queued`` searches of each caller."""
        found: dict[str, dict[str, int]] = {}
        for search in self._places:
            counts = found.setdefault(search.caller, {"running": 0, "queued": 0})
            counts["running" if search in self._running else "queued"] += 1
        return found

    def reserve(self, caller: str, *, even_if_full: bool = False) -> Search:
        """Reserve a place for one search, to be begun or abandoned.

        Raises:
            ServiceError: QUOTA_EXCEEDED or SOLVER_QUEUE_FULL, with the time at which a place may be free.
        """
        settings = self._settings
        if not even_if_full:
            self._require_quota(caller)
        if not even_if_full and len(self._places) >= settings.num_processes + settings.queue_size:
            queued = len(self._places) - settings.num_processes
            raise ServiceError(
                Reason.ERROR_REASON_SOLVER_QUEUE_FULL,
                f"all {settings.num_processes} solver processes are busy and {queued} searches wait",
                metadata={"queued": queued},
                retry_after_s=self.retry_after_s(),
            )
        search = Search(self, caller)
        self._places.add(search)
        return search

    def _require_quota(self, caller: str) -> None:
        settings = self._settings
        if settings.queued_per_caller is None:
            return
        most = settings.queued_per_caller + self._most_running
        if sum(search.caller == caller for search in self._places) >= most:
            raise quota_exceeded(
                caller,
                "searches",
                f"{caller} has {most} searches that run or wait ({self._most_running} may run at a time), and may have"
                " no more: wait for one, or cancel it",
                limit=most,
                retry_after_s=self.retry_after_s(),
            )

    @property
    def _most_running(self) -> int:
        return min(self._settings.running_per_caller or self._settings.num_processes, self._settings.num_processes)

    def retry_after_s(self) -> float:
        """Return in how many seconds the first running search ends at the latest."""
        now_s = self._clock()
        left_s = [since_s + search.time_limit_s - now_s for search, (_, since_s) in self._running.items()]
        return max(LEAST_RETRY_S, min(left_s, default=LEAST_RETRY_S))

    # --- for searches

    def enqueue(self, search: Search) -> None:
        self._waiting.setdefault(search.caller, deque()).append(search)
        self._arrived.set()

    def give_back(self, search: Search) -> None:
        self._places.discard(search)

    def call_off(self, search: Search) -> None:
        if search in self._running:
            self._running[search][0].call_off()
        elif search in (waiting := self._waiting.get(search.caller, deque())):
            waiting.remove(search)
            self._end(search, CalledOff())

    # --- for slots

    async def _work(self, slot: Slot) -> None:
        while True:
            await slot.warm_up()
            while (search := self._next()) is None:
                self._arrived.clear()
                await self._arrived.wait()
            self._running[search] = slot, self._clock()
            outcome = await slot.finish(search)
            self._end(search, outcome)

    def _next(self) -> Search | None:
        """Return the search to run next, if any. Callers take turns, those with the fewest running searches first."""
        running = Counter(search.caller for search in self._running)
        for caller in [caller for caller, waiting in self._waiting.items() if not waiting]:
            del self._waiting[caller]
        ready = [caller for caller in self._waiting if running[caller] < self._most_running]
        if not ready:
            return None
        caller = min(ready, key=running.__getitem__)  # ties go to the caller whose last turn is longest ago
        waiting = self._waiting.pop(caller)
        search = waiting.popleft()
        if waiting:
            self._waiting[caller] = waiting
        return search

    def _end(self, search: Search, outcome: Outcome) -> None:
        self._places.discard(search)
        self._running.pop(search, None)
        self._arrived.set()  # its caller may have another search that had to wait
        search.tell(outcome)
