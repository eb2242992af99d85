"""A plan of ``hetis-plan place`` starts by ``hetis-serve --plan`` and answers, stages and ranks included."""

from __future__ import annotations

import json
from pathlib import Path

import httpx

from hetis.runtime.engine.generate import generate
from hetis.runtime.engine.request import SamplingParams
from hetis.runtime.server.text import Tokens
from tests.command_line import command_of, run_command
from tests.runtime.server.live import engine_of
from tests.runtime.server.test_command import serving

CLUSTER = """\
apiVersion: hetis/v1
kind: Cluster
name: two types
nodes:
  - {name: a, gpus: [{type: L4, count: 2}]}
  - {name: b, gpus: [{type: T4, count: 2}]}
network: {bandwidth: 25Gbps, latency: 20us}
"""
# A model this small would run on one GPU: the wishes make a replica of all four.
WISHES = ("--pin", "replicas=1", "--pin", "type=L4:use=2", "--pin", "type=T4:use=2", "--forbid", "tp=1")


def test_a_plan_with_a_pipeline_of_ranks_answers_as_the_whole_model(folder: Path, tmp_path: Path) -> None:
    cluster, plan = tmp_path / "cluster.yaml", tmp_path / "plan.json"
    cluster.write_text(CLUSTER, encoding="utf-8")
    where = ("--cluster", str(cluster), "--model", str(folder), "--workload", "64/64", "--out", str(plan))
    done = run_command(command_of("hetis.planner.cli"), "place", *where, *WISHES, "--forbid", "workers", timeout_s=600)
    assert done.returncode == 0, done.stderr
    (replica,) = json.loads(plan.read_text(encoding="utf-8"))["replicas"]
    assert [stage["tp"] for stage in replica["stages"]] == [2, 2]
    options = ("-m", str(folder), "--plan", str(plan), "--replica", "0", "--kv-tokens", "2000", "--seats", "4")
    with serving(*options) as (_, url, _):
        devices = httpx.get(f"{url}/hetis/heads").json()["devices"]
        assert [device["name"] for device in devices] == [d for s in replica["stages"] for d in s["devices"]]
        body = {"model": folder.name, "prompt": "as planned", "max_tokens": 40, "temperature": 0, "ignore_eos": True}
        text = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
    prompt = Tokens.from_folder(folder).encode("as planned")
    (wanted,) = generate(engine_of(folder), [prompt], SamplingParams(max_tokens=40, ignore_eos=True))
    assert text == wanted.text
