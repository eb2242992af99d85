"""A fractional placement along a chain that keeps every row and every real KV block: the relaxation's upper bound."""

from __future__ import annotations

import numpy as np

from hetis.solver.dispatch.chain import TINY
from hetis.solver.dispatch.compiled import kernel
from hetis.solver.dispatch.placement import card_s
from hetis.solver.dispatch.problem import FloatArray, IntArray
from hetis.solver.dispatch.tables import Costs, Running

MOST_STEPS = 12
FULL = 1e-12  # share of all groups that may be left for the last device, from rounding of the level


@kernel
def fractional_fill(
    costs: Costs, running: Running, free_blocks: IntArray, contexts: FloatArray, blocks: FloatArray, order: IntArray,
    price: FloatArray, level: float, x: FloatArray,
) -> float:  # fmt: skip
    """Fill the devices in ``order`` at about the least level, from ``level`` on, that takes all groups.

    Writes fractions x [J, D] of requests sorted by context and returns the makespan, or infinity if the order leaves
    groups without memory.
    """
    z = level * (1.0 + 1e-13)
    total = costs.head_groups * len(contexts)
    for _ in range(MOST_STEPS):
        left, unpaid, slope = _fill_to(costs, running, free_blocks, contexts, blocks, order, price, z, x)
        if left <= FULL * total:
            return _settle(costs, running, x, contexts, order, z, left)
        if slope <= 0.0:
            break
        z = max(z * (1.0 + 1e-9), z + unpaid / slope)
    return np.inf


@kernel
def _fill_to(
    costs: Costs, running: Running, free_blocks: IntArray, contexts: FloatArray, blocks: FloatArray, order: IntArray,
    price: FloatArray, z: float, x: FloatArray,
) -> tuple[float, float, float]:  # fmt: skip
    """Return the groups left at level z, what they would pay, and the price of a second on devices with free memory."""
    pieces = costs.alpha.shape[1]
    num_requests = len(contexts)
    x[:] = 0.0
    request, rest = 0, float(costs.head_groups)
    slope = 0.0
    for i in order:
        if request == num_requests:
            break
        if running.open_at[i] > z:
            continue
        groups, tokens = 0.0, 0.0
        room = float(max(0, free_blocks[i]))
        while request < num_requests:
            fits = min(rest, room / max(blocks[request], TINY))
            by_memory = fits < rest
            for k in range(pieces):
                spare = z - running.base[i, k] - costs.alpha[i, k] * groups - costs.beta[i, k] * tokens
                cost = costs.alpha[i, k] + costs.beta[i, k] * contexts[request] + TINY
                if spare < fits * cost:
                    fits = max(0.0, spare / cost)
                    by_memory = False
            x[request, i] += fits
            groups += fits
            tokens += fits * contexts[request]
            room -= fits * blocks[request]
            rest -= fits
            if rest > 0.0:
                if not by_memory:
                    slope += price[i]
                break
            request += 1
            rest = float(costs.head_groups)
    if request == num_requests:
        return 0.0, 0.0, slope
    last = order[-1]
    left, unpaid = 0.0, 0.0
    for j in range(request, num_requests):
        groups = rest if j == request else float(costs.head_groups)
        left += groups
        unpaid += groups * price[last] * (costs.alpha[last, 0] + costs.beta[last, 0] * contexts[j])
    return left, unpaid, slope


@kernel
def _settle(
    costs: Costs, running: Running, x: FloatArray, contexts: FloatArray, order: IntArray, z: float, left: float
) -> float:
    """Give what rounding left to the last device in use; return the makespan including the network card's."""
    num_requests = len(contexts)
    if left > 0.0:
        for i in order[::-1]:
            if x[num_requests - 1, i] > 0.0:
                x[num_requests - 1, i] += left
                break
    return max(z, running.floor_s, card_s(costs, running, _on_workers(costs, x)))


@kernel
def _on_workers(costs: Costs, x: FloatArray) -> float:
    """Return the groups of x [J, D] on attention workers."""
    groups = 0.0
    for j in range(x.shape[0]):
        for i in range(x.shape[1]):
            if i != costs.primary:
                groups += x[j, i]
    return groups
