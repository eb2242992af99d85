"""A replica on a Ray cluster of two nodes. Runs where Ray is installed: pip install 'hetis[ray]'."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from hetis.runtime.engine.generate import generate
from hetis.runtime.engine.request import SamplingParams
from hetis.runtime.server.text import Tokens
from tests.command_line import environment
from tests.runtime.replica.replicas import write_model, write_plan
from tests.runtime.replica.test_command import COMMAND, QUIET, Launched, free_port, is_gone
from tests.runtime.server.live import engine_of

pytest.importorskip("ray", reason="Ray is not installed: hetis-launch ray was NOT TESTED (pip install 'hetis[ray]')")

# Two nodes on this machine, named as the plan's, and their address on stdout; until stdin is closed.
CLUSTER = """
import sys
from ray.cluster_utils import Cluster
common = {"object_store_memory": 80 * 2**20}
cluster = Cluster(initialize_head=True, head_node_args=common | {"num_cpus": 1, "labels": {"hetis-node": "a"}})
cluster.add_node(num_cpus=2, labels={"hetis-node": "b"}, **common)
cluster.wait_for_nodes()
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.fixture
def cluster() -> Iterator[str]:
    told = environment(**QUIET, RAY_USAGE_STATS_ENABLED="0")
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=told
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.communicate()


def test_a_replica_runs_where_the_plan_says_and_leaves_nothing_behind(cluster: str, tmp_path: Path) -> None:
    write_plan(tmp_path)
    model = write_model(tmp_path)
    prompt = Tokens.from_folder(model).encode("on ray")
    (alone,) = generate(engine_of(model, pages=(400,)), [prompt], SamplingParams(max_tokens=30, ignore_eos=True))
    port, log = free_port(), tmp_path / "log"
    command = [*COMMAND, "ray", "--plan", str(tmp_path / "plan.json"), "--model", str(model), "--worker-device", "cpu"]
    command += ["--address", cluster, "--store-port", str(free_port()), "--start-timeout", "120"]
    command += ["--", "--port", str(port)]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment(**QUIET))
    run = Launched(process, log, f"http://127.0.0.1:{port}")
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 30, "temperature": 0, "ignore_eos": True}

    def answer() -> str:
        text: str = httpx.post(f"{run.url}/v1/completions", json=body, timeout=120).json()["choices"][0]["text"]
        return text

    try:
        run.wait_until(run.serves)
        assert run.up() == {"a/0": True, "b/0": True, "b/1": True}
        assert answer() == alone.text
        engine = engine_pid(port)
        os.kill(engine, signal.SIGKILL)
        run.wait_until(lambda: "engine was ended by signal 9; it is started again in 1 s" in run.log())
        run.wait_until(run.serves)
        assert answer() == alone.text
        engine = engine_pid(port)
        process.terminate()
        assert process.wait(120) == 0, run.log()
        assert is_gone(engine)
    finally:
        process.kill()
        process.wait(30)


def engine_pid(port: int) -> int:
    """The process whose command line has our port."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"hetis.runtime.server.main" in words and str(port).encode() in words:
            return int(path.parent.name)
    raise LookupError(f"no engine has port {port}")
