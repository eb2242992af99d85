"""Changes are done once and completely, even if no caller waits any more; on both databases."""

from __future__ import annotations

import asyncio
import gc
import sqlite3
import uuid
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from hetis.planner.convert.documents import DeclaredFleets
from hetis.planner.failures import Reason, ServiceError
from hetis.planner.fleet.hubs import Hubs
from hetis.planner.resources import committing
from hetis.planner.resources.clusters import Clusters
from hetis.planner.resources.committing import fingerprint, to_the_end
from hetis.planner.store import Store
from hetis.v1 import cluster_pb2
from hetis.v1 import cluster_service_pb2 as pb
from tests.planner.resources.served import CLUSTER, FakeFleet, document
from tests.planner.store.postgres import find_binaries, new_database, running_server


@pytest.fixture(scope="module")
def postgres_url() -> Iterator[str]:
    if find_binaries() is None:
        pytest.skip("PostgreSQL (initdb, postgres) is not installed: resources are not tested with it")
    with running_server() as server:
        yield new_database(server, "hetis")


async def test_a_change_whose_caller_gave_up_is_still_told(tmp_path: Path) -> None:
    store = await Store.open(f"sqlite:///{tmp_path}/hetis.db")
    hubs, fleet = Hubs(await store.leadership.grant("test")), FakeFleet()
    clusters = Clusters(store, hubs, fleet, DeclaredFleets())
    request = pb.CreateClusterRequest(cluster_id="a", cluster=cluster_pb2.Cluster(document=document()))
    call = asyncio.create_task(clusters.create(request))
    while not (await store.read(lambda tx: tx.clusters.all())) and not call.done():
        await asyncio.sleep(0)
    call.cancel()
    await asyncio.wait([call])
    async for events in hubs.cluster("clusters/a").watch():
        if events:
            assert [event.key for event in events] == [("cluster", "clusters/a")]
            break
    while not fleet.changed:
        await asyncio.sleep(0)
    await store.close()


CREATE = pb.CreateClusterRequest(cluster_id="a", cluster=cluster_pb2.Cluster(document=document()))


class UnreadableFleet(FakeFleet):
    """A fleet that cannot read the store when it first hears of a change."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.errors = [error]

    async def cluster_changed(self, cluster: str) -> None:
        if self.errors:
            raise self.errors.pop()
        await super().cluster_changed(cluster)


def unavailable(changed: str) -> ServiceError:
    return ServiceError(Reason.ERROR_REASON_STORE_UNAVAILABLE, "the store is away", metadata={"changed": changed})


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


async def test_what_is_committed_is_answered_as_done_and_the_fleet_learns_of_it_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the past the answer was ``changed: no``, and an activation hung until something else woke the fleet."""
    monkeypatch.setattr(committing, "_AGAIN_S", 0.01)
    store = await Store.open(f"sqlite:///{tmp_path}/hetis.db")
    fleet = UnreadableFleet(unavailable("no"))
    clusters = Clusters(store, Hubs(await store.leadership.grant("test")), fleet, DeclaredFleets())
    assert (await clusters.create(CREATE)).cluster.name == "clusters/a"
    await until(lambda: fleet.changed == ["clusters/a"])
    await store.close()


async def test_a_bug_behind_the_commit_does_not_change_the_answer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, fleet = await Store.open(f"sqlite:///{tmp_path}/hetis.db"), UnreadableFleet(ZeroDivisionError())
    clusters = Clusters(store, Hubs(await store.leadership.grant("test")), fleet, DeclaredFleets())
    assert (await clusters.create(CREATE)).cluster.name == "clusters/a"
    assert "ZeroDivisionError" in caplog.text
    await store.close()


class CutOffStore:
    """A store whose connection breaks during the commit of each change, before or after the change is stored."""

    def __init__(self, store: Store, *, is_committed: bool) -> None:
        self._store, self._is_committed = store, is_committed
        self.read, self.clock = store.read, store.clock

    async def write(self, work: Callable[[Any], Any]) -> None:
        def cut_off(tx: Any) -> None:
            work(tx)
            if not self._is_committed:
                raise unavailable("unknown")

        await self._store.write(cut_off)
        raise unavailable("unknown")


@pytest.mark.parametrize("is_committed", [True, False])
async def test_a_commit_whose_answer_was_lost_is_looked_for_in_the_store(
    is_committed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the past nobody told the fleet: not the call, whose outcome was unknown, nor a repetition of it."""
    monkeypatch.setattr(committing, "_AGAIN_S", 0.01)
    monkeypatch.setattr(committing, "_LOOK_S", 0.02)
    store, fleet = await Store.open(f"sqlite:///{tmp_path}/hetis.db"), FakeFleet()
    hubs = Hubs(await store.leadership.grant("test"))
    cut_off: Any = CutOffStore(store, is_committed=is_committed)
    clusters = Clusters(cut_off, hubs, fleet, DeclaredFleets())
    if is_committed:
        assert (await clusters.create(CREATE)).cluster.name == "clusters/a"
        assert fleet.changed == ["clusters/a"]
    else:
        with pytest.raises(ServiceError) as caught:
            await clusters.create(CREATE)
        assert caught.value.metadata == {"changed": "unknown"}
        assert fleet.changed == []
    await store.close()


async def given_up(work: Coroutine[Any, Any, None], go: asyncio.Event) -> asyncio.Task[None]:
    """Return the caller of work that waits for ``go``, which is set after the caller was cancelled."""
    caller = asyncio.create_task(to_the_end(work))
    await asyncio.sleep(0)
    caller.cancel()
    await asyncio.wait([caller])
    go.set()
    await asyncio.sleep(0.01)
    return caller


async def test_work_goes_on_when_its_caller_is_cancelled() -> None:
    done, go = list[str](), asyncio.Event()

    async def work() -> None:
        await go.wait()
        done.append("done")

    caller = await given_up(work(), go)
    assert caller.cancelled()
    assert done == ["done"]


@pytest.mark.parametrize(
    ("error", "is_logged"),
    [(ServiceError(Reason.ERROR_REASON_STORE_UNAVAILABLE, "the disk is full"), False), (ZeroDivisionError(), True)],
)
async def test_work_that_fails_after_its_caller_gave_up_is_logged_if_it_is_a_bug(
    error: Exception, is_logged: bool, caplog: pytest.LogCaptureFixture
) -> None:
    go = asyncio.Event()

    async def work() -> None:
        await go.wait()
        raise error

    await given_up(work(), go)
    gc.collect()  # asyncio itself logs an error that nobody has retrieved when its task is freed
    logged = [(found.name, found.exc_info and found.exc_info[1]) for found in caplog.records]
    assert logged == ([("hetis.planner.resources", error)] if is_logged else [])


def test_a_repeated_request_survives_a_restart_of_the_planner(postgres_url: str) -> None:
    request = pb.CreateClusterRequest(
        cluster_id="a", cluster=cluster_pb2.Cluster(document=document()), request_id=str(uuid.uuid4())
    )

    async def ask() -> pb.CreateClusterResponse:
        store = await Store.open(postgres_url)
        hubs = Hubs(await store.leadership.grant("test"))
        clusters = Clusters(store, hubs, FakeFleet(), DeclaredFleets())
        answer = await clusters.create(request)
        assert len((await clusters.list(pb.ListClustersRequest())).clusters) == 1
        await store.close()
        return answer

    assert asyncio.run(ask()) == asyncio.run(ask())


def test_requests_are_the_same_whatever_their_id() -> None:
    one = pb.DeleteClusterRequest(name="clusters/a", request_id="1")
    assert fingerprint(one) == fingerprint(pb.DeleteClusterRequest(name="clusters/a", request_id="2"))
    assert fingerprint(one) != fingerprint(pb.DeleteClusterRequest(name="clusters/a", etag="v1"))
    assert one.request_id == "1"


async def test_a_request_id_is_the_same_in_upper_case(tmp_path: Path) -> None:
    request = pb.CreateClusterRequest(
        cluster_id="a", cluster=cluster_pb2.Cluster(document=document()), request_id=str(uuid.uuid4())
    )
    again = pb.CreateClusterRequest()
    again.CopyFrom(request)
    again.request_id = request.request_id.upper()
    store = await Store.open(f"sqlite:///{tmp_path}/hetis.db")
    clusters = Clusters(store, Hubs(await store.leadership.grant("test")), FakeFleet(), DeclaredFleets())
    assert await clusters.create(request) == await clusters.create(again)
    await store.close()


async def test_an_answer_is_kept_without_its_document_and_given_with_it(tmp_path: Path) -> None:
    """Otherwise callers could fill the disk: 3 MiB for each change of a cluster's policy."""
    text = CLUSTER.replace("count: 3", "count: 1").replace("nodes:\n", "nodes:\n" + "".join(_NODES))
    create = pb.CreateClusterRequest(
        cluster_id="a", cluster=cluster_pb2.Cluster(document=document(text)), request_id=str(uuid.uuid4())
    )
    policy = cluster_pb2.ClusterPolicy(high_water=0.8)
    update = pb.UpdateClusterRequest(
        cluster=cluster_pb2.Cluster(name="clusters/a", policy=policy), request_id=str(uuid.uuid4())
    )
    other = pb.UpdateClusterRequest(cluster=cluster_pb2.Cluster(name="clusters/a", document=document()))
    store = await Store.open(f"sqlite:///{tmp_path}/hetis.db")
    clusters = Clusters(store, Hubs(await store.leadership.grant("test")), FakeFleet(), DeclaredFleets())
    created, updated = await clusters.create(create), await clusters.update(update)
    assert len(updated.cluster.document.content) > 10_000
    with sqlite3.connect(tmp_path / "hetis.db") as shell:
        assert [size for (size,) in shell.execute("SELECT length(response) FROM requests") if size > 1000] == []
    assert await clusters.create(create) == created
    assert await clusters.update(update) == updated
    await clusters.update(other)
    again = (await clusters.update(update)).cluster.document
    assert (again.digest, again.content) == (updated.cluster.document.digest, b"")  # not stored any more
    await store.close()


_NODES = [f"  - {{name: n{number}, gpus: [{{type: L4, count: 2}}]}}\n" for number in range(300)]
