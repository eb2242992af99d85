"""How long a decode step should take, by what was measured before: beside how long it did."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hetis.runtime.engine.step import Step
from hetis.runtime.measured.coefficients import device_seconds
from hetis.solver.dispatch.problem import Stage as StageCosts

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseCost:
    """Seconds of a step without its attention (dense layers, sampling, bookkeeping): ``call_s + row_s * rows``."""

    call_s: float
    row_s: float

    def seconds(self, rows: int) -> float:
        return self.call_s + self.row_s * rows


class StepPredictor:
    """Predicts steps that decode: dense part, and per layer the attention of the devices.

    Devices of their own compute at the same time, so that the slowest counts (the dispatcher's z). Devices in the
    engine's process compute one after the other: their times are added.
    """

    def __init__(self, costs: StageCosts, *, layers: int, dense: DenseCost, in_turn: bool) -> None:
        """``in_turn``: the devices are all in this process."""
        self.costs, self.layers, self.dense, self.in_turn = costs, layers, dense, in_turn

    def step_s(self, step: Step) -> float | None:
        """Seconds; None where the step prefills, of which nothing is known."""
        if step.chunks or not len(step.requests):
            return None
        heads, kv_bytes = self._load(step)
        devices_s = device_seconds(self.costs, heads, kv_bytes)
        layer_s = float(devices_s.sum() if self.in_turn else devices_s.max())
        return self.layers * layer_s + self.dense.seconds(len(step.requests))

    def _load(self, step: Step) -> tuple[FloatArray, FloatArray]:
        """Query heads and KV bytes read per layer on each device, shape [D]."""
        shape, num = self.costs.heads, len(self.costs.devices)
        owners = step.heads.ravel()
        tokens = np.repeat(step.positions[: len(step.requests)] + 1, step.heads.shape[1])
        heads = np.bincount(owners, minlength=num) * shape.queries_per_group
        kv_bytes = np.bincount(owners, weights=tokens, minlength=num) * shape.kv_bytes_per_token
        return heads.astype(np.float64), kv_bytes.astype(np.float64)
