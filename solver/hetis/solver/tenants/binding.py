"""Binding of several tenants' chosen replicas to named GPUs, none of them used twice, and a plan for each tenant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from hetis.solver.budget import Budget
from hetis.solver.placement.binding import BoundStage, bind
from hetis.solver.placement.master import Master
from hetis.solver.placement.outcome import Outcome, sound_bound
from hetis.solver.placement.pool import Pool
from hetis.solver.placement.solve import plan_of
from hetis.solver.placement.tables import Atlas, FloatArray
from hetis.solver.placement.template import Template
from hetis.solver.plan import Plan
from hetis.solver.tenants.master import TenantsChoice
from hetis.solver.tenants.tenant_solver import TenantReach, TenantSolver, templates_of, utilisation


def plans_of(
    solvers: Sequence[TenantSolver], choice: TenantsChoice, alone: Sequence[TenantReach], *, prices: FloatArray,
    multipliers: Sequence[float], budget: Budget, strategy: str, seed: int,
) -> list[Plan | None]:  # fmt: skip
    """Return the plan of every tenant on the whole cluster's GPUs, disjoint; None if it has no replica.

    A plan's bound is the rate that its tenant could reach alone, which may be far above its rate; its prices are those
    of the shared inventory, in the tenant's own rate.
    """
    chosen = [templates_of(c, counts.tolist()) for c, counts in zip(solvers, choice.counts, strict=True)]
    singles = [[template for template, n in parts for _ in range(n)] for parts in chosen]
    bound = bind_together([c.atlas for c in solvers], singles, seed=seed)
    plans: list[Plan | None] = []
    for i, (solver, stages) in enumerate(zip(solvers, bound, strict=True)):
        if not singles[i]:
            plans.append(None)
            continue
        unit, atlas = utilisation(solver.tenant), solver.atlas
        outcome = _outcome(
            atlas, chosen[i], bound=alone[i].bound / unit,
            prices=prices / (multipliers[i] * unit / alone[i].rate) if multipliers[i] > 0.0 else 0.0 * prices,
            interrupted=budget.cancelled.is_set(),
        )  # fmt: skip
        plans.append(plan_of(atlas, strategy, outcome, singles[i], stages, budget))
    return plans


def bind_together(
    atlases: Sequence[Atlas], templates: Sequence[Sequence[Template]], *, seed: int
) -> list[list[list[BoundStage]]]:
    """Return named GPUs for the stages of every tenant's templates; tenants number their ranks differently."""
    ranks = tuple(dict.fromkeys(rank for atlas in atlases for rank in atlas.ranks))
    place = {rank: s for s, rank in enumerate(ranks)}
    together = [
        replace(t, stages=tuple(replace(stage, rank=place[atlas.ranks[stage.rank]]) for stage in t.stages))
        for atlas, own in zip(atlases, templates, strict=True)
        for t in own
    ]
    bound = iter(bind(replace(atlases[0], ranks=ranks), together, seed=seed))
    return [[next(bound) for _ in own] for own in templates]


def _outcome(
    atlas: Atlas, chosen: tuple[tuple[Template, int], ...], *, bound: float, prices: FloatArray, interrupted: bool
) -> Outcome:
    """Return a tenant's replicas with the rate they serve; prefill and decode both use the fleet's one zone."""
    pool = Pool(atlas, np.zeros(len(atlas.resources.rows)))
    pool.add([template for template, _ in chosen])
    counts = np.zeros(len(pool.templates), dtype=np.int64)
    for template, n in chosen:
        counts[pool.place(template)] += n
    master, columns = Master(atlas.resources.limits, None, atlas.routes), pool.columns()
    flows = master.best_flows(columns, counts)
    value = master.served(columns, counts, flows)
    return Outcome(
        chosen=chosen,
        value=value,
        bound=sound_bound(bound, value, maximises=True),
        row_prices=prices,
        rate_prices=np.ones(atlas.routes.num_sides),
        flows=flows,
        interrupted=interrupted,
    )
