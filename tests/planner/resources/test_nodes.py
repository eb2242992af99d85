"""Nodes and the inventory: what is declared, stored and observed, in one view."""

from __future__ import annotations

import dataclasses
import json
import uuid
from pathlib import Path
from typing import Any

import pytest

from hetis.formats import documents
from hetis.planner.resources import pages
from hetis.planner.store import NodeRecord
from hetis.v1 import cluster_pb2, inventory_pb2, report_pb2
from hetis.v1 import cluster_service_pb2 as pb
from hetis.v1.view_pb2 import VIEW_BASIC
from tests.planner.resources.served import CLUSTER, STATE, LiveNode, Served, document, live_node, refused, served

PARENT = "clusters/night"
KIND = cluster_pb2.InventoryDifferenceKind


def found(*gpu_types: str, memory_bytes: int = 0) -> inventory_pb2.NodeInventory:
    devices = [
        inventory_pb2.GpuDevice(index=index, gpu_type=gpu, memory_bytes=memory_bytes)
        for index, gpu in enumerate(gpu_types)
    ]
    return inventory_pb2.NodeInventory(devices=devices)


async def make(planner: Served, text: str = CLUSTER) -> None:
    cluster = cluster_pb2.Cluster(document=document(text))
    await planner.clusters.CreateCluster(pb.CreateClusterRequest(cluster_id="night", cluster=cluster))


def see(planner: Served, node: str, state: STATE.ValueType, **fields: Any) -> LiveNode:
    live = planner.fleet.nodes[f"{PARENT}/nodes/{node}"] = live_node(state=state, **fields)
    return live


async def states(planner: Served, *wanted: STATE.ValueType) -> dict[str, str]:
    page = await planner.clusters.ListNodes(pb.ListNodesRequest(parent=PARENT, states=wanted))
    return {node.name.rpartition("/")[2]: STATE.Name(node.state).removeprefix("NODE_STATE_") for node in page.nodes}


async def test_states_of_nodes_are_those_of_document_and_fleet(tmp_path: Path) -> None:
    before = NodeRecord(
        name=f"{PARENT}/nodes/l4-2",
        cluster=PARENT,
        body=cluster_pb2.Node(agent_version="1", connect_time={"seconds": 3}),
    )

    async with served(tmp_path) as planner:
        await make(planner)
        await planner.store.write(lambda tx: tx.nodes.insert(before))
        see(planner, "l4-0", STATE.NODE_STATE_READY)
        see(planner, "l4-1", STATE.NODE_STATE_SUSPECT)
        see(planner, "spare", STATE.NODE_STATE_UNDECLARED)
        see(planner, "late", STATE.NODE_STATE_READY)
        see(planner, "gone", STATE.NODE_STATE_LOST)
        all_of_them = {
            "a100": "EXPECTED",
            "l4-0": "READY",
            "l4-1": "SUSPECT",
            "l4-2": "LOST",
            "late": "UNDECLARED",
            "spare": "UNDECLARED",
        }
        assert await states(planner) == all_of_them
        assert await states(planner, STATE.NODE_STATE_READY, STATE.NODE_STATE_LOST) == {"l4-0": "READY", "l4-2": "LOST"}
        of_no_kind = pb.ListNodesRequest(parent=PARENT, states=[*range(100), STATE.NODE_STATE_READY])  # type: ignore[list-item]
        wrong = await refused(planner.clusters.ListNodes(of_no_kind))
        assert wrong.fields == {"states": "holds 0, 6, 7, 8, 9 and 90 others, must be values of NodeState"}
        missing = await refused(planner.clusters.GetNode(pb.GetNodeRequest(name=f"{PARENT}/nodes/gone")))
        assert missing.reason == "NOT_FOUND"
        cluster = (await planner.clusters.GetCluster(pb.GetClusterRequest(name=PARENT))).cluster
        assert cluster.num_connected_nodes == 3
        assert (
            await refused(planner.clusters.ListNodes(pb.ListNodesRequest(parent="clusters/x")))
        ).reason == "NOT_FOUND"


async def test_a_node_shows_what_was_kept_and_what_is_seen(tmp_path: Path) -> None:
    name = f"{PARENT}/nodes/l4-0"
    body = cluster_pb2.Node(agent_version="1.2", inventory=found("L4", "L4"), connect_time={"seconds": 1})
    replica = f"{PARENT}/replicas/r"

    async with served(tmp_path) as planner:
        await make(planner)
        await planner.store.write(lambda tx: tx.nodes.insert(NodeRecord(name=name, cluster=PARENT, body=body)))
        devices = [report_pb2.DeviceReport(index=1, used_blocks=7)]
        see(planner, "l4-0", STATE.NODE_STATE_READY, devices=devices, replicas=[replica])
        node = (await planner.clusters.GetNode(pb.GetNodeRequest(name=name))).node
        assert (node.name, node.agent_version, node.etag, list(node.replicas)) == (name, "1.2", "v1", [replica])
        assert (node.devices[0].used_blocks, node.connect_time.seconds, node.heard_time.seconds) == (7, 5, 6)
        assert len(node.inventory.devices) == 2
        basic = (await planner.clusters.GetNode(pb.GetNodeRequest(name=name, view=VIEW_BASIC))).node
        assert not basic.HasField("inventory")
        said = {"inventory": found("L4"), "agent_version": "1.3", "engine_address": "spare:1"}
        see(planner, "spare", STATE.NODE_STATE_UNDECLARED, **said)  # nothing of the node is stored
        spare = (await planner.clusters.GetNode(pb.GetNodeRequest(name=f"{PARENT}/nodes/spare"))).node
        assert {field: getattr(spare, field) for field in said} == said
        expected = (await planner.clusters.GetNode(pb.GetNodeRequest(name=f"{PARENT}/nodes/a100"))).node
        assert (expected.etag, expected.draining) == ("v0", False)


async def test_draining_is_kept_once_and_told_to_the_fleet(tmp_path: Path) -> None:
    name = f"{PARENT}/nodes/l4-0"

    async with served(tmp_path) as planner:
        await make(planner)
        planner.fleet.changed.clear()
        request = pb.DrainNodeRequest(name=name, etag="v0", request_id=str(uuid.uuid4()))
        node = (await planner.clusters.DrainNode(request)).node
        assert (node.draining, node.etag, node.state) == (True, "v1", STATE.NODE_STATE_EXPECTED)
        assert (await planner.clusters.DrainNode(request)).node == node
        assert (await planner.clusters.DrainNode(pb.DrainNodeRequest(name=name))).node.etag == "v1"
        assert planner.fleet.changed == [PARENT]
        refusal = await refused(planner.clusters.UndrainNode(pb.UndrainNodeRequest(name=name, etag="v0")))
        assert (refusal.reason, refusal.metadata) == ("ETAG_MISMATCH", {"name": name, "etag": "v1"})
        node = (await planner.clusters.UndrainNode(pb.UndrainNodeRequest(name=name, etag="v1"))).node
        assert (node.draining, node.etag) == (False, "v2")
        assert planner.fleet.changed == [PARENT, PARENT]
        nobody = pb.DrainNodeRequest(name=f"{PARENT}/nodes/l4-7")
        assert (await refused(planner.clusters.DrainNode(nobody))).reason == "NOT_FOUND"


async def test_draining_is_answered_again_when_the_node_or_its_cluster_is_gone(tmp_path: Path) -> None:
    name = f"{PARENT}/nodes/l4-0"

    async with served(tmp_path) as planner:
        await make(planner)
        request = pb.DrainNodeRequest(name=name, request_id=str(uuid.uuid4()))
        node = (await planner.clusters.DrainNode(request)).node
        smaller = cluster_pb2.Cluster(name=PARENT, document=document(CLUSTER.replace("name: l4, count: 3", "name: l5")))
        await planner.clusters.UpdateCluster(pb.UpdateClusterRequest(cluster=smaller))
        assert (await planner.clusters.DrainNode(request)).node == node
        await planner.clusters.DeleteCluster(pb.DeleteClusterRequest(name=PARENT))
        assert (await planner.clusters.DrainNode(request)).node == node
        for request_id in (str(uuid.uuid4()), ""):
            another = pb.DrainNodeRequest(name=name, request_id=request_id)
            assert (await refused(planner.clusters.DrainNode(another))).reason == "NOT_FOUND"


async def inventory(planner: Served) -> cluster_pb2.Inventory:
    request = pb.GetInventoryRequest(name=f"{PARENT}/inventory")
    answer: cluster_pb2.Inventory = (await planner.clusters.GetInventory(request)).inventory
    return answer


def differences(answer: cluster_pb2.Inventory) -> list[tuple[str, str]]:
    prefix = "INVENTORY_DIFFERENCE_KIND_"
    return [(KIND.Name(each.kind).removeprefix(prefix), each.device or each.node) for each in answer.differences]


async def test_a_fleet_as_declared_has_no_differences_and_the_same_document(tmp_path: Path) -> None:
    async with served(tmp_path) as planner:
        await make(planner)
        see(planner, "a100", STATE.NODE_STATE_READY, inventory=found("A100-SXM-80GB", "A100-SXM-80GB"))
        for number in range(3):
            see(planner, f"l4-{number}", STATE.NODE_STATE_READY, inventory=found("L4", "L4"))
        answer = await inventory(planner)
        assert differences(answer) == []
        cluster = (await planner.clusters.GetCluster(pb.GetClusterRequest(name=PARENT))).cluster
        assert answer.found.digest == cluster.document.digest
        assert (answer.name, answer.cluster_etag) == (f"{PARENT}/inventory", "v1")


async def test_every_difference_has_both_sides(tmp_path: Path) -> None:
    async with served(tmp_path) as planner:
        await make(planner)
        see(planner, "a100", STATE.NODE_STATE_SUSPECT, inventory=found("A100-SXM-80GB"))
        see(planner, "l4-0", STATE.NODE_STATE_READY, inventory=found("T4", "L4", "L4"))
        broken = [report_pb2.DeviceReport(index=0, unhealthy="double-bit ECC error")]
        see(planner, "l4-1", STATE.NODE_STATE_READY, inventory=found("L4"), devices=broken)
        see(planner, "l4-2", STATE.NODE_STATE_READY, inventory=found("L4", "L4", memory_bytes=20 * 2**30))
        see(planner, "spare", STATE.NODE_STATE_UNDECLARED, inventory=found("L4", ""))
        answer = await inventory(planner)
        assert differences(answer) == [
            ("NODE_MISSING", "a100"),
            ("DEVICE_TYPE", "l4-0/0"),
            ("DEVICE_UNDECLARED", "l4-0/2"),
            ("DEVICE_UNHEALTHY", "l4-1/0"),
            ("DEVICE_MISSING", "l4-1/1"),
            ("DEVICE_MEMORY", "l4-2/0"),
            ("DEVICE_MEMORY", "l4-2/1"),
            ("NODE_UNDECLARED", "spare"),
        ]
        assert answer.differences[1].message == "l4-0/0 is declared as L4, but was found as T4"
        cluster = documents.from_data(json.loads(answer.found.content))
        assert [f"{device.name} {device.gpu}" for device in cluster.devices()] == [  # type: ignore[union-attr]
            *("l4-0/0 T4", "l4-0/1 L4", "l4-0/2 L4", "l4-1/0 L4", "l4-2/0 L4", "l4-2/1 L4", "spare/0 L4")
        ]


async def test_the_indices_of_gpus_are_kept_where_the_document_lists_them_by_type(tmp_path: Path) -> None:
    """In the past they were lost: a plan's GPU 1 was the A100 of index 2, but its engine was started on the T4."""
    mixed = found("A100-SXM-80GB", "T4", "A100-SXM-80GB")
    text = CLUSTER.replace("count: 3", "count: 1, resource: nvidia.com/gpu.shared")
    assert text != CLUSTER

    async with served(tmp_path) as planner:
        await make(planner, text)
        see(planner, "l4-0", STATE.NODE_STATE_READY, inventory=found("", "L4"))
        see(planner, "spare", STATE.NODE_STATE_UNDECLARED, inventory=mixed)
        answer = await inventory(planner)
        nodes = {node["name"]: node for node in json.loads(answer.found.content)["nodes"]}
        assert nodes["l4-0"]["indices"] == [1]
        assert nodes["l4-0"]["resource"] == "nvidia.com/gpu.shared"
        assert [gpus["type"] for gpus in nodes["spare"]["gpus"]] == ["A100-SXM-80GB", "T4"]
        assert nodes["spare"]["indices"] == [0, 2, 1]


async def test_a_node_with_the_declared_indices_is_as_declared(tmp_path: Path) -> None:
    text = CLUSTER.replace("count: 3", "count: 3, indices: [1, 2]")
    assert text != CLUSTER
    shifted = inventory_pb2.NodeInventory(devices=[{"index": 1, "gpu_type": "L4"}, {"index": 2, "gpu_type": "L4"}])

    async with served(tmp_path) as planner:
        await make(planner, text)
        see(planner, "a100", STATE.NODE_STATE_READY, inventory=found("A100-SXM-80GB", "A100-SXM-80GB"))
        for number in range(3):
            see(planner, f"l4-{number}", STATE.NODE_STATE_READY, inventory=shifted)
        cluster = (await planner.clusters.GetCluster(pb.GetClusterRequest(name=PARENT))).cluster
        assert (await inventory(planner)).found.digest == cluster.document.digest


async def test_links_of_what_was_not_found_are_left_out(tmp_path: Path) -> None:
    text = CLUSTER.replace(
        "latency: 20us}",
        "latency: 20us, nodes: {links: [{between: [l4-0, l4-1], bandwidth: 1Gbps, latency: 1us}, "
        "{between: [l4-0, a100], bandwidth: 2Gbps, latency: 1us}]}}",
    )

    async with served(tmp_path) as planner:
        await make(planner, text)
        see(planner, "l4-0", STATE.NODE_STATE_READY, inventory=found("L4", "L4"))
        see(planner, "l4-1", STATE.NODE_STATE_READY, inventory=found("L4", "L4"))
        cluster = documents.from_data(json.loads((await inventory(planner)).found.content))
        assert list(cluster.network.between_nodes) == [("l4-0", "l4-1")]  # type: ignore[union-attr]


async def test_without_agents_everything_is_missing(tmp_path: Path) -> None:
    async with served(tmp_path) as planner:
        await make(planner)
        answer = await inventory(planner)
        assert [kind for kind, _ in differences(answer)] == ["NODE_MISSING"] * 4
        assert json.loads(answer.found.content)["nodes"] == []


async def test_differences_of_long_names_are_as_many_as_fit_into_the_answer(tmp_path: Path) -> None:
    async with served(tmp_path) as planner:
        await make(planner, CLUSTER.replace("name: l4, count: 3", f"name: {'n' * 190}, count: 9999"))
        answer = await inventory(planner)
        assert 8_000 < len(answer.differences) < 10_000
        assert (4 << 20) - (32 << 10) < answer.ByteSize() < 4 << 20


@pytest.mark.parametrize("text", [CLUSTER.replace("count: 3", "count: 10001")])
async def test_a_fleet_that_is_too_large_is_refused(tmp_path: Path, text: str) -> None:
    async with served(tmp_path) as planner:
        cluster = cluster_pb2.Cluster(document=document(text))
        request = pb.CreateClusterRequest(cluster_id="night", cluster=cluster)
        refusal = await refused(planner.clusters.CreateCluster(request))
        assert refusal.fields == {
            "cluster.document#nodes": "has 10002 nodes, a cluster of the service has at most 10000"
        }


async def test_a_node_record_of_a_drained_node_survives_its_agent(tmp_path: Path) -> None:
    """The fleet extends the record that draining created."""
    name = f"{PARENT}/nodes/l4-0"

    async with served(tmp_path) as planner:
        await make(planner)
        await planner.clusters.DrainNode(pb.DrainNodeRequest(name=name))
        await planner.store.write(
            lambda tx: tx.nodes.update(
                dataclasses.replace(tx.nodes.require(name), body=cluster_pb2.Node(inventory=found("L4")))
            )
        )
        node = (await planner.clusters.GetNode(pb.GetNodeRequest(name=name))).node
        assert (node.draining, node.etag, len(node.inventory.devices)) == (True, "v2", 1)


async def test_one_node_and_one_cluster_are_answered_without_looking_at_all_nodes(tmp_path: Path) -> None:
    """Otherwise a viewer of a large fleet could block the planner."""
    name = f"{PARENT}/nodes/l4-0"

    async with served(tmp_path) as planner:
        await make(planner)
        see(planner, "l4-0", STATE.NODE_STATE_READY)
        planner.fleet.looked_up.clear()
        assert (await planner.clusters.GetNode(pb.GetNodeRequest(name=name))).node.name == name
        await planner.clusters.DrainNode(pb.DrainNodeRequest(name=name))
        await planner.clusters.GetCluster(pb.GetClusterRequest(name=PARENT))
        await planner.clusters.ListClusters(pb.ListClustersRequest())
        assert set(planner.fleet.looked_up) == {name}


async def test_a_page_of_nodes_with_large_reports_is_shorter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client refuses an answer of over 4 MiB."""
    monkeypatch.setattr(pages, "MOST_PAGE_BYTES", 2000)

    async with served(tmp_path) as planner:
        await make(planner)
        for node in ("l4-0", "l4-1"):
            reports = [report_pb2.DeviceReport(index=index, used_blocks=index + 1) for index in range(200)]
            see(planner, node, STATE.NODE_STATE_READY, devices=reports)
        seen, token = list[str](), ""
        for _ in range(9):
            page = await planner.clusters.ListNodes(pb.ListNodesRequest(parent=PARENT, page_token=token))
            assert len(page.nodes) == 1 or page.ByteSize() < 2000
            seen += [node.name.rpartition("/")[2] for node in page.nodes]
            if not (token := page.next_page_token):
                break
        assert seen == ["a100", "l4-0", "l4-1", "l4-2"]
