"""Shares as an answer: the GPUs of every claimant, their value, and the bound on the value."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from hetis.solver.shares.problem import FloatArray, ShareProblem


class Rule(StrEnum):
    """The rule by which shares are chosen."""

    COOPERATIVE = "cooperative"  # OEF: highest total value without envy
    NON_COOPERATIVE = "non-cooperative"  # OEF: highest total value at equal value per part
    MAX_MIN = "gavel"  # Gavel: the least gain over an equal split is largest
    TRADING = "gandiva-fair"  # Gandiva_fair: equal split, then pairs of tenants trade fast GPUs for slow ones
    EQUAL = "equal-split"  # the same part of every type


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """Shares of every claimant and type, in GPUs; fractions are shares of time.

    ``value`` is the total; no shares under this rule exceed ``bound`` (infinite for `gandiva-fair`, a procedure and not
    an optimum). ``multipliers`` prove the bound: see `check_shares`.
    """

    rule: Rule
    amounts: FloatArray  # [V, K]
    value: float
    bound: float
    multipliers: FloatArray  # [V, V] cooperative, [V] non-cooperative, else empty

    @property
    def gap(self) -> float:
        return abs(self.bound - self.value) / self.value if np.isfinite(self.bound) else np.inf


def tenant_values(problem: ShareProblem, amounts: FloatArray) -> FloatArray:
    """Return the value of each tenant: the sum over its jobs, [T]."""
    values: FloatArray = np.bincount(
        problem.tenant_of, weights=problem.values(amounts), minlength=len(problem.tenants)
    ).astype(float)
    return values
