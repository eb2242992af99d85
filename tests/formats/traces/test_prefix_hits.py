"""Prefix hit rates of workloads: given, and counted by the hash ids of Mooncake's traces."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis.formats.documents import dump
from hetis.formats.errors import DocumentError
from hetis.formats.traces import load_trace, read_trace
from hetis.formats.traces.hits import BLOCK_TOKENS, hit_tokens
from hetis.formats.workload import load_workload, with_prefix_hits
from hetis.solver.workload import Workload

Row = tuple[int, int, Sequence[int]]  # ms, prompt tokens, blocks
TALK: list[Row] = [(0, 1000, (1, 2)), (10, 1536, (1, 2, 3)), (20, 1400, (1, 4, 5)), (30, 1000, (1, 2))]
# Hits: none; two blocks; one block, as the second differs; the whole prompt, of which one token is computed anyway.
HITS = [0, 1024, 512, 999]


def line(row: Row) -> str:
    at_ms, prompt, ids = row
    return json.dumps({"timestamp": at_ms, "input_length": prompt, "output_length": 9, "hash_ids": list(ids)}) + "\n"


def written(path: Path, rows: Sequence[Row]) -> Path:
    path.write_text("".join(map(line, rows)))
    return path


def refused(path: Path) -> str:
    with pytest.raises(DocumentError) as caught:
        load_trace(path, prefix_hit_rate="trace")
    return str(caught.value)


def test_hits_are_counted_request_by_request(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path / "t.jsonl", TALK), prefix_hit_rate="trace")
    assert trace.prefix_share is not None
    assert np.rint(trace.prefix_share * trace.prompt_tokens).tolist() == HITS
    assert trace.prefix_hit_rate == pytest.approx(sum(HITS) / 4936)
    assert load_trace(tmp_path / "t.jsonl", prefix_hit_rate="trace").prefix_hit_rate == trace.prefix_hit_rate


def test_nothing_is_counted_unless_it_is_asked_for(tmp_path: Path) -> None:
    path = written(tmp_path / "t.jsonl", TALK)
    assert read_trace(path).prefix_share is None
    assert load_workload(path).prefix_hit_rate == 0
    assert load_workload(path, prefix_hit_rate=0.25).prefix_hit_rate == 0.25


def test_requests_hit_what_arrived_earlier_in_whatever_order_they_are_written(tmp_path: Path) -> None:
    backwards = written(tmp_path / "t.jsonl", TALK[::-1])
    trace = read_trace(backwards, prefix_hit_rate="trace")
    assert trace.prefix_share is not None
    assert np.rint(trace.prefix_share * trace.prompt_tokens).tolist() == HITS


def test_compressed_traces_and_empty_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(line, TALK)).encode()))
    assert load_workload(path, prefix_hit_rate="trace").prefix_hit_rate == pytest.approx(sum(HITS) / 4936)


@given(st.lists(st.tuples(st.integers(1, 2000), st.integers(0, 3)), min_size=1, max_size=12))
def test_hits_are_those_of_a_cache_that_compares_whole_prefixes(requests: list[tuple[int, int]]) -> None:
    """The oracle uses no ids: prompts of one family share their beginning, block by block."""
    num_blocks = [-(-prompt // BLOCK_TOKENS) for prompt, _ in requests]
    longest: dict[int, int] = {}
    expected = list[int]()
    for (prompt, family), blocks in zip(requests, num_blocks, strict=True):
        expected.append(min(BLOCK_TOKENS * min(blocks, longest.get(family, 0)), prompt - 1))
        longest[family] = max(longest.get(family, 0), blocks)
    rows: list[Row] = [
        (0, prompt, range(100 * family, 100 * family + blocks))
        for (prompt, family), blocks in zip(requests, num_blocks, strict=True)
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = written(Path(folder) / "t.jsonl", rows)
        prompts = np.array([prompt for prompt, _ in requests])
        assert hit_tokens(str(path), prompts, np.arange(len(rows))).tolist() == expected


def test_rows_that_do_not_name_their_blocks_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "t.jsonl", [(0, 1000, (1, 2)), (1, 1000, (1, 2, 3))])
    assert refused(path) == f"{path}:2: hash_ids: has 3 blocks, 1000 prompt tokens make 2 of 512"
    path.write_text(line(TALK[0]).replace("[1, 2]", '["a", "b"]'))
    assert refused(path) == f"{path}:1: hash_ids: is not a list of whole numbers of 64 bits"
    path.write_text(line(TALK[0]).replace("[1, 2]", "7"))
    assert refused(path) == f"{path}:1: hash_ids: is not a list of whole numbers of 64 bits"


HOW = "prefix hits can only be counted from the hash_ids of a trace in Mooncake's form: give a share such as 0.4"


def test_sources_without_hash_ids_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n0,100,10\n")
    assert refused(path) == f"{path}: has no hash_ids; {HOW}"
    path = tmp_path / "t.jsonl"
    path.write_text('{"arrival_s": 0, "prompt_tokens": 100, "output_tokens": 10}\n')
    assert refused(path) == f"{path}:1: has no hash_ids; {HOW}"
    for name in ("8000/300", "azure_conv_2023"):
        with pytest.raises(DocumentError) as caught:
            load_workload(name, prefix_hit_rate="trace")
        assert str(caught.value) == f"workload {name}: has no hash_ids; {HOW}"


def test_names_and_means_take_a_rate() -> None:
    for name in ("8000/300", "azure_conv_2023"):
        assert load_workload(name).prefix_hit_rate == 0
        assert load_workload(name, prefix_hit_rate=0.4) == with_prefix_hits(load_workload(name), 0.4)


# --- Workload files

MEANS = "apiVersion: hetis/v1\nkind: Workload\nname: w\nmean_prompt_tokens: 100\nmean_output_tokens: 10\n"


def test_a_workload_file_gives_the_rate_and_an_option_replaces_it(tmp_path: Path) -> None:
    path = tmp_path / "w.yaml"
    path.write_text(MEANS + "prefix_hit_rate: 0.3\n")
    assert load_workload(path).prefix_hit_rate == 0.3
    assert load_workload(path, prefix_hit_rate=0.0).prefix_hit_rate == 0


def test_a_workload_file_may_have_its_trace_counted(tmp_path: Path) -> None:
    written(tmp_path / "t.jsonl", TALK)
    path = tmp_path / "w.yaml"
    path.write_text("apiVersion: hetis/v1\nkind: Workload\nname: w\ntrace: t.jsonl\nprefix_hit_rate: trace\n")
    assert load_workload(path).prefix_hit_rate == pytest.approx(sum(HITS) / 4936)
    path.write_text("apiVersion: hetis/v1\nkind: Workload\nname: w\ntrace: t.jsonl\n")
    assert load_workload(path).prefix_hit_rate == 0
    assert load_workload(path, prefix_hit_rate="trace").prefix_hit_rate == pytest.approx(sum(HITS) / 4936)


@pytest.mark.parametrize("value", ["1", "-0.1", ".nan", "true", "'0.4'", "counted", "[0.4]"])
def test_rates_that_are_none_are_refused(tmp_path: Path, value: str) -> None:
    path = tmp_path / "w.yaml"
    path.write_text(MEANS + f"prefix_hit_rate: {value}\n")
    with pytest.raises(DocumentError) as caught:
        load_workload(path)
    assert str(caught.value).startswith(f"{path}:6:")
    assert "is not a share of at least 0 and below 1, nor trace" in str(caught.value)


def test_nothing_is_counted_without_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "w.yaml"
    path.write_text(MEANS + "prefix_hit_rate: trace\n")
    with pytest.raises(DocumentError) as caught:
        load_workload(path)
    message = "is trace, but without a trace there are no hash_ids to count hits"
    assert str(caught.value).endswith(f"prefix_hit_rate: {message}")


def test_documents_say_the_rate_only_where_there_is_one() -> None:
    workload = load_workload("8000/300")
    assert "prefix_hit_rate" not in dump(workload)
    assert "prefix_hit_rate: 0.4" in dump(Workload(name="w", bins=workload.bins, prefix_hit_rate=0.4))
