"""The whole agent: a planner's assignment becomes an engine, also after the agent was killed or terminated."""

from __future__ import annotations

import asyncio
import itertools
import json
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from hetis.v1.agent_service_pb2 import ConnectNodeRequest, ConnectNodeResponse, Delta
from hetis.v1.failure_pb2 import ErrorReason
from hetis.v1.replica_pb2 import Assignment
from hetis.v1.report_pb2 import AssignmentState
from tests.runtime.agent.launched.assigning import REPLICA, assigned, control, fake_settings, lives, replica_on
from tests.runtime.agent.planner_double import PlannerDouble
from tests.runtime.agent.test_process import Processes
from tests.runtime.launch.launching import is_gone


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    found = Processes(tmp_path)
    yield found
    found.stop()


def write_settings(folder: Path) -> list[str]:
    """Options of an agent on node a."""
    settings = fake_settings(folder).model_dump(by_alias=True, exclude_none=True)
    times = {name: f"{value}s" for name, value in settings.items() if name.endswith(("_timeout", "_delay"))}
    (folder / "engine.yaml").write_text(json.dumps(settings | times), encoding="utf-8")
    options = ["--node", "clusters/c/nodes/a", "--engine", f"launch:{folder}/engine.yaml"]
    return [*options, "--state-dir", str(folder / "state"), "--simulated-devices", "L4:2"]


def delta(assignment: Assignment, generation: int = 1) -> ConnectNodeResponse:
    what = Delta(nonce=f"n{generation}", replica=REPLICA, generation=generation, assignment=assignment)
    return ConnectNodeResponse(epoch=1, delta=what)


def is_in(message: ConnectNodeRequest, state: AssignmentState.ValueType) -> bool:
    return any(one.assignment_state == state for one in message.report.replicas)


def leaders(folder: Path) -> list[int]:
    return sorted(int(file.name) for file in (folder / "state" / "engines" / "sessions").glob("*"))


def told_once(notes: list[str]) -> list[str]:
    """Return the notes without repetitions in a row: the next agent tells an engine that ends slowly once more."""
    return [note for note, _ in itertools.groupby(notes)]


async def test_engines_end_with_their_agent_and_start_with_the_next(tmp_path: Path, processes: Processes) -> None:
    serving = AssignmentState.ASSIGNMENT_STATE_SERVING
    options = write_settings(tmp_path)
    async with PlannerDouble() as planner:
        agent = processes.start("--server", planner.address, *options)
        await planner.connected(1)
        planner.send(delta(assigned()))
        told = await planner.until(lambda message: is_in(message, serving))
        assert [one.index for one in told.report.devices if one.total_blocks == 400] == [0]
        assert told.report.replicas[0].endpoint.startswith("127.0.0.1:")
        (first,) = leaders(tmp_path)

        agent.kill()
        agent.wait()
        agent = processes.start("--server", planner.address, *options)
        await planner.connected(2)
        # Not counted at the kill: messages that the first agent sent just before may arrive after it.
        since = max(number for number, message in enumerate(planner.heard) if message.HasField("hello"))
        await planner.until(lambda message: is_in(message, serving), since=since)  # without a new assignment
        assert is_gone(first)
        (second,) = leaders(tmp_path)
        assert told_once(lives(tmp_path)) == ["started", "told 0", "started"]

        agent.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(agent.wait, 60) == 0
        assert is_gone(second)
        assert leaders(tmp_path) == []
        assert told_once(lives(tmp_path)) == ["started", "told 0", "started", "told 0"]
    assert "Traceback" not in processes.log()


async def test_an_engine_outlives_a_full_disk_of_its_agent(tmp_path: Path, processes: Processes) -> None:
    options = write_settings(tmp_path)
    async with PlannerDouble() as planner:
        agent = processes.start("--server", planner.address, *options)
        await planner.connected(1)
        planner.send(delta(assigned()))
        await planner.until(lambda message: is_in(message, AssignmentState.ASSIGNMENT_STATE_SERVING))
        _, most = resource.prlimit(agent.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(agent.pid, resource.RLIMIT_FSIZE, (0, most))
        planner.epoch = 2
        newer = delta(assigned(), 2)
        newer.epoch = 2  # which the agent has to write down first
        planner.send(newer)
        await asyncio.sleep(3)
        assert agent.poll() is None
        assert planner.hellos == 1
        resource.prlimit(agent.pid, resource.RLIMIT_FSIZE, (most, most))
        await planner.connected(2)
        hello = [message for message in planner.heard if message.HasField("hello")][-1].hello
        assert hello.newest_epoch == 2
        assert [held.generation for held in hello.replicas] == [2]
    assert lives(tmp_path) == ["started"]


async def test_what_cannot_be_run_is_told_to_the_planner_as_a_failure(tmp_path: Path, processes: Processes) -> None:
    options = write_settings(tmp_path)
    control(tmp_path)
    async with PlannerDouble() as planner:
        processes.start("--server", planner.address, *options)
        await planner.connected(1)
        tall = replica_on("a/0", "a/1")
        planner.send(delta(assigned(tall)))
        await planner.until(lambda message: is_in(message, AssignmentState.ASSIGNMENT_STATE_SERVING))
        wrong = assigned(tall)
        wrong.shape.stages[0].num_layers = 3
        planner.send(delta(wrong, 2))
        failed = AssignmentState.ASSIGNMENT_STATE_FAILED
        told = (await planner.until(lambda message: is_in(message, failed))).report.replicas[0]
        assert told.failure.reason == ErrorReason.ERROR_REASON_ENGINE_CANNOT
        assert told.failure.message == f"{REPLICA}: the plan's stages have 3 layers, the model 4"
    assert "Traceback" not in processes.log()
