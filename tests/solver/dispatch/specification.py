"""The dispatch problem in cvxpy, written to be read: the fast code must agree with it."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import cvxpy
import numpy as np

from hetis.solver.dispatch.dispatch_problem import DispatchProblem, FloatArray

cp: Any = cvxpy  # its annotations cover only half of its exports

modelling = np.errstate(over="ignore", invalid="ignore")
"""For functions that use cvxpy, which finds shapes by summing uninitialised memory: numpy warns of what that holds."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SpecificationResult:
    """``x`` [J, D] head groups, ``makespan_s`` the optimum z (infinite, x zero: no placement exists)."""

    x: FloatArray
    makespan_s: float


@modelling
def solve_specification(
    problem: DispatchProblem, *, whole: bool, constants_of_idle: bool = True, time_limit_s: float = math.inf
) -> SpecificationResult:
    """The best placement of *all* requests.

    Sets       i devices, k affine pieces, j new requests
    Data       G head groups of r query heads; l_j context tokens, m_j KV blocks of a head group (growth included)
               a, b, c, gamma, beta: `dispatch_problem.py`; of the primary a is divided by its n cards, b by
               the groups it takes at a time (s of them), and it exchanges nothing; e bytes per head, kv bytes per token
               H_i, B_i running heads and KV bytes;  F_i free blocks
    Variables  x_ij >= 0 head groups of j on i (whole; s of them at a time on the primary);  z seconds
               y_i in {0,1}: device i is used;  y_w in {0,1}: any worker is     (1 where heads are running)
    Minimise   z
    Such that  z >= a_ik h_i + b_ik g_i + (c_ik + beta_i) y_i + gamma_i e h_i         every i, k
               h_i = H_i + r sum_j x_ij;   g_i = B_i + kv sum_j l_j x_ij
               z >= gamma_0 e sum_(workers i) h_i + beta_0 y_w
               sum_i x_ij = G                                                        every j
               sum_j m_j x_ij <= F_i                                                 every i
               sum_j x_ij <= G J y_i;   y_i <= y_w of workers                         every i

    Args:
        whole: head groups are whole. Otherwise x is continuous, as in the relaxation.
        constants_of_idle: idle devices pay their constants when used, which takes the binaries y. Without, y_i = 0 for
            idle devices and they may be used all the same: the linear program of the paper, a weaker bound.
    """
    stage, load, requests = problem.stage, problem.load, problem.requests
    heads, primary = stage.heads, stage.primary
    D, J = stage.num_devices, len(requests.ids)
    is_worker = np.array([not stage.has_primary_at(i) for i in range(D)])
    share, cards = np.ones(D), np.ones(D)
    if primary is not None:
        share[primary.device], cards[primary.device] = stage.primary_groups, primary.tp
    a, b = stage.head_s / cards[:, None], stage.kv_byte_s / share[:, None]
    gamma, beta = stage.transfer_byte_s * is_worker, stage.transfer_s * is_worker
    e, G, r = heads.exchange_bytes_per_head, heads.head_groups, heads.queries_per_group
    m = requests.blocks(heads.block_tokens)
    if J == 0:
        return SpecificationResult(x=np.zeros((0, D)), makespan_s=_running_s(problem, a, b, gamma, beta, is_worker))

    units = cp.Variable((J, D), integer=whole, nonneg=True)
    x = cp.multiply(units, np.tile(share if whole else np.ones(D), (J, 1)))
    z = cp.Variable(nonneg=True)
    runs = load.heads > 0
    worker_runs = bool(np.any(runs & is_worker))
    y: Any = runs.astype(float)
    y_w: Any = float(worker_runs)
    constraints = []
    if constants_of_idle:
        y, y_w = cp.Variable(D, boolean=True), cp.Variable(boolean=True)
        constraints += [y >= runs, y_w >= float(worker_runs), cp.sum(x, axis=0) <= G * J * y, y[is_worker] <= y_w]
    h = load.heads + r * cp.sum(x, axis=0)
    g = load.kv_bytes + heads.kv_bytes_per_token * (requests.context_tokens @ x)
    scale = 1e4  # seconds to units of 0.1 ms, at which solvers' tolerances are meaningful
    for k in range(stage.head_s.shape[1]):
        constant = cp.multiply(stage.call_s[:, k] + beta, y)
        seconds = cp.multiply(a[:, k] + gamma * e, h) + cp.multiply(b[:, k], g) + constant
        constraints.append(z >= scale * seconds)
    if primary is not None:
        constraints.append(
            z >= scale * (primary.nic_byte_s * e * cp.sum(h[np.flatnonzero(is_worker)]) + primary.nic_s * y_w)
            if is_worker.any()
            else z >= 0
        )
    constraints += [cp.sum(x, axis=1) == G, m @ x <= np.maximum(0, load.free_blocks)]
    program = cp.Problem(cp.Minimize(z), constraints)
    options: dict[str, Any] = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
    if whole or constants_of_idle:
        options |= {"mip_rel_gap": 1e-9, "mip_feasibility_tolerance": 1e-9}
    if math.isfinite(time_limit_s):
        options["time_limit"] = time_limit_s
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Solution may be inaccurate", category=UserWarning)
        program.solve(solver=cp.HIGHS, **options)
    if units.value is None:
        return SpecificationResult(x=np.zeros((J, D)), makespan_s=math.inf)
    return SpecificationResult(x=np.asarray(x.value), makespan_s=float(z.value) / scale)


def _running_s(
    problem: DispatchProblem, a: FloatArray, b: FloatArray, gamma: FloatArray, beta: FloatArray, is_worker: FloatArray
) -> float:
    """Return z if there is nothing to place."""
    stage, load = problem.stage, problem.load
    e = stage.heads.exchange_bytes_per_head
    seconds = (a + (gamma * e)[:, None]) * load.heads[:, None] + b * load.kv_bytes[:, None]
    seconds = (seconds + stage.call_s + beta[:, None]).max(axis=1)
    slowest = float(np.max(np.where(load.heads > 0, seconds, 0.0)))
    on_workers = float(load.heads[is_worker.astype(bool)].sum())
    if stage.primary is not None and on_workers > 0:
        slowest = max(slowest, stage.primary.nic_byte_s * e * on_workers + stage.primary.nic_s)
    return slowest
