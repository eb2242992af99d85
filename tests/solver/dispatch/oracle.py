"""Dispatch by trying everything, and the makespan of a placement by its definition: slow and plain."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np

from hetis.solver.dispatch.dispatch_problem import DispatchProblem, IntArray


def makespan_of(problem: DispatchProblem, groups: IntArray) -> float:
    """Return the seconds of the slowest device or network card with ``groups`` [J, D]."""
    stage, load, requests = problem.stage, problem.load, problem.requests
    slowest, heads_on_workers = 0.0, 0
    for i in range(stage.num_devices):
        heads = int(load.heads[i])
        kv_bytes = float(load.kv_bytes[i])
        for j in range(len(requests.ids)):
            heads += int(groups[j, i]) * stage.heads.queries_per_group
            kv_bytes += int(groups[j, i]) * int(requests.context_tokens[j]) * stage.heads.kv_bytes_per_token
        if heads == 0:
            continue
        is_primary = stage.has_primary_at(i)
        n = s = 1
        if is_primary and stage.primary is not None:
            n, s = stage.primary.tp, min(stage.primary.tp, stage.heads.head_groups)
        seconds = max(
            float(a / n * heads + b / s * kv_bytes + c)
            for a, b, c in zip(stage.head_s[i], stage.kv_byte_s[i], stage.call_s[i], strict=True)
        )
        if not is_primary:
            heads_on_workers += heads
            exchanged = stage.heads.exchange_bytes_per_head * heads
            seconds += float(stage.transfer_byte_s[i] * exchanged + stage.transfer_s[i])
        slowest = max(slowest, seconds)
    if stage.primary is not None and heads_on_workers > 0:
        exchanged = stage.heads.exchange_bytes_per_head * heads_on_workers
        slowest = max(slowest, stage.primary.nic_byte_s * exchanged + stage.primary.nic_s)
    return slowest


def assert_feasible(problem: DispatchProblem, groups: IntArray, unplaced: set[int]) -> None:
    """Check that groups are whole, complete for placed requests, zero for others, within memory and in units."""
    stage = problem.stage
    assert groups.shape == (len(problem.requests.ids), stage.num_devices)
    assert np.all(groups >= 0)
    for j in range(len(problem.requests.ids)):
        assert groups[j].sum() == (0 if j in unplaced else stage.heads.head_groups), f"request {j}"
    blocks = problem.requests.blocks(stage.heads.block_tokens)
    for i in range(stage.num_devices):
        assert groups[:, i] @ blocks <= max(0, problem.load.free_blocks[i]), f"memory of device {i}"
    if stage.primary is not None:
        assert not np.any(groups[:, stage.primary.device] % stage.primary_groups)


def best_makespan(problem: DispatchProblem) -> float:
    """Return the least makespan of a placement of all requests; infinite if there is none."""
    stage = problem.stage
    splits = list(_splits(stage.heads.head_groups, stage.num_devices))
    blocks = problem.requests.blocks(stage.heads.block_tokens)
    best = math.inf
    for rows in itertools.product(splits, repeat=len(problem.requests.ids)):
        groups = np.array(rows, np.int64).reshape(len(problem.requests.ids), stage.num_devices)
        if np.any(blocks @ groups > np.maximum(0, problem.load.free_blocks)):
            continue
        if stage.primary is not None and np.any(groups[:, stage.primary.device] % stage.primary_groups):
            continue
        best = min(best, makespan_of(problem, groups))
    return best


def _splits(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Yield all ways to write ``total`` as an ordered sum of ``parts`` numbers >= 0."""
    if parts == 1:
        yield (total,)
        return
    for first in range(total + 1):
        for rest in _splits(total - first, parts - 1):
            yield (first, *rest)
