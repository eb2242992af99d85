"""The replicas of one tenant: those of plans for it alone, then those that are enumerated at shared prices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from hetis.solver.budget import Budget, SearchSettings, silent
from hetis.solver.constraints import Constraint, Duty, Exclude, RestrictRole
from hetis.solver.errors import NoPlanFoundError
from hetis.solver.placement.binding import BoundStage, bind
from hetis.solver.placement.columns import Columns, columns_of, distinct
from hetis.solver.placement.constrained_problem import apply_constraints
from hetis.solver.placement.enumeration import EnumeratedColumns
from hetis.solver.placement.fleet import IntArray, Resources
from hetis.solver.placement.outcome import rate_bound
from hetis.solver.placement.replicas.tables import CostTables, Tables
from hetis.solver.placement.replicas.tabulation import build_cost_tables
from hetis.solver.placement.replicas.template import Template
from hetis.solver.placement.search import search
from hetis.solver.placement.solve import objective_scale
from hetis.solver.tenants.joint_master import TenantColumns
from hetis.solver.tenants.tenancy import Tenant

GAP_OF_PARTS = 0.02  # minimum gap target of searches on a part of the fleet


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantReach:
    """A tenant's rate alone, and the rate that no plan exceeds; in its objective's requests/s.

    ``chosen`` are the replicas that reach it.
    """

    rate: float
    bound: float
    chosen: tuple[tuple[Template, int], ...] = ()


class TenantReplicas:
    """The replicas of one tenant that are known: those of its own plans, then those that were enumerated."""

    def __init__(self, tenant: Tenant, settings: SearchSettings) -> None:
        searched = replace(tenant.problem, constraints=tuple(_keeping_classes(tenant.problem.constraints)))
        self.tenant, self._settings = tenant, settings
        self.costs = build_cost_tables(apply_constraints(searched))
        self.scale = objective_scale(tenant.problem)  # from a saturated rate to the objective's
        self._none = np.zeros(len(self.costs.resources.rows))
        self.enumerated = EnumeratedColumns(self.costs, self._none, None)
        self.own: list[Template] = []

    def reach(self, limits: IntArray, budget: Budget) -> TenantReach:
        """Return the reach with these amounts of every row."""
        part = within(self.costs, limits)
        is_whole = np.array_equal(part.resources.limits, self.costs.resources.limits)
        gap = self._settings.gap_target if is_whole else max(self._settings.gap_target, GAP_OF_PARTS)
        found, bound = None, rate_bound(part)
        with suppress(NoPlanFoundError):
            found = search(part, replace(self._settings, budget=budget, report=silent, gap_target=gap))
            bound = bound if found is None and budget.is_spent() else 0.0
        if found is None:
            return TenantReach(rate=0.0, bound=self.scale * bound)
        return TenantReach(rate=self.scale * found.value, bound=self.scale * found.bound, chosen=found.chosen)

    def keep(self, reaches: Iterable[TenantReach]) -> None:
        """Add the replicas of the tenant's own plans, before any is enumerated."""
        self.own = distinct(self.costs, (template for reach in reaches for template, _ in reach.chosen))
        self.enumerated.list_first(self.costs, Budget())

    def counts_of(self, reach: TenantReach) -> IntArray:
        """Return the counts of columns that reach it."""
        of_shape = {template.shape: count for template, count in reach.chosen}
        return np.array([of_shape.get(template.shape, 0) for template in self.own], dtype=np.int64)

    def columns(self, alone: float) -> TenantColumns:
        """Return the known columns, with rates relative to ``alone``."""
        known = columns_of(self.costs, self.own, self._none)
        listed = self.enumerated.columns
        every: Columns = known if listed is None else known.followed_by(listed)
        return TenantColumns.of(every, self.costs.routes, self.scale / alone)

    def template(self, column: int) -> Template:
        """Return the replica of a column."""
        own = len(self.own)
        return self.own[column] if column < own else self.enumerated.template(column - own)


def _keeping_classes(constraints: Iterable[Constraint]) -> Iterable[Constraint]:
    """Yield the constraints, with excluded GPUs barred from all work instead: all tenants then have their classes."""
    for each in constraints:
        if isinstance(each, Exclude):
            yield from (RestrictRole(gpus=each.gpus, duty=duty, only=False) for duty in (Duty.PRIMARY, Duty.WORKER))
        else:
            yield each


def within(costs: CostTables, limits: IntArray) -> CostTables:
    """Return the same problem with every row of the inventory limited to these amounts."""
    counts = np.zeros(len(costs.classes), dtype=np.int64)
    for (device_class, p), limit in zip(costs.resources.rows, limits, strict=True):
        if p == 1:
            counts[device_class] = limit

    def narrowed(tables: Tables) -> Tables:
        return tables._replace(available=np.minimum(tables.available, counts))

    resources = Resources(costs.resources.rows, np.minimum(costs.resources.limits, limits))
    scopes = tuple(scope.changed(narrowed) for scope in costs.scopes)
    return replace(costs, resources=resources, scopes=scopes, shared={})


def part_of(limits: IntArray, claim: float) -> IntArray:
    """Return a tenant's part of every inventory row, rounded down: all parts together fit in the fleet's nodes."""
    return np.asarray(np.floor(limits * claim + 1e-9), dtype=np.int64)


def bind_together(
    tables: Sequence[CostTables], templates: Sequence[Sequence[Template]], *, seed: int
) -> list[list[list[BoundStage]]]:
    """Return named GPUs for the stages of every tenant's templates; tenants number their ranks differently."""
    ranks = tuple(dict.fromkeys(rank for costs in tables for rank in costs.ranks))
    place = {rank: s for s, rank in enumerate(ranks)}
    together = [
        replace(t, stages=tuple(replace(stage, rank=place[costs.ranks[stage.rank]]) for stage in t.stages))
        for costs, own in zip(tables, templates, strict=True)
        for t in own
    ]
    bound = iter(bind(replace(tables[0], ranks=ranks), together, seed=seed))
    return [[next(bound) for _ in own] for own in templates]
