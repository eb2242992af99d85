"""A scripted agent against the fleet over a real loopback channel."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from hetis.planner import callers
from hetis.planner.failures import ServiceError
from hetis.planner.fleet.fleet import LiveFleet
from hetis.planner.fleet.hubs import Hubs
from hetis.planner.store import Store, Transaction
from hetis.v1 import agent_service_pb2 as pb
from hetis.v1 import (
    agent_service_pb2_grpc,
    cluster_pb2,
    head_map_pb2,
    inventory_pb2,
    plan_pb2,
    redispatch_pb2,
    replica_pb2,
    report_pb2,
)
from tests.planner.fleet.model_agents import Engines, ModelAgent
from tests.planner.fleet.samples import (
    CLUSTER,
    PLAN,
    REPLICA,
    SETTINGS,
    SampleContents,
    change,
    cluster_document,
    store_with_plan,
)

_SOON_S = 5.0


class _Clock:
    def monotonic(self) -> float:
        return time.monotonic()

    def time(self) -> float:
        return time.time()


class _Servicer(agent_service_pb2_grpc.AgentServiceServicer):
    """The servicer as behind the interceptor: callers are set, and errors become a status with their reason."""

    def __init__(self, fleet: LiveFleet, who: callers.Identity) -> None:
        self._fleet, self._who = fleet, who

    async def ConnectNode(self, request_iterator, context):  # type: ignore[no-untyped-def] # noqa: N802
        try:
            # Closes the generator at once even if the call is cancelled while a message is written; gRPC leaves that
            # to the garbage collector if a servicer yields its messages.
            async with aclosing(self._fleet.connect(self._who, request_iterator)) as responses:
                async for response in responses:
                    await context.write(response)
        except ServiceError as error:
            await context.abort(error.code, error.reason_name)


class LiveAgent:
    """A model agent on a real stream."""

    def __init__(self, node: str, stub: agent_service_pb2_grpc.AgentServiceAsyncStub, engines: Engines) -> None:
        self.model = ModelAgent(node, engines)
        self.call = stub.ConnectNode()
        self.head_map: head_map_pb2.HeadMap | None = None

    async def run(self) -> None:
        await self.call.write(self.model.hello())
        async for message in self.call:
            self.model.take(message)
            if message.WhichOneof("message") == "state_request":
                await self._answer(message.state_request)
            elif message.WhichOneof("message") == "delta":
                self.model.load()
                self.model.get_ready()
            await self.flush()

    async def flush(self) -> None:
        while self.model.sent:
            await self.call.write(self.model.sent.pop(0))

    async def _answer(self, request: pb.StateRequest) -> None:
        generation = self.model.held[REPLICA][0]
        for index in range(2):
            requests = [head_map_pb2.RunningRequest(id=f"r{index}", context_tokens=5, owners=[0])]
            devices = [head_map_pb2.HeadMapDevice(name="a/0", total_blocks=9, status=report_pb2.DEVICE_STATUS_OK)]
            piece = pb.HeadMapPiece(
                request_id=request.request_id,
                replica=REPLICA,
                generation=generation,
                step=7,
                index=index,
                is_last=index == 1,
                head_maps=[head_map_pb2.HeadMap(devices=devices, requests=requests)],
            )
            await self.call.write(self.model._request(head_map=piece))


@asynccontextmanager
async def planner(
    who: callers.Identity = callers.ANYBODY, store: Any = None, epoch: int = 1
) -> AsyncIterator[tuple[LiveFleet, agent_service_pb2_grpc.AgentServiceAsyncStub, Any, Hubs]]:
    store = store or store_with_plan(cluster_document())
    hubs = Hubs(epoch)
    fleet = LiveFleet(
        store,
        hubs,
        epoch=epoch,
        settings=SETTINGS,
        clock=_Clock(),
        plans=SampleContents(),
    )
    await fleet.start()
    server = grpc.aio.server()
    agent_service_pb2_grpc.add_AgentServiceServicer_to_server(_Servicer(fleet, who), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: agent_service_pb2_grpc.AgentServiceAsyncStub = agent_service_pb2_grpc.AgentServiceStub(channel)
        yield fleet, stub, store, hubs
    await fleet.stop("the test is over")
    await server.stop(0)


@asynccontextmanager
async def agents(stub: agent_service_pb2_grpc.AgentServiceAsyncStub) -> AsyncIterator[dict[str, LiveAgent]]:
    engines = Engines()
    engines.start(["b/0"], [("r0", 0), ("r0", 1)])
    engines.blocks["c/0"] = set()
    running = {node: LiveAgent(node, stub, engines) for node in ("a", "b", "c")}
    tasks = [asyncio.create_task(agent.run()) for agent in running.values()]
    yield running
    for agent in running.values():
        agent.call.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def until(holds: Callable[[], bool]) -> None:
    end_s = time.monotonic() + _SOON_S
    while not holds():
        assert time.monotonic() < end_s, "it does not come to be"
        await asyncio.sleep(0.01)


async def test_a_plan_comes_into_force_and_a_redispatch_is_done() -> None:
    async with planner() as (fleet, stub, store, hubs), agents(stub) as running:
        await until(lambda: store.tables.plans.rows[PLAN].activation == plan_pb2.ACTIVATION_STATE_ACTIVE)
        view = fleet.replica_view(REPLICA)
        assert view is not None
        assert view.state == replica_pb2.REPLICA_STATE_SERVING
        maps = await fleet.read_head_maps(REPLICA, 5.0)
        assert (maps.generation, maps.step) == (view.generation, 7)
        assert [one.id for one in maps.maps[0].requests] == ["r0", "r1"]
        body = change(maps.generation)
        await fleet.redispatch(body)
        record = store.tables.redispatches.rows[body.name]
        assert record.body.change.generation == maps.generation + 1
        await until(lambda: store.tables.redispatches.rows[body.name].state == 5)  # DONE
        assert running["a"].model.engines.owner["r0", 1] == "c/0"
        fleet.tick()
        await until(lambda: not any(reconciler.task for reconciler in fleet._reconcilers.values()))
        keys = {event.key for event in hubs.cluster(CLUSTER)._newer(0)}
        assert {("replica", REPLICA), ("redispatch", body.name), ("node", f"{CLUSTER}/nodes/a")} <= keys
        told = {event.key: event.value for event in hubs.cluster(CLUSTER).newest()}[("redispatch", body.name)]
        assert told.end_time == store.tables.redispatches.rows[body.name].body.end_time
        assert [replica.name for replica in fleet.replicas_of(CLUSTER)] == [REPLICA]
        assert fleet.cluster_names == [CLUSTER]


async def test_the_real_store_carries_a_redispatch_and_the_next_planner_reads_it(tmp_path: Path) -> None:
    kept = store_with_plan(cluster_document()).tables

    def fill(tx: Transaction) -> None:
        tx.clusters.insert(kept.clusters.require(CLUSTER))
        tx.plans.insert(kept.plans.require(PLAN))
        tx.replicas.insert(kept.replicas.require(REPLICA))

    url = f"sqlite:///{tmp_path / 'hetis.db'}"
    store = await Store.open(url)
    epoch = await store.leadership.grant("a test")
    await store.write(fill)
    async with planner(store=store, epoch=epoch) as (fleet, stub, _, _), agents(stub):
        await until(lambda: _replica_state(fleet) == replica_pb2.REPLICA_STATE_SERVING)
        maps = await fleet.read_head_maps(REPLICA, 5.0)
        redispatch = change(maps.generation)
        await fleet.redispatch(redispatch)
        await until(lambda: fleet.counters.redispatches == {"REDISPATCH_STATE_DONE": 1})
    record = await store.read(lambda tx: tx.redispatches.require(redispatch.name))
    assert record.state == redispatch_pb2.REDISPATCH_STATE_DONE
    assert record.body.HasField("end_time")
    plan = await store.read(lambda tx: tx.plans.require(PLAN))
    assert plan.activation == plan_pb2.ACTIVATION_STATE_ACTIVE
    await store.close()
    store = await Store.open(url)
    epoch = await store.leadership.grant("the next")
    async with planner(store=store, epoch=epoch) as (fleet, _, _, _):
        view = fleet.replica_view(REPLICA)
        assert view is not None
        assert view.state == replica_pb2.REPLICA_STATE_SERVING
        node = fleet.node_view(f"{CLUSTER}/nodes/a")
        assert node is not None
        assert node.state == cluster_pb2.NODE_STATE_SUSPECT
    await store.close()


def _replica_state(fleet: LiveFleet) -> int:
    view = fleet.replica_view(REPLICA)
    return 0 if view is None else view.state


async def _status_of(stub: agent_service_pb2_grpc.AgentServiceAsyncStub, *requests: pb.ConnectNodeRequest) -> str:
    call = stub.ConnectNode()
    for request in requests:
        await call.write(request)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _read_to_the_end(call)
    return caught.value.details() or ""


async def _kind_of_next(call: grpc.aio.StreamStreamCall[pb.ConnectNodeRequest, pb.ConnectNodeResponse]) -> str:
    message = await call.read()
    assert isinstance(message, pb.ConnectNodeResponse)
    return message.WhichOneof("message") or ""


async def _read_to_the_end(call: grpc.aio.StreamStreamCall[pb.ConnectNodeRequest, pb.ConnectNodeResponse]) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def test_a_stream_that_must_not_begin_is_refused_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    async with planner() as (fleet, stub, _, _):
        hello = ModelAgent("a", Engines()).hello()
        assert await _status_of(stub, pb.ConnectNodeRequest(heartbeat=pb.Heartbeat())) == "PROTOCOL_VIOLATION"
        old = pb.ConnectNodeRequest()
        old.CopyFrom(hello)
        old.hello.min_protocol_version = old.hello.protocol_version = 2
        assert await _status_of(stub, old) == "PROTOCOL_VERSION"
        stale = pb.ConnectNodeRequest()
        stale.CopyFrom(hello)
        stale.hello.newest_epoch = 9
        assert await _status_of(stub, stale) == "STALE_EPOCH"
        elsewhere = pb.ConnectNodeRequest()
        elsewhere.CopyFrom(hello)
        elsewhere.hello.node = "clusters/other/nodes/a"
        assert await _status_of(stub, elsewhere) == "NOT_FOUND"
        assert await _status_of(stub, hello, hello) == "PROTOCOL_VIOLATION"  # in the middle of a stream
        assert fleet.counters.hellos_refused == {
            "PROTOCOL_VIOLATION": 1,
            "PROTOCOL_VERSION": 1,
            "STALE_EPOCH": 1,
            "NOT_FOUND": 1,
        }
    (logged,) = caplog.records
    assert "agents have followed a later planner" in logged.message


async def test_an_agent_that_makes_up_nodes_leaves_nothing_behind() -> None:
    async with planner() as (fleet, stub, store, hubs):
        before = dict(store.tables.nodes.rows)
        shown = hubs.cluster(CLUSTER)._events
        for number in range(3):
            hello = ModelAgent(f"n{number}", Engines()).hello()
            inventory = inventory_pb2.NodeInventory(host_name="x" * 900_000)
            large = pb.ConnectNodeRequest(epoch=1, sequence=1, inventory=inventory)
            assert await _status_of(stub, hello, large) == "INVALID_FIELD"
            key = "node", hello.hello.node
            await until(lambda key=key: key in shown and shown[key].value is None)  # type: ignore[misc]
            assert fleet.node_view(hello.hello.node) is None
        assert store.tables.nodes.rows == before
        assert fleet._clusters[CLUSTER].links.keys() <= {"a", "b", "c"}


async def test_an_agent_may_speak_for_its_own_node_only() -> None:
    who = callers.Identity(name="b", roles=frozenset({callers.CallerRole.AGENT}), scope=f"{CLUSTER}/nodes/b")
    async with planner(who) as (_, stub, _, _):
        assert await _status_of(stub, ModelAgent("a", Engines()).hello()) == "WRONG_NODE"


async def test_an_agent_of_another_run_is_refused_while_the_first_is_heard() -> None:
    """A replayed Hello, with a token for the whole cluster, used to end the real agent for good."""
    async with planner() as (fleet, stub, _, _):
        real, replayed = ModelAgent("a", Engines()), ModelAgent("a", Engines())
        assert real.hello().hello.boot_id != replayed.hello().hello.boot_id
        first = stub.ConnectNode()
        await first.write(real.hello())
        assert await _kind_of_next(first) == "welcome"
        assert await _status_of(stub, replayed.hello()) == "NODE_IN_USE"
        assert (fleet.counters.refusals, fleet.counters.takeovers) == (1, 0)
        assert _state(fleet, f"{CLUSTER}/nodes/a") == cluster_pb2.NODE_STATE_READY
        first.cancel()
        await until(lambda: _state(fleet, f"{CLUSTER}/nodes/a") == cluster_pb2.NODE_STATE_SUSPECT)
        second = stub.ConnectNode()  # the first stream has ended
        await second.write(replayed.hello())
        assert await _kind_of_next(second) == "welcome"
        second.cancel()


async def test_an_admin_ends_the_stream_of_an_agent_and_the_next_one_is_let_in() -> None:
    async with planner() as (fleet, stub, _, _):
        stranger, real = ModelAgent("a", Engines()), ModelAgent("a", Engines())
        first = stub.ConnectNode()
        await first.write(stranger.hello())
        assert await _kind_of_next(first) == "welcome"
        fleet.disconnect(f"{CLUSTER}/nodes/a")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _read_to_the_end(first)
        assert caught.value.details() == "NODE_TAKEN_OVER"
        second = stub.ConnectNode()
        await second.write(real.hello())
        assert await _kind_of_next(second) == "welcome"
        with pytest.raises(ServiceError, match="no agent is connected as"):
            fleet.disconnect(f"{CLUSTER}/nodes/none")
        second.cancel()


async def test_a_second_stream_of_the_same_run_of_an_agent_ends_the_first() -> None:
    async with planner() as (fleet, stub, _, _):
        agent = ModelAgent("a", Engines())
        first = stub.ConnectNode()
        await first.write(agent.hello())
        assert await _kind_of_next(first) == "welcome"
        second = stub.ConnectNode()
        await second.write(agent.hello())
        assert await _kind_of_next(second) == "welcome"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _read_to_the_end(first)
        assert caught.value.details() == "NODE_TAKEN_OVER"
        view = fleet.node_view(f"{CLUSTER}/nodes/a")
        assert view is not None
        assert view.state == cluster_pb2.NODE_STATE_READY
        assert fleet.counters.takeovers == 1
        second.cancel()


async def test_a_planner_that_goes_says_goodbye_and_nodes_keep_what_they_hold() -> None:
    async with planner() as (fleet, stub, store, _), agents(stub) as running:
        await until(lambda: store.tables.plans.rows[PLAN].activation == plan_pb2.ACTIVATION_STATE_ACTIVE)
        await fleet.stop("an upgrade")
        call = running["a"].call
        assert await call.code() == grpc.StatusCode.UNAVAILABLE
        assert await call.details() == "DRAINING"
        assert running["a"].model.states[REPLICA] == report_pb2.ASSIGNMENT_STATE_SERVING


async def test_a_planner_that_goes_waits_for_agents_that_are_slow_to_take_the_goodbye() -> None:
    async with planner() as (fleet, _, _, _):

        async def requests() -> AsyncIterator[pb.ConnectNodeRequest]:
            yield ModelAgent("a", Engines()).hello()
            await asyncio.Event().wait()

        stream = fleet.connect(callers.ANYBODY, requests())
        assert (await anext(stream)).WhichOneof("message") == "welcome"
        stopping = asyncio.create_task(fleet.stop("an upgrade"))
        await asyncio.sleep(0.05)
        assert not stopping.done()
        while (await anext(stream)).WhichOneof("message") != "goodbye":
            assert not stopping.done()
        with pytest.raises(ServiceError, match="reconnect"):
            await anext(stream)
        await stopping


async def test_a_broken_stream_makes_a_node_suspect_and_head_maps_that_were_asked_for_fail_at_once() -> None:
    async def body() -> None:
        async with planner() as (fleet, stub, _, _):
            call = stub.ConnectNode()
            await call.write(ModelAgent("a", Engines()).hello())
            await call.read()
            await until(lambda: fleet.replica_view(REPLICA) is not None)
            reading = asyncio.create_task(fleet.read_head_maps(REPLICA, 20.0))
            await asyncio.sleep(0.05)
            call.cancel()
            with pytest.raises(ServiceError) as caught:
                await reading
            if caught.value.reason_name == "ENGINE_UNREACHABLE":
                raise _UnheardError
            assert caught.value.reason_name == "DEVICE_UNAVAILABLE"
            name = f"{CLUSTER}/nodes/a"
            await until(lambda: _state(fleet, name) == cluster_pb2.NODE_STATE_SUSPECT)

    for _ in range(2):
        try:
            return await body()
        except _UnheardError:
            pass
    return await body()


class _UnheardError(Exception):
    """The server was not notified of the cancelled call, as happens in gRPC now and then after many other tests."""


def _state(fleet: LiveFleet, name: str) -> int:
    view = fleet.node_view(name)
    return 0 if view is None else view.state
