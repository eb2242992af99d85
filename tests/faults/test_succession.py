"""Of two planners on one store, one leads; the other serves reads, names the leader, and takes over."""

from __future__ import annotations

import json
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
import sqlalchemy as sa
import yaml

from hetis.commands.endpoints import STANDBY_ANSWER
from hetis.planner.callers import CallerRole
from hetis.planner.service.identity.credentials import create_token
from hetis.v1 import cluster_pb2, cluster_service_pb2, document_pb2
from hetis.v1.agent_service_pb2 import ConnectNodeRequest, Hello
from hetis.v1.agent_service_pb2_grpc import AgentServiceStub
from hetis.v1.cluster_service_pb2_grpc import ClusterServiceStub
from tests.faults.proxy import Proxy
from tests.fleets import fleet
from tests.planner.service.process import REAL, Process
from tests.planner.service.serving import details_of

LEASE_S = 2.0
LIMIT_S = 30.0  # three times the promise, as in test_planners.py, because machines are busy
OPTIONS = (
    *("--listen", "127.0.0.1:0", "--status-page", "127.0.0.1:0", "--ready-json"),
    *("--set", "solver.processes=1", "--set", f"leadership.lease={LEASE_S:g}s"),
)
FLEET = fleet("small", "a: 2 L4")


class Planner(Process):
    """A planner process with its addresses."""

    def __init__(self, store: str, folder: Path, *options: str) -> None:
        super().__init__((*OPTIONS, "--store", store, *options), folder=folder, module=REAL)

    def __enter__(self) -> Planner:
        said = self.ready()
        self.address: str = said["listen"][0]
        self.page: str = said["status_page"]
        self.channel = grpc.insecure_channel(self.address, [("grpc.use_local_subchannel_pool", 1)])
        return self

    def __exit__(self, *error: object) -> None:
        self.channel.close()
        super().__exit__(*error)

    def create(self, name: str, timeout_s: float = 10) -> cluster_pb2.Cluster:
        document = document_pb2.Document(content=FLEET.encode())
        request = cluster_service_pb2.CreateClusterRequest(
            cluster_id=name, cluster=cluster_pb2.Cluster(document=document)
        )
        return ClusterServiceStub(self.channel).CreateCluster(request, timeout=timeout_s).cluster

    def clusters(self) -> list[str]:
        request = cluster_service_pb2.ListClustersRequest()
        return [one.name for one in ClusterServiceStub(self.channel).ListClusters(request, timeout=10).clusters]

    def says_as_standby(self) -> str | None:
        """Return the leader's address behind a standby's answer, None if the leader answers."""
        request = cluster_service_pb2.ListClustersRequest()
        _, call = ClusterServiceStub(self.channel).ListClusters.with_call(request, timeout=10)
        return next((value for key, value in call.trailing_metadata() if key == STANDBY_ANSWER), None)

    def shown(self) -> Any:
        with urllib.request.urlopen(self.page, timeout=10) as answer:
            return json.loads(answer.read())

    def status(self, path: str) -> int:
        try:
            with urllib.request.urlopen(self.page + path, timeout=10) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    def leads(self) -> bool:
        return bool(self.shown()["planner"]["role"] == "leader")


def until(happens: Callable[[], bool]) -> None:
    end_s = time.monotonic() + LIMIT_S
    while not happens():
        assert time.monotonic() < end_s
        time.sleep(0.05)


def test_a_standby_serves_reads_names_the_leader_and_takes_over_after_kill_9(url: str, tmp_path: Path) -> None:
    with Planner(url, tmp_path, "--standby") as first, Planner(url, tmp_path, "--standby") as second:
        first.create("a")
        assert second.clusters() == ["clusters/a"]
        assert second.says_as_standby() == first.address
        assert first.says_as_standby() is None
        assert second.status("readyz") == 200
        assert second.shown()["planner"]["role"] == "standby"
        with pytest.raises(grpc.RpcError) as caught:
            second.create("b")
        info = details_of(caught.value)["ErrorInfo"]
        assert (info.reason, info.metadata["leader_address"]) == ("NOT_LEADER", first.address)
        stream = AgentServiceStub(second.channel).ConnectNode(
            iter([ConnectNodeRequest(hello=Hello(node="clusters/a/nodes/a"))])
        )
        with pytest.raises(grpc.RpcError) as caught:
            next(stream)
        assert details_of(caught.value)["ErrorInfo"].metadata["leader_address"] == first.address
        first.signal(signal.SIGKILL)
        until(second.leads)  # 2 s on an idle machine
        second.create("b")
        assert second.says_as_standby() is None
        assert second.clusters() == ["clusters/a", "clusters/b"]
        assert second.shown()["planner"]["epoch"] >= 2


def test_a_token_that_is_taken_back_is_of_no_use_to_leader_and_standby_alike(sqlite_url: str, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.yaml"
    until_s = datetime.now(UTC) + timedelta(days=1)
    made = {
        name: create_token(str(tokens), name=name, role=CallerRole.ADMIN, scope=None, expires=until_s)
        for name in ("gone", "kept")
    }
    options = ("--standby", "--set", f"tokens={tokens}", "--set", "reload=100ms")
    with Planner(sqlite_url, tmp_path, *options) as first, Planner(sqlite_url, tmp_path, *options) as second:
        gone, kept = ([("authorization", f"Bearer {made[name]}")] for name in ("gone", "kept"))
        request = cluster_service_pb2.CreateClusterRequest(
            cluster_id="a", cluster=cluster_pb2.Cluster(document=document_pb2.Document(content=FLEET.encode()))
        )
        ClusterServiceStub(first.channel).CreateCluster(request, timeout=10, metadata=gone)
        watch = ClusterServiceStub(first.channel).WatchCluster(
            cluster_service_pb2.WatchClusterRequest(name="clusters/a"), metadata=gone
        )
        next(watch)
        reads = ClusterServiceStub(second.channel)
        listing = cluster_service_pb2.ListClustersRequest()
        assert len(reads.ListClusters(listing, timeout=10, metadata=gone).clusters) == 1

        document = yaml.safe_load(tokens.read_text())
        document["tokens"] = [one for one in document["tokens"] if one["name"] == "kept"]
        replacement = tmp_path / "newer.yaml"
        replacement.write_text(yaml.safe_dump(document))
        replacement.chmod(0o600)
        replacement.replace(tokens)

        with pytest.raises(grpc.RpcError) as caught:
            list(watch)
        assert details_of(caught.value)["ErrorInfo"].reason == "CREDENTIALS"

        def is_refused() -> bool:
            try:
                reads.ListClusters(listing, timeout=10, metadata=gone)
            except grpc.RpcError as error:
                return bool(details_of(error)["ErrorInfo"].reason == "CREDENTIALS")  # type: ignore[arg-type]
            return False

        until(is_refused)
        assert len(reads.ListClusters(listing, timeout=10, metadata=kept).clusters) == 1


def test_a_leader_cut_off_from_its_store_stands_down_and_comes_back_as_a_standby(
    postgres_url: str, tmp_path: Path
) -> None:
    found = sa.make_url(postgres_url)
    assert found.host is not None
    assert found.port is not None
    with Proxy((found.host, found.port)) as proxy:
        host, port = proxy.address
        behind = found.set(host=host, port=port).render_as_string(hide_password=False)
        with Planner(behind, tmp_path) as first, Planner(postgres_url, tmp_path) as second:
            first.create("a")
            proxy.freeze()
            until(second.leads)
            assert not first.leads()  # not by the page, which needs no store
            assert first.status("metrics") == 200
            assert first.status("clusters/a") == 503
            with pytest.raises(grpc.RpcError) as caught:
                first.create("b")
            assert details_of(caught.value)["ErrorInfo"].reason == "NOT_LEADER"
            until(lambda: first.status("readyz") == 503)
            second.create("c")
            proxy.thaw()
            until(lambda: first.status("readyz") == 200)
            assert first.clusters() == ["clusters/a", "clusters/c"]
            assert first.shown()["planner"]["role"] == "standby"
            second.signal(signal.SIGTERM)
            second.end()
            until(first.leads)
            assert first.shown()["planner"]["epoch"] >= 3


def test_a_file_is_led_at_once_by_whoever_is_started_after_a_kill(sqlite_url: str, tmp_path: Path) -> None:
    """The solver processes outlive the planner for a moment, but do not hold its lock."""
    with Planner(sqlite_url, tmp_path) as first:
        first.create("a")
        first.signal(signal.SIGKILL)
        with Planner(sqlite_url, tmp_path) as second:
            assert second.leads()
            assert second.shown()["planner"]["epoch"] >= 2
