"""Traces as people have them: which columns or fields hold arrival, prompt and output, and how times are written.

A file is in the form whose fields its header, or its first line of JSON, has.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

COLUMNS = ("arrival_s", "prompt_tokens", "output_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceForm:
    """A form of trace.

    Attributes:
        name: for people.
        fields: names of arrival, prompt and output; ``a.b`` is field b of the object in field a.
        seconds: an arrival as it is written, in seconds.
        is_absolute: arrivals are points in time, and count from the first of them.
        failed_without_output: rows with no output are requests that failed, and are left out.
        source: where the form is described.
    """

    name: str
    fields: tuple[str, str, str]
    seconds: Callable[[str], float]
    is_absolute: bool = False
    failed_without_output: bool = False
    source: str

    def matches(self, known: Collection[str]) -> bool:
        """Whether a header, or the fields of an object, are of this form."""
        return all(field in known for field in self.fields)


def _timestamp(text: str) -> float:
    """Seconds since 1970 of ``2023-11-16 18:15:46.6805900``, in UTC unless it says otherwise.

    Raises:
        ValueError: not such a time.
    """
    moment, dot, fraction = text.partition(".")
    digits = fraction[: len(fraction) - len(fraction.lstrip("0123456789"))]
    found = datetime.fromisoformat(moment + fraction[len(digits) :])
    found = found if found.tzinfo is not None else found.replace(tzinfo=UTC)
    return found.timestamp() + (float(f"0.{digits}") if dot and digits else 0.0)


def _milliseconds(text: str) -> float:
    return float(text) / 1e3


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
)


def form_of(known: Collection[str]) -> TraceForm | None:
    """The form that has these columns or fields; None: none has."""
    return next((form for form in FORMS if form.matches(known)), None)


def expected() -> str:
    """What a file may have, for messages."""
    return "; ".join(f"{form.name}: {', '.join(form.fields)}" for form in FORMS)


def fields_of(value: Mapping[str, Any]) -> dict[str, object]:
    """The fields of an object, those of objects in it as ``a.b``."""
    found = dict[str, object]()
    for name, one in value.items():
        if isinstance(one, dict):
            found |= {f"{name}.{inner}": field for inner, field in one.items()}
        else:
            found[name] = one
    return found
