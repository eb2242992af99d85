"""Rows of trace files, plain or gzip-compressed, as text: place, arrival, prompt and output.

The file name determines the syntax: JSONL, one JSON value, a log, or otherwise CSV.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import IO, Any

from hetis.formats.errors import single_problem
from hetis.formats.files import unreadable
from hetis.formats.trace_arrays import CountTokens, array_rows
from hetis.formats.trace_forms import OURS, Row, TraceForm, fields_of, form_of, unknown_form, values_of
from hetis.formats.vllm_logs import log_rows

CSV_ENDINGS = (".csv", ".csv.gz")
JSONL_ENDINGS = (".jsonl", ".jsonl.gz")
JSON_ENDINGS = (".json", ".json.gz")
LOG_ENDINGS = (".log", ".log.gz")
MAX_LINE = 2_000_000  # characters; a response may be logged with its text


def rows_of(label: str, count: CountTokens | None = None) -> Iterator[Row]:
    """Yield place, form and the three values of every row.

    Args:
        label: the file.
        count: counts the tokens of a text, for files of texts. None: those are refused.

    Raises:
        DocumentError: the file is unreadable, or its columns or syntax are invalid.
    """
    try:
        with opened(label) as file:
            if label.endswith(JSON_ENDINGS):
                yield from array_rows(label, file, count)
                return
            # An endless line is cut, and fails as a row before it fills the memory.
            lines = iter(partial(file.readline, MAX_LINE), "")
            yield from _reader(label)(label, lines)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise single_problem(label, f"is not a complete gzip file: {error}") from None
    except UnicodeDecodeError as error:
        raise single_problem(label, f"is not UTF-8 text (offset {error.start})") from None
    except csv.Error as error:
        raise single_problem(label, f"is not CSV: {error}") from None
    except (OSError, ValueError) as error:
        raise unreadable(label, error) from None


def opened(label: str) -> IO[str]:
    """Open a trace as text, decompressed if its name says so."""
    if label.endswith(".gz"):
        return gzip.open(label, "rt", encoding="utf-8-sig", newline="")
    return open(label, encoding="utf-8-sig", newline="")


def _reader(label: str) -> Callable[[str, Iterator[str]], Iterator[Row]]:
    if label.endswith(LOG_ENDINGS):
        return log_rows
    return _json_rows if label.endswith(JSONL_ENDINGS) else _csv_rows


def _csv_rows(label: str, lines: Iterator[str]) -> Iterator[Row]:
    reader = csv.reader(lines)
    header = [column.strip() for column in next(reader, [])]
    if not header:
        raise single_problem(label, "is empty", line=1)
    form = form_of(header)
    if form is None:
        raise unknown_form(label, 1, "column", "columns", header)
    places = [header.index(column) for column in form.fields]
    for row in reader:
        if row:
            yield reader.line_num, form, [row[place] if place < len(row) else "" for place in places]


def _json_rows(label: str, lines: Iterator[str]) -> Iterator[Row]:
    form: TraceForm | None = None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            fields = fields_of(json_object(label, number, line))
            form = form or form_of(fields)
            if form is None:
                raise unknown_form(label, number, "field", "fields", list(fields))
            yield from values_of(number, form, fields)


def json_object(label: str, number: int, line: str) -> dict[str, Any]:
    """Return the object on a line of JSONL.

    Raises:
        DocumentError: it is not one.
    """
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise single_problem(label, f"is not a JSON object: {error.msg}", line=number, column=error.colno) from None
    except (RecursionError, ValueError) as error:  # endless nesting, a number of thousands of digits
        raise single_problem(label, f"is not a JSON object: {error}", line=number) from None
    if not isinstance(fields, dict):
        wanted = ", ".join(f'"{column}"' for column in OURS.fields)
        raise single_problem(label, f"is not a JSON object with {wanted}", line=number)
    return fields
