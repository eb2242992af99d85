"""What is said while the server starts."""

from __future__ import annotations

import asyncio
import logging

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from hetis.runtime.server.options import bound_socket
from hetis.runtime.server.running import answering
from hetis.runtime.server.starting import Door, Starting


def test_clients_and_probes_are_told_what_they_wait_for_until_the_door_opens() -> None:
    now_s = [5.0]
    starting = Starting(clock=lambda: now_s[0])
    door = Door(starting)
    app = Starlette(routes=[Route("/health", lambda request: PlainTextResponse("served"))])

    async def work(listening: httpx.URL) -> None:
        async with httpx.AsyncClient(base_url=listening, timeout=60) as client:
            probe = await client.get("/health")
            assert (probe.status_code, probe.headers["Retry-After"]) == (503, "5")
            assert probe.json() == {"status": "starting", "reason": "the server is starting"}
            with starting.phase("reading the model"):
                now_s[0] += 12
                why = "the server is starting: reading the model (12 s so far)"
                assert (await client.get("/health")).json() == {"status": "starting", "reason": why}
                refused = await client.post("/v1/completions", json={"prompt": "x"})
            assert refused.status_code == 503
            assert refused.json()["error"] == {
                "message": why,
                "type": "server_error",
                "param": None,
                "code": "starting",
            }
            door.open(app)
            assert (await client.get("/health")).text == "served"

    async def serve() -> None:
        with bound_socket("127.0.0.1", 0, write_s=5) as listening:
            async with answering(door, listening):
                await work(httpx.URL(f"http://127.0.0.1:{listening.getsockname()[1]}"))

    asyncio.run(serve())


def test_the_log_says_what_is_done_and_how_long_it_took(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    now_s = [0.0]
    starting = Starting(clock=lambda: now_s[0])
    with starting.phase("compiling the dispatcher, once on this machine"):
        now_s[0] += 71.4
    with starting.phase("timing the devices"):
        now_s[0] += 0.2
    assert caplog.messages == [
        "starting: compiling the dispatcher, once on this machine",
        "starting: compiling the dispatcher took 71 s",
        "starting: timing the devices",
    ]
