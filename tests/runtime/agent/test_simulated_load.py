"""What the simulated engine reads from its control file, and the requests that come to it by its role."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.simulated_engine.engine import SimulatedEngine
from examples.simulated_engine.replica import Control, ControlFile
from hetis.v1.executor_service_pb2 import ApplyAssignmentRequest
from hetis.v1.replica_pb2 import Assignment, AssignmentGoal, ReplicaRole
from hetis.v1.report_pb2 import AssignmentState
from tests.runtime.agent.builders import REPLICA, assignment, stage_model
from tests.runtime.agent.test_simulated import BUSY, engine_with, replica


def test_a_control_file_is_read_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "control.yaml"
    control = ControlFile(path)
    assert not control.look()
    path.write_text("rate_rps: 5\nslow: {w/0: 2}\n", encoding="utf-8")
    assert control.look()
    assert (control.control.rate_rps, control.control.slow) == (5, {"w/0": 2})
    assert not control.look()
    path.write_text("rate: 5\n", encoding="utf-8")
    assert not control.look()
    assert control.control.rate_rps == 5


@pytest.mark.parametrize("data", [{"rate_rps": -1}, {"pause": 1}, {"slow": {"a": 0}}, {"output_tokens": 0}, ["x"]])
def test_a_wrong_control_changes_nothing_and_is_named(
    data: object, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "control.yaml"
    path.write_text(json.dumps(data), encoding="utf-8")
    control = ControlFile(path)
    assert not control.look()
    assert control.control == Control()
    assert f"control file {path} is not used: " in caplog.text


def prefill_assignment(goal: AssignmentGoal.ValueType = AssignmentGoal.ASSIGNMENT_GOAL_SERVE) -> Assignment:
    what = assignment(goal=goal, workers=())
    what.shape.role = ReplicaRole.REPLICA_ROLE_PREFILL
    del what.stages[:]  # a prefill replica has no head groups to place
    return what


def test_a_prefill_replica_serves_without_a_decode_request_and_stops_when_it_is_drained() -> None:
    engine = SimulatedEngine("p", 4, engine_id="e")
    engine.control = BUSY
    engine.apply_assignment(ApplyAssignmentRequest(epoch=1, generation=1, assignment=prefill_assignment()), 0.0)
    engine.step(60.0)
    report = replica(engine, 60.0)
    assert report.assignment_state == AssignmentState.ASSIGNMENT_STATE_SERVING
    assert report.is_primary
    assert (report.num_running, report.num_waiting, report.num_finished, len(report.stages)) == (0, 0, 0, 0)
    assert not engine.head_maps(REPLICA).head_maps
    drained = prefill_assignment(AssignmentGoal.ASSIGNMENT_GOAL_DRAIN)
    answer = engine.apply_assignment(ApplyAssignmentRequest(epoch=1, generation=2, assignment=drained), 60.0)
    assert answer.state == AssignmentState.ASSIGNMENT_STATE_STOPPED


def test_requests_come_run_and_finish() -> None:
    engine = engine_with(stage_model(blocks=20_000))
    engine.step(60.0)
    report = replica(engine, 60.0)
    assert report.assignment_state == AssignmentState.ASSIGNMENT_STATE_SERVING
    assert 20 * 60 * 0.8 < report.num_finished + report.num_running + report.num_waiting < 20 * 60 * 1.2
    assert report.num_finished > 500
    assert report.tpot_s == pytest.approx(0.02, rel=0.2)
    assert report.num_preempted == 0
