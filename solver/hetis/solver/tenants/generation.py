"""Column generation for several tenants at once: one inventory and its prices, every tenant priced at its own worth.

Each round prices the replicas of every tenant at the same row prices; `bound.py` turns the results into a bound, for
every rule. Prices lie between those of the relaxation and those of the best bound (Wentges smoothing), as for one
tenant.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hetis.solver.budget import Budget, Progress, Report
from hetis.solver.placement.classes import Resources
from hetis.solver.placement.generation import MAX_ROUNDS, SMOOTHING
from hetis.solver.placement.pool import lifted
from hetis.solver.placement.tables import FloatArray
from hetis.solver.tenants.bound import TenantsBound, TenantsGoal, bound_of
from hetis.solver.tenants.master import TenantColumns, TenantsRelaxation, solve_relaxation
from hetis.solver.tenants.tenant_solver import PricedTenant, utilisation

LEAST_MULTIPLIER = 1e-6  # of the greatest: no rate is worth nothing, since a replica's floor would then be infinite


class JointGeneration:
    """Column generation for one goal. ``alone`` [tenants] are the rates that count as 1."""

    def __init__(
        self, solvers: Sequence[PricedTenant], alone: FloatArray, goal: TenantsGoal, budget: Budget, report: Report
    ) -> None:
        self.solvers, self.alone, self.goal = solvers, alone, goal
        self.budget, self.report = budget, report
        self.resources: Resources = solvers[0].atlas.resources
        # Factors from a tenant's request/s to a normalised rate; pricing uses saturated rates only.
        self._scales = np.array([utilisation(c.tenant) / a for c, a in zip(solvers, alone, strict=True)])
        self.bound: TenantsBound | None = None
        self.is_infeasible = False  # whether some prices prove that the floors cannot be met

    def run(self, target_gap: float) -> None:
        """Add columns until the bound is within ``target_gap`` of the relaxation, or nothing improves on it."""
        smooth = True
        for _ in range(MAX_ROUNDS):
            relaxed = solve_relaxation(self._columns(), self.resources.limits, self.goal)
            if relaxed is None:
                return  # columns that meet the floors were given: only rounding can make them infeasible
            if self._gap(relaxed) <= target_gap:
                return
            self._tell(relaxed)
            prices, multipliers = self._between(relaxed) if smooth else (relaxed.row_prices, relaxed.multipliers)
            added, complete = self._price(self._lifted(prices, relaxed.value), self._least(multipliers))
            if not complete or self.is_infeasible or (not added and not smooth):
                return
            smooth = added > 0

    def vary(self) -> None:
        """Add columns that are nearly as good at the bound's prices, for whole counts to choose from."""
        if self.bound is None:
            return
        prices = self._lifted(self.bound.row_prices, self.bound.value)
        multipliers = self._least(self.bound.multipliers) * self._scales
        for solver, multiplier in zip(self.solvers, multipliers.tolist(), strict=True):
            solver.vary(prices, multiplier, self.budget)

    def _columns(self) -> list[TenantColumns]:
        return [c.capped_columns(float(a)) for c, a in zip(self.solvers, self.alone, strict=True)]

    def _gap(self, relaxed: TenantsRelaxation) -> float:
        if self.bound is None:
            return np.inf
        return (self.bound.value - relaxed.value) / max(relaxed.value, 1e-12)

    def _between(self, relaxed: TenantsRelaxation) -> tuple[FloatArray, FloatArray]:
        """Return prices and multipliers between relaxation and best bound: dual feasible for seen columns."""
        if self.bound is None:
            return relaxed.row_prices, relaxed.multipliers
        kept, new = SMOOTHING, 1.0 - SMOOTHING
        return (
            kept * self.bound.row_prices + new * relaxed.row_prices,
            kept * self.bound.multipliers + new * relaxed.multipliers,
        )

    def _lifted(self, prices: FloatArray, value: float) -> FloatArray:
        """Return prices with a floor for those of GPUs: the ratio of a column of free GPUs could be infinite."""
        total = max(float(prices @ self.resources.limits), value, 1e-9)
        return lifted(prices, self.resources, total)

    def _least(self, multipliers: FloatArray) -> FloatArray:
        return np.asarray(np.maximum(multipliers, LEAST_MULTIPLIER * multipliers.max(initial=1e-9)))

    def _price(self, prices: FloatArray, multipliers: FloatArray) -> tuple[int, bool]:
        """Price every tenant's replicas and derive a bound; return how many are new, and whether all was searched."""
        efficiency, added, complete = np.zeros(len(self.solvers)), 0, True
        for i, solver in enumerate(self.solvers):
            most, new, whole = solver.price(prices, float(multipliers[i] * self._scales[i]), self.budget)
            efficiency[i], added, complete = most * self._scales[i], added + new, complete and whole
        found = bound_of(self.goal, prices, efficiency, self.resources.limits.astype(float))
        self.is_infeasible = found is None
        if found is not None and found.value < (np.inf if self.bound is None else self.bound.value):
            self.bound = found
        return added, complete

    def _tell(self, relaxed: TenantsRelaxation) -> None:
        columns = sum(len(c.pool.templates) for c in self.solvers)
        self.report(
            Progress(
                phase=f"column generation, {columns} columns of {len(self.solvers)} tenants",
                elapsed_s=self.budget.elapsed_s(),
                bound=self.bound.value if self.bound is not None else None,
                gap=self._gap(relaxed) if self.bound is not None else None,
            )
        )
