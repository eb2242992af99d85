"""What the server refuses, what it gives up, and that nothing stays behind when it does."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from hetis.runtime.attention.local import LocalDevice
from hetis.runtime.engine.absences import Absences
from hetis.runtime.kv.errors import DeviceError
from hetis.runtime.server.app import AppOptions
from tests.runtime.server.live import MODEL, Live, engine_of

LONG = {"model": MODEL, "prompt": "on and on", "max_tokens": 1500, "temperature": 0, "ignore_eos": True}


def wait_for(holds: Callable[[], bool], *, limit_s: float = 30) -> None:
    """Until it holds; what happens in another thread has no other sign."""
    deadline_s = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline_s, "it never held"
        time.sleep(0.01)


def aborted(live: Live) -> float:
    """Requests that ended before they were done."""
    return live.metric("vllm:request_success_total", finished_reason="abort")


def nothing_is_left(live: Live) -> bool:
    view = live.desk.view
    return not view.running and not view.waiting and not any(device.used_pages for device in view.devices)


@pytest.fixture(scope="module")
def small(folder: Path) -> Iterator[Live]:
    """Two seats, one that may wait."""
    limits = AppOptions(body_bytes=10_000, body_s=0.5, answer_s=60, write_s=1)
    with Live(engine_of(folder, pages=(900, 900), most_running=2), folder, most_open=3, app=limits) as server:
        yield server


def stream(live: Live, **changes: Any) -> Any:
    return httpx.stream("POST", f"{live.url}/v1/completions", json=LONG | {"stream": True} | changes, timeout=30)


def test_a_client_that_leaves_a_stream_ends_its_request(small: Live) -> None:
    before, aborts = small.metric("hetis_requests_cancelled_total", cause="disconnected"), aborted(small)
    with stream(small) as answer:
        lines = answer.iter_lines()  # kept: httpx closes the connection with it
        assert '"finish_reason":null' in next(lines)
        assert small.desk.open_requests == 1
    wait_for(lambda: small.desk.open_requests == 0 and nothing_is_left(small))
    assert small.metric("hetis_requests_cancelled_total", cause="disconnected") == before + 1
    assert aborted(small) == aborts + 1


def test_a_client_that_leaves_before_its_answer_ends_its_requests(small: Live) -> None:
    aborts = aborted(small)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{small.url}/v1/completions", json=LONG | {"n": 2}, timeout=0.3)
    wait_for(lambda: small.desk.open_requests == 0 and nothing_is_left(small))
    assert aborted(small) == aborts + 2


def test_more_than_may_wait_are_told_to_come_back(small: Live) -> None:
    with stream(small) as one, stream(small) as two:
        lines = one.iter_lines(), two.iter_lines()
        assert all(next(each) for each in lines)
        with ThreadPoolExecutor(1) as pool:
            third = pool.submit(small.post, "/v1/completions", LONG | {"max_tokens": 1})  # waits for a seat
            wait_for(lambda: small.desk.open_requests == 3)
            refused = small.post("/v1/completions", LONG)
            one.close()
            assert third.result().status_code == 200
    assert refused.status_code == 429
    assert int(refused.headers["Retry-After"]) >= 1
    error = refused.json()["error"]
    assert error == {
        "message": "3 requests are running or waiting, 3 may be",
        "type": "rate_limit_error",
        "param": None,
        "code": "too_many_requests",
    }
    wait_for(lambda: small.desk.open_requests == 0)
    with small.client() as client:
        assert client.completions.create(model=MODEL, prompt="again", max_tokens=2).choices
        with pytest.raises(openai.BadRequestError, match="4 answers are asked for at once, 3 may be open"):
            client.completions.create(model=MODEL, prompt="too many", n=4)


def test_a_body_that_is_too_large_is_refused_without_reading_it(small: Live) -> None:
    answer = small.post("/v1/completions", LONG | {"prompt": "x" * 20_000})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")

    def parts() -> Iterator[bytes]:  # without a length
        for _ in range(30):
            yield b"x" * 1000

    answer = httpx.post(f"{small.url}/v1/completions", content=parts(), timeout=30)
    assert answer.status_code == 413


def test_a_body_that_does_not_come_is_given_up(small: Live) -> None:
    host, port = small.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert b"408" in connection.recv(4096)


def test_a_reader_that_does_not_read_is_cut_off_and_holds_up_nobody(small: Live) -> None:
    before = small.metric("hetis_requests_cancelled_total", cause="slow_reader")
    host, port = small.url.removeprefix("http://").split(":")
    body = json.dumps(LONG | {"stream": True, "n": 2, "logprobs": 20}).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.connect((host, int(port)))
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        with small.client() as client:
            assert client.completions.create(model=MODEL, prompt="quick", max_tokens=3).choices
        wait_for(lambda: small.metric("hetis_requests_cancelled_total", cause="slow_reader") == before + 1)
    wait_for(lambda: small.desk.open_requests == 0 and nothing_is_left(small))


def test_an_answer_that_takes_too_long_is_an_error_and_in_a_stream_its_last_event(folder: Path) -> None:
    with Live(engine_of(folder), folder, app=AppOptions(answer_s=0.2)) as live:
        answer = live.post("/v1/completions", LONG)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        with live.client() as client, pytest.raises(openai.APIError, match=r"took longer than 0\.2 s"):
            for _ in client.completions.create(
                model=MODEL, prompt="x", max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
            ):
                pass
        wait_for(lambda: nothing_is_left(live))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": 2048}, "the context holds 2048 tokens; the prompt has 3, and 2048 of output were asked for"),
        ({"max_tokens": 0}, "max_tokens is 0, must be >= 1"),
        ({"prompt": list(range(3)) * 700}, "the prompt has 2100, and 5 of output were asked for"),
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": [[]], "max_tokens": 1}, "the prompt is empty"),
        ({"prompt": [512], "max_tokens": 1}, "the prompt has token 512, must be >= 0 and < 512"),
        ({"prompt": 5}, "prompt must be a valid string"),
        ({"temperature": -1}, "temperature is -1.0, must be >= 0 and finite"),
        ({"top_p": 0}, "top_p is 0.0, must be > 0 and <= 1"),
        ({"logprobs": 21}, "logprobs is 21, must be >= 0 and <= 20"),
        ({"seed": -1}, "seed is -1, must be >= 0 and < 2**63"),
        ({"n": 0}, "n must be greater than or equal to 1"),
        ({"n": 129}, "n must be less than or equal to 128"),
        ({"stop": [""]}, "stop is ('',), must be texts of at least one character"),
        ({"echo": True}, "echo must be False"),
        ({"presence_penalty": 0.5}, "presence_penalty must be 0"),
        ({"logit_bias": {"5": 1.0}}, "logit_bias"),
        ({"grammar": "x"}, "grammar is not supported"),
        ({"stream_options": {"include_usage": True}}, "stream_options needs stream to be true"),
        ({"stream_options": {"extra": 1}, "stream": True}, "stream_options.extra is not supported"),
        ({"model": None, "max_tokens": "x"}, "model must be a valid string; max_tokens must be a valid integer"),
    ],
)
def test_a_wrong_field_is_named_with_its_value_and_its_limit(live: Live, change: dict[str, Any], message: str) -> None:
    answer = live.post("/v1/completions", LONG | {"max_tokens": 5} | change)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role tool is unknown"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": [{"content": "x"}]}, "messages[0].role is missing"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format.type must be 'text'"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs to be true"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs must not have messages"),
        ({"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs must not have self"),
    ],
)
def test_a_chat_that_cannot_be_is_refused(live: Live, change: dict[str, Any], message: str) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    answer = live.post("/v1/chat/completions", body | change)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_what_is_no_json_and_what_is_no_path_have_errors_of_the_same_form(live: Live) -> None:
    answer = httpx.post(f"{live.url}/v1/completions", content=b"{", timeout=30)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("the body is no JSON: ")
    assert live.get("/v2").json()["error"]["message"] == "/v2: there is no such path"
    assert live.get("/v1/completions").json()["error"]["message"] == "/v1/completions: this path does not take GET"


def test_a_request_that_no_memory_could_hold_is_refused(folder: Path) -> None:
    with Live(engine_of(folder, pages=(8, 8)), folder) as live:
        for streams in (False, True):
            answer = live.post("/v1/completions", LONG | {"stream": streams})
            assert answer.status_code == 400
            assert "need more KV pages than there are" in answer.json()["error"]["message"]


def test_who_needs_a_lost_device_waits_for_it_and_is_told_to_come_back_when_it_is_gone(folder: Path) -> None:
    """32 tokens of eight heads take two pages each: all sixteen."""
    engine, now_s = engine_of(folder, pages=(8, 8), patience_s=60), [0.0]
    engine.absences = Absences(engine.stages, patience_s=60, clock=lambda: now_s[0])
    body = LONG | {"prompt": [1] * 20, "max_tokens": 12}
    with Live(engine, folder) as live, ThreadPoolExecutor(1) as pool:
        wanted = live.post("/v1/completions", body).json()["choices"]
        live.between_steps(lambda: engine.lose_device(1))
        answer = pool.submit(live.post, "/v1/completions", body)
        assert live.comes_to(1, "hetis_requests_waiting_for_devices")
        assert live.post("/v1/completions", body | {"prompt": [1], "max_tokens": 9}).status_code == 200
        lost = engine.stage.devices[1]
        fresh = LocalDevice(lost.name, lost.shape, lost.num_pages)
        live.between_steps(lambda: engine.restore_device(1, fresh))
        assert answer.result().json()["choices"] == wanted
        live.between_steps(lambda: engine.lose_device(1))
        late = pool.submit(live.post, "/v1/completions", body | {"stream": True})
        assert live.comes_to(1, "hetis_requests_waiting_for_devices")
        now_s[0] = 60.0
        for refused in (late.result(), live.post("/v1/completions", body)):
            assert refused.status_code == 503
            assert int(refused.headers["Retry-After"]) >= 1
            assert refused.json()["error"] == {
                "message": "cpu1 is away: the devices that are left have too few KV pages",
                "type": "server_error",
                "param": None,
                "code": "devices_away",
            }
        assert live.post("/v1/completions", body | {"max_tokens": 100}).status_code == 400


def test_a_chat_without_a_limit_gets_as_many_tokens_as_the_memory_holds(folder: Path) -> None:
    with Live(engine_of(folder, pages=(8, 8)), folder) as live:  # 2 pages of 16 tokens for each of 8 heads
        messages = [{"role": "user", "content": "x"}]
        answer = live.post("/v1/chat/completions", {"model": MODEL, "messages": messages, "temperature": 0}).json()
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["total_tokens"] == 33  # the last token's KV is not needed
        answer = live.post("/v1/chat/completions", {"model": MODEL, "messages": messages * 9})
        assert answer.status_code == 400
        assert "need more KV pages than there are" in answer.json()["error"]["message"]


def test_with_a_key_only_probes_need_none(folder: Path) -> None:
    with Live(engine_of(folder), folder, key="0123456789abcdef") as live:
        assert live.get("/health").status_code == 200
        assert live.get("/metrics").status_code == 200
        for path in ("/v1/models", "/hetis/heads"):
            assert live.get(path).json()["error"]["code"] == "invalid_api_key"
        with live.client() as client:
            assert client.models.list().data
        with live.client(api_key="0123456789abcdeX") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()


def test_told_to_end_it_finishes_what_is_open_and_takes_nothing_new(folder: Path) -> None:
    with Live(engine_of(folder, pages=(900, 900)), folder) as live, stream(live, max_tokens=300) as answer:
        lines = answer.iter_lines()
        next(lines)
        live.tell()
        wait_for(lambda: live.get("/health").status_code == 503)
        assert live.get("/health").json() == {"status": "stopping", "reason": "the server is stopping"}
        refused = live.post("/v1/completions", LONG)
        assert (refused.status_code, refused.json()["error"]["message"]) == (503, "the server is stopping")
        events = [line for line in lines if line]
        live.join()
    assert events[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in events[-2]
    assert live.went_well


def test_told_twice_it_ends_at_once_and_says_so(folder: Path) -> None:
    with Live(engine_of(folder, pages=(900, 900)), folder) as live, stream(live) as answer:
        lines = answer.iter_lines()
        next(lines)
        live.tell()
        live.tell()
        events = [line for line in lines if line]
        live.join()
    assert "the server is stopping" in events[-2]
    assert live.went_well


def test_an_engine_that_fails_ends_the_server_with_an_error_to_everyone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Live(engine_of(folder, pages=(900, 900)), folder) as live, stream(live) as answer:
        lines = answer.iter_lines()
        next(lines)

        def fail(step: object) -> None:
            raise DeviceError("cpu0", "a bug")

        monkeypatch.setattr(live.engine.stage, "run", fail)
        events = [line for line in lines if line]
        live.join()
    assert "the engine has failed" in events[-2]
    assert live.went_well is False
