"""Every limit on a device as a row over the n head groups and t context tokens (summed over groups) it is given.

alpha n + beta t + base <= kappa z                                        z: makespan in seconds

row k < K   affine piece k       alpha = r (a + gamma e), beta = bytes b, base: time of the running load, kappa 1
row K       free KV blocks       kappa 0, scaled to seconds. ceil((context + growth) / block) is not affine in the
                                 context: this row only guides the search; placements and bounds count real blocks
row K + 1   the primary's network card, kappa 1. All N groups go somewhere, so workers do what the primary does not:
                                 alpha = -eta, beta 0, base = time for the running workers + eta N. Other devices
                                 have no such row (all 0)
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hetis.solver.dispatch.chain import TINY
from hetis.solver.dispatch.compiled import kernel
from hetis.solver.dispatch.problem import FloatArray, IntArray
from hetis.solver.dispatch.tables import Costs, Running


class DeviceRows(NamedTuple):
    """Rows of all devices, [D, R] with R = K + 2; ``block_scale`` [D] is the seconds per block in row K."""

    alpha: FloatArray
    beta: FloatArray
    base: FloatArray
    kappa: FloatArray
    block_scale: FloatArray


@kernel
def rows_of(
    costs: Costs, running: Running, free_blocks: IntArray, contexts: FloatArray, blocks: FloatArray
) -> DeviceRows:
    """Return all rows, for requests of these contexts and blocks per head group, both [J]."""
    num, pieces = costs.alpha.shape
    shape = (num, pieces + 2)
    alpha, beta, base, kappa = np.zeros(shape), np.zeros(shape), np.zeros(shape), np.zeros(shape)
    block_scale = np.zeros(num)
    mean, mean_blocks = contexts.mean(), blocks.mean()
    spread, together = 0.0, 0.0
    for j in range(len(contexts)):
        spread += (contexts[j] - mean) ** 2
        together += (contexts[j] - mean) * (blocks[j] - mean_blocks)
    per_token = max(0.0, together / spread) if spread > 0.0 else 0.0
    per_group = mean_blocks - per_token * mean
    if per_group < 0.0:
        per_group, per_token = 0.0, mean_blocks / mean
    for i in range(num):
        for k in range(pieces):
            alpha[i, k], beta[i, k], base[i, k], kappa[i, k] = (
                costs.alpha[i, k],
                costs.beta[i, k],
                running.base[i, k],
                1.0,
            )
        scale = (costs.alpha[i, 0] + costs.beta[i, 0] * mean + TINY) / mean_blocks
        alpha[i, pieces] = scale * per_group
        beta[i, pieces] = scale * per_token
        base[i, pieces] = -scale * max(0, free_blocks[i])
        block_scale[i] = scale
    if costs.primary >= 0 and num > 1:
        i = costs.primary
        alpha[i, pieces + 1] = -running.nic_group_s
        base[i, pieces + 1] = running.nic_base + running.nic_group_s * costs.head_groups * len(contexts)
        kappa[i, pieces + 1] = 1.0
    return DeviceRows(alpha, beta, base, kappa, block_scale)


@kernel
def likely_level(rows: DeviceRows, running: Running, context: float, num_groups: float) -> float:
    """Return a level near the optimum, at which groups of equal ``context`` would fill every device's affine pieces."""
    num, width = rows.alpha.shape
    z = TINY
    for i in range(num):
        opens = running.open_at[i] if running.open_at[i] > 0.0 else rows.base[i, : width - 2].max()
        z = max(z, opens)
    for _ in range(12):
        held, slope = 0.0, 0.0
        for i in range(num):
            if running.open_at[i] > z:
                continue
            least, per_second = np.inf, 0.0
            for k in range(width - 2):
                cost = rows.alpha[i, k] + rows.beta[i, k] * context + TINY
                fits = (z - rows.base[i, k]) / cost
                if fits < least:
                    least, per_second = fits, 1.0 / cost
            if least >= 0.0:
                held += least
                slope += per_second
        if slope == 0.0:
            break
        step = (num_groups - held) / slope
        z = max(TINY, z + step)
        if abs(step) < 1e-3 * z:
            break
    return z


@kernel
def prices_of(
    rows: DeviceRows, low: IntArray, high: IntArray, weight: FloatArray, price: FloatArray, piece: FloatArray,
    block: FloatArray,
) -> float:  # fmt: skip
    """Write multipliers of pieces [D, K] and KV blocks [D] and return that of the network card, from mixed rows [D]."""
    num, width = rows.alpha.shape
    pieces = width - 2
    nic = 0.0
    piece[:] = 0.0
    block[:] = 0.0
    for i in range(num):
        for row, share in ((low[i], 1.0 - weight[i]), (high[i], weight[i])):
            if row < pieces:
                piece[i, row] += share * price[i]
            elif row == pieces:
                block[i] += share * price[i] * rows.block_scale[i]
            else:
                nic += share * price[i]
    return nic
