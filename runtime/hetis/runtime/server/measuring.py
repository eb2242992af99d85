"""What a step costs on this machine, measured once before the first request: what later steps are compared with."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import combinations
from statistics import median

import numpy as np
import torch

from hetis.runtime.attention.device import AttentionDevice, DeviceStep
from hetis.runtime.attention.local import LocalDevice
from hetis.runtime.engine.engine import Engine
from hetis.runtime.engine.request import RequestError, SamplingParams
from hetis.runtime.kv.shape import SequenceKey
from hetis.runtime.server.timing import DenseCost, FloatArray, StepPredictor
from hetis.solver.dispatch.problem import Primary
from hetis.solver.dispatch.problem import Stage as StageCosts

Clock = Callable[[], float]
_ROUNDS = 9
_OWN = 2**62  # number of the made-up requests that are measured with
_MOST_TOKENS = 512  # of their contexts: enough to see what reading KV costs, soon filled


def measure_steps(engine: Engine, *, clock: Clock = time.perf_counter) -> StepPredictor:
    """Times every device's attention by itself, then whole steps, whose rest is what is dense and all bookkeeping.

    The engine must be idle, and is again afterwards. Medians of several rounds count.
    """
    stage, old = engine.stage, engine.placement.costs
    fits = [_attention(device, engine.config.kv_heads, clock) for device in stage.devices]
    costs = StageCosts(
        heads=old.heads,
        devices=old.devices,
        head_s=np.array([[fit[0]] for fit in fits]),
        kv_byte_s=np.array([[fit[1]] for fit in fits]),
        call_s=np.array([[fit[2]] for fit in fits]),
        # What an exchange takes is in the measured calls.
        transfer_byte_s=np.zeros(len(fits)),
        transfer_s=np.zeros(len(fits)),
        primary=Primary(device=0),
    )
    in_turn = all(isinstance(device, LocalDevice) for device in stage.devices)
    layers, nothing = stage.shape.layers, DenseCost(call_s=0.0, row_s=0.0)
    attention = StepPredictor(costs, layers=layers, dense=nothing, in_turn=in_turn)
    return StepPredictor(costs, layers=layers, dense=_rest(engine, attention, clock), in_turn=in_turn)


def nonnegative_fit(matrix: FloatArray, values: FloatArray) -> FloatArray:
    """Least squares with coefficients >= 0, by trying every set of columns: there are three."""
    columns = matrix.shape[1]
    best, least = np.zeros(columns), float(values @ values)
    for size in range(1, columns + 1):
        for chosen in map(list, combinations(range(columns), size)):
            found = np.linalg.lstsq(matrix[:, chosen], values, rcond=None)[0]
            error = float(np.square(matrix[:, chosen] @ found - values).sum())
            if (found >= 0).all() and error < least:
                best, least = np.zeros(columns), error
                best[chosen] = found
    return best


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


def _attention(device: AttentionDevice, groups: int, clock: Clock) -> FloatArray:
    """Seconds per query head, per KV byte and per call of one layer, shape [3]."""
    shape = device.shape
    rows, seconds = [], []
    for sequences, tokens in _points(device, groups):
        heads = list(range(sequences))
        kv = torch.zeros(sequences, shape.layers, tokens, shape.head_dim, dtype=shape.torch_dtype)
        try:
            device.adopt(_OWN, 0, heads, 0, kv, kv)
            seconds.append(_layer_s(device, heads, tokens, clock))
        finally:
            device.drop([SequenceKey(_OWN, 0, head) for head in heads])
        token_bytes = 2 * shape.head_dim * shape.torch_dtype.itemsize
        rows.append([sequences * shape.queries_per_group, sequences * (tokens + 1) * token_bytes, 1.0])
    if not rows:
        return np.zeros(3)
    matrix, values = np.array(rows), np.array(seconds)
    weights = 1 / np.maximum(values, 1e-9)  # relative errors: short calls count as much as long ones
    scale = matrix.max(axis=0)
    found: FloatArray = nonnegative_fit(matrix / scale * weights[:, None], values * weights) / scale
    return found


def _points(device: AttentionDevice, groups: int) -> list[tuple[int, int]]:
    """Numbers of sequences and positions to measure, as far as the device's pages reach."""
    wanted = [(count, tokens) for count in (1, groups, 4 * groups) for tokens in (15, 127, _MOST_TOKENS - 1)]
    return [(n, t) for n, t in wanted if n * device.shape.pages(t + 1) <= device.num_pages]


def _layer_s(device: AttentionDevice, heads: Sequence[int], tokens: int, clock: Clock) -> float:
    shape, num = device.shape, len(heads)
    step = DeviceStep(
        epoch=0,
        number=0,
        requests=np.full(num, _OWN, np.int64),
        incarnations=np.zeros(num, np.int64),
        heads=np.array(heads, np.int64),
        positions=np.full(num, tokens, np.int64),
    )
    q = torch.zeros(num, shape.queries_per_group, shape.head_dim, dtype=shape.torch_dtype)
    k = torch.zeros(num, shape.head_dim, dtype=shape.torch_dtype)

    def once() -> None:
        device.begin(step)
        for layer in range(shape.layers):
            device.attend(layer, q, k, k).wait()
        device.finish(0)

    with torch.inference_mode():
        return _median_s(once, clock) / shape.layers


def _median_s(run: Callable[[], None], clock: Clock) -> float:
    run()  # what is compiled or allocated once
    seconds = []
    for _ in range(_ROUNDS):
        begun_s = clock()
        run()
        seconds.append(clock() - begun_s)
    return median(seconds)
