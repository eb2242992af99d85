"""A bounded pool of solver processes with a queue and quotas per caller."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from functools import partial

from hetis.planner.failures import Reason, ServiceError, quota_exceeded
from hetis.planner.jobs.frames import JobFrame
from hetis.planner.jobs.messages import CalledOff, Crashed, Outcome, answer_from_frame, progress_from_frame
from hetis.planner.jobs.process import SolverProcess, crash_of
from hetis.solver.budget import Progress


class Begun(Enum):
    """Sent when a process starts the search."""

    BEGUN = "begun"


SearchEvent = Begun | Progress | Outcome


class PooledSearch:
    """A search with its place in the pool and its outcome, created by `SolverPool.reserve`."""

    def __init__(self, pool: SolverPool, caller: str) -> None:
        self._pool = pool
        self.caller = caller
        self._events: asyncio.Queue[SearchEvent] = asyncio.Queue()
        self.posed_json = b""  # set when the search begins
        self.time_limit_s = 0.0
        self.is_called_off = False

    def begin(self, posed_json: bytes, *, time_limit_s: float) -> None:
        """Put the search into the queue."""
        self.posed_json, self.time_limit_s = posed_json, time_limit_s
        self._pool.enqueue(self)

    def abandon(self) -> None:
        """Return the reserved place; the search will not begin."""
        self._pool.give_back(self)

    def cancel(self) -> None:
        """Cancel the search; its outcome is the best plan so far, if any. Has no effect once it has ended."""
        if not self.is_called_off:
            self.is_called_off = True
            self._pool.call_off(self)

    async def events(self) -> AsyncIterator[SearchEvent]:
        """Yield the events of the search, for a single reader; the last one is its outcome."""
        while True:
            event = await self._events.get()
            yield event
            if not isinstance(event, Begun | Progress):
                return

    def append(self, event: SearchEvent) -> None:
        """Append an event; called by the pool."""
        self._events.put_nowait(event)


_log = logging.getLogger(__name__)

StartProcess = Callable[[], Awaitable[SolverProcess]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSettings:
    """The share of the machine that searches may use."""

    num_processes: int = 1  # concurrent searches
    queue_size: int = 16  # searches that wait, in addition to those that run
    # Concurrent searches of one caller, so that others need not wait for all of them; None: no limit
    running_per_caller: int | None = None
    queued_per_caller: int | None = None  # waiting searches of one caller; None: no limit
    # Searches after which a process is replaced, so that no leak grows without bound
    searches_per_process: int = 50
    # Time after which processes load the solver even without a search. Not at once: loading takes a core for seconds,
    # and agents connect at that time. An earlier search starts its process.
    warm_up_after_s: float = 10.0
    grace_s: float = 60.0  # time for an answer after a search's time limit, or after it was cancelled
    preparation_s: float = 600.0  # time for a process to load and compile before a search's time limit starts to run
    # Time for a process to simulate a plan, besides the time limit of the searches that follow from it; after that, the
    # plan is returned as it was found
    verification_s: float = 600.0


class Slot:
    """One slot of the pool: its present search, and a process that is kept warm and replaced when it has ended."""

    def __init__(self, start_process: StartProcess, settings: PoolSettings) -> None:
        """``start_process`` returns a process that has not yet sent ``ready``."""
        self._start_process, self._settings = start_process, settings
        self._process: SolverProcess | None = None
        self._is_ready = False
        self._search: PooledSearch | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._why_killed = ""  # why the present process was killed; empty: it was not
        self._is_searching = False  # whether the search's time limit is running: the process has loaded and compiled

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def warm_up(self) -> None:
        """Start a process before there is work. If that fails, the next search reports the reason."""
        if self._process is not None and self._process.num_searches >= self._settings.searches_per_process:
            await self.stop()
        self._wait_for_preparation()
        if (crashed := await self._prepare()) is not None:
            _log.error("no solver process could be started: %s", crashed.message)
        self._set_timer(None, "")

    async def finish(self, search: PooledSearch) -> Outcome:
        """Work on a search until it ends, and return its outcome."""
        try:
            outcome, has_answered = await self._attempt(search)
            if not has_answered:  # an idle process may have died, such as of lack of memory; not the search's fault
                outcome, _ = await self._attempt(search)
            return outcome
        finally:
            self._search = None
            self._set_timer(None, "")

    def call_off(self) -> None:
        """Inform the process that the present search is cancelled; the process is killed if it does not answer.

        It may finish compiling: otherwise the next search would have to compile the same again.
        """
        if self._process is not None and self._is_ready:
            self._process.send(JobFrame(kind="cancel", fields={}))
        if self._is_searching:
            self._expect_end()

    def _expect_end(self) -> None:
        self._set_timer(
            self._settings.grace_s, f"did not answer within {self._settings.grace_s:g} s after it was cancelled"
        )

    async def stop(self) -> None:
        self._set_timer(None, "")
        self._is_ready = False
        if self._process is not None:
            await self._process.stop()
            self._process = None

    async def _attempt(self, search: PooledSearch) -> tuple[Outcome, bool]:
        """Return the outcome, and whether the process had received the search before it ended."""
        self._wait_for_preparation()
        if (crashed := await self._prepare()) is not None:
            return CalledOff() if search.is_called_off else crashed, True
        if search.is_called_off:
            return CalledOff(), True
        process = self._process
        assert process is not None, "it was prepared"
        process.num_searches += 1
        process.send(JobFrame(kind="solve", fields={}, payload=search.posed_json))
        if self._search is not search:
            self._search = search
            search.append(Begun.BEGUN)
        has_answered = False
        while (frame := await process.receive()) is not None:
            has_answered = True
            if frame.kind in ("searching", "verifying"):
                self._is_searching = True
                if search.is_called_off:
                    self._expect_end()
                elif frame.kind == "searching":
                    limit_s = search.time_limit_s + self._settings.grace_s - frame.fields.get("spent_s", 0.0)
                    self._set_timer(limit_s, f"did not answer within {self._settings.grace_s:g} s after its time limit")
                else:  # there is a plan already
                    limit_s = search.time_limit_s + self._settings.verification_s - frame.fields["spent_s"]
                    self._call_in(limit_s, self.call_off)
            elif frame.kind == "compiling":
                self._wait_for_preparation()
            elif frame.kind == "progress":
                search.append(progress_from_frame(frame))
            elif (answer := answer_from_frame(frame)) is not None:
                return answer, True
        crashed = await self._bury(process)
        if search.is_called_off:
            return CalledOff(), True
        return crashed, has_answered or bool(self._why_killed)

    async def _prepare(self) -> Crashed | None:
        """Ensure that a process is ready; return a crash if none can be started."""
        if self._process is not None and not self._process.is_alive:
            await self.stop()
        if self._process is None:
            try:
                self._process = await self._start_process()
            except OSError as error:
                return Crashed(exit_code=0, message=f"no solver process could be started: {error}")
        if not self._is_ready:
            frame = await self._process.receive()
            if frame is None or frame.kind != "ready":
                return await self._bury(self._process)
            self._is_ready = True
        return None

    async def _bury(self, process: SolverProcess) -> Crashed:
        """Remove a process whose output has ended, and return how it ended."""
        self._is_ready = False
        exit_code = await process.stop()
        self._process = None
        if process.last_lines():
            _log.warning("solver process %d ended with %d:\n%s", process.pid, exit_code, process.last_lines())
        return crash_of(exit_code, self._why_killed or process.last_words())

    def _wait_for_preparation(self) -> None:
        self._is_searching = False
        most_s = self._settings.preparation_s
        self._set_timer(most_s, f"was not ready to search after {most_s:g} s")

    def _set_timer(self, seconds: float | None, why: str) -> None:
        """Kill the process in ``seconds``; None cancels the timer."""
        self._call_in(seconds, partial(self._kill, why))

    def _call_in(self, seconds: float | None, act: Callable[[], None]) -> None:
        """Call ``act`` after ``seconds`` instead of whatever the timer was set to; None cancels the timer."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._why_killed = None, ""
        if seconds is not None:
            self._timer = asyncio.get_running_loop().call_later(seconds, act)

    def _kill(self, why: str) -> None:
        if self._process is not None:
            self._why_killed = why
            self._process.kill()


LEAST_RETRY_S = 1.0
VERIFYING_RETRY_S = 10.0  # used while a search past its time limit simulates its plan


class SolverPool:
    """Slots with one process each, which take searches from a common queue. Belongs to one event loop."""

    def __init__(
        self,
        settings: PoolSettings,
        *,
        start_process: StartProcess = SolverProcess.start,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._places: set[PooledSearch] = set()  # reserved, waiting and running searches
        self._waiting: dict[str, deque[PooledSearch]] = {}  # by caller, starting with the caller whose turn is next
        self._arrived = asyncio.Event()
        self._running: dict[PooledSearch, tuple[Slot, float]] = {}  # the slot of each, and the time it began
        self._tasks: list[asyncio.Task[None]] = []
        self._slots = [Slot(start_process, settings) for _ in range(settings.num_processes)]

    # --- for the owner of the pool

    def start(self) -> None:
        """Start to accept searches. Processes start with the first ones, or after ``warm_up_after_s``."""
        named = [(f"solver slot {number}", slot) for number, slot in enumerate(self._slots)]
        self._tasks = [asyncio.create_task(self._work(slot), name=name) for name, slot in named]

    async def until_failed(self) -> None:
        """Wait until the pool is stopped; raise the error that ended a slot, which then accepts no more searches."""
        done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            if not task.cancelled():
                task.result()

    async def stop(self) -> None:
        """End all processes at once. Unfinished searches have no outcome: they are started again elsewhere."""
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
        """Ids of the present processes."""
        return [slot.pid for slot in self._slots if slot.pid is not None]

    def searches_of(self) -> dict[str, dict[str, int]]:
        """Return the number of ``running`` and ``queued`` searches of each caller."""
        found: dict[str, dict[str, int]] = {}
        for search in self._places:
            counts = found.setdefault(search.caller, {"running": 0, "queued": 0})
            counts["running" if search in self._running else "queued"] += 1
        return found

    def reserve(self, caller: str, *, even_if_full: bool = False) -> PooledSearch:
        """Reserve a place. Raises QUOTA_EXCEEDED or SOLVER_QUEUE_FULL, with the time after which one may be free."""
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
        search = PooledSearch(self, caller)
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
                f"{caller} has {most} searches running or waiting ({self._most_running} may run at a time), "
                "and may have"
                " no more: wait for one, or cancel it",
                limit=most,
                retry_after_s=self.retry_after_s(),
            )

    @property
    def _most_running(self) -> int:
        return min(self._settings.running_per_caller or self._settings.num_processes, self._settings.num_processes)

    def retry_after_s(self) -> float:
        """Return the seconds until the first running search reaches its time limit, after which to retry."""
        now_s = self._clock()
        left_s = [since_s + search.time_limit_s - now_s for search, (_, since_s) in self._running.items()]
        left_s = [one_s if one_s > 0 else VERIFYING_RETRY_S for one_s in left_s]
        return max(LEAST_RETRY_S, min(left_s, default=LEAST_RETRY_S))

    # --- for searches

    def enqueue(self, search: PooledSearch) -> None:
        self._waiting.setdefault(search.caller, deque()).append(search)
        self._arrived.set()

    def give_back(self, search: PooledSearch) -> None:
        self._places.discard(search)

    def call_off(self, search: PooledSearch) -> None:
        if search in self._running:
            self._running[search][0].call_off()
        elif search in (waiting := self._waiting.get(search.caller, deque())):
            waiting.remove(search)
            self._end(search, CalledOff())

    # --- for slots

    async def _work(self, slot: Slot) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._arrived.wait(), self._settings.warm_up_after_s)
        while True:
            await slot.warm_up()
            while (search := self._next()) is None:
                self._arrived.clear()
                await self._arrived.wait()
            self._running[search] = slot, self._clock()
            outcome = await slot.finish(search)
            self._end(search, outcome)

    def _next(self) -> PooledSearch | None:
        """Return the search to run next, if any. Callers take turns, those with the fewest running searches first."""
        running = Counter(search.caller for search in self._running)
        for caller in [caller for caller, waiting in self._waiting.items() if not waiting]:
            del self._waiting[caller]
        ready = [caller for caller in self._waiting if running[caller] < self._most_running]
        if not ready:
            return None
        caller = min(ready, key=running.__getitem__)  # ties go to the caller whose last turn was longest ago
        waiting = self._waiting.pop(caller)
        search = waiting.popleft()
        if waiting:
            self._waiting[caller] = waiting
        return search

    def _end(self, search: PooledSearch, outcome: Outcome) -> None:
        self._places.discard(search)
        self._running.pop(search, None)
        self._arrived.set()  # its caller may have another search, which had to wait
        search.append(outcome)
