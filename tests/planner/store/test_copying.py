"""Backups are consistent, can be restored into either kind of store, and never reuse an epoch or an etag."""

from __future__ import annotations

import asyncio
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from hetis.planner.failures import ServiceError
from hetis.planner.store import Store, StoreError, Transaction, etag_of, opening, records
from hetis.planner.store.audit import AuditedChange
from hetis.planner.store.copying import back_up, migrate_to, read_store, restore, unused
from hetis.planner.store.schema import revisions
from hetis.planner.watching import Hub
from tests.planner.store import samples
from tests.planner.store.conftest import Stores

OLDEST = ("clusters", "nodes", "profiles", "plans", "plan_documents", "replicas", "redispatches", "requests")


def fill(tx: Transaction) -> None:
    """Write a row into every table."""
    tx.clusters.insert(samples.cluster("clusters/a", text=b"\0\xff" * 5000))
    tx.clusters.insert(samples.cluster("clusters/gone"))
    tx.clusters.delete("clusters/gone")
    tx.nodes.insert(samples.node("clusters/a/nodes/n-0"))
    tx.profiles.insert(samples.profile("profiles/l4"))
    tx.plans.insert(samples.plan("plans/p"))
    tx.plan_documents.put("plans/p", b"{}")
    tx.replicas.insert(samples.replica("clusters/a/replicas/0"))
    tx.redispatches.insert(samples.redispatch("clusters/a/redispatches/1"))
    tx.requests.remember("CreateCluster", "id", "print", b"answer")
    tx.audit.append(AuditedChange(caller="c", role="admin", method="CreateCluster"), time_s=1.5)


def with_store(url: str, work: Callable[[Transaction], Any] | None = None) -> tuple[int, Any]:
    """Let a planner lead, do ``work`` and end; return its epoch and the result of ``work``."""

    async def scenario() -> tuple[int, Any]:
        store = await Store.open(url)
        epoch = await store.leadership.grant("test")
        found = await store.write(work) if work is not None else None
        await store.close()
        return epoch, found

    return asyncio.run(scenario())


def rows(url: str, tables: tuple[str, ...]) -> dict[str, list[tuple[Any, ...]]]:
    engine = opening.make_engine(opening.parse_url(url), lease_s=10.0)
    with engine.connect() as connection:
        found = {
            name: sorted(tuple(row) for row in connection.execute(sa.select(records.metadata.tables[name])))
            for name in tables
        }
    engine.dispose()
    return found


def test_a_filled_store_goes_up_down_and_up(url: str) -> None:
    versions = revisions()
    with_store(url)
    migrate_to(url, versions[0])
    engine = opening.make_engine(opening.parse_url(url), lease_s=10.0)
    with engine.begin() as connection:  # as the planner of that version wrote it
        connection.execute(sa.insert(records.plan_documents).values(name="plans/old", content=b"[]"))
    engine.dispose()
    epoch, _ = with_store(url, fill)
    filled = rows(url, OLDEST)
    assert all(filled.values())
    assert len(filled["plan_documents"]) == 2
    for version in versions[-2::-1]:
        migrate_to(url, version)
        assert rows(url, OLDEST) == filled
    assert migrate_to(url, versions[-1]) == versions[0]
    assert rows(url, OLDEST) == filled
    assert with_store(url)[0] > epoch


def test_a_planner_that_starts_during_a_restoration_leads_after_it(url: str, tmp_path: Path) -> None:
    """Otherwise what it wrote in the meantime would be mixed with the backup, or lost."""
    backup = tmp_path / "backup.db"
    with_store(url, fill)
    back_up(url, backup)
    engine = opening.make_engine(opening.parse_url(url), lease_s=10.0)

    async def scenario() -> None:
        if url.startswith("sqlite"):
            with unused(url):
                store = await Store.open(url)
                with pytest.raises(ServiceError, match="another planner is the leader"):
                    await store.leadership.grant("early")
            await store.close()
            return
        with engine.begin() as delaying:
            delaying.execute(sa.text("LOCK TABLE audit IN SHARE MODE"))
            restoring = asyncio.create_task(asyncio.to_thread(restore, url, backup, replace=True))
            await asyncio.sleep(1.0)
            assert not restoring.done()
            store = await Store.open(url)
            starting = asyncio.create_task(store.leadership.grant("early"))
            await asyncio.sleep(0.5)
            assert not starting.done()
        _, epoch = await restoring
        assert await starting == epoch + 1
        assert [one.name for one in await store.read(lambda tx: tx.clusters.all())] == ["clusters/a"]
        await store.close()

    asyncio.run(scenario())
    engine.dispose()


def test_a_backup_brings_everything_back_with_an_epoch_and_etags_beyond_all_before(url: str, tmp_path: Path) -> None:
    backup, elsewhere = tmp_path / "backup.db", f"sqlite:///{tmp_path}/elsewhere.db"
    epoch, _ = with_store(url, fill)
    filled = rows(url, tuple(records.metadata.tables))
    assert back_up(url, backup) == sum(map(len, filled.values()))
    assert backup.stat().st_mode & 0o777 == 0o600
    assert [file.name for file in tmp_path.glob("*backup*")] == ["backup.db"]

    seen = set[str]()

    def go_on(tx: Transaction) -> None:
        seen.update(etag_of(record) for record in (tx.clusters.update(tx.clusters.require("clusters/a")),))
        seen.add(etag_of(tx.clusters.insert(samples.cluster("clusters/gone"))))

    later, _ = with_store(url, go_on)
    for target, replace in ((elsewhere, False), (url, True)):
        num, restored = restore(target, backup, replace=replace)
        assert num == sum(map(len, filled.values()))
        assert restored > (later if replace else epoch)

        def read(tx: Transaction) -> tuple[str, str, bytes | None, int | None]:
            again = tx.clusters.insert(samples.cluster("clusters/gone"))
            document = tx.plan_documents.get("plans/p")
            return etag_of(tx.clusters.require("clusters/a")), etag_of(again), document, tx.audit.first_wrong()

        next_epoch, (known, again, document, wrong) = with_store(target, read)
        assert next_epoch == restored + 1
        assert {known, again}.isdisjoint(seen)
        assert document == b"{}"
        assert wrong is None
        last = read_store(target, lambda reader: reader.audit.last())
        assert last is not None
        assert (last.change.method, last.change.resource, last.number) == ("restore", "backup.db", 2)


def test_a_backup_of_any_name_leaves_nothing_beside_it(sqlite_url: str, tmp_path: Path) -> None:
    with_store(sqlite_url, fill)
    back_up(sqlite_url, tmp_path / "night[1].db")
    assert [file.name for file in tmp_path.glob("*night*")] == ["night[1].db"]


@contextmanager
def files_limited(num_bytes: int) -> Iterator[None]:
    """No file of this process grows beyond ``num_bytes``, which stands for a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def migrate_without_room(connection: sa.Connection) -> None:
    connection.exec_driver_sql("PRAGMA max_page_count = 1")  # SQLite takes the present number of pages
    connection.exec_driver_sql("CREATE TABLE more AS SELECT randomblob(1000000)")


@pytest.mark.parametrize("fails", ["the copy", "its migration"])
def test_a_temporary_copy_without_room_is_not_blamed_on_the_backup(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, backup, scratch = f"sqlite:///{tmp_path}/new.db", tmp_path / "backup.db", tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    with_store(f"sqlite:///{backup}")
    migrate_to(f"sqlite:///{backup}", revisions()[0])
    monkeypatch.setattr("hetis.planner.store.schema.migrate", migrate_without_room)
    room = backup.stat().st_size - (fails == "the copy")
    with files_limited(room), pytest.raises(StoreError) as caught:
        restore(url, backup, replace=False)
    assert str(caught.value).startswith(f"a temporary copy of {backup} cannot be written to {scratch}/hetis-restore-")
    assert "let TMPDIR name a folder with more room" in str(caught.value)
    assert list(scratch.iterdir()) == []
    assert not (tmp_path / "new.db").exists()


def test_a_restoration_without_a_temporary_folder_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "backup.db").write_bytes(b"")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "gone"))
    with pytest.raises(StoreError, match=r"a temporary copy of .*backup.db cannot be written to .*gone: No such file"):
        restore(f"sqlite:///{tmp_path}/new.db", tmp_path / "backup.db", replace=False)


@pytest.mark.parametrize("start_s", [0.0, 1.8e9], ids=["the clock stands in 1970", "a clock that is right"])
def test_a_backup_that_comes_back_twice_brings_no_epoch_and_no_etag_twice(
    url: str, tmp_path: Path, start_s: float
) -> None:
    backup, seen, last_epoch = tmp_path / "backup.db", set[str](), 0

    def use(tx: Transaction) -> list[str]:
        known = tx.clusters.require("clusters/a")
        again = tx.clusters.insert(samples.cluster("clusters/gone"))
        tx.clusters.delete("clusters/gone")
        anew = tx.clusters.insert(samples.cluster("clusters/gone"))
        return [f"{record.name} {etag_of(record)}" for record in (known, tx.clusters.update(known), again, anew)]

    with_store(url, fill)
    back_up(url, backup)
    for number in range(3):
        _, restored = restore(url, backup, replace=True, clock=partial(float, start_s + number))
        epoch, etags = with_store(url, use)
        assert epoch > restored > last_epoch
        assert len(set(etags)) == 4
        assert seen.isdisjoint(etags)
        seen.update(etags)
        last_epoch = epoch
    # Fresh stores know nothing of one another: their epochs differ by the clock.
    for number in range(3, 5) if start_s else ():
        fresh = f"sqlite:///{tmp_path}/fresh{number}.db"
        restore(fresh, backup, replace=False, clock=partial(float, start_s + 10 * number))
        epoch, etags = with_store(fresh, use)
        assert epoch > last_epoch
        assert seen.isdisjoint(etags)
        seen.update(etags)
        last_epoch = epoch


def test_the_epoch_of_a_restored_store_leaves_room_for_events_of_watches_in_63_bits(tmp_path: Path) -> None:
    url, backup, in_2050_s = f"sqlite:///{tmp_path}/hetis.db", tmp_path / "backup.db", 2_524_608_000.0
    with_store(url, fill)
    back_up(url, backup)
    _, restored = restore(url, backup, replace=True, clock=partial(float, in_2050_s))
    assert Hub[str, str](restored + 2**20).publish("key", "value", now_s=in_2050_s) < 2**63


async def test_a_backup_is_of_one_moment_while_a_planner_writes(url: str, tmp_path: Path, stores: Stores) -> None:
    backup = tmp_path / "backup.db"
    store = await stores.leading(url)
    is_done = asyncio.Event()

    async def write() -> int:
        num = 0
        while not is_done.is_set():

            def both(tx: Transaction, num: int = num) -> None:
                tx.clusters.insert(samples.cluster(f"clusters/c{num}"))
                tx.profiles.insert(samples.profile(f"profiles/p{num}"))

            await store.write(both)
            num += 1
        return num

    writing = asyncio.create_task(write())
    await store.write(fill)
    await asyncio.to_thread(back_up, url, backup)
    is_done.set()
    assert await writing > 0
    await store.close()
    found = rows(f"sqlite:///{backup}", ("clusters", "profiles"))
    assert len(found["clusters"]) == len(found["profiles"]) > 0


async def test_a_store_in_use_or_filled_is_not_replaced_and_a_backup_neither(
    url: str, tmp_path: Path, stores: Stores
) -> None:
    backup = tmp_path / "backup.db"
    store = await stores.leading(url, holder="the one that leads")
    await store.write(fill)
    await asyncio.to_thread(back_up, url, backup)
    for work in (lambda: restore(url, backup, replace=True), lambda: migrate_to(url, revisions()[0])):
        with pytest.raises(StoreError, match="is in use by"):
            await asyncio.to_thread(work)
    await store.close()
    before = rows(url, tuple(records.metadata.tables))
    with pytest.raises(StoreError, match="--replace overwrites it with the backup"):
        restore(url, backup, replace=False)
    with pytest.raises(StoreError, match="already exists, and a backup never overwrites a file"):
        back_up(url, backup)
    (tmp_path / "text").write_text("no store" * 100)
    with pytest.raises(StoreError, match=r"is damaged or not a store|holds tables"):
        restore(url, tmp_path / "text", replace=True)
    with pytest.raises(StoreError, match="there is no version v9999 of the store"):
        migrate_to(url, "v9999")
    assert rows(url, tuple(records.metadata.tables)) == before


def test_a_backup_of_an_older_version_is_brought_up_on_the_way(tmp_path: Path) -> None:
    url, backup = f"sqlite:///{tmp_path}/hetis.db", tmp_path / "backup.db"
    with_store(url, fill)
    back_up(url, backup)
    migrate_to(f"sqlite:///{backup}", revisions()[0])
    content = backup.read_bytes()
    restore(f"sqlite:///{tmp_path}/other.db", backup, replace=False)
    assert backup.read_bytes() == content
    assert with_store(f"sqlite:///{tmp_path}/other.db", lambda tx: tx.plan_documents.get("plans/p"))[1] == b"{}"


async def test_the_store_of_a_killed_planner_comes_back_whole(tmp_path: Path, stores: Stores) -> None:
    """The store's last changes are only in the log beside the file."""
    killed = tmp_path / "killed" / "hetis.db"
    killed.parent.mkdir()
    store = await stores.leading(f"sqlite:///{tmp_path}/hetis.db")
    await store.write(fill)
    for found in tmp_path.glob("hetis.db*"):
        shutil.copyfile(found, killed.with_name(found.name))
    with pytest.raises(StoreError, match=r"hetis\.db is the store of a running planner; back it up: hetis-planner"):
        await asyncio.to_thread(restore, f"sqlite:///{tmp_path}/new.db", tmp_path / "hetis.db", replace=False)
    await store.close()
    before = {found.name: found.read_bytes() for found in killed.parent.iterdir()}
    restore(f"sqlite:///{tmp_path}/new.db", killed, replace=False)
    new = f"sqlite:///{tmp_path}/new.db"
    _, found = await asyncio.to_thread(with_store, new, lambda tx: tx.plan_documents.get("plans/p"))
    assert found == b"{}"
    assert {found.name: found.read_bytes() for found in killed.parent.iterdir()} == before


@pytest.mark.parametrize("name", ["odd?mode=ro.db", "odd%20#x.db"])
def test_a_backup_may_have_any_name(name: str, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/hetis.db"
    with_store(url, fill)
    back_up(url, tmp_path / name)
    assert (tmp_path / name).stat().st_mode & 0o777 == 0o600
    restore(f"sqlite:///{tmp_path}/new.db", tmp_path / name, replace=False)
    assert with_store(f"sqlite:///{tmp_path}/new.db", lambda tx: tx.plan_documents.get("plans/p"))[1] == b"{}"
    assert not list(tmp_path.glob(".*")), "nothing is left of the writing"


def test_only_a_planner_and_a_restoration_make_a_store(tmp_path: Path) -> None:
    url, backup, made = f"sqlite:///{tmp_path}/typo.db", tmp_path / "backup.db", tmp_path / "made.db"
    for work in (
        lambda: migrate_to(url, revisions()[-1]),
        lambda: migrate_to(url, revisions()[0]),
        lambda: back_up(url, backup),
        lambda: read_store(url, lambda reader: None),
    ):
        with pytest.raises(StoreError, match=r"store .*/typo.db does not exist, and was not created: check the path"):
            work()
        assert list(tmp_path.iterdir()) == []
    with_store(url, fill)
    back_up(url, backup)
    restore(f"sqlite:///{made}", backup, replace=False)
    assert made.exists()


async def test_a_store_has_one_lock_by_whatever_name(tmp_path: Path, stores: Stores) -> None:
    linked = tmp_path / "linked.db"
    await stores.leading(f"sqlite:///{tmp_path}/hetis.db")
    linked.symlink_to(tmp_path / "hetis.db")
    with pytest.raises(StoreError, match="is in use by a planner: stop it first"):
        await asyncio.to_thread(migrate_to, f"sqlite:///{linked}", revisions()[0])
