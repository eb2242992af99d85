"""Connections to the page are few, end in time, and reach known hosts only."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket

import pytest

from hetis.planner.service.limits import raise_descriptors, reserved_for_page
from hetis.planner.service.status_page import PageLimits
from tests.planner.service.status_page.test_status_page import ask, page


@pytest.mark.parametrize(
    ("called", "status"),
    [
        ("127.0.0.1:8471", 200),
        ("[::1]:8471", 200),
        ("LOCALHOST", 200),
        ("planner.example:80", 200),
        ("evil.example", 421),
        ("evil.example:8471", 421),
        ("127.0.0.1.evil.example", 421),
        ("[evil.example]", 421),
    ],
)
async def test_only_known_hosts_are_answered(called: str, status: int) -> None:
    served, address = await page(hosts=["planner.example"])
    for path in ("/", "/metrics", "/healthz", "/nothing"):
        found = (await ask(address, path, called=called))[0]
        assert found == (404 if status == 200 and path == "/nothing" else status)
    await served.stop()


async def until_closed(reader: asyncio.StreamReader) -> bytes:
    """Return what arrived before the other side closed or reset the connection."""
    try:
        return await reader.read()
    except ConnectionResetError:
        return b""


async def test_idle_connections_are_few_and_end() -> None:
    """Connections above the limit end at once, and silent ones after a while; every request is answered."""
    served, address = await page(limits=PageLimits(of_all=6, of_a_peer=4, request_s=0.2))
    host, port = address.rsplit(":", 1)
    idle = [await asyncio.open_connection(host, int(port)) for _ in range(4)]
    idle[0][1].write(b"GET / HTTP/1.1\r\nHost: local")
    refused_reader, refused_writer = await asyncio.open_connection(host, int(port))
    for reader, writer in [(refused_reader, refused_writer), *idle]:
        assert await until_closed(reader) == b""
        writer.close()
    assert (await ask(address, "/healthz"))[0] == 200
    await served.stop()


async def test_who_does_not_read_the_answers_does_not_keep_the_page_from_others() -> None:
    served, address = await page(limits=PageLimits(of_all=1, of_a_peer=1, request_s=30.0, answer_s=0.3))
    host, port = address.rsplit(":", 1)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        client.setblocking(False)
        await asyncio.get_running_loop().sock_connect(client, (host, int(port)))
        asked = 0
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while asked < 20_000:  # answers pile up until the page has to wait for the reader
                asked += client.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n") > 0
                await asyncio.sleep(0)
        status = 0
        while status != 200:  # would loop forever if that connection were kept
            await asyncio.sleep(0.1)
            with contextlib.suppress(OSError, EOFError, ValueError, IndexError):
                status = (await ask(address, "/healthz"))[0]
    await served.stop()


def test_the_page_takes_a_part_of_all_descriptors_and_all_are_asked_for() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, before[1]), before[1]))
        assert raise_descriptors(1) == before[1] == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert reserved_for_page(1024) == 128
    assert reserved_for_page(1 << 20) == 256
