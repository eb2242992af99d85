"""Files of a simulation: device failures and returns as input; rows of requests and a trace for Perfetto as output."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from hetis.formats.errors import DocumentError, Problem, did_you_mean, single_problem
from hetis.formats.files import file_label, read_text
from hetis.simulator.values import Fault, FloatArray, Run

CSV_COLUMNS = (
    "id", "arrival_s", "prompt_tokens", "output_tokens", "replica", "admitted_s", "first_token_s", "finished_s",
    "ttft_s", "tpot_s", "end_to_end_s", "preemptions", "moved_bytes",
)  # fmt: skip
FAULT_COLUMNS = ("at_s", "device", "event")
FAULT_EVENTS = ("fail", "join")


def requests_csv(run: Run) -> str:
    """Return one row per request that arrived, with times to the microsecond; a cell is empty if it never happened.

    ``arrival_s``, ``prompt_tokens`` and ``output_tokens`` make the file a trace that can be replayed.
    """
    later_tokens = np.where(run.output_tokens > 1, run.output_tokens - 1, math.nan)
    columns = (
        run.id.tolist(), _times(run.arrival_s), run.prompt_tokens.tolist(), run.output_tokens.tolist(),
        [replica if replica >= 0 else "" for replica in run.replica.tolist()], _times(run.admitted_s),
        _times(run.first_token_s), _times(run.finished_s), _times(run.first_token_s - run.arrival_s),
        _times((run.finished_s - run.first_token_s) / later_tokens), _times(run.finished_s - run.arrival_s),
        run.preemptions.tolist(), [f"{moved:.0f}" for moved in run.moved_bytes.tolist()],
    )  # fmt: skip
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    writer.writerows(zip(*columns, strict=True))
    return text.getvalue()


def _times(values_s: FloatArray) -> list[str]:
    return [f"{value_s:.6f}" if math.isfinite(value_s) else "" for value_s in values_s.tolist()]


def perfetto_json(run: Run) -> str:
    """Return the run in the Trace Event Format (JSON object form), with a track per stage copy.

    The file opens in https://ui.perfetto.dev and chrome://tracing. Waiting and running requests are counters, sampled
    at every change; so is KV use per device if the run has samples. Timestamps are microseconds of virtual time.

    Source: Duffy, "Trace Event Format", Google (2016); complete (``X``), counter (``C``) and metadata (``M``) events.
    """
    tracks = list(dict.fromkeys(event.track for event in run.trace_events))
    numbers = {track: number for number, track in enumerate(tracks, start=1)}
    events: list[dict[str, Any]] = [_metadata("process_name", 0, "hetis simulation")]
    for track, number in numbers.items():
        events.append(_metadata("thread_name", number, track))
        events.append(_metadata("thread_sort_index", number, number))
    events += (
        {
            "name": event.name,
            "cat": event.name.partition(" ")[0],
            "ph": "X",
            "pid": 0,
            "tid": numbers[event.track],
            "ts": _us(event.start_s),
            "dur": _us(event.duration_s),
            "args": dict(event.arguments),
        }
        for event in run.trace_events
    )
    events += _request_counters(run)
    if run.series is not None:
        times = run.series.times_s.tolist()
        for device, used in zip(run.series.devices, run.series.kv_used_fraction.T.tolist(), strict=True):
            events += (
                _counter(f"KV of {device}", time_s, used=round(x, 6)) for time_s, x in zip(times, used, strict=True)
            )
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}, separators=(",", ":"))


def _request_counters(run: Run) -> list[dict[str, Any]]:
    """Return how many requests wait for their first chunk and how many are under way, at every change."""
    changes: dict[float, list[int]] = {}
    for when, waiting, running in ((run.arrival_s, 1, 0), (run.admitted_s, -1, 1), (run.finished_s, 0, -1)):
        for time_s in when.tolist():
            if math.isfinite(time_s):
                change = changes.setdefault(time_s, [0, 0])
                change[0] += waiting
                change[1] += running
    events, waiting, running = [], 0, 0
    for time_s in sorted(changes):
        waiting, running = waiting + changes[time_s][0], running + changes[time_s][1]
        events.append(_counter("requests", time_s, waiting=waiting, running=running))
    return events


def _counter(name: str, time_s: float, **values: float) -> dict[str, Any]:
    return {"name": name, "ph": "C", "pid": 0, "ts": _us(time_s), "args": values}


def _metadata(name: str, thread: int, value: str | int) -> dict[str, Any]:
    key = "sort_index" if isinstance(value, int) else "name"
    return {"name": name, "ph": "M", "pid": 0, "tid": thread, "args": {key: value}}


def _us(value_s: float) -> float:
    return round(value_s * 1e6, 3)


def load_faults(path: str | os.PathLike[str]) -> tuple[Fault, ...]:
    """Return the events of a file (``-``: standard input) in order of time. Devices are not looked up here.

    Raises:
        DocumentError: the file has problems; it carries all of them.
    """
    label = file_label(path)
    reader = csv.reader(io.StringIO(read_text(path)))
    header = [column.strip() for column in next(reader, [])]
    missing = [column for column in FAULT_COLUMNS if column not in header]
    if missing:
        message = f"column {', '.join(missing)} is missing, the header must have {','.join(FAULT_COLUMNS)}"
        raise single_problem(label, message, line=1)
    places = [header.index(column) for column in FAULT_COLUMNS]
    events, problems = list[Fault](), list[Problem]()
    try:
        for row in filter(None, reader):
            at_s, device, event = (row[place].strip() if place < len(row) else "" for place in places)
            wrong = list(_wrong_in(at_s, device, event))
            problems += [Problem(file=label, line=reader.line_num, path=at, message=text) for at, text in wrong]
            if not wrong:
                events.append(Fault(at_s=float(at_s), device=device, joins=event == "join"))
    except csv.Error as error:
        problems.append(Problem(file=label, line=reader.line_num, message=f"is not CSV: {error}"))
    if problems:
        raise DocumentError(problems)
    return tuple(sorted(events, key=lambda event: event.at_s))


def _wrong_in(at_s: str, device: str, event: str) -> Iterator[tuple[str, str]]:
    """Yield the problems of a row as (column, message) pairs."""
    try:
        if not 0 <= float(at_s) < math.inf:
            yield "at_s", f"is {at_s}, must be finite and >= 0"
    except ValueError:
        yield "at_s", f"{at_s[:80]!r} is not a number of seconds"
    if not device:
        yield "device", "is empty, expected node/index"
    if event not in FAULT_EVENTS:
        known = f"{', '.join(FAULT_EVENTS)}{did_you_mean(event, FAULT_EVENTS)}"
        yield "event", f"{event[:80]!r} is not one of {known}"
