"""A pulled network cable: packets are lost without notice, while a frozen proxy still acknowledges them.

The leader has its own network, connected by a cable (a pair of virtual interfaces) to a second one, from which relays
lead to PostgreSQL. Callers reach it over a Unix socket, which uses no network.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import sqlalchemy as sa

from hetis.v1 import cluster_pb2, cluster_service_pb2, document_pb2
from hetis.v1.cluster_service_pb2_grpc import ClusterServiceStub
from tests.faults.cluster import fleet
from tests.faults.planners import ROOT
from tests.planner.service.process import REAL, Process
from tests.planner.service.serving import details_of

LEASE_S = 4.0
UNSHARED = ("unshare", "--map-root-user", "--net")


@contextmanager
def running(command: Sequence[str], ready: str) -> Iterator[subprocess.Popen[str]]:
    """Yield a process that has reported that it is ready."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            if process.stdout.readline().strip() != ready:
                pytest.skip("NOT CHECKED: no network of one's own is allowed here")
            yield process
        finally:
            process.kill()


@dataclass(frozen=True, kw_only=True)
class Cable:
    """The connection of two networks; ``near`` is the command that runs another in the first."""

    near: tuple[str, ...]

    def set(self, state: str) -> None:
        subprocess.run([*self.near, "ip", "link", "set", "near", state], check=True)


@contextmanager
def two_networks(store: str, folder: Path) -> Iterator[tuple[Cable, str]]:
    """Yield a cable, and the store's URL at its near end."""
    if not all(map(shutil.which, ("unshare", "nsenter", "ip"))):
        pytest.skip("NOT CHECKED: unshare, nsenter or ip is not installed")
    url = sa.make_url(store)
    hold = ("sh", "-c", "ip link set lo up && echo ready && exec sleep 600")
    with ExitStack() as stack:
        first = stack.enter_context(running([*UNSHARED, *hold], "ready"))
        near = ("nsenter", "--target", str(first.pid), "--user", "--net", "--preserve-credentials")
        second = stack.enter_context(running([*near, "unshare", "--net", *hold], "ready"))
        far = ("nsenter", "--target", str(second.pid), "--user", "--net", "--preserve-credentials")
        for command in (
            (*near, "ip", "link", "add", "near", "type", "veth", "peer", "name", "far", "netns", str(second.pid)),
            (*near, "ip", "addr", "add", "10.77.0.1/24", "dev", "near"),
            (*far, "ip", "addr", "add", "10.77.0.2/24", "dev", "far"),
            (*near, "ip", "link", "set", "near", "up"),
            (*far, "ip", "link", "set", "far", "up"),
        ):
            subprocess.run(command, check=True)
        between = f"unix:{folder}/store.sock"
        module = (sys.executable, "-m", "tests.faults.relay")
        stack.enter_context(running([*module, between, f"{url.host}:{url.port}"], "ready"))
        stack.enter_context(running([*far, *module, "10.77.0.2:5432", between], "ready"))
        there = url.set(host="10.77.0.2", port=5432).render_as_string(hide_password=False)
        yield Cable(near=near), there


def planner(store: str, folder: Path, listen: str, within: Sequence[str] = ()) -> Process:
    options = (
        *("--listen", listen, "--status-page", "off", "--ready-json", "--store", store),
        *("--set", "solver.processes=1", "--set", f"leadership.lease={LEASE_S:g}s"),
    )
    return Process(options, folder=folder, module=REAL, within=within)


def create(stub: ClusterServiceStub, name: str) -> None:
    cluster = cluster_pb2.Cluster(document=document_pb2.Document(content=fleet(1).content))
    stub.CreateCluster(cluster_service_pb2.CreateClusterRequest(cluster_id=name, cluster=cluster), timeout=10)


def outcome(stub: ClusterServiceStub, name: str) -> str:
    """Return ``OK``, or the reason of the error."""
    try:
        create(stub, name)
    except grpc.RpcError as error:
        found = details_of(error).get("ErrorInfo")  # type: ignore[arg-type]
        return found.reason if found is not None else "?"
    return "OK"


def names(stub: ClusterServiceStub) -> set[str]:
    found = stub.ListClusters(cluster_service_pb2.ListClustersRequest(), timeout=10).clusters
    return {one.name.removeprefix("clusters/") for one in found}


def test_a_leader_whose_cable_is_pulled_stops_and_another_one_leads(postgres_url: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        cable, there = stack.enter_context(two_networks(postgres_url, tmp_path))
        socket = f"unix:{tmp_path}/planner.sock"
        first = stack.enter_context(planner(there, tmp_path, socket, within=cable.near))
        first.ready()
        old = ClusterServiceStub(stack.enter_context(grpc.insecure_channel(socket)))
        end_s = time.monotonic() + 60
        while (found := outcome(old, "before")) != "OK":  # the old leader may lose its first lease on a busy machine
            assert time.monotonic() < end_s, found
        second = stack.enter_context(planner(postgres_url, tmp_path, "127.0.0.1:0"))
        new = ClusterServiceStub(stack.enter_context(grpc.insecure_channel(second.ready()["listen"][0])))
        assert outcome(new, "too-early") == "NOT_LEADER"

        cable.set("down")
        end_s = time.monotonic() + 60
        number, kept = 0, {"before"}
        while (found := outcome(new, "after")) != "OK":
            assert time.monotonic() < end_s, found
            number += 1
            if outcome(old, f"during-{number}") == "OK":
                kept.add(f"during-{number}")  # acknowledged within the lease
        kept.add("after")
        late = [outcome(old, f"late-{n}") for n in range(3)]
        assert set(late) == {"NOT_LEADER"}
        assert names(new) == kept

        cable.set("up")
        while True:
            try:
                assert names(old) == kept  # now a standby, which serves reads again
                break
            except grpc.RpcError:
                assert time.monotonic() < end_s + 60
        assert outcome(old, "still-not") == "NOT_LEADER"
