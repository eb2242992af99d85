"""Latencies of every request as a client measured them, from the report of a benchmark."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hetis.formats.errors import DocumentError, Problem, shown, single_problem
from hetis.formats.files import MAX_BYTES, decoded, file_label, read_bytes, unpacked
from hetis.formats.traces.rows import json_object_of

_LISTS = ("start_times", "input_lens", "output_lens", "ttfts", "itls")
_MOST = 1e12  # of any time or length
SAVE = "save it with vllm bench serve --save-result --save-detailed"


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedRequest:
    """A request and its latencies: ``token_s`` holds the time at which each piece of its answer arrived."""

    start_s: float
    prompt_tokens: int
    output_tokens: int
    token_s: tuple[float, ...]
    has_failed: bool = False


def load_latencies(path: str) -> list[TimedRequest]:
    """Return the requests in a report of ``vllm bench serve`` in order of their start; ``-`` is standard input.

    Raises DocumentError with all problems if it cannot be read, or is no such report.
    """
    label = file_label(path)
    raw = unpacked(read_bytes(path, most=MAX_BYTES), label, most=MAX_BYTES)
    data = json_object_of(label, decoded(raw, label))
    lists = {name: data[name] for name in _LISTS if isinstance(data.get(name), list)}
    if missing := [name for name in _LISTS if name not in lists]:
        raise single_problem(label, f"has no list {', '.join(missing)} of each request: {SAVE}")
    if len({len(values) for values in lists.values()}) > 1:
        lengths = ", ".join(f"{len(values)} {name}" for name, values in lists.items())
        raise single_problem(label, f"has lists of different lengths: {lengths}")
    if problems := list(_problems(label, lists)):
        raise DocumentError(problems)
    errors = data["errors"] if isinstance(data.get("errors"), list) else []
    errors += [""] * (len(lists["ttfts"]) - len(errors))
    return sorted(_requests(lists, errors), key=lambda one: one.start_s)


def _problems(label: str, lists: Mapping[str, list[Any]]) -> Iterator[Problem]:
    for name, values in lists.items():
        for index, value in enumerate(values):
            if name != "itls":
                if not _is_number(value):
                    yield Problem(file=label, path=f"{name}[{index}]", message=_refusal(value))
            elif not isinstance(value, list):
                yield Problem(file=label, path=f"{name}[{index}]", message=f"is {shown(value)}, must be a list")
            else:
                yield from (
                    Problem(file=label, path=f"{name}[{index}][{number}]", message=_refusal(one))
                    for number, one in enumerate(value)
                    if not _is_number(one)
                )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _MOST


def _refusal(value: object) -> str:
    return f"is {shown(value)}, must be a number from 0 to {_MOST:g}"


def _requests(lists: Mapping[str, list[Any]], errors: list[Any]) -> Iterator[TimedRequest]:
    columns = zip(*(lists[name] for name in _LISTS), errors, strict=False)
    for start_s, prompt, output, ttft, itls, error in columns:
        at_s, times = start_s + ttft, list[float]()
        for wait_s in (0.0, *itls):
            at_s += wait_s
            times.append(at_s)
        yield TimedRequest(
            start_s=start_s,
            prompt_tokens=math.ceil(prompt),
            output_tokens=math.ceil(output),
            token_s=tuple(times),
            has_failed=bool(error) or not output or not ttft,
        )
