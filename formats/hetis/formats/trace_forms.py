"""Rows of trace files as text, in the forms that other tools write: place, form, and arrival, prompt and output.

The file name determines the syntax: JSONL, one JSON value (an array of requests or conversations, or the output of
``vllm bench serve``), the log of a vLLM server, or otherwise CSV, whose header shows whether commas, tabs or semicolons
separate its columns; all of them plain or gzip-compressed. A file's form is the one whose fields its header, or its
first line of JSON, contains.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from datetime import UTC, datetime
from functools import partial
from typing import IO, Any

from hetis.formats.errors import DocumentError, shown, single_problem
from hetis.formats.files import readable
from hetis.formats.vllm_logs import request_rows

COLUMNS = ("arrival_s", "prompt_tokens", "output_tokens")


@dataclass(frozen=True, slots=True)
class TraceForm:
    """A form of trace."""

    name: str  # display name
    fields: tuple[str, ...]  # names of arrival, prompt and output; ``a.b`` is field b of the object in field a
    seconds: Callable[[str], float]  # converts an arrival from its text to seconds
    _: KW_ONLY
    is_absolute: bool = False  # arrivals are points in time, and are counted from the first one
    failed_without_output: bool = False  # rows without output are failed requests, and are left out
    left_out: str = "failed requests, which have no output"  # what the rows are that are left out
    has_times: bool = True  # whether it contains arrival times
    # Whether a row, judging by all its fields, is a failed request or a warm-up
    leaves_out: Callable[[Mapping[str, object]], bool] | None = None
    also: tuple[str, ...] = ()  # further fields by which it differs from a form with the same ones
    source: str  # where the form is described

    def matches(self, known: Collection[str]) -> bool:
        """Return whether a header, or the fields of an object, are in this form."""
        return all(field in known for field in (*self.fields, *self.also))


def _moment(text: str) -> float:
    """Return the seconds since 1970 of a time, or of their number, which may be one of milliseconds. Raises ValueError.

    LiteLLM's database has times, and its StandardLoggingPayload numbers.
    """
    try:
        number = float(text)
    except ValueError:
        return _timestamp(text)
    return number / 1e3 if number > _LATEST_S else number


_LATEST_S = 1e11  # as seconds this would be in three thousand years


def _timestamp(text: str) -> float:
    """Return the seconds since 1970 of ``2023-11-16 18:15:46.6805900``, in UTC unless it has an offset. Raises
    ValueError.
    """
    moment, dot, fraction = text.partition(".")
    digits = fraction[: len(fraction) - len(fraction.lstrip("0123456789"))]
    found = datetime.fromisoformat(moment + fraction[len(digits) :])
    found = found if found.tzinfo is not None else found.replace(tzinfo=UTC)
    return found.timestamp() + (float(f"0.{digits}") if dot and digits else 0.0)


def _failed_in_aiperf(fields: Mapping[str, object]) -> bool:
    phase = fields.get("metadata.benchmark_phase") or "profiling"
    failed = fields.get("error") is not None or any(name.startswith("error.") for name in fields)
    return failed or fields.get("metadata.was_cancelled") is True or phase != "profiling"


OURS = TraceForm("hetis", COLUMNS, float, source="docs/cli.md")
MOONCAKE = TraceForm(
    "Mooncake", ("timestamp", "input_length", "output_length"), lambda text: float(text) / 1e3,
    source="github.com/kvcache-ai/Mooncake, FAST25-release/traces: milliseconds; also replayed by aiperf",
)  # fmt: skip
FORMS = (
    OURS,
    TraceForm(
        "Azure", ("TIMESTAMP", "ContextTokens", "GeneratedTokens"), _timestamp, is_absolute=True,
        source="github.com/Azure/AzurePublicDataset, AzureLLMInferenceTrace_conv.csv of 2023 and 2024",
    ),
    TraceForm(
        "BurstGPT", ("Timestamp", "Request tokens", "Response tokens"), float, failed_without_output=True,
        source="github.com/HPMLL/BurstGPT; requests without response tokens have failed",
    ),
    TraceForm(
        "Qwen-Bailian", ("timestamp", "input_length", "output_length"), float, also=("chat_id", "parent_chat_id"),
        source="github.com/alibaba-edu/qwen-bailian-usagetraces-anon: seconds, and blocks of 16 tokens",
    ),
    MOONCAKE,
    TraceForm(
        "OpenAI-style", ("created", "usage.prompt_tokens", "usage.completion_tokens"), float, is_absolute=True,
        source="responses of /v1/chat/completions, one per line; `created` is taken as the arrival time",
    ),
    TraceForm(
        "OpenAI responses", ("created_at", "usage.input_tokens", "usage.output_tokens"), float, is_absolute=True,
        source="responses of /v1/responses, one per line",
    ),
    TraceForm(
        "OpenAI batch",
        ("response.body.created", *(f"response.body.usage.{what}_tokens" for what in ("prompt", "completion"))),
        float, is_absolute=True, source="output files of /v1/batches",
    ),
    TraceForm(
        "LiteLLM", ("startTime", "prompt_tokens", "completion_tokens"), _moment, is_absolute=True,
        failed_without_output=True, source="github.com/BerriAI/litellm, LiteLLM_SpendLogs",
    ),
    TraceForm(
        "aiperf",
        ("metadata.request_start_ns", *(f"metrics.{what}_sequence_length.value" for what in ("input", "output"))),
        lambda text: float(text) / 1e9, is_absolute=True, leaves_out=_failed_in_aiperf,
        left_out="failed and cancelled requests, and warm-up",
        source="github.com/ai-dynamo/aiperf, profile_export.jsonl",
    ),
)  # fmt: skip
VLLM_BENCH = TraceForm(
    "vllm bench", ("start_times", "input_lens", "output_lens"), float, is_absolute=True, failed_without_output=True,
    left_out="failed requests, which have an error or no output",
    source="vllm bench serve --save-result --save-detailed",
)  # fmt: skip
VLLM_LOG = TraceForm(
    "vLLM log", ("time", "prompt_token_ids", "output_token_ids"), float, is_absolute=True,
    left_out="requests without a response, which failed or had not ended", source="vLLM's request logger",
)  # fmt: skip
CONVERSATIONS = TraceForm(
    "conversations", ("time", "prompt", "answer"), float, has_times=False,
    source="ShareGPT_V3_unfiltered_cleaned_split.json and files of the same form",
)  # fmt: skip

Row = tuple[int | str, TraceForm, list[str]]
"""The line of a request, or its place in an array; its form; arrival, prompt and output as text, or nothing if the form
leaves it out.
"""

_MOST_SHOWN = 12  # fields shown of a file in no known form
_MOST_NESTED = 4  # levels of nested objects that are searched


def values_of(place: int | str, form: TraceForm, fields: Mapping[str, object]) -> Iterator[Row]:
    """Yield the row that fields make."""
    is_left_out = form.leaves_out is not None and form.leaves_out(fields)
    values = [] if is_left_out else [fields.get(name) for name in form.fields]
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


def form_of(known: Collection[str]) -> TraceForm | None:
    """Return the form that has these columns or fields, or None."""
    return next((form for form in FORMS if form.matches(known)), None)


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

CountTokens = Callable[[str], int]
"""Returns the number of tokens of a text."""

_ANSWERS = {"gpt", "assistant", "chatgpt", "bing", "bard", "model"}


def array_rows(label: str, file: IO[str], count: CountTokens | None) -> Iterator[Row]:
    """Yield the rows of a file that holds one JSON value. Raises DocumentError if the file is not JSON, or not in a
    known form.

    ``count`` counts the tokens of a text in conversations, which have no counts. None: conversations are refused.
    """
    begin = file.read(_CHUNK)
    if begin.lstrip()[:1] == "{":
        yield from _bench_rows(label, begin, file)
        return
    form = None
    for index, item in _items(label, begin, file):
        if not isinstance(item, dict):
            raise single_problem(label, f"[{index}] is {shown(item)}, expected an object")
        turns = _turns(item)
        if turns is not None:
            if count is None:
                why = "has texts but no token counts: hetis-plan convert counts them, see its --help"
                raise single_problem(label, why)
            yield from _conversation_rows(index, turns, count)
            continue
        fields = fields_of(item)
        form = form or form_of(fields)
        if form is None:
            raise unknown_form(label, f"[{index}]", "field", "fields", list(fields))
        yield from values_of(f"[{index}]", form, fields)


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


def _turns(item: dict[str, Any]) -> list[Any] | None:
    """Return the turns of a conversation, in the form of ShareGPT or of chat requests, or None if there are none."""
    values = (item.get(key) for key in ("conversations", "conversation", "messages", "items"))
    return next((value for value in values if isinstance(value, list)), None)


def _conversation_rows(index: int, turns: list[Any], count: CountTokens) -> Iterator[Row]:
    """Yield a request for every answer. Its prompt consists of all earlier turns."""
    before = 0
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            continue
        who = str(turn.get("from", turn.get("role", ""))).lower()
        text = turn.get("value", turn.get("content", turn.get("text")))
        tokens = count(text) if isinstance(text, str) and text else 0
        if who in _ANSWERS and before and tokens:
            yield f"[{index}].turn[{number}]", CONVERSATIONS, ["0", str(before), str(tokens)]
        before += tokens


def _bench_rows(label: str, begin: str, file: IO[str]) -> Iterator[Row]:
    """Yield the requests of ``vllm bench serve --save-result --save-detailed``, which has a list for each property."""
    from hetis.formats.files import MAX_BYTES

    text = begin + file.read(MAX_BYTES)
    if len(text) > MAX_BYTES:
        raise single_problem(label, f"is larger than {MAX_BYTES // 2**20} MiB")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise single_problem(label, f"is not JSON: {error}") from None
    lists = {name: value for name, value in data.items() if isinstance(value, list)}
    if missing := [name for name in VLLM_BENCH.fields if name not in lists]:
        why = f"has no {', '.join(missing)}, but {', '.join(key[:40] for key in list(data)[:12])}"
        wanted = "expected an array of requests, or the output of vllm bench serve --save-detailed"
        raise single_problem(label, f"{why}: {wanted}")
    columns = [lists[name] for name in VLLM_BENCH.fields]
    if len({len(column) for column in columns}) > 1:
        lengths = ", ".join(f"{len(lists[name])} {name}" for name in VLLM_BENCH.fields)
        raise single_problem(label, f"has lists of different lengths: {lengths}")
    errors = lists.get("errors", [])
    for index, row in enumerate(zip(*columns, strict=True)):
        has_failed = index < len(errors) and errors[index]
        yield f"[{index}]", VLLM_BENCH, [] if has_failed else [str(value) for value in row]


def characters_counter(characters_per_token: float) -> CountTokens:
    """Return a function that estimates the tokens of a text from its length, at least one."""
    return lambda text: max(1, round(len(text) / characters_per_token))


CSV_ENDINGS, JSONL_ENDINGS = (".csv", ".csv.gz"), (".jsonl", ".jsonl.gz")
TSV_ENDINGS = (".tsv", ".tsv.gz")
JSON_ENDINGS, LOG_ENDINGS = (".json", ".json.gz"), (".log", ".log.gz")
MAX_LINE = 2_000_000  # characters; a response may be logged with its text


def rows_of(label: str, count: CountTokens | None = None) -> Iterator[Row]:
    """Yield place, form and the three values of every row. Raises DocumentError if the file is unreadable, or its
    columns or syntax are invalid.

    ``count`` counts the tokens of a text, for files of texts; None: those are refused.
    """
    try:
        with readable(label), opened(label) as file:
            # An endless line is cut, and fails as a row before it fills the memory.
            lines = iter(partial(file.readline, MAX_LINE), "")
            if label.endswith(JSON_ENDINGS):
                yield from array_rows(label, file, count)
            elif label.endswith(LOG_ENDINGS):
                yield from ((line, VLLM_LOG, values) for line, values in request_rows(label, lines))
            else:
                yield from (_json_rows if label.endswith(JSONL_ENDINGS) else _csv_rows)(label, lines)
    except csv.Error as error:
        raise single_problem(label, f"is not CSV: {error}") from None


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
    places = [header.index(column) for column in form.fields]
    for row in reader:
        if any(value.strip() for value in row[len(header) :]):  # a comma too many: 1,200 is not 1200
            message = f"has {len(row)} values for {len(header)} columns"
            raise single_problem(label, message, line=num_blank + reader.line_num)
        if row:
            yield num_blank + reader.line_num, form, [row[place] if place < len(row) else "" for place in places]


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
