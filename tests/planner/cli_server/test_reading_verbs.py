"""get, agents, status, watch: the present state, in 80 columns or as data, and nothing else on stdout."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf.timestamp_pb2 import Timestamp

from hetis.commands.endpoints import STANDBY_ANSWER
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.cli.server.resource_views import COLUMNS
from hetis.v1 import cluster_pb2, cluster_service_pb2, plan_pb2, redispatch_pb2, replica_pb2
from tests.planner.cli_server.conftest import Run
from tests.planner.client.fake_planner import FakePlanner, refuse

KINDS = sorted(COLUMNS)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_a_table_of_80_columns(fleet: FakePlanner, hetis_plan: Run, kind: str) -> None:
    out = hetis_plan("get", kind).out
    assert max(len(line) for line in out.splitlines()) <= 80
    words = " ".join(out.split())
    assert all(column.head.lstrip("'") in words for column in COLUMNS[kind] if not column.wide)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_json_yaml_and_names(fleet: FakePlanner, hetis_plan: Run, kind: str) -> None:
    data = json.loads(hetis_plan("get", kind, "-o", "json").out)
    assert data["apiVersion"] == "hetis/v1"
    names = [item["name"] for item in data["items"]]
    assert names
    assert yaml.safe_load(hetis_plan("get", kind, "-o", "yaml").out) == data
    assert hetis_plan("get", kind, "-o", "name").out.splitlines() == names


def test_one_resource_is_named_in_whole_or_in_part(fleet: FakePlanner, hetis_plan: Run) -> None:
    for arguments in (
        ["node", "a100-0"],
        ["nodes", "a100-0", "--cluster", "paper"],
        ["nodes", "clusters/paper/nodes/a100-0"],
        ["clusters/paper/nodes/a100-0"],
        ["nodes/a100-0"],
        ["node/a100-0", "--cluster", "clusters/paper"],
    ):
        assert json.loads(hetis_plan("get", *arguments, "-o", "json").out)["name"] == "clusters/paper/nodes/a100-0"


def test_what_is_not_there_says_how_to_see_what_is(hetis_plan: Run) -> None:
    captured = hetis_plan("get", "plans/none", code=ExitCode.INVALID)
    assert captured.out == ""
    assert captured.err == ("error: plans/none does not exist (NOT_FOUND)\n  list what exists: hetis-plan get plans\n")


@pytest.mark.parametrize("verb", ["get", "watch", "cancel"])
def test_a_refused_call_is_data_where_data_is_asked_for(hetis_plan: Run, verb: str) -> None:
    for form, read in (("json", json.loads), ("yaml", yaml.safe_load)):
        captured = hetis_plan(verb, "plans/none", "-o", form, code=ExitCode.INVALID)
        assert read(captured.out) == {
            "apiVersion": "hetis/v1",
            "kind": "Error",
            "exit_code": 2,
            "reason": "NOT_FOUND",
            "message": "plans/none does not exist",
            "details": ["list what exists: hetis-plan get plans"],
        }
        assert captured.err.startswith("error: plans/none does not exist (NOT_FOUND)\n")


def test_a_document_is_shown_as_what_it_holds(fleet: FakePlanner, hetis_plan: Run) -> None:
    fleet.clusters["clusters/paper"].document.content = b'{"kind": "Cluster", "name": "paper"}'
    shown = hetis_plan("get", "cluster", "paper", "-o", "json")
    assert json.loads(shown.out)["document"]["content"] == {"kind": "Cluster", "name": "paper"}


def test_of_several_clusters_one_must_be_named(fleet: FakePlanner, hetis_plan: Run) -> None:
    fleet.clusters["clusters/other"] = cluster_pb2.Cluster(name="clusters/other")
    assert "--cluster paper | other" in " ".join(hetis_plan("get", "nodes", code=ExitCode.INVALID).err.split())


@pytest.mark.parametrize("arguments", [["get"], ["get", "gadgets"], ["watch"], ["cancel"], ["get", "nodes", "a", "b"]])
def test_wrong_usage_exits_2(hetis_plan: Run, arguments: list[str]) -> None:
    assert "Usage: hetis-plan" in hetis_plan(*arguments, code=ExitCode.INVALID).err


def test_agents_show_every_gpu_and_what_differs(fleet: FakePlanner, hetis_plan: Run) -> None:
    fleet.differences = [
        cluster_pb2.InventoryDifference(node="a100-2", message="a100-2 is declared, but its agent is not connected")
    ]
    captured = hetis_plan("agents")
    assert "93%" in captured.out
    assert "throttled" in captured.out
    assert "LOST" in captured.out
    assert max(len(line) for line in captured.out.splitlines()) <= 80
    assert captured.err == "warning: a100-2 is declared, but its agent is not connected\n"


def test_what_only_a_standby_answers_is_told_as_such(fleet: FakePlanner, hetis_plan: Run) -> None:
    fleet.fail = lambda _method, context: context.set_trailing_metadata(((STANDBY_ANSWER, ""),))
    for arguments in (["status"], ["get", "replicas"]):
        assert "warning: no leader answered: this is what a standby has saved" in hetis_plan(*arguments).err
    fleet.fail = lambda _method, _context: None
    assert "standby" not in hetis_plan("status").err


def test_what_a_standby_does_not_know_is_not_shown_as_zero(fleet: FakePlanner, hetis_plan: Run) -> None:
    def rows(*arguments: str) -> list[list[str]]:
        return [line.split() for line in hetis_plan(*arguments).out.splitlines()]

    def data(*arguments: str) -> dict[str, Any]:
        return json.loads(hetis_plan(*arguments, "-o", "json").out)  # type: ignore[no-any-return]

    fleet.plans["plans/later"] = plan_pb2.Plan(
        name="plans/later", cluster="clusters/paper", state=plan_pb2.PLAN_STATE_SOLVING
    )
    fleet.fail = lambda _method, context: context.set_trailing_metadata(((STANDBY_ANSWER, ""),))
    fleet.clusters["clusters/paper"].num_connected_nodes = 0
    fleet.replicas["clusters/paper/replicas/r-1"].ClearField("report")
    assert rows("get", "clusters")[1][:3] == ["paper", "-/6", "12"]
    assert ["paper", "-/6", "12"] in [row[:3] for row in rows("status")]
    assert rows("get", "replicas")[1][-2:] == ["-", "-"]
    assert next(row for row in rows("get", "plans") if row[0] == "later")[3:5] == ["-", "-"]
    assert data("get", "clusters")["items"][0]["num_connected_nodes"] is None
    assert data("status")["clusters"][0]["num_connected_nodes"] is None
    replica = data("get", "replicas", "r-1")
    assert (replica["report"], replica["report_time"]) == (None, None)
    assert {plan["name"]: plan.get("progress", 0) for plan in data("get", "plans")["items"]} == {
        "plans/day": 0, "plans/later": None, "plans/night": 0
    }  # fmt: skip
    fleet.fail = lambda _method, _context: None
    assert rows("get", "clusters")[1][:2] == ["paper", "0/6"]
    assert "num_connected_nodes" not in data("get", "clusters")["items"][0]


def test_status_shows_health_clusters_and_plans(fleet: FakePlanner, hetis_plan: Run) -> None:
    fleet.plans["plans/later"] = plan_pb2.Plan(
        name="plans/later",
        cluster="clusters/paper",
        state=plan_pb2.PLAN_STATE_READY,
        origin=plan_pb2.PLAN_ORIGIN_PROPOSAL,
        activation=plan_pb2.ACTIVATION_STATE_INACTIVE,
        proposal_reason="2 GPUs were lost for 5 minutes",
    )
    captured = hetis_plan("status")
    assert captured.out.startswith("The planner serves.")
    assert "paper" in captured.out
    assert "2 GPUs were lost for 5 minutes; hetis-plan apply --activate plans/later" in captured.err
    data = json.loads(hetis_plan("status", "-q", "-o", "json").out)
    assert data["serving"] is True
    assert [plan["name"] for plan in data["active_plans"]] == ["plans/night"]


def test_nobody_there_exits_6_and_says_what_to_do(hetis_plan: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HETIS_SERVER", "127.0.0.1:1")
    captured = hetis_plan("status", code=ExitCode.UNREACHABLE)
    assert captured.out == ""
    assert captured.err.startswith("error: the planner at 127.0.0.1:1 is unreachable: ")
    assert captured.err.endswith(
        "  is hetis-planner running? Give its address with --server or HETIS_SERVER, and --ca if its "
        "certificate is from a private CA\n"
    )


def test_a_planner_that_does_not_answer_is_named_and_the_next_one_asked(
    fleet: FakePlanner, hetis_plan: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the past nothing was said until all attempts were over, which took up to 30 s."""
    monkeypatch.setattr("hetis.planner.client.channels.SLOW_AFTER_S", 0.1)
    options = (("grpc.enable_retries", 0), ("grpc.min_reconnect_backoff_ms", 1000))
    monkeypatch.setattr("hetis.planner.client.channels.SEVERAL_OPTIONS", options)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        told = hetis_plan("status", "--server", f"{address},{fleet.address}")
        assert told.err.splitlines()[0] == f"waiting for an answer from the planner at {address}; then {fleet.address}"
        assert told.out.startswith("The planner serves.")
        monkeypatch.setattr("hetis.planner.client.attempts.DEFAULT_DEADLINE_S", 1.0)
        shown = hetis_plan("status", "--server", address, code=ExitCode.UNREACHABLE)
        assert shown.err.startswith(f"waiting for an answer from the planner at {address}\nerror: ")
        assert hetis_plan("status", "--server", address, "-q", code=ExitCode.UNREACHABLE).err.startswith("error: ")


@pytest.mark.parametrize("what", ["plans/night", "clusters/paper"])
def test_a_watch_says_that_nobody_is_there_and_ends(
    hetis_plan: Run, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setenv("HETIS_SERVER", "127.0.0.1:1")
    monkeypatch.setattr("hetis.planner.client.errors.REPORTED_AFTER_S", 0.1)
    monkeypatch.setattr("hetis.planner.cli.server.server_verb.LONGEST_SILENCE_S", 1.0)
    monkeypatch.setattr("hetis.planner.client.channels.CHANNEL_OPTIONS", (("grpc.enable_retries", 0),))
    captured = hetis_plan("watch", what, "-o", "json", code=ExitCode.UNREACHABLE)
    assert json.loads(captured.out)["reason"] == "UNAVAILABLE"  # the only document
    warning, error, _advice = captured.err.splitlines()
    assert warning == "warning: the planner at 127.0.0.1:1 is unreachable; retrying for up to 1 s"
    assert error.startswith("error: the planner at 127.0.0.1:1 is unreachable: ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--server", "planner"], "'planner' is not an address of a planner, expected HOST:PORT"),
        (["--server", "planner.example:8470", "--cert", "c.pem"], "a client certificate needs its key"),
        (["--token-file", "/nowhere/token"], "/nowhere/token: No such file or directory"),
    ],
)
def test_connections_that_cannot_be_are_refused(hetis_plan: Run, arguments: list[str], said: str) -> None:
    assert said in " ".join(hetis_plan("status", *arguments, code=ExitCode.INVALID).err.replace("│", " ").split())


@pytest.mark.parametrize("content", ["", "\n", "two words\n"], ids=["nothing", "a blank line", "no token"])
def test_a_token_file_without_a_token_is_refused_before_any_call(
    fleet: FakePlanner,
    hetis_plan: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: str,
) -> None:
    (tmp_path / "token").write_text(content)
    monkeypatch.chdir(tmp_path)
    shown = hetis_plan("get", "plans", "--token-file", "token", code=ExitCode.INVALID)
    assert "Invalid value: token: holds no token" in shown.err
    assert not fleet.calls


def test_credentials_that_do_not_do_are_told(fleet: FakePlanner, hetis_plan: Run) -> None:
    fleet.fail = lambda method, context: refuse(
        context, 7, "ROLE", "viewer may not do this", metadata={"role": "viewer", "needed": "orchestrator"}
    )
    shown = hetis_plan("get", "plans", code=ExitCode.INVALID)
    assert "needs role orchestrator, these credentials have role viewer" in shown.err


def test_a_plan_is_watched_to_its_end(planner: FakePlanner, hetis_plan: Run) -> None:
    planner.plans["plans/night"] = plan_pb2.Plan(
        name="plans/night",
        state=plan_pb2.PLAN_STATE_QUEUED,
        activation=plan_pb2.ACTIVATION_STATE_INACTIVE,
    )
    captured = hetis_plan("watch", "night")
    assert "pricing: incumbent 1.200, bound 1.700 requests/s, gap 42%" in captured.err
    assert "1.610 requests/s" in captured.out
    assert "READY" in captured.out


def cluster_events() -> list[cluster_service_pb2.WatchClusterResponse]:
    at = Timestamp(seconds=3600)
    made = cluster_service_pb2.WatchClusterResponse
    events = [
        made(reset=True),
        made(cluster=cluster_pb2.Cluster(name="clusters/paper", num_nodes=6, num_connected_nodes=2)),
        made(node=cluster_pb2.Node(name="clusters/paper/nodes/n1", state=cluster_pb2.NODE_STATE_SUSPECT)),
        made(caught_up=True),
        made(removed_node="clusters/paper/nodes/n9"),
        made(removed_replica="clusters/paper/replicas/r-9"),
        made(
            replica=replica_pb2.Replica(
                name="clusters/paper/replicas/r-1", state=replica_pb2.REPLICA_STATE_DEGRADED, generation=4
            )
        ),
        made(
            redispatch=redispatch_pb2.Redispatch(
                replica="clusters/paper/replicas/r-1",
                state=redispatch_pb2.REDISPATCH_STATE_COMMITTING,
                num_moves=3,
                makespan_before_s=0.002,
                makespan_after_s=0.001,
            )
        ),
    ]
    for number, event in enumerate(events):
        event.event_time.CopyFrom(at)
        event.resume_token = f"t{number}"
    return events


def test_a_cluster_is_watched_line_by_line(fleet: FakePlanner, hetis_plan: Run) -> None:
    fleet.events = cluster_events()

    def fail(method: str, context: object) -> None:  # stands for Ctrl-C, as this watch does not end by itself
        if method == "WatchCluster" and fleet.calls["WatchCluster"] > 1:
            refuse(context, 5, "NOT_FOUND", "clusters/paper is gone")  # type: ignore[arg-type]

    fleet.fail = fail
    assert hetis_plan("watch", "clusters/paper", code=ExitCode.INVALID).out.splitlines() == [
        "--- full list again, because the resume token was too old",
        "01:00:00 cluster paper: 2 of 6 nodes connected, active no plan",
        "01:00:00 node n1: SUSPECT",
        "--- now live",
        "01:00:00 node n9: removed",
        "01:00:00 replica r-9: removed",
        "01:00:00 replica r-1: DEGRADED, generation 4, 0 running, 0 waiting",
        "01:00:00 re-dispatch of r-1: COMMITTING, 3 moves, 2.00 ms → 1.00 ms",
    ]
    fleet.calls.clear()
    shown = hetis_plan("watch", "clusters/paper", "-o", "json", code=ExitCode.INVALID)
    *lines, last = [json.loads(line) for line in shown.out.splitlines()]
    assert [line["resume_token"] for line in lines] == [f"t{number}" for number in range(8)]
    assert (last["kind"], last["reason"]) == ("Error", "NOT_FOUND")
    fleet.calls.clear()
    *lines, last = yaml.safe_load_all(hetis_plan("watch", "clusters/paper", "-o", "yaml", code=ExitCode.INVALID).out)
    assert [line["resume_token"] for line in lines] == [f"t{number}" for number in range(8)]
    assert (last["kind"], last["reason"]) == ("Error", "NOT_FOUND")
