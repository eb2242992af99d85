"""Properties of shares: envy, sharing incentive, waste, types spanned by a job; false claims; rounds of whole GPUs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from hetis.solver.shares.fair_shares import by_speed, share_program, solve_shares, spans
from hetis.solver.shares.share_problem import BoolArray, FairnessRule, FloatArray, IntArray, ShareProblem

TOLERANCE = 1e-6  # relative


@dataclass(frozen=True, slots=True, kw_only=True)
class Properties:
    """Properties of given shares. Claimants are jobs of tenants; see `ShareProblem`.

    Attributes:
        envy: [V, V] claimant l's value per part with i's share, over that with its own; l envies i if this is above 1.
        over_equal_split: [V] value over that of an equal split; if below 1, sharing does not pay for the claimant.
        unused: [K] GPUs that no claimant has.
        could_gain: total value that could be added without any claimant losing, as a share of the total: 0 is Pareto
            efficient.
        spans: [V] number of GPU types from the slowest to the fastest in the claimant's share.
        contiguous: [V] whether the claimant has a share of every type between these.
    """

    envy: FloatArray
    over_equal_split: FloatArray
    unused: FloatArray
    could_gain: float
    spans: IntArray
    contiguous: BoolArray

    @property
    def is_envy_free(self) -> bool:
        return bool(self.envy.max() <= 1.0 + TOLERANCE)

    @property
    def has_sharing_incentive(self) -> bool:
        return bool(self.over_equal_split.min() >= 1.0 - TOLERANCE)

    @property
    def is_efficient(self) -> bool:
        return self.could_gain <= TOLERANCE


def properties_of(problem: ShareProblem, amounts: FloatArray) -> Properties:
    """Derive the properties of shares from the shares alone, under any rule."""
    values, weights = problem.values(amounts), problem.weights
    with np.errstate(divide="ignore", invalid="ignore"):
        own = values / weights
        envy = (problem.speedups @ amounts.T) / weights[None, :] / own[:, None]
    envy = np.where(np.isnan(envy), 1.0, envy)  # 0 / 0: neither share has any value
    np.fill_diagonal(envy, 1.0)
    used = amounts[:, by_speed(problem)] > TOLERANCE * problem.counts[by_speed(problem)]
    span = spans(problem, amounts)
    return Properties(
        envy=envy,
        over_equal_split=values / problem.values(problem.equal_split),
        unused=problem.counts - amounts.sum(axis=0),
        could_gain=_could_gain(problem, values),
        spans=span,
        contiguous=used.sum(axis=1) == span,
    )


def _could_gain(problem: ShareProblem, values: FloatArray) -> float:
    """Return how much total value could be added to ``values`` without any claimant losing, as a share of their sum."""
    count, types = problem.speedups.shape
    program = share_program(problem)
    served = values > 0.0
    cells = np.arange(count * types).reshape(count, types)
    worth = problem.speedups * problem.equal_split
    program.add_rows(cells[served], worth[served] / values[served, None], low=1.0 - 1e-9)
    found = program.solve()
    assert found is not None, "the shares themselves are a solution"
    total = float(values.sum())
    return max(0.0, float(found[0] @ program.gain) - total) / total if total > 0 else 0.0


# --- false claims: stated speed-ups that are higher or lower than the true ones


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """The best of the claims tried: speed-ups times ``factors`` [types] change the true value by ``gain``."""

    factors: tuple[float, ...]
    gain: float  # true value with the claim over that without it, minus 1


def best_claim(problem: ShareProblem, rule: FairnessRule, claimant: int, *, inflate: bool, tries: int) -> Claim:
    """Return the best of ``tries`` false claims of a claimant; each type but its slowest is misstated by up to 2 times.

    This is a search, not a proof: gains that it finds are possible, and others may be as well.
    """
    generator = np.random.default_rng(0)
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


def _value(problem: ShareProblem, rule: FairnessRule, claimant: int, stated: FloatArray, true: FloatArray) -> float:
    """Return the true value of a claimant's share if it states other speed-ups."""
    jobs = [job for tenant in problem.tenants for job in tenant.jobs]
    jobs[claimant] = replace(jobs[claimant], speedups=tuple(stated.tolist()))
    left = iter(jobs)
    tenants = tuple(replace(t, jobs=tuple(next(left) for _ in t.jobs)) for t in problem.tenants)
    shares = solve_shares(replace(problem, tenants=tenants), rule)
    return float(true @ shares.amounts[claimant])


# --- whole GPUs in consecutive rounds: what a claimant loses by rounding in one round, it is owed in the next


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """Whole shares of one round, and the debt to every claimant after it.

    Attributes:
        granted: [V, K] GPUs.
        owed: [V, K] GPU rounds by which a claimant has had less than its share so far; negative if it has had more.
        waiting: claimants whose smallest job did not fit in the GPUs that they would have received.
    """

    granted: IntArray
    owed: FloatArray
    waiting: tuple[int, ...]


def next_round(problem: ShareProblem, amounts: FloatArray, owed: FloatArray) -> Round:
    """Round ``amounts`` [V, K] plus what is ``owed`` [V, K] to whole GPUs, type by type, by largest remainder.

    A claimant that would get fewer GPUs than its smallest job needs waits, starting with the one that is owed the
    least. Its GPUs go to the others of that type, who will get fewer later. The granted GPUs never exceed the fleet,
    and over many rounds their mean converges to ``amounts``.
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
    """Return whole numbers >= 0, only for ``able``, close to what is ``due`` [V]; they have the same sum as ``due``."""
    target = np.maximum(0.0, due)
    parts = np.where(able, np.floor(target + 1e-9), 0.0)
    wanted = min(available, int(np.floor(target.sum() + 0.5 + 1e-9)))
    while able.any() and parts.sum() < wanted:
        parts[int(np.where(able, parts - due, np.inf).argmin())] += 1
    while parts.sum() > wanted:  # more is due than available: claimants furthest above their due give up GPUs first
        parts[int(np.where(parts > 0, parts - due, -np.inf).argmax())] -= 1
    return parts.astype(np.int64)
