"""The status page over HTTP."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from hetis.planner.fleet.views import LiveReplica
from hetis.planner.service.observability.metrics import LOOK_S, ServiceMetrics
from hetis.planner.service.observability.overview import ClusterNow, Overview
from hetis.planner.service.observability.status_html import status_html
from hetis.planner.service.server import AddressError
from hetis.planner.service.status_page import PageLimits, Recent, StatusPage, status_app
from hetis.v1 import cluster_pb2, redispatch_pb2, replica_pb2, report_pb2
from tests.planner.html_pages import ReadPage
from tests.planner.resources.served import live_node
from tests.planner.service.fakes import FakePlanner


async def ask(
    address: str, path: str, method: str = "GET", called: str = "localhost", accept: str = "*/*"
) -> tuple[int, dict[str, str], str]:
    host, port = address.rsplit(":", 1)
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(
        f"{method} {path} HTTP/1.1\r\nHost: {called}\r\nAccept: {accept}\r\nConnection: close\r\n\r\n".encode()
    )
    head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
    writer.close()
    status, *lines = head.split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return int(status.split()[1]), headers, body


async def page(
    is_ready: bool = True,
    limits: PageLimits | None = None,
    failures: Sequence[str] = (),
    hosts: Sequence[str] = (),
    clusters: Sequence[ClusterNow] = (),
) -> tuple[StatusPage, str]:
    made = StatusPage(limits)
    address = made.listen("127.0.0.1:0")
    planner = FakePlanner()
    planner.clusters += clusters
    app = status_app(
        planner,
        ServiceMetrics("1.2"),
        version="1.2",
        is_ready=lambda: is_ready,
        failures=lambda: failures,
        hosts=hosts,
    )
    await made.start(app)
    return made, address


async def test_no_library_that_is_installed_takes_a_connection_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """uvicorn would hand connections to any installed WebSocket library, where they are neither counted nor limited."""
    taken = list[object]()
    monkeypatch.setattr("uvicorn.protocols.websockets.auto.AutoWebSocketsProtocol", lambda **_: taken.append(1))

    served, address = await page()
    host, port = address.rsplit(":", 1)
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    writer.write_eof()
    answer = await reader.read()
    writer.close()
    await served.stop()
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert taken == []


async def test_the_page_shows_the_planner_and_its_clusters() -> None:
    served, address = await page()
    answers = [await ask(address, path) for path in ("/", "/clusters/c", "/clusters/d", "/nothing")]
    await served.stop()
    planner, cluster, missing, nothing = answers
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
        "clusters": [
            {
                "name": "clusters/c",
                "active_plan": "plans/p",
                "activation": "ACTIVATING",
                "nodes": {"READY": 2, "LOST": 1},
                "replicas": {"SERVING": 3, "FAILED": 1},
            }
        ],
        "plans": {"SOLVING": 1},
        "solver": {"processes": 2, "searching": 1, "queued": 4},
    }
    assert json.loads(cluster[2]) == {"cluster": {"name": "clusters/c"}}
    assert (missing[0], json.loads(missing[2])) == (404, {"error": "clusters/d does not exist"})
    assert nothing[0] == 404


BROWSER = "text/html,application/xhtml+xml,*/*;q=0.8"


async def test_browsers_get_a_page_and_programs_json() -> None:
    """The page depends on the requested path, and its policy allows only its own script and its own server."""
    served, address = await page(clusters=[running_cluster(), running_cluster("clusters/<b>")])
    answers = [await ask(address, path, accept=BROWSER) for path in ("/", "/clusters/c", "/clusters/d")]
    plain = await ask(address, "/", accept="*/*")
    strange = await ask(address, "/", called="evil.example", accept=BROWSER)
    await served.stop()
    (first, one, missing), plain, strange = answers, plain, strange
    assert (first[0], one[0], missing[0], strange[0]) == (200, 200, 404, 421)
    assert plain[1]["content-type"] == "application/json"
    assert plain[1]["vary"] == first[1]["vary"] == "accept"
    assert first[1]["content-type"].startswith("text/html")
    assert first[1]["cache-control"] == "no-store"
    policy = first[1]["content-security-policy"]
    assert {"default-src 'none'", "connect-src 'self'", "frame-ancestors 'none'"} <= set(policy.split("; "))
    script = first[2].partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode().lower()
    assert f"script-src 'sha256-{digest}'" in policy.split("; ")
    assert "<b>" not in first[2].replace("<b>R0", "")
    read = ReadPage(one[2])
    assert "Cluster c" in read.text
    assert "This planner" not in read.text, "of the one cluster alone"


@pytest.mark.parametrize("path", ["/", "/clusters/c", "/metrics"])
async def test_many_who_ask_at_once_get_an_answer_that_is_made_once(path: str) -> None:
    """In the past each connection, which needs no credentials, had its own, which stalled the planner for seconds."""
    planner, is_ready = FakePlanner(), True
    planner.clusters.append(running_cluster())
    served = StatusPage()
    address = served.listen("127.0.0.1:0")
    app = status_app(planner, ServiceMetrics("1"), version="1", is_ready=lambda: is_ready, fresh_s=3600.0)
    await served.start(app)
    answers = await asyncio.gather(*(ask(address, path, accept=BROWSER) for _ in range(40)))
    assert {answer[0] for answer in answers} == {200}
    assert len({answer[2] for answer in answers}) == 1
    assert planner.num_overviews == 1
    planner.leads = False
    await ask(address, path, accept=BROWSER)
    is_ready = False
    await ask(address, path, accept=BROWSER)
    await served.stop()
    assert planner.num_overviews == 3, "a change of role or readiness shows at once"


async def test_answers_are_made_one_at_a_time_and_kept_for_a_second() -> None:
    now_s, num_running, made = 0.0, 0, list[str]()
    recent = Recent[str](clock=lambda: now_s)

    async def make(name: str) -> str:
        nonlocal num_running
        num_running += 1
        assert num_running == 1
        await asyncio.sleep(0)
        num_running -= 1
        made.append(name)
        return name

    async def ask_for(*names: str) -> None:
        answers = await asyncio.gather(*(recent.of(name, partial(make, name)) for name in names))
        assert answers == list(names)

    await ask_for("a", "b", "a", "b")
    assert made == ["a", "b"]
    now_s = 0.9
    await ask_for("a")
    assert made == ["a", "b"]
    now_s = 1.0
    await ask_for("a", "a", "b")
    assert made == ["a", "b", "a", "b"]

    async def fail() -> str:
        raise ValueError("no answer")

    for _ in range(2):  # an error is not kept
        with pytest.raises(ValueError, match="no answer"):
            await recent.of("c", fail)
    await ask_for("c")


def test_the_page_shows_what_runs_as_it_is_now() -> None:
    """Replicas with their states, the devices with their KV, a re-dispatch in progress; the store is not read."""
    text = ReadPage(status_html(OVERVIEW, [running_cluster()], version="1", is_ready=True)).text
    for words in (
        "degraded, moving heads", "7 running", "2 waiting", "KV 75%",
        "the makespan is 156% above the ideal, more than 50%", "preparing",
        "844 us → 367 us", "1 lost", "epoch 3", "2.0 GiB",
    ):  # fmt: skip
        assert words in text, words
    away = replace(OVERVIEW, store_answered_s_ago=12.0)
    assert "last response 12.0 s ago" in ReadPage(status_html(away, [], version="1", is_ready=False)).text
    standby = ReadPage(status_html(replace(OVERVIEW, leads=False, leader="b:7"), [], version="1", is_ready=True)).text
    assert "This planner is on standby. The page of the leader (b:7) shows what is running." in standby


def test_a_large_fleet_has_a_page_of_bounded_size() -> None:
    kv = {f"n{i}/0": (i % 100) / 100 for i in range(2_000)}
    nodes = {f"clusters/c/nodes/n{i}": live_node(heard_time_s=1.0) for i in range(2_000)}
    html = status_html(OVERVIEW, [replace(running_cluster(), kv=kv, nodes=nodes)], version="1", is_ready=True)
    assert len(html) < 400_000
    assert "1,964 more nodes" in ReadPage(html).text


OVERVIEW = Overview(epoch=3, leader_since_s=1_800_000_000.0, num_plans={}, queued=0, searching=0, solver_processes=1)


def running_cluster(name: str = "clusters/c") -> ClusterNow:
    """A replica of one stage with a fuller attention worker on another node; a third node is lost."""
    shape = replica_pb2.ReplicaPlan(
        rate_rps=1.0, ttft_s=1.0, tpot_s=0.1, micro_batch=4, in_flight=1, chunk_tokens=512, kv_tokens=1_000,
        stages=[
            replica_pb2.StagePlan(
                gpu_type="A100", tp=1, copies=1, num_layers=80, devices=["a/0"], kv_head_groups_kept=5
            )
        ],
        attention_workers=[
            replica_pb2.AttentionWorkerPool(gpu_type="P100", devices=["w/0"], kv_head_groups=3)
        ],
    )  # fmt: skip
    replica = LiveReplica(
        name=f"{name}/replicas/r", plan="plans/p",
        state=replica_pb2.REPLICA_STATE_DEGRADED, generation=4,
        primary_node="a", shape=shape, stages=(),
        conditions={}, report=report_pb2.ReplicaReport(num_running=7, num_waiting=2), report_time_s=1.0,
        redispatch=f"{name}/redispatches/1",
    )  # fmt: skip
    moved = redispatch_pb2.Redispatch(
        name=f"{name}/redispatches/1", replica=f"{name}/replicas/r", num_moves=12, kv_bytes=2 * 2**30,
        makespan_before_s=844e-6, makespan_after_s=367e-6, state=redispatch_pb2.REDISPATCH_STATE_PREPARING,
        triggers=[redispatch_pb2.RedispatchTrigger(kind=redispatch_pb2.TRIGGER_KIND_DEVIATION, value=1.56, limit=0.5)],
    )  # fmt: skip
    moved.create_time.FromSeconds(1_003)
    ready, lost = cluster_pb2.NODE_STATE_READY, cluster_pb2.NODE_STATE_LOST
    return ClusterNow(
        name=name,
        nodes={
            f"{name}/nodes/{node}": live_node(state=lost if node == "x" else ready, heard_time_s=1.0) for node in "awx"
        },
        replicas=[replica], redispatches=[moved], kv={"a/0": 0.6, "w/0": 0.75}, high_water=0.8, now_s=1_005.0,
    )  # fmt: skip


async def test_metrics_are_read_by_prometheus() -> None:
    from prometheus_client.parser import text_string_to_metric_families

    served, address = await page()
    _, headers, body = await ask(address, "/metrics")
    await served.stop()
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(body)
        for sample in family.samples
    }
    assert samples["hetis_planner_info", "1.2"] == 1
    assert samples["hetis_planner_epoch",] == 3
    assert samples["hetis_planner_nodes", "READY", "clusters/c"] == 2
    assert samples["hetis_planner_replicas", "FAILED", "clusters/c"] == 1
    assert samples["hetis_planner_activation", "ACTIVATING", "clusters/c"] == 1
    assert samples["hetis_desired_replicas", "2xL4", "clusters/c"] == 3
    assert samples["hetis_planner_plans", "SOLVING"] == 1
    assert samples["hetis_planner_searches_queued",] == 4


async def test_metrics_say_how_late_the_loop_was_at_worst_in_the_last_minute() -> None:
    """A scrape does not reset it: of two Prometheus servers, each would hide from the other what it has read."""
    metrics, now_s = ServiceMetrics("1"), 0.0
    lags_s = iter([0.0, 1.5, 0.25, 0.25, 40.0, 0.5, *[0.0] * 75, 0.5, *[0.0] * 300])
    known = [(0.0, 0.0)]  # times and delays

    async def sleep(_: float) -> None:
        nonlocal now_s
        worst_s = max(lag_s for time_s, lag_s in known if time_s > now_s - 60)
        for _ in range(2):
            assert f"hetis_planner_loop_lag_seconds {worst_s}\n" in metrics.text().decode()
        lag_s = next(lags_s, None)
        if lag_s is None:
            raise asyncio.CancelledError
        now_s += LOOK_S + lag_s
        known.append((now_s, lag_s))

    with pytest.raises(asyncio.CancelledError):
        await metrics.watch_loop(clock=lambda: now_s, sleep=sleep)
    assert {lag_s for _, lag_s in known} == {0.0, 0.25, 0.5, 1.5, 40.0}


def test_metrics_say_when_credentials_expire() -> None:
    metrics = ServiceMetrics("1")
    metrics.credentials_read(tokens_s=[30.0, 20.0, 5.0], certificates_s={"a.pem": 40.0}, now_s=10.0)
    text = metrics.text()
    assert b"hetis_planner_token_expiry_seconds 20.0" in text
    assert b"hetis_planner_tokens_expired 1.0" in text
    assert b'hetis_planner_certificate_expiry_seconds{file="a.pem"} 40.0' in text
    assert b"process_resident_memory_bytes" in metrics.text()


async def test_metrics_say_when_the_newest_backup_was_made(tmp_path: Path) -> None:
    name = f'hetis_planner_backup_seconds{{folder="{tmp_path}"}}'

    async def shown() -> str:
        metrics = ServiceMetrics("1")
        assert name not in metrics.text().decode()  # without a folder, no alert
        watching = asyncio.create_task(metrics.watch_backups(str(tmp_path), 60.0))
        while name not in metrics.text().decode():
            await asyncio.sleep(0.01)
        watching.cancel()
        return metrics.text().decode().partition(f"{name} ")[2].partition("\n")[0]

    assert await shown() == "0.0"
    for number, file in enumerate(("one.db", "two.db", ".two.db.7.tmp")):
        (tmp_path / file).touch()
        os.utime(tmp_path / file, (1000.0 + number, 1000.0 + number))
    assert await shown() == "1001.0"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
async def test_nothing_can_be_changed(method: str) -> None:
    served, address = await page()
    for path in ("/", "/clusters/c", "/metrics", "/healthz", "/readyz", "/leaderz"):
        assert (await ask(address, path, method))[0] == 405
    await served.stop()


@pytest.mark.parametrize(("is_ready", "status"), [(True, 200), (False, 503)])
async def test_readiness_ends_with_the_drain_and_liveness_does_not(is_ready: bool, status: int) -> None:
    served, address = await page(is_ready)
    assert (await ask(address, "/readyz"))[0] == status
    assert (await ask(address, "/healthz"))[0] == 200
    await served.stop()


@pytest.mark.parametrize(("leads", "is_ready", "status"), [(True, True, 200), (True, False, 503), (False, True, 503)])
async def test_one_path_answers_for_the_leader_alone(leads: bool, is_ready: bool, status: int) -> None:
    planner, served = FakePlanner(), StatusPage()
    planner.leads = leads
    address = served.listen("127.0.0.1:0")
    await served.start(status_app(planner, ServiceMetrics("1"), version="1", is_ready=lambda: is_ready))
    assert (await ask(address, "/leaderz"))[0] == status
    await served.stop()


async def test_an_address_in_use_is_an_error() -> None:
    served, address = await page()
    with pytest.raises(AddressError, match=f"cannot listen on {address}: address already in use"):
        StatusPage().listen(address)
    await served.stop()


def test_metrics_count_what_has_failed() -> None:
    metrics, failures = ServiceMetrics("0"), ["the re-dispatch loop"]
    assert b"hetis_planner_failed_loops 0.0" in metrics.text()
    metrics.failed_loops.set_function(lambda: len(failures))
    assert b"hetis_planner_failed_loops 1.0" in metrics.text()


async def test_a_loop_that_failed_makes_health_red() -> None:
    served, address = await page(failures=["the re-dispatch loop"])
    status, _, body = await ask(address, "/healthz")
    assert (status, body) == (503, "failed: the re-dispatch loop; restart the planner\n")
    await served.stop()
