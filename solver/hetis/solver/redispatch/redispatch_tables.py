"""A re-dispatch problem as arrays; its letters are those of `hetis.solver.redispatch.redispatch_problem`."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from hetis.solver.backends.compiled import kernel_of
from hetis.solver.dispatch.dispatch_problem import BoolArray, FloatArray, IntArray
from hetis.solver.dispatch.loaded_stage import costs_of, device_s, running_load
from hetis.solver.dispatch.snapshot import DeviceStatus, StateSnapshot
from hetis.solver.redispatch.redispatch_problem import RedispatchProblem

_HERE = Path(__file__).parent
kernel = kernel_of(_HERE, _HERE.parent / "dispatch")  # kernels here call those of dispatch

EXACT = 4.0  # number of times a block on a draining device can be moved before staying would be cheaper


class RedispatchTables(NamedTuple):
    """The arrays of a problem with N requests, D devices, K affine pieces and H horizons.

    Requests with groups under way are part of ``base``. They run where they will be and hold blocks at both ends, which
    ``room`` and ``limit`` exclude.
    """

    now: IntArray  # [N, D] head groups; 0 for requests with groups under way
    alpha: FloatArray  # [D, K] seconds per head group
    beta: FloatArray  # [D, K] seconds per token of a head group
    base: FloatArray  # [D, K] constants, and the time of requests with groups under way
    open_at: FloatArray  # [D] -inf if such requests are there, otherwise the least time of using the device
    unit: IntArray  # [D] head groups taken at once
    primary: int  # index of the primary; -1: none
    nic_base: float
    nic_group_s: float
    on_workers: int  # groups on workers that are not part of `now`
    takes: BoolArray  # [D] devices that groups may move to
    context: FloatArray  # [N] tokens
    blocks: IntArray  # [N] KV blocks per group now
    later: FloatArray  # [H, N] expected KV blocks per group at the horizons
    mark: IntArray  # [D] blocks up to which moves fill a device
    room: IntArray  # [D] blocks that may be in use: the mark, or more if more is in use already
    limit: FloatArray  # [H, D] blocks that exist at the horizons, 0 on draining devices
    charge: FloatArray  # [N, D] lambda_j bytes_j link_i / 2: seconds per layer and step for a group in or out
    num_bytes: FloatArray  # [N] KV bytes per group in all layers
    steps: FloatArray  # [N] steps within which a move must pay back, at least 1
    short_s: FloatArray  # [D] P, seconds per layer and step for a block above the limit
    budget: float  # maximum bytes to move
    link_byte_s: FloatArray  # [D] seconds per byte into or out of each device
    num_layers: int


def tables_of(problem: RedispatchProblem) -> RedispatchTables:
    """Tabulate a problem."""
    snapshot = problem.snapshot
    stage, shape = snapshot.stage, snapshot.stage.heads
    costs = costs_of(stage)
    blocks, coming = snapshot.context_blocks(), snapshot.incoming()
    # Moving groups count at their targets; the rest of their request stays put, as it may be uneven on the primary.
    leaving = np.zeros_like(coming)
    index = {name: j for j, name in enumerate(snapshot.ids)}
    for move in snapshot.moves:
        leaving[index[move.request], move.source] += move.groups
    is_busy = leaving.sum(axis=1, keepdims=True) > 0
    now, fixed = np.where(is_busy, 0, snapshot.groups), np.where(is_busy, snapshot.groups - leaving + coming, 0)
    both_ends = np.where(is_busy, snapshot.groups + coming, 0)
    fixed_bytes = (snapshot.context_tokens @ fixed).astype(np.float64) * shape.kv_bytes_per_token
    running = running_load(costs, fixed.sum(axis=0) * costs.queries, fixed_bytes)

    later = _later(snapshot, horizons(problem))
    total, draining = snapshot.total_blocks(), [d.status is DeviceStatus.DRAINING for d in snapshot.devices]
    is_full = np.isin(np.arange(len(total)), list(problem.full))
    all_now = later @ (now + both_ends)
    limit = np.where(is_full, np.minimum(total, all_now - snapshot.groups.sum(axis=0)), np.where(draining, 0, total))
    limit = np.maximum(0.0, limit - later @ both_ends)

    num_bytes = snapshot.context_tokens.astype(np.float64) * (shape.kv_bytes_per_token * problem.num_layers)
    steps = np.maximum(1.0, problem.patience * snapshot.remaining_tokens)
    charge = np.outer(num_bytes / (problem.num_layers * steps), problem.link_byte_s / 2)
    group_s = np.max(costs.alpha + costs.beta * snapshot.context_tokens.max(initial=1), axis=(0, 1))
    nic_group_s = running.nic_group_s if costs.primary >= 0 else 0.0
    fewest = max(1e-3, float(later.min(initial=1.0, where=later > 0)))
    refill_s = (
        shape.block_tokens * problem.refill_token_s / (problem.num_layers * float(steps.mean() if len(steps) else 1.0))
    )
    leaves_s = EXACT * (group_s + nic_group_s + 2 * charge.max(initial=0.0)) / fewest
    mark = marks(problem) - blocks @ both_ends
    return RedispatchTables(
        now=now,
        alpha=costs.alpha,
        beta=costs.beta,
        base=running.base,
        open_at=running.open_at,
        unit=costs.unit,
        primary=costs.primary,
        nic_base=running.nic_base,
        nic_group_s=nic_group_s,
        on_workers=int(fixed.sum() - (fixed[:, costs.primary].sum() if costs.primary >= 0 else 0)),
        takes=snapshot.takes_groups(),
        context=snapshot.context_tokens.astype(np.float64),
        blocks=blocks,
        later=later,
        mark=mark,
        room=np.maximum(mark, blocks @ now),
        limit=limit,
        charge=charge,
        num_bytes=num_bytes,
        steps=steps,
        short_s=np.where(draining | is_full, leaves_s, refill_s),
        budget=float(problem.budget_bytes),  # kernels are compiled for each argument type that they see
        link_byte_s=np.asarray(problem.link_byte_s, np.float64),
        num_layers=int(problem.num_layers),
    )


def continued(tables: RedispatchTables, x: IntArray, *, spent_bytes: float) -> RedispatchTables:
    """Return the problem that remains when groups are placed as in ``x`` [N, D]."""
    room = np.maximum(tables.mark, tables.blocks @ x)
    return tables._replace(now=x, room=room, budget=max(0.0, tables.budget - spent_bytes))


def device_seconds(tables: RedispatchTables, x: IntArray | FloatArray) -> FloatArray:
    """Return seconds of each device, and of the primary's card, under whole or fractional ``x`` [N, D]; [D + 1]."""
    return _device_seconds(tables, x.sum(axis=0).astype(np.float64), tables.context @ x)


@kernel
def _device_seconds(tables: RedispatchTables, groups: FloatArray, tokens: FloatArray) -> FloatArray:
    """Compute `device_seconds` from groups and tokens, both [D]."""
    num = len(groups)
    seconds = np.empty(num + 1)
    workers = 0.0
    for i in range(num):
        seconds[i] = device_s(tables, i, groups[i], tokens[i])
        workers += groups[i] if i != tables.primary else 0.0
    seconds[num] = card_s(tables, workers)
    return seconds


@kernel
def card_s(tables: RedispatchTables, workers: float) -> float:
    """Return the time of the primary's network card with ``workers`` groups on workers besides those not in ``now``."""
    if tables.primary < 0 or workers + tables.on_workers <= 0:
        return 0.0
    return tables.nic_base + tables.nic_group_s * workers


def short_blocks(tables: RedispatchTables, x: IntArray) -> FloatArray:
    """Return s, the blocks above the limits of each device at the worst horizon, shape [D]."""
    short: FloatArray = np.maximum(0.0, tables.later @ x - tables.limit).max(axis=0)
    return short


def objective_s(tables: RedispatchTables, x: IntArray) -> float:
    """Return the objective of re-dispatch for whole or fractional groups ``x`` [N, D]."""
    moved = float((tables.charge * np.abs(x - tables.now)).sum())
    return float(device_seconds(tables, x).max()) + moved + float(tables.short_s @ short_blocks(tables, x))


def marks(problem: RedispatchProblem) -> IntArray:
    """Return the blocks up to which moves fill each device, shape [D], including those of groups under way.

    This is the high-water mark, because a device's own requests grow, and one that finds no block is evicted. Groups
    that leave a draining device may take the rest.
    """
    snapshot = problem.snapshot
    if any(device.status is DeviceStatus.DRAINING for device in snapshot.devices):
        return snapshot.total_blocks()
    share = np.array([device.high_water for device in snapshot.devices])
    return np.floor(share * snapshot.total_blocks()).astype(np.int64)


def horizons(problem: RedispatchProblem) -> tuple[int, ...]:
    """Return t, steps from now at which blocks are counted: once all requests have begun a new block, and far ahead."""
    near = min(problem.snapshot.stage.heads.block_tokens, problem.ahead_steps)
    return tuple(sorted({near, problem.ahead_steps}))


def _later(snapshot: StateSnapshot, times: tuple[int, ...]) -> FloatArray:
    """Return m_jt: blocks per group at the horizons times the probability that the request still runs, shape [H, N]."""
    t = np.array(times, np.float64)[:, None]
    grown = np.ceil((snapshot.context_tokens + t) / snapshot.stage.heads.block_tokens)
    still_runs: FloatArray = np.exp(-t / np.maximum(1.0, snapshot.remaining_tokens))
    return grown * still_runs
