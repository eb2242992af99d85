"""Files of a run: rows that form a trace again, and a Perfetto trace whose bars and counters add up."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import numpy as np

from hetis.formats.traces import read_trace
from hetis.simulator.arrivals import Load, draw_traffic, requests_of
from hetis.simulator.records import CSV_COLUMNS, perfetto_json, requests_csv
from hetis.simulator.values import Request, Run, Settings
from hetis.solver.workload import LengthBin, Workload
from tests.simulator.fake_runs import queue_run, run_of

LOAD = Load(
    lengths=Workload(name="w", bins=(LengthBin(prompt_tokens=10, output_tokens=50.5, weight=1.0),)),
    max_position=1000,
    rate_rps=9.0,
)


def sample() -> Run:
    return queue_run(requests_of(draw_traffic(LOAD, 200, seed=0)), Settings(trace=True, sample_every_s=1.0))


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


def test_a_perfetto_trace_has_the_form_that_viewers_ask_for() -> None:
    document = json.loads(perfetto_json(sample()))
    assert set(document) == {"traceEvents", "displayTimeUnit"}
    assert document["displayTimeUnit"] in ("ms", "ns")
    for event in document["traceEvents"]:
        assert {"name", "ph", "pid"} <= set(event)
        assert event["ph"] in "XCM"
        if event["ph"] == "X":
            assert event["dur"] >= 0
            assert event["ts"] >= 0
            assert isinstance(event["tid"], int)
        if event["ph"] == "C":
            assert all(isinstance(value, int | float) for value in event["args"].values())


def test_bars_of_a_track_do_not_overlap_and_every_track_has_a_name() -> None:
    events = json.loads(perfetto_json(sample()))["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    bars = [event for event in events if event["ph"] == "X"]
    assert {bar["tid"] for bar in bars} == set(names)
    assert set(names.values()) == {f"seat {i}" for i in range(8)}
    for track in names:
        ends = 0.0
        for bar in sorted((bar for bar in bars if bar["tid"] == track), key=lambda bar: bar["ts"]):
            assert bar["ts"] >= ends - 0.01
            ends = bar["ts"] + bar["dur"]


def test_counters_end_at_zero_and_never_go_below() -> None:
    run = sample()
    counts = [e["args"] for e in json.loads(perfetto_json(run))["traceEvents"] if e["name"] == "requests"]
    assert counts[-1] == {"waiting": 0, "running": 0}
    assert all(min(count.values()) >= 0 for count in counts)
    assert max(count["running"] for count in counts) == 8
