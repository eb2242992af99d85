"""A fake planner with a realistic cluster, and hetis-plan run against it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from _pytest.capture import CaptureResult
from google.protobuf.timestamp_pb2 import Timestamp

from hetis.formats.documents import dump
from hetis.planner.cli.app import run
from hetis.planner.cli.exit_codes import ExitCode
from hetis.v1 import (
    change_pb2,
    cluster_pb2,
    plan_pb2,
    profile_pb2,
    redispatch_pb2,
    replica_pb2,
    report_pb2,
)
from tests.planner.client.fake_planner import FakePlanner, ready, result, searching, serving
from tests.planner.plans import plan

EXAMPLES = Path(__file__).parents[3] / "examples"

Run = Callable[..., CaptureResult[str]]


@pytest.fixture
def planner() -> Iterator[FakePlanner]:
    with serving(FakePlanner()) as running:
        running.searches = [(0.0, searching(1.2, 1.7)), (0.0, ready())]
        yield running


@pytest.fixture
def fleet(planner: FakePlanner) -> FakePlanner:
    """The planner with a cluster that serves: two nodes, a replica, a re-dispatch, plans, a profile."""
    now = Timestamp(seconds=int(time.time()) - 4)
    planner.clusters["clusters/paper"] = cluster_pb2.Cluster(
        name="clusters/paper",
        etag="v3",
        num_nodes=6,
        num_gpus=12,
        num_connected_nodes=2,
        active_plan="plans/night",
        earlier_plan="plans/day",
        update_time=now,
    )
    for number, state in enumerate((cluster_pb2.NODE_STATE_READY, cluster_pb2.NODE_STATE_LOST)):
        devices = [
            report_pb2.DeviceReport(
                index=index,
                total_blocks=1000,
                used_blocks=(930, 120)[index],
                busy_ratio=0.8,
                clock_hz=1.41e9,
                temperature_c=61,
                throttle_reasons=[report_pb2.THROTTLE_REASON_THERMAL] if index else [],
            )
            for index in range(2)
        ]
        name = f"clusters/paper/nodes/a100-{number}"
        planner.nodes[name] = cluster_pb2.Node(
            name=name,
            state=state,
            draining=bool(number),
            heard_time=now,
            agent_version="0.1.0",
            devices=[] if number else devices,
            replicas=["clusters/paper/replicas/r-1"],
        )
    planner.replicas["clusters/paper/replicas/r-1"] = replica_pb2.Replica(
        name="clusters/paper/replicas/r-1",
        plan="plans/night",
        state=replica_pb2.REPLICA_STATE_SERVING,
        generation=7,
        primary_node="a100-0",
        nodes=["a100-0", "a100-1"],
        report=report_pb2.ReplicaReport(num_running=41, num_waiting=3),
    )
    planner.redispatches["x"] = redispatch_pb2.Redispatch(
        name="clusters/paper/redispatches/0b9f7c1e-1111",
        replica="clusters/paper/replicas/r-1",
        state=redispatch_pb2.REDISPATCH_STATE_DONE,
        num_moves=12,
        kv_bytes=3.2e9,
        makespan_before_s=0.0021,
        makespan_after_s=0.0014,
        triggers=[redispatch_pb2.RedispatchTrigger(kind=redispatch_pb2.TRIGGER_KIND_HIGH_WATER, device="a100-0/0")],
        change=change_pb2.Change(),
        create_time=now,
    )
    for name in ("plans/day", "plans/night"):
        planner.plans[name] = plan_pb2.Plan(
            name=name,
            cluster="clusters/paper",
            state=plan_pb2.PLAN_STATE_READY,
            activation=plan_pb2.ACTIVATION_STATE_INACTIVE,
            result=result(),
            etag="v2",
            create_time=now,
        )
        planner.documents[name] = b'{"kind": "Plan"}'
    planner.plans["plans/night"].activation = plan_pb2.ACTIVATION_STATE_ACTIVE
    planner.profiles["profiles/l4"] = profile_pb2.Profile(
        name="profiles/l4",
        gpu_type="L4",
        usable_bytes=22 * 2**30,
        sources=[profile_pb2.PROFILE_SOURCE_MEASURED],
        held_out_mape=0.041,
        etag="v1",
    )
    return planner


@pytest.fixture
def saved_plan(tmp_path: Path) -> Path:
    """Write a Plan file that states from which cluster it was made."""
    made_from = {"documents": {"cluster": {"name": "Paper"}}}
    path = tmp_path / "plan.json"
    path.write_text(dump(dataclasses.replace(plan(), inputs=made_from), "json"))
    return path


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process at 80 columns without colours, and return its output.

    It must end with ``code``.
    """
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr("hetis.planner.client.channels.SLOW_AFTER_S", 60.0)  # not because the machine is busy
    monkeypatch.delenv("HETIS_DEBUG", raising=False)

    def call(*arguments: str, code: ExitCode = ExitCode.OK) -> CaptureResult[str]:
        capsys.readouterr()
        found = run(list(arguments))
        said = capsys.readouterr()
        assert found == code, said.err
        return said

    return call


@pytest.fixture
def hetis_plan(anywhere: Run, planner: FakePlanner, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command line against the fake planner."""
    monkeypatch.setenv("HETIS_SERVER", planner.address)
    return anywhere
