"""A failing background task makes the planner unhealthy, and does not delay the end of a term."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from hetis.planner.failures import Reason, ServiceError
from hetis.planner.jobs.pool import PoolSettings, SolverPool
from hetis.planner.service.audit_refusals import AuditRefusals
from hetis.planner.service.identity.certificates import keep_fresh
from hetis.planner.service.loops import Loops
from hetis.planner.service.observability.overview import Overviews
from hetis.planner.service.running import show_failure
from hetis.planner.service.succession import ANSWERED_S, Succession
from hetis.planner.store import Store, StoreError
from hetis.planner.store.health import StoreHealth
from hetis.planner.store.lease import Lease
from tests.planner.service.serving import served


async def test_a_loop_that_fails_is_named_and_one_that_is_stopped_is_not() -> None:
    loops = Loops()

    async def fail() -> None:
        raise ZeroDivisionError

    async def go_on() -> None:
        await asyncio.Event().wait()

    loops.start("one that goes on", go_on())
    loops.start("one that fails", fail())
    await asyncio.wait_for(loops.failed.wait(), 10)
    await loops.stop()
    assert loops.failures == ["one that fails"]


async def test_health_says_that_nothing_serves_once_something_has_failed() -> None:
    async with served() as planner:
        stub = health_pb2_grpc.HealthStub(planner.channel)
        loops = Loops()
        showing = asyncio.create_task(show_failure(Loops(loops), planner.server))
        watch = stub.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        loops.failed.set()
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        await showing


async def test_loops_of_a_term_are_stopped_by_themselves_and_fail_for_all() -> None:
    whole = Loops()
    part = Loops(whole)
    ended = list[str]()

    async def go_on(name: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(name)

    async def fail() -> None:
        raise ZeroDivisionError

    whole.start("of the process", go_on("of the process"))
    part.start("of the term", go_on("of the term"))
    part.start("one that fails", fail())
    await asyncio.wait_for(whole.failed.wait(), 10)
    assert whole.failures == ["one that fails"]
    await part.stop()
    assert ended == ["of the term"]
    await whole.stop()


async def test_files_are_read_again_also_after_what_follows_from_them_has_failed() -> None:
    looks, looked_twice = 0, asyncio.Event()

    def fail_once() -> None:
        nonlocal looks
        looks += 1
        if looks == 1:
            raise ZeroDivisionError
        looked_twice.set()

    keeping = asyncio.create_task(keep_fresh((), 0.0, then=fail_once))
    await asyncio.wait({keeping, asyncio.create_task(looked_twice.wait())}, return_when=asyncio.FIRST_COMPLETED)
    assert not keeping.done()
    keeping.cancel()


async def test_a_solver_slot_that_ends_by_a_bug_is_heard_of() -> None:
    async def start(*_: object) -> Any:
        raise ZeroDivisionError

    pool = SolverPool(PoolSettings(num_processes=2, warm_up_after_s=0.0), start_process=start)
    pool.start()
    with pytest.raises(ZeroDivisionError):
        await pool.until_failed()
    await pool.stop()


async def test_a_guard_of_the_store_that_ends_by_a_bug_is_heard_of(tmp_path: Path) -> None:
    is_broken = False

    def machine_s() -> float:
        if is_broken:
            raise ZeroDivisionError
        return 0.0

    store = await Store.open(f"sqlite:///{tmp_path}/hetis.db", machine=machine_s)
    is_broken = True
    with pytest.raises(ZeroDivisionError):
        await store.until_failed()
    is_broken = False
    await store.close()
    await store.until_failed()


async def test_a_count_that_fails_when_nobody_waits_for_it_any_more_is_no_orphan() -> None:
    """A defect in the past: ``Task exception was never retrieved`` when leadership was lost, three times in an hour."""
    orphans, go = list[Any](), asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.set_debug(True)
    loop.set_exception_handler(lambda _, context: orphans.append(context))

    class FailingStore:
        async def read(self, _: object) -> None:
            await go.wait()
            raise ServiceError(Reason.ERROR_REASON_STORE_UNAVAILABLE, "the store is away")

    parts: list[Any] = [FailingStore(), *[None] * 6]
    overviews = Overviews(*parts, epoch=1, leader_since_s=0.0, most_searches=1)
    asked = asyncio.create_task(overviews.overview())
    await asyncio.sleep(0)
    asked.cancel()
    await asyncio.wait([asked])
    go.set()
    await asyncio.sleep(0.01)
    del overviews, asked
    gc.collect()
    assert orphans == []


class LostStore:
    """A store whose term is over as soon as it has begun, and that records who stands by."""

    def __init__(self) -> None:
        self.lease, self.health = Lease(5.0), StoreHealth(lambda: 0.0)
        self.led_s_ago, self.is_led_surely = 0.0, True
        self.stands_by = asyncio.Event()

    @property
    def leadership(self) -> LostStore:
        return self

    async def grant(self, *_: object) -> int:
        return 1

    async def promote(self) -> None: ...

    async def stand_by(self, *_: object) -> int:
        self.stands_by.set()
        await asyncio.Event().wait()
        return 2

    async def until_ended(self) -> None: ...

    async def until_failed(self) -> None: ...

    async def close(self) -> None: ...

    def not_leader(self) -> ServiceError:
        return ServiceError(Reason.ERROR_REASON_NOT_LEADER, "this planner is not the leader")


class HangingTerm:
    """A term that does not end, not even when it is cancelled once."""

    def __init__(self) -> None:
        self.is_released = asyncio.Event()

    async def stand_by(self) -> None: ...

    async def begin(self) -> None: ...

    def lose(self, error: ServiceError) -> None: ...

    async def close(self) -> None:
        while not self.is_released.is_set():
            try:
                await self.is_released.wait()
            except asyncio.CancelledError:
                continue


class ReleasedTerm(HangingTerm):
    def __init__(self) -> None:
        super().__init__()
        self.is_released.set()


def succession_with(store: Any, make_term: Callable[[int], Any]) -> Succession:
    async def append(_: object) -> None: ...

    return Succession(
        store,
        make_term,
        holder="test",
        addresses=(),
        stands_by=True,
        loops=Loops(),
        refusals=AuditRefusals(append),
        collectors=(),
        step_down_s=0.01,
    )


def test_a_standby_is_not_ready_where_nobody_leads_and_it_cannot_take_over() -> None:
    store = LostStore()
    standby = succession_with(store, lambda _: HangingTerm())
    assert standby.is_ready
    store.led_s_ago = ANSWERED_S
    assert not standby.is_ready


async def test_a_leader_that_cannot_write_is_not_ready_though_its_store_answers() -> None:
    class KeptStore(LostStore):
        async def until_ended(self) -> None:
            await asyncio.Event().wait()

    now_s, store = 100.0, KeptStore()
    store.lease.grant(store.lease.clock() + 3600)
    store.health = StoreHealth(lambda: now_s)
    leader = succession_with(store, lambda _: ReleasedTerm())
    await leader.start()
    store.health.write_failed()
    assert leader.is_ready
    now_s += ANSWERED_S
    with store.health.counted():
        """A read."""
    store.health.write_failed()  # it does not begin anew
    assert not leader.is_ready
    assert not leader.loops.failures  # it is alive: a restart would not help
    store.health.writes_work()
    assert leader.is_ready
    await leader.close()


async def test_a_standby_ends_when_a_planner_of_another_version_has_migrated_the_tables() -> None:
    class MigratedStore(LostStore):
        async def stand_by(self, *_: object) -> int:
            raise StoreError("hetis.db was written by a newer hetis-planner")

    standby = succession_with(MigratedStore(), lambda _: ReleasedTerm())
    await standby.start()
    with pytest.raises(StoreError, match="was written by a newer hetis-planner"):
        await standby.until_replaced()
    await standby.close()


async def test_agents_wait_for_a_term_that_begins_and_for_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    begins, go = asyncio.Event(), asyncio.Event()

    class SlowTerm(ReleasedTerm):
        async def begin(self) -> None:
            begins.set()
            await go.wait()

    succession = succession_with(LostStore(), lambda _: SlowTerm())
    await asyncio.wait_for(succession.until_begun(False), 20)
    starting = asyncio.create_task(succession.start())
    await begins.wait()
    waiting = asyncio.create_task(succession.until_begun(False))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    monkeypatch.setattr("hetis.planner.service.succession._BEGIN_S", 0.01)
    await asyncio.wait_for(succession.until_begun(False), 20)  # for a limited time
    assert not starting.done()
    go.set()
    await starting
    await asyncio.wait_for(waiting, 20)
    await succession.close()


async def test_agents_wait_at_a_standby_once_the_leader_seems_gone_and_changes_pass_before_them() -> None:
    """In the past 3,000 agents that were refused meanwhile took 1 to 6 s of the next term's beginning."""
    store = LostStore()
    succession = succession_with(store, lambda _: ReleasedTerm())
    await succession.start()
    await asyncio.wait_for(store.stands_by.wait(), 20)
    await asyncio.wait_for(succession.until_begun(False), 20)
    store.is_led_surely = False
    await asyncio.sleep(0.6)
    passed = list[str]()

    async def call(name: str, is_change: bool) -> None:
        await succession.until_begun(is_change)
        passed.append(name)

    calls = [asyncio.create_task(call("agent", False)) for _ in range(50)]
    calls.append(asyncio.create_task(call("change", True)))
    await asyncio.sleep(0.3)
    assert passed == []
    store.is_led_surely = True
    async with asyncio.timeout(20):
        while not passed:
            await asyncio.sleep(0)
    assert passed[0] == "change"
    assert len(passed) < 20  # not all at once
    await asyncio.wait_for(asyncio.gather(*calls), 20)
    await succession.close()


async def test_a_planner_stands_by_again_though_streams_and_term_do_not_end() -> None:
    store: Any = LostStore()
    terms = list[Any]()

    def make_term(_epoch: int) -> Any:
        terms.append(HangingTerm())
        return terms[-1]

    succession = succession_with(store, make_term)

    async def end_streams(_: ServiceError) -> None:
        await asyncio.Event().wait()

    succession.on_loss(end_streams)
    await succession.start()
    await asyncio.wait_for(store.stands_by.wait(), 20)
    for term in terms:
        term.is_released.set()
    await succession.close()
