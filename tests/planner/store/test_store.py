"""Transactions are durable, all or nothing, serialised, and only the leading planner's."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Callable

import pytest
import sqlalchemy as sa

from hetis.planner.callers import Identity, set_present_caller
from hetis.planner.failures import Reason, ServiceError
from hetis.planner.store import Reader, Store, Transaction, etag_of, opening
from hetis.planner.store.health import QUIET_S, StoreHealth
from hetis.planner.store.records import Record
from hetis.planner.store.tables import KEPT_REDISPATCHES, KEPT_S
from hetis.v1.redispatch_pb2 import REDISPATCH_STATE_PREPARING
from tests.planner.store import samples
from tests.planner.store.conftest import Stores


async def test_every_kind_of_record_comes_back_as_it_was_written(url: str, stores: Stores) -> None:
    records: dict[str, Record] = {
        "clusters": samples.cluster("clusters/a", text=b"\0\xff" * 50_000),
        "nodes": samples.node("clusters/a/nodes/n-0"),
        "profiles": samples.profile("profiles/l4"),
        "plans": samples.plan("plans/p"),
        "replicas": samples.replica("clusters/a/replicas/0"),
        "redispatches": samples.redispatch("clusters/a/redispatches/1"),
    }

    def insert(tx: Transaction) -> None:
        for table, record in records.items():
            getattr(tx, table).insert(record)
        tx.plan_documents.put("plans/p", b"{}")
        tx.plan_documents.put("plans/p", b"{ }")

    store = await stores.announced(url)
    await store.write(insert)
    await store.close()
    store = await stores.open(url)
    for table, record in records.items():
        assert await store.read(lambda tx, table=table: getattr(tx, table).all()) == [record]  # type: ignore[misc]
    assert await store.read(lambda tx: tx.plan_documents.get("plans/p")) == b"{ }"
    assert await store.read(lambda tx: tx.plan_documents.get("plans/q")) is None


async def test_records_come_by_name_in_byte_order_or_the_newest_first(url: str, stores: Stores) -> None:
    names = sorted(f"clusters/{word}" for word in ["a-b", "ab", "a", "B", "a0", "é", "z", "a-", "a--b"])

    def fill(tx: Transaction) -> None:
        for name in reversed(names):
            tx.clusters.insert(samples.cluster(name))
        for number, time_s in enumerate([3.0, 1.0, 2.0, 2.0, 2.0]):
            tx.plans.insert(samples.plan(f"plans/{number}", time_s=time_s, cluster=f"clusters/{number % 2}"))

    def pages(tx: Reader) -> list[str]:
        found, after = list[str](), None
        while page := tx.plans.page(after, 2):
            found += [record.name for record in page]
            after = Transaction.plans.place_of(page[-1])
        return found

    store = await stores.announced(url)
    await store.write(fill)
    assert [record.name for record in await store.read(lambda tx: tx.clusters.all())] == names
    behind = await store.read(lambda tx: tx.clusters.page("clusters/a0", 2))
    assert [record.name for record in behind] == names[names.index("clusters/a0") + 1 :][:2]
    newest_first = [f"plans/{number}" for number in (0, 4, 3, 2, 1)]
    assert [record.name for record in await store.read(lambda tx: tx.plans.all())] == newest_first
    assert await store.read(pages) == newest_first
    of_one = await store.read(lambda tx: tx.plans.all(cluster="clusters/1", state={1, 3}))
    assert [record.name for record in of_one] == ["plans/3", "plans/1"]
    assert await store.write(lambda tx: tx.plans.delete_all(cluster="clusters/1")) == 2


async def test_a_bounded_page_ends_before_its_bodies_are_too_large(url: str, stores: Stores) -> None:
    sizes = {"a": 10, "b": 900, "c": 10, "d": 400, "e": 5000, "f": 10}

    def fill(tx: Transaction) -> None:
        for name, size in sizes.items():
            tx.clusters.insert(samples.cluster(f"clusters/{name}", text=b"x" * size))

    def page(after: str, limit: int, most_bytes: int) -> Callable[[Reader], tuple[str, bool]]:
        def read(tx: Reader) -> tuple[str, bool]:
            place = f"clusters/{after}" if after else None
            found, is_more = tx.clusters.bounded_page(place, limit, most_bytes=most_bytes)
            return "".join(record.name[-1] for record in found), is_more

        return read

    store = await stores.announced(url)
    assert await store.read(page("", 4, 1000)) == ("", False)
    await store.write(fill)
    assert await store.read(page("", 6, 10**6)) == ("abcdef", False)
    assert await store.read(page("", 5, 10**6)) == ("abcde", True)
    assert await store.read(page("", 6, 1000)) == ("abc", True)
    assert await store.read(page("", 6, 500)) == ("a", True)
    assert await store.read(page("d", 6, 1000)) == ("e", True)  # too large, but an empty page would be the last
    assert await store.read(page("e", 6, 1)) == ("f", False)
    assert await store.read(page("f", 6, 1)) == ("", False)


async def test_the_same_request_is_answered_again_for_a_day(url: str, stores: Stores) -> None:
    now_s = 1e9
    store = await stores.leading(url, clock=lambda: now_s)
    await store.write(lambda tx: tx.requests.remember("/Create", "id", "print", b"answer"))
    now_s += KEPT_S - 1
    assert await store.write(lambda tx: tx.requests.replay("/Create", "id", "print")) == b"answer"
    for method, fingerprint in [("/Create", "other"), ("/Delete", "print")]:
        with pytest.raises(ServiceError) as caught:
            await store.write(lambda tx, m=method, f=fingerprint: tx.requests.replay(m, "id", f))  # type: ignore[misc]
        assert caught.value.reason_name == "REQUEST_ID_REUSED"
        assert caught.value.metadata == {"request_id": "id"}
    now_s += 1
    assert await store.write(lambda tx: tx.requests.replay("/Create", "id", "other")) is None
    await store.write(lambda tx: tx.requests.remember("/Create", "id", "other", b"new"))
    await store.write(lambda tx: tx.requests.remember("/Create", "", "other", b"no id"))
    assert await store.write(lambda tx: tx.requests.replay("/Create", "", "other")) is None
    assert await store.write(lambda tx: tx.requests.replay("/Create", "id", "other")) == b"new"


async def test_the_last_thousand_redispatches_of_a_cluster_are_kept(url: str, stores: Stores) -> None:
    def fill(tx: Transaction) -> None:
        tx.redispatches.insert(samples.redispatch("clusters/b/redispatches/0", time_s=0.0))
        for number in range(KEPT_REDISPATCHES + 5):
            tx.redispatches.insert(samples.redispatch(f"clusters/a/redispatches/{number}", time_s=float(number)))

    store = await stores.announced(url)
    await store.write(fill)
    kept = await store.read(lambda tx: tx.redispatches.all(cluster="clusters/a"))
    assert len(kept) == KEPT_REDISPATCHES
    assert kept[-1].create_time_s == 5.0
    assert len(await store.read(lambda tx: tx.redispatches.all(cluster="clusters/b"))) == 1


async def test_neither_the_newest_redispatch_nor_one_under_way_is_forgotten_however_old_its_time_is(
    url: str, stores: Stores
) -> None:
    names = [f"clusters/a/redispatches/{number}" for number in range(KEPT_REDISPATCHES + 3)]

    def fill(tx: Transaction) -> None:
        for number, name in enumerate(names[:KEPT_REDISPATCHES]):
            tx.redispatches.insert(samples.redispatch(name, time_s=1000.0 + number))
        behind, another, last = names[KEPT_REDISPATCHES:]  # made by a leader with a slow clock
        tx.redispatches.insert(samples.redispatch(behind, time_s=999.0, state=REDISPATCH_STATE_PREPARING))
        tx.redispatches.insert(samples.redispatch(another, time_s=998.0))
        assert tx.redispatches.get(another) is not None
        tx.redispatches.insert(samples.redispatch(last, time_s=5000.0))
        assert tx.redispatches.get(another) is None

    store = await stores.announced(url)
    await store.write(fill)
    kept = {record.name for record in await store.read(lambda tx: tx.redispatches.all())}
    assert kept == {*names} - {names[0], names[KEPT_REDISPATCHES + 1]}


async def test_writes_wait_for_one_another(url: str, stores: Stores) -> None:
    def count(tx: Transaction) -> None:
        record = tx.clusters.require("clusters/a")
        tx.clusters.update(dataclasses.replace(record, update_time_s=record.update_time_s + 1))

    store = await stores.announced(url)
    await store.write(lambda tx: tx.clusters.insert(samples.cluster("clusters/a", time_s=0.0)))
    await asyncio.gather(*(store.write(count) for _ in range(50)))
    assert (await store.read(lambda tx: tx.clusters.require("clusters/a"))).update_time_s == 50


async def test_a_store_that_only_answers_reads_is_unwritable_until_something_could_be_written(
    url: str, stores: Stores
) -> None:
    store = await stores.announced(url)
    # As on a full disk. PostgreSQL has no such setting of a connection, but one for its later transactions.
    off, on = (
        ("PRAGMA query_only = 0", "PRAGMA query_only = 1")
        if url.startswith("sqlite")
        else (
            "SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE",
            "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
        )
    )

    async def switch(statement: str) -> None:
        def work() -> None:
            with opening.at_once(opening.reading(store._connection.engine)).connect() as connection:
                connection.exec_driver_sql(statement)

        await store._connection.run(work)

    async def reach(errors: int) -> None:
        while store.health.errors < errors:
            await asyncio.sleep(0.01)

    assert store.health.unwritable_s == 0
    await switch(on)
    with pytest.raises(ServiceError) as caught:
        await store.write(lambda tx: tx.clusters.insert(samples.cluster("clusters/a")))
    assert caught.value.metadata == {"changed": "no"}
    async with asyncio.timeout(30):
        await reach(3)  # it tries again by itself
        assert await store.read(lambda tx: tx.clusters.all()) == []
        assert 0 < store.health.answered_s_ago < store.health.unwritable_s
        await switch(off)
        while store.health.unwritable_s:
            await asyncio.sleep(0.01)


def test_changes_that_fail_count_though_a_trial_fits_on_the_disk() -> None:
    """Of a disk that is almost full: in the past each trial that fitted hid that every larger change failed."""
    now_s = 100.0
    health = StoreHealth(lambda: now_s)
    for _ in range(6):
        health.write_failed()
        now_s += 1.0
        health.trial_worked()
        now_s += 1.0
    assert health.unwritable_s == 12.0
    now_s += QUIET_S - 2.5  # 2 s have passed since the last one
    health.trial_worked()
    assert health.unwritable_s > 0.0
    now_s += 0.5
    health.trial_worked()
    assert health.unwritable_s == 0.0
    health.write_failed()  # one that failed by chance
    now_s += QUIET_S
    health.trial_worked()
    assert health.unwritable_s == 0.0


async def test_rights_that_are_missing_are_trouble_of_the_store_and_no_bug(
    postgres_url: str, caplog: pytest.LogCaptureFixture, stores: Stores
) -> None:
    user = f"planner_{postgres_url.rpartition('/')[2]}"  # roles belong to the whole server
    own_url = postgres_url.replace("//hetis@", f"//{user}@")

    async def as_administrator(*statements: str) -> None:
        engine = sa.create_engine(opening.parse_url(postgres_url), poolclass=sa.NullPool)
        with engine.begin() as connection:
            for statement in statements:
                connection.execute(sa.text(statement))

    await _open_and_close(postgres_url)  # creates the tables
    rights = "SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public"
    await as_administrator(f"CREATE ROLE {user} LOGIN", f"GRANT {rights} TO {user}")
    store = await stores.announced(own_url)
    await as_administrator(f"REVOKE ALL ON profiles FROM {user}")
    with pytest.raises(ServiceError, match="permission denied for table profiles") as caught:
        await store.read(lambda tx: tx.profiles.all())
    assert caught.value.reason == Reason.ERROR_REASON_STORE_UNAVAILABLE
    assert store.health.errors == 1
    await store.close()
    await as_administrator(f"REVOKE UPDATE ON leadership FROM {user}")
    now_s = 0.0
    standby = await stores.open(own_url, machine=lambda: now_s)
    with pytest.raises(ServiceError, match="permission denied for table leadership"):
        await standby.leadership.grant("standby")
    now_s = 100.0
    standing_by = asyncio.create_task(standby.leadership.stand_by("standby"))
    while "the store does not answer a standby" not in caplog.text:
        await asyncio.sleep(0.01)
    assert standby.leadership.led_s_ago == 100.0  # this ends the standby's readiness
    await as_administrator(f"GRANT UPDATE ON leadership TO {user}")
    await asyncio.wait_for(standing_by, 60)
    await standby.leadership.promote()
    assert standby.leadership.led_s_ago == 0.0


async def _open_and_close(url: str, **settings: float) -> None:
    store = await Store.open(url, **settings)
    await store.close()


async def test_a_record_never_has_an_etag_that_another_of_its_name_had(url: str, stores: Stores) -> None:
    store = await stores.leading(url)
    seen = list[str]()

    def make_and_forget(tx: Transaction) -> None:
        seen.append(etag_of(record := tx.clusters.insert(samples.cluster("clusters/a"))))
        seen.append(etag_of(tx.clusters.update(record)))
        tx.nodes.insert(samples.node("clusters/a/nodes/n"))
        tx.clusters.delete("clusters/a")
        seen.append("n" + etag_of(tx.nodes.get("clusters/a/nodes/n")))
        assert tx.nodes.delete_all(cluster="clusters/a") == 1

    for _ in range(3):
        await store.write(make_and_forget)
    assert len(set(seen)) == len(seen) == 9


async def test_a_standbys_read_sees_one_state_while_the_leader_writes(postgres_url: str, stores: Stores) -> None:
    leader, standby = await stores.announced(postgres_url), await stores.open(postgres_url)
    await leader.write(lambda tx: tx.plans.insert(samples.plan("plans/p")))
    has_looked, is_deleted = threading.Event(), threading.Event()

    def look_twice(tx: Reader) -> list[object]:
        first = tx.plans.get("plans/p")
        has_looked.set()
        assert is_deleted.wait(10)
        return [first, tx.plans.get("plans/p")]

    reading = asyncio.create_task(standby.read(look_twice))
    assert await asyncio.to_thread(has_looked.wait, 10)
    await leader.write(lambda tx: tx.plans.delete("plans/p"))
    is_deleted.set()
    first, second = await reading
    assert first is not None
    assert second == first
    assert await standby.read(lambda tx: tx.plans.get("plans/p")) is None


async def test_a_read_does_not_wait_for_the_write_before_it_and_sees_each_that_has_returned(
    postgres_url: str, stores: Stores
) -> None:
    store, go = await stores.announced(postgres_url), threading.Event()

    def insert(tx: Transaction) -> None:
        tx.clusters.insert(samples.cluster("clusters/slow"))
        go.wait(60)

    writing = asyncio.create_task(store.write(insert))
    try:
        async with asyncio.timeout(30):
            assert await store.get(Reader.clusters, "clusters/slow") is None
            assert await store.read(lambda tx: tx.clusters.all()) == []
    finally:
        go.set()
    await writing
    for number in range(50):
        kept = await store.write(lambda tx, n=number: tx.clusters.insert(samples.cluster(f"clusters/{n}")))  # type: ignore[misc]
        assert await store.require(Reader.clusters, kept.name) == kept
        assert len(await store.read(lambda tx: tx.clusters.all())) == number + 2


async def test_a_read_of_one_record_is_one_statement_and_changes_nothing_when_it_fails(
    postgres_url: str, stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "_IDLE_S", 60.0)
    store = await stores.announced(postgres_url)
    reading, sent = store._reading, list[tuple[str, bool]]()

    def note(connection: sa.Connection, _: object, statement: str, *__: object) -> None:
        autocommit = connection.connection.dbapi_connection.autocommit  # type: ignore[union-attr]
        sent.append((statement.split()[0], autocommit))  # in which no round trip begins or ends a transaction

    await store.get(Reader.clusters, "clusters/a")
    sa.event.listen(reading.engine, "before_cursor_execute", note)
    with pytest.raises(ServiceError, match="clusters/a"):
        await store.require(Reader.clusters, "clusters/a")
    assert sent == [("SELECT", True)]
    reading.breaker.break_connection()
    with pytest.raises(ServiceError) as caught:
        await store.get(Reader.clusters, "clusters/a")
    assert caught.value.metadata == {"changed": "no"}
    assert await store.get(Reader.clusters, "clusters/a") is None


async def test_a_callers_reads_wait_for_few_of_another_one(url: str, stores: Stores) -> None:
    """A viewer that read large documents kept the store from everybody else until all were read."""
    store, go, order = await stores.open(url), threading.Event(), list[str]()

    async def read_as(name: str) -> None:
        set_present_caller(Identity(name=name, roles=frozenset()))

        def work(_: Reader) -> None:
            go.wait(30)
            order.append(name)

        await store.read(work)

    greedy = [asyncio.create_task(read_as("greedy")) for _ in range(50)]
    await asyncio.sleep(0)
    other = asyncio.create_task(read_as("other"))
    await asyncio.sleep(0.05)
    greedy[-1].cancel()
    go.set()
    done = await asyncio.gather(*greedy, other, return_exceptions=True)
    assert [number for number, one in enumerate(done) if one is not None] == [49]  # the cancelled one
    assert order.index("other") == 4
    assert order.count("greedy") == 49, "the cancelled one has not read"
    assert not store._turns._turns
