"""A client in another language makes a plan and reads it back, with reflection and the published protos only."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fleets import fleet
from tests.planner.service.process import REAL, Process

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CLUSTER = fleet("two-nodes", "2 l4: 2 L4", network="{bandwidth: 25Gbps, latency: 20us}")


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the client and its packages, which npm fetches once and keeps for the next run."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("NOT TESTED: node and npm are missing, so no client in another language was run")
    kept = Path(tempfile.gettempdir()) / f"hetis-node-client-{os.getuid()}-{_fingerprint()}"
    if not (kept / "installed").exists():
        made = tmp_path_factory.mktemp("node_client")
        shutil.copy(HERE / "package.json", made)
        fetched = subprocess.run(
            [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts"],
            cwd=made,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        if fetched.returncode != 0:
            pytest.skip(f"NOT TESTED: npm cannot fetch @grpc/grpc-js: {fetched.stderr.strip()[-200:]}")
        (made / "installed").touch()
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(made, kept)
    for name in ("client.js", "reflection.proto"):
        shutil.copy(HERE / name, kept)
    return kept / "client.js"


def _fingerprint() -> str:
    return hashlib.sha256((HERE / "package.json").read_bytes()).hexdigest()[:12]


@pytest.fixture
def planner(tmp_path: Path) -> Iterator[str]:
    """Yield the address of a real planner on a free loopback port."""
    arguments = ["--listen", "127.0.0.1:0", "--status-page", "off", "--ready-json"]
    with Process(arguments, folder=tmp_path, module=REAL) as process:
        yield process.ready()["listen"][0]
        process.signal(signal.SIGTERM)
        assert process.end()[0] == 0


def run(client: Path, planner: str, cluster: Path) -> dict[str, Any]:
    done = subprocess.run(
        ["node", str(client), planner, str(ROOT / "proto"), str(cluster)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_node_client_makes_a_plan_watches_it_and_reads_it_back(client: Path, planner: str, tmp_path: Path) -> None:
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(CLUSTER)
    found = run(client, planner, cluster)
    assert {"hetis.v1.ClusterService", "hetis.v1.PlanService", "hetis.v1.AgentService"} <= set(found["services"])
    assert found["cluster"] == {"name": "clusters/node", "num_gpus": "4"}
    assert found["created"]["name"] == found["again"] == "plans/node"
    assert found["sequences"] == sorted(set(found["sequences"]), key=int)
    assert found["states"][-1] == found["plan"]["state"] == "PLAN_STATE_READY"
    plan = found["plan"]
    assert 0 < plan["value"] <= plan["bound"] * (1 + 1e-9)
    assert plan["unit"] == "requests/s"
    assert plan["devices"]
    assert set(plan["devices"]) <= {f"l4-{node}/{index}" for node in range(2) for index in range(2)}
    assert plan["document_kind"] == "Plan"
    assert plan["labels"] == {"from": "node"}
    assert found["missing"] == {"code": 5, "details": "plans/none does not exist"}
    assert found["endless"]["code"] == 3  # a call without a deadline is refused
    assert found["same_methods"]
