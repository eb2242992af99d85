"""Request traces, CSV or JSONL: ``arrival_s,prompt_tokens,output_tokens``, or another form of `trace_forms.py`."""

from __future__ import annotations

import math
import os
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hetis.formats.errors import DocumentError, Problem, single_problem
from hetis.formats.histogram import length_bins
from hetis.formats.trace_forms import TraceForm
from hetis.formats.trace_rows import CSV_ENDINGS, JSONL_ENDINGS, rows_of
from hetis.solver.workload import Workload

MAX_TOKENS = 10_000_000  # of one prompt or output
MAX_ROWS = 20_000_000
MAX_BINS = 4096
MAX_PROBLEMS = 20
ENDINGS = CSV_ENDINGS + JSONL_ENDINGS


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trace:
    """Requests in the order of their arrival, at least one; all arrays have the shape [requests].

    ``arrival_s`` counts from the source's own start, or from the first request where it has the time of day. Lengths
    are in tokens, as the file has them (not clipped).
    """

    name: str
    arrival_s: npt.NDArray[np.float64]
    prompt_tokens: npt.NDArray[np.int64]
    output_tokens: npt.NDArray[np.int64]

    @property
    def rate_rps(self) -> float | None:
        """(requests - 1) / (last - first arrival); None when all arrive at once."""
        span_s = float(self.arrival_s[-1] - self.arrival_s[0])
        return (len(self.arrival_s) - 1) / span_s if span_s > 0 else None


def read_trace(path: str | os.PathLike[str], *, name: str | None = None) -> Trace:
    """The requests of a trace. Rows may be in any order, and there may be more columns or fields.

    Args:
        path: a ``.csv`` or ``.jsonl`` file, ``.gz`` behind it if it is compressed.
        name: of the trace; default: the file's name without its endings.

    Raises:
        DocumentError: not readable, no such columns, no requests, or rows that are not requests (the first 20).
    """
    label = os.fspath(path)
    problems: list[Problem] = []
    num_problems = 0
    arrivals, prompts, outputs = array("d"), array("q"), array("q")
    is_absolute = False
    for line, form, row in rows_of(label):
        is_absolute = form.is_absolute
        if form.failed_without_output and row[2].strip() in ("0", ""):
            continue
        request = _request(row, form)
        if isinstance(request, list):
            num_problems += len(request)
            problems += [Problem(file=label, line=line, path=column, message=text) for column, text in request]
            del problems[MAX_PROBLEMS:]
            continue
        arrivals.append(request[0])
        prompts.append(request[1])
        outputs.append(request[2])
        if len(prompts) > MAX_ROWS:
            raise single_problem(label, f"has more than {MAX_ROWS} requests")
    if num_problems > len(problems):
        problems.append(Problem(file=label, message=f"... and {num_problems - len(problems)} more problems"))
    if problems:
        raise DocumentError(problems)
    if not prompts:
        raise single_problem(label, "has no requests")
    arrival_s = np.array(arrivals)
    order = np.argsort(arrival_s, kind="stable")
    return Trace(
        name=name or _without_endings(Path(label).name),
        arrival_s=arrival_s[order] - (arrival_s.min() if is_absolute else 0.0),
        prompt_tokens=np.array(prompts, dtype=np.int64)[order],
        output_tokens=np.array(outputs, dtype=np.int64)[order],
    )


def load_trace(path: str | os.PathLike[str], *, name: str | None = None) -> Workload:
    """The workload of a trace (`read_trace`): its joint length histogram (`length_bins`) and mean arrival rate.

    Raises:
        DocumentError: as `read_trace`.
    """
    trace = read_trace(path, name=name)
    bins = length_bins(trace.prompt_tokens, trace.output_tokens, max_bins=MAX_BINS)
    return Workload(name=trace.name, bins=bins, rate_rps=trace.rate_rps)


def _without_endings(name: str) -> str:
    return name.removesuffix(".gz").removesuffix(".csv").removesuffix(".jsonl")


def _request(row: list[str], form: TraceForm) -> tuple[float, int, int] | list[tuple[str, str]]:
    """Arrival, prompt and output of a row, or what is wrong with it as (column, message)."""
    wrong: list[tuple[str, str]] = []
    arrival, tokens = 0.0, [0, 0]
    try:
        arrival = form.seconds(row[0])
        if not (math.isfinite(arrival) and arrival >= 0):
            wrong.append((form.fields[0], f"is {row[0].strip()}, must be finite and >= 0"))
    except (ValueError, OverflowError):
        what = "a time" if form.is_absolute else "a number"
        wrong.append((form.fields[0], f"{row[0][:80]!r} is not {what}"))
    for i in (1, 2):
        try:
            tokens[i - 1] = int(row[i]) if len(row[i]) <= 40 else MAX_TOKENS + 1
        except ValueError:
            wrong.append((form.fields[i], f"{row[i][:80]!r} is not a whole number"))
            continue
        if not 1 <= tokens[i - 1] <= MAX_TOKENS:
            wrong.append((form.fields[i], f"is {row[i].strip()[:40]}, must be 1 to {MAX_TOKENS}"))
    return wrong or (arrival, tokens[0], tokens[1])
