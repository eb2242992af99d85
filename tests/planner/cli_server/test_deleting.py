"""delete: each resource by a call of its own, whatever is refused for the others."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
import yaml
from google.rpc import code_pb2

from hetis.planner.cli.exit_codes import ExitCode
from hetis.v1 import cluster_pb2
from tests.planner.cli_server.conftest import Run
from tests.planner.client.fake_planner import FakePlanner, refuse


@pytest.mark.parametrize(
    ("words", "deleted"),
    [
        (["plans", "day"], ["plans/day"]),
        (["plan", "day"], ["plans/day"]),
        (["plan/day"], ["plans/day"]),
        (["plans", "plans/day", "day"], ["plans/day"]),
        (["profiles/l4", "plans/day"], ["profiles/l4", "plans/day"]),
        (["clusters/old", "plans/day"], ["plans/day", "clusters/old"]),  # a cluster takes its plans with it
    ],
)
def test_resources_are_named_as_in_get(
    fleet: FakePlanner, hetis_plan: Run, words: list[str], deleted: list[str]
) -> None:
    fleet.clusters["clusters/old"] = cluster_pb2.Cluster(name="clusters/old")
    assert hetis_plan("delete", *words) == ("".join(f"{name}  deleted\n" for name in deleted), "")
    assert not {*fleet.plans, *fleet.profiles, *fleet.clusters} & {*deleted}
    assert all(request.request_id for request in fleet.requests), "a retry deletes nothing twice"


def test_a_cluster_is_deleted_once_no_plan_is_in_force(fleet: FakePlanner, hetis_plan: Run) -> None:
    assert hetis_plan("delete", "clusters", "paper", code=ExitCode.CONFLICT) == (
        "",
        "error: clusters/paper is in use (RESOURCE_IN_USE)\n"
        "  once nothing serves, take its plan out of force: hetis-plan cancel plans/night\n",
    )
    fleet.clusters["clusters/paper"].active_plan = ""
    hetis_plan("delete", "cluster", "paper")
    assert not fleet.clusters


def test_what_is_refused_is_one_error_each_and_the_others_are_deleted(fleet: FakePlanner, hetis_plan: Run) -> None:
    words = ("delete", "plans/night", "plans/none", "plans/day", "profiles/l4")
    shown = hetis_plan(*words, code=ExitCode.CONFLICT)  # the code of the first refusal
    assert shown == (
        "plans/day  deleted\nprofiles/l4  deleted\n",
        "error: plans/night is in use (RESOURCE_IN_USE)\n"
        "  activate another plan first: hetis-plan apply --activate PLAN; if nothing serves: "
        "hetis-plan cancel plans/night\n"
        "error: plans/none does not exist (NOT_FOUND)\n"
        "  list what exists: hetis-plan get plans\n",
    )
    assert list(fleet.plans) == ["plans/night"]


def test_what_is_not_there_may_be_ignored(fleet: FakePlanner, hetis_plan: Run) -> None:
    assert "plans/none does not exist (NOT_FOUND)" in hetis_plan("delete", "plans", "none", code=ExitCode.INVALID).err
    assert hetis_plan("delete", "plans", "none", "--ignore-not-found") == ("nothing to delete\n", "")
    shown = hetis_plan("delete", "plans", "none", "night", "day", "--ignore-not-found", code=ExitCode.CONFLICT)
    assert shown.out == "plans/day  deleted\n"


@pytest.mark.parametrize(
    ("form", "read"), [("json", lambda text: _json_documents(text)), ("yaml", lambda text: [*yaml.safe_load_all(text)])]
)
def test_what_is_deleted_and_each_refusal_are_documents(
    fleet: FakePlanner, hetis_plan: Run, form: str, read: Any
) -> None:
    done, error = read(hetis_plan("delete", "plans", "night", "day", "-o", form, code=ExitCode.CONFLICT).out)
    assert done == {"apiVersion": "hetis/v1", "kind": "Deleted", "items": [{"name": "plans/day"}]}
    assert (error["kind"], error["reason"], error["exit_code"]) == ("Error", "RESOURCE_IN_USE", 7)
    (done,) = read(hetis_plan("delete", "plans", "none", "-o", form, "--ignore-not-found").out)
    assert done["items"] == []
    (error,) = read(hetis_plan("delete", "plans", "none", "-o", form, code=ExitCode.INVALID).out)
    assert error["reason"] == "NOT_FOUND"


def _json_documents(text: str) -> list[Any]:
    found, rest = list[Any](), text.lstrip()
    while rest:
        one, end = json.JSONDecoder().raw_decode(rest)
        found.append(one)
        rest = rest[end:].lstrip()
    return found


def test_a_dry_run_deletes_nothing(fleet: FakePlanner, hetis_plan: Run) -> None:
    captured = hetis_plan("delete", "plans", "day", "night", "--dry-run", code=ExitCode.CONFLICT)
    assert captured.out == "plans/day  would be deleted\n"
    assert captured.err.startswith("dry run: nothing was changed\nerror: plans/night is in use")
    assert len(fleet.plans) == 2


def test_a_dry_run_lists_the_plans_that_a_cluster_takes_with_it(fleet: FakePlanner, hetis_plan: Run) -> None:
    """In the past only the cluster."""
    fleet.clusters["clusters/paper"].active_plan = ""
    shown = hetis_plan("delete", "clusters/paper", "plans/day", "profiles/l4", "--dry-run")
    would = ("plans/day", "profiles/l4", "plans/night", "clusters/paper")
    assert shown.out == "".join(f"{name}  would be deleted\n" for name in would)
    assert (len(fleet.plans), len(fleet.clusters)) == (2, 1)


def test_a_missing_role_keeps_nothing_else_from_being_deleted(fleet: FakePlanner, hetis_plan: Run) -> None:
    """Orchestrators may delete plans, but not profiles; that is the API's decision."""
    metadata = {"needed": "admin", "role": "orchestrator"}

    def fail(method: str, context: Any) -> None:
        if method == "DeleteProfile":
            refuse(context, code_pb2.PERMISSION_DENIED, "ROLE", "not with this role", metadata=metadata)

    fleet.fail = fail
    assert hetis_plan("delete", "profiles/l4", "plans/day", code=ExitCode.INVALID) == (
        "plans/day  deleted\n",
        "error: not with this role (ROLE)\n  the call needs role admin, these credentials have role orchestrator\n",
    )


def test_after_a_failure_of_the_planner_nothing_more_is_tried(fleet: FakePlanner, hetis_plan: Run) -> None:
    def fail(method: str, context: Any) -> None:
        if method == "DeleteProfile":
            refuse(context, code_pb2.RESOURCE_EXHAUSTED, "RATE", "too many calls", retry_after_s=2)

    fleet.fail = fail
    words = ("delete", "plans/day", "profiles/l4", "profiles/b", "plans/night")
    assert hetis_plan(*words, code=ExitCode.UNREACHABLE) == (
        "plans/day  deleted\n",
        "warning: not tried: profiles/b, plans/night\nerror: too many calls (RATE)\n  retry in 2 s\n",
    )
    assert fleet.calls["DeleteProfile"] == 1
    shown = hetis_plan("delete", "plans/night", "profiles/l4", code=ExitCode.UNREACHABLE)  # also after a refusal
    assert "plans/night is in use" in shown.err


def test_what_may_have_been_deleted_without_an_answer_is_named(
    fleet: FakePlanner, hetis_plan: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the past nothing was said of it, only of those that were not tried."""

    def fail(method: str, context: Any) -> None:
        if method == "DeleteProfile":
            given_up = threading.Event()
            if context.add_callback(given_up.set):
                given_up.wait(60)

    fleet.fail = fail
    monkeypatch.setattr("hetis.planner.client.attempts.DEFAULT_DEADLINE_S", 1.0)
    told = hetis_plan("delete", "plans/day", "profiles/l4", "plans/night", code=ExitCode.UNREACHABLE)
    assert told.out == "plans/day  deleted\n"
    assert "warning: no answer came: profiles/l4 may have been deleted\nwarning: not tried: plans/night\n" in told.err
    assert "may have been" not in hetis_plan("delete", "profiles/l4", "--dry-run", code=ExitCode.UNREACHABLE).err


def test_what_a_planner_that_ends_during_the_call_may_have_deleted_is_named(
    fleet: FakePlanner, hetis_plan: Run
) -> None:
    """In the past only that the planner is unreachable. gRPC retries: a refused connection is the last attempt's."""

    def fail(method: str, context: Any) -> None:
        if method == "DeletePlan" and fleet.calls[method] == 1:
            fleet.plans.pop("plans/day")
        refuse(context, code_pb2.UNAVAILABLE, "", "Socket closed")

    fleet.fail = fail
    told = hetis_plan("delete", "plans/day", "plans/night", code=ExitCode.UNREACHABLE)
    said = "warning: no answer came: plans/day may have been deleted\nwarning: not tried: plans/night\n"
    assert (told.out, told.err.startswith(said)) == ("", True), told.err


@pytest.mark.parametrize(
    ("reason", "metadata", "is_in_doubt"),
    [
        ("DRAINING", {}, False),
        ("STORE_UNAVAILABLE", {"changed": "no"}, False),
        ("STORE_UNAVAILABLE", {"changed": "unknown"}, True),
        ("NOT_LEADER", {"changed": "unknown"}, True),
    ],
)
def test_a_planner_that_says_whether_it_changed_something_is_believed(
    fleet: FakePlanner,
    hetis_plan: Run,
    monkeypatch: pytest.MonkeyPatch,
    reason: str,
    metadata: dict[str, str],
    is_in_doubt: bool,
) -> None:
    monkeypatch.setattr("hetis.planner.client.channels.CHANNEL_OPTIONS", (("grpc.enable_retries", 0),))
    fleet.fail = lambda _method, context: refuse(context, code_pb2.UNAVAILABLE, reason, "not now", metadata=metadata)
    shown = hetis_plan("delete", "plans/day", code=ExitCode.UNREACHABLE)
    assert ("plans/day may have been deleted" in shown.err) == is_in_doubt


def test_ctrl_c_names_what_may_have_been_deleted(
    fleet: FakePlanner, hetis_plan: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hetis.planner.cli.server.deleting.called", interrupted)
    shown = hetis_plan("delete", "plans", "day", "night", code=ExitCode.INTERRUPTED)
    said = "warning: no answer came: plans/day may have been deleted\nwarning: not tried: plans/night\ninterrupted\n"
    assert shown == ("", said)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plans"], "names of plans are missing, such as plans/NAME"),
        (["nodes", "a100-0"], "nodes cannot be deleted, only clusters, plans, profiles"),
        (["plans/day", "clusters/paper/replicas/r-1"], "replicas cannot be deleted, only clusters, plans, profiles"),
        (["plans/day", "night"], "'night' has no kind: write plans/night, or the kind before all names"),
        (["plans", "day", "profiles/l4"], "'profiles/l4' is none of the plans"),
        (["day"], "'day' is neither a kind (clusters, plans, profiles) nor a full name such as plans/day"),
        (["gadgets", "a"], "'gadgets' is neither a kind (clusters, plans, profiles) nor a full name such as plans/"),
        (["plans/"], "'plans/' is neither a kind (clusters, plans, profiles) nor a full name such as plans/NAME"),
    ],
)
def test_wrong_usage_deletes_nothing(fleet: FakePlanner, hetis_plan: Run, words: list[str], said: str) -> None:
    assert said in " ".join(hetis_plan("delete", *words, code=ExitCode.INVALID).err.replace("│", " ").split())
    assert not fleet.calls
