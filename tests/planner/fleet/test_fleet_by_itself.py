"""The fleet's loop with failures around it: of the store, of its own time, and clusters that come and go."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from hetis.planner import callers
from hetis.planner.convert import documents
from hetis.planner.failures import ServiceError
from hetis.planner.fleet.agents.link import Request, Response
from hetis.planner.fleet.agents.stream import MessageBudget
from hetis.planner.fleet.fleet import LiveFleet
from hetis.planner.fleet.hubs import Hubs
from hetis.planner.store import NodeRecord, Store
from hetis.v1 import agent_service_pb2 as pb
from hetis.v1 import change_pb2, cluster_pb2, plan_pb2, redispatch_pb2, replica_pb2
from tests.planner.fleet.memory_store import MemoryStore
from tests.planner.fleet.model_agents import Engines, ModelAgent
from tests.planner.fleet.samples import (
    CLUSTER,
    REPLICA,
    SETTINGS,
    SampleContents,
    change,
    cluster_document,
    cluster_record,
    replica_record,
    store_with_plan,
)

T = TypeVar("T")
NODE = f"{CLUSTER}/nodes/a"


class HandClock:
    """A clock that the test moves."""

    now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s

    def time(self) -> float:
        return self.now_s


class FaultyStore(MemoryStore):
    """``fails_with``: error of the next write; ``reads``: event awaited before every read."""

    fails_with: BaseException | None = None
    num_reads = 0
    reads: asyncio.Event | None = None

    async def read(self, work: Callable[[Any], T]) -> T:
        self.num_reads += 1
        if self.reads is not None:
            await self.reads.wait()
        return await super().read(work)

    async def write(self, work: Callable[[Any], T]) -> T:
        if self.fails_with is not None:
            error, self.fails_with = self.fails_with, None
            raise error
        return await super().write(work)


def store_of_one_cluster() -> FaultyStore:
    store = FaultyStore()
    store.tables = store_with_plan(cluster_document()).tables
    return store


def new_fleet(store: MemoryStore, clock: HandClock | None = None, hubs: Hubs | None = None) -> LiveFleet:
    return LiveFleet(
        store,  # type: ignore[arg-type]
        hubs or Hubs(1),
        epoch=1,
        settings=SETTINGS,
        clock=clock or HandClock(),
        plans=SampleContents(),
    )


@asynccontextmanager
async def stream(fleet: LiveFleet, *messages: Request) -> AsyncIterator[list[Response]]:
    """Connect an agent of node a that sends only these messages; yield the messages that it receives."""
    sent: list[Response] = []

    async def requests() -> AsyncIterator[Request]:
        for message in messages or (ModelAgent("a", Engines()).hello(),):
            yield message
        await asyncio.Event().wait()

    async def listen() -> None:
        async for message in fleet.connect(callers.ANYBODY, requests()):
            sent.append(message)

    task = asyncio.create_task(listen())
    await asyncio.sleep(0.01)
    yield sent
    task.cancel()
    with suppress(asyncio.CancelledError, ServiceError):
        await task


def run(body: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(body(), 20))


async def settle(fleet: LiveFleet) -> None:
    for _ in range(200):
        await asyncio.sleep(0.005)
        if not any(reconciler.task for reconciler in fleet._reconcilers.values()):
            return
    raise AssertionError("it looks for ever")


def state(fleet: LiveFleet) -> str:
    view = fleet.node_view(NODE)
    assert view is not None
    return cluster_pb2.NodeState.Name(view.state).removeprefix("NODE_STATE_")


async def test_a_fleet_of_many_clusters_starts_with_as_many_reads_and_threads_as_one_of_few(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the past it read and parsed one cluster after another, and with 1,084 of them a takeover took up to 14 s."""
    num_reads, num_parses = [], Counter[int]()

    async def parse_here(work: Callable[[], T]) -> T:
        num_parses[num] += 1
        return work()

    monkeypatch.setattr(documents, "run_in_thread_gc_paused", parse_here)
    for num in (1, 150):
        store, record = FaultyStore(), store_of_one_cluster().tables.clusters.require(CLUSTER)
        for number in range(num):
            body = cluster_pb2.Cluster(document=cluster_document([f"n{number}"]))
            store.tables.clusters.insert(replace(record, name=f"clusters/c{number}", body=body, active_plan=""))
        fleet = new_fleet(store)
        await fleet.start()
        assert len(fleet.cluster_names) == num
        await fleet.stop("the test ends")
        num_reads.append(store.num_reads)
    assert num_reads[0] == num_reads[1] <= 2
    assert num_parses == {1: 1, 150: 1}


async def test_a_change_of_one_node_of_many_is_read_and_published_alone() -> None:
    """In the past all records of the cluster were, for every watcher: 270,000 responses for 90 of 3,000 nodes."""
    store, clock, hubs = store_of_one_cluster(), HandClock(), Hubs(1)
    for node in ("a", "b", "c"):
        name = f"{CLUSTER}/nodes/{node}"
        store.tables.nodes.insert(NodeRecord(name=name, cluster=CLUSTER, body=cluster_pb2.Node(name=name)))
    fleet = new_fleet(store, clock, hubs)
    await fleet.start()
    await settle(fleet)
    clock.now_s += 1
    fleet.tick()
    before = hubs.cluster(CLUSTER).sequence
    store.tables.nodes.update(replace(store.tables.nodes.require(NODE), draining=True))
    store.tables.nodes.num_read = store.tables.replicas.num_read = 0
    await fleet.cluster_changed(CLUSTER)
    assert (store.tables.nodes.num_read, store.tables.replicas.num_read) == (1, 0)
    clock.now_s += 1
    fleet.tick()
    published = [event.key for event in hubs.cluster(CLUSTER).newest() if event.sequence > before]
    assert published == [("node", NODE)]
    view = fleet.node_view(NODE)
    assert view is not None
    assert view.is_draining
    await fleet.stop("the test ends")


async def test_an_agent_that_never_stops_sending_leaves_time_for_others() -> None:
    """In the past reads took 0.3 s beside 7,000 reports per second of a single agent."""
    fleet = new_fleet(store_of_one_cluster())
    await fleet.start()

    async def endless() -> AsyncIterator[Request]:
        agent = ModelAgent("a", Engines())
        yield agent.hello()
        while True:  # no await: as if messages had always arrived already
            yield pb.ConnectNodeRequest(heartbeat=pb.Heartbeat())

    async def listen() -> None:
        async for _ in fleet.connect(callers.ANYBODY, endless()):
            pass

    listening = asyncio.create_task(listen())
    async with asyncio.timeout(20):
        while fleet.counters.messages.total() < 100:
            await asyncio.sleep(0)
        before = fleet.counters.messages.total()
        for _ in range(50):
            await asyncio.sleep(0)
        assert fleet.counters.messages.total() - before < 50 * 20  # a piece is some 4 ms, and a message 0.2 ms or more
    listening.cancel()
    await asyncio.wait([listening])
    await fleet.stop("the test ends")


async def test_messages_take_their_share_of_the_time_and_streams_have_their_turns_in_order() -> None:
    now_s = 0.0
    budget = MessageBudget(share=0.5, slack_s=0.0, clock=lambda: now_s)
    for _ in range(200):
        budget.took(0.0098)  # with 0.2 ms for reading it, a message takes 10 ms, and 20 of the time
    turns = list[int]()

    async def stream(number: int) -> None:
        await budget.turn()
        turns.append(number)

    streams = [asyncio.create_task(stream(number)) for number in range(5)]
    await asyncio.sleep(0)
    assert turns == [0]
    streams[2].cancel()
    for step in range(1, 5):
        now_s = step * 0.02 + 1e-3
        budget._wake()
        await asyncio.sleep(0)
        assert turns == [0, 1, 3, 4][: step + 1]
    await asyncio.wait(streams)


async def test_an_agent_that_connects_waits_for_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the past the first change after a takeover waited up to 3 s behind the agents that came back at once."""
    fleet, has_turn = new_fleet(store_of_one_cluster()), asyncio.Event()
    await fleet.start()
    monkeypatch.setattr(fleet._budget, "turn", has_turn.wait)
    async with stream(fleet), asyncio.timeout(20):
        assert fleet.num_connected(CLUSTER) == 0
        has_turn.set()
        while not fleet.num_connected(CLUSTER):
            await asyncio.sleep(0)
    await fleet.stop("the test ends")


async def test_steps_that_fail_are_counted_and_do_not_end_the_fleet(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the past only the log had them."""
    fleet = new_fleet(store_of_one_cluster())
    await fleet.start()
    failing = fleet._reconcilers[CLUSTER]
    monkeypatch.setattr(type(failing.cluster), "pass_time", lambda *_: 1 / 0)
    async with asyncio.timeout(20):
        while fleet.counters.errors["tick"] < 2:
            await asyncio.sleep(0.01)
    monkeypatch.setattr(type(failing), "reconcile", lambda _: 1 / 0)
    await failing._reconcile_soon()
    assert fleet.counters.errors["reconciliation"] == 1
    await fleet.stop("the test ends")


async def test_replicas_and_activation_are_counted_for_metrics() -> None:
    fleet = new_fleet(store_of_one_cluster())
    assert (fleet.activation_of(CLUSTER), fleet.replicas_by_state(CLUSTER)) == (None, {})
    await fleet.start()
    assert fleet.activation_of(CLUSTER) == plan_pb2.ACTIVATION_STATE_ACTIVATING
    assert fleet.replicas_by_state(CLUSTER) == {replica_pb2.REPLICA_STATE_STARTING: 1}
    await fleet.stop("the test ends")


async def test_calls_about_a_new_cluster_that_meet_make_one_room_of_it() -> None:
    store = store_of_one_cluster()
    fleet = new_fleet(store)
    store.reads = asyncio.Event()
    calls = [asyncio.create_task(fleet.cluster_changed(CLUSTER)) for _ in range(2)]
    await asyncio.sleep(0)
    store.reads.set()
    await calls[0]
    room = fleet._clusters[CLUSTER]
    async with stream(fleet):
        calls.append(asyncio.create_task(fleet.cluster_changed(CLUSTER)))
        await asyncio.gather(*calls)
        assert fleet._clusters[CLUSTER] is room
        assert state(fleet) == "READY"
    await fleet.stop("the test is over")


async def test_of_a_cluster_that_is_gone_nothing_is_left_and_it_may_come_again() -> None:
    store = store_of_one_cluster()
    fleet = new_fleet(store)
    await fleet.cluster_changed(CLUSTER)
    await settle(fleet)
    record = store.tables.clusters.rows.pop(CLUSTER)
    first, second = asyncio.Event(), asyncio.Event()

    async def call() -> None:
        await fleet.cluster_changed(CLUSTER)
        if CLUSTER in fleet._clusters:
            assert fleet._reconcilers[CLUSTER].cluster is fleet._clusters[CLUSTER]

    store.reads = first
    calls = [asyncio.create_task(call()) for _ in range(3)]
    await asyncio.sleep(0)  # one reads, the others wait for it
    store.reads = second
    first.set()
    await calls[0]
    assert CLUSTER not in fleet._clusters
    store.tables.clusters.rows[CLUSTER] = record
    calls.append(asyncio.create_task(call()))
    await asyncio.sleep(0)
    second.set()
    await asyncio.gather(*calls)
    assert fleet._reconcilers[CLUSTER].cluster is fleet._clusters[CLUSTER]
    await fleet.cluster_changed("clusters/never")
    assert list(fleet._reconcilers) == [CLUSTER]
    await fleet.stop("the test is over")


async def test_a_planner_that_stood_still_takes_nobodys_silence_for_a_death() -> None:
    clock = HandClock()
    fleet = new_fleet(store_of_one_cluster(), clock)
    await fleet.cluster_changed(CLUSTER)
    async with stream(fleet):
        fleet.tick()
        clock.now_s += 60.0  # the process or its machine was suspended
        fleet.tick()
        assert state(fleet) == "READY"
        seen = []
        for _ in range(24):  # now it listens, and the node is silent
            clock.now_s += SETTINGS.tick_s
            fleet.tick()
            seen.append(state(fleet))
        assert list(dict.fromkeys(seen)) == ["READY", "SUSPECT", "LOST"]
    await fleet.stop("the test is over")


@pytest.mark.parametrize("error", [RuntimeError("a bug"), OSError("a disk")])
async def test_what_could_not_be_written_for_whatever_reason_is_written_with_the_next_look(error: Exception) -> None:
    store = store_of_one_cluster()
    fleet = new_fleet(store)
    await fleet.cluster_changed(CLUSTER)
    await settle(fleet)
    store.fails_with = error
    advised = change(1)
    advised.state = redispatch_pb2.REDISPATCH_STATE_ADVISED
    async with stream(fleet):
        with suppress(type(error)):
            await fleet.redispatch(advised)
        assert store.fails_with is None
        fleet.tick()
        await settle(fleet)
    assert store.tables.nodes.require(NODE).body.agent_version == "1.0"
    assert advised.name in store.tables.redispatches.rows
    await fleet.stop("the test is over")


async def test_the_store_is_asked_once_for_all_changes_that_nodes_speak_of() -> None:
    store = store_of_one_cluster()
    fleet = new_fleet(store)
    await fleet.cluster_changed(CLUSTER)
    await settle(fleet)
    before = store.num_reads
    hello = ModelAgent("a", Engines()).hello()
    hello.hello.changes.extend(
        change_pb2.ChangeStatus(change_id=f"c-{number}", replica=REPLICA, phase=change_pb2.CHANGE_PHASE_PREPARING)
        for number in range(50)
    )
    async with stream(fleet, hello) as sent:
        await settle(fleet)
        assert store.num_reads - before == 1
        assert any(message.delta.HasField("abort") for message in sent)
    await fleet.stop("the test is over")


async def test_the_number_of_connected_nodes_follows_their_streams() -> None:
    fleet = new_fleet(store_of_one_cluster())
    assert fleet.num_connected(CLUSTER) == 0
    await fleet.cluster_changed(CLUSTER)
    async with stream(fleet):
        assert fleet.num_connected(CLUSTER) == 1
        async with stream(fleet):  # a new stream takes over
            assert fleet.num_connected(CLUSTER) == 1
    assert fleet.num_connected(CLUSTER) == 0
    await fleet.stop("the test is over")


async def test_no_message_of_an_agent_is_larger_than_a_mebibyte() -> None:
    fleet = new_fleet(store_of_one_cluster())
    await fleet.cluster_changed(CLUSTER)
    hello = ModelAgent("a", Engines()).hello()
    large = Request()
    large.CopyFrom(hello)
    large.hello.agent_version = "x" * 2**20

    async def requests(*messages: Request) -> AsyncIterator[Request]:
        for message in messages:
            yield message
        await asyncio.Event().wait()

    for messages in ((large,), (hello, Request(report=pb.NodeReport(), sequence=1, head_map=_large_piece()))):
        with pytest.raises(ServiceError) as caught:
            async for _ in fleet.connect(callers.ANYBODY, requests(*messages)):
                pass
        assert caught.value.reason_name == "MESSAGE_TOO_LARGE"
    await fleet.stop("the test is over")


def _large_piece() -> pb.HeadMapPiece:
    return pb.HeadMapPiece(request_id="x" * 2**20)


async def test_a_planner_that_another_one_replaced_writes_nothing(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'hetis.db'}"
    zombie = await Store.open(url)
    await zombie.leadership.grant("the first")
    await zombie.write(lambda tx: tx.clusters.insert(cluster_record("")))
    assert zombie.leadership._lock is not None
    zombie.leadership._lock.release()  # as after a suspension, or on a disk that lost the lock
    other = await Store.open(url)
    await other.leadership.grant("the second")
    with pytest.raises(ServiceError) as caught:
        await zombie.write(lambda tx: tx.clusters.delete(CLUSTER))
    assert caught.value.reason_name == "NOT_LEADER"
    record = await other.read(lambda tx: tx.clusters.require(CLUSTER))
    assert record.version == 1
    await other.write(lambda tx: tx.clusters.update(replace(record, update_time_s=2.0)))
    await other.close()
    with suppress(Exception):
        await zombie.close()


async def test_a_node_shows_its_replicas_as_long_as_they_have_records() -> None:
    store = store_of_one_cluster()
    fleet, other = new_fleet(store), replica_record(f"{CLUSTER}/replicas/first-1")

    async def replicas() -> list[str]:
        await fleet.cluster_changed(CLUSTER)
        view = fleet.node_view(NODE)
        assert view is not None
        return list(view.replicas)

    await fleet.start()
    assert await replicas() == [REPLICA]
    store.tables.replicas.insert(other)
    assert await replicas() == [REPLICA, other.name]
    store.tables.replicas.delete(REPLICA)
    assert await replicas() == [other.name]
    await fleet.stop("the test is over")
