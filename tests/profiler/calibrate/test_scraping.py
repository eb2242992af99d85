"""``/metrics`` is read from any server that answers, within limits, and an interval reflects its counters."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis.formats.errors import DocumentError
from hetis.profiler.calibrate import scraping
from hetis.profiler.calibrate.observed import Observed, ObservedKind
from hetis.profiler.calibrate.scraping import (
    UnreachableError,
    engines_in,
    fetch_text,
    metrics_address,
    observed_in_scrapes,
    watch,
)
from tests.profiler.calibrate.logs import SCRAPES, prom

CACHE = 'kv_cache_size_tokens="100000"'


@contextmanager
def server(answers: list[tuple[int, str]]) -> Iterator[str]:
    """Serve these answers on loopback in turn, the last one forever."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, text = answers.pop(0) if len(answers) > 1 else answers[0]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}"
        finally:
            http.shutdown()
            thread.join()


def counters(**changes: float) -> dict[str, float]:
    """Counters of an engine that decodes 10 requests in 100 iterations of 20 ms, and the changes."""
    values = {
        "generation_tokens_total": 1000.0,
        "inter_token_latency_seconds_sum": 20.0,
        "inter_token_latency_seconds_count": 1000.0,
        "iteration_tokens_total_count": 100.0,
        "iteration_tokens_total_sum": 1000.0,
        "time_to_first_token_seconds_count": 0.0,
        "num_requests_running": 10.0,
        "kv_cache_usage_perc": 0.05,
    }
    return values | changes


ZERO = dict.fromkeys(counters(), 0.0) | {"num_requests_running": 10.0, "kv_cache_usage_perc": 0.05}


def between(
    before: dict[str, float], after: dict[str, float], *, cache: str = CACHE, context: float | None = None
) -> Observed:
    scrapes = [(float(i), engines_in(prom(one, cache=cache), "x")) for i, one in enumerate((before, after))]
    return observed_in_scrapes("x", scrapes, context_tokens=context)


def test_the_real_servers_metrics_make_an_interval() -> None:
    """200 latencies of 31.7 s together, in 26 iterations, of which 12 had a prompt; by hand from the two files."""
    scrapes = [(float(i), engines_in(path.read_text(), "x")) for i, path in enumerate(SCRAPES)]
    assert list(scrapes[0][1]) == ["0"]
    (one,) = observed_in_scrapes("x", scrapes).observations
    assert one.kind is ObservedKind.INTERVAL
    assert one.seconds == pytest.approx((2227.1796445099976 - 2185.4860858379993) / 200)
    (plain, without), (chunked, with_prompt) = one.parts
    assert (without.decoding, plain + chunked) == (pytest.approx(200 / 26), 1.0)
    assert with_prompt.chunk_tokens * chunked * 26 == pytest.approx(87858 - 84531 - (11936 - 11724))


def test_an_interval_is_its_mean_iteration() -> None:
    (one,) = between(ZERO, counters()).observations
    ((share, work),) = one.parts
    assert (share, one.seconds, work.decoding, work.chunk_tokens) == (1.0, 0.020, 10.0, 0.0)
    assert work.attended_tokens == pytest.approx(10 * (500 - 7.5))  # 5000 tokens of 10 requests, in blocks of 16


def test_prompts_are_in_as_many_iterations_as_there_were_first_tokens() -> None:
    after = counters(
        time_to_first_token_seconds_count=25, generation_tokens_total=1025, iteration_tokens_total_sum=6025
    )
    (one,) = between(ZERO, after).observations
    (plain, _), (chunked, work) = one.parts
    assert (plain, chunked) == (0.75, 0.25)
    assert (work.decoding, work.prompts, work.chunk_tokens) == (10.0, 1.0, 200.0)


def test_older_names_of_metrics_are_known() -> None:
    def old(values: dict[str, float]) -> dict[str, float]:
        names = {"inter_token_latency_seconds": "time_per_output_token_seconds", "kv_cache_usage": "gpu_cache_usage"}
        return {next((n.replace(a, b) for a, b in names.items() if a in n), n): x for n, x in values.items()}

    found = between(old(ZERO), old(counters()), cache='num_gpu_blocks="6250"')
    assert found.observations == between(ZERO, counters()).observations


@pytest.mark.parametrize(
    ("after", "reason"),
    [
        (ZERO, "idle"),
        (counters(inter_token_latency_seconds_count=-5.0), "the server was restarted"),
        (counters(spec_decode_num_draft_tokens_total=40.0), "speculative decoding"),
    ],
)
def test_an_interval_that_says_nothing_is_counted(after: dict[str, float], reason: str) -> None:
    found = between(ZERO, after)
    assert found.observations == ()
    assert found.left_out == {reason: 1}


def test_the_context_is_asked_for_where_no_metric_says_it() -> None:
    with pytest.raises(
        DocumentError, match="does not report KV cache usage: give the mean tokens of a request with --context"
    ):
        between(ZERO, counters(), cache="")
    (one,) = between(ZERO, counters(), cache="", context=700.0).observations
    assert one.parts[0][1].attended_tokens == 7000.0


def test_metrics_without_the_use_of_the_kv_cache_are_not_taken_for_empty_ones() -> None:
    silent = [{name: x for name, x in one.items() if name != "kv_cache_usage_perc"} for one in (ZERO, counters())]
    with pytest.raises(DocumentError, match="does not report KV cache usage"):
        between(*silent)
    found = between(ZERO | {"num_requests_running": 0.0}, counters(num_requests_running=0.0))
    assert found.left_out == {"no request running at either end": 1}


def test_every_engine_of_a_server_has_intervals_of_its_own() -> None:
    scrapes = [
        (float(i), engines_in(prom(values, cache=CACHE) + prom(values, engine="1", cache=CACHE), "x"))
        for i, values in enumerate((ZERO, counters()))
    ]
    assert len(observed_in_scrapes("x", scrapes).observations) == 2


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://host:8000", "http://host:8000/metrics"),
        ("https://host/", "https://host/metrics"),
        ("http://[::1]:8000/vllm/metrics", "http://[::1]:8000/vllm/metrics"),
    ],
)
def test_a_servers_address_is_that_of_its_metrics(url: str, address: str) -> None:
    assert metrics_address(url) == address


@pytest.mark.parametrize("url", ["ftp://host", "http://", "http://host:notaport", "file:///etc/passwd", "http://[::1"])
def test_what_is_no_url_is_said(url: str) -> None:
    with pytest.raises(DocumentError, match="is no URL of a server"):
        metrics_address(url)


def test_a_server_is_watched_and_may_miss_an_answer() -> None:
    first, last = prom(ZERO, cache=CACHE), prom(counters(), cache=CACHE)
    slept = list[float]()
    with server([(200, first), (503, "busy"), (200, last)]) as url:
        found = watch(url, for_s=20, every_s=10, clock=lambda: sum(slept), sleep=slept.append)
    assert slept == [10.0, 10.0]
    assert [at for at, _ in found] == [0.0, 20.0]
    assert len(observed_in_scrapes(url, found).observations) == 1


def test_a_server_that_does_not_answer_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    with server([(404, "no")]) as url, pytest.raises(UnreachableError, match="no answer: HTTP Error 404: Not Found"):
        watch(url, for_s=1, every_s=1)
    with pytest.raises(UnreachableError, match="no answer: "):
        fetch_text("http://127.0.0.1:1/metrics")
    monkeypatch.setattr(scraping, "MAX_BYTES", 1000)
    with server([(200, "x" * 2000)]) as url, pytest.raises(DocumentError, match="answers with more than"):
        fetch_text(url)


def test_another_server_is_named() -> None:
    other = "# TYPE go_threads gauge\ngo_threads 7\n"
    with server([(200, other)]) as url, pytest.raises(DocumentError, match="has no vLLM metric"):
        watch(url, for_s=1, every_s=1)


_LINES = st.one_of(
    st.text(max_size=60),
    st.builds(
        "vllm:{}{{{}}} {}".format,
        st.sampled_from([*counters(), "cache_config_info", "x_bucket"]),
        st.sampled_from(
            ['engine="0"', 'engine="0",block_size="16",kv_cache_size_tokens="nan"', 'e="\\"}', "", "engine=0"]
        ),
        st.sampled_from(["1", "1e17", "-1", "1e999", "+.e", "--", "0x1"]),
    ),
)


@given(st.lists(_LINES, max_size=30), st.lists(_LINES, max_size=30))
def test_reading_never_crashes(before: list[str], after: list[str]) -> None:
    try:
        scrapes = [(0.0, engines_in("\n".join(before), "x")), (1.0, engines_in("\n".join(after), "x"))]
        found = observed_in_scrapes("x", scrapes, context_tokens=None)
    except DocumentError:
        return
    assert all(0 < one.seconds < float("inf") for one in found.observations)
