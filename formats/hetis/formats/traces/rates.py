"""Workloads of what servers and benchmarks measure instead of requests: histograms of lengths, means, and rates.

``/metrics`` of vLLM and SGLang have a histogram of prompts and one of outputs (`of_metrics`), Prometheus their increase
over a time (`of_histograms`), logs the tokens per second and the requests of their clients, and reports of benchmarks
their means. Histograms lack which prompt had which output: lengths are taken as independent of each other.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import PurePath
from typing import Any

from hetis.formats.errors import single_problem
from hetis.formats.fields import listed, mapping
from hetis.formats.files import MAX_BYTES, readable
from hetis.formats.vllm_logs import seconds_of_year
from hetis.solver.workload import LengthBin, Workload

# Histograms of the tokens of prompts and of outputs: vLLM's, SGLang's, TGI's, Dynamo's, and those of the Gateway API's
# inference extension.
HISTOGRAMS = (
    ("vllm:request_prompt_tokens", "vllm:request_generation_tokens"),
    ("sglang:prompt_tokens_histogram", "sglang:generation_tokens_histogram"),
    ("tgi_request_input_length", "tgi_request_generated_tokens"),
    ("dynamo_frontend_input_sequence_tokens", "dynamo_frontend_output_sequence_tokens"),
    ("inference_objective_input_tokens", "inference_objective_output_tokens"),
    ("inference_model_input_tokens", "inference_model_output_tokens"),
)
# Totals of the tokens of prompts and of outputs, and of requests, of servers without these histograms.
_TOTALS = (
    ("vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:request_success_total"),
    ("sglang:prompt_tokens_total", "sglang:generation_tokens_total", "sglang:num_requests_total"),
    ("sglang:prompt_tokens_total", "sglang:generation_tokens_total", "sglang:e2e_request_latency_seconds_count"),
)
_NO_RATE = "a scrape without the start of its server has no rate: give --demand, or a Prometheus"
_INDEPENDENT = "prompts and outputs are taken as independent, since histograms have no pairs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A workload, what it was measured by, of how many requests, and what was assumed."""

    workload: Workload
    form: str
    num_requests: float
    notes: tuple[str, ...] = ()


def measured(label: str) -> Measured | None:
    """Return the workload of a file that has rates or histograms; None if it has requests, or nothing of this kind.

    Raises DocumentError if the file cannot be read, or lacks a part of them.
    """
    if not label.endswith(_ENDINGS) or not os.path.isfile(label):
        return None
    with readable(label), gzip.open(label, "rb") if label.endswith(".gz") else open(label, "rb") as file:
        begin = file.read(MAX_BYTES).decode("utf-8", "replace")
    name = PurePath(label).name.partition(".")[0]
    if begin.lstrip()[:1] == "{" or _RESULT in begin:
        return _of_query(label, name, begin) if '"resultType"' in begin[:1000] else _of_summary(label, name, begin)
    if label.endswith(_TABLES):
        return _of_summary(label, name, _table_of_means(begin)) if begin.startswith("Metric,avg,") else None
    if any(prompts in begin for prompts, *_ in (*HISTOGRAMS, *_TOTALS)):
        return of_metrics(label, begin, name=name, at_s=os.stat(label).st_mtime)
    return _of_log(label, name, begin.splitlines())


_TABLES = (".csv", ".csv.gz")
_ENDINGS = (*(f".{one}{gz}" for one in ("log", "txt", "prom", "json", "jsonl") for gz in ("", ".gz")), *_TABLES)


# --- histograms

_SAMPLE = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})? ([-+.\deEinfINFNa]+)(?: [-\d]+)?\r?$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
Buckets = Mapping[float, float]
"""Requests at most as long as each bound, in tokens; the bound of the last is infinite."""


def of_metrics(label: str, text: str, *, name: str, at_s: float | None = None) -> Measured:
    """Return the workload of a scrape at a time (seconds since 1970). Raises DocumentError without counts of tokens."""
    buckets = defaultdict[str, dict[float, float]](lambda: defaultdict(float))
    values, models = defaultdict[str, float](float), dict[str, None]()
    for sample in _SAMPLE.finditer(text):
        metric, labels = sample[1], dict(_LABEL.findall(sample[2] or ""))
        try:
            value, bound = float(sample[3]), float(labels.get("le", "inf"))
        except ValueError as error:
            raise single_problem(label, f"{metric}: {error}", line=1 + text.count("\n", 0, sample.start())) from None
        if metric.endswith("_bucket") and "le" in labels:
            buckets[metric.removesuffix("_bucket")][bound] += value
            models |= dict.fromkeys(filter(None, [labels.get("model_name")]))
        elif metric.endswith("_created"):
            values[metric] = value
        else:
            values[metric] += value
    found = next((pair for pair in HISTOGRAMS if all(name in buckets for name in pair)), None)
    names = found or next((one for one in _TOTALS if all(values.get(name) for name in one)), None)
    if names is None:
        wanted = " nor ".join(f"{pair[0]}_bucket" for pair in HISTOGRAMS[:2])
        raise single_problem(label, f"has no {wanted}: give the server's /metrics, or a Prometheus that scrapes it")
    prompts = names[0]
    since = (values.get(f"{prompts}_created"), values.get("process_start_time_seconds"))
    start_s = next((one for one in since if one), None)
    spent_s = at_s - start_s if at_s is not None and start_s is not None and at_s > start_s else None
    notes = (
        [f"it has requests of {len(models)} models together: {', '.join(list(models)[:4])}"] if len(models) > 1 else []
    )
    count = max(buckets[prompts].values()) if found else values[names[-1]]
    if spent_s is None:
        notes.append(_NO_RATE)
    else:
        notes.append(f"the rate is the mean over {spent_s / 3600:.3g} h since the server's start")
    form, rate_rps = f"metrics of {prompts.partition(':')[0].partition('_')[0]}", spent_s and count / spent_s
    if found:
        histograms = [(buckets[one], values.get(f"{one}_sum")) for one in found]
        return of_histograms(label, histograms, name=name, form=form, rate_rps=rate_rps, notes=notes)
    prompt_tokens, output_tokens = (max(1.0, values[one] / count) for one in names[:2])
    mean = LengthBin(prompt_tokens=prompt_tokens, output_tokens=output_tokens, weight=count)
    notes.append("all requests have the mean lengths, since the server has no histograms of them")
    workload = Workload(name=name, bins=(mean,), rate_rps=rate_rps)
    return Measured(workload=workload, form=f"{form}, totals", num_requests=count, notes=tuple(notes))


def _of_query(label: str, name: str, text: str) -> Measured:
    """Return the workload of Prometheus' answer: counters at one time, or their increase over a range."""
    lines, spans_s = list[str](), [0.0]
    try:
        for one in listed(mapping(mapping(json.loads(text)).get("data")).get("result")):
            labels = {key: str(value) for key, value in mapping(mapping(one).get("metric")).items()}
            points = [(float(at), float(value)) for at, value in one.get("values") or [one["value"]]]
            # A counter that falls has begun anew.
            steps = (after[1] - (before[1] if after[1] >= before[1] else 0.0) for before, after in pairwise(points))
            spans_s.append(points[-1][0] - points[0][0])
            increase = sum(steps) if len(points) > 1 else points[0][1]
            of = ",".join(f'{key}="{value}"' for key, value in labels.items() if key != "__name__")
            lines.append(f"{labels.get('__name__', '')}{{{of}}} {increase!r}")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise single_problem(label, "is no answer of Prometheus to a query of counters") from None
    found = of_metrics(label, "\n".join(lines), name=name)
    if not max(spans_s) > 0:
        return found
    workload = replace(found.workload, rate_rps=found.num_requests / max(spans_s))
    notes = (note for note in found.notes if note != _NO_RATE)
    return replace(found, workload=workload, notes=(*notes, f"the rate is the mean over {max(spans_s) / 3600:.3g} h"))


def of_histograms(
    label: str,
    histograms: Sequence[tuple[Buckets, float | None]],
    *,
    name: str,
    form: str,
    rate_rps: float | None,
    notes: Iterable[str] = (),
) -> Measured:
    """Return the workload of two histograms, each with the sum of all lengths if it is known.

    Raises DocumentError if they count no requests, or fewer within a larger bound.
    """
    marginals = [_lengths(label, *one) for one in histograms]
    prompts, outputs = marginals
    total = sum(weight for _, weight in outputs)
    bins = (
        LengthBin(prompt_tokens=prompt, output_tokens=output, weight=weight * share / total)
        for prompt, weight in prompts
        for output, share in outputs
    )
    workload = Workload(name=name, bins=tuple(bins), rate_rps=rate_rps or None)
    count = sum(weight for _, weight in prompts)
    return Measured(workload=workload, form=form, num_requests=count, notes=(*notes, _INDEPENDENT))


def _lengths(label: str, buckets: Buckets, total: float | None) -> list[tuple[float, float]]:
    """Return length and weight of each bucket: all as far between their bounds as gives the sum."""
    rows, below, bound = list[tuple[float, float, float]](), 0.0, 1.0
    for least, count in sorted(buckets.items()):
        if not math.isfinite(count) or count < below - 1e-6 * abs(below):
            raise single_problem(
                label, f"counts {count:g} requests of at most {least:g} tokens, but {below:g} below that"
            )
        last = least if math.isfinite(least) else 2 * bound
        if count > below and last >= bound:
            rows.append((bound, last, count - below))
        below, bound = max(below, count), max(bound, last if math.isfinite(least) else bound)
    if not rows:
        raise single_problem(label, "counts no requests")
    least_sum, width = sum(low * n for low, _, n in rows), sum((high - low) * n for low, high, n in rows)
    place = 0.5 if total is None or width <= 0 else min(1.0, max(0.0, (total - least_sum) / width))
    return [(low + place * (high - low), n) for low, high, n in rows]


# --- reports of means


def _of_summary(label: str, name: str, text: str) -> Measured | None:
    """Return the workload of a report with means: of genai-perf, aiperf or inference-perf, or of bench_serving without
    requests, as JSON or as printed.
    """
    found = list[tuple[str, float, float, float, float]]()
    for run in _runs(text):
        means = _means(run)
        if means is None:  # a trace, of which the first line shows it
            return None
        found.append(means)
    if not found:
        return None
    form = found[0][0]
    bins = tuple(LengthBin(prompt_tokens=p, output_tokens=o, weight=n) for _, p, o, n, _ in found)
    seconds = sum(duration for *_, duration in found)
    count = sum(n for *_, n, _ in found)
    note = f"all requests of a run have its mean lengths: the report of {form} has no others"
    workload = Workload(name=name, bins=bins, rate_rps=count / seconds if seconds > 0 else None)
    return Measured(workload=workload, form=form, num_requests=count, notes=(note,))


# What ``vllm bench serve`` and SGLang's bench_serving print, by the names in their JSON.
_PRINTED = {"Successful requests": "completed", "Benchmark duration (s)": "duration"}
_PRINTED |= {"Total input tokens": "total_input_tokens", "Total generated tokens": "total_output_tokens"}
_RESULT = " Serving Benchmark Result "
_LINE = re.compile(rf"(?m)^({'|'.join(map(re.escape, _PRINTED))}): +([\d.]{{1,20}}) *$")


def _runs(text: str) -> Iterator[Any]:
    for table in text.split(_RESULT)[1:10_000]:
        yield {_PRINTED[name]: float(number) for name, number in _LINE.findall(table) if number.count(".") < 2}
    if _RESULT in text:
        return
    try:
        yield json.loads(text)
    except (ValueError, RecursionError):
        for line in text.splitlines()[:10_000]:
            try:
                yield json.loads(line)
            except (ValueError, RecursionError):
                yield None


def _table_of_means(text: str) -> str:
    """Return the CSV of genai-perf or aiperf as its JSON: a row is a name, its unit in brackets, and the mean."""
    found = re.findall(r"(?m)^([\w ]{1,60}?)(?: \([^)\n]*\))?,([\d.]{1,30})(?=[,\r\n]|\Z)", text)
    means = {name.lower().replace(" ", "_"): float(mean) for name, mean in found if mean.count(".") < 2}
    return json.dumps({name: {"avg": mean} for name, mean in means.items()})


def _means(run: Any) -> tuple[str, float, float, float, float] | None:
    """Return form, mean lengths, requests and seconds of a run, or None if it has other fields."""
    data = mapping(run)
    names = ("input_sequence_length", "output_sequence_length", "request_throughput")
    if means := _positive(mapping(data.get(name)).get("avg") for name in names):
        number = (_positive([mapping(data.get("request_count")).get("avg")]) or [1.0])[0]
        return "genai-perf or aiperf, means", means[0], means[1], number, number / means[2]
    done = mapping(data.get("successes"))
    each = (mapping(done.get(name)).get("mean") for name in ("prompt_len", "output_len"))
    speed = mapping(done.get("throughput")).get("requests_per_sec")
    if means := _positive((*each, done.get("count"), speed)):
        return "inference-perf, means", means[0], means[1], means[2], means[2] / means[3]
    totals = _positive(data.get(one) for one in ("total_input_tokens", "total_output_tokens", "completed", "duration"))
    if not totals or "input_lens" in data:
        return None
    prompts, outputs, number, seconds = totals
    return "bench_serving, means", max(1.0, prompts / number), max(1.0, outputs / number), number, seconds


def _positive(values: Iterable[Any]) -> list[float]:
    """Return numbers, or none unless all are positive numbers."""
    every = list(values)
    found = [float(one) for one in every if isinstance(one, int | float) and 0 < one < 1e15]
    return found if len(found) == len(every) else []


# --- logs

# vLLM logs every ten seconds, SGLang every batch of prompts and every few of decoding.
_VLLM = re.compile(
    r"INFO (\d\d)-(\d\d) (\d\d):(\d\d):(\d\d).*?(?:Engine (\d+): )?"
    r"Avg prompt throughput: ([\d.]+) tokens/s, Avg generation throughput: ([\d.]+) tokens/s"
)
_SGLANG_TIME = re.compile(r"\[(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)")
_PREFILL = re.compile(r"Prefill batch.*?#new-seq: (\d+), #new-token: (\d+), #cached-token: (\d+)")
_DECODE = re.compile(r"Decode batch.*?gen throughput \(token/s\): ([\d.]+)")
_SERVED = re.compile(r'"POST /(?:v1/(?:chat/)?completions|v1/responses|generate)\S* HTTP/[\d.]+" 200')
_HITS = re.compile(r"Prefix cache hit rate: ([\d.]+)%")


# llama.cpp's server times the prompt of every request and then its output.
_LLAMA_CPP = re.compile(r"(prompt eval|eval) time = *[\d.]+ ms / +(\d{1,9}) (?:tokens|runs)")


def _of_llama_cpp(lines: Iterable[str]) -> list[tuple[int, int]]:
    """Return the tokens of prompt and output of each request."""
    found, prompt = list[tuple[int, int]](), 0
    for timed in filter(None, map(_LLAMA_CPP.search, lines)):
        if timed[1] == "prompt eval":
            prompt = int(timed[2])
        elif prompt and int(timed[2]):
            found.append((prompt, int(timed[2])))
            prompt = 0
    return found


def _of_log(label: str, name: str, lines: Sequence[str]) -> Measured | None:
    """Return the workload of a server's log with rates of tokens; None if it has none, or has requests.

    Raises DocumentError if it has no line for a request, so that lengths are not known.
    """
    if any("Finish: obj=" in line or "token_ids: [" in line for line in lines):
        return None
    if timed := _of_llama_cpp(lines):
        bins = tuple(LengthBin(prompt_tokens=p, output_tokens=o, weight=n) for (p, o), n in Counter(timed).items())
        said = ("prompts lack the parts that were in the cache", "the log has no times: give --demand")
        requests = Workload(name=name, bins=bins)
        return Measured(workload=requests, form="llama.cpp's timings", num_requests=len(timed), notes=said)
    ticks, last_s = dict[str, list[tuple[float, float, float]]](), 0.0
    served = sequences = 0
    prompts = outputs = 0.0
    begun, hits = list[float](), 0.0
    for line in lines:
        if found := _VLLM.search(line):
            clock_s = seconds_of_year(found.groups()[:5])
            if clock_s is not None:
                ticks.setdefault(found[6] or "0", []).append((clock_s, float(found[7]), float(found[8])))
            hits = float(hit[1]) / 100 if (hit := _HITS.search(line)) else hits
        elif stamped := _SGLANG_TIME.match(line.lstrip()):
            clock_s = datetime.fromisoformat(stamped[1]).replace(tzinfo=UTC).timestamp()
            if found := _PREFILL.search(line):
                sequences, prompts = sequences + int(found[1]), prompts + float(found[2]) + float(found[3])
                begun.append(clock_s)
            elif found := _DECODE.search(line):
                outputs += float(found[1]) * (clock_s - last_s if last_s else 0.0)
                last_s = clock_s
                begun.append(clock_s)
        served += bool(_SERVED.search(line))
    form, seconds = "SGLang's batches", begun[-1] - begun[0] if begun else 0.0
    if ticks:
        form, seconds = "vLLM's INFO lines", 0.0
        for rows in ticks.values():
            steps = [max(0.0, after[0] - before[0]) for before, after in pairwise(rows)]
            usual_s = sorted(steps)[len(steps) // 2] if steps else 10.0
            spans = [min(step, 2 * usual_s) for step in (usual_s, *steps)]
            prompts += sum(row[1] * span for row, span in zip(rows, spans, strict=True))
            outputs += sum(row[2] * span for row, span in zip(rows, spans, strict=True))
            seconds = max(seconds, rows[-1][0] - rows[0][0] + usual_s)
    if not (prompts and outputs and seconds):
        return None
    count = served or sequences
    if not count:
        rates = f"{prompts / seconds:.4g} tokens/s of prompts and {outputs / seconds:.4g} of outputs"
        how = "no line of a request: give mean lengths, such as 8000/300, or a log with the accesses of clients"
        raise single_problem(label, f"has {rates}, but {how}")
    notes = ["all requests have the mean lengths, since the log has rates"]
    if not served:
        notes.append("parts of a prompt count as prompts of their own, since the log has no accesses of clients")
    if hits:
        notes.append(f"{hits:.0%} of prompts were in the prefix cache: --prefix-hit-rate {hits:.2g} counts that")
    one = LengthBin(
        prompt_tokens=max(1.0, prompts / count), output_tokens=max(1.0, outputs / count), weight=float(count)
    )
    workload = Workload(name=name, bins=(one,), rate_rps=count / seconds)
    return Measured(workload=workload, form=form, num_requests=count, notes=tuple(notes))
