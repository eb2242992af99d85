"""Request traces: ``arrival_s,prompt_tokens,output_tokens`` in CSV or JSONL, or another of `forms`.

`rows` reads files, `reports` and `logs` what benchmarks and servers write, `rates` means and histograms. A trace is
made a workload by its histogram of lengths. Its prefix cache hits are counted (`hits`) where it has the form of
Mooncake or Qwen-Bailian, whose requests name the blocks that make their prompts: in an unlimited cache of all replicas,
in which a request hits the leading blocks that any earlier request had. So the rate is the most that a cache can reach.
"""

from __future__ import annotations

import heapq
import json
import math
import os
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from hetis.formats.errors import DocumentError, Problem, single_problem
from hetis.formats.traces.forms import COLUMNS, MOONCAKE, MULTI_TURN, OURS, CountTokens, TraceForm
from hetis.formats.traces.hits import hit_tokens, no_hash_ids
from hetis.formats.traces.rates import measured
from hetis.formats.traces.rows import CSV_ENDINGS, JSON_ENDINGS, JSONL_ENDINGS, LOG_ENDINGS, TSV_ENDINGS, rows_of
from hetis.solver.workload import LengthBin, Workload

MAX_TOKENS = 10_000_000  # limit per prompt or output
LAST_ARRIVAL_S = 1e11  # of a trace in seconds: three thousand years, or today's time in milliseconds
MAX_ROWS = 20_000_000
MAX_BINS = 4096
MAX_PROBLEMS = 20
PrefixHitRate = float | Literal["trace"]
"""A share of every prompt that is in the prefix cache, or ``trace``: what `hit_tokens` counts in the trace."""
ENDINGS = CSV_ENDINGS + TSV_ENDINGS + JSONL_ENDINGS + LOG_ENDINGS + (".prom",)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trace:
    """Requests in order of arrival, at least one. All arrays have the shape [requests].

    ``arrival_s`` counts from the source's own start, or from the first request if they are points in time.
    Lengths are in tokens, as in the file (not clipped). ``form`` is the form it was read from, and ``has_times``
    whether that contains arrival times; if not, all requests arrive together. ``prefix_share`` is the share of each
    prompt that is in the prefix cache when the request arrives; None: none is. ``num_left_out`` rows of the file are no
    requests but ``left_out``. ``readings`` are sentences about what was assumed.
    """

    name: str
    arrival_s: npt.NDArray[np.float64]
    prompt_tokens: npt.NDArray[np.int64]
    output_tokens: npt.NDArray[np.int64]
    form: str = "hetis"
    has_times: bool = True
    prefix_share: npt.NDArray[np.float64] | None = None
    num_left_out: int = 0
    left_out: str = ""
    readings: tuple[str, ...] = ()

    @property
    def prefix_hit_rate(self) -> float:
        """The share of all prompt tokens that are in the prefix cache."""
        if self.prefix_share is None:
            return 0.0
        return float(self.prefix_share @ self.prompt_tokens) / float(self.prompt_tokens.sum())

    @property
    def rate_rps(self) -> float | None:
        """(requests - 1) / (last - first arrival), or None if all arrive together."""
        span_s = float(self.arrival_s[-1] - self.arrival_s[0])
        return (len(self.arrival_s) - 1) / span_s if span_s > 0 else None


def read_trace(
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    count: CountTokens | None = None,
    prefix_hit_rate: PrefixHitRate = 0.0,
) -> Trace:
    """Return the requests of a trace. Rows may be in any order, and further columns or fields are ignored. Raises
    DocumentError if the file is unreadable, lacks the columns, has no requests, has rows that are not requests (the
    first 20), or no hash ids to count hits by.

    Args:
        path: a file in any form of `trace_forms`: ``.csv``, ``.tsv``, ``.jsonl``, ``.json`` or ``.log``, followed by
            ``.gz`` if it is compressed.
        name: name of the trace; default: the file's name without its suffixes.
        count: counts the tokens of a text, for conversations. None: those are refused.
        prefix_hit_rate: share of every prompt that is in the prefix cache, below 1; or counted, see `PrefixHitRate`.
    """
    label = os.fspath(path)
    problems: list[Problem] = []
    num_problems = 0
    arrivals, prompts, outputs = array("d"), array("q"), array("q")
    form, num_left_out, cached = OURS, 0, 0
    for place, form, row in rows_of(label, count):
        if not row or (form.failed_without_output and row[2].strip() in ("0", "")):
            num_left_out += 1
            continue
        request = _request(row, form)
        if isinstance(request, list):
            num_problems += len(request)
            problems += [_problem(label, place, column, text) for column, text in request]
            del problems[MAX_PROBLEMS:]
            continue
        arrivals.append(request[0])
        prompts.append(request[1])
        outputs.append(request[2])
        cached += _cached(row, request[1])
        if len(prompts) > MAX_ROWS:
            raise single_problem(label, f"has more than {MAX_ROWS} requests")
    if num_problems > len(problems):
        problems.append(Problem(file=label, message=f"... and {num_problems - len(problems)} more problems"))
    if problems:
        raise DocumentError(problems)
    if not prompts:
        raise single_problem(label, "has no requests" + (f" but {form.left_out}" if num_left_out else ""))
    readings = [form.reading] if form.reading else []
    if cached and not prefix_hit_rate:
        share = min(0.99, cached / sum(prompts))
        readings.append(f"{share:.0%} of the prompt tokens were cached: --prefix-hit-rate {share:.2g} counts that")
    arrival_s = np.array(arrivals)
    form, arrival_s = _in_plausible_unit(form, arrival_s, readings)
    order = np.argsort(arrival_s, kind="stable")
    prompt_tokens = np.array(prompts, dtype=np.int64)
    shares: npt.NDArray[np.float64] | None = None
    if prefix_hit_rate == "trace":
        if not label.endswith(JSONL_ENDINGS):
            raise no_hash_ids(label)
        shares = (hit_tokens(label, prompt_tokens, order) / prompt_tokens)[order]
    elif prefix_hit_rate:
        shares = np.full(len(prompts), prefix_hit_rate)
    return Trace(
        name=name or _without_endings(Path(label).name),
        arrival_s=arrival_s[order] - (arrival_s.min() if form.is_absolute or arrival_s.min() > _LONGEST_S else 0.0),
        prompt_tokens=prompt_tokens[order],
        output_tokens=np.array(outputs, dtype=np.int64)[order],
        form=form.name,
        has_times=form.has_times,
        prefix_share=shares,
        num_left_out=num_left_out,
        left_out=form.left_out,
        readings=tuple(readings),
    )


def _in_plausible_unit(
    form: TraceForm, arrival_s: npt.NDArray[np.float64], readings: list[str]
) -> tuple[TraceForm, npt.NDArray[np.float64]]:  # fmt: skip
    """Return the arrivals in seconds if they were read in another unit, of which the same fields are written, too.

    Milliseconds are whole; a part of one would be a clock of microseconds, so these are seconds. Otherwise a unit is
    another one only if the rate is far from what a fleet serves, and that in the other unit is not.
    """
    span_s = float(arrival_s.max() - arrival_s.min())
    rate_rps = (len(arrival_s) - 1) / span_s if span_s > 0 else 1.0
    if form in (MOONCAKE, MULTI_TURN):
        is_fraction = bool(np.any(np.rint(arrival_s * 1e3) != np.round(arrival_s * 1e3, 6)))
        if is_fraction or (rate_rps > _FASTEST_RPS and rate_rps / 1e3 > _SLOWEST_RPS):
            readings.append(
                f"timestamps are taken as seconds, {rate_rps / 1e3:.3g} requests/s; as milliseconds: {rate_rps:.3g}"
            )
            return replace(form, name=f"{form.name}, in seconds"), arrival_s * 1e3
        if rate_rps > _DOUBTED_RPS:
            readings.append(
                f"timestamps are taken as milliseconds, {rate_rps:.3g} requests/s; as seconds: {rate_rps / 1e3:.3g}"
            )
    elif form.name == "Qwen-Bailian" and rate_rps < _SLOWEST_RPS:
        readings.append(
            f"timestamps are taken as milliseconds, {rate_rps * 1e3:.3g} requests/s; as seconds: {rate_rps:.3g}"
        )
        return replace(form, name=f"{form.name}, in milliseconds"), arrival_s / 1e3
    elif rate_rps > _FASTEST_RPS:
        readings.append(f"{rate_rps:.4g} requests/s are more than a fleet serves: are the times in another unit?")
    return form, arrival_s


_LONGEST_S = 1e8  # from which arrivals are points in time: no trace begins after three years
_SLOWEST_RPS, _FASTEST_RPS = 2e-3, 1e3  # beyond which a unit is doubted
_DOUBTED_RPS = 50.0  # from which milliseconds may be seconds, as few services have that many requests


def _problem(label: str, place: int | str, column: str, message: str) -> Problem:
    if isinstance(place, int):
        return Problem(file=label, line=place, path=column, message=message)
    return Problem(file=label, path=f"{place}.{column}", message=message)


def spaced(trace: Trace, rate_rps: float) -> Trace:
    """Return the trace with evenly spaced arrivals at a rate, for traces without times."""
    return replace(trace, arrival_s=np.arange(len(trace.arrival_s)) / rate_rps, has_times=True)


def trace_text(trace: Trace, *, as_jsonl: bool = False) -> Iterator[str]:
    """Yield the lines of a trace in our form. Reading them gives the same requests."""
    rows = zip(trace.arrival_s.tolist(), trace.prompt_tokens.tolist(), trace.output_tokens.tolist(), strict=True)
    if not as_jsonl:
        yield ",".join(COLUMNS) + "\n"
    for row in rows:
        yield json.dumps(dict(zip(COLUMNS, row, strict=True))) + "\n" if as_jsonl else "{!r},{},{}\n".format(*row)


def load_trace(
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    prefix_hit_rate: PrefixHitRate = 0.0,
    notes: list[str] | None = None,
) -> Workload:
    """Return the workload of a trace: its `length_bins` and mean arrival rate; or that of `rates`, if a file has these
    instead of requests. ``notes`` gets sentences about what was assumed. Raises DocumentError as `read_trace`.
    """
    said = [] if notes is None else notes
    if prefix_hit_rate != "trace" and (found := measured(os.fspath(path))) is not None:
        said += (f"{os.fspath(path)}: {note}" for note in found.notes)
        return replace(found.workload, name=name or found.workload.name, prefix_hit_rate=prefix_hit_rate)
    trace = read_trace(path, name=name, prefix_hit_rate=prefix_hit_rate)
    said += (f"{os.fspath(path)}: {note}" for note in trace.readings)
    bins = length_bins(trace.prompt_tokens, trace.output_tokens, max_bins=MAX_BINS)
    # A share that was given stays what it is: the mean over all tokens may differ in the last digit.
    rate = trace.prefix_hit_rate if prefix_hit_rate == "trace" else prefix_hit_rate
    return Workload(name=trace.name, bins=bins, rate_rps=trace.rate_rps, prefix_hit_rate=rate)


def _without_endings(name: str) -> str:
    name = name.removesuffix(".gz")
    endings = ENDINGS + JSON_ENDINGS
    return next((name.removesuffix(ending) for ending in endings if name.endswith(ending)), name)


def _request(row: list[str], form: TraceForm) -> tuple[float, int, int] | list[tuple[str, str]]:
    """Return arrival, prompt and output of a row, or its problems as (column, message)."""
    wrong: list[tuple[str, str]] = []
    arrival, tokens = 0.0, [0, 0]
    try:
        arrival = form.seconds(row[0])
        if form is OURS and LAST_ARRIVAL_S < arrival < math.inf:
            wrong.append((form.fields[0], f"is {row[0].strip()} seconds: milliseconds?"))
        elif not (math.isfinite(arrival) and arrival >= 0):
            wrong.append((form.fields[0], f"is {row[0].strip()}, must be finite and >= 0"))
    except (ValueError, OverflowError):
        what = "a time" if form.is_absolute else "a number"
        wrong.append((form.fields[0], f"{row[0][:80]!r} is not {what}"))
    for i in (1, 2):
        try:
            tokens[i - 1] = int(_WHOLE.sub("", row[i])) if len(row[i]) <= 40 else MAX_TOKENS + 1
        except ValueError:
            wrong.append((form.fields[i], f"{row[i][:80]!r} is not a whole number"))
            continue
        if not 1 <= tokens[i - 1] <= MAX_TOKENS:
            wrong.append((form.fields[i], f"is {row[i].strip()[:40]}, must be 1 to {MAX_TOKENS}"))
    return wrong or (arrival, tokens[0], tokens[1])


def _cached(row: list[str], prompt: int) -> int:
    """Return how many tokens of a prompt its server had in its cache, as far as a row says."""
    stated = _WHOLE.sub("", row[3]).strip() if len(row) > len(COLUMNS) else ""
    return min(int(stated), prompt) if stated.isdecimal() and len(stated) < 12 else 0


_WHOLE = re.compile(r"\.0+\s*$")  # pandas writes columns in which values are missing as 374.0


IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


def length_bins(prompts: IntArray, outputs: IntArray, *, max_bins: int) -> tuple[LengthBin, ...]:
    """Return the joint histogram of request lengths, sorted by prompt and output. Weights are numbers of requests.

    Equal pairs share a bin. If there are more than ``max_bins`` distinct pairs, one bin of everything is split
    repeatedly: always the bin that adds most to the error of E[P^2] and E[O (P + O/2)], at its mean. Bins hold their
    means, so E[P] and E[O] stay exact; only the variance inside bins is lost. ``prompts``, ``outputs``: tokens of each
    request, shape [requests], all >= 1 and at least one; ``max_bins``: maximum number of bins.
    """
    pairs, counts = np.unique(np.stack([prompts, outputs], axis=1), axis=0, return_counts=True)
    p, o, w = pairs[:, 0].astype(np.float64), pairs[:, 1].astype(np.float64), counts.astype(np.float64)
    groups = [np.array([i]) for i in range(len(w))] if len(w) <= max_bins else _split(p, o, w, max_bins)
    bins = [_mean_bin(p[group], o[group], w[group]) for group in groups]
    return tuple(sorted(bins, key=lambda b: (b.prompt_tokens, b.output_tokens)))


def _mean_bin(p: FloatArray, o: FloatArray, w: FloatArray) -> LengthBin:
    total = float(w.sum())
    return LengthBin(prompt_tokens=float(w @ p) / total, output_tokens=float(w @ o) / total, weight=total)


def _split(p: FloatArray, o: FloatArray, w: FloatArray, max_bins: int) -> list[npt.NDArray[np.intp]]:
    # Weights of the variances in the relative errors of E[P^2] and of E[O (P + O/2)].
    per_p, per_o = 1.0 / float(w @ (p * p)), 1.0 / float(w @ (o * (p + o / 2)))

    def entry(number: int, group: npt.NDArray[np.intp]) -> tuple[float, int, npt.NDArray[np.intp], bool]:
        weight = w[group]
        mean_p, mean_o = (float(weight @ x[group]) / float(weight.sum()) for x in (p, o))
        error_p = per_p * float(weight @ (p[group] - mean_p) ** 2)
        error_o = per_o * float(weight @ (o[group] - mean_o) ** 2)
        along_prompt = error_p >= error_o
        return -max(error_p, error_o), number, group, along_prompt

    heap: list[Any] = [entry(0, np.arange(len(w)))]
    number = 1
    while len(heap) < max_bins and heap[0][0] < 0:
        _, _, group, along_prompt = heapq.heappop(heap)
        x = (p if along_prompt else o)[group]
        low = x <= float(w[group] @ x) / float(w[group].sum())
        for half in (group[low], group[~low]):
            heapq.heappush(heap, entry(number, half))
            number += 1
    return [group for _, _, group, _ in heap]
