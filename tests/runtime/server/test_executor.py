"""An agent's calls over the real socket while answers stream: nothing that it does, or fails to do, changes a text."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from hetis.runtime.agent.executor import SocketExecutor
from hetis.runtime.executor.refusals import RefusedError, reason_name
from hetis.v1 import executor_service_pb2 as messages
from hetis.v1.change_pb2 import Change, ChangeOutcome, ChangePhase
from hetis.v1.head_map_pb2 import HeadMap, Move, MoveReason
from hetis.v1.replica_pb2 import AssignmentGoal
from tests.runtime.server.live import MODEL, Live, engine_of
from tests.runtime.steering.world import EVERYTHING, REPLICA, assignment_of, seconds

BODY = {"model": MODEL, "prompt": "the planner moves", "max_tokens": 400, "temperature": 0, "ignore_eos": True}


class Agent:
    """A few lines of an agent, without a planner."""

    def __init__(self, executor: SocketExecutor, *, epoch: int = 1) -> None:
        self.executor, self.epoch = executor, epoch
        self._random = random.Random(1)
        self._changes = 0

    async def assign(self, live: Live, generation: int = 1, **more: Any) -> int:
        request = messages.ApplyAssignmentRequest(
            epoch=self.epoch, generation=generation, assignment=assignment_of(live.engine, **more)
        )
        return (await self.executor.apply_assignment(request)).state

    async def maps(self) -> tuple[int, HeadMap]:
        async for answer in self.executor.read_head_maps(messages.ReadHeadMapsRequest(replica=REPLICA)):
            return answer.generation, answer.head_maps[0]
        raise AssertionError("no head map came")

    async def change(self, *, timeout_s: float = 30) -> Change | None:
        """A head or two of any request, to any other device. None: nothing runs."""
        generation, found = await self.maps()
        if not found.requests:
            return None
        request, names = self._random.choice(list(found.requests)), [device.name for device in found.devices]
        self._changes += 1
        groups = self._random.sample(range(len(request.owners)), self._random.randint(1, 2))
        moves = [
            Move(
                number=number,
                request=request.id,
                incarnation=request.incarnation,
                head_groups=[group],
                source=names[request.owners[group]],
                target=self._random.choice([name for name in names if name != names[request.owners[group]]]),
                reason=MoveReason.MOVE_REASON_BALANCE,
                together=number,
            )
            for number, group in enumerate(groups)
        ]
        return Change(
            change_id=f"change-{self._changes}",
            replica=REPLICA,
            base_generation=generation,
            generation=generation + 1,
            moves=moves,
            prepare_timeout=seconds(timeout_s),
        )

    async def reserve(self, change: Change) -> None:
        request = messages.ReserveMovesRequest(epoch=self.epoch, change=change, parts=EVERYTHING)
        await self.executor.reserve_moves(request)

    async def redispatch(self) -> ChangeOutcome.ValueType | None:
        """A whole change, as a planner has one made."""
        change = await self.change()
        if change is None:
            return None
        try:
            await self.reserve(change)
            async for _ in self.executor.copy_moves(
                messages.CopyMovesRequest(epoch=self.epoch, change_id=change.change_id)
            ):
                pass
            flip = messages.FlipMovesRequest(epoch=self.epoch, change_id=change.change_id, timeout=seconds(5))
            outcome = (await self.executor.flip_moves(flip)).outcome
        except RefusedError as error:
            if reason_name(error.failure) != "REQUEST_GONE":
                raise
            await self.abort(change)
            return ChangeOutcome.CHANGE_OUTCOME_ABORTED
        if outcome == ChangeOutcome.CHANGE_OUTCOME_FLIPPED:
            released = messages.ReleaseMovesRequest(
                epoch=self.epoch, change_id=change.change_id, generation=change.generation
            )
            await self.executor.release_moves(released)
        return outcome

    async def abort(self, change: Change) -> ChangeOutcome.ValueType:
        request = messages.AbortMovesRequest(epoch=self.epoch, change_id=change.change_id)
        return (await self.executor.abort_moves(request)).outcome

    async def report(self) -> messages.WatchReportsResponse:
        async for report in self.executor.watch_reports(0.01):
            return report
        raise AssertionError("no report came")


@asynccontextmanager
async def agent_of(socket: Path) -> AsyncIterator[Agent]:
    executor = SocketExecutor(socket)
    try:
        yield Agent(executor)
    finally:
        await executor.close()


class Answer:
    """A completion that is asked for in a thread of its own."""

    def __init__(self, live: Live) -> None:
        self.text = ""
        self._thread = threading.Thread(target=self._ask, args=(live,))
        self._thread.start()

    @property
    def is_there(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> str:
        self._thread.join(120)
        return self.text

    def _ask(self, live: Live) -> None:
        self.text = live.post("/v1/completions", BODY).json()["choices"][0]["text"]


@pytest.fixture(scope="module")
def steered(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    socket = tmp_path_factory.mktemp("executor") / "e.sock"
    with Live(engine_of(folder, pages=(400, 400, 400)), folder, executor=socket) as live:
        yield live, socket


def test_changes_through_the_socket_while_an_answer_is_made_leave_its_text(steered: tuple[Live, Path]) -> None:
    live, socket = steered

    async def story(answer: Answer) -> list[Any]:
        async with agent_of(socket) as agent:
            outcomes = []
            while not answer.is_there:
                outcomes.append(await agent.redispatch())
                await asyncio.sleep(0.01)
            return outcomes

    async def assign() -> None:
        async with agent_of(socket) as agent:
            await agent.assign(live)

    asyncio.run(assign())
    still = live.post("/v1/completions", BODY).json()["choices"][0]["text"]
    answer = Answer(live)
    outcomes = asyncio.run(story(answer))
    assert answer.wait() == still
    assert outcomes.count(ChangeOutcome.CHANGE_OUTCOME_FLIPPED) > 3
    flipped = live.moving.hauler.counts.flipped_changes  # type: ignore[union-attr]
    assert live.comes_to(flipped, "hetis_migrations_total", state="committed")
    assert live.metric("hetis_migration_bytes_total") > 0
    assert live.comes_to(1, "hetis_planner_epoch")
    assert live.comes_to(1, "hetis_planner_permission", state="none")
    assert live.metric("hetis_redispatch_mode", state="planner") == 1


def test_an_agent_that_goes_in_the_middle_of_a_change_costs_nothing(steered: tuple[Live, Path]) -> None:
    live, socket = steered
    still = live.post("/v1/completions", BODY).json()["choices"][0]["text"]
    answer = Answer(live)

    async def reserve_and_go() -> Change:
        async with agent_of(socket) as agent:
            while (change := await agent.change(timeout_s=0.3)) is None:
                await asyncio.sleep(0.01)
            change.change_id = "left-behind"
            await agent.reserve(change)
            return change

    async def come_back(change: Change) -> None:
        async with agent_of(socket) as agent:
            async with asyncio.timeout(60):
                while True:
                    phases = {status.change_id: status.phase for status in (await agent.report()).changes}
                    if phases[change.change_id] == ChangePhase.CHANGE_PHASE_ABORTED:
                        break
                    await asyncio.sleep(0.05)
            assert await agent.abort(change) == ChangeOutcome.CHANGE_OUTCOME_ABORTED
            assert await agent.redispatch() in (None, *ChangeOutcome.values()), "the way is free for the next"

    change = asyncio.run(reserve_and_go())
    assert answer.wait() == still
    asyncio.run(come_back(change))


def test_a_replica_that_is_not_in_force_takes_no_clients(steered: tuple[Live, Path]) -> None:
    live, socket = steered

    async def assign(generation: int, goal: AssignmentGoal.ValueType) -> None:
        async with agent_of(socket) as agent:
            await agent.assign(live, generation, goal=goal)

    asyncio.run(assign(10_001, AssignmentGoal.ASSIGNMENT_GOAL_DRAIN))
    refused = live.post("/v1/completions", BODY)
    assert refused.status_code == 503
    assert refused.json()["error"]["message"] == "the planner takes the replica out of service"
    health = live.get("/health")
    assert (health.status_code, health.json()["status"]) == (503, "closed")
    asyncio.run(assign(10_002, AssignmentGoal.ASSIGNMENT_GOAL_SERVE))
    assert live.get("/health").status_code == 200
    assert live.post("/v1/completions", BODY | {"max_tokens": 3}).status_code == 200


def test_an_engine_that_was_started_again_says_so_and_knows_no_change(folder: Path, tmp_path: Path) -> None:
    socket, seen = tmp_path / "e.sock", []

    async def look(live: Live, *, is_first: bool) -> str:
        async with agent_of(socket) as agent:
            if is_first:
                await agent.assign(live)
            else:
                with pytest.raises(RefusedError) as error:
                    await agent.maps()
                assert reason_name(error.value.failure) == "NOT_FOUND"
                with pytest.raises(RefusedError) as error:
                    await agent.executor.flip_moves(messages.FlipMovesRequest(epoch=1, change_id="c"))
                assert reason_name(error.value.failure) == "CHANGE_UNKNOWN"
            return (await agent.report()).engine_id

    for is_first in (True, False):
        with Live(engine_of(folder, pages=(100, 100)), folder, executor=socket) as live:
            assert socket.stat().st_mode & 0o077 == 0
            seen.append(asyncio.run(look(live, is_first=is_first)))
    assert len(set(seen)) == 2
    assert not socket.exists()
