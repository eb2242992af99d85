"""Preparation of re-dispatch's kernels before anybody waits for an answer: loaded, or compiled if not on disk."""

from __future__ import annotations

import numpy as np

from hetis.solver.dispatch.snapshot import DeviceSnapshot, StateSnapshot
from hetis.solver.dispatch.solve import Dispatcher
from hetis.solver.dispatch.warming import small_stage
from hetis.solver.redispatch.problem import RedispatchProblem
from hetis.solver.redispatch.solve import Redispatcher


def compile_redispatch() -> None:
    """Balance two requests, which takes a minute or more the first time on a machine."""
    stage = small_stage()
    snapshot = StateSnapshot(
        stage=stage,
        devices=tuple(DeviceSnapshot(name=name, total_blocks=64) for name in stage.devices),
        ids=("1", "2"),
        context_tokens=np.array([64, 64]),
        remaining_tokens=np.array([64, 64]),
        groups=np.array([[2, 0], [2, 0]]),
    )
    Redispatcher(Dispatcher(stage)).solve(RedispatchProblem(snapshot=snapshot, num_layers=1, link_byte_s=np.zeros(2)))
