"""Requests in the logs of vLLM and SGLang.

A vLLM server started with ``--enable-log-requests --enable-log-outputs`` and ``VLLM_LOGGING_LEVEL=DEBUG`` logs the
token ids of every prompt and output (``vllm/entrypoints/serve/utils/request_logger.py`` of 0.32; versions up to 0.11
logged the ids of prompts at INFO). Requests without a response are left out: they failed, or the log ends too early.
An SGLang server with ``--log-requests`` logs a line when a request has ended, with its tokens and the time it took.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from hetis.formats.errors import single_problem
from hetis.formats.traces.forms import SGLANG_LOG, VLLM_LOG, Row
from hetis.formats.vllm_logs import seconds_of_year

_HALF_A_YEAR_S = 182 * 86_400.0
MAX_OPEN = 1_000_000  # requests that wait for their responses

# User text precedes the ids, so the last list in a line is the server's.
_LINE = re.compile(
    r"\b(?:DEBUG|INFO) (\d\d)-(\d\d) (\d\d):(\d\d):(\d\d)(?:\.\d+)? "
    r".*?(Received request|Request|Generated response) ([\w.-]{1,200})[ :]"
)
_IDS = re.compile(r".*\b(prompt|output)_token_ids: \[([\d, ]*)(\]|$)", re.DOTALL)


@dataclass(slots=True)
class _Unfinished:
    """A request without a response yet. Counts are 0 until they are known."""

    line: int
    arrival_s: float
    prompt_tokens: int = 0
    delta_tokens: int = 0


def log_rows(label: str, lines: Iterable[str]) -> Iterator[Row]:
    """Yield the rows of all requests with a response, in the order of the responses, and at the end those of requests
    without a response, with no values.
    Raises DocumentError if the file is the log of no known server, or has no tokens of requests.
    """
    waiting: dict[str, _Unfinished] = {}
    last_s, year_s, num_answers, seen = 0.0, 0.0, 0, False
    for number, line in enumerate(lines, start=1):
        if (ended := _ended(line)) is not None:
            num_answers += 1
            yield number, SGLANG_LOG, ended
            continue
        found = _LINE.search(line[:1000])
        if found is None or (now_s := seconds_of_year(found.groups()[:5])) is None:
            continue
        if now_s < last_s - _HALF_A_YEAR_S:  # New Year
            year_s += 366 * 86_400.0
        last_s = now_s
        seen, what, name = True, found[6], found[7]
        ids = _ids_of(line)
        if what != "Generated response":
            if len(waiting) < MAX_OPEN:
                one = waiting.setdefault(name, _Unfinished(line=number, arrival_s=now_s + year_s))
                one.prompt_tokens = ids or one.prompt_tokens
        elif ids and name in waiting:
            one = waiting[name]
            if "(streaming delta)" in line[:1000]:
                one.delta_tokens += ids
            elif one.prompt_tokens:
                num_answers += 1
                del waiting[name]
                yield one.line, VLLM_LOG, [repr(one.arrival_s), str(one.prompt_tokens), str(ids)]
    for one in waiting.values():
        if one.prompt_tokens and one.delta_tokens:
            num_answers += 1
            yield one.line, VLLM_LOG, [repr(one.arrival_s), str(one.prompt_tokens), str(one.delta_tokens)]
    if not num_answers:
        why = "has no token ids of requests and their answers" if seen else "has no request in vLLM's or SGLang's form"
        how = "vLLM logs them with --enable-log-requests --enable-log-outputs and VLLM_LOGGING_LEVEL=DEBUG"
        how += ", SGLang with --log-requests"
        raise single_problem(label, f"{why}: {how}")
    yield from ((one.line, VLLM_LOG, []) for one in waiting.values() if one.prompt_tokens and not one.delta_tokens)


def _ids_of(line: str) -> int:
    """Return the number of token ids in the last list of a line, or 0 if there is none."""
    found = _IDS.match(line)
    return found[2].count(",") + 1 if found is not None and found[2].strip() else 0


_ENDED = re.compile(r"Finish: obj=\w{1,40}\(rid=(?!'HEALTH_CHECK)")
_TIME = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d{1,6})?")
_OF_ENDED = {
    name: re.compile(rf"'{name}': (\d{{1,12}}(?:\.\d{{1,12}})?)")
    for name in (*SGLANG_LOG.fields[1:], "e2e_latency", "cached_tokens")
}


def _ended(line: str) -> list[str] | None:
    """Return the values of a request of SGLang that has ended, or None if the line has none."""
    begun = _ENDED.search(line[:400])
    clock = None if begun is None else _TIME.search(line[:200])
    if begun is None or clock is None:
        return None
    end = line.rfind("'meta_info': {")  # behind the texts of the request and its answer
    prompt, output, took, cached = (form.search(line, max(end, 0)) for form in _OF_ENDED.values())
    if prompt is None or output is None:
        return None
    ended_s = datetime.fromisoformat(clock[0].replace(",", ".")).replace(tzinfo=UTC).timestamp()
    return [repr(ended_s - (float(took[1]) if took else 0.0)), prompt[1], output[1], cached[1] if cached else ""]
