"""Agents of the service's benchmark outlive their connections, which the planner ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import grpc
import pytest

from benchmarks.measuring import scripted_agent
from benchmarks.measuring.scripted_agent import ScriptedAgent
from hetis.v1 import agent_service_pb2 as pb
from hetis.v1 import agent_service_pb2_grpc, change_pb2, replica_pb2, report_pb2

REPLICA, EPOCH, GENERATION = "clusters/c/replicas/r", 3, 7
Talk = Callable[["Stream"], Awaitable[None]]


class Stream:
    """The planner's end of an agent's stream."""

    def __init__(self, messages: AsyncIterator[pb.ConnectNodeRequest], context: Any) -> None:
        self._messages, self._context = messages, context

    async def hear(self, kind: str) -> pb.ConnectNodeRequest:
        """Return the next message of a kind, skipping those before it."""
        async for message in self._messages:
            if message.WhichOneof("message") == kind:
                return message
        raise AssertionError(f"the agent ended the stream before its {kind}")

    async def say(self, message: pb.ConnectNodeResponse) -> None:
        message.epoch = EPOCH
        await self._context.write(message)


class Planner:
    """A planner that welcomes, follows the test's script, and ends the stream as gRPC does at a connection's end."""

    def __init__(self, talks: Sequence[Talk]) -> None:
        self._talks = iter(talks)
        self.hellos = list[pb.Hello]()
        self.is_done = asyncio.Event()

    async def ConnectNode(self, requests: AsyncIterator[pb.ConnectNodeRequest], context: Any) -> None:  # noqa: N802
        stream = Stream(requests, context)
        first = await stream.hear("hello")
        assert first.sequence == 1
        self.hellos.append(first.hello)
        welcome = pb.Welcome(protocol_version=1)
        welcome.settings.heartbeat_interval.FromSeconds(5)
        await stream.say(pb.ConnectNodeResponse(welcome=welcome))
        talk = next(self._talks, None)
        if talk is None:
            self.is_done.set()
            await asyncio.Event().wait()
        else:
            await talk(stream)
            await context.abort(grpc.StatusCode.UNAVAILABLE, "max connection age")


@asynccontextmanager
async def agent_of(*talks: Talk) -> AsyncIterator[tuple[ScriptedAgent, Planner]]:
    """Yield an agent whose streams end after each of the talks, except for the last one."""
    planner, server = Planner(talks), grpc.aio.server()
    agent_service_pb2_grpc.add_AgentServiceServicer_to_server(cast(Any, planner), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    agent = ScriptedAgent("clusters/c", "n", num_gpus=1)
    try:
        await agent.connect(f"127.0.0.1:{port}")
        yield agent, planner
    finally:
        await agent.close()
        await server.stop(None)


@pytest.fixture(autouse=True)
def _without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scripted_agent, "LEAST_PAUSE_S", 0.0)
    monkeypatch.setattr(scripted_agent, "MOST_PAUSE_S", 0.01)


async def assign_and_prepare(stream: Stream) -> None:
    assignment = replica_pb2.Assignment(goal=replica_pb2.ASSIGNMENT_GOAL_SERVE, primary_node="elsewhere")
    delta = pb.Delta(replica=REPLICA, generation=GENERATION, nonce="a", assignment=assignment)
    await stream.say(pb.ConnectNodeResponse(delta=delta))
    await stream.hear("ack")
    prepare = pb.PrepareChange(change=change_pb2.Change(change_id="x", replica=REPLICA, generation=GENERATION + 1))
    await stream.say(pb.ConnectNodeResponse(delta=pb.Delta(replica=REPLICA, nonce="b", prepare=prepare)))
    await stream.hear("change_status")


async def test_an_agent_whose_connection_ends_comes_back_as_the_same_and_says_what_it_holds() -> None:
    reports = list[pb.NodeReport]()

    async def ask_for_report(stream: Stream) -> None:
        await stream.say(pb.ConnectNodeResponse(state_request=pb.StateRequest(request_id="q", report=True)))
        reports.append((await stream.hear("report")).report)

    async with agent_of(assign_and_prepare, ask_for_report) as (agent, planner):
        await planner.is_done.wait()
        first, second, third = planner.hellos
        assert first.boot_id == second.boot_id == third.boot_id
        assert not first.replicas
        held = pb.HeldReplica(
            replica=REPLICA,
            generation=GENERATION,
            epoch=EPOCH,
            assignment_state=report_pb2.ASSIGNMENT_STATE_SERVING,
        )
        assert [*second.replicas] == [*third.replicas] == [held]
        assert [status.change_id for status in third.changes] == ["x"]
        assert [replica.replica for replica in reports[0].replicas] == [REPLICA]
        while agent.num_reconnects < 2:  # the agent has not received the last Welcome yet
            await asyncio.sleep(0)
