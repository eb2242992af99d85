"""apply, rollback, cancel: what they send, print and return."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from google.rpc import code_pb2

from hetis.planner.cli.exit_codes import ExitCode
from hetis.v1 import document_pb2, failure_pb2, plan_pb2, plan_service_pb2, replica_pb2
from tests.planner.cli_server.conftest import EXAMPLES, Run
from tests.planner.client.fake_planner import FakePlanner, refuse, searching

PAPER = str(EXAMPLES / "paper.yaml")


PROBLEM = ["--cluster", PAPER, "--model", "Llama-2-70B", "--workload", "8000/300"]


def last_request(planner: FakePlanner, kind: type[Any]) -> Any:
    return next(request for request in reversed(planner.requests) if isinstance(request, kind))


def test_a_cluster_file_is_created_then_updated(planner: FakePlanner, hetis_plan: Run) -> None:
    shown = hetis_plan("apply", PAPER)
    (name,) = planner.clusters
    assert shown.out == f"{name}  created\n"
    assert planner.clusters[name].document.content == Path(PAPER).read_bytes()
    assert planner.clusters[name].document.source_name == PAPER
    assert hetis_plan("apply", PAPER).out == f"{name}  updated\n"
    assert planner.calls["UpdateCluster"] == 1
    planner.clusters[name].document.digest = "sha256:1"  # as the real planner, which sees that nothing changed


def test_a_cluster_of_another_name_with_the_same_id_is_not_replaced_by_accident(
    planner: FakePlanner, hetis_plan: Run, tmp_path: Path
) -> None:
    stored, other = tmp_path / "stored.yaml", tmp_path / "other.yaml"
    for path, name in ((stored, "Prod.Fleet_1"), (other, "prod.fleet.1")):
        path.write_text(Path(PAPER).read_text().replace("name: paper", f"name: {name}"))
    hetis_plan("apply", str(stored))
    for command in (
        ("apply", str(other)),
        ("apply", str(other), "--dry-run"),
        ("apply", "-c", str(other), *PROBLEM[2:]),
    ):
        said = "clusters/prod-fleet-1 is the cluster named 'Prod.Fleet_1', and the file's is named 'prod.fleet.1'"
        assert said in hetis_plan(*command, code=ExitCode.CONFLICT).err
        assert planner.clusters["clusters/prod-fleet-1"].document.content == stored.read_bytes()
    hetis_plan("apply", str(other), "--rename")
    assert planner.clusters["clusters/prod-fleet-1"].document.content == other.read_bytes()


def test_somebody_elses_change_is_a_conflict(planner: FakePlanner, hetis_plan: Run) -> None:
    hetis_plan("apply", PAPER)
    name = next(iter(planner.clusters))

    def fail(method: str, context: Any) -> None:
        if method == "UpdateCluster":
            planner.clusters[name].etag = "v9"

    planner.fail = fail
    assert f"see what changed (hetis-plan get {name})" in hetis_plan("apply", PAPER, code=ExitCode.CONFLICT).err


def test_a_file_with_problems_is_refused_before_any_call(planner: FakePlanner, hetis_plan: Run, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(Path(PAPER).read_text().replace("count:", "cuont:", 1))
    assert "wrong.yaml:" in hetis_plan("apply", PAPER, str(wrong), code=ExitCode.INVALID).err
    assert not planner.calls


def test_every_violation_of_the_planner_is_told_with_its_line(planner: FakePlanner, hetis_plan: Run) -> None:
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
    assert hetis_plan("apply", PAPER, code=ExitCode.INVALID).err == (
        "error: 2 problems in the request (INVALID_DOCUMENT)\n"
        "  cluster.document#nodes[2].gpus[0].type: fleet.yaml:12: unknown GPU 'A101'\n"
        "  cluster_id: 64 characters, at most 63\n"
    )


@pytest.mark.parametrize("workload", ["8000/300", "azure_conv_2023"])
@pytest.mark.parametrize(
    ("option", "text", "field", "value"),
    [("--prefix-hit-rate", "40%", "prefix_hit_rate", 0.4), ("--burstiness", "2", "burstiness", 2.0)],
)
def test_a_workload_with_traffic_of_its_own_is_sent_as_a_document(
    workload: str, option: str, text: str, field: str, value: float, planner: FakePlanner, hetis_plan: Run
) -> None:
    hetis_plan("apply", *PROBLEM[:-1], workload, option, text)
    spec = last_request(planner, plan_service_pb2.CreatePlanRequest).plan.spec
    assert spec.workload_name == ""
    assert spec.workload_document.kind == document_pb2.DOCUMENT_KIND_WORKLOAD
    document = json.loads(spec.workload_document.content)
    assert (document["name"], document[field]) == (workload, value)


def test_a_problem_is_solved_by_the_planner(planner: FakePlanner, hetis_plan: Run) -> None:
    captured = hetis_plan(
        "apply", *PROBLEM, "--name", "night", "--ttft", "none", "--tpot", "50ms", "--time-limit", "90s", "--seed", "7",
        "--roles", "decode,prefill", "--engine", "vllm", "--max-stages", "4", "--max-gpus", "16",
        "--min-layers-per-stage", "3", "--max-nodes-per-replica", "2",
        "--weights", "fp8", "--kv", "fp8", "--mtp", "2:0.7",
        "--max-num-seqs", "64", "--chunk-tokens", "512,256,512", "--kv-blocks", "9000", "--tpot-statistic", "p99",
    )  # fmt: skip
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
    assert "pricing: incumbent 1.200, bound 1.700 requests/s, gap 42%" in captured.err
    assert "2 replicas on 12 GPUs, 4 of them attention workers" in captured.out
    assert "gap 0.19%" in captured.out
    assert "MISSED at 1.610 requests/s: TTFT p95 3.4 s of 2 s; kept up to 1.500" in " ".join(captured.out.split())
    assert planner.calls["ActivatePlan"] == 0


def test_a_solved_plan_is_activated_saved_and_printed_as_data(
    planner: FakePlanner, hetis_plan: Run, tmp_path: Path
) -> None:
    planner.documents["plans/night"] = b'{"kind": "Plan"}\n'
    out = tmp_path / "plan.json"
    arguments = ["--name", "night", "--activate", "--out", str(out), "-o", "json"]
    shown = hetis_plan("apply", *PROBLEM, *arguments)
    assert out.read_text() == '{"kind": "Plan"}\n'
    data = json.loads(shown.out)
    assert (data["state"], data["activation"]) == ("PLAN_STATE_READY", "ACTIVATION_STATE_ACTIVE")
    sent = last_request(planner, plan_service_pb2.ActivatePlanRequest)
    assert sent.cluster_etag == "v1"
    assert sent.request_id


@pytest.mark.parametrize("more", [(), ("--activate",), ("-o", "json")])
def test_a_solved_plan_is_printed_instead_of_the_tables(
    planner: FakePlanner, hetis_plan: Run, tmp_path: Path, more: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    planner.documents["plans/night"] = b'{"kind": "Plan"}\n'
    monkeypatch.chdir(tmp_path)
    assert hetis_plan("apply", *PROBLEM, "--name", "night", "--out", "-", *more).out == '{"kind": "Plan"}\n'
    assert not Path("-").exists()
    assert planner.calls["ActivatePlan"] == ("--activate" in more)


def test_a_search_that_a_new_leader_begins_again_is_announced_once(planner: FakePlanner, hetis_plan: Run) -> None:
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
    said = hetis_plan("apply", *PROBLEM, "--name", "night").err
    assert said.count("the search for plans/night begins again: the planner that ran it is gone\n") == 1


@pytest.mark.parametrize("has_found", [True, False])
def test_a_plan_that_was_found_and_is_lost_in_a_takeover_is_told(
    planner: FakePlanner, hetis_plan: Run, has_found: bool
) -> None:
    """In the past it was said that none was found, below the lines that showed one."""
    before = searching(10.0, 12.0) if has_found else plan_pb2.Plan(state=plan_pb2.PLAN_STATE_SOLVING)
    before.solve_start_time.FromSeconds(100)
    planner.searches = [(0.0, before), (0.0, plan_pb2.Plan(state=plan_pb2.PLAN_STATE_CANCELLED))]
    said = hetis_plan("apply", *PROBLEM, "--name", "night", code=ExitCode.NO_PLAN).err
    lost = "the best plan so far of plans/night is lost: its planner or solver ended before it was saved\n"
    assert said.count(lost) == has_found
    assert said.endswith("error: plans/night was cancelled and has no plan\n")


def test_an_infeasible_problem_exits_3_with_its_reasons(planner: FakePlanner, hetis_plan: Run) -> None:
    planner.searches = [
        (
            0.0,
            plan_pb2.Plan(
                state=plan_pb2.PLAN_STATE_INFEASIBLE, infeasible_reasons=["weights need 140 GB, the fleet has 48"]
            ),
        )
    ]
    captured = hetis_plan("apply", *PROBLEM, "--activate", code=ExitCode.INFEASIBLE)
    assert "  - weights need 140 GB, the fleet has 48\n" in captured.err
    assert planner.calls["ActivatePlan"] == 0


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        (failure_pb2.ERROR_REASON_NO_PLAN_FOUND, ExitCode.NO_PLAN),
        (failure_pb2.ERROR_REASON_SOLVER_CRASHED, ExitCode.INTERNAL),
    ],
)
def test_a_failed_search_has_its_code(planner: FakePlanner, hetis_plan: Run, reason: Any, code: ExitCode) -> None:
    failed = plan_pb2.Plan(
        state=plan_pb2.PLAN_STATE_FAILED, failure=failure_pb2.Failure(reason=reason, message="it ended")
    )
    planner.searches = [(0.0, failed)]
    said = f"it ended ({failure_pb2.ErrorReason.Name(reason).removeprefix('ERROR_REASON_')})"
    assert said in hetis_plan("apply", *PROBLEM, code=code).err


def test_a_plan_file_is_imported_and_activated(fleet: FakePlanner, hetis_plan: Run, saved_plan: Path) -> None:
    name = "clusters/paper"
    shown = hetis_plan("apply", "--plan", str(saved_plan), "--activate")
    sent = last_request(fleet, plan_service_pb2.CreatePlanRequest)
    assert sent.plan.cluster == name
    assert sent.plan.imported.kind == document_pb2.DOCUMENT_KIND_PLAN
    assert sent.plan.imported.content == saved_plan.read_bytes()
    assert fleet.clusters[name].active_plan.startswith("plans/p")
    assert "a100-0/0" in shown.out


def test_a_plan_that_is_there_is_activated_or_only_looked_at(fleet: FakePlanner, hetis_plan: Run) -> None:
    captured = hetis_plan("apply", "plans/day")
    assert "dry run: nothing was changed; plans/night is in force now" in captured.err
    assert "start" in captured.out
    assert fleet.clusters["clusters/paper"].active_plan == "plans/night"
    hetis_plan("apply", "--activate", "plans/day")
    assert fleet.clusters["clusters/paper"].active_plan == "plans/day"


def test_a_plan_that_is_there_is_saved(fleet: FakePlanner, hetis_plan: Run, tmp_path: Path) -> None:
    fleet.documents["plans/day"] = b'{"kind": "Plan"}\n'
    out, other = tmp_path / "plan.json", tmp_path / "other.json"
    captured = hetis_plan("apply", "plans/day", "--out", str(out))
    assert out.read_text() == '{"kind": "Plan"}\n'
    assert f"saved {out}\ndry run: nothing was changed; plans/night is in force now" in captured.err
    assert "start" in captured.out
    shown = hetis_plan("apply", "plans/day", "--dry-run", "--out", str(other))
    assert not other.exists()
    assert "dry run: nothing was changed or saved" in shown.err
    for more in ([], ["--activate"]):
        assert hetis_plan("apply", "plans/day", "--out", "-", *more).out == '{"kind": "Plan"}\n'
    assert fleet.clusters["clusters/paper"].active_plan == "plans/day"


def test_a_dry_run_changes_nothing(planner: FakePlanner, hetis_plan: Run) -> None:
    shown = hetis_plan("apply", PAPER, "--dry-run")
    assert not planner.clusters
    assert "created (dry run)" in shown.err


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
    planner: FakePlanner, hetis_plan: Run, arguments: list[str], said: str
) -> None:
    assert said in " ".join(hetis_plan("apply", *arguments, code=ExitCode.INVALID).err.replace("│", " ").split())
    assert not planner.calls


def test_a_full_queue_says_when_to_come_back(planner: FakePlanner, hetis_plan: Run) -> None:
    planner.fail = lambda method, context: (
        refuse(context, code_pb2.RESOURCE_EXHAUSTED, "SOLVER_QUEUE_FULL", "32 plans wait", retry_after_s=12)
        if method == "CreatePlan"
        else None
    )
    shown = hetis_plan("apply", *PROBLEM, code=ExitCode.UNREACHABLE)
    assert shown.err.endswith("error: 32 plans wait (SOLVER_QUEUE_FULL)\n  retry in 12 s\n")
