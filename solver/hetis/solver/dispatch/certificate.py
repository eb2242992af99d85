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

from typing import NamedTuple

import numpy as np

from hetis.solver.dispatch.dispatch_problem import FloatArray, IntArray
from hetis.solver.dispatch.loaded_stage import ALWAYS, LoadedStage, kernel


class Multipliers(NamedTuple):
    """Prices >= 0 in seconds of makespan: p of affine pieces [D, K], mu of KV blocks [D], nu of the network card."""

    piece: FloatArray
    block: FloatArray
    nic: float


@kernel
def request_prices(stage: LoadedStage, contexts: IntArray, blocks: IntArray, prices: Multipliers) -> FloatArray:
    """Return pi_j, the least cost of a head group of each request, shape [J]."""
    num, pieces = stage.alpha.shape
    pi = np.full(len(contexts), np.inf)
    for i in range(num):
        per_group = 0.0
        per_token = 0.0
        for k in range(pieces):
            per_group += prices.piece[i, k] * stage.alpha[i, k]
            per_token += prices.piece[i, k] * stage.beta[i, k]
        if i != stage.primary:
            per_group += prices.nic * stage.nic_group_s
        for j in range(len(contexts)):
            pi[j] = min(pi[j], per_group + per_token * contexts[j] + prices.block[i] * blocks[j])
    return pi


@kernel
def normalise(stage: LoadedStage, bound: float, prices: Multipliers) -> Multipliers:
    """Scale multipliers so that they pay for one second of makespan at the bound, which does not change.

    If the bound is the time of the running load, no multiplier is needed and all become 0.
    """
    slope = 0.0
    worker_is_open = False
    if bound > stage.floor_s * (1.0 + 1e-12):
        for i in range(len(prices.piece)):
            if stage.open_at[i] <= bound:
                slope += prices.piece[i].sum()
                worker_is_open = worker_is_open or i != stage.primary
        if worker_is_open:
            slope += prices.nic
    factor = 1.0 / slope if slope > 0.0 else 0.0
    return Multipliers(prices.piece * factor, prices.block * factor, prices.nic * factor)


@kernel
def proven_bound(
    stage: LoadedStage, free_blocks: IntArray, contexts: IntArray, blocks: IntArray, prices: Multipliers
) -> float:
    """Return seconds that no placement beats, or infinity if the prices prove that memory is too short.

    ``contexts`` and ``blocks`` are the context tokens and KV blocks per head group of every request to be placed, [J].
    """
    num, pieces = stage.alpha.shape
    owed = stage.head_groups * request_prices(stage, contexts, blocks, prices).sum()
    slope, constant = 0.0, 0.0  # C(z) = slope z - constant for the devices open so far
    slopes = np.zeros(num)
    constants = np.zeros(num)
    worker_runs = False
    for i in range(num):
        for k in range(pieces):
            slopes[i] += prices.piece[i, k]
            constants[i] += prices.piece[i, k] * stage.base[i, k]
        owed -= prices.block[i] * max(0, free_blocks[i])
        if stage.open_at[i] == ALWAYS:
            slope += slopes[i]
            constant += constants[i]
            worker_runs = worker_runs or i != stage.primary
    if worker_runs:
        slope += prices.nic
        constant += prices.nic * stage.nic_base
    z = stage.floor_s
    if slope * z - constant >= owed:
        return z
    order = np.argsort(stage.open_at)
    for step in range(num + 1):
        opens = stage.open_at[order[step]] if step < num else np.inf
        if opens == ALWAYS:
            continue
        if not worker_runs and stage.nic_base <= opens:  # the network card opens no later than the first worker
            if slope > 0.0 and (owed + constant) / slope < stage.nic_base:
                return max(z, float((owed + constant) / slope))
            slope += prices.nic
            constant += prices.nic * stage.nic_base
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
