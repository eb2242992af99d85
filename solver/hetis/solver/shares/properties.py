"""Properties of shares: envy, sharing incentive, waste, and the number of GPU types that a job spans."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hetis.solver.shares.adjacency import by_speed, spans
from hetis.solver.shares.oef import share_program
from hetis.solver.shares.problem import BoolArray, FloatArray, IntArray, ShareProblem

TOLERANCE = 1e-6  # relative


@dataclass(frozen=True, slots=True, kw_only=True)
class Properties:
    """Properties of given shares. Claimants are jobs of tenants; see `ShareProblem`.

    Attributes:
        envy: [V, V] claimant l's value per part with i's share, over that with its own; l envies i if this is above 1.
        over_equal_split: [V] value over that of an equal split; below 1 sharing does not pay for the claimant.
        unused: [K] GPUs that nobody has.
        could_gain: total value that could be added with nobody losing, as a share of the total: 0 is Pareto efficient.
        spans: [V] GPU types from the slowest to the fastest in the claimant's share.
        contiguous: [V] whether the claimant has a share of every type between them.
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


def properties_of(problem: ShareProblem, amounts: FloatArray, *, seed: int = 0) -> Properties:
    """Derive the properties of shares from the shares alone, for any rule."""
    values, weights = problem.values(amounts), problem.weights
    with np.errstate(divide="ignore", invalid="ignore"):
        own = values / weights
        envy = (problem.speedups @ amounts.T) / weights[None, :] / own[:, None]
    envy = np.where(np.isnan(envy), 1.0, envy)  # nothing compared with nothing
    np.fill_diagonal(envy, 1.0)
    used = amounts[:, by_speed(problem)] > TOLERANCE * problem.counts[by_speed(problem)]
    span = spans(problem, amounts)
    return Properties(
        envy=envy,
        over_equal_split=values / problem.values(problem.equal_split),
        unused=problem.counts - amounts.sum(axis=0),
        could_gain=_could_gain(problem, values, seed),
        spans=span,
        contiguous=used.sum(axis=1) == span,
    )


def _could_gain(problem: ShareProblem, values: FloatArray, seed: int) -> float:
    """Return the possible total value beyond the sum of ``values`` if nobody may have less, as a share of that sum."""
    count, types = problem.speedups.shape
    program = share_program(problem)
    served = values > 0.0
    cells = np.arange(count * types).reshape(count, types)
    program.add_rows(cells[served], problem.speedups[served] / values[served, None], low=1.0 - 1e-9)
    found = program.solve(seed=seed)
    assert found is not None, "the shares themselves are a solution"
    total = float(values.sum())
    return max(0.0, float(found[0] @ program.gain) - total) / total if total > 0 else 0.0
