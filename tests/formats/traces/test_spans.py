"""Requests in spans of OpenTelemetry, responses of Ollama, and histograms of routers are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hetis.formats.errors import DocumentError
from hetis.formats.traces import read_trace
from hetis.formats.workload import load_workload

REQUESTS = [(0, 374, 44), (3, 396, 109), (4, 879, 55)]


def span(at_s: int, tokens: dict[str, int], **attributes: str) -> dict[str, Any]:
    numbers = [{"key": f"gen_ai.usage.{name}", "value": {"intValue": str(number)}} for name, number in tokens.items()]
    words = [{"key": f"gen_ai.{name}.name", "value": {"stringValue": value}} for name, value in attributes.items()]
    return {"traceId": "a", "startTimeUnixNano": str((1_760_000_000 + at_s) * 10**9), "attributes": numbers + words}


def requests_in(folder: Path, content: str) -> list[tuple[float, int, int]]:
    (folder / "trace.jsonl").write_text(content)
    trace = read_trace(folder / "trace.jsonl")
    return list(zip(trace.arrival_s.tolist(), trace.prompt_tokens.tolist(), trace.output_tokens.tolist(), strict=True))


@pytest.mark.parametrize("names", [("input_tokens", "output_tokens"), ("prompt_tokens", "completion_tokens")])
def test_spans_of_requests_are_a_trace(tmp_path: Path, names: tuple[str, str]) -> None:
    spans = [span(at_s, dict(zip(names, tokens, strict=True))) for at_s, *tokens in REQUESTS]
    # An agent's span has the tokens of those below it once more, and one of a database none.
    others = [span(0, dict(zip(names, (1649, 208), strict=True)), operation="invoke_agent"), span(1, {})]
    together = {"resourceSpans": [{"resource": {}, "scopeSpans": [{"spans": [*others, *spans]}]}]}
    assert requests_in(tmp_path, json.dumps(together) + "\n") == REQUESTS
    assert requests_in(tmp_path, "\n".join(map(json.dumps, [*others, *spans]))) == REQUESTS


def test_spans_without_requests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="no requests"):
        requests_in(tmp_path, json.dumps(span(0, {})) + "\n")


def test_responses_of_ollama_are_a_trace(tmp_path: Path) -> None:
    lines = [
        {"created_at": f"2026-01-01T00:00:0{at}.123456789Z", "done": True, "prompt_eval_count": i, "eval_count": o}
        for at, i, o in REQUESTS
    ]
    found = requests_in(tmp_path, "\n".join(map(json.dumps, lines)))
    assert [tokens for _, *tokens in found] == [tokens for _, *tokens in REQUESTS]
    assert found[-1][0] == pytest.approx(4.0)


@pytest.mark.parametrize(
    "pair",
    [
        ("dynamo_frontend_input_sequence_tokens", "dynamo_frontend_output_sequence_tokens"),
        ("inference_objective_input_tokens", "inference_objective_output_tokens"),
    ],
)
def test_histograms_of_routers_have_lengths(tmp_path: Path, pair: tuple[str, str]) -> None:
    text = "".join(
        f'{name}_bucket{{model="m",le="{bound}"}} {count}\n'
        for name in pair
        for bound, count in ((100, 30), (500, 90), ("+Inf", 100))
    )
    text += f'{pair[0]}_sum{{model="m"}} 40000\n{pair[1]}_sum{{model="m"}} 12000\n'
    text += "".join(f'{name}_count{{model="m"}} 100\n' for name in pair)
    (tmp_path / "scrape.prom").write_text(text)
    moments = load_workload(tmp_path / "scrape.prom").moments()
    assert (moments.mean_prompt, moments.mean_output) == (pytest.approx(400.0), pytest.approx(120.0))
