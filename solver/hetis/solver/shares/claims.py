"""The gain of a tenant by a false claim: speed-ups stated higher or lower than they are."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from hetis.solver.shares.problem import FloatArray, ShareProblem
from hetis.solver.shares.result import Rule
from hetis.solver.shares.solve import solve_shares


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """The tried claim that pays best: speed-ups times ``factors`` [types] change the true value by ``gain``."""

    factors: tuple[float, ...]
    gain: float  # value by the true speed-ups with the claim over without it, less 1


def best_claim(problem: ShareProblem, rule: Rule, claimant: int, *, inflate: bool, tries: int, seed: int = 0) -> Claim:
    """Return the best of ``tries`` false claims of one claimant, each type except its slowest off by up to 2 times.

    This is a search and not a proof: a gain found is possible, a gain not found may still be possible.
    """
    generator = np.random.default_rng(seed)
    true = problem.speedups[claimant]
    honest = _value(problem, rule, claimant, true, true)
    best = Claim(factors=(1.0,) * len(true), gain=0.0)
    for _ in range(tries):
        factors = generator.uniform(1.0, 2.0, len(true)) * generator.integers(0, 2, len(true))
        factors = np.where(factors < 1.0, 1.0, factors)
        slowest = np.where(true > 0.0, true, np.inf).argmin()
        factors[slowest] = 1.0
        stated = true * factors if inflate else np.where(true > 0.0, np.maximum(true / factors, true[slowest]), 0.0)
        gain = _value(problem, rule, claimant, stated, true) / honest - 1.0
        if gain > best.gain + 1e-9:
            ratios = np.divide(stated, true, out=np.ones_like(true), where=true > 0.0)
            best = Claim(factors=tuple(ratios.tolist()), gain=gain)
    return best


def _value(problem: ShareProblem, rule: Rule, claimant: int, stated: FloatArray, true: FloatArray) -> float:
    """Return the true value of a claimant's share if it states other speed-ups."""
    index = 0
    tenants = []
    for tenant in problem.tenants:
        jobs = []
        for job in tenant.jobs:
            jobs.append(replace(job, speedups=tuple(stated.tolist())) if index == claimant else job)
            index += 1
        tenants.append(replace(tenant, jobs=tuple(jobs)))
    shares = solve_shares(replace(problem, tenants=tuple(tenants)), rule)
    return float(true @ shares.amounts[claimant])
