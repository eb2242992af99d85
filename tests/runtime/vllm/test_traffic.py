"""What agents measure of a real engine: vLLM serves a random model, and its metrics become a sketch of what came."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from examples.demo_serve.checkpoint import Sizes, make_checkpoint
from examples.processes import free_ports
from hetis.runtime.agent.pressure import EngineNews, ScrapeState, replica_report, scrape
from hetis.solver.traffic import TOKENS, Histogram
from tests.runtime.launch.vllm_python import ENVIRONMENT, PYTHON, ROOT, needs_vllm

pytestmark = needs_vllm

MODEL, START_S = "tiny", 600.0
SENT = [(7, 3), (60, 20), (150, 40), (150, 40), (700, 12), (33, 110)]  # prompt and output tokens of each request


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an engine."""
    folder, port = tmp_path_factory.mktemp("served"), free_ports()
    model, url = make_checkpoint(folder / MODEL, sizes=Sizes(layers=2, head_dim=32)), f"http://127.0.0.1:{port}"
    command = [
        *(str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)),
        *("--served-model-name", MODEL, "--max-model-len", "1024", "--max-num-seqs", "4", "--dtype", "float32"),
        *("--enforce-eager", "--enable-prefix-caching", "--block-size", "32"),
    ]
    with (folder / "log").open("w") as log:
        engine = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            env=ENVIRONMENT | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        )  # fmt: skip
    try:
        end_s = time.monotonic() + START_S
        while not is_ready(url):
            assert engine.poll() is None, (folder / "log").read_text()[-2000:]
            assert time.monotonic() < end_s, (folder / "log").read_text()[-2000:]
            time.sleep(0.5)
        yield url
    finally:
        engine.terminate()
        engine.wait(60)


def is_ready(url: str) -> bool:
    with suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
        return bool(answer.status == 200)
    return False


def complete(url: str, number: int, prompt_tokens: int, output_tokens: int) -> None:
    """Send a request of so many tokens; those of equal numbers begin alike."""
    prompt = [(31 * number + 7 * k) % 400 + 50 for k in range(prompt_tokens)]
    body = {"model": MODEL, "prompt": prompt, "max_tokens": output_tokens, "ignore_eos": True, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        usage = json.load(answer)["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (prompt_tokens, output_tokens)


def measured(url: str, news: EngineNews, now_s: float, *, ended: int) -> EngineNews:
    """Scrape until so many requests have ended according to the engine, which updates its metrics after its answers."""
    for _ in range(100):
        news = news.after(scrape(f"{url}/metrics", timeout_s=10.0), now_s)
        assert news.state is ScrapeState.READ, news.message
        if news.readings[MODEL].num_finished == ended:
            break
        time.sleep(0.1)
    return news


def test_a_sketch_of_vllms_metrics_is_that_of_the_requests_that_were_sent(served: str) -> None:
    complete(served, 99, 16, 2)  # before the first reading
    first = measured(served, EngineNews(), 100.0, ended=1)
    with ThreadPoolExecutor(3) as senders:
        list(senders.map(lambda sent: complete(served, sent[0], *sent[1]), enumerate(SENT)))
    complete(served, 4, 700, 5)  # the prompt of the fifth request, whose whole blocks are cached
    every = [*SENT, (700, 5)]
    last = measured(served, first, 160.0, ended=1 + len(every)).readings[MODEL]
    traffic = last.traffic.since(first.readings[MODEL].traffic)
    prompts, outputs = zip(*every, strict=True)
    assert (traffic.seconds, traffic.arrivals) == (60.0, len(every))
    assert traffic.prompt_tokens == Histogram.of_values(TOKENS, map(float, prompts))
    assert traffic.output_tokens == Histogram.of_values(TOKENS, map(float, outputs))
    assert 640 <= traffic.cached_tokens < 700  # all but the last, incomplete block of 32
    assert traffic.ttft_s.count == traffic.wait_s.count == len(every)
    assert traffic.tpot_s.count == sum(outputs) - len(every)
    assert 0 < traffic.tpot_s.mean < traffic.ttft_s.mean < 60
    report = replica_report("clusters/a/replicas/0", last, earlier=first.readings[MODEL])
    assert (report.num_running, report.num_waiting, report.num_finished) == (0, 0, 1 + len(every))
    assert len(report.traffic.SerializeToString()) < 800
    assert report.ttft_s == pytest.approx(traffic.ttft_s.mean)
