"""Clients, sync and aio, over a real channel: deadlines, ids, retries, errors with details, watches that resume."""

from __future__ import annotations

import asyncio
import json
import queue
import re
import subprocess
import sys
import uuid
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import code_pb2

from examples.processes import free_ports
from hetis.planner.client import CallError, Client, Connection
from hetis.planner.client.connection import SERVICE_CONFIG
from hetis.v1 import (
    cluster_pb2,
    cluster_service_pb2,
    plan_pb2,
    plan_service_pb2,
)
from tests.planner.client.either import EITHER, Kind, done, items, opened
from tests.planner.client.fake_planner import FakePlanner, ready, refuse, searching

ROOT = Path(__file__).parents[3]


def failing(times: int, method: str, code: int, reason: str) -> Callable[[str, grpc.ServicerContext], None]:
    left = [times]

    def fail(called: str, context: grpc.ServicerContext) -> None:
        if called == method and left[0] > 0:
            left[0] -= 1
            refuse(context, code, reason, f"{reason} on demand")

    return fail


GET = plan_service_pb2.GetPlanRequest(name="plans/night")


@EITHER
async def test_unary_calls_have_a_deadline_and_those_of_the_caller_stand(planner: FakePlanner, kind: Kind) -> None:
    async with opened(kind, planner.address) as client:
        await done(client.plans.GetPlan(GET))
        await done(client.plans.GetPlan(GET, timeout=7))
    assert [round(left_s) for left_s in planner.time_left_s if left_s is not None] == [30, 7]


@EITHER
async def test_a_planner_on_this_machine_is_reached_without_the_proxy_that_the_environment_names(
    planner: FakePlanner, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    async with opened(kind, planner.address) as client:
        await done(client.plans.GetPlan(GET))


@EITHER
async def test_calls_that_change_something_get_an_id_and_the_callers_message_stays(
    planner: FakePlanner, kind: Kind
) -> None:
    request = plan_service_pb2.CancelPlanRequest(name="plans/night")
    mine = plan_service_pb2.CancelPlanRequest(name="plans/night", request_id=str(uuid.uuid4()))
    async with opened(kind, planner.address) as client:
        await done(client.plans.CancelPlan(request))
        await done(client.plans.CancelPlan(mine))
    assert request.request_id == ""
    drawn, given = (uuid.UUID(sent.request_id) for sent in planner.requests)
    assert given == uuid.UUID(mine.request_id) != drawn


def test_a_planner_that_is_away_for_a_moment_is_asked_again_with_the_same_id(planner: FakePlanner) -> None:
    request = plan_service_pb2.CancelPlanRequest(name="plans/night")
    planner.fail = failing(2, "CancelPlan", code_pb2.UNAVAILABLE, "NOT_LEADER")
    with Client(planner.address) as client:
        assert client.plans.CancelPlan(request).plan.name == "plans/night"
    assert planner.calls["CancelPlan"] == 3
    assert len({sent.request_id for sent in planner.requests}) == 1


def test_only_unavailable_is_retried(planner: FakePlanner) -> None:
    planner.fail = failing(1, "GetPlan", code_pb2.ABORTED, "ETAG_MISMATCH")
    with Client(planner.address) as client, pytest.raises(CallError):
        client.plans.GetPlan(GET)
    assert planner.calls["GetPlan"] == 1


@EITHER
async def test_errors_bring_their_details(planner: FakePlanner, kind: Kind) -> None:
    def fail(_method: str, context: grpc.ServicerContext) -> None:
        refuse(
            context,
            code_pb2.INVALID_ARGUMENT,
            "INVALID_DOCUMENT",
            "two problems",
            metadata={"kind": "Cluster"},
            violations=(("cluster.document#nodes[2].gpus[0].type", "fleet.yaml:12: unknown"), ("cluster_id", "long")),
            retry_after_s=1.5,
        )

    planner.fail = fail

    async with opened(kind, planner.address) as client:
        with pytest.raises(CallError) as caught:
            await done(client.plans.GetPlan(GET))
    error = caught.value
    assert str(error) == "two problems"
    assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_DOCUMENT")
    assert error.metadata == {"kind": "Cluster"}
    assert error.retry_after_s == 1.5
    assert [(violation.field, violation.description) for violation in error.violations] == [
        ("cluster.document#nodes[2].gpus[0].type", "fleet.yaml:12: unknown"),
        ("cluster_id", "long"),
    ]
    assert not error.is_unreachable


def test_an_error_that_grpc_raises_itself_has_no_reason(planner: FakePlanner) -> None:
    with Client(planner.address) as client, pytest.raises(CallError) as caught:
        client.clusters.DrainNode(cluster_service_pb2.DrainNodeRequest(name="x"))  # the fake planner has none
    assert caught.value.reason == ""
    assert caught.value.code is grpc.StatusCode.UNIMPLEMENTED


def test_nobody_there_is_unreachable() -> None:
    with Client(f"127.0.0.1:{free_ports()}") as client, pytest.raises(CallError) as caught:
        client.plans.GetPlan(GET, timeout=5)
    assert caught.value.is_unreachable


@EITHER
async def test_lists_go_on_to_the_last_page_and_take_few_calls_unless_asked_for_small_ones(
    planner: FakePlanner, kind: Kind
) -> None:
    async with opened(kind, planner.address) as client:
        names = [cluster.name async for cluster in items(client, client.list_clusters(page_size=3))]
        assert names == [f"clusters/c{number}" for number in range(7)]
        assert planner.calls.pop("ListClusters") == 3
        for number in range(1200):
            name = f"clusters/c{number}"
            planner.clusters[name] = cluster_pb2.Cluster(name=name, etag="v1")
        assert len([cluster async for cluster in items(client, client.list_clusters())]) == 1200
        assert planner.calls["ListClusters"] == 3


@EITHER
async def test_a_watch_goes_on_after_what_it_has_seen(planner: FakePlanner, kind: Kind) -> None:
    planner.fail = failing(1, "WatchPlan after 1", code_pb2.UNAVAILABLE, "DRAINING")
    async with opened(kind, planner.address) as client:
        assert [response.sequence async for response in items(client, client.watch_plan("plans/night"))] == [
            1,
            2,
            3,
            900,
        ]
        assert [response.sequence async for response in items(client, client.watch_plan("plans/night"))] == [1000]
    assert [request.after_sequence for request in planner.requests] == [0, 1, 0]


@EITHER
async def test_waiting_ends_with_the_final_plan_and_tells_the_way(planner: FakePlanner, kind: Kind) -> None:
    seen: list[int] = []
    async with opened(kind, planner.address) as client:
        plan = await done(client.wait("plans/night", on_change=lambda plan: seen.append(plan.state)))
    assert plan.state == plan_pb2.PLAN_STATE_READY
    assert plan.result.num_gpus == 12
    assert seen[0] == plan_pb2.PLAN_STATE_SOLVING
    assert seen[-1] == plan_pb2.PLAN_STATE_READY


@EITHER
async def test_a_watch_of_nothing_is_an_error_at_once(planner: FakePlanner, kind: Kind) -> None:
    async with opened(kind, planner.address) as client:
        with pytest.raises(CallError) as caught:
            await done(client.wait("plans/none"))
    assert caught.value.reason == "NOT_FOUND"
    assert planner.calls["WatchPlan"] == 1


@EITHER
async def test_a_watch_that_the_caller_stops_reading_ends_at_the_planner(planner: FakePlanner, kind: Kind) -> None:
    planner.searches = [(0.0, searching(1.2, 1.7)), (30.0, ready())]
    ended = queue.Queue[str]()

    def note_end(method: str, context: grpc.ServicerContext) -> None:
        if method == "WatchPlan":
            context.add_callback(lambda: ended.put(method))

    planner.fail = note_end
    async with opened(kind, planner.address) as client:
        watch = client.watch_plan("plans/night")
        async with aclosing(items(client, watch)) as events:
            await anext(events)
        del watch
        assert await asyncio.to_thread(ended.get, timeout=5) == "WatchPlan"


@EITHER
@pytest.mark.parametrize(("token", "seen"), [("", ["n0", "n1", "n2", "n3"]), ("t1", ["n2", "n3"])])
async def test_a_cluster_is_watched_across_connections_by_its_token(
    planner: FakePlanner, kind: Kind, token: str, seen: list[str]
) -> None:
    planner.events = [
        cluster_service_pb2.WatchClusterResponse(resume_token=f"t{number}", removed_node=f"n{number}")
        for number in range(4)
    ]
    found = list[str]()
    async with opened(kind, planner.address) as client:
        async for event in items(client, client.watch_cluster("clusters/c0", resume_token=token)):
            found.append(event.removed_node)
            if found == seen:
                planner.events.append(cluster_service_pb2.WatchClusterResponse(resume_token="t8", removed_node="later"))
            if len(found) > len(seen):
                break
    assert found == [*seen, "later"]


@EITHER
async def test_a_document_comes_whole_although_the_connection_breaks(planner: FakePlanner, kind: Kind) -> None:
    planner.documents["plans/night"] = content = b"0123456789" * 9 + b"end"
    planner.fail = failing(1, "ReadPlanDocument after 40", code_pb2.UNAVAILABLE, "DRAINING")
    async with opened(kind, planner.address) as client:
        assert await done(client.read_plan_document("plans/night")) == content


def test_details_that_cannot_be_read_do_no_harm(planner: FakePlanner) -> None:
    def fail(_method: str, context: grpc.ServicerContext) -> None:
        context.set_trailing_metadata((("grpc-status-details-bin", b"\xff\xff\xff"),))
        context.abort(grpc.StatusCode.ABORTED, "with a broken tail")

    planner.fail = fail
    with Client(planner.address) as client, pytest.raises(CallError, match="with a broken tail") as caught:
        client.plans.GetPlan(GET)
    assert (caught.value.reason, caught.value.code) == ("", grpc.StatusCode.ABORTED)


def test_the_base_install_is_enough_for_the_client() -> None:
    program = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {'typer', 'rich', 'sqlalchemy', 'alembic', 'starlette', 'uvicorn', 'highspy',
                'highspy', 'numba', 'cvxpy', 'prometheus_client', 'grpc_health', 'grpc_reflection', 'torch'}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Missing())
import hetis.planner.client
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "settings",
    [
        {"address": "planner"},
        {"address": "planner:"},
        {"address": ":8470"},
        {"address": "http://h:1"},
        {"address": None},
        {"address": "h:1", "cert": Path("c")},
        {"address": "h:1", "token": "t", "token_file": Path("f")},
        {"address": "h:1", "token": "t", "plaintext": True},
        {"address": "h:1", "token": "two\nlines"},
        {"address": "h:1", "ca": Path("c"), "plaintext": True},
    ],
)
def test_connections_that_contradict_themselves_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        Connection(**settings)


@EITHER
def test_settings_are_not_ignored_beside_a_connection(kind: Kind) -> None:
    with pytest.raises(ValueError, match="has settings of its own, and token cannot be added to them"):
        kind(Connection(address="127.0.0.1:1"), token="secret")


def test_only_this_machine_is_spoken_to_in_the_clear_unless_that_is_asked_for() -> None:
    assert Connection(address="127.0.0.1:8470").is_plain
    assert Connection(address="[::1]:8470").is_plain
    assert not Connection(address="planner.example:8470").is_plain
    assert Connection(address="planner.example:8470", plaintext=True).is_plain
    assert not Connection(address="localhost:8470", ca=Path("ca.pem")).is_plain


def test_a_token_file_is_read_for_every_call(planner: FakePlanner, tmp_path: Path) -> None:
    token = tmp_path / "token"
    with Client(planner.address, token_file=token) as client:
        for text in ("first\n", "second"):
            token.write_text(text)
            client.plans.GetPlan(GET)
        list(client.watch_plan("plans/night"))
    assert [sent["authorization"] for sent in planner.metadata] == ["Bearer first", "Bearer second", "Bearer second"]


@pytest.mark.parametrize(
    "content", [b"half\xff\xfe", b"one\ntwo\n", b"", b" \n"], ids=["no text", "two lines", "nothing", "a blank"]
)
def test_a_token_file_that_holds_no_token_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "token").write_bytes(content)
    connection = Connection(address="127.0.0.1:1", token_file=tmp_path / "token")
    with pytest.raises(OSError, match=r"holds no token.*token'"):
        connection.metadata()


def test_the_service_config_is_the_documented_one() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    documented = re.search(r"```json\n(\{\"methodConfig\".*?)```", text, re.DOTALL)
    assert documented is not None
    assert json.loads(documented[1]) == SERVICE_CONFIG
