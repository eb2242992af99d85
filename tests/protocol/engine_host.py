"""An engine process in virtual time: the real simulated engine, as its server runs it, without sockets."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

from examples.simulated_engine.engine import SimulatedEngine
from examples.simulated_engine.replica import Control
from hetis.runtime.agent.outbox import EngineRequest, EngineResponse
from hetis.runtime.moves.refusals import RefusedError, failure_of, unreachable
from hetis.v1 import executor_service_pb2 as messages
from hetis.v1.change_pb2 import ChangePhase, ChangeStatus
from hetis.v1.failure_pb2 import ErrorReason

T = TypeVar("T")
STEP_S = 0.05
PEERS_S = 0.2
CALL_S = 0.001
_numbers = itertools.count(1)


class EngineHost:
    """One node's engine, which may die and come up empty.

    Attributes:
        engine: the engine of the current run.
        control: the load of every run.
        answers_lost: number of the next answers that do not reach the agent.
        hears_peers: whether connections to other engines work.
        calls: names of the methods that the agent called, in order.
        dies_at: number of the call before which it dies. None: it does not die.
        loses: number of the call whose answer is lost. None: no answer is.
    """

    def __init__(
        self, node: str, hosts: dict[str, EngineHost], looked: Callable[[], None], now: Callable[[], float]
    ) -> None:
        self.node = node
        self.control = Control()
        self.answers_lost = 0
        self.hears_peers = True
        self.calls: list[str] = []
        self.dies_at: int | None = None
        self.loses: int | None = None
        self._hosts, self._looked, self._now = hosts, looked, now
        self.engine = self._new_engine()
        self._stepped = asyncio.Event()
        self._heard_s = 0.0
        self._run_number = 0
        self._loop = asyncio.get_running_loop().create_task(self._run(), name=f"engine of {node}")

    def restart(self) -> None:
        """Restart the engine, which loses its requests and all KV."""
        self._run_number += 1
        self.engine = self._new_engine()
        self._stepped.set()

    def _new_engine(self) -> SimulatedEngine:
        return SimulatedEngine(self.node, 1, seed=7, engine_id=f"{self.node}-{next(_numbers)}")

    async def _run(self) -> None:
        while True:
            self.engine.control = self.control
            self.engine.step(self._now())
            if self.hears_peers and self._now() - self._heard_s >= PEERS_S:
                self._heard_s = self._now()
                for replica, address in self.engine.peers().items():
                    peer = self._hosts[address]
                    if peer.hears_peers:
                        self.engine.hear(replica, peer.engine.report(self._now()))
            self._looked()
            self._stepped.set()
            self._stepped = asyncio.Event()
            await asyncio.sleep(STEP_S)

    # The interface of the agent's executor.

    async def call(
        self, request: EngineRequest, progressed: Callable[[messages.CopyMovesResponse], None]
    ) -> EngineResponse:
        engine, now = self.engine, self._now
        match request:
            case messages.ApplyAssignmentRequest():
                return await self._do("apply", lambda: engine.apply_assignment(request, now()))
            case messages.ReserveMovesRequest():
                return await self._do("reserve", lambda: engine.reserve_moves(request, now()))
            case messages.CopyMovesRequest():
                return await self._copy_moves(request, progressed)
            case messages.FlipMovesRequest():
                return await self._flip_moves(request)
            case messages.ReleaseMovesRequest():
                return await self._do("release", lambda: engine.release_moves(request, now()))
            case messages.AbortMovesRequest():
                said = self._ask_authority(request.change_id)
                return await self._do("abort", lambda: engine.abort_moves(request, now(), authority=said))
            case messages.ReadHeadMapsRequest():
                return [await self._do("head maps", lambda: engine.head_maps(request.replica))]

    async def _copy_moves(
        self, request: messages.CopyMovesRequest, progressed: Callable[[messages.CopyMovesResponse], None]
    ) -> messages.CopyMovesResponse:
        run = self._run_number
        change = await self._do("copy", lambda: self.engine.copy_moves(request, self._now()))
        while change.phase == ChangePhase.CHANGE_PHASE_PREPARING:
            self._same_run(run)
            progressed(self.engine.copy_answer(change))
            await self._stepped.wait()
        self._same_run(run)
        if change.phase != ChangePhase.CHANGE_PHASE_READY:
            raise RefusedError(
                failure_of(
                    ErrorReason.ERROR_REASON_CHANGE_PHASE,
                    "it ended while it was copied",
                    change_id=request.change_id,
                    phase=ChangePhase.Name(change.phase).removeprefix("CHANGE_PHASE_"),
                )
            )
        answer = self.engine.copy_answer(change)
        progressed(answer)
        return answer

    async def _flip_moves(self, request: messages.FlipMovesRequest) -> messages.FlipMovesResponse:
        run = self._run_number
        await self._do("flip", lambda: self.engine.flip_moves(request, self._now()))
        while (answer := self.engine.flip_answer(request.change_id)) is None:
            await self._stepped.wait()
            self._same_run(run)
        return await self._answer(answer, run)

    async def watch_reports(self, min_interval_s: float) -> AsyncIterator[messages.WatchReportsResponse]:
        run, sent = self._run_number, None
        while True:
            if run != self._run_number:
                raise RefusedError(unreachable("the engine went away"))
            report = self.engine.report(self._now())
            if report != sent:
                sent = report
                yield report
                await asyncio.sleep(min_interval_s)
            else:
                await self._stepped.wait()

    async def close(self) -> None:
        pass

    async def _do(self, name: str, work: Callable[[], T]) -> T:
        await asyncio.sleep(CALL_S)
        self.calls.append(name)
        if self.dies_at is not None and len(self.calls) > self.dies_at:
            self.dies_at = None
            self.restart()
            self._looked()
            raise RefusedError(unreachable("the engine died"))
        run, is_lost = self._run_number, self.loses is not None and len(self.calls) > self.loses
        try:
            answer = work()
        finally:
            self._looked()
        if is_lost:
            self.loses, self.answers_lost = None, self.answers_lost + 1
        return await self._answer(answer, run)

    async def _answer(self, answer: T, run: int) -> T:
        await asyncio.sleep(CALL_S)
        self._same_run(run)
        if self.answers_lost:
            self.answers_lost -= 1
            raise RefusedError(unreachable("the answer was lost"))
        return answer

    def _same_run(self, run: int) -> None:
        if run != self._run_number:
            raise RefusedError(unreachable("the engine died"))

    def _ask_authority(self, change_id: str) -> list[ChangeStatus] | None:
        address = self.engine.authority_of(change_id)
        if address is None or not (self.hears_peers and self._hosts[address].hears_peers):
            return None
        return list(self._hosts[address].engine.report(self._now()).changes)
