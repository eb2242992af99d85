"""`cluster discover --from agents`: agents' reports become a cluster file, and omissions have reasons."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from hetis.formats.cluster import cluster_to_data
from hetis.formats.documents import load_cluster
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.client import Client
from hetis.planner.convert.documents import document_from_data
from hetis.solver.cluster import Cluster
from hetis.v1 import cluster_pb2, cluster_service_pb2, inventory_pb2, report_pb2
from tests.command_line import command_of
from tests.planner.cli_server.conftest import Run
from tests.planner.client.fake_planner import FakePlanner
from tests.planner.service.process import REAL, Process

GIB = 2**30
CLUSTER = """apiVersion: hetis/v1
kind: Cluster
name: Night
nodes:
  - {name: a, gpus: [{type: L4, count: 2}], zone: east}
  - {name: b, gpus: [{type: T4, count: 1}], zone: west}
  - {name: c, gpus: [{type: T4, count: 1}], zone: west}
network: {bandwidth: 25Gbps, latency: 20us, zones: {bandwidth: 5Gbps, latency: 1ms}}
"""
AGENT = command_of("hetis.runtime.agent")


def gpu(index: int, gpu_type: str = "L4", **fields: Any) -> inventory_pb2.GpuDevice:
    given: dict[str, Any] = {"gpu_type": gpu_type, "memory_bytes": 24 * GIB}
    return inventory_pb2.GpuDevice(index=index, **given | fields)


@pytest.fixture
def declared(planner: FakePlanner, tmp_path: Path) -> Callable[..., None]:
    """The planner has the cluster ``night``; called with a node's name, it has that node, too."""
    path = tmp_path / "declared.yaml"
    path.write_text(CLUSTER)
    document = document_from_data(cluster_to_data(load_cluster(path), embed_gpu_types=True), "Cluster")
    planner.clusters["clusters/night"] = cluster_pb2.Cluster(name="clusters/night", etag="v1", document=document)

    def add(name: str, gpus: Sequence[inventory_pb2.GpuDevice], **fields: Any) -> None:
        node: dict[str, Any] = {"state": cluster_pb2.NODE_STATE_READY}
        node |= {"inventory": inventory_pb2.NodeInventory(devices=gpus)} | fields
        name = f"clusters/night/nodes/{name}"
        planner.nodes[name] = cluster_pb2.Node(name=name, **node)

    return add


def discovered(hetis_plan: Run, tmp_path: Path, *options: str) -> tuple[Cluster, list[str]]:
    """Return the cluster file and the messages about it."""
    out = tmp_path / "found.yaml"
    said = hetis_plan("cluster", "discover", "--from", "agents", "--out", str(out), "--force", *options).err
    return load_cluster(out), said.splitlines()


def shape(cluster: Cluster) -> dict[str, tuple[str, dict[str, int]]]:
    return {
        group.node_name(i): (group.zone, {slots.gpu: slots.count for slots in group.gpus})
        for group in cluster.node_groups
        for i in range(group.count)
    }


def test_nodes_in_use_are_the_fleet_and_others_have_their_reasons(
    declared: Callable[..., None], hetis_plan: Run, tmp_path: Path
) -> None:
    State = cluster_pb2.NodeState
    broken = report_pb2.DeviceReport(index=1, unhealthy="critical event XID 79")
    declared("a", [gpu(1), gpu(0)], devices=[broken])
    declared("b", [gpu(0, "T4", memory_bytes=16 * GIB)], draining=True)
    declared("c", [], state=State.NODE_STATE_EXPECTED)
    declared("lost", [gpu(0), gpu(1)], state=State.NODE_STATE_LOST)
    declared("silent", [gpu(0)], state=State.NODE_STATE_SUSPECT)
    declared("bare", [])
    named = gpu(0, "", product_name="NVIDIA A100-SXM4-80GB", memory_bytes=80 * GIB)
    declared(
        "spare", [named, gpu(1, "", product_name="H200 MIG 1g.18gb", mig_slice=True)], state=State.NODE_STATE_UNDECLARED
    )
    cluster, said = discovered(hetis_plan, tmp_path)
    assert cluster.name == "night"
    assert shape(cluster) == {"a": ("east", {"L4": 1}), "spare": ("default", {"A100-SXM-80GB": 1})}
    assert [line.removeprefix("left out: ") for line in said if line.startswith("left out")] == [
        "a: 1 GPU (index 1; L4): unhealthy: critical event XID 79",
        "b: 1 GPU (T4): draining",
        "c: its agent has never connected",
        "lost: 2 GPUs (L4): lost: its agent is disconnected",
        "silent: 1 GPU (L4): its agent does not respond",
        "spare: 1 device (H200 MIG 1g.18gb): parts of GPUs (MIG), not whole GPUs",
        "1 node without GPUs",
    ]
    assumed = [line for line in said if line.startswith("assumed")]
    assert "agents do not report zones, links between nodes or prices" in assumed[0]
    assert any("network: 100 Gbps and 20 us between nodes" in line for line in assumed)
    assert any("prices: list prices" in line for line in assumed)


def test_gpus_behind_one_that_is_left_out_keep_the_index_of_the_driver(
    declared: Callable[..., None], hetis_plan: Run, tmp_path: Path
) -> None:
    """In the past they moved up by one, and a launch took the GPU that was left out."""
    declared("a", [gpu(0), gpu(1)], devices=[report_pb2.DeviceReport(index=0, unhealthy="critical event XID 79")])
    slices = [gpu(index, "", product_name="MIG 1g.18gb", mig_slice=True) for index in range(3, 5)]
    declared("b", [gpu(1), gpu(2), *slices])
    cluster, _ = discovered(hetis_plan, tmp_path)
    assert {group.name: group.indices for group in cluster.node_groups} == {"a": (1,), "b": (1, 2)}


def test_memory_that_no_replica_uses_makes_a_gpu_busy(
    declared: Callable[..., None], hetis_plan: Run, tmp_path: Path
) -> None:
    used = [report_pb2.DeviceReport(index=0, memory_used_bytes=20 * GIB), report_pb2.DeviceReport(index=1)]
    declared("a", [gpu(0), gpu(1)], devices=used)
    declared("b", [gpu(0), gpu(1)], devices=used, replicas=["clusters/night/replicas/r-0"])
    cluster, said = discovered(hetis_plan, tmp_path)
    assert shape(cluster) == {"a": ("east", {"L4": 1}), "b": ("west", {"L4": 2})}
    assert "left out: a: 1 GPU (index 0; L4): 20 of 24 GiB in use, but not by a replica of the planner" in said
    assert any("nodes with replicas of the planner count as free" in line for line in said)
    cluster, said = discovered(hetis_plan, tmp_path, "--with-busy", "--name", "all")
    assert (cluster.name, cluster.num_gpus()) == ("all", 4)
    assert not any("left out" in line or "count as free" in line for line in said)


def test_links_inside_a_node_are_as_its_agent_says(
    declared: Callable[..., None], hetis_plan: Run, tmp_path: Path
) -> None:
    sxm: dict[str, Any] = {"gpu_type": "A100-SXM-80GB", "memory_bytes": 80 * GIB}
    declared("a", [gpu(0, **sxm, linked_devices=[1]), gpu(1, **sxm, linked_devices=[0])])
    declared("b", [gpu(0, **sxm), gpu(1, **sxm)])
    a40: dict[str, Any] = {"gpu_type": "A40", "memory_bytes": 48 * GIB}
    declared("c", [gpu(0, **a40, linked_devices=[1]), gpu(1, **a40, linked_devices=[0]), gpu(2, **a40)])
    cluster, said = discovered(hetis_plan, tmp_path)
    inside = {group.name: group.intra_link for group in cluster.node_groups}
    assert inside["a"] is None
    assert inside["b"] is not None
    assert inside["c"] is None
    assert any("b: its topology shows no NVLink, so that `link` is PCIe" in line for line in said)
    assert any("c: only some pairs of GPUs have NVLinks" in line for line in said)
    assert any("NVLinks join GPUs of c; agents do not say how many" in line for line in said)


def test_what_cannot_be_done_is_one_error(
    declared: Callable[..., None], planner: FakePlanner, hetis_plan: Run, tmp_path: Path
) -> None:
    discover = ("cluster", "discover", "--from")
    shown = hetis_plan(*discover, "agents", "x.json", code=ExitCode.INVALID)
    assert "--from agents reads no files: leave out x.json" in shown.err
    shown = hetis_plan(*discover, "nvml", "x.json", code=ExitCode.INVALID)
    assert "--from nvml reads no files: leave out x.json" in shown.err
    declared("c", [], state=cluster_pb2.NODE_STATE_EXPECTED)
    said = " ".join(hetis_plan(*discover, "agents", code=ExitCode.INVALID).err.split())
    assert "clusters/night: has no GPU that a plan may use: c: its agent has never connected" in said
    assert "clusters/day" in hetis_plan(*discover, "agents", "--cluster", "day", code=ExitCode.INVALID).err
    assert "127.0.0.1:1" in hetis_plan(*discover, "agents", "--server", "127.0.0.1:1", code=ExitCode.UNREACHABLE).err


def has_inventory(client: Client, name: str) -> bool:
    """Return whether a node's agent has reported its GPUs, which happens after it is ready."""
    return client.clusters.GetNode(cluster_service_pb2.GetNodeRequest(name=name)).node.HasField("inventory")


def test_agents_of_a_real_planner_are_a_cluster_file(
    tmp_path: Path, hetis_plan: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "declared.yaml").write_text(CLUSTER)
    options = ["--listen", "127.0.0.1:0", "--status-page", "off", "--ready-json"]
    with ExitStack() as running:
        planner = running.enter_context(Process(options, folder=tmp_path, module=REAL))
        server = planner.ready(timeout_s=300)["listen"][0]
        monkeypatch.setenv("HETIS_SERVER", server)
        hetis_plan("apply", str(tmp_path / "declared.yaml"))
        for node, devices in (("a", "L4:2"), ("b", "T4:1")):
            arguments = ["--server", server, "--node", f"clusters/night/nodes/{node}"]
            arguments += ["--state-dir", str(tmp_path / node), "--simulated-devices", devices]
            agent = running.enter_context(
                subprocess.Popen([*AGENT, *arguments], stderr=subprocess.DEVNULL, cwd=tmp_path)
            )
            running.callback(agent.kill)
        with Client(server) as client:
            ready = set[str]()
            for event in client.watch_cluster("clusters/night"):
                if event.node.state == cluster_pb2.NODE_STATE_READY:
                    ready.add(event.node.name)
                if len(ready) == 2:
                    break
            until_s = time.monotonic() + 300
            while not all(has_inventory(client, name) for name in ready):
                assert time.monotonic() < until_s
                time.sleep(0.05)
            client.clusters.DrainNode(cluster_service_pb2.DrainNodeRequest(name="clusters/night/nodes/b"))
        cluster, said = discovered(hetis_plan, tmp_path)
    assert shape(cluster) == {"a": ("east", {"L4": 2})}
    assert "left out: b: 1 GPU (T4): draining" in said
    assert "left out: c: its agent has never connected" in said
    assert "assumed: GPUs of a are simulated" in said
