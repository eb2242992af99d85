"""A plan whose prompts are prefilled and decoded on different replicas, through all commands that read plans."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hetis.formats.documents import load_plan
from hetis.planner.cli.app import run
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.convert.plans import complete, result_to_proto
from hetis.planner.convert.stages import stages_of_replica
from hetis.planner.resources.plan_activation import load_bytes_of
from hetis.planner.use_cases.describing import KV_IS_FOR_ENGINES
from hetis.planner.use_cases.saved_plans import load_plan_and_problem
from hetis.planner.use_cases.simulation.simulate import default_rate
from hetis.planner.use_cases.verification.rates import simulated_at
from hetis.simulator.running import silent
from hetis.solver.budget import Budget
from hetis.solver.plan import Role
from hetis.v1 import plan_pb2
from tests.planner.command_line import EXAMPLES, invoke

FLEET = ["--cluster", str(EXAMPLES / "h100-l4.yaml"), "--model", "Llama-3.1-8B", "--workload", "8000/300"]


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The plan's file; without unified replicas, under limits that this fleet can keep."""
    path = tmp_path_factory.mktemp("plans") / "split.json"
    done = invoke("place", *FLEET, "--roles", "prefill,decode", "--ttft", "5s", "--no-verify", "--out", str(path))
    assert done.exit_code == ExitCode.OK, done.output
    return str(path)


def document(*arguments: str) -> Any:
    done = invoke(*arguments, "-o", "json")
    assert done.exit_code == ExitCode.OK, done.output
    return json.loads(done.stdout)


def test_it_holds_and_its_value_is_what_the_routes_carry(split: str) -> None:
    plan = load_plan(split)
    assert {replica.role for replica in plan.replicas} == {Role.PREFILL, Role.DECODE}
    assert plan.result.value == pytest.approx(plan.result.utilisation * sum(route.rate for route in plan.kv_routes))
    assert document("check", split)["ok"]
    assert KV_IS_FOR_ENGINES in plan.notes


def test_it_can_be_simulated_before_it_is_shown(split: str) -> None:
    """The run has a tenth of the requests that `place` simulates, which would take longer than all other tests here."""
    found = load_plan_and_problem(split)
    rate_rps = default_rate(found.plan, found.problem)
    tried = simulated_at(
        found.plan, found.problem, rate_rps, found.plan.objective, seed=0, budget=Budget(), report=silent,
        lengths=(400,),
    )  # fmt: skip
    assert tried.num_requests == 400
    assert 0 < tried.summary.tpot_s.p50 < tried.summary.ttft_s.p50


def test_a_route_that_was_changed_by_hand_is_caught(split: str, tmp_path: Path) -> None:
    data = json.loads(Path(split).read_text())
    data["kv_routes"][0]["rate"] *= 2
    (tmp_path / "more.json").write_text(json.dumps(data))
    done = invoke("check", str(tmp_path / "more.json"), "-o", "json")
    assert done.exit_code == ExitCode.INVALID
    messages = [violation["message"] for violation in json.loads(done.stdout)["violations"]]
    assert any(message.startswith("routes take ") for message in messages)
    assert any(message.startswith("value is ") for message in messages)


@pytest.mark.parametrize(
    ("roles", "says"),
    [
        (["unified"], "is prefill, the family has unified replicas"),
        (["prefill"], "inputs.roles: roles are prefill, must be unified, or prefill and decode, or all three"),
        (["chef"], "inputs.roles must be a list of unified, prefill, decode: the plan is checked against them"),
    ],
)
def test_roles_in_the_inputs_decide_which_family_it_is_judged_by(
    roles: list[str], says: str, split: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = json.loads(Path(split).read_text())
    data["inputs"]["roles"] = roles
    (tmp_path / "other.json").write_text(json.dumps(data))
    assert run(["check", str(tmp_path / "other.json")]) == ExitCode.INVALID
    captured = capsys.readouterr()
    assert says in " ".join(f"{captured.out} {captured.err}".split())


def test_its_explanation_says_which_side_limits(split: str) -> None:
    found = document("explain", split)
    assert len(found["kv_routes"]) == 1  # one zone: no links between zones
    assert "requests/s, decode replicas" in found["kv_routes"][0]
    assert all(part["kv_wire_s"] > 0 for part in found["stage_times"])
    assert [line.split(":")[0].split("(")[1] for line in found["bottlenecks"]] == [
        f"{replica.role})" for replica in load_plan(split).replicas
    ]


def test_only_decode_replicas_are_dispatched(split: str) -> None:
    found = load_plan_and_problem(split)
    for number, replica in enumerate(found.plan.replicas):
        messages = stages_of_replica(found, number)
        assert len(messages) == (0 if replica.role is Role.PREFILL else sum(s.copies for s in replica.stages))
        done = invoke("dispatch", "--plan", split, "--replica", str(number), "--request", "8000/300")
        if replica.role is Role.PREFILL:
            assert f"replica {number} is a prefill replica, which does not decode" in str(done.exception)
        else:
            assert done.exit_code == ExitCode.OK, done.output


def test_both_roles_load_weights(split: str) -> None:
    found = load_plan_and_problem(split)
    load_bytes = load_bytes_of(found.problem.model)
    assert all(load_bytes(replica) > 16e9 for replica in found.plan.replicas)  # 8 billion weights of two bytes


def test_its_messages_have_roles_and_routes(split: str) -> None:
    plan = load_plan(split)
    message = plan_pb2.Plan(result=result_to_proto(plan, b"{}"))
    complete(message, plan, b"{}")
    sent = [(route.prefill, route.decode, route.rate_rps) for route in message.result.kv_routes]
    assert sent == [(route.prefill, route.decode, route.rate) for route in plan.kv_routes]
