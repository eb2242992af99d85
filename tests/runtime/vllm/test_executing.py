"""The agent reaches the scheduler over its socket: while nothing runs, between two steps, and never in their way."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from hetis.runtime.agent.executor import SocketExecutor
from hetis.runtime.moves.refusals import RefusedError
from hetis.runtime.vllm.executing import MOST_WATCHES
from hetis.runtime.vllm.scheduler import MOST_WORKS, Boundary
from hetis.runtime.vllm.settings import SettingsError
from hetis.v1.change_pb2 import ChangeOutcome
from hetis.v1.executor_service_pb2 import (
    ApplyAssignmentRequest,
    CopyMovesRequest,
    FlipMovesRequest,
    ReadHeadMapsRequest,
    ReserveMovesRequest,
)
from hetis.v1.report_pb2 import AssignmentState
from tests.runtime.vllm.scheduling import EVERYTHING, NAMES, REPLICA, World, seconds

# --- turns


def test_work_is_done_at_once_while_nothing_runs_and_at_a_boundary_otherwise() -> None:
    boundary = Boundary()
    assert boundary.call(lambda: 1).result(0) == 1
    boundary.enter()
    waiting = boundary.call(lambda: 2)
    assert not waiting.done()
    with boundary.lock:
        boundary.leave(is_idle=False)
    assert waiting.result(0) == 2
    last = boundary.call(lambda: 3)
    with boundary.lock:
        boundary.leave(is_idle=True)
    assert last.result(0) == 3
    assert boundary.call(lambda: 4).result(0) == 4


def test_a_boundary_does_a_bounded_part_of_what_is_wanted() -> None:
    now_s = 0.0

    def clock() -> float:
        return now_s

    def work(takes_s: float) -> Callable[[], None]:
        def do() -> None:
            nonlocal now_s
            now_s += takes_s

        return do

    def done(works: list[Future[None]]) -> int:
        return sum(one.done() for one in works)

    boundary = Boundary(clock=clock)
    boundary.enter()
    quick = [boundary.call(work(0.0)) for _ in range(2 * MOST_WORKS + 1)]
    with boundary.lock:
        boundary.leave(is_idle=False)
    assert done(quick) == MOST_WORKS
    with boundary.lock:
        boundary.leave(is_idle=True)
    assert done(quick) == len(quick), "nobody comes by again: all of it"
    boundary.enter()
    slow = [boundary.call(work(1.0)) for _ in range(3)]
    for count in (1, 2, 3):
        with boundary.lock:
            boundary.leave(is_idle=False)
        assert done(slow) == count


def test_what_work_raises_reaches_who_wanted_it_and_nobody_else() -> None:
    boundary = Boundary()
    boundary.enter()
    wrong: Future[float] = boundary.call(lambda: 1 / 0)
    right = boundary.call(lambda: 5)
    with boundary.lock:
        boundary.leave(is_idle=False)
    with pytest.raises(ZeroDivisionError):
        wrong.result(0)
    assert right.result(0) == 5


# --- over the socket


class Stepping:
    """vLLM's thread, which steps the world until it is stopped."""

    def __init__(self, world: World) -> None:
        self._world, self._ends = world, threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Stepping:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ends.wait(0.003):  # without pauses a growing request soon has no room, and is preempted
            self._world.step()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(socket=tmp_path / "engine.sock", copy_steps=3)
    yield world
    world.side.close()
    assert not (tmp_path / "engine.sock").exists()


async def test_an_agent_steers_the_engine_over_its_socket(world: World, tmp_path: Path) -> None:
    executor = SocketExecutor(tmp_path / "engine.sock")
    answer = await executor.call(ApplyAssignmentRequest(epoch=1, generation=1, assignment=world.assignment()))
    assert answer.state == AssignmentState.ASSIGNMENT_STATE_SERVING
    world.generation = 1
    number = world.add("a")
    change = world.change(world.move(number, [0, 2], NAMES[1]))
    with Stepping(world):
        await executor.call(ReserveMovesRequest(epoch=1, change=change, parts=EVERYTHING))
        told = await executor.call(CopyMovesRequest(epoch=1, change_id=change.change_id))
        assert told.copied_bytes == told.total_bytes > 0
        flipped = await executor.call(FlipMovesRequest(epoch=1, change_id=change.change_id, timeout=seconds(30)))
        assert flipped.outcome == ChangeOutcome.CHANGE_OUTCOME_FLIPPED
        pieces = await executor.call(ReadHeadMapsRequest(replica=REPLICA))
        assert list(pieces[0].head_maps[0].requests[0].owners) == [1, 0, 1, 0]
        reports = executor.watch_reports(0.01)
        steps = [(await anext(reports)).replicas[0].num_steps for _ in range(3)]
        assert steps == sorted(set(steps)), "each report is of a later step"
        await executor.call(ApplyAssignmentRequest(epoch=2, removed_replica="other"))
        with pytest.raises(RefusedError, match="epoch 1 is over: 2 was already accepted"):
            await executor.call(ApplyAssignmentRequest(epoch=1, removed_replica="other"))
    await executor.close()


async def test_an_engine_without_requests_answers_and_gives_up_what_is_void(world: World, tmp_path: Path) -> None:
    executor = SocketExecutor(tmp_path / "engine.sock")
    await executor.call(ApplyAssignmentRequest(epoch=1, generation=1, assignment=world.assignment()))
    world.generation = 1
    number = world.add("a")
    change = world.change(world.move(number, [0], NAMES[1]))
    with Stepping(world):
        await executor.call(ReserveMovesRequest(epoch=1, change=change, parts=EVERYTHING))
        await executor.call(CopyMovesRequest(epoch=1, change_id=change.change_id))
    world.finish("a")
    world.step()
    flipped = await executor.call(FlipMovesRequest(epoch=1, change_id=change.change_id, timeout=seconds(30)))
    assert flipped.outcome == ChangeOutcome.CHANGE_OUTCOME_ABORTED
    await executor.close()


async def test_an_engine_that_starts_again_says_so_to_an_agent_that_stayed(tmp_path: Path) -> None:
    executor, seen = SocketExecutor(tmp_path / "engine.sock"), []
    for _ in range(2):
        world = World(socket=tmp_path / "engine.sock")
        await executor.call(ApplyAssignmentRequest(epoch=3, generation=7, assignment=world.assignment()))
        reports = executor.watch_reports(0.01)
        seen.append((await anext(reports)).engine_id)
        with pytest.raises(RefusedError, match="epoch 2 is over"):
            await executor.call(ApplyAssignmentRequest(epoch=2, generation=8, removed_replica=REPLICA))
        world.side.close()
        with pytest.raises(RefusedError):
            async for _ in reports:
                pass
    assert len(set(seen)) == 2
    await executor.close()


async def test_steps_go_on_while_an_agent_asks_and_does_not_listen(world: World, tmp_path: Path) -> None:
    executor = SocketExecutor(tmp_path / "engine.sock")
    await executor.call(ApplyAssignmentRequest(epoch=1, generation=1, assignment=world.assignment()))
    reports = executor.watch_reports(0.01)
    await anext(reports)  # no report follows
    world.add("a")
    await asyncio.to_thread(world.step, 200)
    assert world.side.num_steps >= 200
    await executor.close()


async def test_streams_of_reports_are_few_because_each_takes_time_from_steps(world: World, tmp_path: Path) -> None:
    executor = SocketExecutor(tmp_path / "engine.sock")
    streams = [executor.watch_reports(0.01) for _ in range(MOST_WATCHES)]
    for stream in streams:
        await anext(stream)
    with pytest.raises(RefusedError, match=f"{MOST_WATCHES} streams of reports are open already"):
        await anext(executor.watch_reports(0.01))
    await executor.close()


def test_the_socket_of_a_running_engine_is_not_replaced_and_that_of_a_killed_one_is(tmp_path: Path) -> None:
    path = tmp_path / "engine.sock"
    with socket.socket(socket.AF_UNIX) as running:
        running.bind(str(path))
        running.listen()
        with pytest.raises(SettingsError, match=r"executor: cannot listen on unix:.*: another process listens on it"):
            World(socket=path)
        with socket.socket(socket.AF_UNIX) as agent:
            agent.connect(str(path))
            running.accept()[0].close()  # the running engine got the call
    World(socket=path).side.close()


def test_a_socket_that_cannot_be_made_ends_the_start_with_one_message(tmp_path: Path) -> None:
    (tmp_path / "engine.sock").write_text("a file")
    with pytest.raises(SettingsError, match=r"executor: cannot listen on unix:.*: it exists and is not a socket"):
        World(socket=tmp_path / "engine.sock")
