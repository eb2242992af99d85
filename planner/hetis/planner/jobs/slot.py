"""One slot of the pool: a process that is kept warm, and the search that it works on."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable

from hetis.planner.jobs.frames import JobFrame
from hetis.planner.jobs.outcomes import CalledOff, Crashed, Outcome, answer_from_frame, progress_from_frame
from hetis.planner.jobs.process import SolverProcess
from hetis.planner.jobs.search import Begun, Search

_log = logging.getLogger(__name__)

StartProcess = Callable[[], Awaitable[SolverProcess]]


class Slot:
    """Keeps one process and replaces it when it has ended.

    Args:
        start_process: returns a process that has not yet sent ``ready``.
        searches_per_process: how many searches a process does before it is replaced.
        preparation_s: how long a process may load and compile before a search's time limit starts to run.
        grace_s: how long a search may take to answer after its time limit or after it was cancelled.
    """

    def __init__(
        self, start_process: StartProcess, *, searches_per_process: int, preparation_s: float, grace_s: float
    ) -> None:
        self._start_process = start_process
        self._searches_per_process = searches_per_process
        self._preparation_s = preparation_s
        self._grace_s = grace_s
        self._process: SolverProcess | None = None
        self._is_ready = False
        self._search: Search | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._why_killed = ""
        self._is_searching = False

    @property
    def pid(self) -> int | None:
        """The id of the process, or None if there is none."""
        return None if self._process is None else self._process.pid

    async def warm_up(self) -> None:
        """Start a process before there is work. If that fails, the next search reports why."""
        if self._process is not None and self._process.num_searches >= self._searches_per_process:
            await self.stop()
        self._wait_for_preparation()
        if (crashed := await self._prepare()) is not None:
            _log.error("no solver process could be started: %s", crashed.message)
        self._set_timer(None, "")

    async def finish(self, search: Search) -> Outcome:
        """Work on a search until it ends, and return its outcome."""
        try:
            outcome, was_heard = await self._attempt(search)
            if not was_heard:  # an idle process may have died, for lack of memory say; not the search's fault
                outcome, _ = await self._attempt(search)
            return outcome
        finally:
            self._search = None
            self._set_timer(None, "")

    def call_off(self) -> None:
        """Tell the process that the present search is cancelled; it is killed if it does not answer.

        It may finish what it is compiling: otherwise the next search would have to compile it again.
        """
        if self._process is not None and self._is_ready:
            self._process.send(JobFrame(kind="cancel", fields={}))
        if self._is_searching:
            self._expect_end()

    def _expect_end(self) -> None:
        self._set_timer(self._grace_s, f"gave no answer {self._grace_s:g} s after it was called off")

    async def stop(self) -> None:
        """End the process."""
        self._set_timer(None, "")
        self._is_ready = False
        if self._process is not None:
            await self._process.stop()
            self._process = None

    async def _attempt(self, search: Search) -> tuple[Outcome, bool]:
        """Return the outcome, and whether the process had received the search before."""
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
            search.tell(Begun.BEGUN)
        was_heard = False
        while (frame := await process.receive()) is not None:
            was_heard = True
            if frame.kind == "searching":
                self._is_searching = True
                limit_s = search.time_limit_s + self._grace_s - frame.fields.get("spent_s", 0.0)
                if search.is_called_off:
                    self._expect_end()
                else:
                    self._set_timer(limit_s, f"gave no answer {self._grace_s:g} s after its time limit")
            elif frame.kind == "compiling":
                self._wait_for_preparation()
            elif frame.kind == "progress":
                search.tell(progress_from_frame(frame))
            elif (answer := answer_from_frame(frame)) is not None:
                return answer, True
        crashed = await self._bury(process)
        if search.is_called_off:
            return CalledOff(), True
        return crashed, was_heard or bool(self._why_killed)

    async def _prepare(self) -> Crashed | None:
        """Ensure that a process is ready; return a crash if that fails."""
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
        """Return how a process ended whose output has ended."""
        self._is_ready = False
        exit_code = await process.stop()
        self._process = None
        if process.last_lines():
            _log.warning("solver process %d ended with %d:\n%s", process.pid, exit_code, process.last_lines())
        return _crashed(exit_code, self._why_killed or process.last_words())

    def _wait_for_preparation(self) -> None:
        self._is_searching = False
        self._set_timer(self._preparation_s, f"was not ready to search after {self._preparation_s:g} s")

    def _set_timer(self, seconds: float | None, why: str) -> None:
        """Kill the process in ``seconds``; None cancels the timer."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._why_killed = None, ""
        if seconds is not None:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._kill, why)

    def _kill(self, why: str) -> None:
        if self._process is not None:
            self._why_killed = why
            self._process.kill()


def _crashed(exit_code: int, why: str) -> Crashed:
    if exit_code >= 0:
        ending = f"the solver process ended with exit code {exit_code}"
    else:
        ending = f"the solver process was ended by {_signal_name(-exit_code)}"
    return Crashed(exit_code=exit_code, message=f"{ending}: {why}" if why else ending)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
