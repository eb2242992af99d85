"""The lease is a promise about the leader's own clock: it ends by that clock, whatever server and threads do."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time

import psycopg
import pytest
import sqlalchemy as sa

from hetis.planner.failures import ServiceError
from hetis.planner.store import Store, Transaction
from hetis.planner.store.leadership import Leadership, LeadershipState
from hetis.planner.store.lease import Lease
from tests.faults.proxy import Proxy
from tests.planner.store import samples
from tests.planner.store.conftest import Stores

LEASE_S = 1.5


def through(proxy: Proxy, url: str) -> str:
    host, port = proxy.address
    return sa.make_url(url).set(host=host, port=port).render_as_string(hide_password=False)


def test_a_lease_counts_from_before_it_was_asked_for_and_decides_for_two_thirds_of_it() -> None:
    now_s = 100.0
    lease = Lease(6.0, lambda: now_s)
    assert not lease.is_held
    assert not lease.may_decide
    lease.grant(98.0)
    assert (lease.age_s, lease.left_s) == (2.0, 4.0)
    assert lease.may_decide
    now_s = 101.9
    assert lease.may_decide
    now_s = 102.1
    assert not lease.may_decide
    assert lease.is_held
    now_s = 104.0
    assert not lease.is_held
    lease.grant(104.0)
    assert lease.may_decide
    lease.end()
    assert not lease.is_held


def test_a_file_holds_its_lease_for_ever() -> None:
    lease = Lease(0.0, lambda: 1e9)
    lease.grant(0.0)
    assert lease.may_decide
    assert lease.is_held


async def test_a_leader_behind_a_frozen_network_ends_its_term_by_its_own_clock(
    postgres_url: str, proxy: Proxy, stores: Stores
) -> None:
    """A defect in the past: the first planner went on for 93 s while the second one led."""
    old = await stores.open(through(proxy, postgres_url), lease_s=LEASE_S)
    await old.leadership.grant("old", ("10.0.0.1:8470",))
    new = await stores.open(postgres_url, lease_s=LEASE_S)
    standing_by = asyncio.create_task(new.leadership.stand_by("new"))
    proxy.freeze()
    began_s = time.monotonic()
    write = asyncio.create_task(old.write(lambda tx: tx.clusters.insert(samples.cluster("clusters/a"))))
    await old.leadership.until_ended()
    assert not standing_by.done()  # the leader stops first
    assert time.monotonic() - began_s < LEASE_S + 0.5
    with pytest.raises(ServiceError) as unsaved:
        await write
    # The end of the term cuts the connection: the write may hear of that first, and then nothing was committed.
    outcome = {"NOT_LEADER": "unknown", "STORE_UNAVAILABLE": "no"}[unsaved.value.reason_name]
    assert unsaved.value.metadata["changed"] == outcome
    assert await standing_by == 2
    assert time.monotonic() - began_s < LEASE_S + 2
    with pytest.raises(ServiceError) as caught:
        await old.write(lambda tx: tx.clusters.insert(samples.cluster("clusters/b")))
    assert caught.value.reason_name == "NOT_LEADER"
    proxy.thaw()
    await new.write(lambda tx: tx.clusters.insert(samples.cluster("clusters/c")))
    names = await old.read(lambda tx: [record.name for record in tx.clusters.all()])
    assert names == ["clusters/c"] or (outcome == "unknown" and names == ["clusters/a", "clusters/c"])
    assert names == await new.read(lambda tx: [record.name for record in tx.clusters.all()])


async def test_a_leader_that_closes_while_its_server_is_frozen_has_no_lease_that_could_be_overdue(
    postgres_url: str, proxy: Proxy, stores: Stores
) -> None:
    """A defect in the past: SIGTERM ended a planner with 1, as if its event loop had hung."""
    store = await stores.leading(through(proxy, postgres_url), lease_s=LEASE_S, holder="leader")
    proxy.freeze()
    closing = asyncio.create_task(store.close())
    began_s = time.monotonic()
    while not closing.done():
        assert not store.leadership.lease.is_overdue
        await asyncio.sleep(0.05)
    assert time.monotonic() - began_s > LEASE_S
    await closing


async def test_after_two_thirds_of_the_lease_nothing_is_decided_and_a_renewal_mends_that(
    postgres_url: str, stores: Stores
) -> None:
    now_s = 0.0
    store = await stores.leading(postgres_url, lease_s=30.0, machine=lambda: now_s)
    now_s = 21.0
    with pytest.raises(ServiceError, match=r"was not renewed for 21.0 s of 30 s; nothing was changed") as caught:
        await store.write(lambda tx: tx.clusters.insert(samples.cluster("clusters/a")))
    assert caught.value.reason_name == "STORE_UNAVAILABLE"
    assert caught.value.metadata == {"changed": "no"}
    store.leadership.lease.grant(now_s)
    await store.write(lambda tx: tx.clusters.insert(samples.cluster("clusters/a")))


async def test_a_renewal_that_fails_in_whatever_way_ends_the_term_when_the_lease_does(
    postgres_url: str, stores: Stores
) -> None:
    """An unexpected error must not leave a leader that neither renews nor ends."""
    engine = sa.create_engine(sa.make_url(postgres_url).set(drivername="postgresql+psycopg"))
    store = await stores.leading(postgres_url, lease_s=LEASE_S)
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE leadership RENAME TO elsewhere")
    async with asyncio.timeout(60):
        await store.leadership.until_ended()
    assert not store.leadership.lease.is_held
    assert store.leadership.epoch is None
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE elsewhere RENAME TO leadership")
    async with asyncio.timeout(60):
        assert await store.leadership.stand_by("test") == 2
    await store.close()
    engine.dispose()


async def test_a_renewal_that_is_answered_after_the_lease_does_not_bring_the_term_back(
    postgres_url: str, stores: Stores
) -> None:
    """This happens if the process is suspended while it renews: others may lead by then, and callers were refused."""
    now_s, is_suspended = 0.0, False

    def machine_s() -> float:
        nonlocal now_s
        if is_suspended and threading.current_thread().name.startswith("hetis-lease"):
            now_s = LEASE_S + 0.1
        return now_s

    store = await stores.leading(postgres_url, lease_s=LEASE_S, machine=machine_s)
    now_s, is_suspended = 0.4, True  # a renewal requested now is valid until 1.9, and answered at 1.6
    async with asyncio.timeout(60):
        await store.leadership.until_ended()
    assert now_s == LEASE_S + 0.1
    assert not store.leadership.lease.is_held
    assert store.leadership.epoch is None
    other = await stores.open(postgres_url, lease_s=LEASE_S)
    async with asyncio.timeout(60):
        assert await other.leadership.stand_by("other") == 2  # the old term is not renewed


async def test_a_renewal_that_waits_for_its_turn_when_nobody_waits_for_it_is_never_made(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch, stores: Stores
) -> None:
    """Such a renewal would extend a term that callers know to be over, and delay the next leader."""
    begun, leave = list[int](), threading.Event()

    def blocked(_: Leadership, epoch: int) -> None:
        begun.append(epoch)
        leave.wait(60)

    monkeypatch.setattr(Leadership, "_renew", blocked)
    store = await stores.leading(postgres_url, lease_s=LEASE_S)
    async with asyncio.timeout(60):
        await store.leadership.until_ended()  # two renewals were awaited in vain: one had begun, one had not
    leave.set()
    assert await store.leadership.stand_by("test") == 2
    assert begun[0] == 1
    assert begun.count(1) == 1


async def test_a_lease_that_has_expired_is_not_renewed_by_a_request_that_waited_in_the_server(
    postgres_url: str, stores: Stores
) -> None:
    """A defect in the past: after a stall of the database, the renewal of a dead term kept all others from leading."""
    store = await stores.leading(postgres_url, lease_s=30.0)
    await stop_renewing(store)
    with psycopg.connect(postgres_url) as connection:
        connection.execute("UPDATE leadership SET lease_end_s = extract(epoch FROM clock_timestamp()) - 0.01")
    expired = row_of(postgres_url)
    with pytest.raises(ServiceError, match="had expired before its renewal reached the store") as caught:
        await store.leadership.promote()
    assert caught.value.reason_name == "NOT_LEADER"
    assert row_of(postgres_url) == expired
    other = await stores.open(postgres_url, lease_s=30.0)
    assert await other.leadership.grant("other") == 2


async def test_a_planner_goes_through_the_states_of_leadership(url: str, stores: Stores) -> None:
    store = await stores.open(url)
    leadership = store.leadership
    assert leadership.state is LeadershipState.WATCHING
    await leadership.grant("planner")
    assert leadership.state is LeadershipState.TAKEN
    await leadership.promote()
    assert leadership.state is LeadershipState.LEADING
    leadership.demote()
    assert (leadership.state, leadership.epoch) == (LeadershipState.ENDED, None)
    await leadership.until_ended()
    with pytest.raises(ServiceError, match="is not the leader"):
        await leadership.promote()
    await store.close()
    assert leadership.state is LeadershipState.ENDED


async def test_a_term_that_was_revoked_does_not_keep_another_planner_waiting(url: str, stores: Stores) -> None:
    first, second = [await stores.open(url, lease_s=60.0) for _ in range(2)]
    await first.leadership.grant("first")
    await first.leadership.revoke()
    assert await second.leadership.grant("second") == 2
    await first.leadership.revoke()  # does nothing, in particular not to the other's term
    await second.write(lambda tx: tx.clusters.insert(samples.cluster("clusters/a")))


async def test_whoever_hears_that_the_lease_is_over_ends_the_term(postgres_url: str, stores: Stores) -> None:
    """NOT_LEADER is final, because agents are redirected after it."""
    now_s = 0.0
    store = await stores.leading(postgres_url, lease_s=30.0, machine=lambda: now_s)
    now_s = 30.1
    with pytest.raises(ServiceError, match="is not the leader"):
        await store.write(lambda tx: tx.clusters.insert(samples.cluster("clusters/a")))
    assert store.leadership.epoch is None
    await store.leadership.until_ended()


async def test_a_lease_is_renewed_while_a_write_takes_longer_than_it(postgres_url: str, stores: Stores) -> None:
    store = await stores.leading(postgres_url, lease_s=LEASE_S)
    entered, leave = threading.Event(), threading.Event()

    def slow(tx: Transaction) -> None:
        tx.clusters.all()
        entered.set()
        leave.wait(LEASE_S * 1.3)
        tx.clusters.insert(samples.cluster("clusters/a"))

    await store.write(slow)
    assert store.leadership.lease.may_decide


async def test_a_renewal_is_one_round_trip_and_taking_over_is_five(
    postgres_url: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, stores: Stores
) -> None:
    """Leaders far from their store lost the lease when a renewal took five round trips; it now takes one."""
    granted = list[int]()  # number of round trips before each grant
    grant = Lease.grant

    def counting(lease: Lease, requested_s: float) -> None:
        granted.append(proxy.num_asked)
        grant(lease, requested_s)

    other = await stores.leading(postgres_url, lease_s=LEASE_S, holder="other")
    # The clock stands still: no probe of the other connection is due, and no lease ends.
    store = await stores.open(through(proxy, postgres_url), lease_s=LEASE_S, machine=lambda: 0.0)
    with pytest.raises(ServiceError, match="another planner is the leader"):
        await store.leadership.grant("store")
    await other.close()
    connected = proxy.num_asked
    monkeypatch.setattr(Lease, "grant", counting)
    await store.leadership.stand_by("store")
    assert granted.pop() - connected == 5  # reading the leader, then BEGIN, the row, its change, COMMIT
    async with asyncio.timeout(60):
        while len(granted) < 9:
            await asyncio.sleep(0.01)
    trips = [after - before for before, after in itertools.pairwise(granted)]
    assert sorted(trips) == [1] * 7 + [2]  # the sixth time it also prepares the statement


async def test_a_write_that_is_done_after_the_lease_is_not_acknowledged(postgres_url: str, stores: Stores) -> None:
    """This happens if the process is suspended between commit and answer."""
    now_s = 0.0
    store = await stores.leading(postgres_url, lease_s=30.0, machine=lambda: now_s)

    def slow(tx: Transaction) -> None:
        nonlocal now_s
        tx.clusters.insert(samples.cluster("clusters/a"))
        now_s = 31.0

    with pytest.raises(ServiceError, match="unknown"):
        await store.write(slow)


async def test_a_renewal_does_not_take_back_that_the_term_has_begun(postgres_url: str, stores: Stores) -> None:
    store = await stores.leading(postgres_url, lease_s=LEASE_S, holder="leader")
    assert row_of(postgres_url)[1] == ""
    await store.leadership.promote()
    announced = row_of(postgres_url)
    assert announced[1] == "leader"
    async with asyncio.timeout(60):
        while row_of(postgres_url) == announced:
            await asyncio.sleep(0.05)
    assert row_of(postgres_url)[1] == "leader"
    await store.close()
    with pytest.raises(ServiceError, match="is not the leader"):
        await store.leadership.promote()


def row_of(url: str) -> tuple[int, str, float]:
    with psycopg.connect(url) as connection:
        epoch, holder, end_s = connection.execute("SELECT epoch, holder, lease_end_s FROM leadership").fetchone() or ()
    return epoch, holder, end_s


async def stop_renewing(store: Store) -> None:
    """Leave the store with a term that nobody renews, as if its process were gone or suspended."""
    renewal = store.leadership._renewal
    assert renewal is not None
    renewal.cancel()
    await asyncio.gather(renewal, return_exceptions=True)
