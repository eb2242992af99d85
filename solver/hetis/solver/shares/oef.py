"""OEF (Middleware'24, arXiv 2403.18545): the two fair rules that maximise total value.

With claimants l of weight pi_l, speed-ups w_l and shares x_l [types], m the fleet:

    cooperative       max sum_l w_l x_l   s.t.  w_l x_l / pi_l >= w_l x_i / pi_i   all l, i        (nobody envies)
    non-cooperative   max sum_l w_l x_l   s.t.  w_l x_l / pi_l equal for all l                      (equal value)
    both              sum_l x_l <= m,  x >= 0

The paper defines weights by cloning a claimant pi_l times; clones with equal shares satisfy its rows exactly if these
hold, so that weights need not be whole here.

**Bounds.** Rows in the objective with multipliers (Lagrange) leave only the fleet's limits, so that every type goes to
the claimant with the largest coefficient: for any mu >= 0 (any nu with sum 0)

    cooperative       sum_j m_j max_l max(0, w_lj (1 + sum_i mu_li / pi_l) - sum_i mu_il w_ij / pi_l)
    non-cooperative   sum_j m_j max_l max(0, w_lj (1 + nu_l / pi_l))

is at least the total value of all fair shares. HiGHS's duals are such multipliers.
"""

from __future__ import annotations

import numpy as np

from hetis.solver.shares.adjacency import fewest_types
from hetis.solver.shares.linear import Program
from hetis.solver.shares.problem import FloatArray, IntArray, ShareProblem
from hetis.solver.shares.result import Rule, Shares

TIE_SECONDS = 2.0


def cooperative(problem: ShareProblem, *, tie_seconds: float = TIE_SECONDS, seed: int = 0) -> Shares:
    """Return the envy-free shares with the highest total value; none is worth less than an equal split to its claimant.

    Of shares with the same total, those that span few adjacent types, searched for at most ``tie_seconds`` (0: no
    search).
    """
    program = share_program(problem)
    add_no_envy(program, problem)
    found = program.solve(seed=seed)
    assert found is not None, "an equal split is without envy"
    columns, duals = found
    count = len(problem.weights)
    multipliers = np.zeros((count, count))
    multipliers[~np.eye(count, dtype=bool)] = np.maximum(0.0, -duals[len(problem.counts) :])
    bound = cooperative_bound(problem, multipliers)
    return _settled(problem, Rule.COOPERATIVE, program, columns, bound, multipliers, tie_seconds, seed)


def non_cooperative(problem: ShareProblem, *, tie_seconds: float = TIE_SECONDS, seed: int = 0) -> Shares:
    """Return the shares with the highest total value in which all claimants have equal value per part.

    Nobody gains by claiming larger speed-ups than the true ones. There is no other guarantee: claiming smaller ones
    does pay, and a claimant may be worse off than with an equal split.
    """
    program = share_program(problem)
    add_equal_values(program, problem)
    found = program.solve(seed=seed)
    assert found is not None, "no shares at all are equal"
    columns, duals = found
    multipliers = np.zeros(len(problem.weights))
    multipliers[1:] = -duals[len(problem.counts) :]
    multipliers[0] = -multipliers[1:].sum()
    bound = non_cooperative_bound(problem, multipliers)
    return _settled(problem, Rule.NON_COOPERATIVE, program, columns, bound, multipliers, tie_seconds, seed)


def share_program(problem: ShareProblem, extra_columns: int = 0) -> Program:
    """Return the program that all rules share: total value, and the fleet's limits as its first rows."""
    count, types = problem.speedups.shape
    program = Program(np.concatenate([problem.speedups.ravel(), np.zeros(extra_columns)]))
    for j in range(types):
        program.add_rows((np.arange(count) * types + j)[None, :], np.ones((1, count)), high=float(problem.counts[j]))
    return program


def add_no_envy(program: Program, problem: ShareProblem) -> None:
    """Add rows ``w_l x_l / pi_l - w_l x_i / pi_i >= 0`` for l != i, by l and then i."""
    count, types = problem.speedups.shape
    own, other = _pairs(count)
    if not len(own):
        return
    here = own[:, None] * types + np.arange(types)
    there = other[:, None] * types + np.arange(types)
    worth = problem.speedups[own]
    values = np.concatenate(
        [worth / problem.weights[own][:, None], -worth / problem.weights[other][:, None]], axis=1
    )  # fmt: skip
    program.add_rows(np.concatenate([here, there], axis=1), values, low=0.0)


def add_equal_values(program: Program, problem: ShareProblem) -> None:
    """Add rows ``w_l x_l / pi_l = w_0 x_0 / pi_0`` for l > 0."""
    count, types = problem.speedups.shape
    if count < 2:
        return
    first = np.broadcast_to(np.arange(types), (count - 1, types))
    here = np.arange(1, count)[:, None] * types + np.arange(types)
    per_part = problem.speedups / problem.weights[:, None]
    values = np.concatenate([per_part[1:], -np.broadcast_to(per_part[0], (count - 1, types))], axis=1)
    program.add_rows(np.concatenate([here, first], axis=1), values, low=0.0, high=0.0)


def cooperative_bound(problem: ShareProblem, multipliers: FloatArray) -> float:
    """Return a bound on the total value of envy-free shares; ``multipliers`` [V, V] are any >= 0 of ``l envies i``."""
    mu = np.maximum(0.0, multipliers)
    w, pi = problem.speedups, problem.weights
    coefficients = w * (1.0 + mu.sum(axis=1) / pi)[:, None] - (mu.T @ w) / pi[:, None]
    return float(problem.counts @ np.maximum(0.0, coefficients).max(axis=0))


def non_cooperative_bound(problem: ShareProblem, multipliers: FloatArray) -> float:
    """Return a bound on the total value of equal shares; multipliers [V] are any; their mean is first subtracted."""
    nu = multipliers - multipliers.mean()
    coefficients = problem.speedups * (1.0 + nu / problem.weights)[:, None]
    return float(problem.counts @ np.maximum(0.0, coefficients).max(axis=0))


def _settled(
    problem: ShareProblem, rule: Rule, program: Program, columns: FloatArray, bound: float, multipliers: FloatArray,
    tie_seconds: float, seed: int,
) -> Shares:  # fmt: skip
    """Return the shares of an optimum, or of an equally good one with fewer types."""
    shape = problem.speedups.shape
    amounts = np.maximum(0.0, columns.reshape(shape))
    if tie_seconds > 0:
        amounts = fewest_types(problem, program, amounts, time_limit_s=tie_seconds, seed=seed)
    value = float(problem.values(amounts).sum())
    return Shares(rule=rule, amounts=amounts, value=value, bound=max(bound, value), multipliers=multipliers)


def _pairs(count: int) -> tuple[IntArray, IntArray]:
    """Return all (l, i) with l != i, by l and then i."""
    own, other = np.nonzero(~np.eye(count, dtype=bool))
    return own, other
