"""Requests in the log of a vLLM server.

A server started with ``--enable-log-requests --enable-log-outputs`` and ``VLLM_LOGGING_LEVEL=DEBUG`` logs the token
ids of every prompt and output (``vllm/entrypoints/serve/utils/request_logger.py`` of 0.32; versions up to 0.11 logged
the ids of prompts at INFO). Requests without a response are left out: they failed, or the log ends too early.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from hetis.formats.errors import single_problem
from hetis.formats.trace_forms import VLLM_LOG, Row

_LEAP_YEAR = 2024  # lines have a month and a day but no year
_HALF_A_YEAR_S = 182 * 86_400.0
MAX_OPEN = 1_000_000  # requests that wait for their responses

# User text precedes the ids, so the last list in a line is the server's.
_LINE = re.compile(
    r"\b(?:DEBUG|INFO) (\d\d)-(\d\d) (\d\d):(\d\d):(\d\d)(?:\.\d+)? "
    r".*?(Received request|Request|Generated response) ([\w.-]{1,200})[ :]"
)
_IDS = re.compile(r".*\b(prompt|output)_token_ids: \[([\d, ]*)(\]|$)", re.DOTALL)


@dataclass(slots=True)
class _Open:
    """A request without a response yet. Counts are 0 until they are known."""

    line: int
    arrival_s: float
    prompt_tokens: int = 0
    delta_tokens: int = 0


def log_rows(label: str, lines: Iterator[str]) -> Iterator[Row]:
    """Yield line, form and values of every request with a response, in the order of the responses.

    Raises:
        DocumentError: the file is not a vLLM log, or has no token ids.
    """
    waiting: dict[str, _Open] = {}
    last_s, year_s, num_answers, seen = 0.0, 0.0, 0, False
    for number, line in enumerate(lines, start=1):
        found = _LINE.search(line[:1000])
        if found is None:
            continue
        now_s = _seconds(found)
        if now_s is None:
            continue
        if now_s < last_s - _HALF_A_YEAR_S:  # New Year
            year_s += 366 * 86_400.0
        last_s = now_s
        seen, what, name = True, found[6], found[7]
        ids = _ids_of(line)
        if what != "Generated response":
            if len(waiting) < MAX_OPEN:
                one = waiting.setdefault(name, _Open(line=number, arrival_s=now_s + year_s))
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
        why = "has no token ids of requests and their answers" if seen else "has no request in vLLM's form"
        how = "vLLM logs them with --enable-log-requests --enable-log-outputs and VLLM_LOGGING_LEVEL=DEBUG"
        raise single_problem(label, f"{why}: {how}")


def _seconds(found: re.Match[str]) -> float | None:
    month, day, hour, minute, second = (int(found[i]) for i in range(1, 6))
    try:
        return datetime(_LEAP_YEAR, month, day, hour, minute, second, tzinfo=UTC).timestamp()
    except ValueError:
        return None


def _ids_of(line: str) -> int:
    """Return the number of token ids in the last list of a line, or 0 if there is none."""
    found = _IDS.match(line)
    return found[2].count(",") + 1 if found is not None and found[2].strip() else 0
