"""Iterations in the log of a vLLM server.

A server started with ``--enable-logging-iteration-details`` logs a line for every iteration: its requests and tokens,
and the time that the engine waited for its result (``vllm/v1/metrics/loggers.py`` of 0.32). Older versions logged
the same words without the engine's number and the use of its KV cache. A server that was started again in the same log
counts as another one, since it may have other settings. All other lines are skipped.
"""

from __future__ import annotations

import gzip
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from functools import partial
from typing import Any

from hetis.formats.errors import single_problem
from hetis.formats.files import file_label, readable

MAX_LINE = 4_000  # characters that are examined; all that we read comes early in a line
MAX_ITERATIONS = 200_000  # two hours at 36 ms; later ones are not read
CPU_BLOCK_TOKENS = 128
HOW = "vLLM logs its iterations with --enable-logging-iteration-details"

_ITERATION = re.compile(
    r"(?:Engine (\d{1,6}): )?Iteration\((\d{1,12})\): (\d{1,9}) context requests, (\d{1,9}) context tokens, "
    r"(\d{1,9}) generation requests, (\d{1,9}) generation tokens, iteration elapsed time: (\d{1,9}(?:\.\d{1,9})?) ms"
    r"( \(dummy\))?(?:, \w{1,20} KV cache usage: (\d{1,3}\.\d{1,3})%)?(, encoder inputs)?"
)
_RANK = re.compile(r"EngineCore_DP(\d{1,6})")  # named by processes of older versions
_CAPACITY = re.compile(r"(\w{1,20}) KV cache size: ([\d,]{1,20}) tokens")
_CLOCK = re.compile(r"\b(\d\d)-(\d\d) (\d\d):(\d\d):(\d\d)\b")
COLLECTED = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d{1,6})?")  # docker, Kubernetes and journals add it
_COLOUR = re.compile(r"\x1b\[[\d;]*m")
_START = re.compile(r"LLM engine \(v([\w.+-]{1,40})\)")  # a line that an engine logs when it starts
_SERVED = {  # what such a line says of the model
    "model": re.compile(r"\bmodel='([^']{1,400})'"),
    "quantization": re.compile(r"\bquantization=([\w.-]{1,40})"),
    "kv_dtype": re.compile(r"\bkv_cache_dtype=([\w.-]{1,40})"),
}
_SETTINGS = {
    "tp": re.compile(r"tensor_parallel_size=(\d{1,4})\b"),
    "pp": re.compile(r"pipeline_parallel_size=(\d{1,4})\b"),
    "block_tokens": re.compile(r"block_size['\"]?[=:] ?(\d{1,5})\b"),
    "budget_tokens": re.compile(r"max_num_batched_tokens['\"]?[=:] ?(\d{1,9})\b"),
    "max_tokens": re.compile(r"\bmax_seq_len=(\d{1,9})\b"),
}
_LEAP_YEAR = 2024  # lines have a month and a day but no year


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedIteration:
    """One line. A request is in its context phase until it has its first token, however many chunks that takes."""

    engine: int
    index: int  # number of the iteration, counted by the engine from its start
    context_requests: int
    context_tokens: int
    generation_requests: int
    generation_tokens: int
    elapsed_s: float  # time that the engine waited for the result; its own work before and after is not included
    kv_ratio: float | None = None  # share of the KV cache in use after the iteration; None: not stated
    clock_s: float | None = None  # time of the line, in seconds of some year; None: it has no time
    is_dummy: bool = False  # whether it is one of an idle data-parallel rank, which only keeps the others company
    has_encoder: bool = False  # whether it also encoded images or sound
    after_compiling: bool = False  # whether a kernel was compiled since the line before


@dataclass(slots=True)
class LoggedServer:
    """A server from one start to the next. None and empty: not stated; a log that begins later than its server lacks
    the settings.
    """

    iterations: list[LoggedIteration] = field(default_factory=list)
    kv_tokens: int | None = None  # tokens that fit in the KV cache of one engine
    version: str = ""
    tp: int | None = None
    pp: int | None = None
    block_tokens: int | None = None
    budget_tokens: int | None = None  # most tokens of an iteration
    max_tokens: int | None = None  # most tokens of a request
    model: str = ""  # a name or a path
    quantization: str = ""  # ``None`` if it has none
    kv_dtype: str = ""  # ``auto``: as the checkpoint says, or like activations


@dataclass(slots=True)
class IterationLog:
    """The facts in a log: its servers, in the order in which they were started."""

    servers: list[LoggedServer] = field(default_factory=list)
    clock_step_s: float = 1.0  # resolution of the lines' times
    is_cut: bool = False  # whether it was cut at `MAX_ITERATIONS`


def load_iteration_log(path: str) -> IterationLog:
    """Return the facts in a log file, packed if its name ends in ``.gz``; ``-`` is standard input. Raises
    DocumentError if it cannot be read, or has no line of an iteration.
    """
    label = file_label(path)
    with readable(label):
        if path == "-":
            return read_iterations(label, _lines(sys.stdin.buffer))
        with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as file:
            return read_iterations(label, _lines(file))


def _lines(file: Any) -> Iterator[str]:
    for line in iter(partial(file.readline, MAX_LINE), b""):
        yield line.decode("utf-8", "replace")


def read_iterations(label: str, lines: Iterable[str]) -> IterationLog:
    """Return the facts in the lines of a log. Raises DocumentError if none of them is of an iteration."""
    log, count, compiling = IterationLog(), 0, False
    news = LoggedServer()  # what was said since the last iteration, perhaps by a server that starts
    for whole_line in lines:
        line = _COLOUR.sub("", whole_line[:MAX_LINE])
        found = _ITERATION.search(line)
        if found is None:
            compiling = compiling or ("JIT compilation" in line and " during inference" in line)
            _read_setting(news, line)
            continue
        if count == MAX_ITERATIONS:
            log.is_cut = True
            break
        if news.version or not log.servers:
            log.servers.append(news)
        else:
            _update(log.servers[-1], news)
        news = LoggedServer()
        clock_s, step_s = _clock(line)
        log.clock_step_s = step_s
        log.servers[-1].iterations.append(_iteration(found, line, clock_s, compiling))
        count, compiling = count + 1, False
    if not count:
        raise single_problem(label, f"has no line about an iteration: {HOW}; or give the URL of the running server")
    return log


def _iteration(found: re.Match[str], line: str, clock_s: float | None, compiling: bool) -> LoggedIteration:
    rank = _RANK.search(line[: found.start()])
    return LoggedIteration(
        engine=int(found[1] or (rank[1] if rank else 0)),
        index=int(found[2]),
        context_requests=int(found[3]),
        context_tokens=int(found[4]),
        generation_requests=int(found[5]),
        generation_tokens=int(found[6]),
        elapsed_s=float(found[7]) / 1e3,
        kv_ratio=None if found[9] is None else float(found[9]) / 100,
        clock_s=clock_s,
        is_dummy=found[8] is not None,
        has_encoder=found[10] is not None,
        after_compiling=compiling,
    )


def _read_setting(server: LoggedServer, line: str) -> None:
    capacity = _CAPACITY.search(line)
    if capacity is not None and (digits := capacity[2].replace(",", "")):
        server.kv_tokens = int(digits) or server.kv_tokens
        if capacity[1] == "CPU":  # its blocks are larger, and their size is not in the log
            server.block_tokens = server.block_tokens or CPU_BLOCK_TOKENS
    start = _START.search(line)
    if start is not None:
        server.version = start[1]
        for name, form in _SERVED.items():
            found = form.search(line)
            setattr(server, name, found[1] if found is not None else "")
    for name, form in _SETTINGS.items():
        found = form.search(line)
        if found is not None:
            setattr(server, name, int(found[1]))


def _update(server: LoggedServer, news: LoggedServer) -> None:
    for one in fields(LoggedServer):
        if value := getattr(news, one.name):
            setattr(server, one.name, value)


def _clock(line: str) -> tuple[float | None, float]:
    """Return the time of a line and its resolution: that of a collector, which is finer, or else the server's own."""
    collected = COLLECTED.search(line[:200])
    try:
        if collected is not None:
            text = collected[0].replace(",", ".")
            return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp(), 1e-3 if "." in text else 1.0
    except ValueError:
        return None, 1.0
    own = _CLOCK.search(line[:300])
    return None if own is None else seconds_of_year(own.groups()), 1.0


def seconds_of_year(words: Sequence[str]) -> float | None:
    """Return the time of month, day, hour, minute and second, or None if there is no such time."""
    month, day, hour, minute, second = map(int, words)
    try:
        return datetime(_LEAP_YEAR, month, day, hour, minute, second, tzinfo=UTC).timestamp()
    except ValueError:
        return None
