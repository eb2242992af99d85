"""Malicious or newer messages of one agent do not affect others."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest

from hetis.planner.convert.names import last_part
from hetis.planner.failures import Reason, ServiceError
from hetis.planner.fleet import deciding
from hetis.planner.fleet.agents.deltas import ROOM
from hetis.planner.fleet.agents.head_maps import HeadMapPieces
from hetis.planner.fleet.agents.leases import MOST_UNDECLARED
from hetis.planner.fleet.agents.link import _MOST_FOREIGN, _MOST_REMOVALS
from hetis.planner.fleet.agents.messages import check_hello
from hetis.planner.fleet.agents.stream import MOST_BYTES, MOST_MESSAGES, Stream
from hetis.planner.fleet.cluster_changes import MOST_OF_NODE
from hetis.planner.fleet.views import kv_in_use
from hetis.planner.fleet.writes import apply
from hetis.planner.store import NodeRecord
from hetis.v1 import agent_service_pb2 as pb
from hetis.v1 import change_pb2, cluster_pb2, failure_pb2, inventory_pb2, replica_pb2, report_pb2, traffic_pb2
from tests.planner.fleet.driven import DrivenPlanner
from tests.planner.fleet.model_agents import Engines, ModelAgent
from tests.planner.fleet.samples import CLUSTER, REPLICA, change
from tests.planner.fleet.test_going_wrong import ready
from tests.planner.fleet.world import World

FAR = 2**62


def claim(world: World, node: str, generation: int) -> None:
    _, epoch, assignment = world.agents[node].held[REPLICA]
    world.agents[node].held[REPLICA] = (generation, epoch, assignment)


def check_others_serve(world: World, others: Sequence[str] = ("a", "c")) -> None:
    for node in others:
        world.disconnect(node)
        world.connect(node)
        assert node in world.sessions
    world.flow()
    for node in others:
        world.agents[node].load()
    world.flow()
    assert world.store.tables.replicas.rows[REPLICA].generation < ROOM
    assert all(world.agents[node].held[REPLICA][0] < ROOM for node in others)


@pytest.mark.parametrize("way", ["hello", "report", "status", "ack"])
def test_a_generation_that_nobody_gave_away_is_not_carried_to_other_nodes(world: World, way: str) -> None:
    agent = world.agents["b"]
    if way == "hello":
        claim(world, "b", FAR)
        world.connect("b")
    elif way == "report":
        claim(world, "b", FAR)
        agent.report()
    elif way == "status":
        status = change_pb2.ChangeStatus(
            change_id="x", replica=REPLICA, phase=change_pb2.CHANGE_PHASE_FLIPPED, generation=FAR
        )
        agent.sent.append(agent._request(change_status=status))
    else:
        world.propose()
        (message,) = world.to_agent["b"]
        world.to_agent["b"].clear()
        ack = pb.DeltaAck(nonce=message.delta.nonce, replica=REPLICA, generation=FAR)
        agent.sent.append(agent._request(ack=ack))
    world.flow()
    failure = world.planner.cluster.links["b"].slots[REPLICA].failure
    assert failure is not None
    assert failure.reason == Reason.ERROR_REASON_PROTOCOL_VIOLATION
    check_others_serve(world)


def test_a_node_whose_generation_cannot_be_is_as_good_as_lost_until_it_says_another(world: World) -> None:
    before = world.agents["b"].held[REPLICA][0]
    claim(world, "b", FAR)
    world.connect("b")
    world.flow()
    record = world.store.tables.replicas.rows[REPLICA]
    assert record.state == replica_pb2.REPLICA_STATE_DEGRADED
    assert [one.device for one in record.body.conditions] == ["b/0"]
    claim(world, "b", before)
    world.connect("b")
    world.heal()
    world.check_healed()


def test_a_planner_whose_store_came_from_a_backup_goes_on_above_what_its_nodes_hold(world: World) -> None:
    for node in world.agents:
        claim(world, node, 1000)
        world.connect(node)
    world.heal()
    world.check_healed()
    assert world.store.tables.replicas.rows[REPLICA].generation > 1000


def names(world: World, num: int) -> pb.ConnectNodeRequest:
    reports = [report_pb2.ReplicaReport(replica=f"x-{i}", generation=1) for i in range(num)]
    return world.agents["b"]._request(report=pb.NodeReport(replicas=reports))


def test_replicas_that_a_node_made_up_are_listened_to_up_to_a_limit(world: World) -> None:
    world.agents["b"].sent.append(names(world, 25_000))
    world.hear("b")
    cluster = world.planner.cluster
    assert len(cluster.links["b"].slots) == _MOST_FOREIGN + 1
    assert cluster.counters.replicas_ignored >= 24_000
    removals = [one for one in world.to_agent["b"] if one.delta.HasField("removal")]
    assert len(removals) == _MOST_REMOVALS


def test_replicas_of_nobody_are_all_removed_in_the_end(world: World) -> None:
    agent = world.agents["b"]
    _, epoch, assignment = agent.held[REPLICA]
    for number in range(3 * _MOST_REMOVALS):
        name = f"{CLUSTER}/replicas/old-{number}"
        agent.held[name], agent.states[name] = (1, epoch, assignment), report_pb2.ASSIGNMENT_STATE_SERVING
    world.connect("b")
    world.flow(1000)
    assert list(agent.held) == [REPLICA]
    assert list(world.planner.cluster.links["b"].slots) == [REPLICA]


def test_reports_of_replicas_that_are_not_its_own_are_not_kept(world: World) -> None:
    made_up = report_pb2.ReplicaReport(replica="x", generation=1, failure=failure_pb2.Failure(message="x" * 10_000))
    world.agents["b"].sent.append(world.agents["b"]._request(report=pb.NodeReport(replicas=[made_up])))
    world.hear("b")
    slot = world.planner.cluster.links["b"].slots["x"]
    assert slot.report == report_pb2.ReplicaReport(replica="x", generation=1)
    assert slot.failure is None


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, -1e16, 1e300])
def test_numbers_that_cannot_be_are_not_known_and_the_node_stays(world: World, wrong: float) -> None:
    """In the past a measured time of NaN made a device 16 times as fast as planned."""
    devices = [report_pb2.DeviceReport(total_blocks=1, used_blocks=FAR, busy_ratio=wrong, temperature_c=wrong)]
    devices += [report_pb2.DeviceReport(clock_hz=wrong, power_w=wrong, temperature_c=-20)]
    loads = [report_pb2.DeviceLoad(device="b/0", total_blocks=1, used_blocks=FAR, observed_s=wrong, predicted_s=wrong)]
    one = report_pb2.ReplicaReport(
        replica=REPLICA,
        assignment_state=report_pb2.ASSIGNMENT_STATE_SERVING,
        generation=world.agents["a"].held[REPLICA][0],
        is_primary=True,
        ttft_s=wrong,
        tpot_s=wrong,
        stages=[report_pb2.StageLoad(devices=loads)],
        traffic=traffic_pb2.Traffic(arrivals=1, ttft_s=traffic_pb2.Histogram(counts=[1, wrong])),
        endpoint="a:1;\ninclude /etc/passwd",
        engine_id="x" * 100_000,
    )
    agent, cluster = world.agents["a"], world.planner.cluster
    agent.sent.append(agent._request(report=pb.NodeReport(devices=devices, replicas=[one])))
    world.hear("a")
    assert "a" in world.sessions
    (first, second), found = cluster.links["a"].devices, cluster.replicas[REPLICA].report
    assert first == report_pb2.DeviceReport(total_blocks=1, used_blocks=FAR)
    assert second == report_pb2.DeviceReport(temperature_c=-20)
    assert found is not None
    assert found.stages[0].devices[0] == report_pb2.DeviceLoad(device="b/0", total_blocks=1, used_blocks=FAR)
    dropped = ("ttft_s", "tpot_s", "traffic", "endpoint", "engine_id")
    assert not any(field.name in dropped for field, _ in found.ListFields())
    assert cluster.counters.values_dropped.total() == 11
    assert max(dict(kv_in_use(cluster)).values()) == 1.0


@pytest.mark.parametrize("way", ["report", "nack", "status"])
def test_a_failure_of_megabytes_is_shortened(world: World, way: str) -> None:
    """Kept as they were, a few of them made lists of replicas larger than an answer may be."""
    failure = failure_pb2.Failure(reason=Reason.ERROR_REASON_ENGINE_UNREACHABLE, message="x" * 900_000)
    failure.metadata["key"] = "y" * 1000
    agent = world.agents["a"]
    generation = agent.held[REPLICA][0]
    said: dict[str, Any] = {
        "report": pb.NodeReport(
            replicas=[report_pb2.ReplicaReport(replica=REPLICA, generation=generation, failure=failure)]
        ),
        "nack": pb.DeltaNack(nonce="n", replica=REPLICA, generation=generation, failure=failure),
        "status": change_pb2.ChangeStatus(change_id="c", replica=REPLICA, failure=failure),
    }
    request = agent._request(**{"change_status" if way == "status" else way: said[way]})
    agent.sent.append(request)
    world.hear("a")
    assert "a" in world.sessions
    assert request.ByteSize() < 5_000
    if way == "report":
        kept = world.planner.cluster.links["a"].slots[REPLICA].failure
        assert kept == failure_pb2.Failure(reason=failure.reason, message="x" * 4_000 + "...")


# Undeclared nodes.


def connect(world: World, node: str, **said: Any) -> str:
    """Connect an agent as the node, and let it send one more message; return its session."""
    agent, cluster = ModelAgent(node, world.engines), world.planner.cluster
    world.to_agent.setdefault(node, [])
    session = cluster.open(node, agent.hello(), now_s=world.now_s, time_s=world.now_s)
    world.planner.settle(world.now_s)
    if said:
        request = pb.ConnectNodeRequest(epoch=world.planner.epoch, sequence=1, **said)
        cluster.handle(node, session, request, now_s=world.now_s, time_s=world.now_s)
        world.planner.settle(world.now_s)
    return session


def stored(world: World) -> set[str]:
    return {last_part(name) for name in world.store.tables.nodes.rows}


INVENTORY = inventory_pb2.NodeInventory(host_name="host", digest="sha256:1")


def test_a_node_that_is_not_declared_is_not_stored_and_forgotten_with_its_stream(world: World) -> None:
    cluster, before = world.planner.cluster, stored(world)
    for number in range(3 * MOST_UNDECLARED):
        node = f"n{number}"
        session = connect(world, node, inventory=INVENTORY)
        assert cluster.links[node].inventory == INVENTORY
        status = change_pb2.ChangeStatus(change_id="x", replica=REPLICA, phase=change_pb2.CHANGE_PHASE_PREPARING)
        cluster.changes.report(node, status)  # looked up when the node is gone
        cluster.close(node, session)
        world.planner.settle(world.now_s)
    cluster.pass_time(world.now_s)
    cluster.messages(world.now_s)
    assert stored(world) == before
    assert {*cluster.links} == {*cluster.connect_time_s} == {*cluster.leases.nodes} == {"a", "b", "c"}
    with pytest.raises(ServiceError, match="another stream of node n0 was opened"):  # disconnected by an admin
        cluster.handle("n0", "", pb.ConnectNodeRequest(), now_s=world.now_s, time_s=world.now_s)


def test_a_cluster_has_few_nodes_at_once_that_it_does_not_declare(world: World) -> None:
    sessions = [connect(world, f"n{number}") for number in range(MOST_UNDECLARED)]
    with pytest.raises(ServiceError, match=r"does not declare node one-more, and 64 .* connected already") as caught:
        connect(world, "one-more")
    assert caught.value.reason == Reason.ERROR_REASON_TOO_MANY_STREAMS
    assert "one-more" not in world.planner.cluster.links
    world.disconnect("a")
    world.connect("a")
    world.planner.cluster.close("n0", sessions[0])
    connect(world, "one-more")


def test_what_a_node_said_before_it_was_declared_is_stored_then_and_forgotten_when_it_is_no_more(world: World) -> None:
    planner = world.planner
    session = connect(world, "d", inventory=INVENTORY)
    assert "d" not in stored(world)
    planner.nodes = ("a", "b", "c", "d")
    planner.reread(world.now_s)
    planner.settle(world.now_s)
    assert world.store.tables.nodes.rows[f"{CLUSTER}/nodes/d"].body.inventory == INVENTORY
    planner.nodes = ("a", "b", "c")
    planner.reread(world.now_s)
    planner.settle(world.now_s)
    assert "d" in stored(world)  # it stays until its stream ends
    planner.cluster.close("d", session)
    planner.settle(world.now_s)
    assert "d" not in stored(world)


def test_a_node_that_goes_while_what_it_said_is_written_is_forgotten_as_well(world: World) -> None:
    planner, cluster = world.planner, world.planner.cluster
    world.to_agent["d"] = []
    planner.nodes = ("a", "b", "c", "d")
    planner.reread(world.now_s)
    session = cluster.open("d", ModelAgent("d", world.engines).hello(), now_s=world.now_s, time_s=world.now_s)
    planner.nodes = ("a", "b", "c")
    planner.reread(world.now_s)
    writes = deciding.decide(cluster, now_s=world.now_s)
    cluster.close("d", session)
    kept = world.store.write_as(planner.epoch, partial(apply, writes=writes, now_s=world.now_s))
    assert "d" in stored(world)
    cluster.applied(writes, kept)
    planner.settle(world.now_s)
    assert "d" not in stored(world)


def test_nodes_that_an_earlier_planner_stored_are_forgotten_unless_they_are_drained_or_of_use(world: World) -> None:
    for node in ("old", "drained"):
        record = NodeRecord(
            name=f"{CLUSTER}/nodes/{node}",
            cluster=CLUSTER,
            body=cluster_pb2.Node(agent_version="1"),
            draining=node == "drained",
        )
        world.store.tables.nodes.insert(record)
    planner = DrivenPlanner(world.store, world.store.epoch, lambda *_: None, now_s=0.0, nodes=("a", "b"))
    planner.settle(0.0)
    assert stored(world) == {"a", "b", "c", "drained"}  # c has a part of the replica
    assert "old" not in planner.cluster.node_records


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            {"inventory": inventory_pb2.NodeInventory(host_name="x" * 900_000)},
            "inventory.host_name: has 900000 characters, at most 255 are allowed",
        ),
        (
            {"inventory": inventory_pb2.NodeInventory(devices=[inventory_pb2.GpuDevice(uuid="x" * 256)])},
            "inventory.devices[0].uuid: has 256 characters, at most 255 are allowed",
        ),
        (
            {"inventory": inventory_pb2.NodeInventory(devices=[inventory_pb2.GpuDevice()] * 1025)},
            "inventory.devices: has 1025 entries, at most 1024 are allowed",
        ),
        (
            {"inventory": inventory_pb2.NodeInventory(devices=[inventory_pb2.GpuDevice(linked_devices=range(1025))])},
            "inventory.devices[0].linked_devices: has 1025 entries, at most 1024 are allowed",
        ),
        (
            {"inventory": inventory_pb2.NodeInventory.FromString(b"\xfa\x01\x80\x80\x08" + b"x" * 2**17)},
            "inventory: has 131077 bytes, at most 131072 are allowed",
        ),
        (
            {"report": pb.NodeReport(devices=[report_pb2.DeviceReport(unhealthy="x" * 900_000)])},
            "report.devices: has 900004 bytes, at most 131072 are allowed",
        ),
        (
            {"report": pb.NodeReport(replicas=[report_pb2.ReplicaReport(replica="x" * 256)])},
            "the name of a replica or change has more than 255 characters, the maximum",
        ),
        (
            {"change_status": change_pb2.ChangeStatus(change_id="\0", replica="x")},
            "the name of a replica or change is '\\x00', must be printable",
        ),
        (
            {"report": pb.NodeReport(replicas=[report_pb2.ReplicaReport(replica="x\n")])},
            "the name of a replica or change is 'x\\n', must be printable",
        ),
    ],
)
def test_what_is_larger_than_any_node_has_is_refused(world: World, said: dict[str, Any], message: str) -> None:
    with pytest.raises(ServiceError, match=re.escape(message)):
        connect(world, "d", **said)


def test_a_hello_with_texts_that_are_too_long_is_refused() -> None:
    hello = ModelAgent("a", Engines()).hello()
    hello.hello.agent_version = "1" * 256
    with pytest.raises(ServiceError, match=r"hello.agent_version: has 256 characters, at most 255 are allowed"):
        check_hello(hello, epoch=1)


def test_an_agent_that_takes_nothing_is_not_kept_in_memory_for_ever() -> None:
    stream = Stream("s")
    assert stream.send([pb.ConnectNodeResponse()] * MOST_MESSAGES)
    assert not stream.send([pb.ConnectNodeResponse()])
    assert not stream._queue
    heavy = Stream("s")
    text = "x" * 2**20
    heavy_message = pb.ConnectNodeResponse(goodbye=pb.Goodbye(reason=text))
    assert not heavy.send([heavy_message] * (MOST_BYTES // len(text) + 1))


async def test_streams_that_end_with_one_error_do_not_gather_each_others_frames() -> None:
    streams, error = [Stream("s") for _ in range(3)], ServiceError(Reason.ERROR_REASON_NOT_LEADER, "the term is over")
    for stream in streams:
        stream.end(error)
        with pytest.raises(ServiceError) as ended:
            await anext(stream.messages())
        assert len(ended.traceback) == 2


def test_a_reason_that_only_a_newer_agent_knows_is_an_answer_like_any_other(world: World) -> None:
    world.propose()
    (message,) = world.to_agent["c"]
    world.to_agent["c"].clear()
    failure = failure_pb2.Failure(message="a reason of a newer agent")
    failure.reason = 9999  # type: ignore[assignment]
    nack = pb.DeltaNack(nonce=message.delta.nonce, replica=REPLICA, generation=2, failure=failure)
    world.agents["c"].sent.append(world.agents["c"]._request(nack=nack))
    world.hear("c")
    assert "c" in world.sessions
    assert world.planner.cluster.counters.nacks == {"9999": 1}


def test_head_maps_that_fail_for_a_reason_of_a_newer_agent_fail_as_any_other() -> None:
    failure = failure_pb2.Failure(message="a reason of a newer agent")
    failure.reason = 9999  # type: ignore[assignment]
    pieces = HeadMapPieces(REPLICA, most_bytes=1000)
    with pytest.raises(ServiceError, match="9999: a reason of a newer agent") as caught:
        pieces.add(pb.HeadMapPiece(request_id="r", replica=REPLICA, failure=failure))
    assert caught.value.code.name == "UNIMPLEMENTED"


def test_changes_that_a_node_made_up_are_listened_to_up_to_a_limit(world: World) -> None:
    agent = world.agents["b"]
    cluster = world.planner.cluster
    hello = agent.hello()
    hello.hello.changes.extend(
        change_pb2.ChangeStatus(
            change_id=f"c-{i}", replica=REPLICA, phase=change_pb2.CHANGE_PHASE_PREPARING, generation=3
        )
        for i in range(9000)
    )
    cluster.open("b", hello, now_s=world.now_s, time_s=world.now_s)
    assert len(cluster.changes.late.unknown) == MOST_OF_NODE
    world.planner.settle(world.now_s)
    assert cluster.links["b"].slots[REPLICA].num_directives <= MOST_OF_NODE
    for number in range(9000):  # the same, one after another
        status = change_pb2.ChangeStatus(
            change_id=f"d-{number}", replica=REPLICA, phase=change_pb2.CHANGE_PHASE_PREPARING, generation=3
        )
        cluster.changes.report("b", status)
    assert len(cluster.changes.late.unknown) <= MOST_OF_NODE
    world.planner.settle(world.now_s)
    assert cluster.links["b"].slots[REPLICA].num_directives <= MOST_OF_NODE


def test_a_flip_that_no_store_has_recorded_is_told_as_the_node_says_it(world: World) -> None:
    change_id = ready(world)
    world.hear("a")
    world.tell("a")
    assert change_id in world.engines.flipped
    world.store.tables.redispatches.rows.clear()
    world.check = lambda: None  # the store no longer has the permission
    world.restart_planner()
    for node in world.agents:
        world.connect(node)
    (outcome,) = {
        message.delta.resolved.outcome for message in world.to_agent["a"] if message.delta.HasField("resolved")
    }
    assert outcome == change_pb2.CHANGE_OUTCOME_FLIPPED


def test_a_replica_that_cannot_be_decided_does_not_stop_the_others(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def explode(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("hetis.planner.fleet.deciding._decide_replica", explode)
    body = change(world.agents["a"].held[REPLICA][0])
    world.planner.cluster.decide_all = True
    world.planner.cluster.changes.propose(body, now_s=world.now_s)
    world.settle()
    assert world.state(body.change.change_id) == "PREPARING"
    assert "the next state of a replica could not be determined" in caplog.text
