"""Re-dispatch by trying every placement: obviously right, but only for tiny stages."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np

from hetis.solver.dispatch.dispatch_problem import FloatArray, IntArray
from hetis.solver.dispatch.snapshot import DeviceStatus, StateSnapshot
from hetis.solver.redispatch.redispatch_problem import RedispatchProblem


def least_objective_s(problem: RedispatchProblem, *, horizons: tuple[int, ...], short_s: FloatArray) -> float:
    """Return the least objective over all placements in whole groups that memory, budget and devices allow."""
    snapshot = problem.snapshot
    stage = snapshot.stage
    per_request = [list(_spreads(stage.heads.head_groups, stage.num_devices)) for _ in snapshot.ids]
    best = np.inf
    for chosen in itertools.product(*per_request):
        x = np.array(chosen, np.int64).reshape(len(snapshot.ids), stage.num_devices)
        if is_allowed(problem, x):
            best = min(best, objective_s(problem, x, horizons=horizons, short_s=short_s))
    return best


def is_allowed(problem: RedispatchProblem, x: IntArray) -> bool:
    snapshot = problem.snapshot
    moved_bytes = 0.0
    for j, i in np.ndindex(x.shape):
        arrives = max(0, int(x[j, i] - snapshot.groups[j, i]))
        if arrives and snapshot.devices[i].status is not DeviceStatus.OK:
            return False
        if snapshot.stage.has_primary_at(i) and x[j, i] % snapshot.stage.primary_groups:
            return False
        moved_bytes += arrives * bytes_per_group(problem, j)
    used = [sum(int(x[j, i]) * blocks_of(snapshot, j, 0) for j in range(len(x))) for i in range(x.shape[1])]
    drains = any(device.status is DeviceStatus.DRAINING for device in snapshot.devices)
    fits = True
    for n, before, device in zip(used, snapshot.used_blocks().tolist(), snapshot.devices, strict=True):
        mark = device.total_blocks if drains else max(before, int(device.high_water * device.total_blocks))
        fits = fits and n <= mark
    return fits and moved_bytes <= problem.budget_bytes


def objective_s(problem: RedispatchProblem, x: IntArray, *, horizons: tuple[int, ...], short_s: FloatArray) -> float:
    snapshot = problem.snapshot
    moving_s = 0.0
    for j, i in np.ndindex(x.shape):
        steps = max(1.0, problem.patience * int(snapshot.remaining_tokens[j]))
        seconds = abs(int(x[j, i] - snapshot.groups[j, i])) * bytes_per_group(problem, j) * problem.link_byte_s[i] / 2
        moving_s += seconds / (problem.num_layers * steps)
    return makespan_s(snapshot, x) + moving_s + short_cost_s(problem, x, horizons=horizons, short_s=short_s)


def short_cost_s(problem: RedispatchProblem, x: IntArray, *, horizons: tuple[int, ...], short_s: FloatArray) -> float:
    snapshot, cost_s = problem.snapshot, 0.0
    for i, device in enumerate(snapshot.devices):
        worst = 0.0
        for t in horizons:
            limit = 0 if device.status is DeviceStatus.DRAINING else device.total_blocks
            runs = [math.exp(-t / max(1, int(remaining))) for remaining in snapshot.remaining_tokens]
            blocks = sum(int(x[j, i]) * blocks_of(snapshot, j, t) * runs[j] for j in range(len(x)))
            worst = max(worst, blocks - limit)
        cost_s += worst * float(short_s[i])
    return cost_s


def makespan_s(snapshot: StateSnapshot, x: IntArray) -> float:
    stage, shape = snapshot.stage, snapshot.stage.heads
    slowest = 0.0
    worker_heads = 0.0
    for i in range(stage.num_devices):
        heads = float(x[:, i].sum()) * shape.queries_per_group
        if not heads:
            continue
        num_bytes = sum(float(x[j, i] * snapshot.context_tokens[j]) for j in range(len(x))) * shape.kv_bytes_per_token
        exchange_s = stage.transfer_byte_s[i] * shape.exchange_bytes_per_head * heads + stage.transfer_s[i]
        if stage.primary is not None and stage.has_primary_at(i):
            heads, num_bytes, exchange_s = heads / stage.primary.tp, num_bytes / stage.primary_groups, 0.0
        else:
            worker_heads += heads
        pieces = stage.head_s[i] * heads + stage.kv_byte_s[i] * num_bytes + stage.call_s[i]
        slowest = max(slowest, float(pieces.max()) + exchange_s)
    if stage.primary is not None and worker_heads:
        exchanged = shape.exchange_bytes_per_head * worker_heads
        slowest = max(slowest, stage.primary.nic_byte_s * exchanged + stage.primary.nic_s)
    return slowest


def bytes_per_group(problem: RedispatchProblem, j: int) -> float:
    snapshot = problem.snapshot
    return float(snapshot.context_tokens[j]) * snapshot.stage.heads.kv_bytes_per_token * problem.num_layers


def blocks_of(snapshot: StateSnapshot, j: int, t: int) -> int:
    tokens, block = int(snapshot.context_tokens[j]) + t, snapshot.stage.heads.block_tokens
    return (tokens + block - 1) // block


def _spreads(groups: int, devices: int) -> Iterator[tuple[int, ...]]:
    if devices == 1:
        yield (groups,)
        return
    for here in range(groups + 1):
        for rest in _spreads(groups - here, devices - 1):
            yield (here, *rest)
