"""What a standby knows of the leader, and when it leads itself."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from hetis.planner.failures import ServiceError
from hetis.planner.store import Store
from hetis.planner.store.lease import GrantedLease
from tests.faults.proxy import Proxy
from tests.planner.store import samples
from tests.planner.store.conftest import Stores
from tests.planner.store.test_lease import through


async def test_a_standby_knows_who_leads_and_where_and_leads_when_that_one_goes(url: str, stores: Stores) -> None:
    first, second = await stores.open(url), await stores.open(url)
    await first.leadership.grant("first", ("10.0.0.1:8470", "10.0.0.1:8480"))
    await first.leadership.promote()
    standing_by = asyncio.create_task(second.leadership.stand_by("second"))
    while second.leadership.leader is None:
        await asyncio.sleep(0.01)
    assert second.leadership.not_leader().metadata == {
        "leader": "first",
        "leader_address": "10.0.0.1:8470,10.0.0.1:8480",
    }
    assert await second.read(lambda tx: tx.clusters.all()) == []
    await first.close()
    assert await asyncio.wait_for(standing_by, 60) == 2


async def test_nobody_is_named_as_leader_once_the_lease_has_ended(
    postgres_url: str, proxy: Proxy, stores: Stores
) -> None:
    """In the past a standby that could not take over named the last leader for ever."""
    now_s = 0.0
    first = await stores.leading(postgres_url, lease_s=30.0, holder="first")
    await first.leadership.promote()
    cut_off = await stores.open(through(proxy, postgres_url), lease_s=30.0, machine=lambda: now_s)
    standing_by = asyncio.create_task(cut_off.leadership.stand_by("second"))
    async with asyncio.timeout(60):
        while cut_off.leadership.leader is None:
            await asyncio.sleep(0.01)
    assert cut_off.leadership.not_leader().metadata == {"leader": "first"}
    assert cut_off.leadership.is_led_surely
    proxy.freeze()
    now_s = 16.0  # it was not seen to renew for half a lease
    assert cut_off.leadership.leader is not None
    assert not cut_off.leadership.is_led_surely
    now_s = 31.0
    assert cut_off.leadership.leader is None
    error = cut_off.leadership.not_leader()
    assert str(error) == "this planner is not the leader, and no planner leads now as far as it knows"
    assert error.metadata == {}
    proxy.thaw()
    async with asyncio.timeout(60):
        while cut_off.leadership.leader is None:  # it still leads, and renews the lease
            await asyncio.sleep(0.01)
    standing_by.cancel()


async def test_nobody_is_named_as_leader_when_the_lease_was_seen_to_have_ended(
    postgres_url: str, stores: Stores
) -> None:
    first, second = [await stores.open(postgres_url, lease_s=30.0) for _ in range(2)]
    await first.leadership.grant("first")
    await first.leadership.promote()
    with pytest.raises(ServiceError, match=r"another planner is the leader of store .*: first"):
        await second.leadership.grant("second")
    assert second.leadership.leader is not None
    await first.close()
    await second._probe()
    assert second.leadership.leader is None
    assert "no planner leads now" in str(second.leadership.not_leader())


async def test_a_planner_that_cannot_use_its_term_ends_it_and_stands_by(url: str, stores: Stores) -> None:
    """In the past it renewed the lease of its term and waited for its end: nobody led any more."""
    store = await stores.open(url)
    assert await store.leadership.grant("planner") == 1
    async with asyncio.timeout(30):
        assert await store.leadership.stand_by("planner") == 2
    await store.write(lambda tx: tx.clusters.insert(samples.cluster("clusters/a")))


async def test_a_term_that_has_not_begun_does_not_count_as_led_for_anyone(url: str, stores: Stores) -> None:
    """Two planners that took turns at terms which neither could begin kept each other ready."""
    now_s = 0.0

    async def fail_to_begin(store: Store, name: str, terms: list[int]) -> None:
        while True:
            terms.append(await store.leadership.stand_by(name))

    both = [await stores.open(url, machine=lambda: now_s) for _ in range(2)]
    now_s = 100.0
    terms = [list[int](), list[int]()]
    failing = [
        asyncio.create_task(fail_to_begin(store, name, found))
        for store, name, found in zip(both, ("first", "second"), terms, strict=True)
    ]
    async with asyncio.timeout(60):
        while min(map(len, terms)) < 2:
            await asyncio.sleep(0.01)
            assert [store.leadership.led_s_ago for store in both] == [100.0, 100.0]
    for task in failing:
        task.cancel()
    await asyncio.gather(*failing, return_exceptions=True)
    await both[1].close()
    async with asyncio.timeout(60):
        await both[0].leadership.stand_by("first")
    await both[0].leadership.promote()
    assert both[0].leadership.led_s_ago == 0.0
    await both[0].close()


async def test_a_term_taken_while_its_planner_is_told_to_stop_is_given_back(url: str, stores: Stores) -> None:
    """In the past others waited for the end of a lease that nobody held, or of the process that held a file's lock."""
    first, second = [await stores.open(url, lease_s=600.0) for _ in range(2)]
    take, taken = first.leadership._take, threading.Event()

    def take_slowly(abandoned: GrantedLease | None) -> tuple[float, int]:
        found = take(abandoned)
        taken.set()
        time.sleep(0.2)  # in the connection's thread
        return found

    first.leadership._take = take_slowly  # type: ignore[method-assign]
    taking = asyncio.create_task(first.leadership.grant("first"))
    assert await asyncio.to_thread(taken.wait, 60)
    taking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await taking
    assert await second.leadership.grant("second") == 2


async def test_a_standby_does_not_name_a_planner_as_leader_before_its_term_has_begun(url: str, stores: Stores) -> None:
    now_s = 0.0
    first, second = await stores.open(url), await stores.open(url, machine=lambda: now_s)
    await first.leadership.grant("first")
    with pytest.raises(ServiceError, match=r"the leader of store .*, but has not begun its term yet") as caught:
        await second.leadership.grant("second")
    assert caught.value.metadata == {}
    standing_by = asyncio.create_task(second.leadership.stand_by("second"))
    now_s = 100.0
    await asyncio.sleep(1.0)  # two looks
    assert (second.leadership.leader, second.leadership.led_s_ago) == (None, 100.0)
    await first.leadership.promote()
    async with asyncio.timeout(60):
        while second.leadership.led_s_ago:
            await asyncio.sleep(0.01)
    assert second.leadership.not_leader().metadata == {"leader": "first"}
    standing_by.cancel()


async def test_another_planner_leads_after_a_term_that_could_not_be_used(url: str, stores: Stores) -> None:
    first, second = await stores.open(url, lease_s=60.0), await stores.open(url, lease_s=60.0)
    await first.leadership.grant("first")
    other = asyncio.create_task(second.leadership.stand_by("second"))
    standing_by = asyncio.create_task(first.leadership.stand_by("first"))
    async with asyncio.timeout(30):
        assert await other == 2
    with pytest.raises(ServiceError, match="the leader"):
        await first.write(lambda tx: tx.clusters.insert(samples.cluster("clusters/a")))
    await second.write(lambda tx: tx.clusters.insert(samples.cluster("clusters/b")))
    standing_by.cancel()
