"""Other systems' reactions to drifting load or exhausted memory, which re-dispatch is compared with.

``paper_rule`` is that of Hetis (SC'25): re-dispatch the one request for which it helps most. ``whole_request_moves``
never splits a request, like engines that migrate requests between instances (Llumnix, OSDI'24). ``last_admitted`` is
the victim of LIFO eviction, used by engines when blocks run out (vLLM).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from hetis.solver.dispatch.dispatch_problem import (
    DeviceLoad,
    IntArray,
    Requests,
)
from hetis.solver.dispatch.dispatcher import Dispatcher
from hetis.solver.dispatch.snapshot import StateSnapshot
from hetis.solver.redispatch.moves import order, part_seconds, step_seconds, steps_between
from hetis.solver.redispatch.redispatch_problem import Move, MoveReason, RedispatchProblem
from hetis.solver.redispatch.redispatch_tables import RedispatchTables, device_seconds, short_blocks, tables_of


def paper_rule(problem: RedispatchProblem, dispatcher: Dispatcher, *, device: int | None = None) -> tuple[Move, ...]:
    """Re-dispatch the one request with KV on the slowest device whose re-dispatch helps most.

    Each candidate is dispatched as if it were new, while all others stay. Groups that would return to their device
    stay, too. Memory is taken as it is now, and growth is not anticipated. If ``device`` is given, it has run out of
    memory: the candidates are the requests with KV there, and the one with the fastest new home at least partly off
    that device is taken. Return no moves if no candidate helps.
    """
    tables, snapshot = tables_of(problem), problem.snapshot
    before_s = float(device_seconds(tables, tables.now).max())
    where = int(device_seconds(tables, tables.now)[:-1].argmax()) if device is None else device
    load, used = snapshot.load(), snapshot.used_blocks()
    best, least_s = None, np.inf if device is not None else before_s * (1 - 1e-9)
    for j in np.flatnonzero(tables.now[:, where]).tolist():
        if snapshot.groups[j].sum() != tables.now[j].sum():
            continue  # one of its moves is in flight
        free = np.where(tables.takes, snapshot.total_blocks() - used + tables.blocks[j] * tables.now[j], 0)
        if device is not None:
            free[device] = min(free[device], 0)
        x = _redispatched(snapshot, dispatcher, j, tables.now[j], load, free)
        if x is None or np.array_equal(x, tables.now[j]):
            continue
        after = tables.now.copy()
        after[j] = x
        after_s = float(device_seconds(tables, after).max())
        if after_s < least_s:
            best, least_s = after, after_s
    return () if best is None else _as_moves(problem, tables, best)


def whole_request_moves(problem: RedispatchProblem) -> tuple[Move, ...]:
    """Move whole requests to single devices, one at a time, each time the one that lowers the objective most."""
    tables = tables_of(problem)
    x, spent = tables.now.copy(), 0.0
    moved = set[int]()
    while True:
        seconds, short = device_seconds(tables, x), short_blocks(tables, x)
        slowest = int(seconds[:-1].argmax())
        over = np.any(tables.later @ x > tables.limit, axis=0) | (np.arange(len(tables.unit)) == slowest)
        best, most = None, 1e-9 * float(seconds.max())
        for j in np.flatnonzero(x[:, np.flatnonzero(over)].any(axis=1)).tolist():
            if j in moved:
                continue
            for k in np.flatnonzero(tables.takes).tolist():
                total = int(x[j].sum())
                arrives = total - int(x[j, k])
                fits = tables.blocks @ x[:, k] + arrives * tables.blocks[j] <= tables.room[k]
                if not arrives or total % tables.unit[k] or not fits:
                    continue
                if spent + arrives * tables.num_bytes[j] > tables.budget:
                    continue
                row = x[j].copy()
                x[j] = 0
                x[j, k] = total
                gain = float(seconds.max() - device_seconds(tables, x).max())
                gain += float(tables.short_s @ (short - short_blocks(tables, x)))
                gain -= float((tables.charge[j] * np.abs(x[j] - tables.now[j])).sum())
                x[j] = row
                if gain > most:
                    best, most = (j, k), gain
        if best is None:
            return _as_moves(problem, tables, x)
        j, k = best
        spent += (x[j].sum() - x[j, k]) * tables.num_bytes[j]
        x[j], x[j, k] = 0, x[j].sum()
        moved.add(j)


def last_admitted(snapshot: StateSnapshot, device: int, *, but: Iterable[str] = ()) -> str | None:
    """Return the last admitted request with KV on a device, which LIFO evicts, or None if there is none."""
    spared = set(but)
    for j in range(len(snapshot.ids) - 1, -1, -1):
        if snapshot.groups[j, device] and snapshot.ids[j] not in spared:
            return snapshot.ids[j]
    return None


def _redispatched(
    snapshot: StateSnapshot, dispatcher: Dispatcher, j: int, groups: IntArray, load: DeviceLoad, free_blocks: IntArray
) -> IntArray | None:
    """Return the groups [D] of request ``j`` if it were dispatched as new, or None if it does not fit."""
    heads = snapshot.stage.heads
    without = DeviceLoad(
        heads=load.heads - groups * heads.queries_per_group,
        kv_bytes=np.maximum(
            0.0, load.kv_bytes - groups * (float(snapshot.context_tokens[j]) * heads.kv_bytes_per_token)
        ),
        free_blocks=free_blocks,
    )
    one = Requests(
        ids=(snapshot.ids[j],),
        context_tokens=snapshot.context_tokens[j : j + 1],
        growth_tokens=np.zeros(1, np.int64),
    )
    plan = dispatcher.dispatch(without, one)
    return None if plan.unplaced else plan.groups[0]


def _as_moves(problem: RedispatchProblem, tables: RedispatchTables, x: IntArray) -> tuple[Move, ...]:
    """Return the moves to ``x`` [N, D] in an order that memory permits, without those that no order permits."""
    steps = steps_between(tables, tables.now, x)
    ordered, _ = order(tables, tables.now, steps, problem.snapshot.stage.devices)
    saved_s = float(device_seconds(tables, tables.now).max() - device_seconds(tables, x).max())
    seconds = sum(step_seconds(tables, o.step) for o in ordered)
    return tuple(
        Move(
            request=problem.snapshot.ids[step.j],
            groups=part.groups,
            source=part.source,
            target=part.target,
            num_bytes=part.groups * float(tables.num_bytes[step.j]),
            seconds=part_seconds(tables, step.j, part),
            payback_steps=seconds / (problem.num_layers * saved_s) if saved_s > 0 else None,
            reason=MoveReason.DETOUR if is_detour else MoveReason.BALANCE,
            wave=wave,
            together=together,
        )
        for together, (step, wave, is_detour) in enumerate(ordered)
        for part in step.parts
    )
