"""Checks of shares, independent of the rule that chose them: limits, values, fairness, and the multipliers' bound."""

from __future__ import annotations

import math

import numpy as np

from hetis.solver.shares.share_problem import FairnessRule, FloatArray, ShareProblem, Shares

TOLERANCE = 1e-6


def check_shares(problem: ShareProblem, shares: Shares) -> tuple[str, ...]:
    """Return every error of shares as a sentence; empty if they are sound. Sums are taken term by term."""
    names = [f"{tenant.name}/{job.name}" for tenant in problem.tenants for job in tenant.jobs]
    found = []
    for j, gpu in enumerate(problem.gpus):
        given = math.fsum(shares.amounts[:, j])
        if given > gpu.count * (1.0 + TOLERANCE):
            found.append(f"{given:.6g} {gpu.gpu} are given away, there are {gpu.count}")
    if shares.amounts.min() < 0.0:
        found.append("a share is negative")
    values = [_worth(problem, l, shares.amounts[l]) for l in range(len(names))]
    total = math.fsum(values)
    if abs(total - shares.value) > TOLERANCE * max(1.0, total):
        found.append(f"the total value is {total:.9g}, stated is {shares.value:.9g}")
    if shares.bound < total * (1.0 - TOLERANCE):
        found.append(f"the total value {total:.9g} is above its bound {shares.bound:.9g}")
    found += _unfair(problem, shares, values, names)
    proven = _bound(problem, shares)
    if proven is not None and proven > shares.bound * (1.0 + TOLERANCE):
        found.append(f"the multipliers prove a bound of {proven:.9g}, stated is {shares.bound:.9g}")
    return tuple(found)


def _worth(problem: ShareProblem, claimant: int, share: FloatArray) -> float:
    return math.fsum(w * x for w, x in zip(problem.speedups[claimant], share, strict=True))


def _unfair(problem: ShareProblem, shares: Shares, values: list[float], names: list[str]) -> list[str]:
    parts = [value / weight for value, weight in zip(values, problem.weights, strict=True)]
    found = []
    if shares.rule is FairnessRule.COOPERATIVE:
        for l, name in enumerate(names):
            for i, other in enumerate(names):
                theirs = _worth(problem, l, shares.amounts[i]) / problem.weights[i]
                if theirs > parts[l] * (1.0 + TOLERANCE) + 1e-12:
                    found.append(f"{name} envies {other}: {theirs:.6g} per part against {parts[l]:.6g}")
    if shares.rule is FairnessRule.NON_COOPERATIVE and max(parts) > min(parts) * (1.0 + TOLERANCE):
        found.append(f"values per part are {min(parts):.6g} to {max(parts):.6g}, must be equal")
    return found


def _bound(problem: ShareProblem, shares: Shares) -> float | None:
    """Return the Lagrangean bound of `oef`, derived again entry by entry."""
    w, pi, y = problem.speedups, problem.weights, shares.multipliers
    claimants, types = range(w.shape[0]), range(w.shape[1])

    def coefficient(l: int, j: int) -> float:
        if shares.rule is FairnessRule.NON_COOPERATIVE:
            return float(w[l, j] + w[l, j] * (y[l] - np.mean(y)) / pi[l])
        gained = math.fsum(max(0.0, y[l, i]) * w[l, j] / pi[l] for i in claimants)
        lost = math.fsum(max(0.0, y[i, l]) * w[i, j] / pi[l] for i in claimants)
        return float(w[l, j] + gained - lost)

    if shares.rule not in (FairnessRule.COOPERATIVE, FairnessRule.NON_COOPERATIVE):
        return None
    return math.fsum(problem.counts[j] * max(0.0, *(coefficient(l, j) for l in claimants)) for j in types)
