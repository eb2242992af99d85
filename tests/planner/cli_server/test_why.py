"""why: what blocks a replica, and what happened to it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.cli.server.why import blocks_of
from hetis.v1 import cluster_pb2, failure_pb2, replica_pb2, report_pb2
from tests.planner.cli_server.conftest import Run
from tests.planner.client.fake_planner import FakePlanner

NAME = "clusters/paper/replicas/r-1"
LOG = "stage-0 exited with 1; the end of stage-0.log:\nCUDA out of memory"


def waiting(*parts: dict[str, Any], **given: Any) -> replica_pb2.Replica:
    shown = [
        replica_pb2.ReplicaPart(**{"node": "a", "node_state": cluster_pb2.NODE_STATE_READY} | one) for one in parts
    ]
    usual = {"plan": "plans/night", "state": replica_pb2.REPLICA_STATE_STARTING, "assigned_generation": 3}
    return replica_pb2.Replica(name=NAME, parts=shown, **usual | given)


@pytest.mark.parametrize(
    ("replica", "condition", "remedy"),
    [
        (waiting(plan=""), "no plan contains it", "get plans --cluster paper"),
        (waiting({"node_state": cluster_pb2.NODE_STATE_EXPECTED}), "no agent ever connected as node a", "/nodes/a"),
        (waiting({"node_state": cluster_pb2.NODE_STATE_LOST}), "node a is lost", "hetis-plan get plans"),
        (waiting({"node_state": cluster_pb2.NODE_STATE_SUSPECT}), "agent of node a is late", "wait"),
        (waiting({"node_state": cluster_pb2.NODE_STATE_UNDECLARED}), "does not name node a", "hetis-plan apply"),
        (waiting({"failure": failure_pb2.Failure(message=LOG)}), "CUDA out of memory", "mend"),
        (waiting({"held_generation": 2}), "has not taken its last assignment", "log"),
        (waiting({"held_generation": 3, "state": report_pb2.ASSIGNMENT_STATE_LOADING}), "loads weights", "watch"),
        (waiting({"held_generation": 3, "draining": True}), "is being drained", "hetis-plan undrain clusters/paper"),
        (waiting(assigned_generation=0, waits_for=["clusters/paper/replicas/r-0"]), "r-0 still holds GPUs", "why"),
    ],
)
def test_each_condition_has_a_remedy(replica: replica_pb2.Replica, condition: str, remedy: str) -> None:
    (block,) = blocks_of(replica)
    assert condition in block.condition
    assert remedy in block.remedy


def test_what_serves_with_all_its_devices_is_not_blocked() -> None:
    part = {"held_generation": 3, "state": report_pb2.ASSIGNMENT_STATE_SERVING}
    assert not [*blocks_of(waiting(part, part, state=replica_pb2.REPLICA_STATE_SERVING))]


def test_the_answer_fits_80_columns_and_is_data_too(fleet: FakePlanner, hetis_plan: Run) -> None:
    failure = failure_pb2.Failure(message=LOG)
    replica = waiting({"failure": failure}, state=replica_pb2.REPLICA_STATE_FAILED)
    replica.events.add(time=Timestamp(seconds=1), state=replica_pb2.REPLICA_STATE_STARTING, goal="ASSIGNMENT_GOAL_LOAD")
    replica.events.add(time=Timestamp(seconds=2), state=replica_pb2.REPLICA_STATE_FAILED, failure=failure)
    fleet.replicas[NAME] = replica
    out = hetis_plan("why", "r-1").out
    assert max(map(len, out.splitlines())) <= 80
    blocks, happened = out.split("What blocks it")[1].split("What happened")
    assert "CUDA out of memory" in blocks
    assert happened.index("FAILED") < happened.index("STARTING, to load")
    data = json.loads(hetis_plan("why", NAME, "-o", "json").out)
    assert [event["state"] for event in data["events"]] == ["REPLICA_STATE_STARTING", "REPLICA_STATE_FAILED"]
    assert "CUDA out of memory" in data["blocks"][0]["condition"]
    hetis_plan("why", "r-9", code=ExitCode.INVALID)
