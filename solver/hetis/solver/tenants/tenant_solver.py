"""A tenant in the search: columns on the shared inventory, and its rate alone on any part of the inventory.

`EnumeratedTenant` knows the best replica of every sub-fleet of a small fleet, so that packings of its columns are
optimal. `PricedTenant` knows some replicas of a larger fleet and finds more at given prices.

`JointGeneration` generates columns for all at once: one inventory and its prices, every tenant priced at its own worth.
Each round prices the replicas of every tenant at the same row prices, which gives a bound for every rule (`bound_of`).
Prices lie between those of the relaxation and those of the best bound (Wentges smoothing), as for one tenant.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from hetis.solver.budget import Budget, Progress, Report, SearchSettings
from hetis.solver.errors import NoPlanFoundError
from hetis.solver.placement.exact import TOLERANCES, ExactSearch, is_small, solve_exactly
from hetis.solver.placement.fleet import IntArray, Resources
from hetis.solver.placement.generation import KEEP, MAX_ROUNDS, SMOOTHING, ColumnGeneration, Pool, lifted
from hetis.solver.placement.master import Columns, Master
from hetis.solver.placement.pipelines import uniform_templates
from hetis.solver.placement.pricing import pricers_of, tolerance_for, whole
from hetis.solver.placement.tables import BoolArray, CostTables, FloatArray, Tables
from hetis.solver.placement.template import Template
from hetis.solver.tenants.master import (
    TenantColumns,
    TenantsBound,
    TenantsGoal,
    TenantsRelaxation,
    bound_of,
    solve_relaxation,
)
from hetis.solver.tenants.problem import Tenant

GAP_OF_PARTS = 0.02  # minimum gap target of searches on a part of the fleet
MAX_SUBFLEETS = 1000  # sub-fleets that are listed if it is unknown whether anything fits on a part of a large fleet
VARIETY = 0.93  # least ratio of columns of other sizes, relative to the best
LEAST_MULTIPLIER = 1e-6  # relative to the greatest: rates are never worth nothing, which would make floors infinite
NOTHING_BELOW = 1.0 - 1e-6  # relative to the least ratio that improves anything


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantReach:
    """A tenant's rate alone, and the rate that no plan exceeds; in its objective's requests/s.

    ``chosen`` are the replicas that reach it, if they were searched for.
    """

    rate: float
    bound: float
    chosen: tuple[tuple[Template, int], ...] = ()


class TenantSolver(Protocol):
    """The interface of a tenant that the rules use."""

    tenant: Tenant
    costs: CostTables

    def alone(self, limits: IntArray, budget: Budget, report: Report) -> TenantReach | None:
        """Return the reach with these amounts of every row; None if it is proved to be 0."""
        ...

    def columns(self, alone: float) -> TenantColumns:
        """Return the known columns, with rates relative to ``alone``."""
        ...

    def template(self, column: int) -> Template:
        """Return the replica of a column."""
        ...


def utilisation(tenant: Tenant) -> float:
    """Return the factor from a saturated rate to the tenant's objective."""
    problem = tenant.problem
    return problem.assumptions.planned_utilisation if problem.objective.kind.value == "goodput" else 1.0


def within(costs: CostTables, limits: IntArray) -> CostTables:
    """Return the same problem with every row of the inventory limited to these amounts."""
    counts = np.zeros(len(costs.classes), dtype=np.int64)
    for (device_class, p), limit in zip(costs.resources.rows, limits, strict=True):
        if p == 1:
            counts[device_class] = limit

    def narrowed(tables: Tables) -> Tables:
        return tables._replace(available=np.minimum(tables.available, counts))

    resources = Resources(costs.resources.rows, np.minimum(costs.resources.limits, limits))
    return replace(costs, resources=resources, scopes=tuple(scope.changed(narrowed) for scope in costs.scopes))


class EnumeratedTenant:
    """A tenant on a fleet small enough to know the best replica of every sub-fleet."""

    def __init__(self, tenant: Tenant, costs: CostTables, settings: SearchSettings, budget: Budget) -> None:
        self.tenant, self.costs, self._seed = tenant, costs, settings.seed
        self._search = ExactSearch(costs, self._master(costs.resources.limits))
        needed = {kind: np.zeros(len(f.rate)) for kind, f in self._search.frontiers.items()}
        self.complete = all(self._search.sweep(needed, tolerance, budget) for tolerance in TOLERANCES)
        self._chosen, self._columns = self._search.columns(self._search.rates())
        self._ceilings = self._search.columns(self._search.ceilings(TOLERANCES[-1]))[1]

    def alone(self, limits: IntArray, budget: Budget, report: Report) -> TenantReach | None:
        if not self._chosen:
            return None
        master, unit = self._master(limits), utilisation(self.tenant)
        found, _ = master.solve_milp(self._columns, time_limit_s=np.inf, gap=0.0, seed=self._seed)
        above, _ = master.solve_milp(self._ceilings, time_limit_s=np.inf, gap=0.0, seed=self._seed)
        if found is None or found.value <= 0.0 or above is None:
            return None
        return TenantReach(rate=unit * found.value, bound=unit * max(found.value, above.bound))

    def columns(self, alone: float) -> TenantColumns:
        return _normalised(self._columns, utilisation(self.tenant) / alone)

    def ceilings(self, alone: float) -> TenantColumns:
        """Return the same sub-fleets with rates that no replica on them exceeds."""
        return _normalised(self._ceilings, utilisation(self.tenant) / alone)

    def template(self, column: int) -> Template:
        return self._search.template(*self._chosen[column])

    def _master(self, limits: IntArray) -> Master:
        return Master(limits, None, self.costs.routes)


class PricedTenant:
    """A tenant on a larger fleet. ``rate_cap`` is a saturated rate that none of its plans exceeds."""

    def __init__(self, tenant: Tenant, costs: CostTables, settings: SearchSettings) -> None:
        self.tenant, self.costs, self._settings = tenant, costs, settings
        self.pool = Pool(costs)
        self.pool.add(uniform_templates(costs))
        no_costs, tolerance = np.zeros(len(costs.resources.rows)), tolerance_for(settings.gap_target)
        self._pricers = pricers_of(costs, no_costs, whole(costs.problem.family), settings.threads, tolerance)
        self._barren: BoolArray = np.zeros(len(self._pricers), dtype=bool)  # sides without a single replica
        self.rate_cap = np.inf

    def alone(self, limits: IntArray, budget: Budget, report: Report) -> TenantReach | None:
        s, part, unit = self._settings, within(self.costs, limits), utilisation(self.tenant)
        is_whole = np.array_equal(part.resources.limits, self.costs.resources.limits)
        master = Master(part.resources.limits, None, part.routes)
        gap = s.gap_target if is_whole else max(s.gap_target, GAP_OF_PARTS)
        own = replace(s, budget=budget, report=report, gap_target=gap)
        alone = ColumnGeneration(part, master, own)
        found = None if is_small(part) else alone.solve(uniform_templates(part))
        few = is_small(part) or np.prod(limits + 1.0) <= MAX_SUBFLEETS
        if found is None and alone.may_have_plan and few and not budget.is_spent():
            # Few GPUs: nothing has been searched yet, or the columns found fit in no packing.
            with suppress(NoPlanFoundError):  # which proves nothing
                found = solve_exactly(part, master, own)
                if found is None and not budget.is_spent():
                    return None
        bound = found.bound if found is not None else alone.bound.value if alone.may_have_plan else 0.0
        if is_whole:
            self.rate_cap = min(self.rate_cap, bound)
            self.pool.add(alone.pool.templates)
        if found is None:
            return TenantReach(rate=0.0, bound=unit * bound)
        self.pool.add([template for template, _ in found.chosen])
        return TenantReach(rate=unit * found.value, bound=unit * bound, chosen=found.chosen)

    def columns(self, alone: float) -> TenantColumns:
        return _normalised(self.pool.columns(), utilisation(self.tenant) / alone)

    def capped_columns(self, alone: float) -> TenantColumns:
        """Return the same columns, with each rate limited to a rate that no plan exceeds."""
        return _normalised(self.pool.columns(self.rate_cap), utilisation(self.tenant) / alone)

    def template(self, column: int) -> Template:
        return self.pool.templates[column]

    def price(self, prices: FloatArray, multiplier: float, budget: Budget) -> tuple[float, int, bool]:
        """Search for columns at these prices; ratios are exact only above the least one that improves anything.

        At prices divided by ``multiplier`` (the value of a saturated request/s), no column seen has a ratio above one;
        ways through the fleet with lower ratios improve nothing.

        Returns (a bound e on the saturated requests/s per unit of value, the number of new columns, whether the search
        was complete).
        """
        floors = NOTHING_BELOW * self._ratios_that_matter(prices, multiplier)
        priced = [
            pricer.price(prices, floor, KEEP, budget, rate_cap=self.rate_cap)
            for pricer, floor in zip(self._pricers, floors, strict=True)
        ]
        complete = all(side.complete for side in priced)
        theta = np.array([side.ratio_bound for side in priced])
        self._barren |= (theta == 0.0) & complete
        theta[self._barren] = 0.0
        added = self.pool.add([template for side in priced for template in side.templates])
        return self.costs.routes.highest_rate(theta, 1.0).value, added, complete

    def vary(self, prices: FloatArray, multiplier: float, budget: Budget) -> None:
        """Add near-optimal columns of other sizes and classes, to fill the GPUs that the best replicas leave."""
        ratios = self._ratios_that_matter(prices, multiplier)
        for pricer, ratio in zip(self._pricers, ratios, strict=True):
            if np.isfinite(ratio) and ratio > 0.0 and not budget.is_spent():
                priced = pricer.price(prices, VARIETY * ratio, VARIETY, budget, rate_cap=self.rate_cap)
                self.pool.add(priced.templates)

    def _ratios_that_matter(self, prices: FloatArray, multiplier: float) -> FloatArray:
        """Return the ratios [sides] above which a column improves something; no column seen is above them."""
        routes, columns = self.costs.routes, self.pool.columns(self.rate_cap)
        seen = np.zeros(routes.num_sides)
        np.maximum.at(seen, columns.sides, columns.rates / (columns.uses @ prices))
        rate_prices = multiplier * routes.shared_out(multiplier * seen, 1.0, np.zeros_like(routes.capacity))
        with np.errstate(divide="ignore"):
            ratios: FloatArray = 1.0 / rate_prices
        ratios[1:][seen[1:] == 0.0] = 0.0
        ratios[self._barren] = np.inf
        return ratios


def _normalised(columns: Columns, scale: float) -> TenantColumns:
    return TenantColumns(scale * columns.rates, columns.uses, columns.sides)


def templates_of(solver: TenantSolver, counts: Sequence[int]) -> tuple[tuple[Template, int], ...]:
    """Return the replicas behind counts of columns, each with its count."""
    return tuple((solver.template(k), int(n)) for k, n in enumerate(counts) if n)


# --- column generation for several tenants at once


class JointGeneration:
    """Column generation for one goal. ``alone`` [tenants] are the rates that count as 1."""

    def __init__(
        self, solvers: Sequence[PricedTenant], alone: FloatArray, goal: TenantsGoal, budget: Budget, report: Report
    ) -> None:
        self.solvers, self.alone, self.goal = solvers, alone, goal
        self.budget, self.report = budget, report
        self.resources: Resources = solvers[0].costs.resources
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
                return  # columns that meet the floors were given, so only rounding can make them infeasible
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
        """Return prices and multipliers between the relaxation and the best bound; dual feasible for seen columns."""
        if self.bound is None:
            return relaxed.row_prices, relaxed.multipliers
        multipliers = SMOOTHING * self.bound.multipliers + (1.0 - SMOOTHING) * relaxed.multipliers
        return SMOOTHING * self.bound.row_prices + (1.0 - SMOOTHING) * relaxed.row_prices, multipliers

    def _lifted(self, prices: FloatArray, value: float) -> FloatArray:
        """Return prices with a floor for GPUs, because the ratio of a column of free GPUs could be infinite."""
        return lifted(prices, self.resources, max(float(prices @ self.resources.limits), value, 1e-9))

    def _least(self, multipliers: FloatArray) -> FloatArray:
        return np.asarray(np.maximum(multipliers, LEAST_MULTIPLIER * multipliers.max(initial=1e-9)))

    def _price(self, prices: FloatArray, multipliers: FloatArray) -> tuple[int, bool]:
        """Price every tenant's replicas and derive a bound; return how many are new, and whether all were searched."""
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
