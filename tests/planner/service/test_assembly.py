"""The whole planner as a process: makes a plan, is killed and restarted, drains with watches and agents connected."""

from __future__ import annotations

import asyncio
import json
import signal
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from hetis.planner.service.exit_codes import ServiceExitCode
from hetis.planner.store import Store
from hetis.v1 import (
    agent_service_pb2,
    cluster_pb2,
    cluster_service_pb2,
    document_pb2,
    plan_pb2,
    plan_service_pb2,
)
from hetis.v1.agent_service_pb2_grpc import AgentServiceStub
from hetis.v1.cluster_service_pb2_grpc import ClusterServiceStub
from hetis.v1.plan_service_pb2_grpc import PlanServiceStub
from tests.fleets import fleet
from tests.planner.service.process import REAL, Process
from tests.planner.service.serving import reason_of
from tests.planner.store import samples

OPTIONS = ("--listen", "127.0.0.1:0", "--status-page", "127.0.0.1:0", "--ready-json", "--set", "solver.processes=1")
FLEET = fleet("small", "a: 2 L4")
NODE = "clusters/small/nodes/a"


@contextmanager
def planner(folder: Path) -> Iterator[tuple[Process, grpc.Channel, str]]:
    with Process(OPTIONS, folder=folder, module=REAL) as process:
        ready = process.ready()
        with grpc.insecure_channel(ready["listen"][0]) as channel:
            yield process, channel, ready["status_page"]


def page(address: str, path: str = "") -> Any:
    with urllib.request.urlopen(address + path, timeout=10) as answer:
        return json.loads(answer.read())


def only_cluster(address: str) -> Any:
    """Return the cluster on the page, which on a busy machine shows an older count at first."""
    end_s = time.monotonic() + 60
    while not (found := page(address)["clusters"]) and time.monotonic() < end_s:
        time.sleep(0.1)
    [cluster] = found
    return cluster


def create_cluster(channel: grpc.Channel) -> None:
    document = document_pb2.Document(content=FLEET.encode())
    request = cluster_service_pb2.CreateClusterRequest(
        cluster_id="small", cluster=cluster_pb2.Cluster(document=document)
    )
    ClusterServiceStub(channel).CreateCluster(request, timeout=20)


def test_a_planner_makes_a_plan_and_knows_it_after_kill_9(tmp_path: Path) -> None:
    with planner(tmp_path) as (process, channel, status):
        create_cluster(channel)
        cluster = only_cluster(status)
        assert (cluster["name"], cluster["active_plan"], cluster["nodes"]) == ("clusters/small", "", {"EXPECTED": 1})
        assert (cluster["activation"], cluster["replicas"]) == ("", {})
        stub = PlanServiceStub(channel)
        spec = plan_pb2.PlanSpec(model_name="Llama-3.1-8B", workload_name="humaneval_lengths")
        request = plan_service_pb2.CreatePlanRequest(
            plan_id="p", plan=plan_pb2.Plan(cluster="clusters/small", spec=spec)
        )
        made = stub.CreatePlan(request, timeout=20).plan
        assert made.state == plan_pb2.PLAN_STATE_QUEUED
        *_, last = stub.WatchPlan(plan_service_pb2.WatchPlanRequest(name="plans/p"), timeout=300)
        assert last.plan.state == plan_pb2.PLAN_STATE_READY, last.plan
        epoch = page(status)["planner"]["epoch"]
        process.signal(signal.SIGKILL)
    with planner(tmp_path) as (process, channel, status):
        assert page(status)["planner"]["epoch"] == epoch + 1
        again = PlanServiceStub(channel).GetPlan(plan_service_pb2.GetPlanRequest(name="plans/p"), timeout=20).plan
        assert again.state == plan_pb2.PLAN_STATE_READY
        assert page(status)["plans"] == {"READY": 1}
        assert page(status, "clusters/small")["cluster"]["name"] == "clusters/small"
        process.signal(signal.SIGTERM)
        assert process.end()[0] == ServiceExitCode.OK


def test_a_drain_says_goodbye_to_agents_and_ends_watches(tmp_path: Path) -> None:
    with planner(tmp_path) as (process, channel, status):
        create_cluster(channel)
        hello = agent_service_pb2.Hello(
            node=NODE,
            protocol_version=1,
            min_protocol_version=1,
            agent_version="0",
            boot_id="8f14e45f-ceea-467f-9575-4a0e3d1c2b5a",
            inventory_digest="sha256:0",
        )
        sent = iter([agent_service_pb2.ConnectNodeRequest(sequence=1, hello=hello)])
        agent = AgentServiceStub(channel).ConnectNode(_then_wait(sent))
        seen: list[str] = []
        assert next(agent).WhichOneof("message") == "welcome"
        watch = ClusterServiceStub(channel).WatchCluster(cluster_service_pb2.WatchClusterRequest(name="clusters/small"))
        next(watch)
        assert page(status)["clusters"][0]["nodes"] == {"READY": 1}
        process.signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError) as ended:
            seen.extend(message.WhichOneof("message") for message in agent)
        assert "goodbye" in seen
        assert reason_of(ended.value) == "DRAINING"
        with pytest.raises(grpc.RpcError) as ended:
            for _ in watch:
                pass
        assert reason_of(ended.value) == "DRAINING"
        code, stderr = process.end()
        assert code == ServiceExitCode.OK, stderr
        assert "Traceback" not in stderr


def test_a_second_planner_is_refused_while_the_first_serves(tmp_path: Path) -> None:
    with planner(tmp_path), Process(OPTIONS, folder=tmp_path, module=REAL) as second:
        code, stderr = second.end()
        assert code == ServiceExitCode.STORE
        assert stderr.startswith("error: another planner is the leader")


def test_a_cluster_that_another_version_stored_is_named_with_its_store_and_ends_with_9(tmp_path: Path) -> None:
    """In the past it was an invalid configuration, exit 2, in a file of whoever had applied the cluster."""
    url = f"sqlite:///{tmp_path}/x.db"
    asyncio.run(_store_cluster(url, FLEET.replace("count: 2", "count: 2, colour: red")))
    with Process((*OPTIONS, "--store", url), folder=tmp_path, module=REAL) as process:
        code, stderr = process.end()
    assert code == ServiceExitCode.STORE
    assert "Traceback" not in stderr
    assert "error: clusters/small was stored by another version of hetis" in stderr
    assert "colour: unknown field" in stderr


async def _store_cluster(url: str, text: str) -> None:
    store = await Store.open(url)
    await store.leadership.grant("another version")
    await store.write(lambda tx: tx.clusters.insert(samples.cluster("clusters/small", text=text.encode())))
    await store.close()


def _then_wait(sent: Iterator[Any]) -> Iterator[Any]:
    """Keeps the stream open."""
    import threading

    yield from sent
    threading.Event().wait(30)
