"""Rows of trace files, CSV or JSONL, plain or gzip-compressed, as text: line numbers and the values of `COLUMNS`."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from functools import partial
from typing import IO, Any

from hetis.formats.errors import single_problem
from hetis.formats.files import unreadable

COLUMNS = ("arrival_s", "prompt_tokens", "output_tokens")
CSV_ENDINGS = (".csv", ".csv.gz")
JSONL_ENDINGS = (".jsonl", ".jsonl.gz")
MAX_LINE = 100_000  # characters

Row = tuple[int, list[str]]


def rows_of(label: str) -> Iterator[Row]:
    """Line number and the three values of every row; JSONL where the name says so, else CSV.

    Raises:
        DocumentError: not readable, no such columns, or no such syntax.
    """
    try:
        with _opened(label) as file:
            # A line without end is cut, and then fails as a row, before it fills the memory.
            lines = iter(partial(file.readline, MAX_LINE), "")
            yield from (_json_rows if label.endswith(JSONL_ENDINGS) else _csv_rows)(label, lines)
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


def _csv_rows(label: str, lines: Iterator[str]) -> Iterator[Row]:
    reader = csv.reader(lines)
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


def _json_rows(label: str, lines: Iterator[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            fields = _json_object(label, number, line)
            yield number, [_text(fields.get(column)) for column in COLUMNS]


def _json_object(label: str, number: int, line: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise single_problem(label, f"is not a JSON object: {error.msg}", line=number, column=error.colno) from None
    except (RecursionError, ValueError) as error:  # nested without end, a number of thousands of digits
        raise single_problem(label, f"is not a JSON object: {error}", line=number) from None
    if not isinstance(fields, dict):
        expected = ", ".join(f'"{column}"' for column in COLUMNS)
        raise single_problem(label, f"is not a JSON object with {expected}", line=number)
    return fields


def _text(value: object) -> str:
    """Return what a CSV file would hold; nothing for a field that is missing."""
    return "" if value is None else str(value)
