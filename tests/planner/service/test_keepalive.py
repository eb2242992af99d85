"""Connections stay open while they are silent, with the keepalive that docs/api.md prescribes for clients."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import grpc
import pytest
from grpc._cython import cygrpc

from hetis.planner.client.connection import CHANNEL_OPTIONS, SEVERAL_OPTIONS
from hetis.planner.service import server
from hetis.runtime.agent.options import OPTIONS as OPTIONS_OF_AGENTS
from hetis.v1 import plan_service_pb2 as plans
from hetis.v1.plan_service_pb2_grpc import PlanServiceStub
from tests.faults.proxy import Proxy
from tests.planner.service.serving import served

ROOT = Path(__file__).parents[3]
_OPTION = re.compile(r"[\"'`](grpc\.[a-z0-9_.]+?)(?:=\d+)?[\"'`]")
FASTER = 27  # factor by which all intervals are shortened: gRPC itself pings at most once a second
SILENCE_S = 5.0  # four pings; the third one too many would end the connection


def test_every_channel_argument_exists_in_the_installed_grpc() -> None:
    """gRPC ignores unknown names, so that no error reveals a misspelt one."""
    library = Path(cygrpc.__file__).read_bytes()
    sources = [path for top in ("planner", "runtime", "benchmarks") for path in (ROOT / top).rglob("*.py")]
    used = {
        (name, str(path.relative_to(ROOT)))
        for path in [*sources, ROOT / "docs" / "api.md"]
        if "_pb2" not in path.name
        for name in _OPTION.findall(path.read_text(encoding="utf-8"))
    }
    assert ("grpc.keepalive_time_ms", "docs/api.md") in used
    assert ("grpc.max_concurrent_streams", "planner/hetis/planner/service/server.py") in used
    assert {(name, path) for name, path in used if name.encode() + b"\0" not in library} == set()


def test_a_ping_is_waited_for_as_long_as_is_said_everywhere() -> None:
    """The longer of two limits counts, and the second one is a minute unless it is set, too."""
    limits = dict[str, dict[str, int]]()
    for options in (server.OPTIONS, CHANNEL_OPTIONS, SEVERAL_OPTIONS, OPTIONS_OF_AGENTS):
        limits[str(options)] = {name: int(value) for name, value in options if name.endswith("_timeout_ms")}
    for found in limits.values():
        assert found["grpc.http2.ping_timeout_ms"] == found["grpc.keepalive_timeout_ms"] <= 20_000


def test_a_leader_that_stands_still_is_left_by_watches_as_soon_as_by_agents() -> None:
    """In the past a watch showed for 40 s what was last seen of a search that another planner did again meanwhile."""
    until_left_ms = [
        sum(int(found[f"grpc.keepalive_{limit}_ms"]) for limit in ("time", "timeout"))
        for found in (dict(SEVERAL_OPTIONS), dict(OPTIONS_OF_AGENTS))
    ]
    assert until_left_ms == [15_000, 15_000]


@pytest.mark.parametrize("prescribed", [CHANNEL_OPTIONS, SEVERAL_OPTIONS], ids=["one planner", "several planners"])
async def test_a_planner_that_stands_still_is_left(prescribed: tuple[tuple[str, int | str], ...]) -> None:
    """The peer's machine acknowledges every byte, so that no timeout of TCP ends the connection."""
    async with served() as planner:
        host, port = planner.address.split(":")
        with Proxy((host, int(port))) as proxy:
            options = [
                (name, value // FASTER if isinstance(value, int) and name.endswith("_ms") else value)
                for name, value in prescribed
            ]
            options.append(("grpc.use_local_subchannel_pool", 1))
            async with grpc.aio.insecure_channel(":".join(map(str, proxy.address)), options) as channel:
                watch = PlanServiceStub(channel).WatchPlan(plans.WatchPlanRequest(name="plans/p"))
                await watch.read()
                proxy.freeze()
                async with asyncio.timeout(40):
                    while not watch.done():
                        await asyncio.wait({asyncio.ensure_future(watch.read())})
                assert await watch.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_watch_on_which_nothing_happens_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def faster(options: tuple[tuple[str, int | str], ...]) -> list[tuple[str, int | str]]:
        return [
            (
                name,
                value // FASTER
                if isinstance(value, int) and re.search("keepalive_time_|ping_interval", name)
                else value,
            )
            for name, value in options
        ]

    monkeypatch.setattr(server, "OPTIONS", faster(server.OPTIONS))
    async with served() as planner:
        options = [*faster(CHANNEL_OPTIONS), ("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(planner.address, options) as channel:
            watch = PlanServiceStub(channel).WatchPlan(plans.WatchPlanRequest(name="plans/p"))
            await watch.read()
            following = asyncio.create_task(watch.read())
            done, _ = await asyncio.wait({following}, timeout=SILENCE_S)
            assert not done, watch
            planner.planner.plans.hub.close()
            assert await following is grpc.aio.EOF
