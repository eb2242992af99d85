"""WatchCluster, through a real server: the present state, then every change, from wherever a watcher left off."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message

from hetis.planner.convert.documents import DeclaredFleets
from hetis.planner.resources.nodes import NodeReader
from hetis.planner.resources.watches import ClusterWatches
from hetis.v1 import cluster_pb2, redispatch_pb2, replica_pb2
from hetis.v1 import cluster_service_pb2 as pb
from tests.planner.resources.served import CLUSTER, STATE, Served, document, live_node, refused, served
from tests.planner.store import samples

NAME = "clusters/night"


async def make(planner: Served, text: str = CLUSTER) -> None:
    cluster = cluster_pb2.Cluster(document=document(text))
    await planner.clusters.CreateCluster(pb.CreateClusterRequest(cluster_id="night", cluster=cluster))


async def change(planner: Served, text: str) -> None:
    cluster = cluster_pb2.Cluster(name=NAME, document=document(text))
    await planner.clusters.UpdateCluster(pb.UpdateClusterRequest(cluster=cluster))


class Watcher:
    """Records what it received."""

    def __init__(self, planner: Served, token: str = "") -> None:
        self._call = planner.clusters.WatchCluster(pb.WatchClusterRequest(name=NAME, resume_token=token))
        self.state: dict[str, Message] = {}
        self.token = token
        self.num_resets = 0
        self.events: list[pb.WatchClusterResponse] = []

    async def next(self) -> pb.WatchClusterResponse:
        event: Any = await asyncio.wait_for(self._call.read(), 10)
        if event is grpc.aio.EOF:
            await self._call
            raise AssertionError("the watch ended with OK")
        assert isinstance(event, pb.WatchClusterResponse)
        assert event.resume_token
        assert event.HasField("event_time")
        self.events.append(event)
        self.token = event.resume_token
        if event.reset:
            self.state.clear()
            self.num_resets += 1
        kind = event.WhichOneof("event")
        if kind in ("removed_node", "removed_replica"):
            del self.state[getattr(event, kind)]
        elif kind is not None:
            message = getattr(event, kind)
            self.state[message.name] = message
        return event

    async def catch_up(self) -> None:
        while not (await self.next()).caught_up:
            pass

    def cancel(self) -> None:
        self._call.cancel()


async def test_the_present_state_comes_first_then_changes(tmp_path: Path) -> None:
    async with served(tmp_path) as planner:
        await make(planner)
        moved = samples.redispatch(f"{NAME}/redispatches/1", time_s=3.0)
        moved.body.change.change_id = "1"
        await planner.store.write(lambda tx: tx.replicas.insert(samples.replica(f"{NAME}/replicas/r")))
        await planner.store.write(lambda tx: tx.redispatches.insert(moved))
        watcher = Watcher(planner)
        await watcher.catch_up()
        nodes = [f"{NAME}/nodes/{node}" for node in ("a100", "l4-0", "l4-1", "l4-2")]
        assert list(watcher.state) == [NAME, *nodes, f"{NAME}/replicas/r", f"{NAME}/redispatches/1"]
        cluster, redispatch = watcher.state[NAME], watcher.state[f"{NAME}/redispatches/1"]
        assert isinstance(cluster, cluster_pb2.Cluster)
        assert (cluster.document.content, cluster.num_nodes) == (b"", 4)
        assert isinstance(redispatch, redispatch_pb2.Redispatch)
        assert not redispatch.HasField("change")
        assert watcher.num_resets == 0
        await planner.clusters.DrainNode(pb.DrainNodeRequest(name=nodes[1]))
        event = await watcher.next()
        assert (event.node.name, event.node.draining, event.caught_up) == (nodes[1], True, False)
        replica = replica_pb2.Replica(name=f"{NAME}/replicas/r", generation=9)
        replica.shape.rate_rps = 1.0
        planner.hubs.cluster(NAME).publish(("replica", replica.name), replica, now_s=4.0)
        event = await watcher.next()
        assert (event.replica.generation, event.replica.HasField("shape"), event.event_time.seconds) == (9, False, 4)
        watcher.cancel()


async def test_nodes_come_and_go_with_the_document_and_their_agents(tmp_path: Path) -> None:
    async with served(tmp_path) as planner:
        await make(planner)
        watcher = Watcher(planner)
        await watcher.catch_up()
        spare = f"{NAME}/nodes/l4-2"
        planner.fleet.nodes[spare] = live_node(state=STATE.NODE_STATE_READY)
        await change(planner, CLUSTER.replace("count: 3", "count: 1"))
        for _ in range(3):
            await watcher.next()
        kinds = [event.WhichOneof("event") for event in watcher.events[-3:]]
        assert kinds == ["cluster", "removed_node", "node"]
        node = watcher.state[spare]
        assert isinstance(node, cluster_pb2.Node)
        assert node.state == STATE.NODE_STATE_UNDECLARED
        cluster = watcher.state[NAME]
        assert isinstance(cluster, cluster_pb2.Cluster)
        assert (cluster.num_nodes, cluster.num_connected_nodes, cluster.etag) == (2, 1, "v2")
        del planner.fleet.nodes[spare]
        planner.hubs.cluster(NAME).publish(("node", spare), None, now_s=5.0)
        assert (await watcher.next()).removed_node == spare
        watcher.cancel()


async def test_a_replica_that_is_gone_is_removed_for_those_who_watch_and_those_who_resume(tmp_path: Path) -> None:
    async with served(tmp_path) as planner:
        await make(planner)
        name = f"{NAME}/replicas/r"
        await planner.store.write(lambda tx: tx.replicas.insert(samples.replica(name)))
        planner.hubs.cluster(NAME).publish(("replica", name), replica_pb2.Replica(name=name), now_s=4.0)
        watcher, left = Watcher(planner), Watcher(planner)
        for one in (watcher, left):
            await one.catch_up()
            assert name in one.state
        left.cancel()
        await planner.store.write(lambda tx: tx.replicas.delete(name))
        planner.hubs.cluster(NAME).publish(("replica", name), None, now_s=5.0)
        assert (await watcher.next()).removed_replica == name
        resumed = Watcher(planner, left.token)
        resumed.state = left.state
        await resumed.catch_up()
        assert resumed.num_resets == 0
        assert name not in watcher.state.keys() | resumed.state.keys()
        for one in (watcher, resumed):
            one.cancel()


async def test_a_watcher_that_resumes_hears_what_it_missed(tmp_path: Path) -> None:
    async with served(tmp_path) as planner:
        await make(planner)
        first = Watcher(planner)
        await first.catch_up()
        first.cancel()
        await planner.clusters.DrainNode(pb.DrainNodeRequest(name=f"{NAME}/nodes/l4-0"))
        await planner.clusters.DrainNode(pb.DrainNodeRequest(name=f"{NAME}/nodes/l4-1"))
        await planner.clusters.UndrainNode(pb.UndrainNodeRequest(name=f"{NAME}/nodes/l4-0"))
        again = Watcher(planner, first.token)
        await again.catch_up()
        assert [event.node.name[-1] for event in again.events[:-1]] == ["1", "0"]
        assert [event.node.draining for event in again.events[:-1]] == [True, False]
        assert again.num_resets == 0
        again.cancel()
        idle = Watcher(planner, again.token)
        await idle.catch_up()
        assert len(idle.events) == 1
        idle.cancel()


@pytest.mark.parametrize("token", ["nonsense", "1:2", "0x1p+3:0:1", ":::", "9" * 5000])
async def test_a_token_of_another_time_gives_everything_again(tmp_path: Path, token: str) -> None:
    async with served(tmp_path) as planner:
        await make(planner)
        watcher = Watcher(planner, token)
        await watcher.catch_up()
        assert [event.reset for event in watcher.events] == [True] + [False] * 5
        watcher.cancel()


async def test_a_watcher_that_saw_half_of_the_present_state_gets_it_whole(tmp_path: Path) -> None:
    async with served(tmp_path) as planner:
        await make(planner)
        watcher = Watcher(planner)
        await watcher.next()
        watcher.cancel()
        again = Watcher(planner, watcher.token)
        await again.catch_up()
        assert again.num_resets == 1
        assert len(again.state) == 5
        again.cancel()


async def test_a_cluster_made_again_under_the_same_name_gives_everything_again(tmp_path: Path) -> None:
    async with served(tmp_path) as planner:
        await make(planner)
        watcher = Watcher(planner)
        await watcher.catch_up()
        await planner.clusters.DeleteCluster(pb.DeleteClusterRequest(name=NAME))
        refusal = await refused(watcher.next())
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "NOT_FOUND")
        assert (await refused(Watcher(planner, watcher.token).next())).reason == "NOT_FOUND"
        planner.now_s[0] += 1
        await make(planner)
        again = Watcher(planner, watcher.token)
        await again.catch_up()
        assert again.num_resets == 1
        again.cancel()


async def test_when_very_much_changes_watchers_are_sent_everything_again(tmp_path: Path) -> None:
    async with served(tmp_path) as planner:
        await make(planner)
        watcher, idle = Watcher(planner), Watcher(planner)
        await watcher.catch_up()
        await idle.catch_up()
        idle.cancel()
        await change(planner, CLUSTER.replace("count: 3", "count: 2000"))
        await watcher.catch_up()
        assert watcher.num_resets == 1
        assert len(watcher.state) == 2002
        watcher.cancel()
        again = Watcher(planner, idle.token)
        await again.catch_up()
        assert (again.num_resets, len(again.state)) == (1, 2002)
        again.cancel()


async def test_a_watcher_that_is_left_behind_by_removals_is_sent_everything_again(tmp_path: Path) -> None:
    async with served(tmp_path) as planner:
        await make(planner)
        watcher = Watcher(planner)
        await watcher.catch_up()
        hub = planner.hubs.cluster(NAME)
        for number in range(10_001):  # without a pause in which the watcher could read
            hub.publish(("redispatch", f"{NAME}/redispatches/{number}"), None, now_s=0.0)
        await watcher.catch_up()
        assert (watcher.num_resets, len(watcher.state)) == (1, 5)
        watcher.cancel()


async def test_watches_end_when_the_planner_goes_so_that_callers_resume(tmp_path: Path) -> None:
    async with served(tmp_path) as planner:
        await make(planner)
        watcher = Watcher(planner)
        await watcher.catch_up()
        planner.hubs.close()
        refusal = await refused(watcher.next())
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")


async def test_watches_end_with_the_term_as_those_that_another_planner_continues(tmp_path: Path) -> None:
    async with served(tmp_path) as planner:
        await make(planner)
        watcher = Watcher(planner)
        await watcher.catch_up()
        planner.hubs.close(planner.store.leadership.not_leader())
        refusal = await refused(watcher.next())
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "NOT_LEADER")


async def test_a_watch_of_nothing_leaves_nothing_behind(tmp_path: Path) -> None:
    async with served(tmp_path) as planner:
        assert (await refused(Watcher(planner).next())).reason == "NOT_FOUND"
        assert not planner.hubs._clusters


async def test_under_many_changes_a_watcher_ends_with_the_truth(tmp_path: Path) -> None:
    async with served(tmp_path) as planner:
        await make(planner)
        watcher = Watcher(planner)
        names = [f"{NAME}/nodes/l4-{number}" for number in range(3)]

        async def drain_and_undrain() -> None:
            for turn in range(20):
                name = names[turn % 3]
                await planner.clusters.DrainNode(pb.DrainNodeRequest(name=name))
                if turn % 2:
                    await planner.clusters.UndrainNode(pb.UndrainNodeRequest(name=name))

        await asyncio.gather(drain_and_undrain(), watcher.catch_up())
        truth = {
            node.name: node.etag for node in (await planner.clusters.ListNodes(pb.ListNodesRequest(parent=NAME))).nodes
        }

        def etags() -> dict[str, str]:
            return {name: node.etag for name, node in watcher.state.items() if isinstance(node, cluster_pb2.Node)}

        while etags() != truth:
            await watcher.next()
        watcher.cancel()


async def test_a_change_of_a_node_is_looked_up_once_however_many_watch(tmp_path: Path) -> None:
    name = f"{NAME}/nodes/l4-0"

    async with served(tmp_path) as planner:
        await make(planner)
        watchers = [Watcher(planner) for _ in range(5)]
        for watcher in watchers:
            await watcher.catch_up()
        for state in (STATE.NODE_STATE_READY, STATE.NODE_STATE_SUSPECT):
            planner.fleet.nodes[name] = live_node(state=state)
            planner.fleet.looked_up.clear()
            planner.hubs.cluster(NAME).publish(("node", name), cluster_pb2.Node(name=name), now_s=5.0)
            assert [(await watcher.next()).node.state for watcher in watchers] == [state] * 5
            assert planner.fleet.looked_up == [name]
        for watcher in watchers:
            watcher.cancel()


async def test_a_change_is_encoded_once_however_many_watch(tmp_path: Path) -> None:
    async with served(tmp_path) as planner:
        await make(planner)
        reader = NodeReader(planner.store, planner.fleet, DeclaredFleets())  # type: ignore[arg-type]
        watches = ClusterWatches(planner.store, planner.hubs, planner.fleet, reader)  # type: ignore[arg-type]
        streams = [watches.watch(pb.WatchClusterRequest(name=NAME)) for _ in range(3)]
        for stream in streams:
            while not getattr(await anext(stream), "caught_up", False):
                pass
        waiting = [asyncio.ensure_future(anext(stream)) for stream in streams]
        await asyncio.sleep(0)
        planner.hubs.cluster(NAME).publish(("node", f"{NAME}/nodes/l4-0"), cluster_pb2.Node(), now_s=5.0)
        first, *others = await asyncio.wait_for(asyncio.gather(*waiting), 10)
        assert isinstance(first, bytes)
        assert all(other is first for other in others)
        assert pb.WatchClusterResponse.FromString(first).node.name == f"{NAME}/nodes/l4-0"
