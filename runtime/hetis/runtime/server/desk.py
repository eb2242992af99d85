"""Between an event loop and an engine that runs in a thread of its own.

The loop hands in requests and gets tickets; the thread runs steps and tells each ticket its news, all of a step at
once. Nothing but values crosses: commands go through a queue, news through ``call_soon_threadsafe``.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from hetis.runtime.engine.engine import Engine
from hetis.runtime.engine.news import TokenOutput
from hetis.runtime.engine.request import DevicesAwayError, RequestError, SamplingParams
from hetis.runtime.server.errors import ApiError, AwayError, BusyError, StoppedError
from hetis.runtime.server.inbox import Inbox, Ticket
from hetis.runtime.server.metrics import ServerMetrics
from hetis.runtime.server.moving import Moving
from hetis.runtime.server.recent import RecentTimes
from hetis.runtime.server.snapshot import EngineView, view_of
from hetis.runtime.server.timing import StepPredictor
from hetis.runtime.steering.engine import Front
from hetis.solver.errors import HetisError

_log = logging.getLogger(__name__)
_TEND_S = 1.0  # between two looks at the devices
T = TypeVar("T")
Clock = Callable[[], float]


class Desk:
    """Owns the engine from `start` to `stop`."""

    def __init__(
        self,
        engine: Engine,
        *,
        model: str,
        version: str,
        most_open: int,
        predictor: StepPredictor | None = None,
        tend: Callable[[], None] | None = None,
        moving: Moving | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        """``most_open``: requests that run or wait; more are refused. ``tend`` is called by the thread now and then,
        between two steps, to look after the engine's devices. ``moving``: what moves its heads.
        """
        self._tend, self._tended_s = tend, clock()
        self._engine, self._predictor, self._clock = engine, predictor, clock
        self.max_tokens, self.most_open = engine.max_tokens, most_open
        self.longest = engine.longest()
        self._moving = moving
        self._view = self._look()
        self.metrics = ServerMetrics(model=model, version=version, view=lambda: self._view)
        self._open: set[Ticket] = set()
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._tickets: dict[int, Ticket] = {}  # the thread's
        self._ends = False  # the thread's
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self.failed = asyncio.Event()
        self._finished_s: list[float] = []
        self._closed = ""  # why nothing new is taken for now
        self._changed = asyncio.Event()
        self._calls: set[asyncio.Future[Any]] = set()
        self._recent = RecentTimes()  # the thread's
        if moving is not None and moving.steered is not None:
            moving.steered.front = Front(
                counts=self._recent.counts,
                close=lambda why: self._tell(self._close_to_new, why),
                end_all=lambda: self._tell(self._end_open),
            )

    # --- in the event loop

    def start(self) -> None:
        """Starts the thread; called in the loop that will use the desk."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Ends the thread after its step. Open requests are answered with an error."""
        self._close(StoppedError("the server is stopping"))
        if self._thread.is_alive():
            self._commands.put(self._end)
            await asyncio.to_thread(self._thread.join)

    @property
    def view(self) -> EngineView:
        """The engine after its last step."""
        return self._view

    @property
    def open_requests(self) -> int:
        return len(self._open)

    @property
    def is_ready(self) -> bool:
        return not self.why_not_ready

    @property
    def why_not_ready(self) -> str:
        """Why nothing new is taken; empty: it is."""
        if self.failed.is_set():
            return "the engine has failed"
        return "the server is stopping" if self.is_stopping else self._closed

    @property
    def is_stopping(self) -> bool:
        """Nothing new will be taken any more."""
        return self._draining or not self._thread.is_alive()

    async def stepped(self) -> None:
        """Until the engine has made a step, or its devices were looked after, again."""
        await self._changed.wait()

    def names(self) -> dict[int, str]:
        """Names of the calls that open requests belong to, by the engine's numbers."""
        return {ticket.number: ticket.name for ticket in self._open if ticket.number is not None}

    def submit(self, name: str, requests: Sequence[tuple[Sequence[int], SamplingParams]]) -> list[Ticket]:
        """Hands in the requests of the call ``name``, all of them or none; their news come to one inbox.

        Raises:
            BusyError: too many are open.
            StoppedError: the server is ending.
        """
        if not self.is_ready:
            raise StoppedError(self.why_not_ready)
        if len(requests) > self.most_open:
            raise ApiError(f"{len(requests)} answers are asked for at once, {self.most_open} may be open", param="n")
        if len(self._open) + len(requests) > self.most_open:
            raise BusyError(open_requests=len(self._open), limit=self.most_open, retry_s=self._retry_s())
        now_s, inbox = self._clock(), Inbox()
        tickets = [Ticket(name, i, inbox, prompt, params, now_s) for i, (prompt, params) in enumerate(requests)]
        for ticket in tickets:
            self._open.add(ticket)
            self._commands.put(lambda ticket=ticket: self._add(ticket))  # type: ignore[misc]
        self._idle.clear()
        return tickets

    def cancel(self, ticket: Ticket) -> None:
        """Nobody wants the answer any more; one that is over is no error."""
        if not ticket.is_over:
            self._close_ticket(ticket)
            self._commands.put(lambda: self._cancel(ticket))

    async def move(self, number: int, heads: Sequence[int], target: int, *, stage: int = 0) -> bool:
        """Moves heads of a running request between two steps; False: the target has too few pages.

        ``heads`` and ``target`` count within the stage.

        Raises:
            ApiError: there is no such running request, or the move cannot be made.
        """

        def act() -> bool:
            request = self._engine.running.get(number)
            if request is None:
                raise ApiError(f"request {number} is not running", status=404, code="not_running")
            groups = len(request.heads.get(stage, ()))
            if not heads or not all(0 <= head < groups for head in heads):
                raise ApiError(f"heads are {list(heads)}, must be >= 0 and < {groups}, at least one", param="heads")
            try:
                return self._engine.move(number, heads, target, stage=stage)
            except HetisError as error:
                raise ApiError(str(error), status=409, code="not_movable") from None

        return await self.call(act)

    async def drain(self, limit_s: float) -> int:
        """Takes nothing new and waits until all is answered; returns how many were not when the limit came."""
        self._draining = True
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), limit_s)
        return len(self._open)

    async def call(self, act: Callable[[], T], *, refusals: tuple[type[Exception], ...] = (ApiError,)) -> T:
        """What ``act`` returns, or raises of ``refusals``, between two steps; any other error is the engine's end.

        Raises:
            StoppedError: the engine has ended.
        """
        if not self._thread.is_alive():
            raise StoppedError("the engine has ended")
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._calls.add(answer)
        answer.add_done_callback(self._calls.discard)

        def run() -> None:
            try:
                result = act()
            except refusals as error:
                self._tell(_settle, answer, None, error)
            else:
                self._tell(_settle, answer, result, None)

        self._commands.put(run)
        return await answer

    def between_steps(self, act: Callable[[], None]) -> None:
        """Has the thread do something between two steps, at once where there is nothing to do; from any thread."""
        self._commands.put(act)

    def _close_to_new(self, why: str) -> None:
        """Takes nothing new for that reason; empty: takes it again."""
        if why != self._closed:
            _log.info("%s", f"nothing new is taken: {why}" if why else "requests are taken")
        self._closed = why

    def _end_open(self) -> None:
        for ticket in list(self._open):
            self._commands.put(lambda ticket=ticket: self._cancel(ticket))  # type: ignore[misc]
            self._refuse(ticket, StoppedError(self._closed))

    def _retry_s(self) -> int:
        """When a request will have ended, by how often that happened lately."""
        ended = self._finished_s
        if len(ended) < 2 or ended[-1] <= ended[0]:
            return 1
        return max(1, min(60, round((ended[-1] - ended[0]) / (len(ended) - 1))))

    def _deliver(self, news: list[tuple[Ticket, list[TokenOutput]]], view: EngineView) -> None:
        self._view = view
        self._changed.set()
        self._changed = asyncio.Event()
        for ticket, outputs in news:
            ticket.inbox.put(ticket.index, outputs)
            if outputs[-1].finish_reason is not None and not ticket.is_over:
                self._close_ticket(ticket)

    def _close_ticket(self, ticket: Ticket) -> None:
        ticket.is_over = True
        self._open.discard(ticket)
        self._finished_s = [*self._finished_s[-15:], self._clock()]
        if not self._open:
            self._idle.set()

    def _refuse(self, ticket: Ticket, error: ApiError) -> None:
        ticket.inbox.refuse(error)
        if not ticket.is_over:
            self._close_ticket(ticket)

    def _close(self, error: ApiError) -> None:
        self._draining = True
        for ticket in list(self._open):
            self._refuse(ticket, error)
        for answer in list(self._calls):
            _settle(answer, None, StoppedError("the engine has ended"))

    def _fail(self) -> None:
        self.failed.set()
        self._close(ApiError("the engine has failed", status=500, kind="server_error", code="engine_failed"))

    # --- in the thread

    def _work(self) -> None:
        try:
            while not self._ends:
                self._obey()
                self._tend_devices()
                if self._engine.has_work and not self._ends:
                    self._step()
        except Exception:
            _log.exception("the engine has failed")
            self._tell(self._fail)

    def _obey(self) -> None:
        """All commands there are; waits for one where there is nothing else to do."""
        waits = self._engine.only_waits
        if waits or not self._engine.has_work:
            with suppress(Empty):
                self._commands.get(timeout=_TEND_S if waits or self._tend else None)()
        while not self._commands.empty():
            self._commands.get()()

    def _tend_devices(self) -> None:
        if self._tend is not None and self._clock() - self._tended_s >= _TEND_S:
            self._tended_s = self._clock()
            self._tend()
            self._tell(self._deliver, [], self._look())

    def _look(self) -> EngineView:
        return view_of(self._engine, self._moving.view() if self._moving else None)

    def _end(self) -> None:
        self._ends = True

    def _add(self, ticket: Ticket) -> None:
        if ticket.is_over:
            return
        try:
            number = self._engine.add(ticket.prompt, ticket.params)
        except RequestError as error:
            is_ours = isinstance(error, DevicesAwayError)
            self._tell(self._refuse, ticket, AwayError(str(error)) if is_ours else ApiError(str(error)))
            return
        ticket.number = number
        self._tickets[number] = ticket

    def _cancel(self, ticket: Ticket) -> None:
        if ticket.number is not None:
            self._engine.cancel(ticket.number)

    def _step(self) -> None:
        steps = self._engine.num_steps
        begun_s = self._clock()
        outputs = self._engine.step()
        ended_s = self._clock()
        if self._engine.num_steps > steps and self._engine.last_step is not None:
            step = self._engine.last_step
            predicted_s = self._predictor.step_s(step) if self._predictor else None
            self.metrics.step_done(seconds=ended_s - begun_s, predicted_s=predicted_s, tokens=len(step.tokens))
        self._tell(self._deliver, self._sort(outputs, ended_s), self._look())

    def _sort(self, outputs: Sequence[TokenOutput], now_s: float) -> list[tuple[Ticket, list[TokenOutput]]]:
        """News by ticket, counted on their way."""
        by_number: dict[int, list[TokenOutput]] = {}
        for output in outputs:
            if output.request not in self._tickets:
                continue  # of no client: a prompt that is computed for another engine
            by_number.setdefault(output.request, []).append(output)
            ticket = self._tickets[output.request]
            if output.token is not None:
                if ticket.token_s is None:
                    self.metrics.first_token(now_s - ticket.arrived_s, prompt_tokens=len(ticket.prompt))
                    self._recent.first_token(now_s - ticket.arrived_s)
                else:
                    self.metrics.next_token(now_s - ticket.token_s)
                    self._recent.next_token(now_s - ticket.token_s)
                ticket.token_s = now_s
            if output.finish_reason is not None:
                self.metrics.finished(output.finish_reason, now_s - ticket.arrived_s)
                self._recent.finished()
        found = [(self._tickets[number], news) for number, news in by_number.items()]
        for number, news in by_number.items():
            if news[-1].finish_reason is not None:
                del self._tickets[number]
        return found

    def _tell(self, act: Callable[..., None], *arguments: object) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop has ended before us
            self._loop.call_soon_threadsafe(act, *arguments)


def _settle(answer: asyncio.Future[T], result: T, error: Exception | None) -> None:
    if answer.done():
        return
    if error is None:
        answer.set_result(result)
    else:
        answer.set_exception(error)
