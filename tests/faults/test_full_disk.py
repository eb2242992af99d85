"""On a full disk acknowledged data stay, new data are refused, and work resumes once there is room.

The planner has a small tmpfs in its own mount namespace, which no other process sees; PostgreSQL has one for the
database's tablespace, but not for its write-ahead log, without which it ends.
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
from tests.planner.store.postgres import database_on_small_disk, fill

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


def refusal(client: Client, kept: list[str]) -> CallError:
    """Return the error of the first cluster that cannot be created; the others find room that tables have left."""
    for number in range(500):
        try:
            create(client, f"full-{number}")
        except CallError as error:
            return error
        kept.append(f"clusters/full-{number}")
    raise AssertionError("500 clusters found room on a full disk")


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
        assert all("its disk is full: make room there" in str(error) for error in refused)
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


def test_a_leader_whose_postgresql_has_no_room_goes_on_leading_and_writes_again_when_there_is_some(
    postgres_server: str, tmp_path: Path
) -> None:
    with database_on_small_disk(postgres_server) as (url, disk):
        if disk is None:
            pytest.skip("NOT CHECKED: no file system may be mounted here")
        options = ("--listen", "127.0.0.1:0", "--status-page", "127.0.0.1:0", "--ready-json", "--store", url)
        with Process((*options, "--set", "solver.processes=1"), folder=tmp_path, module=REAL) as process:
            said = process.ready()
            with Client(said["listen"][0]) as client:
                create(client, "before")
                kept = ["clusters/before"]
                fill(disk)
                error = refusal(client, kept)
                assert (error.reason, error.metadata["changed"]) == ("STORE_UNAVAILABLE", "no")
                assert str(error).endswith(
                    "nothing was changed; its disk is full: make room there, then repeat the call"
                )
                assert sorted(one.name for one in client.list_clusters()) == sorted(kept)
                with urllib.request.urlopen(f"{said['status_page']}leaderz", timeout=10) as answer:
                    assert answer.status == 200
                (disk / "full").unlink()
                create(client, "after")
                assert sorted(one.name for one in client.list_clusters()) == sorted([*kept, "clusters/after"])
