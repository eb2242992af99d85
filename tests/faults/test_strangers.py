"""Strangers that keep to no rule of gRPC cost a planner little memory, and no caller its answer."""

from __future__ import annotations

import asyncio
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from hetis.planner.callers import CallerRole
from hetis.planner.client import AsyncClient
from hetis.planner.service.identity.credentials import create_token
from hetis.v1 import cluster_service_pb2
from tests.planner.service.process import REAL, Process

ROOT = Path(__file__).parents[2]


def resident_mib(pid: int) -> float:
    fields = Path(f"/proc/{pid}/status").read_text().split("VmHWM:")[1].split()
    return int(fields[0]) / 2**10


@pytest.mark.soak
@pytest.mark.parametrize(("kind", "most_mib"), [("resets", 250.0), ("headers", 600.0)])
async def test_calls_that_are_reset_or_have_large_metadata_are_bounded(
    tmp_path: Path, kind: str, most_mib: float
) -> None:
    tokens, expires = tmp_path / "tokens.yaml", datetime.now(UTC) + timedelta(days=1)
    token = create_token(str(tokens), expires=expires, name="admin", role=CallerRole.ADMIN, scope=None)
    options = ["--listen", "127.0.0.1:0", "--store", f"sqlite:///{tmp_path}/hetis.db", "--set", f"tokens={tokens}"]
    options += ["--ready-json", "--status-page", "127.0.0.1:0"]
    with Process(options, folder=tmp_path, module=REAL) as planner:
        address = planner.ready()["listen"][0]
        client = AsyncClient(address, token=token)
        await client.clusters.ListClusters(cluster_service_pb2.ListClustersRequest(), timeout=30)
        before_mib = resident_mib(planner.pid)
        command = ["-m", "tests.faults.raw_strangers", address, "--kind", kind, "--seconds", "15"]
        attack = await asyncio.create_subprocess_exec(sys.executable, *command, cwd=ROOT)
        while attack.returncode is None:
            await client.clusters.ListClusters(cluster_service_pb2.ListClustersRequest(), timeout=30)
            await asyncio.sleep(0.05)
        await client.close()
        assert resident_mib(planner.pid) - before_mib < most_mib
