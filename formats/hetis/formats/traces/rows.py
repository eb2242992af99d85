"""Rows of trace files as text, in the forms that other tools write: place, form, and arrival, prompt and output.

What a file contains determines its syntax, and its name only where that leaves a choice: JSONL, one JSON value (an
array of requests or conversations, or the report of a benchmark), the log of a server, or otherwise CSV, whose header
shows whether commas, tabs or semicolons separate its columns; all of them plain or gzip-compressed.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import IO, Any

from hetis.formats.errors import DocumentError, shown, single_problem
from hetis.formats.fields import mapping
from hetis.formats.files import MAX_BYTES, readable
from hetis.formats.traces.forms import CONVERSATIONS, FORMS, OURS, CountTokens, Row, TraceForm, form_of
from hetis.formats.traces.logs import log_rows
from hetis.formats.traces.reports import TEXTS, is_report, report_rows
from hetis.formats.traces.spans import spans_of

_MOST_SHOWN = 12  # fields shown of a file in no known form
_MOST_NESTED = 4  # levels of nested objects that are searched


def values_of(place: int | str, form: TraceForm, fields: Mapping[str, object]) -> Iterator[Row]:
    """Yield the row that fields make."""
    is_left_out = form.leaves_out is not None and form.leaves_out(fields)
    names = (*form.fields, form.cached) if form.cached else form.fields
    values = [] if is_left_out else [fields.get(name) for name in names]
    # As in a CSV file: empty for a missing field.
    yield place, form, ["" if value is None else str(value) for value in values]


def unknown_form(label: str, place: int | str, one: str, many: str, found: Sequence[str]) -> DocumentError:
    """Return the error for a file in no known form: what it lacks of our form, what it has, and the known forms."""
    lacking = [column for column in OURS.fields if column not in found]
    missing = f"{one} {lacking[0]} is" if len(lacking) == 1 else f"{many} {', '.join(lacking)} are"
    has = ", ".join(name[:40] for name in found[:_MOST_SHOWN]) + (", ..." if len(found) > _MOST_SHOWN else "")
    message = f"{missing} missing; the file has the {many} {has}; known forms: {expected()}"
    if isinstance(place, str):
        return single_problem(label, f"{place}: {message}")
    return single_problem(label, message, line=place)


def expected() -> str:
    """Return the known forms, for messages."""
    return "; ".join(f"{form.name}: {', '.join((*form.fields, *form.also))}" for form in FORMS)


def fields_of(value: Mapping[str, Any], prefix: str = "", level: int = 1) -> dict[str, object]:
    """Return the fields of an object, with those of nested objects as ``a.b``."""
    found = dict[str, object]()
    for name, one in value.items():
        if isinstance(one, dict) and level < _MOST_NESTED:
            found |= fields_of(one, f"{prefix}{name}.", level + 1)
        else:
            found[f"{prefix}{name}"] = one
    return found


MAX_ITEM = 16 * 2**20  # characters per item
_CHUNK = 2**20

_ANSWERS = {"gpt", "assistant", "chatgpt", "bing", "bard", "model"}


def array_rows(label: str, file: IO[str], count: CountTokens | None) -> Iterator[Row]:
    """Yield the rows of a file that holds one JSON value. Raises DocumentError if the file is not JSON, or not in a
    known form.

    ``count`` counts the tokens of a text in conversations, which have no counts. None: conversations are refused.
    """
    begin = file.read(_CHUNK)
    items = _Items(label, count)
    if begin.lstrip()[:1] == "{":
        data = json_object_of(label, begin + file.read(MAX_BYTES))
        if isinstance(listing := data.get("data"), list) and not is_report(data):  # as APIs answer
            for index, item in enumerate(map(mapping, listing)):
                yield from items.rows(f"data[{index}]", item)
            return
        yield from report_rows(label, data, count)
        return
    for index, item in _items(label, begin, file):
        if not isinstance(item, dict):
            raise single_problem(label, f"[{index}] is {shown(item)}, expected an object")
        yield from items.rows(f"[{index}]", item)


class _Items:
    """Requests that are objects of one form, or conversations. The first one tells the form."""

    def __init__(self, label: str, count: CountTokens | None) -> None:
        self._label, self._count = label, count
        self._form: TraceForm | None = None
        self._sessions = dict[str, float]()  # the times of the last turns
        self._num_events = 0  # of a log whose requests have not ended yet

    def rows(self, place: int | str, item: Mapping[str, Any]) -> Iterator[Row]:
        fields = _with_time(fields_of(item), self._sessions)
        self._form = self._form or form_of(fields)
        if self._form is not None:
            yield from values_of(place, self._form, fields)
        elif (turns := _turns(item)) is not None:
            if self._count is None:
                raise single_problem(self._label, TEXTS)
            yield from _conversation_rows(f"[{place}]" if isinstance(place, int) else place, turns, self._count)
        elif ("event" in fields or fields.get("type") in _OBSERVATIONS) and self._num_events < _MOST_EVENTS:
            self._num_events += 1
        else:
            raise unknown_form(self._label, place, "field", "fields", list(fields))


def _items(label: str, begin: str, file: IO[str]) -> Iterator[tuple[int, Any]]:
    """Yield the items of an array with their numbers, each as soon as it is complete."""
    decode = json.JSONDecoder().raw_decode
    buffer, place, index = begin, len(begin) - len(begin.lstrip()), 0
    if buffer[place : place + 1] != "[":
        raise single_problem(label, f"begins with {buffer[place : place + 20]!r}, expected a JSON array")
    place += 1
    more = True
    while True:
        while place < len(buffer) and buffer[place] in " \t\r\n,":
            place += 1
        if buffer[place : place + 1] == "]":
            return
        try:
            item, end = decode(buffer, place)
            # A number at the end of what was read may continue.
            whole = end < len(buffer) or not more
        except ValueError as error:
            whole, item, end = False, None, place
            if not more:
                raise single_problem(label, f"[{index}] is not JSON: {error}") from None
        except RecursionError:
            raise single_problem(label, f"[{index}] is nested too deeply") from None
        if whole:
            yield index, item
            index, place = index + 1, end
            continue
        if len(buffer) - place > MAX_ITEM:
            raise single_problem(label, f"[{index}] is not JSON, or has more than {MAX_ITEM} characters")
        chunk = file.read(_CHUNK)
        more = bool(chunk)
        buffer, place = buffer[place:] + chunk, 0


def _turns(item: Mapping[str, Any]) -> list[Any] | None:
    """Return the turns of a conversation, in the form of ShareGPT or of chat requests, or None if there are none."""
    values = (item.get(key) for key in ("conversations", "conversation", "messages", "items"))
    return next((value for value in values if isinstance(value, list)), None)


def _conversation_rows(place: str, turns: list[Any], count: CountTokens) -> Iterator[Row]:
    """Yield a request for every answer. Its prompt consists of all earlier turns."""
    before = 0
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            continue
        who = str(turn.get("from", turn.get("role", ""))).lower()
        text = turn.get("value", turn.get("content", turn.get("text")))
        tokens = count(text) if isinstance(text, str) and text else 0
        if who in _ANSWERS and before and tokens:
            yield f"{place}.turn[{number}]", CONVERSATIONS, ["0", str(before), str(tokens)]
        before += tokens


def characters_counter(characters_per_token: float) -> CountTokens:
    """Return a function that estimates the tokens of a text from its length, at least one."""
    return lambda text: max(1, round(len(text) / characters_per_token))


CSV_ENDINGS, JSONL_ENDINGS = (".csv", ".csv.gz"), (".jsonl", ".jsonl.gz")
TSV_ENDINGS = (".tsv", ".tsv.gz")
JSON_ENDINGS, LOG_ENDINGS = (".json", ".json.gz"), (".log", ".log.gz", ".txt", ".txt.gz")
MAX_LINE = 2_000_000  # characters; a response may be logged with its text


def rows_of(label: str, count: CountTokens | None = None) -> Iterator[Row]:
    """Yield place, form and the three values of every row. Raises DocumentError if the file is unreadable, or its
    columns or syntax are invalid.

    ``count`` counts the tokens of a text, for files of texts; None: those are refused.
    """
    try:
        with readable(label), opened(label) as file:
            syntax = _syntax(label, file.read(_BEGIN))
            file.seek(0)
            # An endless line is cut, and fails as a row before it fills the memory.
            lines = iter(partial(file.readline, MAX_LINE), "")
            match syntax:
                case "json":
                    yield from array_rows(label, file, count)
                case "log":
                    yield from log_rows(label, lines)
                case "jsonl":
                    yield from _json_rows(label, lines, count)
                case _:
                    yield from _csv_rows(label, lines)
    except csv.Error as error:
        raise single_problem(label, f"is not CSV: {error}") from None


def _syntax(label: str, begin: str) -> str:
    """Return the syntax of a file from how it begins, and from its name where that leaves a choice."""
    text = begin.lstrip()
    if label.endswith(JSONL_ENDINGS):
        return "jsonl"
    if text[:1] == "{" and _LINES.match(text) and not label.endswith(CSV_ENDINGS + TSV_ENDINGS):
        return "jsonl"
    if label.endswith(JSON_ENDINGS):
        return "json"
    is_table = label.endswith(CSV_ENDINGS + TSV_ENDINGS) or text.partition("\n")[0].count(",") >= len(OURS.fields) - 1
    return "log" if label.endswith(LOG_ENDINGS) or not is_table else "csv"


_BEGIN = 2**16
_LINES = re.compile(r"\{[^\n]*\}\s*\n\s*\{")  # objects on lines of their own


def opened(label: str) -> IO[str]:
    """Open a trace as text, decompressed if its name ends in ``.gz``."""
    if label.endswith(".gz"):
        return gzip.open(label, "rt", encoding="utf-8-sig", newline="")
    return open(label, encoding="utf-8-sig", newline="")


def _csv_rows(label: str, lines: Iterator[str]) -> Iterator[Row]:
    begin = next(((number, line) for number, line in enumerate(lines) if line.strip()), None)
    if begin is None:
        raise single_problem(label, "is empty", line=1)
    num_blank, first = begin
    reader = csv.reader(itertools.chain([first], lines), delimiter=max(",\t;", key=first.count))
    header = [column.strip() for column in next(reader, [])]
    form = form_of(header)
    if form is None:
        raise unknown_form(label, num_blank + 1, "column", "columns", header)
    if twice := [column for column in form.fields if header.count(column) > 1]:
        raise single_problem(label, f"has column {twice[0]} {header.count(twice[0])} times", line=num_blank + 1)
    for row in reader:
        if any(value.strip() for value in row[len(header) :]):  # a comma too many: 1,200 is not 1200
            message = f"has {len(row)} values for {len(header)} columns"
            raise single_problem(label, message, line=num_blank + reader.line_num)
        if row:
            yield from values_of(num_blank + reader.line_num, form, dict(zip(header, row, strict=False)))


def _json_rows(label: str, lines: Iterator[str], count: CountTokens | None) -> Iterator[Row]:
    items, is_first = _Items(label, count), True
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        data = json_object(label, number, line)
        if is_first and is_report(data):
            yield from report_rows(label, data, count)
            continue
        is_first = False
        spans = spans_of(data)
        for one in [data] if spans is None else spans:
            yield from items.rows(number, one)


_MOST_EVENTS = 100_000
# Types of Langfuse's observations, which may lack tokens: a generation if it failed.
_OBSERVATIONS = (
    *("GENERATION", "SPAN", "EVENT", "AGENT", "TOOL", "CHAIN", "RETRIEVER", "EVALUATOR", "EMBEDDING", "GUARDRAIL"),
)


def _with_time(fields: dict[str, object], sessions: dict[str, float]) -> dict[str, object]:
    """Return the fields of a turn, which may have its delay behind the one before instead of a time; ``sessions`` are
    the times of the last turns.
    """
    if (session := fields.get("session_id")) is None or "input_length" not in fields:
        return fields
    time, delay = fields.get("timestamp"), fields.get("delay")
    if time is None:
        if str(session) in sessions and not isinstance(delay, int | float):
            return fields  # whose time is missing
        time = sessions.get(str(session), 0.0) + (delay if isinstance(delay, int | float) else 0.0)
    if isinstance(time, int | float):
        sessions[str(session)] = float(time)
    return {**fields, "timestamp": time}


def json_object_of(label: str, text: str) -> dict[str, Any]:
    """Return the object that a file is. Raises DocumentError."""
    if len(text) > MAX_BYTES:
        raise single_problem(label, f"is larger than {MAX_BYTES // 2**20} MiB")
    try:
        data: dict[str, Any] = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise single_problem(label, f"is not JSON: {error}") from None
    return data


def json_object(label: str, number: int, line: str) -> dict[str, Any]:
    """Return the object on a line of JSONL. Raises DocumentError if it is not one."""
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
