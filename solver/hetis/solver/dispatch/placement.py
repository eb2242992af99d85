"""A placement in whole head groups under construction: what every device holds, and its time."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hetis.solver.dispatch.compiled import kernel
from hetis.solver.dispatch.problem import FloatArray, IntArray
from hetis.solver.dispatch.tables import ALWAYS, Costs, Running, device_s


class Placement(NamedTuple):
    """Mutable arrays of a placement of the requests to be placed, sorted by context.

    ``on_workers`` [1] is the number of new groups on attention workers, for the primary's network card.
    """

    x: IntArray  # [J, D] groups
    groups: IntArray  # [D]
    tokens: IntArray  # [D] context tokens of the groups
    room: IntArray  # [D] free KV blocks left
    seconds: FloatArray  # [D] time, 0 for a device that holds no heads
    on_workers: IntArray


@kernel
def empty_placement(costs: Costs, running: Running, free_blocks: IntArray, num_requests: int) -> Placement:
    """Return a placement of the running load only."""
    num = len(free_blocks)
    seconds = np.empty(num)
    for i in range(num):
        seconds[i] = device_s(costs, running, i, 0.0, 0.0)
    return Placement(
        np.zeros((num_requests, num), np.int64),
        np.zeros(num, np.int64),
        np.zeros(num, np.int64),
        np.maximum(free_blocks, 0),
        seconds,
        np.zeros(1, np.int64),
    )


@kernel
def put(
    costs: Costs, running: Running, placement: Placement, request: int, device: int, count: int, context: int,
    blocks: int,
) -> None:  # fmt: skip
    """Add ``count`` groups of a request to a device, or remove them if negative."""
    placement.x[request, device] += count
    placement.groups[device] += count
    placement.tokens[device] += count * context
    placement.room[device] -= count * blocks
    placement.seconds[device] = device_s(
        costs, running, device, float(placement.groups[device]), float(placement.tokens[device])
    )
    if device != costs.primary:
        placement.on_workers[0] += count


@kernel
def seconds_with(costs: Costs, running: Running, placement: Placement, device: int, groups: int, tokens: int) -> float:
    """Return the time of a device with ``groups`` and ``tokens`` more than it holds."""
    n, t = placement.groups[device] + groups, placement.tokens[device] + tokens
    return device_s(costs, running, device, float(n), float(t))


@kernel
def card_s(costs: Costs, running: Running, on_workers: float) -> float:
    """Return the time of the primary's network card with ``on_workers`` new groups; 0 while no worker holds heads."""
    if costs.primary < 0:
        return 0.0
    if on_workers == 0:
        any_runs = False
        for i in range(len(running.open_at)):
            any_runs = any_runs or (i != costs.primary and running.open_at[i] == ALWAYS)
        if not any_runs:
            return 0.0
    return running.nic_base + running.nic_group_s * on_workers


@kernel
def makespan(costs: Costs, running: Running, placement: Placement) -> float:
    """Return the seconds of the slowest device or network card."""
    slowest = card_s(costs, running, placement.on_workers[0])
    for i in range(len(placement.seconds)):
        slowest = max(slowest, float(placement.seconds[i]))
    return slowest
