"""Connections to the gRPC port: no host takes up all of them, and idle connections do not keep others out."""

from __future__ import annotations

import asyncio
import resource
import socket
import struct
from contextlib import AsyncExitStack, ExitStack

import grpc
import pytest

from hetis.planner.service.limits import MOST_OF_A_CALLER, ConnectionLimits, ConnectionWatch, ports_of
from hetis.v1 import plan_service_pb2 as plans
from hetis.v1.plan_service_pb2_grpc import PlanServiceStub
from tests.planner.service.serving import channel_to, served

HOSTS = ("127.0.0.2", "127.0.0.3")  # all of 127.0.0.0/8 is this machine


def connected(address: str, host: str) -> socket.socket:
    name, _, port = address.rpartition(":")
    return socket.create_connection((name, int(port)), timeout=10, source_address=(host, 0))


def settings_of(one: socket.socket) -> dict[int, int]:
    """Return the settings of HTTP/2 that a server sends before anything is sent to it."""
    one.settimeout(10)
    found = b""
    while len(found) < 9 or len(found) < 9 + int.from_bytes(found[:3], "big"):
        found += one.recv(4096)
    content = found[9 : 9 + int.from_bytes(found[:3], "big")]
    return dict(struct.iter_unpack(">HI", content))


async def test_a_connection_has_room_for_the_watches_of_a_caller_and_not_for_much_more() -> None:
    """Strangers made a planner 1.9 GiB larger by calls with large metadata, and 550 MiB by calls that they reset."""
    async with served() as planner:
        with connected(planner.address, HOSTS[0]) as one:
            settings = await asyncio.to_thread(settings_of, one)
    max_streams, max_metadata = settings[3], settings[6]
    assert MOST_OF_A_CALLER < max_streams < 2 * MOST_OF_A_CALLER
    assert max_metadata == 4096


def is_closed(one: socket.socket) -> bool:
    """Return whether the other side has closed the connection, after reading gRPC's first bytes."""
    one.setblocking(False)
    try:
        while one.recv(4096):
            pass
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


async def served_still(channel: grpc.aio.Channel) -> bool:
    answer = await PlanServiceStub(channel).GetPlan(plans.GetPlanRequest(name="plans/p"), timeout=10)
    return answer.plan.name == "plans/p"


async def test_the_newest_connections_of_a_host_that_has_too_many_are_closed() -> None:
    async with served() as planner:
        closed = list[int]()
        limits = ConnectionLimits(of_all=100, of_a_host=3)
        watch = ConnectionWatch(limits, ports_of([planner.address]), on_closed=closed.append)
        assert await served_still(planner.channel)
        with ExitStack() as stack:
            first = [stack.enter_context(connected(planner.address, HOSTS[0])) for _ in range(3)]
            other = stack.enter_context(connected(planner.address, HOSTS[1]))
            await until_accepted(watch, 5)
            assert not any(closed)
            late = [stack.enter_context(connected(planner.address, HOSTS[0])) for _ in range(4)]
            await until_closed(watch, late)
            assert sum(closed) == 4
            assert not any(map(is_closed, [*first, other]))
            assert await served_still(planner.channel)


async def until_accepted(watch: ConnectionWatch, num: int) -> None:
    """gRPC accepts connections in its own threads; nothing is closed meanwhile."""
    async with asyncio.timeout(20):
        while watch.look() < num:
            await asyncio.sleep(0.01)


async def until_closed(watch: ConnectionWatch, found: list[socket.socket]) -> None:
    async with asyncio.timeout(20):
        while not all(map(is_closed, found)):
            watch.look()
            await asyncio.sleep(0.01)


async def test_no_more_connections_are_taken_than_the_descriptors_allow() -> None:
    async with served(max_connections=4) as planner, AsyncExitStack() as stack:
        assert await served_still(planner.channel)
        idle = [stack.enter_context(connected(planner.address, HOSTS[0])) for _ in range(12)]
        async with asyncio.timeout(20):
            while sum(map(is_closed, idle)) < 9:
                await asyncio.sleep(0.01)
        assert await served_still(planner.channel)
        for one in idle:
            one.close()
        async with asyncio.timeout(20), channel_to(planner.address) as another:
            await another.channel_ready()  # gRPC notices only after a while that they are closed
            assert await served_still(another)


@pytest.mark.parametrize(
    ("descriptors", "asked", "of_all", "of_a_host"),
    [
        (20_000, None, 15_000, 3_750),
        (20_000, 100, 15_000, 100),
        (1_024, 10_000, 768, 768),
        (resource.RLIM_INFINITY, None, 750_000, 187_500),
    ],
)
def test_limits_follow_the_descriptors(descriptors: int, asked: int | None, of_all: int, of_a_host: int) -> None:
    found = ConnectionLimits.of_descriptors(descriptors, of_a_host=asked)
    assert (found.of_all, found.of_a_host) == (of_all, of_a_host)
