"""Servers that freeze: neither callers nor the end of the process wait for them."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from typing import Any

import pytest

from hetis.planner.failures import ServiceError
from hetis.planner.store import Store, StoreError
from tests.faults.proxy import Proxy
from tests.planner.store.conftest import Stores
from tests.planner.store.test_lease import LEASE_S, through


async def test_reads_of_a_server_that_freezes_do_not_wait_in_a_queue_for_one_another(
    postgres_url: str, proxy: Proxy, stores: Stores
) -> None:
    store = await stores.open(through(proxy, postgres_url), lease_s=LEASE_S)
    proxy.freeze()
    reads = [asyncio.ensure_future(store.read(lambda tx: tx.clusters.all())) for _ in range(4)]
    found = await asyncio.gather(*reads, return_exceptions=True)
    assert [error.reason_name for error in found if isinstance(error, ServiceError)] == ["STORE_UNAVAILABLE"] * 4
    assert store.health.errors < 4  # as many as tried: the others knew before it was their turn
    proxy.thaw()
    async with asyncio.timeout(30):
        while store.health.failing_s:  # until the probe finds it
            await asyncio.sleep(0.05)
    assert await store.read(lambda tx: tx.clusters.all()) == []


async def test_a_server_that_freezes_is_an_error_after_a_while_and_forgotten_when_it_is_back(
    postgres_url: str, proxy: Proxy, stores: Stores
) -> None:
    store = await stores.open(through(proxy, postgres_url), lease_s=LEASE_S)
    proxy.freeze()
    with pytest.raises(ServiceError) as caught:
        await store.read(lambda tx: tx.clusters.all())
    assert caught.value.reason_name == "STORE_UNAVAILABLE"
    assert store.health.answered_s_ago > LEASE_S
    async with asyncio.timeout(30):
        while not store.health.errors:  # the connection is broken from outside
            await asyncio.sleep(0.05)
    proxy.thaw()
    began_s = time.monotonic()
    assert await store.read(lambda tx: tx.clusters.all()) == []
    assert store.health.answered_s_ago <= time.monotonic() - began_s


async def test_calls_in_progress_while_leadership_is_lost_leave_no_orphaned_task(
    postgres_url: str, proxy: Proxy, stores: Stores
) -> None:
    """A defect in the past: ``Task exception was never retrieved`` of Store.read, three times in an hour of faults."""
    orphans, loop = list[Any](), asyncio.get_running_loop()
    loop.set_debug(True)
    loop.set_exception_handler(lambda _, context: orphans.append(context))
    store = await stores.announced(through(proxy, postgres_url), lease_s=LEASE_S)
    proxy.freeze()
    calls = [asyncio.create_task(store.read(lambda tx: tx.clusters.all())) for _ in range(4)]
    calls += [asyncio.create_task(store.write(lambda tx: tx.clusters.all())) for _ in range(4)]
    await asyncio.sleep(LEASE_S / 3)
    for call in calls[::2]:
        call.cancel()  # its caller no longer waits when the call fails
    await store.leadership.until_ended()
    found = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(error) for error in found} == {asyncio.CancelledError, ServiceError}
    await store.close()
    proxy.thaw()
    del calls, found
    gc.collect()
    await asyncio.sleep(0)
    assert orphans == []
    assert asyncio.all_tasks() == {asyncio.current_task()}


def has_ended(name: str) -> bool:
    return not any(thread.name.startswith(name) for thread in threading.enumerate())


@pytest.mark.parametrize("words", [b"pg_catalog.version", b"alembic_version"], ids=["at once", "later"])
async def test_a_server_that_freezes_while_a_store_is_opened_is_an_error(
    postgres_url: str, proxy: Proxy, words: bytes, stores: Stores
) -> None:
    proxy.freeze_at(words)
    async with asyncio.timeout(60):
        with pytest.raises(StoreError, match=r"cannot be reached: no answer for 5\.0 s"):
            await stores.open(through(proxy, postgres_url), lease_s=LEASE_S)
        while not has_ended("hetis-store"):  # otherwise the process could not end
            await asyncio.sleep(0.05)
    proxy.mend()
    await stores.open(through(proxy, postgres_url), lease_s=LEASE_S)


async def test_opening_a_store_whose_server_is_frozen_can_be_given_up(postgres_url: str, proxy: Proxy) -> None:
    proxy.freeze_at(b"alembic_version")
    opening = asyncio.create_task(Store.open(through(proxy, postgres_url), lease_s=1e6))
    async with asyncio.timeout(60):
        while not proxy.is_frozen:
            await asyncio.sleep(0.05)
        opening.cancel()
        await asyncio.gather(opening, return_exceptions=True)
        assert opening.cancelled()
        while not has_ended("hetis-store"):
            await asyncio.sleep(0.05)
