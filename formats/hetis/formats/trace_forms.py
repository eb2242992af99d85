"""Forms of existing traces: which columns or fields hold arrival, prompt and output, and how times are written.

A file's form is the one whose fields its header, or its first line of JSON, contains.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from hetis.formats.errors import DocumentError, single_problem

COLUMNS = ("arrival_s", "prompt_tokens", "output_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceForm:
    """A form of trace.

    Attributes:
        name: for people.
        fields: names of arrival, prompt and output; ``a.b`` is field b of the object in field a.
        seconds: converts an arrival from its text to seconds.
        is_absolute: arrivals are points in time, and are counted from the first one.
        failed_without_output: rows without output are failed requests, and are left out.
        has_times: whether it contains arrival times.
        leaves_out: whether a row, judging by all its fields, is a request that failed or was a warm-up.
        source: where the form is described.
    """

    name: str
    fields: tuple[str, str, str]
    seconds: Callable[[str], float]
    is_absolute: bool = False
    failed_without_output: bool = False
    has_times: bool = True
    leaves_out: Callable[[Mapping[str, object]], bool] | None = None
    source: str

    def matches(self, known: Collection[str]) -> bool:
        """Return whether a header, or the fields of an object, are in this form."""
        return all(field in known for field in self.fields)


def _timestamp(text: str) -> float:
    """Return the seconds since 1970 of ``2023-11-16 18:15:46.6805900``, in UTC unless it says otherwise.

    Raises:
        ValueError: the text is not a time in this form.
    """
    moment, dot, fraction = text.partition(".")
    digits = fraction[: len(fraction) - len(fraction.lstrip("0123456789"))]
    found = datetime.fromisoformat(moment + fraction[len(digits) :])
    found = found if found.tzinfo is not None else found.replace(tzinfo=UTC)
    return found.timestamp() + (float(f"0.{digits}") if dot and digits else 0.0)


def _milliseconds(text: str) -> float:
    return float(text) / 1e3


def _nanoseconds(text: str) -> float:
    return float(text) / 1e9


def _failed_in_aiperf(fields: Mapping[str, object]) -> bool:
    phase = fields.get("metadata.benchmark_phase") or "profiling"
    failed = fields.get("error") is not None or any(name.startswith("error.") for name in fields)
    return failed or fields.get("metadata.was_cancelled") is True or phase != "profiling"


OURS = TraceForm(name="hetis", fields=COLUMNS, seconds=float, source="docs/cli.md")
FORMS = (
    OURS,
    TraceForm(
        name="Azure",
        fields=("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
        seconds=_timestamp,
        is_absolute=True,
        source="github.com/Azure/AzurePublicDataset, AzureLLMInferenceTrace_conv.csv of 2023 and 2024",
    ),
    TraceForm(
        name="BurstGPT",
        fields=("Timestamp", "Request tokens", "Response tokens"),
        seconds=float,
        failed_without_output=True,
        source="github.com/HPMLL/BurstGPT: no response tokens is a failure",
    ),
    TraceForm(
        name="Mooncake",
        fields=("timestamp", "input_length", "output_length"),
        seconds=_milliseconds,
        source="github.com/kvcache-ai/Mooncake, FAST25-release/traces: milliseconds; also what aiperf replays",
    ),
    TraceForm(
        name="OpenAI-style",
        fields=("created", "usage.prompt_tokens", "usage.completion_tokens"),
        seconds=float,
        is_absolute=True,
        source="answers of /v1/chat/completions, one a line; they are created when they arrive",
    ),
    TraceForm(
        name="OpenAI responses",
        fields=("created_at", "usage.input_tokens", "usage.output_tokens"),
        seconds=float,
        is_absolute=True,
        source="answers of /v1/responses, one a line",
    ),
    TraceForm(
        name="OpenAI batch",
        fields=(
            "response.body.created",
            "response.body.usage.prompt_tokens",
            "response.body.usage.completion_tokens",
        ),
        seconds=float,
        is_absolute=True,
        source="output files of /v1/batches",
    ),
    TraceForm(
        name="LiteLLM",
        fields=("startTime", "prompt_tokens", "completion_tokens"),
        seconds=_timestamp,
        is_absolute=True,
        failed_without_output=True,
        source="github.com/BerriAI/litellm, LiteLLM_SpendLogs",
    ),
    TraceForm(
        name="aiperf",
        fields=(
            "metadata.request_start_ns",
            "metrics.input_sequence_length.value",
            "metrics.output_sequence_length.value",
        ),
        seconds=_nanoseconds,
        is_absolute=True,
        leaves_out=_failed_in_aiperf,
        source="github.com/ai-dynamo/aiperf, profile_export.jsonl",
    ),
)
VLLM_BENCH = TraceForm(
    name="vllm bench",
    fields=("start_times", "input_lens", "output_lens"),
    seconds=float,
    is_absolute=True,
    failed_without_output=True,
    source="vllm bench serve --save-result --save-detailed",
)
VLLM_LOG = TraceForm(
    name="vLLM log",
    fields=("time", "prompt_token_ids", "output_token_ids"),
    seconds=float,
    is_absolute=True,
    source="vLLM's request logger",
)
CONVERSATIONS = TraceForm(
    name="conversations",
    fields=("time", "prompt", "answer"),
    seconds=float,
    has_times=False,
    source="ShareGPT_V3_unfiltered_cleaned_split.json and what has its form",
)

Row = tuple[int | str, TraceForm, list[str]]
"""The line of a request, or its place in an array; its form; arrival, prompt and output as text."""

_MOST_SHOWN = 12  # fields shown of a file in no known form
_MOST_NESTED = 4  # levels of nested objects that are searched


def values_of(place: int | str, form: TraceForm, fields: Mapping[str, object]) -> Iterator[Row]:
    """Yield the row that fields make, or nothing if the form leaves it out."""
    if form.leaves_out is None or not form.leaves_out(fields):
        values = [fields.get(name) for name in form.fields]
        # As in a CSV file: empty for a missing field.
        yield place, form, ["" if value is None else str(value) for value in values]


def unknown_form(label: str, place: int | str, one: str, many: str, found: Sequence[str]) -> DocumentError:
    """Return the error for a file in no known form: what it lacks of ours, what it has, and the known forms."""
    missing = ", ".join(column for column in OURS.fields if column not in found)
    has = ", ".join(name[:40] for name in found[:_MOST_SHOWN]) + (", ..." if len(found) > _MOST_SHOWN else "")
    message = f"{one} {missing} is missing; the file has the {many} {has}; known forms: {expected()}"
    if isinstance(place, str):
        return single_problem(label, f"{place}: {message}")
    return single_problem(label, message, line=place)


def form_of(known: Collection[str]) -> TraceForm | None:
    """Return the form that has these columns or fields, or None."""
    return next((form for form in FORMS if form.matches(known)), None)


def expected() -> str:
    """Return the known forms, for messages."""
    return "; ".join(f"{form.name}: {', '.join(form.fields)}" for form in FORMS)


def fields_of(value: Mapping[str, Any], prefix: str = "", level: int = 1) -> dict[str, object]:
    """Return the fields of an object, with those of nested objects as ``a.b``."""
    found = dict[str, object]()
    for name, one in value.items():
        if isinstance(one, dict) and level < _MOST_NESTED:
            found |= fields_of(one, f"{prefix}{name}.", level + 1)
        else:
            found[f"{prefix}{name}"] = one
    return found
