"""Predictions against static batches: how rows are posed, the time of a batch, and statistics."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import static_batches
from benchmarks.measuring.published_points import NotPosedError
from benchmarks.static_batches import Batch, Outcome, batch_s, pose, stage_of

ROW = {
    "Hardware": "Nvidia H100 GPU", "Num of Hardware": "1", "Framework": "vLLM", "Model": "meta-llama/Meta-Llama-3-8B",
    "Input Output Length": "128", "Batch Size": "16", "Latency": "1.5", "Throughput": "2730.7",
}  # fmt: skip


def row(**fields: str) -> dict[str, str]:
    return ROW | fields


def reason(**fields: str) -> str:
    with pytest.raises(NotPosedError) as caught:
        pose(row(**fields))
    return str(caught.value)


def test_a_row_is_posed_as_it_says() -> None:
    batch = pose(row(**{"Num of Hardware": "2", "Framework": "TensorRT-LLM"}))
    assert (batch.gpu, batch.engine, batch.model, batch.tp) == ("H100-SXM-80GB", "trtllm", "Llama-3-8B", 2)
    assert (batch.requests, batch.tokens, batch.measured_s) == (16, 128, 1.5)


def test_what_cannot_be_predicted_is_skipped_with_its_reason() -> None:
    assert reason(Framework="llama.cpp") == "the engine llama.cpp is not known"
    assert reason(Hardware="Abacus") == "the GPU Abacus is not known"
    assert "another model" in reason(Model="BAAI/Aquila-7B")
    assert "a number is not recorded" in reason(Latency="fast")
    assert reason(Latency="nan") == "a number is not above 0"
    large = pose(row(Model="meta-llama/Llama-2-70b-hf"))
    with pytest.raises(NotPosedError, match="do not fit in memory"):
        batch_s(large)


def test_a_batch_is_its_prompts_and_its_further_tokens() -> None:
    """16 prompts of 1,024 tokens are two iterations of 8, and the other 1,023 tokens one each, at growing contexts."""
    batch = pose(row(**{"Input Output Length": "1024"}))
    timing, _ = stage_of(batch.gpu, batch.node_gpus, batch.engine, batch.model, batch.tp)
    prompt_s = timing.seconds(0, 0.0, 8192, 8 * 1024 * 1025 / 2, 8 * 512.0, 8)
    tokens_s = sum(timing.seconds(16, 16.0 * context, 0, 0.0, 0.0, 16) for context in range(1025, 2048))
    assert batch_s(batch) == pytest.approx(2 * prompt_s + tokens_s, rel=1e-3)


def outcome(share: float, **fields: str) -> Outcome:
    batch = pose(row(**fields))
    return Outcome(batch=batch, predicted_s=share * batch.measured_s)


def test_statistics_by_hand() -> None:
    found = static_batches.statistics([outcome(0.9), outcome(1.2), outcome(1.3, **{"Batch Size": "1"})])
    assert {key: found[key] for key in ("n", "mape", "bias", "bias_of_1", "bias_of_16_to_64")} == {
        "n": 3, "mape": 0.2, "bias": 0.1333, "bias_of_1": 0.3, "bias_of_16_to_64": 0.05,
    }  # fmt: skip
    assert static_batches.statistics([outcome(1.0)])["bias_of_1"] is None
    groups = list(static_batches.group_rows([outcome(1.0), outcome(1.0, Framework="TensorRT-LLM")]))
    assert [(one["gpu"], one["engine"], one["n"]) for one in groups[-2:]] == [("all", "trtllm", 1), ("all", "vllm", 1)]


def table_of(path: Path, rows_of_it: Sequence[dict[str, str]]) -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(ROW))
        writer.writeheader()
        writer.writerows(rows_of_it)
    return path


def test_the_command_counts_every_row_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    points = table_of(tmp_path / "points.csv", [row(), row(**{"Batch Size": "64"}), row(Framework="llama.cpp")])
    monkeypatch.setattr(sys, "argv", ["static_batches", "--points", str(points), "--json"])
    static_batches.main()
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["n"] for one in shown if one.get("model") == "Llama-3-8B"] == [2]
    assert [(one["coverage"], one["n"]) for one in shown if "coverage" in one] == [("predicted", 2), ("skipped", 1)]


def test_a_table_that_is_missing_or_another_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["static_batches", "--quick", "--points", str(tmp_path / "none.csv")])
    static_batches.main()  # --quick runs everywhere
    assert "no such file" in capsys.readouterr().err
    other = tmp_path / "other.csv"
    other.write_text("Hardware,Model\nA,B\n", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["static_batches", "--points", str(other)])
    with pytest.raises(SystemExit, match=r"other\.csv: no column Num of Hardware"):
        static_batches.main()


def test_a_larger_batch_takes_longer_and_serves_more() -> None:
    def seconds(requests: int) -> float:
        return batch_s(
            Batch(
                gpu="A100-SXM-40GB",
                node_gpus=4,
                engine="vllm",
                model="Mistral-7B",
                tp=1,
                requests=requests,
                tokens=512,
                measured_s=1.0,
            )
        )

    assert seconds(1) < seconds(16) < 16 * seconds(1)
