"""Heads move in engines that the agent starts: a stand-in for vLLM's front end beside the plugin's real scheduler."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from hetis.runtime.moves.refusals import RefusedError
from hetis.solver.plan import AttentionWorkerPool, ReplicaPlan
from hetis.v1.change_pb2 import Change, ChangeOutcome, ChangePart, ChangePhase
from hetis.v1.executor_service_pb2 import (
    AbortMovesRequest,
    ApplyAssignmentRequest,
    CopyMovesRequest,
    FlipMovesRequest,
    ReadHeadMapsRequest,
    ReleaseMovesRequest,
    ReserveMovesRequest,
    WatchReportsResponse,
)
from hetis.v1.failure_pb2 import ErrorReason
from tests.engines.plans import plan_of, stage_of
from tests.runtime.agent.launched.assigning import applying, assigned, control
from tests.runtime.agent.launched.executing import Node
from tests.runtime.vllm.scheduling import EVERYTHING, NAMES, REPLICA, World, seconds
from tests.runtime.vllm.test_executing import Stepping

FLIPPED, ABORTED = ChangeOutcome.CHANGE_OUTCOME_FLIPPED, ChangeOutcome.CHANGE_OUTCOME_ABORTED


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder whose sockets have short paths."""
    with tempfile.TemporaryDirectory(prefix="h") as name:
        yield Path(name)


def replica_with_workers(primary: str = NAMES[0]) -> ReplicaPlan:
    stage = stage_of(devices=(primary,), kv_head_groups_kept=2)
    pool = AttentionWorkerPool(stage=0, gpu="T4", devices=NAMES[1:], kv_head_groups=6)
    return plan_of(stage, pools=(pool,)).replicas[0]


def serving(world: World, generation: int = 1) -> ApplyAssignmentRequest:
    request = applying(assigned(replica_with_workers(), node="n", name=REPLICA), generation)
    request.assignment.stages.append(world.stage())
    return request


@asynccontextmanager
async def node_in(folder: Path, node: str = "n", **settings: object) -> AsyncIterator[Node]:
    addresses = {"n": "127.0.0.1", "m": "127.0.0.1"}
    found = Node(folder, name=node, engine="vllm-hetis", addresses=addresses, **settings)
    try:
        yield found
    finally:
        control(folder)
        await found.executor.close()


class RunningEngine:
    """What the plugin runs in the engine's process, with a request that decodes."""

    def __init__(self, folder: Path) -> None:
        socket = folder / "engines" / "replicas" / "r" / "engine.sock"
        socket.parent.mkdir(parents=True, exist_ok=True)
        self.world = World(socket=socket, copy_steps=2, pool=10**6, blocks=(10**6, 10**6))
        self.request = self.world.add("a")
        self._stepping = Stepping(self.world)
        self._stepping.__enter__()

    @property
    def id(self) -> str:
        return self.world.steered.engine_id

    def end(self) -> None:
        self._stepping.__exit__()
        self.world.side.close()


@pytest.fixture
def engine(folder: Path) -> Iterator[RunningEngine]:
    found = RunningEngine(folder)
    yield found
    found.end()


async def prepared(node: Node, engine: RunningEngine, *, generation: int, groups: Sequence[int] = (0, 2)) -> Change:
    """Return a change whose copies are complete."""
    engine.world.generation = generation
    change = engine.world.change(engine.world.move(engine.request, groups, NAMES[1]))
    await node.executor.call(ReserveMovesRequest(epoch=1, change=change, parts=EVERYTHING))
    await node.executor.call(CopyMovesRequest(epoch=1, change_id=change.change_id))
    return change


async def flipped(node: Node, change: Change) -> None:
    request = FlipMovesRequest(epoch=1, change_id=change.change_id, timeout=seconds(30))
    answer = await node.executor.call(request)
    assert (answer.outcome, answer.generation) == (FLIPPED, change.generation)


async def steered(node: Node, engine: RunningEngine) -> WatchReportsResponse:
    """Return the first report with the engine's own figures."""
    return await node.until(lambda told: any(one.engine_id == engine.id and one.stages for one in told.replicas))


async def test_heads_move_in_an_engine_that_the_agent_has_started(folder: Path, engine: RunningEngine) -> None:
    async with node_in(folder) as node:
        await node.apply(serving(engine.world))
        report = await steered(node, engine)
        (told,) = report.replicas
        assert (told.generation, told.is_primary, told.endpoint) == (1, True, f"127.0.0.1:{node.settings.port}")
        assert (told.num_running, told.engine_id != report.engine_id) == (1, True)
        assert [device.index for device in report.devices] == [1, 2, 9], "its workers' among them"
        change = await prepared(node, engine, generation=1)
        await node.until(lambda told: [one.change_id for one in told.changes] == [change.change_id])
        await flipped(node, change)
        (piece,) = await node.executor.call(ReadHeadMapsRequest(replica=REPLICA))
        assert list(piece.head_maps[0].requests[0].owners) == [1, 0, 1, 0]
        request = ReleaseMovesRequest(epoch=1, change_id=change.change_id, generation=change.generation)
        await node.executor.call(request)
        released = ChangePhase.CHANGE_PHASE_RELEASED
        await node.until(lambda told: [one.phase for one in told.changes] == [released])
        await node.executor.call(AbortMovesRequest(epoch=4, change_id="another"))
        with pytest.raises(RefusedError, match="epoch 3 is over: 4 was already accepted"):
            await node.executor.call(AbortMovesRequest(epoch=3, change_id="another"))


async def test_what_a_dead_engine_leaves_open_is_aborted_and_the_next_one_is_steered(folder: Path) -> None:
    first = RunningEngine(folder)
    async with node_in(folder) as node:
        await node.apply(serving(first.world))
        await steered(node, first)
        await flipped(node, done := await prepared(node, first, generation=1))
        await node.executor.call(ReleaseMovesRequest(epoch=1, change_id=done.change_id, generation=done.generation))
        left = await prepared(node, first, generation=done.generation, groups=[1])
        control(folder, loading=True)
        first.end()
        os.kill(node.sessions()[0], signal.SIGKILL)  # vLLM is started first
        await node.until_state("LOADING", REPLICA)
        ends = {one.change_id: one for one in (await node.report()).changes}
        assert ends[left.change_id].phase == ChangePhase.CHANGE_PHASE_ABORTED
        assert ends[left.change_id].failure.reason == ErrorReason.ERROR_REASON_ENGINE_UNREACHABLE
        assert ends[done.change_id].phase == ChangePhase.CHANGE_PHASE_RELEASED
        answers = [
            await node.executor.call(AbortMovesRequest(epoch=1, change_id=one.change_id)) for one in (left, done)
        ]
        assert [answer.outcome for answer in answers] == [ABORTED, FLIPPED]
        for call in (ReadHeadMapsRequest(replica=REPLICA), FlipMovesRequest(epoch=1, change_id=left.change_id)):
            with pytest.raises(RefusedError, match=r"does not answer yet|is not known"):
                await node.executor.call(call)

        second = RunningEngine(folder)
        control(folder)
        (back,) = (await steered(node, second)).replicas
        assert second.id != first.id
        assert not back.HasField("failure")
        (piece,) = await node.executor.call(ReadHeadMapsRequest(replica=REPLICA))
        assert piece.generation == done.generation, "that of the flip, which the planner knows"
        await flipped(node, await prepared(node, second, generation=done.generation))
        second.end()


async def test_another_assignment_reaches_the_engine_that_runs(folder: Path, engine: RunningEngine) -> None:
    async with node_in(folder) as node:
        await node.apply(serving(engine.world))
        await steered(node, engine)
        newer = serving(engine.world, 2)
        newer.assignment.plan = "plans/two"
        assert await node.apply(newer) == "SERVING"
        async with asyncio.timeout(60):
            while (await node.executor.call(ReadHeadMapsRequest(replica=REPLICA)))[0].generation != 2:
                await asyncio.sleep(0.05)


async def test_an_engine_that_cannot_run_the_plan_serves_and_says_why_it_is_not_steered(
    folder: Path, engine: RunningEngine
) -> None:
    async with node_in(folder) as node:
        wrong = serving(engine.world)
        wrong.assignment.stages[0].num_layers += 1
        await node.apply(wrong)
        report = (await node.until(lambda told: told.replicas[0].HasField("failure"))).replicas[0]
        assert report.failure.reason == ErrorReason.ERROR_REASON_ENGINE_CANNOT
        assert report.failure.message == "the plan counts on 4 layers, this engine has 3"
        await node.until_state("SERVING", REPLICA)
        change = Change(change_id="one", replica=REPLICA)
        with pytest.raises(RefusedError, match="the plan counts on 4 layers"):
            await node.executor.call(ReserveMovesRequest(epoch=1, change=change))
        answer = await node.executor.call(AbortMovesRequest(epoch=1, change_id="one"))
        assert answer.outcome == ABORTED
        await node.apply(serving(engine.world, 2))
        assert not (await steered(node, engine)).replicas[0].HasField("failure")


async def test_a_folder_that_is_too_deep_for_a_socket_is_named(folder: Path) -> None:
    (deep := folder / ("d" * 90)).mkdir()
    async with node_in(deep) as node:
        await node.apply(serving(World()))
        report = (await node.until(lambda told: told.replicas[0].HasField("failure"))).replicas[0]
        assert (
            "is too long for the path of a socket, which has at most 107 bytes: see `folder`" in report.failure.message
        )


async def test_a_node_with_only_attention_workers_has_nothing_to_do(folder: Path) -> None:
    """The ranks of the engine on node m reserve, copy and free on its workers."""
    async with node_in(folder, key_file=str(folder / "key")) as node:
        (folder / "key").touch(0o600)
        (folder / "key").write_text("k" * 32)
        await node.apply(applying(assigned(replica_with_workers("m/0"), node="n", name=REPLICA)))
        change = Change(change_id="one", replica=REPLICA)
        target = [ChangePart.CHANGE_PART_TARGET]
        assert not (await node.executor.call(ReserveMovesRequest(epoch=1, change=change, parts=target))).moves
        assert not (await node.executor.call(CopyMovesRequest(epoch=1, change_id="one"))).total_bytes
        await node.executor.call(ReleaseMovesRequest(epoch=1, change_id="one"))
        assert (await node.executor.call(AbortMovesRequest(epoch=1, change_id="one"))).outcome == ABORTED
        with pytest.raises(RefusedError, match="which decides about its moves, is on another node"):
            await node.executor.call(FlipMovesRequest(epoch=1, change_id="one"))
