"""The relaxation of re-dispatch as one compact program in cvxpy, written to be read: the specification of the search.

It is built from the snapshot alone and shares no table with the search; only the horizons and the price of missing
blocks, which are choices and not consequences, are taken from there. For small stages: cvxpy builds rows one by one.
"""

from __future__ import annotations

from typing import Any

import cvxpy
import numpy as np

from hetis.solver.dispatch.dispatch_problem import BoolArray, FloatArray
from hetis.solver.dispatch.snapshot import DeviceStatus
from hetis.solver.redispatch.redispatch_problem import RedispatchProblem
from tests.solver.dispatch.specification import modelling

cp: Any = cvxpy  # its annotations cover only half of its exports


@modelling
def solve_specification(
    problem: RedispatchProblem, *, horizons: tuple[int, ...], short_s: FloatArray, open_devices: BoolArray
) -> float:
    """The least objective in seconds per layer and step; infinite where devices that are not open cannot be emptied.

    Args:
        horizons: t, steps from now at which blocks are counted.
        short_s: P, seconds per layer and step for a KV block above the limit, shape [D].
        open_devices: the only devices with head groups, all of which pay their constants, shape [D].

    Sets       i devices, j requests, k affine pieces, t horizons
    Variables  x_ij head groups of j on i, in fractions;  a_ij, d_ij those that arrive and depart;  s_i short blocks;
               z seconds
    Minimise   z + sum_ij lambda_j bytes_j link_i / 2 (a_ij + d_ij) + sum_i P_i s_i
    Such that  z >= c_ik + r (a_ik + gamma_i e) sum_j x_ij + b_ik bytes sum_j l_j x_ij    every i,k
               z >= nic_s + gamma_0 e r sum_(workers i, j) x_ij
               x_ij = now_ij + a_ij - d_ij,   d_ij <= now_ij                every i,j
               sum_i x_ij = G                                               every j
               a_ij = 0                                                     every j, i draining or lost
               sum_j b_j x_ij <= max(in use, high water) or, when draining, total_i   every i
               sum_j m_jt x_ij <= total_i + s_i                             every i,t (draining: 0 + s_i)
               sum_ij bytes_j a_ij <= budget
               x_ij = 0                                                     every j, i not open

    Snapshots with moves in progress are not covered.
    """
    snapshot, layers = problem.snapshot, problem.num_layers
    stage, shape, primary = snapshot.stage, snapshot.stage.heads, snapshot.stage.primary
    N, D = snapshot.groups.shape
    G, r, e = shape.head_groups, shape.queries_per_group, shape.exchange_bytes_per_head
    now, l = snapshot.groups, snapshot.context_tokens
    x, a, d = (cp.Variable((N, D), nonneg=True) for _ in range(3))
    s, z = cp.Variable(D, nonneg=True), cp.Variable(nonneg=True)
    takes = np.array([device.status is DeviceStatus.OK for device in snapshot.devices])
    rows = [x == now + a - d, d <= now, cp.sum(x, axis=1) == G, a[:, ~takes] == 0, x[:, ~open_devices] == 0]

    scale = 1e6  # microseconds, because a solver's tolerances are absolute
    groups, tokens = cp.sum(x, axis=0), l @ x
    workers = [i for i in range(D) if not stage.has_primary_at(i)]
    for i in np.flatnonzero(open_devices):
        head_s, byte_s, call_s = _of_device(problem, i)
        for k in range(len(head_s)):
            time = call_s[k] + r * head_s[k] * groups[i] + byte_s[k] * shape.kv_bytes_per_token * tokens[i]
            rows.append(z >= scale * time)
    if primary is not None and open_devices[workers].any():
        on_workers = sum(groups[i] for i in workers)
        rows.append(z >= scale * (primary.nic_s + primary.nic_byte_s * e * r * on_workers))

    num_bytes = l * shape.kv_bytes_per_token * layers
    for i, device in enumerate(snapshot.devices):
        drains = any(other.status is DeviceStatus.DRAINING for other in snapshot.devices)
        in_use = int(snapshot.context_blocks() @ now[:, i])
        mark = device.total_blocks if drains else max(in_use, int(device.high_water * device.total_blocks))
        rows.append(snapshot.context_blocks() @ x[:, i] <= mark)
        for t in horizons:
            limit = 0 if device.status is DeviceStatus.DRAINING else device.total_blocks
            runs = np.exp(-t / np.maximum(1, snapshot.remaining_tokens))
            rows.append((-(-(l + t) // shape.block_tokens) * runs) @ x[:, i] <= limit + s[i])
    if np.isfinite(problem.budget_bytes):
        rows.append(num_bytes @ cp.sum(a, axis=1) / 1e6 <= problem.budget_bytes / 1e6)
    steps = np.maximum(1, problem.patience * snapshot.remaining_tokens)
    charge = np.outer(num_bytes / (layers * steps), problem.link_byte_s / 2)
    cost = z + scale * cp.sum(cp.multiply(charge, a + d)) + scale * (short_s @ s)
    program = cp.Problem(cp.Minimize(cost), rows)
    program.solve(solver=cp.HIGHS)
    return float(program.value) / scale


def _of_device(problem: RedispatchProblem, i: int) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Seconds per query head, per KV byte and per call of every piece; the primary's are shared by its cards."""
    stage = problem.snapshot.stage
    if stage.primary is not None and i == stage.primary.device:
        return stage.head_s[i] / stage.primary.tp, stage.kv_byte_s[i] / stage.primary_groups, stage.call_s[i]
    per_head = stage.head_s[i] + stage.transfer_byte_s[i] * stage.heads.exchange_bytes_per_head
    return per_head, stage.kv_byte_s[i], stage.call_s[i] + stage.transfer_s[i]
