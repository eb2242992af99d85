"""The proof of a lower bound from multipliers alone, by weak duality and independently of every search.

Let p_ik >= 0 be the prices of the affine pieces, mu_i of KV blocks, nu of the primary's network card. Whatever z is, a
head group of request j costs at least

    pi_j = min_i  sum_k p_ik (alpha_ik + beta_ik l_j) + mu_i m_j + nu eta [i is a worker]

and all devices together can pay no more than

    C(z) = sum over devices in use or with constants <= z of sum_k p_ik (z - base_ik)
           + sum_i mu_i free_i + nu (z - base_nic)

so no placement, fractional or whole, is faster than the least z >= (time of the running load) with
``C(z) >= G sum_j pi_j``. An idle device adds nothing to C below its constants, which is exact. (In the linear program
alone its rows would have to hold without the constants, min(0, c + beta), which proves less.)
"""

from __future__ import annotations

import numpy as np

from hetis.solver.dispatch.problem import FloatArray, IntArray
from hetis.solver.dispatch.tables import ALWAYS, Costs, Running, kernel


@kernel
def request_prices(
    costs: Costs, contexts: IntArray, blocks: IntArray, piece: FloatArray, block: FloatArray, nic: float
) -> FloatArray:
    """Return pi_j, the least cost of a head group of each request, shape [J]."""
    num, pieces = costs.alpha.shape
    pi = np.full(len(contexts), np.inf)
    for i in range(num):
        per_group = 0.0
        per_token = 0.0
        for k in range(pieces):
            per_group += piece[i, k] * costs.alpha[i, k]
            per_token += piece[i, k] * costs.beta[i, k]
        if i != costs.primary:
            per_group += nic * costs.nic_head_s * costs.queries
        for j in range(len(contexts)):
            pi[j] = min(pi[j], per_group + per_token * contexts[j] + block[i] * blocks[j])
    return pi


@kernel
def normalise(running: Running, primary: int, bound: float, piece: FloatArray, block: FloatArray, nic: float) -> float:
    """Scale multipliers in place so that they pay for one second of makespan at the bound; return the scaled nic.

    The bound does not change. If it is the time of the running load, no multiplier is needed and all become 0.
    """
    slope = 0.0
    worker_is_open = False
    if bound > running.floor_s * (1.0 + 1e-12):
        for i in range(len(piece)):
            if running.open_at[i] <= bound:
                slope += piece[i].sum()
                worker_is_open = worker_is_open or i != primary
        if worker_is_open:
            slope += nic
    factor = 1.0 / slope if slope > 0.0 else 0.0
    piece *= factor
    block *= factor
    return nic * factor


@kernel
def proven_bound(
    costs: Costs, running: Running, free_blocks: IntArray, contexts: IntArray, blocks: IntArray, piece: FloatArray,
    block: FloatArray, nic: float,
) -> float:  # fmt: skip
    """Return seconds that no placement beats, or infinity if the prices prove that memory is too short.

    Args:
        contexts, blocks: context tokens and KV blocks per head group of every request to be placed, shape [J].
        piece, block, nic: any multipliers >= 0, shapes [D, K], [D] and scalar.
    """
    num, pieces = costs.alpha.shape
    owed = costs.head_groups * request_prices(costs, contexts, blocks, piece, block, nic).sum()
    slope, constant = 0.0, 0.0  # C(z) = slope z - constant for the devices open so far
    slopes = np.zeros(num)
    constants = np.zeros(num)
    worker_runs = False
    for i in range(num):
        for k in range(pieces):
            slopes[i] += piece[i, k]
            constants[i] += piece[i, k] * running.base[i, k]
        owed -= block[i] * max(0, free_blocks[i])
        if running.open_at[i] == ALWAYS:
            slope += slopes[i]
            constant += constants[i]
            worker_runs = worker_runs or i != costs.primary
    if worker_runs:
        slope += nic
        constant += nic * running.nic_base
    z = running.floor_s
    if slope * z - constant >= owed:
        return z
    order = np.argsort(running.open_at)
    for step in range(num + 1):
        opens = running.open_at[order[step]] if step < num else np.inf
        if opens == ALWAYS:
            continue
        if not worker_runs and running.nic_base <= opens:  # the card opens no later than the first worker
            if slope > 0.0 and (owed + constant) / slope < running.nic_base:
                return max(z, float((owed + constant) / slope))
            slope += nic
            constant += nic * running.nic_base
            worker_runs = True
        if slope > 0.0 and (owed + constant) / slope < opens:
            return max(z, float((owed + constant) / slope))
        if step < num:
            z = max(z, opens)
            slope += slopes[order[step]]
            constant += constants[order[step]]
            if slope * z - constant >= owed:
                return z
    return np.inf
