"""Published rules for sharing a mixed fleet: Gavel's max-min, Gandiva_fair's trading, and an equal split.

As defined in `SYSTEMS.md` section 2. If a published rule leaves a tie open, the shares with the highest total value are
used: the baseline in its best case.
"""

from __future__ import annotations

import numpy as np

from hetis.solver.shares.oef import share_program
from hetis.solver.shares.problem import FloatArray, ShareProblem
from hetis.solver.shares.result import Rule, Shares

LEAST_SPEED = 1e-2  # relative to the slowest type a job runs on
LEVEL_LOSS = 1e-9  # of the level, given up so that the second program has room for rounding


def equal_split(problem: ShareProblem) -> Shares:
    """Return the same part of every GPU type for every claimant, by weight."""
    amounts = problem.equal_split
    value = float(problem.values(amounts).sum())
    return Shares(rule=Rule.EQUAL, amounts=amounts, value=value, bound=value, multipliers=np.zeros(0))


def max_min(problem: ShareProblem, *, seed: int = 0) -> Shares:
    """Return Gavel's (OSDI'20) shares: the least value over that of an equal split is as large as possible.

    Of those shares, the ones with the highest total value. ``bound`` is that of the second program.
    """
    count, types = problem.speedups.shape
    over_equal = problem.speedups / problem.values(problem.equal_split)[:, None]
    cells = count * types
    columns = np.concatenate([np.arange(cells).reshape(count, types), np.full((count, 1), cells)], axis=1)
    levels = share_program(problem, extra_columns=1)
    levels.gain = np.concatenate([np.zeros(cells), [1.0]])
    levels.add_rows(columns, np.concatenate([over_equal, -np.ones((count, 1))], axis=1), low=0.0)
    found = levels.solve(seed=seed)
    assert found is not None, "nobody having anything is a solution"
    program = share_program(problem)
    program.add_rows(columns[:, :-1], over_equal, low=float(found[0][cells]) * (1.0 - LEVEL_LOSS))
    best = program.solve(seed=seed)
    assert best is not None, "the level was reached"
    amounts = np.maximum(0.0, best[0].reshape(count, types))
    value = float(problem.values(amounts).sum())
    # Weak duality: claimants that must reach a level pay for it, and each type goes to the claimant of highest worth.
    multipliers = np.maximum(0.0, -best[1][types:])
    paid = float(found[0][cells]) * float(multipliers.sum())
    bound = float(problem.counts @ (problem.speedups + multipliers[:, None] * over_equal).max(axis=0)) - paid
    return Shares(rule=Rule.MAX_MIN, amounts=amounts, value=value, bound=max(bound, value), multipliers=multipliers)


def trading(problem: ShareProblem) -> Shares:
    """Return Gandiva_fair's (EuroSys'20) shares: pairs trade fast GPUs of one for slow ones of the other.

    Trading starts from an equal split. The pair whose speed-ups between two types differ most trades first, at the mean
    of the two speed-ups as the price, until one of them has nothing to trade. Both gain by every trade, so that nobody
    has less than an equal split at the end.
    """
    amounts = problem.equal_split.copy()
    types = range(len(problem.counts))
    # If a job cannot run on GPUs, these are worth next to nothing to it, and it sells them at any price.
    speeds = np.maximum(problem.speedups, LEAST_SPEED)
    while True:
        best_gain, trade = 1e-9, None
        for slow in types:
            for fast in types:
                ratio = speeds[:, fast] / speeds[:, slow]
                sellers = np.where(amounts[:, fast] > 1e-9, ratio, np.inf)  # give fast GPUs: they gain little by them
                buyers = np.where(amounts[:, slow] > 1e-9, ratio, -np.inf)
                gain = float(buyers.max() - sellers.min())
                if np.isfinite(gain) and gain > best_gain * (1.0 + 1e-12):
                    best_gain, trade = gain, (slow, fast, int(sellers.argmin()), int(buyers.argmax()))
        if trade is None:
            value = float(problem.values(amounts).sum())
            return Shares(rule=Rule.TRADING, amounts=amounts, value=value, bound=np.inf, multipliers=np.zeros(0))
        _trade(speeds, amounts, *trade)


def _trade(speedups: FloatArray, amounts: FloatArray, slow: int, fast: int, seller: int, buyer: int) -> None:
    """Move as many fast GPUs to the buyer, and slow ones to the seller, as both can give."""
    price = (speedups[seller, fast] / speedups[seller, slow] + speedups[buyer, fast] / speedups[buyer, slow]) / 2.0
    moved = min(amounts[seller, fast], amounts[buyer, slow] / price)
    for claimant, sign in ((seller, -1.0), (buyer, 1.0)):
        amounts[claimant, fast] += sign * moved
        amounts[claimant, slow] -= sign * moved * price
    amounts[np.abs(amounts) < 1e-12] = 0.0
