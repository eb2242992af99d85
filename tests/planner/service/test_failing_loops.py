"""A loop of the planner that fails makes its health red."""

from __future__ import annotations

import asyncio

from grpc_health.v1 import health_pb2, health_pb2_grpc

from hetis.planner.service.loops import Loops
from hetis.planner.service.running import show_failure
from tests.planner.service.serving import run, served


def test_a_loop_that_fails_is_named_and_one_that_is_stopped_is_not() -> None:
    async def test() -> None:
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

    run(test)


def test_health_says_that_nothing_serves_once_something_has_failed() -> None:
    async def test() -> None:
        async with served() as planner:
            stub = health_pb2_grpc.HealthStub(planner.channel)
            showing = asyncio.create_task(show_failure(planner.planner, planner.server))
            watch = stub.Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            planner.planner.failed.set()
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            await showing

    run(test)
