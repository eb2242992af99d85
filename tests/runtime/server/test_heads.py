"""Which heads live where can be seen and changed while an answer streams, and the answer is the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from hetis.runtime.agent.pressure.reading import EngineKind
from hetis.runtime.agent.pressure.samples import parse_samples
from hetis.runtime.agent.pressure.vllm import read_vllm
from tests.runtime.server.live import MODEL, Live

BODY = {"model": MODEL, "prompt": "heads move", "max_tokens": 400, "temperature": 0, "ignore_eos": True}


def test_heads_that_move_while_an_answer_streams_do_not_change_it(live: Live) -> None:
    with live.client() as client:
        still = live.post("/v1/completions", BODY).json()["choices"][0]["text"]
        moved_before = live.metric("hetis_moved_heads_total")
        streamed = client.completions.create(
            model=MODEL,
            prompt="heads move",
            max_tokens=400,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        texts, moved = [], 0
        for number, chunk in enumerate(streamed):
            texts.append(chunk.choices[0].text)
            if number % 20 == 10 and number < 200:
                seen = live.get("/hetis/heads").json()
                (request,) = seen["requests"]
                assert request["request"] == chunk.id
                assert {device["name"]: device["heads"] for device in seen["devices"]} == {
                    name: request["heads"].count(name) for name in ("cpu0", "cpu1")
                }
                head = number // 20 % 8
                target = "cpu1" if request["heads"][head] == "cpu0" else "cpu0"
                answer = live.post("/hetis/moves", {"request": chunk.id, "heads": [head], "to": target})
                assert answer.json() == {"moved": True}
                moved += 1
    assert "".join(texts) == still
    assert moved > 3
    assert live.metric("hetis_moved_heads_total") - moved_before == moved


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"request": "cmpl-none", "heads": [0], "to": "cpu0"}, 404, "cmpl-none has 0 running requests"),
        ({"request": 10**6, "heads": [0], "to": "cpu0"}, 404, "request 1000000 is not running"),
        ({"request": 1, "heads": [0], "to": "gpu7"}, 400, "to is 'gpu7', must be one of cpu0, cpu1"),
        ({"request": 1, "heads": "all", "to": "cpu0"}, 400, "heads must be a valid array"),
    ],
)
def test_a_move_that_cannot_be_is_refused(live: Live, body: dict[str, object], status: int, message: str) -> None:
    answer = live.post("/hetis/moves", body)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]


def test_heads_that_there_are_not_are_refused_and_the_engine_lives(live: Live) -> None:
    with live.client() as client:
        streamed = client.completions.create(
            model=MODEL, prompt="x", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
        )
        chunk = next(iter(streamed))
        for heads in ([8], [-1], []):
            answer = live.post("/hetis/moves", {"request": chunk.id, "heads": heads, "to": "cpu0"})
            assert answer.status_code == 400
            assert "must be >= 0 and < 8, at least one" in answer.json()["error"]["message"]
        every = live.post("/hetis/moves", {"request": chunk.id, "heads": list(range(8)), "to": "cpu0"})
        assert every.status_code == 409
        assert every.json()["error"]["code"] == "not_movable"
        streamed.close()


def test_the_agent_reads_our_metrics_as_it_reads_vllms(live: Live) -> None:
    live.post("/v1/completions", BODY | {"max_tokens": 5})
    (reading,) = read_vllm(parse_samples(live.get("/metrics").text))
    assert reading.kind is EngineKind.VLLM
    assert reading.model == MODEL
    assert (reading.num_running, reading.num_waiting, reading.num_preempted) == (0, 0, 0)
    assert reading.total_blocks == 800
    assert reading.kv_use_ratio == 0
    assert reading.num_finished is not None
    assert reading.num_finished >= 1
    assert reading.num_steps is not None
    assert reading.num_steps >= 5
    assert reading.ttft_s is not None
    assert reading.ttft_s.count >= 1


def test_metrics_tell_devices_apart(live: Live, tmp_path: Path) -> None:
    for device in ("cpu0", "cpu1"):
        assert live.metric("hetis_device_kv_pages", device=device) == 400
        assert live.metric("hetis_device_up", device=device) == 1
    # 100 pages for each of eight heads hold 1,600 positions, and one token needs none; a chunk has 64. Each has
    # K and V of four layers, eight heads of 8 numbers in float32.
    assert live.metric("hetis_prompt_kv_bytes", stage="0") == (1601 + 64) * 2 * 4 * 8 * 8 * 4
    assert live.comes_to(0, "hetis_prompt_kv_bytes_used", stage="0")
