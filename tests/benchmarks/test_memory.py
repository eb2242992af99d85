"""Rows of the benchmark of memory: what they mean, and what is made of them."""

from __future__ import annotations

import pytest

from benchmarks.accuracy import memory
from benchmarks.accuracy.published_points import read_rows

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
