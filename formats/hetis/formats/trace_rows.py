"""Rows of trace files, CSV or JSONL, plain or gzip-compressed, as text: line numbers, arrival, prompt and output."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import IO, Any

from hetis.formats.errors import DocumentError, single_problem
from hetis.formats.files import unreadable
from hetis.formats.trace_forms import OURS, TraceForm, expected, fields_of, form_of

CSV_ENDINGS = (".csv", ".csv.gz")
JSONL_ENDINGS = (".jsonl", ".jsonl.gz")
MAX_LINE = 100_000  # characters

MOST_SHOWN = 12  # fields of a file in no known form

Row = tuple[int, TraceForm, list[str]]


def rows_of(label: str) -> Iterator[Row]:
    """Line number, the file's form and the three values of every row; JSONL where the name says so, else CSV.

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
    if not header:
        raise single_problem(label, "is empty", line=1)
    form = form_of(header)
    if form is None:
        raise _unknown(label, 1, "column", "columns", header)
    places = [header.index(column) for column in form.fields]
    for row in reader:
        if row:
            yield reader.line_num, form, [row[place] if place < len(row) else "" for place in places]


def _json_rows(label: str, lines: Iterator[str]) -> Iterator[Row]:
    form: TraceForm | None = None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            fields = fields_of(_json_object(label, number, line))
            form = form or form_of(fields)
            if form is None:
                raise _unknown(label, number, "field", "fields", list(fields))
            yield number, form, [_text(fields.get(column)) for column in form.fields]


def _unknown(label: str, line: int, one: str, many: str, found: Sequence[str]) -> DocumentError:
    """A file in no form that is known: what it lacks of ours, what it has, what it might have."""
    missing = ", ".join(column for column in OURS.fields if column not in found)
    has = ", ".join(name[:40] for name in found[:MOST_SHOWN]) + (", ..." if len(found) > MOST_SHOWN else "")
    return single_problem(
        label, f"{one} {missing} is missing; the file has the {many} {has}; known forms: {expected()}", line=line
    )


def _json_object(label: str, number: int, line: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise single_problem(label, f"is not a JSON object: {error.msg}", line=number, column=error.colno) from None
    except (RecursionError, ValueError) as error:  # nested without end, a number of thousands of digits
        raise single_problem(label, f"is not a JSON object: {error}", line=number) from None
    if not isinstance(fields, dict):
        wanted = ", ".join(f'"{column}"' for column in OURS.fields)
        raise single_problem(label, f"is not a JSON object with {wanted}", line=number)
    return fields


def _text(value: object) -> str:
    """Return what a CSV file would hold; nothing for a field that is missing."""
    return "" if value is None else str(value)
