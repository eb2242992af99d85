"""The pool of solver processes, with scripted processes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest

from hetis.planner.failures import Reason, ServiceError
from hetis.planner.jobs.messages import CalledOff, Crashed, FoundPlan, Outcome
from hetis.planner.jobs.pool import Begun, PooledSearch, PoolSettings, SearchEvent, SolverPool
from hetis.planner.jobs.process import SolverProcess
from hetis.solver.budget import Progress
from hetis.solver.errors import InfeasibleError

WORKER = (sys.executable, str(Path(__file__).with_name("scripted_worker.py")))
FOREVER_S = 1e6


@asynccontextmanager
async def pool_of(
    settings: PoolSettings = PoolSettings(),  # noqa: B008  # frozen
    *,
    command: tuple[str, ...] = WORKER,
    clock: Callable[[], float] = lambda: 0.0,
) -> AsyncIterator[SolverPool]:
    pool = SolverPool(settings, start_process=partial(SolverProcess.start, command), clock=clock)
    pool.start()
    try:
        yield pool
    finally:
        await pool.stop()


def begin(
    pool: SolverPool, do: str, *, caller: str = "a", time_limit_s: float = FOREVER_S, **script: object
) -> PooledSearch:
    search = pool.reserve(caller)
    search.begin(json.dumps({"do": do, **script}).encode(), time_limit_s=time_limit_s)
    return search


async def all_news(search: PooledSearch) -> list[SearchEvent]:
    async with asyncio.timeout(30):
        return [news async for news in search.events()]


async def outcome(search: PooledSearch) -> Outcome:
    last = (await all_news(search))[-1]
    assert not isinstance(last, Begun | Progress)
    return last


async def begun(search: PooledSearch) -> None:
    async with asyncio.timeout(30):
        async for news in search.events():
            assert news is Begun.BEGUN
            return


async def heard(search: PooledSearch) -> None:
    """Wait until the process has reported progress: if it were killed before, the search would start again."""
    async with asyncio.timeout(30):
        async for news in search.events():
            if isinstance(news, Progress):
                return
    raise AssertionError("the search ended before it was heard")


async def test_a_search_is_told_when_it_begins_how_it_goes_and_how_it_ends() -> None:
    async with pool_of() as pool:
        assert await all_news(begin(pool, "find", document="the plan")) == [
            Begun.BEGUN,
            Progress(phase="pricing", elapsed_s=0.5, incumbent=1.0),
            FoundPlan(b"the plan", b""),
        ]


async def test_a_process_is_kept_for_the_next_search_and_replaced_after_some() -> None:
    async with pool_of(PoolSettings(searches_per_process=2)) as pool:
        first, second, third, fourth = [await outcome(begin(pool, "find")) for _ in range(4)]
    assert first == second != third == fourth  # each result holds its process id


async def test_processes_start_with_the_first_searches_or_when_none_has_come_for_a_while() -> None:
    async with pool_of(PoolSettings(num_processes=2, warm_up_after_s=FOREVER_S)) as pool:
        await asyncio.sleep(0.1)
        assert pool.pids == []
        assert isinstance(await outcome(begin(pool, "find")), FoundPlan)
        assert len(pool.pids) >= 1
    async with pool_of(PoolSettings(num_processes=2, warm_up_after_s=0.0)) as pool, asyncio.timeout(30):
        while len(pool.pids) < 2:
            await asyncio.sleep(0.01)


async def test_a_crashed_process_is_a_crashed_search_and_the_next_one_gets_a_new_process() -> None:
    async with pool_of() as pool:
        crashed, after = (
            await outcome(begin(pool, "die after saying something")),
            await outcome(begin(pool, "say infeasible")),
        )
    assert crashed == Crashed(
        exit_code=3, message="the solver process ended with exit code 3: MemoryError: no room for tables"
    )
    assert isinstance(after, InfeasibleError)
    assert after.reasons == ("too big",)


async def test_a_process_killed_while_it_searches_is_a_crash_with_its_signal() -> None:
    async with pool_of() as pool:
        search = begin(pool, "wait")
        await heard(search)
        os.kill(pool.pids[0], signal.SIGKILL)
        crashed, after = await outcome(search), await outcome(begin(pool, "find", document="p"))
    assert crashed == Crashed(-signal.SIGKILL, "the solver process was ended by SIGKILL")
    assert after == FoundPlan(b"p", b"")


async def test_a_process_killed_while_idle_costs_no_search() -> None:
    async with pool_of() as pool:
        await outcome(begin(pool, "find"))
        os.kill(pool.pids[0], signal.SIGKILL)
        assert await outcome(begin(pool, "find", document="p")) == FoundPlan(b"p", b"")


async def test_a_search_that_ends_two_processes_at_once_is_not_tried_a_third_time() -> None:
    async with pool_of() as pool:
        assert await outcome(begin(pool, "exit")) == Crashed(
            3, "the solver process ended with exit code 3: MemoryError: no room for tables"
        )


async def test_where_no_process_can_start_searches_say_why() -> None:
    async with pool_of(command=(*WORKER, "never-ready")) as pool:
        assert await outcome(begin(pool, "find")) == Crashed(
            1, "the solver process ended with exit code 1: ImportError: no solver here"
        )


async def test_a_running_search_that_is_called_off_answers_with_its_incumbent() -> None:
    async with pool_of() as pool:
        search = begin(pool, "wait")
        await begun(search)
        search.cancel()
        search.cancel()
        found = await outcome(search)
    assert isinstance(found, FoundPlan)
    assert found.document == b"incumbent"


async def test_a_waiting_search_that_is_called_off_never_begins() -> None:
    async with pool_of() as pool:
        running = begin(pool, "wait")
        await begun(running)
        waiting = begin(pool, "find")
        waiting.cancel()
        assert (await all_news(waiting), pool.num_waiting) == ([CalledOff()], 0)


async def test_a_search_that_does_not_hear_that_it_is_called_off_is_ended() -> None:
    async with pool_of(PoolSettings(grace_s=0.2)) as pool:
        search = begin(pool, "hang")
        await begun(search)
        search.cancel()
        assert (await outcome(search), await outcome(begin(pool, "find", document="p"))) == (
            CalledOff(),
            FoundPlan(b"p", b""),
        )


async def test_a_search_that_goes_on_after_its_time_limit_is_ended() -> None:
    async with pool_of(PoolSettings(grace_s=0.2)) as pool:
        assert await outcome(begin(pool, "hang", time_limit_s=0.1)) == Crashed(
            -signal.SIGKILL, "the solver process was ended by SIGKILL: did not answer within 0.2 s after its time limit"
        )


async def test_a_plan_whose_simulation_takes_too_long_is_answered_without() -> None:
    async with pool_of(PoolSettings(verification_s=0.2)) as pool:
        assert await outcome(begin(pool, "verify", time_limit_s=0.1)) == FoundPlan(b"not verified", b"")


async def test_a_full_queue_refuses_and_says_when_the_first_search_ends_at_the_latest() -> None:
    now_s = 100.0
    async with pool_of(PoolSettings(queue_size=1), clock=lambda: now_s) as pool:
        running = begin(pool, "wait", time_limit_s=60.0)
        await begun(running)
        begin(pool, "find")
        now_s = 115.0
        with pytest.raises(ServiceError) as refused:
            pool.reserve("a")
        pool.reserve("a", even_if_full=True).abandon()
        running.cancel()
        await outcome(running)
        pool.reserve("a")  # its place is free again
        error = refused.value
    assert error.reason == Reason.ERROR_REASON_SOLVER_QUEUE_FULL
    assert error.metadata == {"queued": "1"}
    assert error.retry_after_s == 45.0
    assert str(error) == "all 1 solver processes are busy and 1 searches wait"


async def test_two_processes_search_at_a_time() -> None:
    async with pool_of(PoolSettings(num_processes=2)) as pool:
        searches = [begin(pool, "wait") for _ in range(3)]
        for search in searches[:2]:
            await begun(search)
        assert pool.num_running == 2


def test_no_process_outlives_the_pool() -> None:
    async def scenario() -> list[int]:
        async with pool_of(PoolSettings(num_processes=2)) as pool:
            await begun(begin(pool, "hang"))
            return pool.pids

    for pid in asyncio.run(scenario()):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


async def test_callers_take_turns() -> None:
    async with pool_of(PoolSettings(queue_size=100)) as pool:
        first = begin(pool, "wait", caller="greedy")
        await begun(first)
        order = list[str]()

        async def note(caller: str, search: PooledSearch) -> None:
            await outcome(search)
            order.append(caller)

        searches = [("greedy", begin(pool, "find", caller="greedy")) for _ in range(5)]
        searches += [(caller, begin(pool, "find", caller=caller)) for caller in ("late", "later", "late")]
        assert pool.searches_of() == {
            "greedy": {"running": 1, "queued": 5},
            "late": {"running": 0, "queued": 2},
            "later": {"running": 0, "queued": 1},
        }
        notes = [asyncio.create_task(note(*each)) for each in searches]
        first.cancel()
        await asyncio.gather(*notes)
        assert order == ["greedy", "late", "later", "greedy", "late", "greedy", "greedy", "greedy"]


async def test_one_caller_cannot_take_all_processes_nor_the_queue() -> None:
    settings = PoolSettings(num_processes=2, queue_size=10, running_per_caller=1, queued_per_caller=2)
    async with pool_of(settings) as pool:
        greedy = [begin(pool, "wait", caller="greedy") for _ in range(3)]
        await begun(greedy[0])
        with pytest.raises(ServiceError) as refused:
            pool.reserve("greedy")
        assert refused.value.reason == Reason.ERROR_REASON_QUOTA_EXCEEDED
        assert refused.value.metadata == {"caller": "greedy", "quota": "searches", "limit": "3"}
        assert refused.value.retry_after_s == FOREVER_S
        assert isinstance(await outcome(begin(pool, "find", caller="modest")), FoundPlan)
        assert (pool.num_running, pool.num_waiting) == (1, 2)
        greedy[0].cancel()
        await begun(greedy[1])  # the caller's next search, when it may begin
        pool.reserve("greedy").abandon()


@pytest.mark.parametrize("is_called_off", [False, True])
async def test_compiling_kills_no_search_however_short_its_time_is(is_called_off: bool) -> None:
    async with pool_of(PoolSettings(grace_s=1.0)) as pool:
        search = begin(pool, "compile", time_limit_s=0.1, compile_s=1.5)
        if is_called_off:
            await begun(search)
            search.cancel()
        assert await outcome(search) == FoundPlan(str(is_called_off).encode(), b"")
