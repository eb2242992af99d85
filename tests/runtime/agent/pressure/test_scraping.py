"""An engine over HTTP: slow, large, broken or gone, it leads to a state and never to an exception."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from hetis.runtime.agent.pressure import EngineNews, Scrape, ScrapeState, read_text, scrape, watch_engine
from tests.runtime.agent.pressure.expositions import SGLANG, VLLM_OLD

Answer = Callable[[BaseHTTPRequestHandler], None]
WAIT_S = 60.0  # limit for an answer that does come, on a busy machine


@contextmanager
def engine(answer: Answer) -> Iterator[str]:
    """Serve this handler over HTTP on the loopback; yield the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/metrics"
        finally:
            server.shutdown()
            thread.join()


def sends(body: bytes, status: int = 200) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def sends_to(where: str) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        if handler.path != "/metrics":
            sends(SGLANG.encode())(handler)
            return
        handler.send_response(307)
        handler.send_header("Location", where)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def test_an_engine_may_send_to_another_path_and_to_no_other_server() -> None:
    with engine(sends_to("/metrics/")) as url:
        assert scrape(url, timeout_s=WAIT_S).state is ScrapeState.READ
    asked = list[str]()

    def other(handler: BaseHTTPRequestHandler) -> None:
        asked.append(handler.path)
        sends(SGLANG.encode())(handler)

    with engine(other) as elsewhere:
        for where in (elsewhere, elsewhere.replace("http", "ftp", 1), "file:///etc/hostname"):
            with engine(sends_to(where)) as url:
                found = scrape(url, timeout_s=WAIT_S)
            assert found.state is ScrapeState.UNREACHABLE
            assert found.message
    assert asked == []


def drips(handler: BaseHTTPRequestHandler) -> None:
    """Send a few bytes now and then: each read is in time, the whole answer is not."""
    handler.send_response(200)
    handler.end_headers()
    try:
        for _ in range(1000):  # until the client hangs up
            handler.wfile.write(b"# a comment\n")
            handler.wfile.flush()
            time.sleep(0.02)
    except OSError:
        pass


def cuts_off(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b"vllm:num_requests_running 1\n")


def test_an_engine_that_answers_is_read() -> None:
    with engine(sends(VLLM_OLD.encode())) as url:
        found = scrape(url, timeout_s=WAIT_S)
    assert found == read_text(VLLM_OLD, name=url)
    assert found.state is ScrapeState.READ


@pytest.mark.parametrize(
    ("answer", "state", "said"),
    [
        (sends(b"no", status=503), ScrapeState.UNREACHABLE, "503|Service Unavailable"),
        (sends(b"x" * 5000), ScrapeState.TOO_LARGE, "larger than 4096 bytes"),
        (sends(b"\xff\xfe\x00"), ScrapeState.UNREADABLE, "not Prometheus text"),
        (sends(b""), ScrapeState.NO_ENGINE, "no metric begins with vllm: or sglang:"),
    ],
)
def test_a_bad_answer_has_a_state_and_a_reason(answer: Answer, state: ScrapeState, said: str) -> None:
    with engine(answer) as url:
        found = scrape(url, timeout_s=WAIT_S, max_bytes=4096)
    assert found.state is state
    assert any(part in found.message for part in said.split("|")), found.message


def test_an_answer_that_takes_too_long_is_not_waited_for() -> None:
    with engine(drips) as url:
        found = scrape(url, timeout_s=2.0)
    assert found.state is ScrapeState.UNREACHABLE
    assert "no complete response within 2 s" in found.message


def test_an_answer_that_is_cut_off_is_not_believed() -> None:
    with engine(cuts_off) as url:
        assert scrape(url, timeout_s=1.0).state is not ScrapeState.READ


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/metrics", "file:///etc/passwd", "", "http://[::1", "http://a b/"])
def test_an_address_where_nobody_answers_is_unreachable(url: str) -> None:
    found = scrape(url, timeout_s=0.5)
    assert found.state is ScrapeState.UNREACHABLE
    assert found.message


def test_news_come_at_the_interval_and_keep_the_last_readings_with_their_age() -> None:
    now_s = 100.0
    answers = [
        read_text(SGLANG, name="e"),
        Scrape(state=ScrapeState.UNREACHABLE, message="refused"),
        read_text(SGLANG.replace("token_usage{", "token_usage{").replace("} 0.6", "} 0.95"), name="e"),
    ]
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        nonlocal now_s
        slept.append(seconds)
        now_s += seconds

    async def take() -> Scrape:
        nonlocal now_s
        now_s += 0.5  # duration of a scrape
        return answers.pop(0)

    async def watch() -> list[EngineNews]:
        found = []
        async for news in watch_engine("", interval_s=2.0, clock=lambda: now_s, sleep=sleep, take=take):
            found.append(news)
            if not answers:
                return found
        raise AssertionError("it ended by itself")

    first, second, third = asyncio.run(watch())
    assert slept == [1.5, 1.5]
    assert (first.state, first.taken_s, first.age_s(100.5)) == (ScrapeState.READ, 100.0, 0.5)
    assert (second.state, second.message, second.age_s(104.0)) == (ScrapeState.UNREACHABLE, "refused", 4.0)
    assert second.readings == first.readings
    assert (first.readings["qwen"].waiting_for_kv, third.readings["qwen"].waiting_for_kv) == (0, 4)
    assert third.earlier == first.readings
