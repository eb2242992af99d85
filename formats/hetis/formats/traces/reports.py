"""Requests in the reports of benchmarks, each one JSON object, or one for each run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from hetis.formats.errors import single_problem
from hetis.formats.fields import listed, mapping
from hetis.formats.traces.forms import GENAI_PERF, GUIDELLM, SGLANG_BENCH, VLLM_BENCH, CountTokens, Row

TEXTS = "has texts but no token counts: hetis-plan convert counts them, see its --help"
Rows = Callable[[str, Mapping[str, Any], CountTokens | None], Iterator[Row]]


def report_rows(label: str, data: Mapping[str, Any], count: CountTokens | None) -> Iterator[Row]:
    """Yield the requests in a report. Raises DocumentError if it is of no known tool, or lacks the requests.

    ``count`` counts the tokens of a text, for reports without counts; None: those are refused.
    """
    read = next((read for name, read in READERS.items() if isinstance(data.get(name), list)), None)
    if read is None:
        wanted = "expected an array of requests, or a report of " + ", ".join(_TOOLS)
        raise single_problem(label, f"has {', '.join(key[:40] for key in list(data)[:12]) or 'nothing'}: {wanted}")
    yield from read(label, data, count)


def is_report(data: Mapping[str, Any]) -> bool:
    return any(isinstance(data.get(name), list) for name in READERS)


def _lists(label: str, data: Mapping[str, Any], _count: CountTokens | None) -> Iterator[Row]:
    """Yield the requests of ``vllm bench serve`` and of SGLang's bench_serving, which have a list for each property."""
    lists = {name: value for name, value in data.items() if isinstance(value, list)}
    if missing := [name for name in ("input_lens", "output_lens") if name not in lists]:
        why = f"has no {', '.join(missing)}, but {', '.join(key[:40] for key in list(data)[:12])}"
        raise single_problem(label, f"{why}: save the report with each request (--save-detailed, --output-details)")
    form = VLLM_BENCH if "start_times" in lists else SGLANG_BENCH
    num, seconds = len(lists["input_lens"]), data.get("duration")
    step_s = seconds / num if num and isinstance(seconds, int | float) and 0 < seconds < 1e9 else 1.0
    starts = lists.get("start_times", [step_s * index for index in range(num)])
    columns = [starts, lists["input_lens"], lists["output_lens"]]
    if len({len(column) for column in columns}) > 1:
        lengths = ", ".join(f"{len(lists[name])} {name}" for name in form.fields if name)
        raise single_problem(label, f"has lists of different lengths: {lengths}")
    errors = lists.get("errors", [])
    for index, row in enumerate(zip(*columns, strict=True)):
        has_failed = index < len(errors) and errors[index]
        yield f"[{index}]", form, [] if has_failed else [str(value) for value in row]


def _guidellm(_label: str, data: Mapping[str, Any], _count: CountTokens | None) -> Iterator[Row]:
    """Yield the requests of all runs, of which later versions have the times and tokens in parts of their own."""
    for run, benchmark in enumerate(map(mapping, listed(data["benchmarks"]))):
        requests = mapping(benchmark.get("requests"))
        for index, one in enumerate(map(mapping, listed(requests.get("successful")))):
            times = mapping(mapping(one.get("info")).get("timings"))
            found = (
                one.get("request_start_time", one.get("start_time", times.get("request_start"))),
                one.get("prompt_tokens", _tokens(one.get("input_metrics"))),
                one.get("output_tokens", _tokens(one.get("output_metrics"))),
            )
            values = ["" if value is None else str(value) for value in found]
            yield f"benchmarks[{run}].requests.successful[{index}]", GUIDELLM, values
        for kind in ("errored", "incomplete"):
            yield from ((f"benchmarks[{run}].requests.{kind}", GUIDELLM, []) for _ in listed(requests.get(kind)))


def _tokens(metrics: Any) -> Any:
    return next((value for name in ("total_tokens", "text_tokens") if (value := mapping(metrics).get(name))), None)


def _genai_perf(label: str, data: Mapping[str, Any], count: CountTokens | None) -> Iterator[Row]:
    """Yield the requests of perf_analyzer's profile, which has texts and no counts."""
    if count is None:
        raise single_problem(label, TEXTS)
    for run, experiment in enumerate(map(mapping, listed(data["experiments"]))):
        for index, one in enumerate(map(mapping, listed(experiment.get("requests")))):
            prompt = "".join(_texts(_parsed(mapping(one.get("request_inputs")).get("payload"))))
            chunks = [_parsed(mapping(each).get("response")) for each in listed(one.get("response_outputs"))]
            usage = next((found for each in reversed(chunks) if (found := mapping(mapping(each).get("usage")))), {})
            answers = sum(any(_texts(chunk)) for chunk in chunks)
            tokens = (
                usage.get("prompt_tokens", count(prompt) if prompt else ""),
                usage.get("completion_tokens", answers),
            )
            place = f"experiments[{run}].requests[{index}]"
            yield place, GENAI_PERF, [str(one.get("timestamp", "")), *map(str, tokens)]


def _parsed(text: Any) -> Any:
    """Return the JSON in a payload, or in an event of a stream."""
    try:
        return json.loads(text.strip().removeprefix("data:")) if isinstance(text, str) else text
    except (ValueError, RecursionError):
        return None


def _texts(data: Any) -> Iterator[str]:
    """Yield the texts of a request or a response of the API."""
    found = mapping(data)
    for name in ("prompt", "content", "text", "text_input", "reasoning_content"):
        if isinstance(text := found.get(name), str) and text:
            yield text
    for name in ("messages", "choices", "content"):
        for one in listed(found.get(name)):
            yield from _texts(one)
    for name in ("delta", "message"):
        if name in found:
            yield from _texts(found[name])


# By the list that a report has.
READERS: Mapping[str, Rows] = {
    "benchmarks": _guidellm,
    "experiments": _genai_perf,
    "input_lens": _lists,
    "output_lens": _lists,
}
_TOOLS = ("vllm bench serve --save-detailed", "SGLang's bench_serving --output-details", "guidellm", "genai-perf")
