"""What a step costs on this machine, measured before the first request: what dispatch goes by, and later steps are
compared with.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import median

import numpy as np

from hetis.runtime.attention.local import LocalDevice
from hetis.runtime.engine.engine import Engine
from hetis.runtime.engine.placement import Placement
from hetis.runtime.engine.request import RequestError, SamplingParams
from hetis.runtime.engine.stage import Stage
from hetis.runtime.measured.calibration import LONGEST_CONTEXT, Calibration, calibrate
from hetis.runtime.measured.coefficients import Coefficients, device_seconds, with_coefficients
from hetis.runtime.measured.following import DeviceCost, Following
from hetis.runtime.server.timing import DenseCost, FloatArray, StepPredictor
from hetis.solver.dispatch.problem import Stage as StageCosts

Clock = Callable[[], float]
_ROUNDS = 9
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What was measured of an engine, and follows it from then on.

    Attributes:
        predictor: of its steps; None where it has several stages, or one in another process.
        following: of the devices of each stage in this process, by its number.
        copy_byte_s: seconds per byte of KV out of the devices of the same stages, shape [D]; 0 of a device that was not
            measured.
    """

    predictor: StepPredictor | None
    following: Mapping[int, Following]
    copy_byte_s: Mapping[int, FloatArray]

    def costs(self) -> list[DeviceCost]:
        """Of all these devices; may be asked from another thread."""
        return [cost for following in self.following.values() for cost in following.costs()]


def measure_engine(
    engine: Engine,
    *,
    planned: Mapping[str, Coefficients] | None = None,
    clock: Clock = time.perf_counter,
    pause: Callable[[float], None] = time.sleep,
) -> Measured:
    """Times every device's attention by itself, then whole steps, whose rest is what is dense and all bookkeeping.

    Dispatch goes by that, and by what steps take from then on. ``planned`` is the first guess, by name of the device:
    it stays for a device that has too few pages to be measured. The engine must be idle, and is again afterwards.
    """
    for part in engine.stages:
        part.placement.change_costs(with_coefficients(part.placement.costs, planned or {}))
    here = [(part, part.stage) for part in engine.stages if isinstance(part.stage, Stage)]
    found = [_measured_stage(part.placement, stage, planned or {}, clock, pause) for part, stage in here]
    predictor = _predictor(engine, clock) if len(engine.stages) == len(here) == 1 else None
    following, copies = dict[int, Following](), dict[int, FloatArray]()
    for (part, stage), calibrations in zip(here, found, strict=True):
        each = [calibrations.get(device.name) for device in stage.devices]
        read_s = [0.0 if one is None else one.read_s for one in each]
        following[part.number] = follow(engine, part.number, predictor, read_s=read_s, clock=clock)
        copies[part.number] = np.array([0.0 if one is None else one.copy_byte_s for one in each])
    return Measured(predictor=predictor, following=following, copy_byte_s=copies)


def follow(
    engine: Engine,
    number: int,
    predictor: StepPredictor | None = None,
    *,
    read_s: Sequence[float],
    clock: Clock = time.perf_counter,
) -> Following:
    """The costs that a stage of ``engine`` dispatches by, and its predictor's, follow what steps take from now on.

    ``number``: of the stage, which is in this process. ``read_s``: seconds to take an answer of each of its devices
    that is there already.
    """
    part = engine.stages[number]
    assert isinstance(part.stage, Stage), "it is in this process"

    def apply(costs: StageCosts) -> None:
        part.placement.change_costs(costs)
        if predictor is not None:
            predictor.costs = costs

    following = Following(part.placement.costs, apply, read_s=read_s, clock=clock)
    if isinstance(part.stage, Stage):
        part.stage.through = following.through
    engine.between_steps.append(following.advance)
    return following


def _measured_stage(
    placement: Placement,
    stage: Stage,
    planned: Mapping[str, Coefficients],
    clock: Clock,
    pause: Callable[[float], None],
) -> Mapping[str, Calibration]:
    """Calibrations of a stage's devices, which it dispatches by from now on."""
    found = calibrate(
        stage.devices,
        groups=len(stage.homes),
        exchange_bytes_per_head=placement.costs.heads.exchange_bytes_per_head,
        primaries=stage.num_ranks,
        clock=clock,
        pause=pause,
    )
    measured = {name: one.coefficients for name, one in found.items()}
    _tell_apart(placement.costs, planned, measured)
    placement.change_costs(with_coefficients(placement.costs, measured))
    return found


def _tell_apart(costs: StageCosts, planned: Mapping[str, Coefficients], measured: Mapping[str, Coefficients]) -> None:
    """Logs how far the machine is from its plan, at one request of the longest context that was measured."""
    groups = np.full(costs.num_devices, float(costs.heads.head_groups))
    heads = groups * costs.heads.queries_per_group
    kv_bytes = groups * LONGEST_CONTEXT * costs.heads.kv_bytes_per_token
    both = [device_seconds(with_coefficients(costs, known), heads, kv_bytes) for known in (planned, measured)]
    for name, planned_s, measured_s in zip(costs.devices, *both, strict=True):
        if name in planned and name in measured and planned_s > 0:
            _log.info("device %s takes %.2g times what the plan says", name, measured_s / planned_s)


def _predictor(engine: Engine, clock: Clock) -> StepPredictor:
    """With the costs that dispatch goes by; what else a step takes is measured."""
    costs, layers, nothing = engine.placement.costs, engine.stage.shape.layers, DenseCost(call_s=0.0, row_s=0.0)
    in_turn = all(isinstance(device, LocalDevice) for device in engine.stage.devices)
    attention = StepPredictor(costs, layers=layers, dense=nothing, in_turn=in_turn)
    return StepPredictor(costs, layers=layers, dense=_rest(engine, attention, clock), in_turn=in_turn)


def _rest(engine: Engine, attention: StepPredictor, clock: Clock) -> DenseCost:
    """Whole steps of one request and of many, less their attention."""
    many = max(2, min(16, engine.options.most_running))
    one_s, many_s = (_rest_s(engine, attention, rows, clock) for rows in (1, many))
    row_s = max(many_s - one_s, 0.0) / (many - 1)
    return DenseCost(call_s=max(one_s - row_s, 0.0), row_s=row_s)


def _rest_s(engine: Engine, attention: StepPredictor, rows: int, clock: Clock) -> float:
    numbers = []
    with suppress(RequestError):  # where there is room for fewer, fewer are measured
        for _ in range(rows):
            numbers.append(engine.add([0, 0], SamplingParams(max_tokens=_ROUNDS + 2, ignore_eos=True)))
    seconds = [0.0]
    while engine.has_work:
        begun_s = clock()
        engine.step()
        taken_s = clock() - begun_s
        known_s = None if engine.last_step is None else attention.step_s(engine.last_step)
        if known_s is not None:
            seconds.append(max(taken_s - known_s, 0.0))
    return median(seconds[1:] or seconds)
