"""A run as files: one CSV row per request, and a trace for Perfetto and Chrome."""

from __future__ import annotations

import csv
import io
import json
import math
from typing import Any

from hetis.simulator.values import Run

CSV_COLUMNS = (
    "id", "arrival_s", "prompt_tokens", "output_tokens", "replica", "admitted_s", "first_token_s", "finished_s",
    "ttft_s", "tpot_s", "end_to_end_s", "preemptions", "moved_bytes",
)  # fmt: skip


def requests_csv(run: Run) -> str:
    """Return one row per request that arrived, times to the microsecond; empty if something never happened.

    ``arrival_s``, ``prompt_tokens`` and ``output_tokens`` make the file a trace that can be replayed.
    """
    columns = (
        run.id, run.arrival_s, run.prompt_tokens, run.output_tokens, run.replica, run.admitted_s, run.first_token_s,
        run.finished_s, run.preemptions, run.moved_bytes,
    )  # fmt: skip
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    writer.writerows(_row(*values) for values in zip(*(column.tolist() for column in columns), strict=True))
    return text.getvalue()


def _row(
    number: int,
    arrival_s: float,
    prompt: int,
    output: int,
    replica: int,
    admitted_s: float,
    first_s: float,
    finished_s: float,
    preemptions: int,
    moved_bytes: float,
) -> tuple[int | str, ...]:
    tpot_s = (finished_s - first_s) / (output - 1) if output > 1 else math.nan
    return (
        number, _time(arrival_s), prompt, output, replica if replica >= 0 else "", _time(admitted_s), _time(first_s),
        _time(finished_s), _time(first_s - arrival_s), _time(tpot_s), _time(finished_s - arrival_s), preemptions,
        f"{moved_bytes:.0f}",
    )  # fmt: skip


def perfetto_json(run: Run) -> str:
    """Return the run in the Trace Event Format (JSON object form): a track per stage copy, pool card and link.

    Opens in https://ui.perfetto.dev and chrome://tracing. Requests waiting and running are counters, sampled at every
    change; KV use per device is one if the run has samples. Timestamps are microseconds of virtual time.

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
    """Return the counts of requests that wait for their first chunk and that are under way, at every change."""
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


def _time(value_s: float) -> str:
    return f"{value_s:.6f}" if math.isfinite(value_s) else ""
