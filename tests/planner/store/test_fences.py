"""Only the planner whose term it is writes: locks of files, fences of servers, epochs that grow."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from hetis.planner.failures import ServiceError
from hetis.planner.store import Transaction, lease, opening, records, schema
from hetis.planner.store.copying import migrate_to
from tests.planner.store import samples
from tests.planner.store.conftest import Stores
from tests.planner.store.postgres import num_waiting
from tests.planner.store.test_lease import row_of


async def test_nothing_is_written_before_leading(url: str, stores: Stores) -> None:
    store = await stores.open(url)
    with pytest.raises(ServiceError, match="this planner is not the leader") as caught:
        await store.write(lambda tx: tx.clusters.insert(samples.cluster("clusters/a")))
    assert caught.value.reason_name == "NOT_LEADER"


async def test_epochs_grow_for_ever(url: str, stores: Stores) -> None:
    epochs = []
    for _ in range(3):
        store = await stores.open(url)
        epochs.append(await store.leadership.grant("test"))
        assert store.leadership.epoch == epochs[-1]
        await store.close()
        await store.close()
    assert epochs == [1, 2, 3]


@pytest.mark.usefixtures("epochs_of_clock")
async def test_a_store_made_after_one_was_lost_has_later_epochs(
    sqlite_url: str, tmp_path: Path, stores: Stores
) -> None:
    """Agents refuse a planner whose epoch is below one that they have followed."""
    made_s, epochs = time.time(), list[int]()
    for now_s in (made_s, made_s + 60):
        for file in tmp_path.glob("hetis.db*"):
            file.unlink()
        for _ in range(3):
            store = await stores.open(sqlite_url, clock=lambda now_s=now_s: now_s)
            epochs.append(await store.leadership.grant("test"))
            await store.close()
    assert epochs[0] > 1
    assert epochs == [epochs[0] + more for more in (0, 1, 2, 60, 61, 62)]


@pytest.mark.usefixtures("epochs_of_clock")
async def test_a_store_made_by_a_migration_has_epochs_of_the_clock_too(sqlite_url: str, stores: Stores) -> None:
    least = lease.epoch_at(time.time())
    Path(sqlite_url.removeprefix("sqlite:///")).touch()  # a file without tables
    migrate_to(sqlite_url, schema.revisions()[-1])
    store = await stores.announced(sqlite_url)
    assert store.leadership.epoch is not None
    assert store.leadership.epoch > least


async def test_a_second_planner_does_not_lead_while_the_first_one_does(url: str, stores: Stores) -> None:
    first, second = await stores.open(url), await stores.open(url)
    await first.leadership.grant("first")
    await first.leadership.promote()
    with pytest.raises(ServiceError, match=r"another planner is the leader of store .+: first") as caught:
        await second.leadership.grant("second")
    assert caught.value.reason_name == "NOT_LEADER"
    assert caught.value.metadata == {"leader": "first"}
    assert await second.read(lambda tx: tx.clusters.all()) == []
    await first.close()
    assert await second.leadership.grant("second") == 2


async def test_a_lock_that_was_removed_is_taken_again_in_the_same_term(
    sqlite_url: str, tmp_path: Path, stores: Stores
) -> None:
    first, second = await stores.announced(sqlite_url), await stores.open(sqlite_url)
    lock, epoch = tmp_path / "hetis.db.lock", first.leadership.epoch
    lock.unlink()
    async with asyncio.timeout(30):
        while not lock.exists():
            await asyncio.sleep(0.01)
    await first.read(lambda reader: None)  # after what is at work in its thread
    with pytest.raises(ServiceError, match="another planner is the leader"):
        await second.leadership.grant("second")
    await first.write(lambda tx: tx.clusters.insert(samples.cluster("clusters/a")))
    assert first.leadership.epoch == epoch


async def test_a_planner_whose_removed_lock_was_taken_by_another_one_ends_its_term(
    sqlite_url: str, tmp_path: Path, stores: Stores
) -> None:
    """In the past both led, until the first one wrote something."""
    first, second = await stores.announced(sqlite_url), await stores.open(sqlite_url)
    (tmp_path / "hetis.db.lock").unlink()
    await second.leadership.grant("second")
    await second.leadership.promote()
    async with asyncio.timeout(30):
        await first.leadership.until_ended()
    assert not first.leadership.lease.is_held
    assert first.leadership.not_leader().metadata == {"leader": "second"}
    with pytest.raises(ServiceError, match=r"another planner is the leader of store .+: second"):
        await first.leadership.grant("first")


async def test_a_planner_that_was_replaced_on_a_file_finds_out_without_writing(sqlite_url: str, stores: Stores) -> None:
    store, engine = await stores.announced(sqlite_url), sa.create_engine(sqlite_url)
    with engine.begin() as other:  # on another machine, say, which does not see the lock
        other.execute(sa.update(records.leadership).values(epoch=records.leadership.c.epoch + 1, holder="other"))
    engine.dispose()
    async with asyncio.timeout(30):
        await store.leadership.until_ended()
    assert store.leadership.not_leader().metadata == {"leader": "other"}


async def test_a_planner_that_was_replaced_can_change_nothing_whatever_its_clock_says(
    postgres_url: str, stores: Stores
) -> None:
    old = await stores.leading(postgres_url, lease_s=0.3, machine=lambda: 0.0, holder="old")
    renewal = old.leadership._renewal
    assert renewal is not None
    renewal.cancel()  # it hangs: the process is stopped, or the network is down
    await asyncio.sleep(0.4)
    new = await stores.announced(postgres_url)
    assert new.leadership.epoch == 2
    with pytest.raises(ServiceError, match="another planner is the leader: test"):
        await old.write(lambda tx: tx.clusters.insert(samples.cluster("clusters/a")))
    await asyncio.wait_for(old.leadership.until_ended(), 60)
    assert await new.read(lambda tx: tx.clusters.all()) == []
    await old.close()
    await new.write(lambda tx: tx.clusters.insert(samples.cluster("clusters/a")))  # closing removed nothing


async def test_a_lease_is_renewed_until_another_planner_leads(postgres_url: str, stores: Stores) -> None:
    store = await stores.open(postgres_url, lease_s=6.0)
    await store.leadership.grant("first")
    other, granted = await stores.open(postgres_url), row_of(postgres_url)
    async with asyncio.timeout(60):
        while row_of(postgres_url) == granted:
            await asyncio.sleep(0.05)
    with pytest.raises(ServiceError, match="another planner is the leader") as caught:
        await other.leadership.grant("other")
    assert caught.value.retry_after_s is not None
    assert 0 < caught.value.retry_after_s <= 6.0
    engine = sa.create_engine(opening.parse_url(postgres_url))
    with engine.begin() as connection:  # as if another planner had taken over
        connection.execute(sa.update(records.leadership).values(epoch=7, holder="other"))
    engine.dispose()
    await asyncio.wait_for(store.leadership.until_ended(), 60)


async def test_a_takeover_waits_for_the_write_that_is_under_way(postgres_url: str, stores: Stores) -> None:
    """The fence is a lock on the leadership row: there is no moment at which both planners can write."""
    old = await stores.leading(postgres_url, lease_s=0.2, machine=lambda: 0.0, holder="old")
    new = await stores.open(postgres_url)
    order, entered, leave = list[str](), asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def slow(tx: Transaction) -> None:
        loop.call_soon_threadsafe(entered.set)
        leave.wait(60)
        tx.clusters.insert(samples.cluster("clusters/a"))
        order.append("write")

    write = asyncio.create_task(old.write(slow))
    await entered.wait()
    assert old.leadership._renewal is not None
    old.leadership._renewal.cancel()
    await asyncio.sleep(0.3)  # the lease has ended
    takeover = asyncio.create_task(new.leadership.grant("new"))
    while not await asyncio.to_thread(num_waiting, postgres_url):
        assert not takeover.done()
    leave.set()
    await write
    assert await takeover == 2
    assert await new.read(lambda tx: [record.name for record in tx.clusters.all()]) == ["clusters/a"]
