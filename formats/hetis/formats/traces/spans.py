"""Spans of OpenTelemetry with the tokens of a request, as collectors write them in JSON (``OTLP/JSON``).

Attributes are those of its conventions for generative AI; vLLM (``--otlp-traces-endpoint``) has the earlier names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hetis.formats.fields import listed, mapping

_USAGE = "gen_ai.usage."
_NAMES = {"input_tokens": ("input_tokens", "prompt_tokens"), "output_tokens": ("output_tokens", "completion_tokens")}
_OF_OTHERS = ("invoke_agent", "create_agent", "execute_tool", "embeddings")  # whose tokens are those of spans below


def spans_of(data: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Return time and tokens of the requests to models among the spans of a line; None: it has no spans."""
    if "resourceSpans" in data:
        spans = [span for scope in _within(data, "resourceSpans", "scopeSpans") for span in listed(scope.get("spans"))]
    elif "startTimeUnixNano" in data and "attributes" in data:
        spans = [data]
    else:
        return None
    return [found for span in spans if (found := _request(mapping(span))) is not None]


def _within(data: Mapping[str, Any], outer: str, inner: str) -> Iterator[Mapping[str, Any]]:
    for one in listed(data.get(outer)):
        yield from map(mapping, listed(mapping(one).get(inner)))


def _request(span: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the start and the tokens of a span, or None if it is not of a request to a model."""
    pairs = map(mapping, listed(span.get("attributes")))
    found = {str(one.get("key")): next(iter(mapping(one.get("value")).values()), None) for one in pairs}
    if found.get("gen_ai.operation.name") in _OF_OTHERS:
        return None
    tokens = {
        f"{_USAGE}{name}": next((found[f"{_USAGE}{one}"] for one in names if f"{_USAGE}{one}" in found), None)
        for name, names in _NAMES.items()
    }
    if None in tokens.values():
        return None
    return {"startTimeUnixNano": span.get("startTimeUnixNano")} | tokens
