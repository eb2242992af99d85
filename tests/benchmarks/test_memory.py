"""Rows of the benchmark of memory: what they mean, and what is made of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.accuracy import memory
from benchmarks.accuracy.published_points import NotPosedError, read_rows

ROWS = {row["id"]: row for row in read_rows(memory.FURTHER, memory.COLUMNS)}


@pytest.mark.parametrize(
    ("engine", "source", "version"),
    [
        ("vllm 0.19.0", "vllm-project/vllm issue 10517", "0.19.0"),
        ("vllm, July 2025", "vllm-project/vllm issue 10517", "0.9.2"),
        ("vllm", "vllm-project/vllm issue 23278", "0.10.1"),
        ("vllm", "vllm-project/vllm issues 27508, 23278", "0.11.0"),
        ("vllm", "vllm-project/vllm issue 99999", "0.32"),
        ("vllm", "a blog post of 2025", ""),
    ],
)
def test_the_version_is_that_of_the_row_its_month_or_its_issue(engine: str, source: str, version: str) -> None:
    assert memory.version_of(engine, source) == version


def test_every_public_row_is_within_a_tenth_and_no_failed_start_is_missed() -> None:
    found = [memory.result(memory.pose(row)) for row in ROWS.values()]
    assert len(found) == len(ROWS)
    for row in found:
        for key in ("kv_error", "token_error", "weight_error"):
            assert row[key] is None or abs(float(str(row[key]))) < 0.1, row
        assert row["failed_start"] in ("", "predicted"), row
    assert memory.summary(found)["failed_starts"] == "1 of 1 predicted"


def test_requests_of_other_gpus_beside_this_ones_tokens_are_not_what_was_run() -> None:
    row = ROWS["gptoss120-h100-default"] | {"max_num_seqs": "256"}
    assert memory.pose(row).start.max_num_seqs == 1024
    assert memory.pose(row | {"max_num_batched_tokens": "4096"}).start.max_num_seqs == 256


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"gpu": "H9000"}, "the GPU H9000 is not known"),
        ({"model": "nobody/Nothing-3B"}, "the model nobody/Nothing-3B is not known"),
        ({"engine": "trtllm"}, "the engine trtllm is not known"),
    ],
)
def test_a_row_that_cannot_be_predicted_says_why(change: dict[str, str], reason: str) -> None:
    with pytest.raises(NotPosedError, match=reason):
        memory.pose(ROWS["8b-h100-v0"] | change)


def test_other_tables_are_read_and_bad_rows_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    header, first, *_ = memory.FURTHER.read_text().splitlines()
    (tmp_path / "rows.csv").write_text("\n".join((header, first, first.replace("H100-SXM-80GB", "H9000"))) + "\n")
    monkeypatch.setattr(sys, "argv", ["memory", "--points", str(tmp_path / "rows.csv"), "--json"])
    memory.main()
    row, total, *covered = map(json.loads, capsys.readouterr().out.splitlines())
    assert (row["report"], total["n"]) == ("8b-h100-v0", 1)
    assert [(each["coverage"], each["n"]) for each in covered] == [("predicted", 1), ("skipped", 1)]
