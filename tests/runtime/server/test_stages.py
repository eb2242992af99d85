"""``hetis-serve`` with a stage of its plan in a process of its own: answers, and what clients hear when it dies."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import httpx

from hetis.runtime.engine.generate import generate
from hetis.runtime.engine.request import SamplingParams
from hetis.runtime.server.text import Tokens
from hetis.solver.plan import AttentionWorkerPool
from tests.command_line import environment
from tests.runtime.launch.plans import plan_of, stage_of
from tests.runtime.server.live import engine_of
from tests.runtime.server.test_command import run, serving, write
from tests.runtime.server.test_workers import free_port


def test_a_stage_in_a_process_answers_as_planned_and_its_death_is_told(folder: Path, tmp_path: Path) -> None:
    plan = plan_of(
        stage_of(num_layers=1, copies=2, devices=("a/0", "b/0"), kv_head_groups_kept=8),
        stage_of(first_layer=1, num_layers=3, tp=2, devices=("c/0", "c/1"), kv_head_groups_kept=2),
        pools=(AttentionWorkerPool(stage=1, gpu="T4", devices=("d/0",), kv_head_groups=2),),
        in_flight=2,
    )
    store = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "hetis.runtime.stages", "--name", "s1", "--store", store, "--model", str(folder)]
    stage = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment(OMP_NUM_THREADS="1")
    )
    try:
        options = ("-m", str(folder), "--plan", write(tmp_path, plan), "--store", store, "--stage", "s1=2")
        with serving(*options, "--worker-timeout", "60") as (server, url, _):
            body = {"model": folder.name, "prompt": "elsewhere", "max_tokens": 30, "temperature": 0, "ignore_eos": True}
            text = httpx.post(f"{url}/v1/completions", json=body, timeout=120).json()["choices"][0]["text"]
            prompt = Tokens.from_folder(folder).encode("elsewhere")
            (wanted,) = generate(engine_of(folder), [prompt], SamplingParams(max_tokens=30, ignore_eos=True))
            assert text == wanted.text
            devices = httpx.get(f"{url}/hetis/heads").json()["devices"]
            # Copies share what the plan has room for, 1,000 tokens: 63 pages of a head, or 32 on each of two.
            assert [(device["name"], device["stage"], device["kv_pages"]) for device in devices] == [
                *(("a/0", 0, 256), ("b/0", 1, 256), ("c/0", 2, 126), ("c/1", 2, 126), ("d/0", 2, 252)),
            ]
            metrics = httpx.get(f"{url}/metrics").text  # heads of a stage with ranks move as others do
            assert re.search(r'hetis_redispatch_mode{.*state="own"} 1\.0', metrics)
            stage.kill()
            answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
            assert answer.status_code == 500
            assert answer.json()["error"]["code"] == "engine_failed"
            assert server.wait(60) == 1
    finally:
        stage.kill()
        stage.wait(30)


def test_what_is_wrong_with_stages_is_said_at_once(folder: Path, tmp_path: Path) -> None:
    code, lines = run("-m", str(folder), "--stage", "s1=1", "--stage", "s2=1", "--stage", "s1", "--stage", "s3=x")
    assert code == 2
    assert lines == [
        "hetis-serve: --stage is of a plan's, and needs --plan",
        "hetis-serve: --stage is 's1', must be NAME=NUMBER such as s1=1",
        "hetis-serve: --stage is 's3=x', must be NAME=NUMBER such as s1=1",
        "hetis-serve: --stage: stage 1 is run by two",
    ]
    plan = write(tmp_path, plan_of(stage_of(kv_head_groups_kept=8)))
    code, lines = run("-m", str(folder), "--plan", plan, "--stage", "s1=1", "--port", "0")
    assert (code, lines) == (2, ["hetis-serve: --stage needs --store HOST:PORT, where workers say where they are"])
    store = f"127.0.0.1:{free_port()}"
    code, lines = run("-m", str(folder), "--plan", plan, "--stage", "s1=1", "--port", "0", "--store", store)
    assert (code, lines) == (
        3,
        ["hetis-serve: --stage s1=1: the plan's replica has 1 stages, counted from 0, copies one after another"],
    )
