"""Steps of the server's clock: a lease that they prolong is taken when nobody renews it."""

from __future__ import annotations

import asyncio

import psycopg
import pytest

from hetis.planner.failures import ServiceError
from hetis.planner.store import Store
from tests.planner.store import samples
from tests.planner.store.postgres import num_waiting, set_clock_back
from tests.planner.store.test_lease import LEASE_S, row_of, stop_renewing

HOUR_S = 3600.0


class Standby:
    """A planner that stands by, with a clock that a test sets."""

    def __init__(self, store: Store, clock: list[float]) -> None:
        self.store = store
        self._clock = clock
        self.taking = asyncio.create_task(self._lead())

    @classmethod
    async def open(cls, url: str, *, lease_s: float = LEASE_S) -> Standby:
        clock = [0.0]
        return cls(await Store.open(url, lease_s=lease_s, machine=lambda: clock[0]), clock)

    async def pass_time(self, seconds: float) -> None:
        """Let so much time pass, and wait until the standby has looked at the lease since, or leads."""
        self._clock[0] += seconds
        for _ in range(2):  # the first look may have begun before
            self._clock[0] += 1e-6
            while self.store.leadership.led_s_ago and not self.taking.done():
                await asyncio.sleep(0.01)

    async def _lead(self) -> int:
        epoch = await self.store.leadership.stand_by("standby")
        await self.store.leadership.promote()
        return epoch

    async def close(self) -> None:
        self.taking.cancel()
        await asyncio.gather(self.taking, return_exceptions=True)
        await self.store.close()


@pytest.mark.parametrize(("lease_s", "limit_s"), [(LEASE_S, 60.0), (30.0, 90.0)])
async def test_a_lease_that_a_step_of_the_clock_prolongs_is_taken_when_nobody_renews_it(
    postgres_url: str, lease_s: float, limit_s: float
) -> None:
    """In the past, standbys waited for an hour after a step of an hour. A leader that lives after all is deposed."""
    set_clock_back(postgres_url, 0)
    old = await Store.open(postgres_url, lease_s=lease_s, machine=lambda: 0.0)  # its own clock never ends its term
    await old.leadership.grant("old")
    await old.leadership.promote()
    await stop_renewing(old)
    set_clock_back(postgres_url, HOUR_S)
    standby = await Standby.open(postgres_url, lease_s=lease_s)
    async with asyncio.timeout(60):
        await standby.pass_time(0)
        await standby.pass_time(limit_s - 1)
        assert not standby.taking.done()
        assert row_of(postgres_url)[0] == 1
        await standby.pass_time(1.1)
        assert await standby.taking == 2
    with pytest.raises(ServiceError, match="another planner is the leader: standby"):
        await old.write(lambda tx: tx.clusters.insert(samples.cluster("clusters/a")))
    with pytest.raises(ServiceError, match="another planner is the leader: standby"):
        await old.leadership._in_time(old.leadership._renew, 1)
    await standby.store.write(lambda tx: tx.clusters.insert(samples.cluster("clusters/b")))
    assert await old.read(lambda tx: [record.name for record in tx.clusters.all()]) == ["clusters/b"]
    await old.close()
    await standby.close()


async def test_a_leader_that_renews_keeps_its_lease_whatever_the_clock_does(postgres_url: str) -> None:
    set_clock_back(postgres_url, 0)
    leader = await Store.open(postgres_url, lease_s=3.0)
    await leader.leadership.grant("leader")
    await leader.leadership.promote()
    standby = await Standby.open(postgres_url)
    async with asyncio.timeout(60):
        await standby.pass_time(0)
        for step in range(3):
            set_clock_back(postgres_url, (step + 1) * HOUR_S)
            seen = row_of(postgres_url)
            while row_of(postgres_url) == seen:
                await asyncio.sleep(0.05)
            await standby.pass_time(0)  # it sees the renewal
            await standby.pass_time(59.0)
    assert not standby.taking.done()
    assert row_of(postgres_url)[:2] == (1, "leader")
    await leader.write(lambda tx: tx.clusters.insert(samples.cluster("clusters/a")))
    await standby.close()
    await leader.close()


async def test_a_renewal_that_comes_just_before_the_takeover_wins(postgres_url: str) -> None:
    set_clock_back(postgres_url, 0)
    leader = await Store.open(postgres_url, lease_s=LEASE_S, machine=lambda: 0.0)
    await leader.leadership.grant("leader")
    await leader.leadership.promote()
    await stop_renewing(leader)
    set_clock_back(postgres_url, HOUR_S)
    standby = await Standby.open(postgres_url)
    async with asyncio.timeout(60):
        await standby.pass_time(0)
        with psycopg.connect(postgres_url) as renewal:  # committed when the standby already waits for the row
            renewal.execute("UPDATE leadership SET lease_end_s = lease_end_s + 0.001 WHERE epoch = 1")
            passing = asyncio.create_task(standby.pass_time(60.1))
            while not await asyncio.to_thread(num_waiting, postgres_url):
                assert not standby.taking.done()
        await passing
        await standby.pass_time(59.0)  # counted from the renewal
        assert not standby.taking.done()
        assert row_of(postgres_url)[:2] == (1, "leader")
        await leader.write(lambda tx: tx.clusters.insert(samples.cluster("clusters/a")))
        await standby.pass_time(1.1)
        assert await standby.taking == 2
    await standby.close()
    await leader.close()


async def test_only_one_of_two_standbys_takes_a_lease_that_nobody_renews(postgres_url: str) -> None:
    set_clock_back(postgres_url, 0)
    gone = await Store.open(postgres_url, lease_s=LEASE_S, machine=lambda: 0.0)
    await gone.leadership.grant("gone")
    await gone.leadership.promote()
    await stop_renewing(gone)
    set_clock_back(postgres_url, HOUR_S)
    standbys = [await Standby.open(postgres_url) for _ in range(2)]
    async with asyncio.timeout(60):
        for standby in standbys:
            await standby.pass_time(0)
        with psycopg.connect(postgres_url) as both:  # holds the row until both standbys wait for it
            both.execute("SELECT * FROM leadership FOR UPDATE")
            passing = [asyncio.create_task(standby.pass_time(60.1)) for standby in standbys]
            while await asyncio.to_thread(num_waiting, postgres_url) < 2:
                assert row_of(postgres_url)[0] == 1
        await asyncio.gather(*passing)
    assert sorted(standby.taking.done() for standby in standbys) == [False, True]
    assert row_of(postgres_url)[0] == 2
    for store in (*standbys, gone):
        await store.close()
