"""Traffic is asked of a Prometheus, and of an engine's ``/metrics``."""

from __future__ import annotations

import io
import json
from typing import Any
from urllib.error import HTTPError
from urllib.parse import parse_qs, urlsplit

import pytest

from hetis.formats.errors import DocumentError
from hetis.planner.cli.traffic import traffic_of
from tests.formats.traces.test_rates import SCRAPE


class Server:
    """A server of ``/metrics``, and perhaps a Prometheus, whose answers are by a part of the query."""

    def __init__(self, answers: dict[str, list[Any]] | None = None, metrics: str = "") -> None:
        self.answers, self.metrics = answers, metrics
        self.asked: list[str] = []

    def __call__(self, request: Any, timeout: float) -> io.BytesIO:
        url = urlsplit(request.full_url)
        self.asked.append(url.path)
        if url.path.endswith("/metrics") and self.metrics:
            return io.BytesIO(self.metrics.encode())
        if not url.path.endswith("/api/v1/query") or self.answers is None:
            raise HTTPError(request.full_url, 404, "Not Found", {}, None)  # type: ignore[arg-type]
        query = parse_qs(url.query)["query"][0]
        rows = next((rows for part, rows in self.answers.items() if part in query), [])
        return io.BytesIO(json.dumps({"status": "success", "data": {"result": rows}}).encode())


def row(value: float, **metric: str) -> dict[str, Any]:
    return {"metric": metric, "value": [1764000000, str(value)]}


PROMETHEUS = {
    "increase(vllm:request_prompt_tokens_bucket[7d])": [row(40, le="200"), row(100, le="500"), row(99.9, le="+Inf")],
    "increase(vllm:request_generation_tokens_bucket[7d])": [row(100, le="50"), row(100, le="+Inf")],
    "increase(vllm:request_prompt_tokens_sum[7d])": [row(30_000)],
    "increase(vllm:request_generation_tokens_sum[7d])": [row(4_000)],
    "avg_over_time(sum(rate(vllm:request_prompt_tokens_count[1h]))[7d:1h])": [row(2.5)],
    "max_over_time(": [row(9.0)],
}


def test_a_prometheus_has_the_lengths_and_the_rate_of_the_last_week() -> None:
    server = Server(PROMETHEUS)
    found = traffic_of("http://prometheus:9090/", opened=server)
    moments = found.workload.moments()
    assert (moments.mean_prompt, moments.mean_output) == (pytest.approx(300.0), pytest.approx(40.0))
    assert (found.workload.rate_rps, found.workload.name) == (2.5, "prometheus-9090")
    assert found.notes[:2] == ("the rate is the mean of the last 7d", "the hour of most requests has 9/s")
    assert set(server.asked) == {"/api/v1/query"}


@pytest.mark.parametrize("url", ["http://engine:8000", "http://engine:8000/metrics"])
def test_an_engine_has_them_since_its_start(url: str) -> None:
    found = traffic_of(url, opened=Server(metrics=SCRAPE), now_s=lambda: 1764000050.0)
    assert found.workload.rate_rps == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("server", "window", "said"),
    [
        (Server(), "7d", "http://x:1/metrics: does not answer: Not Found"),
        (Server({}), "7d", "has measured no requests in the last 7d: neither vllm:request_prompt_tokens_bucket"),
        (Server({}), "1 week", "--window: is '1 week', must be a duration of Prometheus such as 7d or 12h"),
    ],
)
def test_what_has_no_traffic_says_so(server: Server, window: str, said: str) -> None:
    with pytest.raises(DocumentError) as caught:
        traffic_of("http://x:1", window=window, opened=server)
    assert said in str(caught.value)
