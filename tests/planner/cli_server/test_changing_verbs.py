"""apply, rollback, cancel: what they send, print and return."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from google.rpc import code_pb2

from hetis.formats.catalogue import find_gpu
from hetis.formats.documents import dump
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.cli.server.waiting import line_of
from hetis.profiler.roofline import modelled_profile
from hetis.v1 import document_pb2, failure_pb2, plan_pb2, plan_service_pb2, replica_pb2
from tests.command_line import environment, with_ctrl_c
from tests.planner.cli_server.conftest import EXAMPLES, Run
from tests.planner.client.fake_planner import FakePlanner, refuse, result, searching
from tests.planner.command_line import COMMAND

Captured = pytest.CaptureFixture[str]
PAPER = str(EXAMPLES / "paper.yaml")
PROBLEM = ["--cluster", PAPER, "--model", "Llama-2-70B", "--workload", "8000/300"]


def last_request(planner: FakePlanner, kind: type[Any]) -> Any:
    return next(request for request in reversed(planner.requests) if isinstance(request, kind))


def test_a_cluster_file_is_created_then_updated(planner: FakePlanner, hetis_plan: Run, capsys: Captured) -> None:
    assert hetis_plan("apply", PAPER) == ExitCode.OK
    (name,) = planner.clusters
    assert capsys.readouterr().out == f"{name}  created\n"
    assert planner.clusters[name].document.content == Path(PAPER).read_bytes()
    assert planner.clusters[name].document.source_name == PAPER
    assert hetis_plan("apply", PAPER) == ExitCode.OK
    assert capsys.readouterr().out == f"{name}  updated\n"
    assert planner.calls["UpdateCluster"] == 1
    planner.clusters[name].document.digest = "sha256:1"  # as the real planner, which sees that nothing changed


def test_a_profile_that_no_gpu_of_the_cluster_can_have_is_refused_before_any_call(
    planner: FakePlanner, hetis_plan: Run, capsys: Captured, tmp_path: Path
) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(dump(replace(modelled_profile(find_gpu("RTX-3090").gpu), usable_bytes=10**15)))
    assert hetis_plan("apply", *PROBLEM, "--profile", str(path)) == ExitCode.INVALID
    assert f"{path}: usable_bytes is 1PB, more than the 24GiB of a RTX-3090" in capsys.readouterr().err
    assert planner.clusters == {}


def test_a_cluster_of_another_name_with_the_same_id_is_not_replaced_by_accident(
    planner: FakePlanner, hetis_plan: Run, capsys: Captured, tmp_path: Path
) -> None:
    stored, other = tmp_path / "stored.yaml", tmp_path / "other.yaml"
    for path, name in ((stored, "Prod.Fleet_1"), (other, "prod.fleet.1")):
        path.write_text(Path(PAPER).read_text().replace("name: paper", f"name: {name}"))
    assert hetis_plan("apply", str(stored)) == ExitCode.OK
    for command in (
        ("apply", str(other)),
        ("apply", str(other), "--dry-run"),
        ("apply", "-c", str(other), *PROBLEM[2:]),
    ):
        capsys.readouterr()
        assert hetis_plan(*command) == ExitCode.CONFLICT
        said = capsys.readouterr().err
        assert (
            "clusters/prod-fleet-1 is the cluster named 'Prod.Fleet_1', and the file's is named 'prod.fleet.1'" in said
        )
        assert planner.clusters["clusters/prod-fleet-1"].document.content == stored.read_bytes()
    assert hetis_plan("apply", str(other), "--rename") == ExitCode.OK
    assert planner.clusters["clusters/prod-fleet-1"].document.content == other.read_bytes()


def test_somebody_elses_change_is_a_conflict(planner: FakePlanner, hetis_plan: Run, capsys: Captured) -> None:
    hetis_plan("apply", PAPER)
    name = next(iter(planner.clusters))

    def fail(method: str, context: Any) -> None:
        if method == "UpdateCluster":
            planner.clusters[name].etag = "v9"

    planner.fail = fail
    capsys.readouterr()
    assert hetis_plan("apply", PAPER) == ExitCode.CONFLICT
    assert f"see what changed (hetis-plan get {name})" in capsys.readouterr().err


def test_a_file_with_problems_is_refused_before_any_call(
    planner: FakePlanner, hetis_plan: Run, capsys: Captured, tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(Path(PAPER).read_text().replace("count:", "cuont:", 1))
    assert hetis_plan("apply", PAPER, str(wrong)) == ExitCode.INVALID
    assert "wrong.yaml:" in capsys.readouterr().err
    assert not planner.calls


def test_every_violation_of_the_planner_is_told_with_its_line(
    planner: FakePlanner, hetis_plan: Run, capsys: Captured
) -> None:
    planner.fail = lambda method, context: (
        refuse(
            context,
            code_pb2.INVALID_ARGUMENT,
            "INVALID_DOCUMENT",
            "both",
            violations=(
                ("cluster.document#nodes[2].gpus[0].type", "fleet.yaml:12: unknown GPU 'A101'"),
                ("cluster_id", "64 characters, at most 63"),
            ),
        )
        if method == "CreateCluster"
        else None
    )
    assert hetis_plan("apply", PAPER) == ExitCode.INVALID
    assert capsys.readouterr().err == (
        "error: 2 problems in the request (INVALID_DOCUMENT)\n"
        "  cluster.document#nodes[2].gpus[0].type: fleet.yaml:12: unknown GPU 'A101'\n"
        "  cluster_id: 64 characters, at most 63\n"
    )


def test_a_name_that_the_planner_refuses_is_that_of_its_option(
    planner: FakePlanner, hetis_plan: Run, capsys: Captured
) -> None:
    planner.fail = lambda method, context: (
        refuse(context, code_pb2.INVALID_ARGUMENT, "INVALID_FIELD", "one", violations=(("plan_id", "is 'Night_1'"),))
        if method == "CreatePlan"
        else None
    )
    assert hetis_plan(*["apply", *PROBLEM, "--name", "Night_1"]) == ExitCode.INVALID
    assert capsys.readouterr().err.endswith("1 problem in the request (INVALID_FIELD)\n  --name: is 'Night_1'\n")


@pytest.mark.parametrize("workload", ["8000/300", "azure_conv_2023"])
def test_a_workload_with_prefix_hits_is_sent_as_a_document(
    workload: str, planner: FakePlanner, hetis_plan: Run
) -> None:
    asked = ["apply", *PROBLEM[:-1], workload, "--prefix-hit-rate", "40%"]
    assert hetis_plan(*asked) == ExitCode.OK
    spec = last_request(planner, plan_service_pb2.CreatePlanRequest).plan.spec
    assert spec.workload_name == ""
    assert spec.workload_document.kind == document_pb2.DOCUMENT_KIND_WORKLOAD
    document = json.loads(spec.workload_document.content)
    assert (document["name"], document["prefix_hit_rate"]) == (workload, 0.4)


def test_a_problem_is_solved_by_the_planner(planner: FakePlanner, hetis_plan: Run, capsys: Captured) -> None:
    code = hetis_plan(
        "apply", *PROBLEM, "--name", "night", "--ttft", "none", "--tpot", "50ms", "--time-limit", "90s", "--seed", "7",
        "--roles", "decode,prefill", "--engine", "vllm", "--max-stages", "4", "--max-gpus", "16",
        "--min-layers-per-stage", "3", "--max-nodes-per-replica", "2",
        "--weights", "fp8", "--kv", "fp8", "--mtp", "2:0.7",
        "--max-num-seqs", "64", "--chunk-tokens", "512,256,512", "--kv-blocks", "9000", "--tpot-statistic", "p99",
    )  # fmt: skip
    assert code == ExitCode.OK
    sent = last_request(planner, plan_service_pb2.CreatePlanRequest)
    spec = sent.plan.spec
    assert sent.plan_id == "night"
    assert sent.plan.cluster == next(iter(planner.clusters))
    assert spec.model_name.endswith("Llama-2-70b-hf")
    assert spec.workload_name == "8000/300"
    assert (spec.objective.ttft_unlimited, spec.objective.tpot_limit_s) == (True, 0.05)
    assert (spec.time_limit.seconds, spec.seed, spec.strategy, spec.gap_target) == (90, 7, "hetis", 0.001)
    assert list(spec.roles) == [replica_pb2.REPLICA_ROLE_PREFILL, replica_pb2.REPLICA_ROLE_DECODE]
    assert (spec.weights, spec.kv, spec.mtp) == ("fp8", "fp8", "2:0.7")
    assert (spec.engine, spec.max_stages, spec.max_gpus) == ("vllm", 4, 16)
    assert (spec.min_layers, spec.max_nodes) == (3, 2)
    assert (spec.max_num_seqs, list(spec.chunk_tokens), spec.kv_blocks) == (64, [256, 512], 9000)
    assert (spec.ttft_statistic, spec.tpot_statistic, spec.attainment) == ("", "p99", 0.0)
    assert not spec.skip_verification
    captured = capsys.readouterr()
    assert "pricing: incumbent 1.200, bound 1.700 requests/s, gap 42%" in captured.err
    assert "2 replicas on 12 GPUs, 4 of them attention workers" in captured.out
    assert "gap 0.19%" in captured.out
    assert "MISSED at 1.610 requests/s: TTFT p95 3.4 s of 2 s; kept up to 1.500" in " ".join(captured.out.split())
    assert planner.calls["ActivatePlan"] == 0


def test_a_share_of_the_requests_or_no_simulation_is_asked_for(planner: FakePlanner, hetis_plan: Run) -> None:
    assert hetis_plan("apply", *PROBLEM, "--attainment", "90%", "--no-wait") == ExitCode.OK
    assert last_request(planner, plan_service_pb2.CreatePlanRequest).plan.spec.attainment == 0.9
    assert hetis_plan("apply", *PROBLEM, "--no-verify", "--no-wait") == ExitCode.OK
    assert last_request(planner, plan_service_pb2.CreatePlanRequest).plan.spec.skip_verification


def test_a_solved_plan_is_activated_saved_and_printed_as_data(
    planner: FakePlanner, hetis_plan: Run, capsys: Captured, tmp_path: Path
) -> None:
    planner.documents["plans/night"] = b'{"kind": "Plan"}\n'
    out = tmp_path / "plan.json"
    arguments = ["--name", "night", "--activate", "--out", str(out), "-o", "json"]
    assert hetis_plan("apply", *PROBLEM, *arguments) == ExitCode.OK
    assert out.read_text() == '{"kind": "Plan"}\n'
    data = json.loads(capsys.readouterr().out)
    assert (data["state"], data["activation"]) == ("PLAN_STATE_READY", "ACTIVATION_STATE_ACTIVE")
    sent = last_request(planner, plan_service_pb2.ActivatePlanRequest)
    assert sent.cluster_etag == "v1"
    assert sent.request_id


@pytest.mark.parametrize("more", [(), ("--activate",), ("-o", "json")])
def test_a_solved_plan_is_printed_instead_of_the_tables(
    planner: FakePlanner, hetis_plan: Run, capsys: Captured, tmp_path: Path, more: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    planner.documents["plans/night"] = b'{"kind": "Plan"}\n'
    monkeypatch.chdir(tmp_path)
    assert hetis_plan("apply", *PROBLEM, "--name", "night", "--out", "-", *more) == ExitCode.OK
    assert capsys.readouterr().out == '{"kind": "Plan"}\n'
    assert not Path("-").exists()
    assert planner.calls["ActivatePlan"] == ("--activate" in more)


def test_a_search_that_a_new_leader_begins_again_is_announced_once(
    planner: FakePlanner, hetis_plan: Run, capsys: Captured
) -> None:
    """In the past its progress fell back to the beginning, and nothing said why."""

    def begun(time_s: int, elapsed_s: float) -> plan_pb2.Plan:
        found = searching(10.0, 12.0)
        found.progress.elapsed_s = elapsed_s
        found.solve_start_time.FromSeconds(time_s)
        return found

    planner.searches = [
        (0.0, plan_pb2.Plan(state=plan_pb2.PLAN_STATE_QUEUED)),
        (0.0, begun(100, 30.0)),
        (0.0, begun(200, 1.0)),
        (0.0, begun(200, 2.0)),
        (0.0, plan_pb2.Plan(state=plan_pb2.PLAN_STATE_READY)),
    ]
    assert hetis_plan("apply", *PROBLEM, "--name", "night") == ExitCode.OK
    said = capsys.readouterr().err
    assert said.count("the search for plans/night begins again: the planner that ran it is gone\n") == 1


@pytest.mark.parametrize("has_found", [True, False])
def test_a_plan_that_was_found_and_is_lost_in_a_takeover_is_told(
    planner: FakePlanner, hetis_plan: Run, capsys: Captured, has_found: bool
) -> None:
    """In the past it was said that none was found, below the lines that showed one."""
    before = searching(10.0, 12.0) if has_found else plan_pb2.Plan(state=plan_pb2.PLAN_STATE_SOLVING)
    before.solve_start_time.FromSeconds(100)
    planner.searches = [(0.0, before), (0.0, plan_pb2.Plan(state=plan_pb2.PLAN_STATE_CANCELLED))]
    assert hetis_plan("apply", *PROBLEM, "--name", "night") == ExitCode.NO_PLAN
    said = capsys.readouterr().err
    lost = "the best plan so far of plans/night is lost: its planner or solver ended before it was saved\n"
    assert said.count(lost) == has_found
    assert said.endswith("error: plans/night was cancelled and has no plan\n")


def test_an_infeasible_problem_exits_3_with_its_reasons(
    planner: FakePlanner, hetis_plan: Run, capsys: Captured
) -> None:
    planner.searches = [
        (
            0.0,
            plan_pb2.Plan(
                state=plan_pb2.PLAN_STATE_INFEASIBLE, infeasible_reasons=["weights need 140 GB, the fleet has 48"]
            ),
        )
    ]
    assert hetis_plan("apply", *PROBLEM, "--activate") == ExitCode.INFEASIBLE
    captured = capsys.readouterr()
    assert "  - weights need 140 GB, the fleet has 48\n" in captured.err
    assert planner.calls["ActivatePlan"] == 0


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        (failure_pb2.ERROR_REASON_NO_PLAN_FOUND, ExitCode.NO_PLAN),
        (failure_pb2.ERROR_REASON_SOLVER_CRASHED, ExitCode.INTERNAL),
    ],
)
def test_a_failed_search_has_its_code(
    planner: FakePlanner, hetis_plan: Run, capsys: Captured, reason: Any, code: ExitCode
) -> None:
    failed = plan_pb2.Plan(
        state=plan_pb2.PLAN_STATE_FAILED, failure=failure_pb2.Failure(reason=reason, message="it ended")
    )
    planner.searches = [(0.0, failed)]
    assert hetis_plan("apply", *PROBLEM) == code
    assert f"it ended ({failure_pb2.ErrorReason.Name(reason).removeprefix('ERROR_REASON_')})" in capsys.readouterr().err


def test_a_plan_file_is_imported_and_activated(
    fleet: FakePlanner, hetis_plan: Run, capsys: Captured, saved_plan: Path
) -> None:
    name = "clusters/paper"
    assert hetis_plan("apply", "--plan", str(saved_plan), "--activate") == ExitCode.OK
    sent = last_request(fleet, plan_service_pb2.CreatePlanRequest)
    assert sent.plan.cluster == name
    assert sent.plan.imported.kind == document_pb2.DOCUMENT_KIND_PLAN
    assert sent.plan.imported.content == saved_plan.read_bytes()
    assert fleet.clusters[name].active_plan.startswith("plans/p")
    assert "a100-0/0" in capsys.readouterr().out


def test_a_plan_that_is_there_is_activated_or_only_looked_at(
    fleet: FakePlanner, hetis_plan: Run, capsys: Captured
) -> None:
    assert hetis_plan("apply", "plans/day") == ExitCode.OK
    captured = capsys.readouterr()
    assert "dry run: nothing was changed; plans/night is in force now" in captured.err
    assert "start" in captured.out
    assert fleet.clusters["clusters/paper"].active_plan == "plans/night"
    assert hetis_plan("apply", "--activate", "plans/day") == ExitCode.OK
    assert fleet.clusters["clusters/paper"].active_plan == "plans/day"


def test_a_plan_that_is_there_is_saved(fleet: FakePlanner, hetis_plan: Run, capsys: Captured, tmp_path: Path) -> None:
    fleet.documents["plans/day"] = b'{"kind": "Plan"}\n'
    out, other = tmp_path / "plan.json", tmp_path / "other.json"
    assert hetis_plan("apply", "plans/day", "--out", str(out)) == ExitCode.OK
    assert out.read_text() == '{"kind": "Plan"}\n'
    captured = capsys.readouterr()
    assert f"saved {out}\ndry run: nothing was changed; plans/night is in force now" in captured.err
    assert "start" in captured.out
    assert hetis_plan("apply", "plans/day", "--dry-run", "--out", str(other)) == ExitCode.OK
    assert not other.exists()
    assert "dry run: nothing was changed or saved" in capsys.readouterr().err
    for more in ([], ["--activate"]):
        assert hetis_plan("apply", "plans/day", "--out", "-", *more) == ExitCode.OK
        assert capsys.readouterr().out == '{"kind": "Plan"}\n'
    assert fleet.clusters["clusters/paper"].active_plan == "plans/day"


def test_a_dry_run_changes_nothing(planner: FakePlanner, hetis_plan: Run, capsys: Captured) -> None:
    assert hetis_plan("apply", PAPER, "--dry-run") == ExitCode.OK
    assert not planner.clusters
    assert "created (dry run)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing to apply"),
        (["--model", "Llama-2-70B"], "to solve, --cluster and --workload must be given too"),
        ([*PROBLEM, "--objective", "cost"], "--objective cost needs --rate"),
        ([*PROBLEM, "--plan", "p.json"], "--plan imports a finished plan"),
        (["plans/a", "plans/b"], "more than one plan"),
        ([*PROBLEM, "plans/a"], "more than one plan"),
        ([*PROBLEM, "--no-wait", "--activate"], "--activate needs the end of the search"),
        ([*PROBLEM, "--no-wait", "--out", "-"], "--out needs the end of the search"),
        (["-c", PAPER, "--activate"], "--activate needs --model and --workload, or --plan, or plans/NAME"),
        ([PAPER, "--out", "plan.json"], "--out needs --model and --workload, or --plan, or plans/NAME"),
        (["-c", PAPER, "--no-wait"], "--no-wait needs --model and --workload, or --plan, or plans/NAME"),
        (["-c", PAPER, "--name", "night"], "--name needs --model and --workload, or --plan"),
        (["plans/day", "--name", "night"], "--name needs --model and --workload, or --plan"),
        (["plans/day", "--time-limit", "60s"], "--time-limit needs --model and --workload, without which nothing"),
        (
            ["plans/day", "--rate", "3", "--ttft", "1s", "--strategy", "hetis", "--no-verify", "--kv", "fp8"],
            "--kv, --rate, --ttft, --strategy and --verify/--no-verify need --model and --workload",
        ),
        (["--plan", "p.json", "--objective", "goodput", "--seed", "0"], "--objective and --seed need --model and"),
        ([PAPER, "--max-gpus", "4", "--survive", "node"], "--survive and --max-gpus need --model and --workload"),
    ],
)
def test_contradictions_are_refused_before_any_change(
    planner: FakePlanner, hetis_plan: Run, capsys: Captured, arguments: list[str], said: str
) -> None:
    assert hetis_plan("apply", *arguments) == ExitCode.INVALID
    assert said in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not planner.calls


def test_a_full_queue_says_when_to_come_back(planner: FakePlanner, hetis_plan: Run, capsys: Captured) -> None:
    planner.fail = lambda method, context: (
        refuse(context, code_pb2.RESOURCE_EXHAUSTED, "SOLVER_QUEUE_FULL", "32 plans wait", retry_after_s=12)
        if method == "CreatePlan"
        else None
    )
    assert hetis_plan("apply", *PROBLEM) == ExitCode.UNREACHABLE
    assert capsys.readouterr().err.endswith("error: 32 plans wait (SOLVER_QUEUE_FULL)\n  retry in 12 s\n")


def test_going_back_names_the_plan_in_force(fleet: FakePlanner, hetis_plan: Run, capsys: Captured) -> None:
    assert hetis_plan("rollback", "--dry-run") == ExitCode.OK
    assert fleet.clusters["clusters/paper"].active_plan == "plans/night"
    assert hetis_plan("rollback") == ExitCode.OK
    assert "rolling back from plans/night to plans/day" in capsys.readouterr().err
    assert last_request(fleet, plan_service_pb2.RollbackPlanRequest).name == "plans/night"
    assert hetis_plan("rollback", "night") == ExitCode.CONFLICT
    assert "activate another plan" in capsys.readouterr().err


def test_without_a_plan_in_force_there_is_no_way_back(fleet: FakePlanner, hetis_plan: Run, capsys: Captured) -> None:
    fleet.clusters["clusters/paper"].active_plan = ""
    assert hetis_plan("rollback") == ExitCode.CONFLICT
    assert capsys.readouterr().err == "error: clusters/paper has no plan in force\n"


def test_cancelling_keeps_the_best_so_far(planner: FakePlanner, hetis_plan: Run, capsys: Captured) -> None:
    for name, answer in (("plans/a", True), ("plans/b", False)):
        planner.plans[name] = plan_pb2.Plan(name=name, state=plan_pb2.PLAN_STATE_SOLVING)
        if answer:
            planner.plans[name].result.value = 1.5
            planner.plans[name].result.unit = "requests/s"
    assert hetis_plan("cancel", "a") == ExitCode.OK
    assert "CANCELLED" in capsys.readouterr().out
    assert hetis_plan("cancel", "plans/b") == ExitCode.NO_PLAN
    assert "was cancelled and has no plan" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("activation", "said"),
    [
        ("ACTIVATING", "plans/night is still being activated"),
        ("ACTIVE", "plans/night stays in"),
        ("FAILED", "plans/night stays in"),
    ],
)
def test_what_cannot_be_withdrawn_is_gone_back_from(
    fleet: FakePlanner, hetis_plan: Run, capsys: Captured, activation: str, said: str
) -> None:
    fleet.plans["plans/night"].activation = plan_pb2.ActivationState.Value(f"ACTIVATION_STATE_{activation}")
    assert hetis_plan("cancel", "night") == ExitCode.CONFLICT  # and does not wait until it is up
    told = capsys.readouterr().err
    assert said in told
    assert "go back to it: hetis-plan rollback plans/night\n" in told
    fleet.clusters["clusters/paper"].earlier_plan = ""
    assert hetis_plan("cancel", "night") == ExitCode.CONFLICT
    told = capsys.readouterr().err
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
    fleet: FakePlanner, hetis_plan: Run, capsys: Captured, earlier: str, num_serving: int, ways_out: list[str]
) -> None:
    """In the past a rollback was advised although no plan had been in force before."""
    failure = failure_pb2.Failure(reason=failure_pb2.ERROR_REASON_ENGINE_CANNOT, message="no engine")
    fleet.clusters["clusters/paper"].earlier_plan = earlier
    fleet.plans["plans/night"].activation = plan_pb2.ACTIVATION_STATE_FAILED
    fleet.plans["plans/night"].activation_progress.CopyFrom(
        plan_pb2.ActivationProgress(num_serving=num_serving, num_failed=1, failure=failure)
    )
    assert hetis_plan("watch", "night") == ExitCode.INTERNAL
    error = "error: plans/night could not be activated: no engine (ENGINE_CANNOT)\n"
    _, found, after = capsys.readouterr().err.partition(error)
    assert found
    assert after == "".join(f"  {line}\n" for line in ways_out)


def test_an_activation_that_someone_withdraws_is_a_conflict(
    fleet: FakePlanner, hetis_plan: Run, capsys: Captured
) -> None:
    def withdraw(method: str, _context: Any) -> None:
        if method == "WatchPlan":
            fleet.plans["plans/day"].activation = plan_pb2.ACTIVATION_STATE_INACTIVE

    fleet.fail = withdraw
    assert hetis_plan("apply", "--activate", "plans/day") == ExitCode.CONFLICT
    assert "error: plans/day is not in force: its activation was cancelled" in capsys.readouterr().err


def test_a_way_out_of_an_activation_is_named(fleet: FakePlanner, hetis_plan: Run, capsys: Captured) -> None:
    metadata = {"cluster": "clusters/paper", "plan": "plans/a"}
    for reason in ("ACTIVATION_IN_PROGRESS", "NO_EARLIER_PLAN"):
        fleet.fail = lambda method, context, reason=reason: (  # type: ignore[misc]
            refuse(context, code_pb2.ABORTED, reason, "it is busy", metadata=metadata)
            if method in ("ActivatePlan", "RollbackPlan")
            else None
        )
        assert hetis_plan("rollback", "night") == ExitCode.CONFLICT
        assert "hetis-plan cancel plans/a\n" in capsys.readouterr().err


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
    planner: FakePlanner, hetis_plan: Run, capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    more: list[str], undone: str,
) -> None:  # fmt: skip
    """In the past `apply --activate` put the best plan so far in force, against the will of the one who cancelled."""
    monkeypatch.chdir(tmp_path)
    cancelled = plan_pb2.Plan(state=plan_pb2.PLAN_STATE_CANCELLED, result=result())
    planner.searches = [(0.0, searching(1.2, 1.7)), (0.0, cancelled)]
    assert hetis_plan("apply", *PROBLEM, "--name", "night", *more) == ExitCode.CONFLICT
    captured = capsys.readouterr()
    assert "CANCELLED" in captured.out
    assert f"error: the search for plans/night was cancelled: its best plan so far was kept{undone}\n" in captured.err
    assert "  activate it nevertheless: hetis-plan apply --activate plans/night\n" in captured.err
    assert planner.calls["ActivatePlan"] == 0
    assert not list(tmp_path.iterdir())


def test_what_is_left_to_do_after_a_search_is_told_if_the_planner_cannot_be_reached(
    planner: FakePlanner, hetis_plan: Run, capsys: Captured, monkeypatch: pytest.MonkeyPatch
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
    assert hetis_plan("apply", *PROBLEM, "--name", "night", "--activate", "--out", "p.json") == ExitCode.UNREACHABLE
    assert follow + activate + save + cancel in capsys.readouterr().err
    planner.plans.clear()
    assert hetis_plan("apply", *PROBLEM, "--name", "night") == ExitCode.UNREACHABLE
    assert follow + cancel in capsys.readouterr().err


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
