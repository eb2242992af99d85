"""upstreams writes the serving replicas as a router's list, and rewrites it when they change."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from hetis.planner.cli.exit_codes import ExitCode
from hetis.v1 import cluster_pb2, cluster_service_pb2, replica_pb2, report_pb2
from tests.planner.cli_server.conftest import Run
from tests.planner.client.fake_planner import FakePlanner, refuse

UP, DOWN = replica_pb2.REPLICA_STATE_SERVING, replica_pb2.REPLICA_STATE_FAILED
NAME = "clusters/paper/replicas/r-{}"


def replica(
    number: int, rate_rps: float, state: replica_pb2.ReplicaState.ValueType = UP, **changes: object
) -> replica_pb2.Replica:
    fields = {"report": report_pb2.ReplicaReport(endpoint=f"10.0.0.{number}:8000")} | changes
    return replica_pb2.Replica(
        name=NAME.format(number),
        state=state,
        shape=replica_pb2.ReplicaPlan(rate_rps=rate_rps, micro_batch=5, in_flight=2),
        **fields,
    )


def end_watch(context: Any) -> None:
    """In place of Ctrl-C."""
    refuse(context, 5, "NOT_FOUND", "clusters/paper is gone")


def events(*changes: replica_pb2.Replica | None) -> list[cluster_service_pb2.WatchClusterResponse]:
    """``None``: all of the present state is told."""
    return [
        cluster_service_pb2.WatchClusterResponse(resume_token=f"t{number}", replica=one, caught_up=one is None)
        for number, one in enumerate(changes)
    ]


@pytest.fixture
def served(planner: FakePlanner) -> FakePlanner:
    """Return a planner with two serving replicas, one of them without a worker, and others that must not serve."""
    planner.clusters["clusters/paper"] = cluster_pb2.Cluster(name="clusters/paper")
    replicas = [
        replica(1, 6.0),
        replica(2, 2.0, replica_pb2.REPLICA_STATE_DEGRADED),
        replica(3, 9.0, replica_pb2.REPLICA_STATE_DRAINING),
        replica(4, 9.0, replica_pb2.REPLICA_STATE_STARTING),
        replica(5, 9.0, DOWN),
        replica(6, 9.0, role=replica_pb2.REPLICA_ROLE_PREFILL),
        replica(7, 9.0, report=report_pb2.ReplicaReport()),
    ]
    planner.replicas.update({one.name: one for one in replicas})
    return planner


FULL = "".join(f"    server 10.0.0.{i}:8000 weight={w} max_conns=12;\n" for i, w in ((1, 750), (2, 250)))
NGINX = f"upstream hetis {{\n    zone hetis 1m;\n{FULL}{FULL.replace('max_conns=12', 'backup')}}}\n"


def test_what_serves_is_listed_with_weights_by_rate(served: FakePlanner, hetis_plan: Run) -> None:
    assert hetis_plan("upstreams").out == NGINX
    shown = hetis_plan("upstreams", "--to", "envoy")
    found = yaml.safe_load(shown.out)["load_assignment"]["endpoints"][0]["lb_endpoints"]
    assert [one["load_balancing_weight"] for one in found] == [750, 250]
    models = yaml.safe_load(hetis_plan("upstreams", "--to", "litellm", "--model", "tiny").out)["model_list"]
    assert [one["litellm_params"]["api_base"] for one in models] == [f"http://10.0.0.{i}:8000/v1" for i in (1, 2)]


def test_where_nothing_serves_the_list_is_one_that_nginx_takes(served: FakePlanner, hetis_plan: Run) -> None:
    for one in served.replicas.values():
        one.state = DOWN
    assert hetis_plan("upstreams").out == "upstream hetis {\n    server 127.0.0.1:9 down;  # nothing serves\n}\n"


def test_what_serves_without_an_address_or_with_half_a_role_is_named(served: FakePlanner, hetis_plan: Run) -> None:
    shown = hetis_plan("upstreams")
    said = (
        "warning: left out, because only agents with --engine launch:FILE report an address: r-7\n"
        "warning: left out, because a router sends each request to one replica, and these do half: r-6\n"
    )
    assert shown == (NGINX, said)
    assert hetis_plan("upstreams", "--to", "envoy").err == said
    for number in (1, 2):
        served.replicas[NAME.format(number)].state = DOWN
    shown = hetis_plan("upstreams")
    why = "what serves: r-7 without an address; r-6 only for prefill or decode"
    assert shown == (f"upstream hetis {{\n    server 127.0.0.1:9 down;  # {why}\n}}\n", said)


def test_the_list_is_written_again_when_what_serves_changes_and_only_then(
    served: FakePlanner, hetis_plan: Run, tmp_path: Path
) -> None:
    out, seen = tmp_path / "hetis.conf", tmp_path / "seen"
    busy = replica(1, 6.0, report=report_pb2.ReplicaReport(endpoint="10.0.0.1:8000", num_running=5))
    served.events = events(replica(1, 6.0), None, busy, replica(1, 6.0, DOWN), replica(1, 6.0))
    states = {1: UP, 2: UP, 3: DOWN, 4: UP}  # states of the first replica at each listing

    def called(method: str, context: Any) -> None:
        if method == "ListReplicas":
            served.replicas[NAME.format(1)].state = states[served.calls[method]]
        if method == "WatchCluster" and served.calls[method] > 1:
            end_watch(context)

    served.fail = called
    command = f"sh -c 'cat {out} >> {seen}'"
    shown = hetis_plan("upstreams", "--out", str(out), "--follow", "--run", command, code=ExitCode.INVALID)
    alone = "upstream hetis {\n    server 10.0.0.2:8000 weight=1000;\n}\n"
    assert seen.read_text() == NGINX + alone + NGINX
    assert served.calls["ListReplicas"] == len(states), "numbers of requests are no news"
    assert "wrote 1 servers" in shown.err


def test_a_new_leader_that_has_no_reports_yet_changes_no_list(served: FakePlanner, hetis_plan: Run) -> None:
    """In the past the list was empty until the agents had found the new leader, although every engine served."""
    served.events = [
        cluster_service_pb2.WatchClusterResponse(resume_token="t0", reset=True),
        cluster_service_pb2.WatchClusterResponse(resume_token="t1", caught_up=True),
        cluster_service_pb2.WatchClusterResponse(resume_token="t2", replica=replica(2, 2.0, DOWN)),
    ]

    def called(method: str, context: Any) -> None:
        if method == "ListReplicas" and served.calls[method] == 2:
            for one in served.replicas.values():
                one.ClearField("report")
        if method == "ListReplicas" and served.calls[method] == 3:
            served.replicas[NAME.format(2)].state = DOWN
        if method == "WatchCluster" and served.calls[method] > 1:
            end_watch(context)

    served.fail = called
    shown = hetis_plan("upstreams", "--follow", code=ExitCode.INVALID)
    alone = "upstream hetis {\n    server 10.0.0.1:8000 weight=1000;\n}\n"
    assert shown.out == NGINX + alone
    assert served.calls["ListReplicas"] == 3


@pytest.mark.parametrize("more", [(), ("--follow",)])
def test_a_leader_that_has_no_reports_yet_is_waited_for(
    served: FakePlanner, hetis_plan: Run, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    """In the past a list that was begun seconds after a takeover was empty, although every engine served."""
    monkeypatch.setattr("hetis.planner.cli.export.LISTED_AGAIN_S", 0.01)
    for number in (1, 2, 6):
        served.replicas[NAME.format(number)].ClearField("report")

    def called(method: str, context: Any) -> None:
        if method == "ListReplicas" and served.calls[method] in (2, 3):
            name = NAME.format(served.calls[method] - 1)
            served.replicas[name].report.CopyFrom(replica(served.calls[method] - 1, 1.0).report)
        if method == "WatchCluster":
            end_watch(context)

    served.fail = called
    captured = hetis_plan("upstreams", *more, code=(ExitCode.INVALID if more else ExitCode.OK))
    assert captured.out == NGINX, "and no list of one"
    waiting, *left_out = captured.err.splitlines()
    says = "waiting up to 30 s for agents to report to the planner where engines listen: r-1, r-2"
    assert waiting == says
    assert "not reported" not in "".join(left_out)


@pytest.fixture
def partly_heard(served: FakePlanner, monkeypatch: pytest.MonkeyPatch) -> FakePlanner:
    """Return the planner when it has just taken the lead: of two agents it has not heard yet."""
    monkeypatch.setattr("hetis.planner.cli.export.LISTED_AGAIN_S", 0.01)
    monkeypatch.setattr("hetis.planner.cli.export.HEARD_WITHIN_S", 0.1)
    for number in (1, 7):
        served.replicas[NAME.format(number)].ClearField("report")
    return served


EARLIER = "upstream hetis {\n    server 10.0.0.1:8000 weight=800;\n    server 10.0.0.2:8000 weight=200;\n}\n"


def test_a_list_is_not_replaced_by_one_of_a_part(partly_heard: FakePlanner, hetis_plan: Run, tmp_path: Path) -> None:
    """In the past the first agent that reported to a new leader got all requests, although every engine served."""
    out, ran = tmp_path / "hetis.conf", tmp_path / "ran"
    command = ("upstreams", "--out", str(out), "--run", f"touch {ran}")
    left_out = "warning: left out, because their agents have not reported to the planner: r-1, r-7\n"
    out.write_text(EARLIER)
    told = hetis_plan(*command, code=ExitCode.UNREACHABLE).err
    assert f"error: {out} was not written: the planner does not know yet where these serve: r-1, r-7\n" in told
    assert left_out in told
    assert out.read_text() == EARLIER
    assert not ran.exists()
    for prepare in (lambda: out.write_text(""), out.unlink):  # there is nothing to keep
        prepare()
        shown = hetis_plan(*command)
        assert out.read_text() == "upstream hetis {\n    server 10.0.0.2:8000 weight=1000;\n}\n"
        assert left_out in shown.err
    assert ran.exists()


def test_a_list_is_followed_once_all_agents_have_reported(
    partly_heard: FakePlanner, hetis_plan: Run, tmp_path: Path
) -> None:
    out, seen = tmp_path / "hetis.conf", tmp_path / "seen"
    out.write_text(EARLIER)
    first, new = replica(1, 6.0), replica(8, 6.0)
    silent = replica(7, 9.0, report=report_pb2.ReplicaReport())
    partly_heard.events = events(None, silent, first, new)
    contents = list[str]()  # at each listing after the watch began

    def called(method: str, context: Any) -> None:
        if method == "WatchCluster" and partly_heard.calls[method] > 1:
            end_watch(context)
        if method != "ListReplicas" or not partly_heard.calls["WatchCluster"]:
            return
        contents.append(out.read_text())
        if len(contents) == 2:
            partly_heard.replicas[silent.name] = silent
        elif len(contents) == 3:
            partly_heard.replicas[first.name] = first
        elif len(contents) == 4:  # a new one keeps the list, which is this command's by now, from nothing
            partly_heard.replicas[new.name] = replica(8, 6.0)
            partly_heard.replicas[new.name].ClearField("report")
            partly_heard.replicas[NAME.format(2)].state = DOWN

    partly_heard.fail = called
    command = ("upstreams", "--out", str(out), "--follow", "--run", f"sh -c 'cat {out} >> {seen}'")
    shown = hetis_plan(*command, code=ExitCode.INVALID)
    assert contents == [EARLIER, EARLIER, EARLIER, NGINX]
    assert seen.read_text() == NGINX + "upstream hetis {\n    server 10.0.0.1:8000 weight=1000;\n}\n"
    told = shown.err
    assert f"warning: {out} was not written: the planner does not know yet where these serve: r-1\n" in told


def test_a_list_is_followed_however_long_the_planner_hangs(
    served: FakePlanner, hetis_plan: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.events = events(None)
    monkeypatch.setattr("hetis.planner.cli.server.server_verb.LONGEST_SILENCE_S", 0.0)  # the limit of the other verbs
    monkeypatch.setattr("hetis.planner.client.errors.FIRST_WAIT_S", 0.01)
    monkeypatch.setattr("hetis.planner.client.errors.REPORTED_AFTER_S", 0.0)
    monkeypatch.setattr("hetis.planner.client.errors.REPORTED_AGAIN_S", 0.0)
    monkeypatch.setattr("hetis.planner.client.channels.CHANNEL_OPTIONS", (("grpc.enable_retries", 0),))

    def called(method: str, context: Any) -> None:
        number = served.calls[method]
        if method == "WatchCluster" and number <= 3:
            refuse(context, 14, "", "the proxy gives up")
        if method == "WatchCluster" and number > 4:
            end_watch(context)
        if method == "ListReplicas" and number == 2:
            refuse(context, 4, "", "too late")
        if method == "ListReplicas" and number == 3:
            served.replicas[NAME.format(2)].state = DOWN

    served.fail = called
    captured = hetis_plan("upstreams", "--follow", code=ExitCode.INVALID)
    assert captured.out == NGINX + "upstream hetis {\n    server 10.0.0.1:8000 weight=1000;\n}\n"
    assert captured.err.count("is unreachable; retrying until it is") == 4, "three of the watch, one of the list"
    assert captured.err.count("is reachable again") == 2


@pytest.mark.parametrize("method", ["ListClusters", "ListReplicas"])
def test_a_list_is_followed_even_if_no_planner_answers_at_first(
    served: FakePlanner, hetis_plan: Run, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """In the past the verb ended with 6 if it was started before the planner, such as a router's sidecar."""
    monkeypatch.setattr("hetis.planner.client.errors.FIRST_WAIT_S", 0.01)
    monkeypatch.setattr("hetis.planner.client.errors.REPORTED_AFTER_S", 0.0)
    monkeypatch.setattr("hetis.planner.client.channels.SLOW_AFTER_S", 0.05)
    monkeypatch.setattr("hetis.planner.client.channels.CHANNEL_OPTIONS", (("grpc.enable_retries", 0),))

    def called(name: str, context: Any) -> None:
        if name == method and served.calls[name] <= 2:
            time.sleep(0.5)  # longer than a call may take before the planner that is tried is named
            refuse(context, 4, "", "too late")
        if name == "WatchCluster":
            end_watch(context)

    served.fail = called
    hetis_plan("upstreams", code=ExitCode.UNREACHABLE)
    served.calls.clear()
    captured = hetis_plan("upstreams", "--follow", code=ExitCode.INVALID)
    assert captured.out == NGINX
    assert captured.err.count("warning: too late\n") == 1, "the reason"
    assert captured.err.count("waiting for an answer") == 1, "not for each retry"
    assert "is unreachable; retrying until it is" in captured.err
    assert "is reachable again" in captured.err


def test_a_command_that_fails_is_told_and_the_list_stands(served: FakePlanner, hetis_plan: Run, tmp_path: Path) -> None:
    for command, says in (("false", "false ended with 1"), ("no-such-nginx -s reload", "No such file or directory")):
        assert says in hetis_plan("upstreams", "--out", str(tmp_path / "list"), "--run", command).err
        assert (tmp_path / "list").read_text() == NGINX


def test_wrong_options_are_refused_before_the_planner_is_asked(hetis_plan: Run) -> None:
    assert "--to litellm needs --model" in hetis_plan("upstreams", "--to", "litellm", code=ExitCode.INVALID).err
    assert "No closing quotation" in hetis_plan("upstreams", "--run", "sh -c 'x", code=ExitCode.INVALID).err


def test_a_list_that_cannot_be_written_is_refused_before_the_planner_is_asked(
    served: FakePlanner, hetis_plan: Run, tmp_path: Path
) -> None:
    """In the past after the wait for agents."""
    shown = hetis_plan("upstreams", "--out", str(tmp_path / "none" / "list"), code=ExitCode.INVALID)
    assert f"cannot be written: no folder {tmp_path / 'none'}" in shown.err
    assert not served.calls


def test_agents_have_their_time_from_the_first_answer_on(
    partly_heard: FakePlanner, hetis_plan: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planner that was away for longer has just taken the lead, and does not know yet where engines listen."""
    now_s = 0.0
    clock = SimpleNamespace(monotonic=lambda: now_s, sleep=lambda _seconds: None)
    monkeypatch.setattr("hetis.planner.cli.export.time", clock)
    monkeypatch.setattr("hetis.planner.client.channels.CHANNEL_OPTIONS", (("grpc.enable_retries", 0),))

    def called(method: str, context: Any) -> None:
        nonlocal now_s
        if method == "ListReplicas" and partly_heard.calls[method] == 1:
            now_s += 60.0
            refuse(context, 4, "", "too late")
        if method == "ListReplicas" and partly_heard.calls[method] == 3:
            for number in (1, 7):
                partly_heard.replicas[NAME.format(number)] = replica(number, 6.0)
        if method == "WatchCluster":
            end_watch(context)

    partly_heard.fail = called
    assert "10.0.0.7:8000" in hetis_plan("upstreams", "--follow", "--cluster", "paper", code=ExitCode.INVALID).out
