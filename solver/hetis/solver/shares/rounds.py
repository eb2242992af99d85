"""Whole GPUs in consecutive rounds: a loss by rounding in one round is owed to the claimant in the next."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hetis.solver.shares.problem import BoolArray, FloatArray, IntArray, ShareProblem


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """Whole shares of one round, and the debt to every claimant after it.

    Attributes:
        granted: [V, K] GPUs.
        owed: [V, K] GPU rounds by which a claimant has had less than its share so far; negative: more.
        waiting: claimants whose smallest job did not fit in the GPUs they would have had.
    """

    granted: IntArray
    owed: FloatArray
    waiting: tuple[int, ...]


def next_round(problem: ShareProblem, amounts: FloatArray, owed: FloatArray) -> Round:
    """Round ``amounts`` [V, K] plus what is ``owed`` [V, K] to whole GPUs, type by type, by largest remainder.

    A claimant that would get fewer GPUs than its smallest job needs waits, starting with the one that is owed least.
    Its GPUs go to the others of that type, who will have less later. The granted GPUs never exceed the fleet, and over
    many rounds their mean converges to ``amounts``.
    """
    due = amounts + owed
    able = np.ones(len(problem.weights), dtype=bool)
    while True:
        granted = np.stack(
            [_whole(due[:, j], able & (amounts[:, j] > 0.0), int(c)) for j, c in enumerate(problem.counts)], axis=1
        )
        short = able & (granted.sum(axis=1) < problem.min_gpus)
        if not short.any():
            break
        debts = np.where(short, owed.sum(axis=1), np.inf)
        able[int(debts.argmin())] = False
    waiting = tuple(int(v) for v in np.flatnonzero(~able))
    return Round(granted=granted, owed=due - granted, waiting=waiting)


def _whole(due: FloatArray, able: BoolArray, available: int) -> IntArray:
    """Return whole numbers >= 0, only for ``able``, close to what is ``due`` [V]; their sum is that of all ``due``."""
    target = np.maximum(0.0, due)
    parts = np.where(able, np.floor(target + 1e-9), 0.0)
    wanted = min(available, int(np.floor(target.sum() + 0.5 + 1e-9)))
    while able.any() and parts.sum() < wanted:
        parts[int(np.where(able, parts - due, np.inf).argmin())] += 1
    while parts.sum() > wanted:  # more is due than available: claimants furthest above their due give up GPUs first
        parts[int(np.where(parts > 0, parts - due, -np.inf).argmax())] -= 1
    return parts.astype(np.int64)
