"""On a full disk acknowledged data stay, new data are refused, and work resumes once there is room.

The planner has a small tmpfs in its own mount namespace, which no other process sees.
"""

from __future__ import annotations

import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from hetis.planner.client import CallError, Client
from hetis.v1 import cluster_pb2, cluster_service_pb2, document_pb2
from tests.faults.cluster import fleet
from tests.planner.service.process import REAL, Process

SIZE = "4m"
MOUNTED = ("sh", "-c", f'mount -t tmpfs -o size={SIZE} tmpfs "$0" && exec "$@"')
UNSHARED = ("unshare", "--map-root-user", "--mount")


def may_mount(folder: Path) -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*UNSHARED, *MOUNTED, str(folder), "true"], capture_output=True, check=False).returncode == 0


@contextmanager
def small_planner(folder: Path) -> Iterator[tuple[Client, Path, str]]:
    """Yield a client of a planner whose store is on a small disk, that disk as seen here, and its page."""
    disk = folder / "disk"
    disk.mkdir()
    if not may_mount(disk):
        pytest.skip("NOT CHECKED: no file system may be mounted here")
    options = (
        *("--listen", "127.0.0.1:0", "--status-page", "127.0.0.1:0", "--ready-json"),
        *("--store", f"sqlite:///{disk}/planner.db", "--set", "solver.processes=1"),
    )
    with Process(options, folder=folder, module=REAL, within=(*UNSHARED, *MOUNTED, str(disk))) as process:
        said = process.ready()
        with Client(said["listen"][0]) as client:
            yield client, Path(f"/proc/{process.pid}/root{disk}"), said["status_page"]


def create(client: Client, name: str) -> None:
    cluster = cluster_pb2.Cluster(document=document_pb2.Document(content=fleet(1).content))
    client.clusters.CreateCluster(
        cluster_service_pb2.CreateClusterRequest(cluster_id=name, cluster=cluster), timeout=10
    )


def fill(disk: Path) -> None:
    """Use up all free space."""
    with (disk / "full").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return


def test_a_full_disk_refuses_changes_and_loses_none(tmp_path: Path) -> None:
    with small_planner(tmp_path) as (client, disk, page):
        kept = list[str]()
        for number in range(3):
            create(client, f"before-{number}")
            kept.append(f"clusters/before-{number}")
        fill(disk)
        refused = list[CallError]()
        for number in range(3):
            try:
                create(client, f"full-{number}")
                kept.append(f"clusters/full-{number}")  # in space that SQLite's log had allocated before
            except CallError as error:
                refused.append(error)
        assert refused
        assert {(error.reason, error.code) for error in refused} == {("STORE_UNAVAILABLE", grpc.StatusCode.UNAVAILABLE)}
        assert {error.metadata["changed"] for error in refused} == {"no"}
        assert sorted(one.name for one in client.list_clusters()) == sorted(kept)
        with urllib.request.urlopen(f"{page}metrics", timeout=10) as answer:
            text = answer.read().decode()
        errors = next(line for line in text.splitlines() if line.startswith("hetis_planner_store_errors_total"))
        assert float(errors.split()[1]) >= len(refused)
        (disk / "full").unlink()
        create(client, "after")
        assert sorted(one.name for one in client.list_clusters()) == sorted([*kept, "clusters/after"])
        with urllib.request.urlopen(f"{page}readyz", timeout=10) as answer:
            assert answer.status == 200
