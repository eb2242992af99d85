"""How engines end: by a signal, for a drain, and what an agent before has left."""

from __future__ import annotations

import asyncio
import errno
import time
from pathlib import Path
from typing import Any

import pytest

from hetis.runtime.agent.launched import processes
from hetis.runtime.agent.launched.processes import end_leftovers
from tests.runtime.agent.launched.assigning import (
    DRAIN,
    SERVE,
    applying,
    assigned,
    control,
    lives,
    removing,
    replica_on,
)
from tests.runtime.agent.launched.executing import OTHER, Node, node_in, state, wait_until
from tests.runtime.launch.launching import is_gone


async def test_requests_that_run_end_before_a_withdrawn_engine_is_told_to(tmp_path: Path) -> None:
    async with node_in(tmp_path) as node:
        control(tmp_path, running=2)
        await node.apply(applying(assigned()))
        await node.until(lambda report: report.replicas[0].num_running == 2)
        await node.apply(applying(assigned(replica_on("a/1"), goal=DRAIN), 2))  # it does not move before it ends
        assert (await node.until_state("DRAINING")).num_running == 2
        assert await node.apply(removing(generation=3)) == "STOPPED"
        assert not (await node.until(lambda report: not report.replicas)).devices
        assert await node.apply(applying(assigned(name=OTHER))) == "LOADING", "its GPU is not free yet"
        for running in (2, 1):
            control(tmp_path, running=running)
            await node.until_asked(running)
        assert lives(tmp_path) == ["started"]
        control(tmp_path, running=0)
        await node.until_state("SERVING", OTHER)
        assert lives(tmp_path) == ["started", "told 0", "started"]


async def test_a_drain_does_not_wait_for_ever(tmp_path: Path) -> None:
    async with node_in(tmp_path, drain_timeout="1s") as node:
        control(tmp_path, running=2)
        await node.apply(applying(assigned()))
        await node.until_state("SERVING")
        await node.apply(removing())
        await node.until_lives("started", "told 2")


async def test_routers_have_time_to_hear_of_a_drain(tmp_path: Path) -> None:
    now_s = float(round(time.monotonic()))  # sums of whole seconds are exact
    node = Node(tmp_path, lambda: now_s, router_delay="1h")
    try:
        await node.apply(applying(assigned()))
        await node.until_state("SERVING")
        assert await node.apply(applying(assigned(goal=DRAIN), 2)) == "SERVING"
        now_s += 3599
        assert (await node.report()).replicas[0].assignment_state == state("SERVING")
        now_s += 1
        assert (await node.report()).replicas[0].assignment_state == state("DRAINING")
    finally:
        await node.executor.close()


async def test_what_does_not_serve_has_nothing_to_drain(tmp_path: Path) -> None:
    async with node_in(tmp_path) as node:
        control(tmp_path, loading=True, running=1)
        await node.apply(applying(assigned()))
        await node.until_lives("started")
        assert await node.apply(applying(assigned(goal=DRAIN), 2)) == "STOPPED"
        await node.apply(removing(generation=3))
        await node.until_lives("started", "told 1")


async def test_what_is_to_drain_is_not_started_for_that(tmp_path: Path) -> None:
    """After a restart, the agent applies the last assignments again."""
    async with node_in(tmp_path) as node:
        assert await node.apply(applying(assigned(goal=DRAIN), 2)) == "STOPPED"
        await node.until_state("STOPPED")
        await asyncio.sleep(0.2)
        assert not lives(tmp_path)
        assert await node.apply(applying(assigned(goal=SERVE), 3)) == "LOADING"
        await node.until_lives("started")


async def test_an_engine_whose_session_cannot_be_recorded_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text = Path.write_text

    def failing(path: Path, *args: Any, **kwargs: Any) -> int:
        if path.parent.name == "sessions":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_text(path, *args, **kwargs)

    started = list[int]()
    start = processes.start

    def starting(command: Any, log: Path) -> Any:
        found = start(command, log)
        started.append(found.pid)
        return found

    monkeypatch.setattr(Path, "write_text", failing)
    monkeypatch.setattr(processes, "start", starting)
    async with node_in(tmp_path) as node:
        await node.apply(applying(assigned()))
        await wait_until(lambda: len(started) > 1, lambda: "it is tried again")
        first = started[0]
        await wait_until(lambda: is_gone(first), lambda: f"{first} still runs")


async def closing_while_it_serves(folder: Path) -> tuple[Node, int, asyncio.Task[None]]:
    """Return a node with a request under way that is being closed, its engine's process, and the closing."""
    node = Node(folder)
    control(folder, running=1)
    await node.apply(applying(assigned()))
    await node.until_state("SERVING")
    (leader,) = node.sessions()
    closing = asyncio.create_task(node.executor.close())
    await node.until_asked(1)
    return node, leader, closing


async def test_closing_lets_requests_end_and_leaves_no_process_behind(tmp_path: Path) -> None:
    node, leader, closing = await closing_while_it_serves(tmp_path)
    assert lives(tmp_path) == ["started"]
    control(tmp_path)
    await closing
    assert lives(tmp_path) == ["started", "told 0"]
    assert is_gone(leader)
    assert node.sessions() == []


async def test_a_second_signal_does_not_wait_for_requests(tmp_path: Path) -> None:
    _, leader, closing = await closing_while_it_serves(tmp_path)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert is_gone(leader)


async def test_what_is_left_of_an_agent_before_is_ended_and_nobody_elses(tmp_path: Path) -> None:
    node = Node(tmp_path)
    await node.apply(applying(assigned()))
    await node.until_state("SERVING")
    (leader,) = node.sessions()
    sessions = tmp_path / "engines" / "sessions"
    noted = (sessions / str(leader)).read_text()
    (sessions / str(leader)).write_text(noted + "1")  # the leader's process id, but not its start time
    assert end_leftovers(sessions, grace_s=0.0) == []
    assert not is_gone(leader)
    (sessions / str(leader)).write_text("another-boot " + noted.partition(" ")[2])
    assert end_leftovers(sessions, grace_s=0.0) == []
    (sessions / str(leader)).write_text(noted)
    assert await asyncio.to_thread(end_leftovers, sessions, grace_s=0.0) == [leader]
    assert node.sessions() == []
    assert is_gone(leader)
    await node.executor.close()
