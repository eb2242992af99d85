"""Workloads by name, by means, from histograms and from traces."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetis.formats.errors import DocumentError
from hetis.formats.traces import length_bins, load_trace, read_trace
from hetis.formats.workload import load_workload
from hetis.solver.workload import LengthBin, moments_of

HEADER = "arrival_s,prompt_tokens,output_tokens\n"


def test_plain_means() -> None:
    workload = load_workload("8000/300")
    assert workload.name == "8000/300"
    assert workload.bins == (LengthBin(prompt_tokens=8000, output_tokens=300, weight=1.0),)


@pytest.mark.parametrize("text", ["0/300", "8000/0", "1e3/5", "-1/5", "100000000/1", "1.2.3/4"])
def test_impossible_means_are_refused(text: str) -> None:
    with pytest.raises(DocumentError):
        load_workload(text)


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(DocumentError) as caught:
        load_workload("azure_con_2023")
    assert str(caught.value) == (
        "workload: unknown workload 'azure_con_2023', did you mean azure_conv_2023? (and no such file exists)"
    )


@pytest.mark.parametrize("text", ["1024", "1024x200", "8000:300"])
def test_lengths_in_another_form_are_told_theirs(text: str) -> None:
    with pytest.raises(DocumentError, match="; mean lengths are PROMPT/OUTPUT tokens, such as 8000/300"):
        load_workload(text)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_trace_becomes_a_histogram_and_a_rate(tmp_path: Path, compressed: bool) -> None:
    text = HEADER + "0,100,10\n1,200,20\n3,100,10\n2,100,10\n"
    path = tmp_path / ("mine.csv.gz" if compressed else "mine.csv")
    path.write_bytes(gzip.compress(text.encode()) if compressed else text.encode())
    workload = load_workload(path)
    assert workload.name == "mine"
    assert workload.rate_rps == 1.0
    assert [(b.prompt_tokens, b.output_tokens, b.weight) for b in workload.bins] == [(100, 10, 3), (200, 20, 1)]


def test_columns_may_come_in_any_order_with_others_between(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("output_tokens, user, arrival_s, prompt_tokens\r\n10,u,0,100\r\n\r\n10,v,0,100\r\n")
    workload = load_trace(path)
    assert workload.rate_rps is None  # all at once
    assert workload.bins == (LengthBin(prompt_tokens=100, output_tokens=10, weight=2.0),)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (HEADER + "0,100,10\n1,1,200,30\n", "t.csv:3: has 4 values for 3 columns"),
        (HEADER + "1790000000000,100,10\n", "t.csv:2: arrival_s: is 1790000000000 seconds: milliseconds?"),
        ("arrival_s,prompt_tokens,output_tokens,prompt_tokens\n0,1,2,3\n", "t.csv:1: has column prompt_tokens 2 times"),
    ],
)
def test_rows_that_can_be_read_in_two_ways_are_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(DocumentError) as caught:
        load_trace(path)
    assert str(caught.value).endswith(said)


def test_commas_at_the_end_of_a_row_are_no_values(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(HEADER + "0,100,10,, \n")
    assert load_trace(path).bins == (LengthBin(prompt_tokens=100, output_tokens=10, weight=1.0),)


def test_a_workload_file_names_a_trace_beside_it(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(HEADER + "0,100,10\n2,100,10\n")
    (tmp_path / "w.yaml").write_text("apiVersion: hetis/v1\nkind: Workload\nname: w\ntrace: t.csv\n")
    assert load_workload(tmp_path / "w.yaml").rate_rps == 0.5
    (tmp_path / "w.yaml").write_text("apiVersion: hetis/v1\nkind: Workload\nname: w\ntrace: t.csv\nrate_rps: 7\n")
    workload = load_workload(tmp_path / "w.yaml")
    assert (workload.name, workload.rate_rps) == ("w", 7)


def test_a_workload_file_may_give_means(tmp_path: Path) -> None:
    text = "apiVersion: hetis/v1\nkind: Workload\nname: w\nmean_prompt_tokens: 8000\nmean_output_tokens: 300.5\n"
    (tmp_path / "w.yaml").write_text(text)
    assert load_workload(tmp_path / "w.yaml").bins == (LengthBin(prompt_tokens=8000, output_tokens=300.5, weight=1.0),)


def test_a_large_trace_is_binned_without_changing_its_averages(tmp_path: Path) -> None:
    generator = np.random.default_rng(7)
    prompts = np.minimum(generator.lognormal(7, 1.2, 30_000).astype(int) + 1, 100_000)
    outputs = np.minimum(generator.lognormal(5, 1.0, 30_000).astype(int) + 1, 10_000)
    rows = "".join(f"{i},{p},{o}\n" for i, (p, o) in enumerate(zip(prompts, outputs, strict=True)))
    (tmp_path / "t.csv").write_text(HEADER + rows)
    workload = load_trace(tmp_path / "t.csv")
    exact = moments_of(
        [LengthBin(prompt_tokens=p, output_tokens=o, weight=1.0) for p, o in zip(prompts, outputs, strict=True)],
        block_tokens=16,
    )
    summary = workload.moments()
    assert len(workload.bins) == 4096
    assert summary.mean_prompt == pytest.approx(exact.mean_prompt, rel=1e-12)
    assert summary.mean_output == pytest.approx(exact.mean_output, rel=1e-12)
    for field in (
        "prefill_pairs",
        "resident_context",
        "prefilling_context",
        "resident_context_sd",
        "p95_prompt",
        "prefill_context_sd",
    ):
        assert getattr(summary, field) == pytest.approx(getattr(exact, field), rel=0.005), field


LENGTHS = st.lists(st.tuples(st.integers(1, 10**7), st.integers(1, 10**7)), min_size=1, max_size=60)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 70))
def test_bins_keep_the_requests_and_their_means(lengths: list[tuple[int, int]], max_bins: int) -> None:
    prompts, outputs = (np.array(column, dtype=np.int64) for column in zip(*lengths, strict=True))
    bins = length_bins(prompts, outputs, max_bins=max_bins)
    distinct = set(lengths)
    assert len(bins) <= max_bins
    assert sum(b.weight for b in bins) == len(lengths)
    assert sum(b.weight * b.prompt_tokens for b in bins) == pytest.approx(prompts.sum())
    assert sum(b.weight * b.output_tokens for b in bins) == pytest.approx(outputs.sum())
    if len(distinct) <= max_bins:
        assert {(b.prompt_tokens, b.output_tokens) for b in bins} == distinct


@settings(deadline=None)
@given(LENGTHS)
def test_bins_do_not_depend_on_the_order_of_requests(lengths: list[tuple[int, int]]) -> None:
    prompts, outputs = (np.array(column, dtype=np.int64) for column in zip(*lengths, strict=True))
    assert length_bins(prompts, outputs, max_bins=5) == length_bins(prompts[::-1], outputs[::-1], max_bins=5)


def test_a_line_without_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(HEADER + "0,1,1\n" + "9" * 1_000_000)
    with pytest.raises(DocumentError):
        load_trace(tmp_path / "t.csv")


@pytest.mark.parametrize("ending", ["csv", "jsonl", "csv.gz", "jsonl.gz"])
def test_traces_in_both_forms_are_the_same_requests_in_order_of_arrival(tmp_path: Path, ending: str) -> None:
    rows = [(3.5, 30, 3), (1.0, 10, 1), (2.0, 20, 2)]
    if "jsonl" in ending:
        fields = ("arrival_s", "prompt_tokens", "output_tokens")
        text = "".join(json.dumps({"user": "u"} | dict(zip(fields, row, strict=True))) + "\n" for row in rows)
    else:
        text = HEADER + "".join(f"{a},{p},{o}\n" for a, p, o in rows)
    path = tmp_path / f"mine.{ending}"
    path.write_bytes(gzip.compress(text.encode()) if ending.endswith("gz") else text.encode())
    trace = read_trace(path)
    assert trace.name == "mine"
    assert trace.arrival_s.tolist() == [1.0, 2.0, 3.5]
    assert trace.prompt_tokens.tolist() == [10, 20, 30]
    assert trace.output_tokens.tolist() == [1, 2, 3]
    assert trace.rate_rps == pytest.approx(2 / 2.5)
    assert load_workload(path) == load_trace(path)
