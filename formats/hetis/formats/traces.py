"""Request traces: CSV, plain or gzip-compressed, with the columns ``arrival_s,prompt_tokens,output_tokens``."""

from __future__ import annotations

import csv
import gzip
import math
import os
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np

from hetis.formats.errors import DocumentError, Problem, single_problem
from hetis.formats.files import unreadable
from hetis.formats.histogram import length_bins
from hetis.solver.workload import Workload

COLUMNS = ("arrival_s", "prompt_tokens", "output_tokens")
MAX_TOKENS = 10_000_000  # of one prompt or output
MAX_ROWS = 20_000_000
MAX_BINS = 4096
MAX_PROBLEMS = 20
MAX_LINE = 100_000  # characters


def load_trace(path: str | os.PathLike[str], *, name: str | None = None) -> Workload:
    """The workload of a trace: its joint length histogram (`length_bins`) and mean arrival rate.

    Rows may be in any order and there may be more columns. The rate is (requests - 1) / (last - first arrival), and
    None when all arrive at once.

    Args:
        path: a ``.csv`` or ``.csv.gz`` file.
        name: of the workload; default: the file's name without its endings.

    Raises:
        DocumentError: not readable, no such columns, no requests, or rows that are not requests (the first 20).
    """
    label = os.fspath(path)
    problems: list[Problem] = []
    num_problems, first, last = 0, math.inf, -math.inf
    prompts, outputs = [], []
    for line, row in _rows(label):
        request = _request(row)
        if isinstance(request, list):
            num_problems += len(request)
            problems += [Problem(file=label, line=line, path=column, message=text) for column, text in request]
            del problems[MAX_PROBLEMS:]
            continue
        arrival, prompt, output = request
        first, last = min(first, arrival), max(last, arrival)
        prompts.append(prompt)
        outputs.append(output)
        if len(prompts) > MAX_ROWS:
            raise single_problem(label, f"has more than {MAX_ROWS} requests")
    if num_problems > len(problems):
        problems.append(Problem(file=label, message=f"... and {num_problems - len(problems)} more problems"))
    if problems:
        raise DocumentError(problems)
    if not prompts:
        raise single_problem(label, "has no requests")
    bins = length_bins(np.array(prompts, dtype=np.int64), np.array(outputs, dtype=np.int64), max_bins=MAX_BINS)
    rate = (len(prompts) - 1) / (last - first) if last > first else None
    return Workload(name=name or Path(label).name.removesuffix(".gz").removesuffix(".csv"), bins=bins, rate_rps=rate)


def _rows(label: str) -> Iterator[tuple[int, list[str]]]:
    """Line number and the three values of every row."""
    try:
        with _opened(label) as file:
            # A line without end is cut, and then fails as a row, before it fills the memory.
            reader = csv.reader(iter(partial(file.readline, MAX_LINE), ""))
            header = [column.strip() for column in next(reader, [])]
            missing = [column for column in COLUMNS if column not in header]
            if not header:
                raise single_problem(label, "is empty", line=1)
            if missing:
                expected = f"the header must have {','.join(COLUMNS)}"
                raise single_problem(label, f"column {', '.join(missing)} is missing, {expected}", line=1)
            places = [header.index(column) for column in COLUMNS]
            for row in reader:
                if row:
                    yield reader.line_num, [row[place] if place < len(row) else "" for place in places]
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise single_problem(label, f"is not a complete gzip file: {error}") from None
    except UnicodeDecodeError as error:
        raise single_problem(label, f"is not UTF-8 text (offset {error.start})") from None
    except csv.Error as error:
        raise single_problem(label, f"is not CSV: {error}") from None
    except (OSError, ValueError) as error:
        raise unreadable(label, error) from None


def _opened(label: str) -> IO[str]:
    if label.endswith(".gz"):
        return gzip.open(label, "rt", encoding="utf-8-sig", newline="")
    return open(label, encoding="utf-8-sig", newline="")


def _request(row: list[str]) -> tuple[float, int, int] | list[tuple[str, str]]:
    """Arrival, prompt and output of a row, or what is wrong with it as (column, message)."""
    wrong: list[tuple[str, str]] = []
    arrival, tokens = 0.0, [0, 0]
    try:
        arrival = float(row[0])
        if not (math.isfinite(arrival) and arrival >= 0):
            wrong.append((COLUMNS[0], f"is {row[0].strip()}, must be finite and >= 0"))
    except ValueError:
        wrong.append((COLUMNS[0], f"{row[0][:80]!r} is not a number"))
    for i in (1, 2):
        try:
            tokens[i - 1] = int(row[i]) if len(row[i]) <= 40 else MAX_TOKENS + 1
        except ValueError:
            wrong.append((COLUMNS[i], f"{row[i][:80]!r} is not a whole number"))
            continue
        if not 1 <= tokens[i - 1] <= MAX_TOKENS:
            wrong.append((COLUMNS[i], f"is {row[i].strip()[:40]}, must be 1 to {MAX_TOKENS}"))
    return wrong or (arrival, tokens[0], tokens[1])
