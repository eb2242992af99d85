"""kill -9 of a planner that writes, and unusable files: no acknowledged write is lost or incomplete."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import sqlalchemy as sa

from hetis.planner.failures import ServiceError
from hetis.planner.store import Store, StoreError, Transaction
from tests.planner.store import samples
from tests.planner.store.conftest import Stores

ROOT = Path(__file__).parents[3]


def test_after_kill_9_every_acknowledged_write_is_there_and_none_is_half_there(url: str) -> None:
    last = -1
    for num_writes in (1, 7, 40):
        last = _write_until_killed(url, num_writes)
        numbers, documents = asyncio.run(_stored(url))
        assert numbers == list(range(len(numbers)))
        assert documents == len(numbers)
        assert len(numbers) in (last + 1, last + 2)  # the last write may have been committed and not yet acknowledged


def _write_until_killed(url: str, num_writes: int) -> int:
    command = [sys.executable, "-m", "tests.planner.store.writer", url]
    # A planner on PostgreSQL that was killed holds its lease until it ends; the test does not wait for that.
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        for _ in range(num_writes):
            last = int(writer.stdout.readline())
        writer.send_signal(signal.SIGKILL)
        rest = writer.stdout.read().split()
    if url.startswith("postgresql"):
        _end_lease(url)
    return int(rest[-1]) if rest else last


def _end_lease(url: str) -> None:
    engine = sa.create_engine(url.replace("postgresql", "postgresql+psycopg"))
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE leadership SET lease_end_s = 0"))
    engine.dispose()


async def _stored(url: str) -> tuple[list[int], int]:
    store = await Store.open(url)
    await store.leadership.grant("reader")
    records = await store.read(lambda tx: tx.clusters.all())
    documents = await store.read(lambda tx: [tx.plan_documents.get(record.name) for record in records])
    await store.close()
    return [int(record.name.rpartition("/")[2]) for record in records], sum(each is not None for each in documents)


async def test_the_lock_of_a_killed_planner_is_free(sqlite_url: str, stores: Stores) -> None:
    epochs = []
    for _ in range(2):
        store = await stores.open(sqlite_url)
        epochs.append(await store.leadership.grant("before or after"))
        await store.close()
        _write_until_killed(sqlite_url, 1)
    assert epochs[1] == epochs[0] + 2


async def test_a_full_disk_is_one_clear_error_and_nothing_is_lost(
    tmp_path: Path, sqlite_url: str, stores: Stores
) -> None:
    store = await stores.leading(sqlite_url)
    await store.write(lambda tx: tx.clusters.insert(samples.cluster("clusters/a")))

    def limit(connection: object) -> None:
        with store._connection.engine.connect() as here:  # SQLite's error on a full disk
            here.exec_driver_sql("PRAGMA max_page_count = 60")

    await store._connection.run(limit, None)

    def too_much(tx: Transaction) -> None:
        tx.clusters.insert(samples.cluster("clusters/b"))
        tx.plan_documents.put("plans/p", os.urandom(1_000_000))

    with pytest.raises(ServiceError, match=r"disk is full.*nothing was changed") as caught:
        await store.write(too_much)
    assert caught.value.reason_name == "STORE_UNAVAILABLE"
    assert caught.value.metadata == {"changed": "no"}
    await store.write(lambda tx: tx.clusters.insert(samples.cluster("clusters/c")))  # it continues with what fits
    names = [record.name for record in await store.read(lambda tx: tx.clusters.all())]
    assert names == ["clusters/a", "clusters/c"]


@pytest.mark.parametrize("offset", [0, 4096])
def test_a_damaged_file_is_one_clear_error_and_left_alone(tmp_path: Path, sqlite_url: str, offset: int) -> None:
    path = tmp_path / "hetis.db"
    asyncio.run(_open_and_close(sqlite_url))
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xde\xad" * 1000)
    before = path.read_bytes()
    with pytest.raises(StoreError, match=f"store {path} is damaged or not a store"):
        asyncio.run(_open_and_close(sqlite_url))
    assert path.read_bytes() == before


def test_a_file_with_a_damaged_schema_says_what_to_do(tmp_path: Path, sqlite_url: str) -> None:
    asyncio.run(_open_and_close(sqlite_url))
    with contextlib.closing(sqlite3.connect(tmp_path / "hetis.db", isolation_level=None)) as connection:
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute("UPDATE sqlite_schema SET sql = 'no table' WHERE name = 'audit'")
    with pytest.raises(StoreError, match=r"is damaged or not a store \(malformed .*restore a backup"):
        asyncio.run(_open_and_close(sqlite_url))


def test_a_file_with_a_damaged_schema_that_is_no_text_says_what_to_do(tmp_path: Path, sqlite_url: str) -> None:
    """SQLite's message quotes the schema, and Python cannot decode such a message."""
    asyncio.run(_open_and_close(sqlite_url))
    path = tmp_path / "hetis.db"
    path.write_bytes(path.read_bytes().replace(b"CREATE TABLE audit", b"CREATE \xff\xfe\xff\xfe\xff audit"))
    with pytest.raises(StoreError, match=r"is damaged or not a store \(malformed .*restore a backup"):
        asyncio.run(_open_and_close(sqlite_url))


@pytest.mark.parametrize("is_replaced", [False, True])
async def test_a_file_that_is_removed_or_replaced_under_a_planner_takes_no_writes(
    tmp_path: Path, sqlite_url: str, is_replaced: bool, stores: Stores
) -> None:
    """In the past writes to a removed file were acknowledged, and gone when the planner ended."""
    file, aside = tmp_path / "hetis.db", tmp_path / "aside.db"
    store = await stores.leading(sqlite_url, holder="planner")
    await store.write(lambda tx: tx.clusters.insert(samples.cluster("clusters/a")))
    file.rename(aside)
    if is_replaced:
        file.write_bytes(aside.read_bytes())
    for work in (store.write, store.read):
        with pytest.raises(ServiceError, match="was removed or replaced while the planner used it") as caught:
            await work(lambda tx: tx.clusters.all())
        assert caught.value.reason_name == "STORE_UNAVAILABLE"
        assert caught.value.metadata["changed"] == "no"
    aside.replace(file)
    await store.write(lambda tx: tx.clusters.insert(samples.cluster("clusters/b")))
    await store.close()
    again = await stores.open(sqlite_url)
    assert [one.name for one in await again.read(lambda tx: tx.clusters.all())] == ["clusters/a", "clusters/b"]


def test_a_text_file_is_no_store(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("nothing of a store\n" * 100)
    with pytest.raises(StoreError, match="is damaged or not a store"):
        asyncio.run(_open_and_close(f"sqlite:///{path}"))
    assert path.read_text().startswith("nothing of a store")


def test_a_folder_that_is_missing_or_read_only_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="the folder does not exist"):
        asyncio.run(_open_and_close(f"sqlite:///{tmp_path}/none/hetis.db"))
    with pytest.raises(StoreError, match="must be writable"):
        asyncio.run(_open_and_close("sqlite:////proc/self/hetis.db"))  # read-only for root, too


def test_files_of_another_account_are_one_clear_error() -> None:
    """As root, which may write everywhere, the test uses another account."""
    folder = Path(tempfile.mkdtemp(prefix="hetis-read-only-"))
    asyncio.run(_open_and_close(f"sqlite:///{folder}/hetis.db"))
    before = (folder / "hetis.db").read_bytes()
    for path in folder.iterdir():
        path.chmod(0o444)
    folder.chmod(0o555)
    is_root = os.geteuid() == 0
    try:
        if is_root:
            os.seteuid(65534)
        with pytest.raises(StoreError, match=f"store {folder}/hetis.db cannot be"):
            asyncio.run(_open_and_lead(f"sqlite:///{folder}/hetis.db"))
        if is_root:
            os.seteuid(0)
        assert (folder / "hetis.db").read_bytes() == before
    finally:
        if is_root:
            os.seteuid(0)
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_urls_of_other_databases_are_refused_without_their_password() -> None:
    with pytest.raises(StoreError, match="mysql is not supported") as caught:
        asyncio.run(_open_and_close("mysql://user:secret@host/db"))
    assert "secret" not in str(caught.value)
    with pytest.raises(StoreError, match="cannot be read"):
        asyncio.run(_open_and_close("secret"))


async def test_a_backup_of_a_running_store_is_whole(tmp_path: Path, sqlite_url: str, stores: Stores) -> None:
    """The procedure of docs/operations.md."""
    copy = tmp_path / "backup.db"
    store = await stores.leading(sqlite_url)
    await store.write(lambda tx: tx.clusters.insert(samples.cluster("clusters/a")))
    source, target = sqlite3.connect(tmp_path / "hetis.db"), sqlite3.connect(copy)
    source.backup(target)
    source.close()
    target.close()
    await store.write(lambda tx: tx.clusters.insert(samples.cluster("clusters/b")))
    await store.close()
    restored = await stores.open(f"sqlite:///{copy}")
    assert [record.name for record in await restored.read(lambda tx: tx.clusters.all())] == ["clusters/a"]


@pytest.mark.parametrize("changed", ["no", "unknown"])
async def test_a_server_that_restarts_costs_calls_in_between_and_nothing_else(
    postgres_url: str, stores: Stores, changed: str
) -> None:
    """Whether a change was made is known unless it was already being committed."""
    store = await stores.leading(postgres_url)
    await store.write(lambda tx: tx.clusters.insert(samples.cluster("clusters/a")))

    def cut_off(tx: Transaction) -> None:
        tx.clusters.insert(samples.cluster("clusters/b"))
        engine = sa.create_engine(postgres_url.replace("postgresql", "postgresql+psycopg"))
        with engine.begin() as other:  # as when the server goes away: every other connection ends
            other.execute(
                sa.text(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
            )
        engine.dispose()
        if changed == "no":
            tx.clusters.insert(samples.cluster("clusters/d"))

    with pytest.raises(ServiceError) as caught:
        await store.write(cut_off)
    assert caught.value.reason_name == "STORE_UNAVAILABLE"
    assert caught.value.metadata["changed"] == changed
    await store.write(lambda tx: tx.clusters.insert(samples.cluster("clusters/c")))
    names = [record.name for record in await store.read(lambda tx: tx.clusters.all())]
    assert names == ["clusters/a", "clusters/c"]


async def _open_and_close(url: str) -> None:
    store = await Store.open(url)
    await store.close()


async def _open_and_lead(url: str) -> None:
    store = await Store.open(url)
    try:
        await store.leadership.grant("test")
    finally:
        await store.close()
