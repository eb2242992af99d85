"""Activating, going back and withdrawing, and what the command says when that does not end well."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from google.rpc import code_pb2

from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.cli.server.waiting import line_of
from hetis.v1 import failure_pb2, plan_pb2, plan_service_pb2
from tests.command_line import environment, with_ctrl_c
from tests.planner.cli_server.conftest import Run
from tests.planner.cli_server.test_changing_verbs import PROBLEM, last_request
from tests.planner.client.fake_planner import FakePlanner, refuse, result, searching
from tests.planner.command_line import COMMAND


def test_going_back_names_the_plan_in_force(fleet: FakePlanner, hetis_plan: Run) -> None:
    hetis_plan("rollback", "--dry-run")
    assert fleet.clusters["clusters/paper"].active_plan == "plans/night"
    assert "rolling back from plans/night to plans/day" in hetis_plan("rollback").err
    assert last_request(fleet, plan_service_pb2.RollbackPlanRequest).name == "plans/night"
    assert "activate another plan" in hetis_plan("rollback", "night", code=ExitCode.CONFLICT).err


def test_without_a_plan_in_force_there_is_no_way_back(fleet: FakePlanner, hetis_plan: Run) -> None:
    fleet.clusters["clusters/paper"].active_plan = ""
    assert hetis_plan("rollback", code=ExitCode.CONFLICT).err == "error: clusters/paper has no plan in force\n"


def test_cancelling_keeps_the_best_so_far(planner: FakePlanner, hetis_plan: Run) -> None:
    for name, answer in (("plans/a", True), ("plans/b", False)):
        planner.plans[name] = plan_pb2.Plan(name=name, state=plan_pb2.PLAN_STATE_SOLVING)
        if answer:
            planner.plans[name].result.value = 1.5
            planner.plans[name].result.unit = "requests/s"
    assert "CANCELLED" in hetis_plan("cancel", "a").out
    assert "was cancelled and has no plan" in hetis_plan("cancel", "plans/b", code=ExitCode.NO_PLAN).err


@pytest.mark.parametrize(
    ("activation", "said"),
    [
        ("ACTIVATING", "plans/night is still being activated"),
        ("ACTIVE", "plans/night stays in"),
        ("FAILED", "plans/night stays in"),
    ],
)
def test_what_cannot_be_withdrawn_is_gone_back_from(
    fleet: FakePlanner, hetis_plan: Run, activation: str, said: str
) -> None:
    fleet.plans["plans/night"].activation = plan_pb2.ActivationState.Value(f"ACTIVATION_STATE_{activation}")
    shown = hetis_plan("cancel", "night", code=ExitCode.CONFLICT)  # and does not wait until it is up
    told = shown.err
    assert said in told
    assert "go back to it: hetis-plan rollback plans/night\n" in told
    fleet.clusters["clusters/paper"].earlier_plan = ""
    told = hetis_plan("cancel", "night", code=ExitCode.CONFLICT).err
    assert said in told
    assert "rollback" not in told, "there is nothing to go back to"
    assert "activate another plan: hetis-plan apply --activate PLAN\n" in told
    assert fleet.calls["WatchPlan"] == 0


@pytest.mark.parametrize(
    ("earlier", "num_serving", "ways_out"),
    [
        ("plans/day", 1, ["the plan that served before still serves", "roll back: hetis-plan rollback plans/night"]),
        ("", 1, ["activate another plan, or this one once the cause is gone: hetis-plan apply --activate plans/night"]),
        (
            "",
            0,
            [
                "activate another plan, or this one once the cause is gone: hetis-plan apply --activate plans/night",
                "withdraw it while nothing serves: hetis-plan cancel plans/night",
            ],
        ),
    ],
)
def test_the_ways_out_of_a_failed_activation_are_those_that_exist(
    fleet: FakePlanner, hetis_plan: Run, earlier: str, num_serving: int, ways_out: list[str]
) -> None:
    """In the past a rollback was advised although no plan had been in force before."""
    failure = failure_pb2.Failure(reason=failure_pb2.ERROR_REASON_ENGINE_CANNOT, message="no engine")
    fleet.clusters["clusters/paper"].earlier_plan = earlier
    fleet.plans["plans/night"].activation = plan_pb2.ACTIVATION_STATE_FAILED
    fleet.plans["plans/night"].activation_progress.CopyFrom(
        plan_pb2.ActivationProgress(num_serving=num_serving, num_failed=1, failure=failure)
    )
    shown = hetis_plan("watch", "night", code=ExitCode.INTERNAL)
    error = "error: plans/night could not be activated: no engine (ENGINE_CANNOT)\n"
    _, found, after = shown.err.partition(error)
    assert found
    assert after == "".join(f"  {line}\n" for line in ways_out)


def test_an_activation_that_someone_withdraws_is_a_conflict(fleet: FakePlanner, hetis_plan: Run) -> None:
    def withdraw(method: str, _context: Any) -> None:
        if method == "WatchPlan":
            fleet.plans["plans/day"].activation = plan_pb2.ACTIVATION_STATE_INACTIVE

    fleet.fail = withdraw
    shown = hetis_plan("apply", "--activate", "plans/day", code=ExitCode.CONFLICT)
    assert "error: plans/day is not in force: its activation was cancelled" in shown.err


def test_a_way_out_of_an_activation_is_named(fleet: FakePlanner, hetis_plan: Run) -> None:
    metadata = {"cluster": "clusters/paper", "plan": "plans/a"}
    for reason in ("ACTIVATION_IN_PROGRESS", "NO_EARLIER_PLAN"):
        fleet.fail = lambda method, context, reason=reason: (  # type: ignore[misc]
            refuse(context, code_pb2.ABORTED, reason, "it is busy", metadata=metadata)
            if method in ("ActivatePlan", "RollbackPlan")
            else None
        )
        assert "hetis-plan cancel plans/a\n" in hetis_plan("rollback", "night", code=ExitCode.CONFLICT).err


@pytest.mark.parametrize(
    ("awaited", "number", "said"),
    [
        ([], 0, "plans/a ACTIVATING: 8 start"),
        (["n-0"], 1, "plans/a ACTIVATING: 8 start; waits for n-0"),
        (["n-0", "n-1", "n-2"], 4, "plans/a ACTIVATING: 8 start; waits for n-0, n-1, n-2 and 1 more node"),
        (["n-0", "n-1", "n-2"], 1003, "plans/a ACTIVATING: 8 start; waits for n-0, n-1, n-2 and 1,000 more nodes"),
    ],
)
def test_the_progress_of_an_activation_names_the_nodes_that_hold_it_up(
    awaited: list[str], number: int, said: str
) -> None:
    plan = plan_pb2.Plan(
        name="plans/a", state=plan_pb2.PLAN_STATE_READY, activation=plan_pb2.ACTIVATION_STATE_ACTIVATING,
        activation_progress=plan_pb2.ActivationProgress(
            num_starting=8, awaited_nodes=awaited, num_awaited_nodes=number
        ),
    )  # fmt: skip
    assert line_of(plan) == said


@pytest.mark.parametrize(
    ("more", "undone"),
    [
        ([], ""),
        (["--activate"], ", and not activated"),
        (["--activate", "--out", "plan.json"], ", and not activated or saved"),
    ],
)
def test_what_an_operator_cancels_is_neither_activated_nor_saved(
    planner: FakePlanner, hetis_plan: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    more: list[str], undone: str,
) -> None:  # fmt: skip
    """In the past `apply --activate` put the best plan so far in force, against the will of the one who cancelled."""
    monkeypatch.chdir(tmp_path)
    cancelled = plan_pb2.Plan(state=plan_pb2.PLAN_STATE_CANCELLED, result=result())
    planner.searches = [(0.0, searching(1.2, 1.7)), (0.0, cancelled)]
    captured = hetis_plan("apply", *PROBLEM, "--name", "night", *more, code=ExitCode.CONFLICT)
    assert "CANCELLED" in captured.out
    assert f"error: the search for plans/night was cancelled: its best plan so far was kept{undone}\n" in captured.err
    assert "  activate it nevertheless: hetis-plan apply --activate plans/night\n" in captured.err
    assert planner.calls["ActivatePlan"] == 0
    assert not list(tmp_path.iterdir())


def test_what_is_left_to_do_after_a_search_is_told_if_the_planner_cannot_be_reached(
    planner: FakePlanner, hetis_plan: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the past only how to follow it, which does not activate it."""

    def fail(method: str, context: Any) -> None:
        if method == "WatchPlan":
            refuse(context, code_pb2.UNAVAILABLE, "STORE_UNAVAILABLE", "no store")

    planner.searches = [(60.0, searching(1.2, 1.7))]
    planner.fail = fail
    monkeypatch.setattr("hetis.planner.cli.server.server_verb.LONGEST_SILENCE_S", 0.0)
    follow = "plans/night continues on the planner\n  follow it: hetis-plan watch plans/night\n"
    activate = "  activate it once it is solved: hetis-plan apply --activate plans/night\n"
    save = "  save it once it is solved: hetis-plan apply plans/night --out FILE\n"
    cancel = "  cancel it: hetis-plan cancel plans/night\n"
    shown = hetis_plan("apply", *PROBLEM, "--name", "night", "--activate", "--out", "p.json", code=ExitCode.UNREACHABLE)
    assert follow + activate + save + cancel in shown.err
    planner.plans.clear()
    assert follow + cancel in hetis_plan("apply", *PROBLEM, "--name", "night", code=ExitCode.UNREACHABLE).err


def test_ctrl_c_leaves_the_plan_running_and_says_how_to_go_on(planner: FakePlanner) -> None:
    planner.searches = [(0.0, searching(1.2, 1.7)), (60.0, searching(1.3, 1.6))]
    process = subprocess.Popen(
        with_ctrl_c([*COMMAND, "apply", *PROBLEM, "--name", "night"]),
        env=environment(HETIS_SERVER=planner.address),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        until_s = time.monotonic() + 60
        while planner.calls["WatchPlan"] == 0 and time.monotonic() < until_s:
            time.sleep(0.05)
        time.sleep(1.0)  # while it waits
        os.kill(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()  # closes the pipes, even if it did not end by itself
    assert process.returncode == ExitCode.INTERRUPTED
    assert out == ""
    assert "plans/night continues on the planner\n  follow it: hetis-plan watch plans/night\n" in err
    assert "cancel it: hetis-plan cancel plans/night" in err
    assert planner.calls["CancelPlan"] == 0
    assert planner.plans["plans/night"].state == plan_pb2.PLAN_STATE_SOLVING
