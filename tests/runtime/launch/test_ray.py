"""A replica on a Ray cluster of two nodes. Runs where Ray is installed: pip install 'hetis[ray]'."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.processes import free_ports
from tests.command_line import environment
from tests.engines.plans import write_config, write_plan
from tests.runtime.launch.launching import COMMAND, FAKE, Launched, is_gone

pytest.importorskip("ray", reason="Ray is not installed: hetis-launch ray was NOT TESTED (pip install 'hetis[ray]')")

# Starts two nodes on this machine, named like the plan's, and prints their address; runs until stdin is closed.
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
    told = environment(OMP_NUM_THREADS="1", RAY_USAGE_STATS_ENABLED="0")
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=told
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.communicate()


def test_a_replica_runs_where_the_plan_says_and_leaves_nothing_behind(cluster: str, tmp_path: Path) -> None:
    plan, model = write_plan(tmp_path), write_config(tmp_path / "tiny")
    port, log = free_ports(3), tmp_path / "log"
    command = [*COMMAND, "ray", "--plan", str(plan), "--model", str(model), "--device", "cpu", "--vllm", FAKE]
    command += ["--address", cluster, "--start-timeout", "120", "--folder", str(tmp_path / "files")]
    command += ["--worker-port", str(port + 1), "--", "--port", str(port)]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment(OMP_NUM_THREADS="1"))
    run = Launched(process, log, f"http://127.0.0.1:{port}")
    try:
        run.wait_until(run.serves)
        assert (tmp_path / "files" / "worker.key").stat().st_mode & 0o777 == 0o600
        first = vllm_pid(port)
        os.kill(first, signal.SIGKILL)
        run.wait_until(lambda: "vllm was ended by signal 9; restarting it in 1 s" in run.log())
        run.wait_until(run.serves)
        second = vllm_pid(port)
        process.terminate()
        assert process.wait(120) == 0, run.log()
        assert is_gone(first)
        assert is_gone(second)
    finally:
        process.kill()
        process.wait(30)


def vllm_pid(port: int) -> int:
    """Return the process whose command line has our port."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if any(word.endswith(b"fake_vllm.py") for word in words) and str(port).encode() in words:
            return int(path.parent.name)
    raise LookupError(f"no process has port {port}")
