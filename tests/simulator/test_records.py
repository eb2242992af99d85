"""Rows of a run, which form a trace again."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

import numpy as np

from hetis.formats.traces import read_trace
from hetis.simulator.arrivals import Load, draw_traffic, requests_of
from hetis.simulator.records import CSV_COLUMNS, requests_csv
from hetis.simulator.values import Request, Run, Settings
from hetis.solver.workload import LengthBin, Workload
from tests.simulator.fake_runs import queue_run, run_of

LOAD = Load(
    lengths=Workload(name="w", bins=(LengthBin(prompt_tokens=10, output_tokens=50.5, weight=1.0),)),
    max_position=1000,
    rate_rps=9.0,
)


def sample() -> Run:
    return queue_run(requests_of(draw_traffic(LOAD, 200, seed=0)), Settings())


def test_rows_hold_every_request_and_its_times() -> None:
    run = sample()
    rows = list(csv.DictReader(io.StringIO(requests_csv(run))))
    assert tuple(rows[0]) == CSV_COLUMNS
    assert [int(row["id"]) for row in rows] == run.id.tolist()
    for row, first_s, arrival_s in zip(rows, run.first_token_s, run.arrival_s, strict=True):
        assert abs(float(row["ttft_s"]) - (first_s - arrival_s)) < 1e-6


def test_the_rows_can_be_replayed_as_a_trace(tmp_path: Path) -> None:
    run = sample()
    (tmp_path / "r.csv").write_text(requests_csv(run))
    trace = read_trace(tmp_path / "r.csv")
    assert np.array_equal(trace.prompt_tokens, run.prompt_tokens)
    assert np.array_equal(trace.output_tokens, run.output_tokens)
    assert np.allclose(trace.arrival_s, run.arrival_s, atol=1e-6)


def test_what_never_happened_is_empty() -> None:
    request = Request(id=3, arrival_s=1.0, prompt_tokens=5, output_tokens=1)
    run = run_of([(request, math.nan, math.nan, math.nan)], end_s=2.0)
    (row,) = csv.DictReader(io.StringIO(requests_csv(run)))
    assert [row[name] for name in ("admitted_s", "first_token_s", "finished_s", "ttft_s", "tpot_s")] == [""] * 5
