"""The plan's coefficients are those that the planner dispatches by."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hetis.formats.plan import plan_to_data
from hetis.planner.sources import load_inputs
from hetis.planner.stage_of_plan import load_stage_of_plan
from hetis.runtime.measured.coefficients import with_coefficients
from hetis.runtime.measured.planned import planned_coefficients
from hetis.solver.errors import InvalidProblemError
from hetis.solver.plan import AttentionWorkerPool, Plan
from tests.planner.command_line import EXAMPLES
from tests.runtime.launch.plans import plan_of, stage_of

WORKERS = ("p100-0/0", "p100-0/1", "p100-1/2")


def plan(*, tp: int = 1, workers: tuple[str, ...] = WORKERS) -> Plan:
    """One replica on the H100s of `examples/h100-p100.yaml`, with P100s as attention workers."""
    stage = stage_of(
        gpu="H100-SXM-80GB",
        tp=tp,
        devices=tuple(f"h100/{i}" for i in range(tp)),
        num_layers=32,
        kv_head_groups_kept=5 // tp,
    )
    pool = AttentionWorkerPool(stage=0, gpu="P100-PCIe-12GB", devices=workers, kv_head_groups=3 if tp == 1 else 2)
    loaded = load_inputs(cluster=str(EXAMPLES / "h100-p100.yaml"), model="Llama-3.1-8B", workload="8000/300")
    inputs = {"documents": loaded.inputs.documents(), "digests": loaded.inputs.digests()}
    return replace(plan_of(stage, pools=(pool,), chunk_tokens=512), inputs=inputs)


@pytest.mark.parametrize("tp", [1, 2])
def test_they_are_those_of_the_planners_stage(tp: int, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan_to_data(plan(tp=tp))), encoding="utf-8")
    theirs = load_stage_of_plan(str(path), replica=0, stage=1).snapshot.stage
    ours = planned_coefficients(plan(tp=tp), 0)
    assert set(ours) == {*WORKERS, *(f"h100/{i}" for i in range(tp))}
    nothing = replace(
        theirs, devices=("h100/0", *WORKERS), **{name: 0 * getattr(theirs, name) for name in ("head_s", "call_s")}
    )
    found = with_coefficients(nothing, ours)
    for name in ("head_s", "kv_byte_s", "call_s"):
        pieces, expected = (np.unique(getattr(stage, name), axis=1) for stage in (found, theirs))
        assert pieces == pytest.approx(expected, rel=1e-12)
    assert found.transfer_byte_s[1:] == pytest.approx(theirs.transfer_byte_s[1:])
    assert found.transfer_s[1:] == pytest.approx(theirs.transfer_s[1:])
    assert found.transfer_s[0] == 0.0


def test_a_plan_without_its_documents_says_nothing() -> None:
    assert planned_coefficients(plan_of(stage_of()), 0) == {}


def test_devices_that_the_cluster_lacks_are_named() -> None:
    with pytest.raises(InvalidProblemError, match="the plan has devices that its cluster lacks: p100-9/0"):
        planned_coefficients(plan(workers=("p100-0/0", "p100-9/0", "p100-0/1")), 0)
