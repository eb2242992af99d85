"""Forms of traces that other tools write, by the fields of a request. The first form that has the fields of a file is
its form, so that forms with the same fields stand behind those with more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import KW_ONLY, dataclass
from datetime import UTC, datetime

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
    cached: str = ""  # field with the tokens of a prompt that its server had in its cache
    reading: str = ""  # what is assumed of every file in this form
    source: str  # where the form is described

    def matches(self, known: Collection[str]) -> bool:
        """Return whether a header, or the fields of an object, are in this form."""
        return all(field in known for field in (*self.fields, *self.also))


def _moment(text: str) -> float:
    """Return the seconds since 1970 of a time, or of their number, which may be one of milli-, micro- or nanoseconds.
    Raises ValueError.

    LiteLLM's database has times, and its StandardLoggingPayload numbers; proxies write OpenAI's seconds in any unit.
    """
    try:
        number = float(text)
    except ValueError:
        return _timestamp(text)
    for _ in range(3):
        number = number / 1e3 if number > _LATEST_S else number
    return number


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
_MILLISECONDS: Callable[[str], float] = lambda text: float(text) / 1e3  # noqa: E731
MOONCAKE = TraceForm(
    "Mooncake", ("timestamp", "input_length", "output_length"), _MILLISECONDS,
    source="github.com/kvcache-ai/Mooncake, FAST25-release/traces: milliseconds; also replayed by aiperf",
)  # fmt: skip
MULTI_TURN = TraceForm(
    "Mooncake, multi-turn", ("timestamp", "input_length", "output_length"), _MILLISECONDS, also=("session_id",),
    reading="a turn without a time follows the one before by its delay alone, as if that had been answered at once",
    source="github.com/ai-dynamo/aiperf, docs on trace replay: `session_id`, and `delay` in milliseconds",
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
    MULTI_TURN,
    MOONCAKE,
    TraceForm(
        "OpenAI-style", ("created", "usage.prompt_tokens", "usage.completion_tokens"), _moment, is_absolute=True,
        cached="usage.prompt_tokens_details.cached_tokens",
        source="responses of /v1/chat/completions, one per line; `created` is taken as the arrival time",
    ),
    TraceForm(
        "OpenAI responses", ("created_at", "usage.input_tokens", "usage.output_tokens"), _moment, is_absolute=True,
        cached="usage.input_tokens_details.cached_tokens", source="responses of /v1/responses, one per line",
    ),
    TraceForm(
        "OpenAI batch",
        ("response.body.created", *(f"response.body.usage.{what}_tokens" for what in ("prompt", "completion"))),
        _moment, is_absolute=True, cached="response.body.usage.prompt_tokens_details.cached_tokens",
        source="output files of /v1/batches",
    ),
    TraceForm(
        "LiteLLM", ("startTime", "prompt_tokens", "completion_tokens"), _moment, is_absolute=True,
        failed_without_output=True, leaves_out=lambda fields: fields.get("status") == "failure",
        cached="metadata.usage_object.prompt_tokens_details.cached_tokens",
        source="github.com/BerriAI/litellm, LiteLLM_SpendLogs",
    ),
    *(
        TraceForm(
            "Langfuse", fields, _moment, is_absolute=True, failed_without_output=True,
            left_out="observations that are no generations, or have failed",
            reading="prompts lack the parts that clients report apart, as read from a cache",
            source="langfuse.com, observations of its API and of exports to blob storage",
        )
        for fields in (
            ("startTime", "usageDetails.input", "usageDetails.output"),
            ("start_time", "usage_details.input", "usage_details.output"),
            ("startTime", "promptTokens", "completionTokens"),
        )
    ),
    TraceForm(
        "aiperf",
        ("metadata.request_start_ns", *(f"metrics.{what}_sequence_length.value" for what in ("input", "output"))),
        lambda text: float(text) / 1e9, is_absolute=True, leaves_out=_failed_in_aiperf,
        left_out="failed and cancelled requests, and warm-up",
        source="github.com/ai-dynamo/aiperf, profile_export.jsonl",
    ),
    TraceForm(
        "inference-perf", ("start_time", "info.input_tokens", "info.output_tokens"), float, is_absolute=True,
        failed_without_output=True, leaves_out=lambda fields: any(name.startswith("error.") for name in fields),
        source="github.com/kubernetes-sigs/inference-perf, per_request_lifecycle_metrics.json",
    ),
    TraceForm(
        "OpenRouter", ("created_at", "tokens_prompt", "tokens_completion"), _moment, is_absolute=True,
        failed_without_output=True, cached="tokens_cached", source="openrouter.ai, export of the activity page",
    ),
    TraceForm(
        "OpenTelemetry", ("startTimeUnixNano", "gen_ai.usage.input_tokens", "gen_ai.usage.output_tokens"), _moment,
        is_absolute=True, failed_without_output=True, left_out="requests without output",
        source="opentelemetry.io, semantic conventions for generative AI: spans in OTLP/JSON",
    ),
    TraceForm(
        "Ollama", ("created_at", "prompt_eval_count", "eval_count"), _moment, is_absolute=True,
        reading="requests arrive when they have ended", source="github.com/ollama/ollama, responses of /api/chat",
    ),
    TraceForm(
        "SGLang log in JSON",
        ("timestamp", "out.meta_info.prompt_tokens", "out.meta_info.completion_tokens"),
        _moment, is_absolute=True, failed_without_output=True, reading="requests arrive when they have ended",
        left_out="requests that have not ended", cached="out.meta_info.cached_tokens",
        source="SGLang, --log-requests --log-requests-format json",
    ),
)  # fmt: skip
VLLM_BENCH = TraceForm(
    "vllm bench", ("start_times", "input_lens", "output_lens"), float, is_absolute=True, failed_without_output=True,
    left_out="failed requests, which have an error or no output",
    source="vllm bench serve --save-result --save-detailed",
)  # fmt: skip
SGLANG_BENCH = TraceForm(
    "SGLang bench_serving", ("", "input_lens", "output_lens"), float, failed_without_output=True,
    left_out=VLLM_BENCH.left_out, reading="arrivals are spaced evenly over each run, whose report has none",
    source="python -m sglang.bench_serving --output-file FILE --output-details",
)  # fmt: skip
GUIDELLM = TraceForm(
    "guidellm", ("request_start_time", "prompt_tokens", "output_tokens"), float, is_absolute=True,
    failed_without_output=True, left_out="failed and unfinished requests",
    source="github.com/vllm-project/guidellm, benchmarks.json",
)  # fmt: skip
GENAI_PERF = TraceForm(
    "genai-perf", ("timestamp", "request_inputs", "response_outputs"), lambda text: float(text) / 1e9,
    is_absolute=True, failed_without_output=True, reading="outputs without a count of tokens have one per response",
    source="github.com/triton-inference-server/perf_analyzer, profile_export.json",
)  # fmt: skip
SGLANG_LOG = TraceForm(
    "SGLang log", ("time", "prompt_tokens", "completion_tokens"), float, is_absolute=True, failed_without_output=True,
    source="SGLang's server, --log-requests --log-requests-level 2",
)  # fmt: skip
VLLM_LOG = TraceForm(
    "vLLM log", ("time", "prompt_token_ids", "output_token_ids"), float, is_absolute=True,
    left_out="requests without a response, which failed or had not ended", source="vLLM's request logger",
)  # fmt: skip
CONVERSATIONS = TraceForm(
    "conversations", ("time", "prompt", "answer"), float, has_times=False,
    source="ShareGPT_V3_unfiltered_cleaned_split.json and files of the same form",
)  # fmt: skip

OTHERS = (VLLM_BENCH, SGLANG_BENCH, GUIDELLM, GENAI_PERF, VLLM_LOG, SGLANG_LOG, CONVERSATIONS)
"""Forms that are told by more than the fields of a request."""

Row = tuple[int | str, TraceForm, list[str]]
"""The line of a request, or its place in an array; its form; arrival, prompt and output as text, or nothing if the form
leaves it out.
"""

CountTokens = Callable[[str], int]
"""Returns the number of tokens of a text."""


def form_of(known: Collection[str]) -> TraceForm | None:
    """Return the form that has these columns or fields, or None."""
    return next((form for form in FORMS if form.matches(known)), None)
