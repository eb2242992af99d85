"""The status page over HTTP."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from hetis.planner.service.metrics import Metrics
from hetis.planner.service.server import AddressError
from hetis.planner.service.status_page import StatusPage, status_app
from tests.planner.service.fakes import FakePlanner
from tests.planner.service.serving import run


async def ask(address: str, path: str, method: str = "GET") -> tuple[int, dict[str, str], str]:
    host, port = address.rsplit(":", 1)
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
    writer.close()
    status, *lines = head.split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return int(status.split()[1]), headers, body


async def page(is_ready: bool = True) -> tuple[StatusPage, str]:
    made = StatusPage()
    address = made.listen("127.0.0.1:0")
    await made.start(status_app(FakePlanner(), Metrics("1.2"), version="1.2", is_ready=lambda: is_ready))
    return made, address


def test_the_page_shows_the_planner_and_its_clusters() -> None:
    async def test() -> Any:
        served, address = await page()
        answers = [await ask(address, path) for path in ("/", "/clusters/c", "/clusters/d", "/nothing")]
        await served.stop()
        return answers

    planner, cluster, missing, nothing = run(test)
    assert planner[0] == 200
    assert planner[1]["content-type"] == "application/json"
    assert json.loads(planner[2]) == {
        "planner": {
            "version": "1.2",
            "ready": True,
            "role": "leader",
            "leader": "",
            "epoch": 3,
            "leader_since": "2027-01-15T08:00:00+00:00",
            "lease_age_s": 0.0,
        },
        "store": {"answered_s_ago": 0.0, "counted_s_ago": 0.0},
        "clusters": [{"name": "clusters/c", "active_plan": "plans/p", "nodes": {"READY": 2, "LOST": 1}}],
        "plans": {"SOLVING": 1},
        "solver": {"processes": 2, "searching": 1, "queued": 4},
    }
    assert json.loads(cluster[2]) == {"cluster": {"name": "clusters/c"}}
    assert (missing[0], json.loads(missing[2])) == (404, {"error": "clusters/d does not exist"})
    assert nothing[0] == 404


def test_metrics_are_read_by_prometheus() -> None:
    from prometheus_client.parser import text_string_to_metric_families

    async def test() -> str:
        served, address = await page()
        _, headers, body = await ask(address, "/metrics")
        await served.stop()
        assert headers["content-type"].startswith("text/plain; version=0.0.4")
        return body

    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(run(test))
        for sample in family.samples
    }
    assert samples["hetis_planner_info", "1.2"] == 1
    assert samples["hetis_planner_epoch",] == 3
    assert samples["hetis_planner_nodes", "READY", "clusters/c"] == 2
    assert samples["hetis_planner_plans", "SOLVING"] == 1
    assert samples["hetis_planner_searches_queued",] == 4


def test_metrics_say_how_late_the_loop_was_at_worst_since_the_last_scrape() -> None:
    metrics, now_s, sleeps = Metrics("1"), 0.0, iter([0.25, 1.75, 0.5])

    async def sleep(_: float) -> None:
        nonlocal now_s
        step_s = next(sleeps, None)
        if step_s is None:
            raise asyncio.CancelledError
        now_s += step_s

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(metrics.watch_loop(clock=lambda: now_s, sleep=sleep))
    assert b"hetis_planner_loop_lag_seconds 1.5" in metrics.text()
    assert b"hetis_planner_loop_lag_seconds 0.0" in metrics.text()
    metrics.tokens_read([30.0, 20.0])
    assert b"hetis_planner_token_expiry_seconds 20.0" in metrics.text()
    assert b"process_resident_memory_bytes" in metrics.text()


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_nothing_can_be_changed(method: str) -> None:
    async def test() -> None:
        served, address = await page()
        for path in ("/", "/clusters/c", "/metrics", "/healthz", "/readyz"):
            assert (await ask(address, path, method))[0] == 405
        await served.stop()

    run(test)


@pytest.mark.parametrize(("is_ready", "status"), [(True, 200), (False, 503)])
def test_readiness_ends_with_the_drain_and_liveness_does_not(is_ready: bool, status: int) -> None:
    async def test() -> None:
        served, address = await page(is_ready)
        assert (await ask(address, "/readyz"))[0] == status
        assert (await ask(address, "/healthz"))[0] == 200
        await served.stop()

    run(test)


def test_an_address_in_use_is_an_error() -> None:
    async def test() -> None:
        served, address = await page()
        with pytest.raises(AddressError, match=f"cannot listen on {address}: address already in use"):
            StatusPage().listen(address)
        await served.stop()

    run(test)
