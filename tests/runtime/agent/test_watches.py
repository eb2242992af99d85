"""Streams of an engine's reports take little time from its steps, however many there are."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack, aclosing
from typing import Any

import grpc
import pytest

from hetis.runtime.moves.servicer import MOST_WATCHES, ExecutorServicer
from hetis.v1.executor_service_pb2 import WatchReportsRequest, WatchReportsResponse


class Engine:
    def __init__(self) -> None:
        self.num_reports = 0

    def report(self, now_s: float) -> WatchReportsResponse:
        self.num_reports += 1
        return WatchReportsResponse(engine_id="e", newest_epoch=self.num_reports)


class Host:
    """An engine between whose steps work waits until the test lets it happen."""

    def __init__(self) -> None:
        self.engine, self.boundary = Engine(), asyncio.Event()

    async def do(self, work: Callable[[Any, float], Any]) -> Any:
        await self.boundary.wait()
        return work(self.engine, 0.0)

    async def stepped(self) -> None:
        await self.boundary.wait()


class Context:
    """A call that was refused with a status."""

    status: Any = None

    async def abort_with_status(self, status: Any) -> None:
        self.status = status
        raise grpc.aio.AbortError


async def test_streams_that_wait_for_a_step_share_one_report() -> None:
    host = Host()
    servicer = ExecutorServicer(host)  # type: ignore[arg-type]
    async with AsyncExitStack() as stack:
        streams: list[Any] = [
            await stack.enter_async_context(aclosing(servicer.WatchReports(WatchReportsRequest(), Context())))  # type: ignore[arg-type, type-var]
            for _ in range(20)
        ]
        waiting = [asyncio.ensure_future(anext(stream)) for stream in streams]
        await asyncio.sleep(0)
        host.boundary.set()
        reports = await asyncio.gather(*waiting)
    assert {report.newest_epoch for report in reports} == {1}
    assert host.engine.num_reports == 1


async def test_streams_beyond_the_limit_are_refused_until_another_ends() -> None:
    host = Host()
    host.boundary.set()
    servicer = ExecutorServicer(host)  # type: ignore[arg-type]
    streams: list[Any] = [servicer.WatchReports(WatchReportsRequest(), Context()) for _ in range(MOST_WATCHES)]  # type: ignore[arg-type]
    for stream in streams:
        await anext(stream)
    context = Context()
    more: Any = servicer.WatchReports(WatchReportsRequest(), context)  # type: ignore[arg-type]
    with pytest.raises(grpc.aio.AbortError):
        await anext(more)
    assert context.status.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    await streams.pop().aclose()
    another: Any = servicer.WatchReports(WatchReportsRequest(), Context())  # type: ignore[arg-type]
    await anext(another)
    for stream in [*streams, another]:
        await stream.aclose()
