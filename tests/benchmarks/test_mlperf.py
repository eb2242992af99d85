"""Plans against MLPerf's results: how rows are posed and grouped, what is planned, and totals."""

from __future__ import annotations

import gzip
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.accuracy import mlperf
from benchmarks.accuracy.mlperf_rows import COLUMNS, Submission, pose
from benchmarks.accuracy.published_points import NotPosedError, read_rows
from hetis.planner.use_cases.record.parts import Requested, Verified
from tests.benchmarks.published import table_of

ROW = {
    "ID": "made-up-1", "Submitter": "Someone", "Category": "closed", "Suite": "datacenter", "Platform": "H200x8_TRT",
    "UsedModel": "llama2-70b-99", "Scenario": "Offline", "Nodes": "2", "Accelerator": "NVIDIA H200-SXM-141GB",
    "a#": "8", "weight_data_types": "fp8", "Software": "TensorRT 10.11, CUDA 12.9",
    "Accuracy": "ROUGE1: 44.4  ROUGEL: 28.6  TOKENS_PER_SAMPLE: 292.5", "has_power": "False",
    "Performance_Result": "64000", "Performance_Units": "Tokens/s", "Location": "",
}  # fmt: skip
RED_HAT = {
    "Submitter": "RedHat", "UsedModel": "llama3.1-8b", "Accelerator": "NVIDIA H100-SXM-80GB", "a#": "1", "Nodes": "1",
    "Software": "vLLM 0.10.0, RHEL 9.6", "Accuracy": "ROUGE1: 38.8  GEN_LEN: 8163079", "Performance_Result": "5777.08",
}  # fmt: skip


def row(**fields: str) -> dict[str, str]:
    return ROW | fields


def reason(**fields: str) -> str:
    with pytest.raises(NotPosedError) as caught:
        pose(row(**fields))
    return str(caught.value)


def test_a_row_is_posed_as_it_says() -> None:
    posed = pose(row())
    system = posed.system
    assert (system.gpu, system.gpus, system.benchmark, system.engine) == ("H200-SXM-141GB", 8, "llama2-70b", "trtllm")
    assert (system.weights, posed.output_tokens, posed.tokens_per_s) == ("fp8", 292.5, 4000.0)
    # Cards of two GPUs, four-bit formats, and another spelling of the model.
    intel = pose(
        row(Accelerator="[MAXSUN] MS-Intel Arc Pro B60 Dual 48G Turbo", weight_data_types="UINT4", **{"a#": "4"})
    )
    assert (intel.system.gpu, intel.system.gpus, intel.system.weights) == ("Arc-Pro-B60-24GB", 8, "int4")
    assert intel.tokens_per_s == 4000.0
    assert pose(row(weight_data_types="fp4", UsedModel="llama3_1-405b")).system.benchmark == "llama3.1-405b"
    # Answers of a fixed length, which the table does not have.
    red_hat = pose(row(**RED_HAT))
    assert (red_hat.system.engine, red_hat.output_tokens) == ("vllm", 128.0)
    assert (red_hat.system.seats, system.seats) == (1024, 2048)
    # The host of vLLM 0.10 is not hidden; that of other engines is as their profiles say.
    ahead = [pose(row(**RED_HAT | {"Software": f"vLLM {version}, RHEL 9.6"})) for version in ("v0.13.2", "0.14.0")]
    assert [one.system.schedules_ahead for one in (red_hat, posed, *ahead)] == [False, True, False, True]


def test_what_cannot_be_planned_is_skipped_with_its_reason() -> None:
    assert "suite edge" in reason(Suite="edge")
    assert reason(Suite="") == "no suite is recorded"
    assert "SingleStream" in reason(Scenario="SingleStream")
    assert "CPUs" in reason(Accelerator="")
    assert "GPU NVIDIA Jetson AGX Thor" in reason(Accelerator="NVIDIA Jetson AGX Thor 128G")
    assert "how long its prompts are" in reason(UsedModel="mixtral-8x7b")
    assert "another checkpoint" in reason(UsedModel="llama3_1-70b-fp8_dyn")
    assert reason(Software="Mango LLMBoost 2.1") == "the engine Mango LLMBoost is not known"
    assert reason(weight_data_types="UNSET") == "the format of the weights is UNSET"
    assert reason(Performance_Result="") == "Performance_Result is not recorded"
    assert reason(Accuracy="ROUGE1: 44.4") == "tokens per sample are not recorded"


def test_a_run_under_both_accuracy_targets_counts_once() -> None:
    table = [row(), row(UsedModel="llama2-70b-99.9"), row(Submitter="Another"), row(Scenario="Server")]
    groups, skipped = mlperf.grouped(table)
    assert [(members[0].system.scenario, len(members)) for members in groups] == [("Offline", 2), ("Server", 1)]
    assert dict(skipped) == {"the same run under another accuracy target": 1}


def planned(*submissions: Submission) -> mlperf.Outcome:
    plan, rates = mlperf.plan_of(submissions)
    return mlperf.Outcome(submissions=submissions, plan=plan, rates=rates)


def test_a_node_is_planned_as_submitters_ran_it() -> None:
    """One GPU with 1,024 seats, and no separate prefill replicas."""
    problem = mlperf.problem_of(pose(row(**RED_HAT)).system, 128.0)
    assert (problem.model.weight_bytes, problem.model.kv_bytes, problem.cluster.num_gpus()) == (1.0, 1.0, 1)
    outcome = planned(pose(row(**RED_HAT)))
    (replica,) = outcome.plan.replicas
    assert mlperf.shape_of(outcome.plan) == "1 x TP1"
    assert replica.micro_batch * replica.in_flight <= 1024
    assert outcome.predicted == pytest.approx(outcome.plan.result.value * 128.0)
    (shown,) = mlperf.group_rows([outcome])
    assert (shown["profile"], shown["n"], shown["best"], shown["median"]) == ("measured", 1, 5777, 5777)
    assert shown["over_best"] == pytest.approx(outcome.predicted / 5777.08, abs=1e-3)
    # Layers are off by 15%, the host's steps by 25%, however small the mean errors of the fits are.
    assert 0.75 < outcome.rates.low / outcome.plan.result.value < 0.85
    assert 1.15 < outcome.rates.high / outcome.plan.result.value < 1.25
    assert shown["in_range"] == "yes"
    faster = replace(outcome, rates=replace(outcome.rates, high=0.9 * outcome.best / 128.0))
    assert [one["in_range"] for one in mlperf.group_rows([faster])] == ["no"]


def test_simulated_rates_keep_the_p99_of_the_rule() -> None:
    server = pose(row(**RED_HAT | {"Scenario": "Server"}))
    plan, rates = mlperf.plan_of([server], simulates=True)
    by_model, _ = mlperf.plan_of([server])
    assert plan.result.value <= by_model.result.value
    assert rates.low < plan.result.value < rates.high
    assert Requested.of(plan).service_level == mlperf.RULE
    assert Verified.of(plan).verification is not None


def test_totals_by_hand() -> None:
    """Predictions of 6,000 tokens/s on a measured GPU: 15% too much against the best, and half of it."""
    outcome = planned(pose(row(**RED_HAT)))
    rate = outcome.predicted

    def at(share: float) -> mlperf.Outcome:
        """The range holds what is at most 16% below the prediction or 15% above it."""
        return replace(outcome, submissions=(replace(outcome.submissions[0], tokens_per_s=rate / share),))

    measured, whole = list(mlperf.total_rows([at(1.15), at(0.5)]))
    assert {key: whole[key] for key in ("groups", "mape", "bias", "within_30_percent", "in_range")} == {
        "groups": 2, "mape": 0.325, "bias": -0.175, "within_30_percent": 1, "in_range": 1,
    }  # fmt: skip
    assert (measured["profile"], whole["profile"]) == ("measured", "all")


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["mlperf", *words])
    mlperf.main()


def test_the_command_counts_every_row_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows_of_it = [row(**RED_HAT), row(**RED_HAT | {"Performance_Result": "5000"}), row(Suite="edge")]
    run(monkeypatch, "--points", str(table_of(tmp_path / "points.csv", rows_of_it)), "--json")
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(one["n"], one["best"], one["median"]) for one in shown if "plan" in one] == [(2, 5777, 5389)]
    assert [(one["coverage"], one["n"]) for one in shown if "coverage" in one] == [("posed", 2), ("skipped", 1)]


def test_a_table_that_is_missing_broken_or_another_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "none.csv"
    with pytest.raises(SystemExit, match="no such file; --points says where"):
        read_rows(missing, COLUMNS)
    run(monkeypatch, "--quick", "--points", str(missing))  # --quick runs everywhere
    assert "no such file" in capsys.readouterr().err
    other = tmp_path / "other.csv"
    other.write_text("ID,Submitter\n1,Someone\n", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"other\.csv: no column Category"):
        read_rows(other, COLUMNS)
    short = table_of(tmp_path / "short.csv", [row()])
    with short.open("a", encoding="utf-8") as file:
        file.write("5.1-0002,Someone,closed\n")
    assert [one["Submitter"] + one["Suite"] for one in read_rows(short, COLUMNS)] == ["Someonedatacenter", "Someone"]
    torn = tmp_path / "torn.csv.gz"
    torn.write_bytes(gzip.compress(b"ID,Submitter\n" * 1000)[:-20])
    with pytest.raises(SystemExit, match=r"torn\.csv\.gz: Compressed file ended"):
        read_rows(torn, COLUMNS)
    plain = tmp_path / "plain.csv.gz"
    plain.write_text("ID\n", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"plain\.csv\.gz: Not a gzipped file"):
        read_rows(plain, COLUMNS)
    binary = tmp_path / "binary.csv"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SystemExit, match=r"binary\.csv: "):
        read_rows(binary, COLUMNS)
