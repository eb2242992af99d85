"""One GPU type for prefill and one for decode: each pair of types is its own problem, and most are ruled out early.

This is the family of `splitwise`. Searches of wider families end with it, too: any pair that could beat their plan is
searched, so they are never worse.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from hetis.solver.budget import Budget, Progress, Report
from hetis.solver.placement.configurations import configurations
from hetis.solver.placement.out_of_reach import layers_per_s
from hetis.solver.placement.outcome import Outcome
from hetis.solver.placement.pricing import Pricer
from hetis.solver.placement.tables import CostTables, FloatArray
from hetis.solver.placement.template import Template
from hetis.solver.plan import ObjectiveKind, Role

Search = Callable[[CostTables, Report], Outcome | None]
TOLERANCE = 1e-3  # of ratios that only rule out pairs
ROUNDING = 1e-9  # ratio by which a limit may exceed the value from which it is computed
CHEAPEST = 1e-9  # USD/h, so that free GPUs have a finite ratio


def search_types(
    costs: CostTables, search: Search, known: Outcome | None, budget: Budget, threads: int, report: Report
) -> Outcome | None:
    """Return the best of ``known`` and every pair of GPU types, skipping pairs that cannot beat the best so far.

    ``known`` comes from a family that contains all pairs, so its bound holds. Without it the bound is the worst of the
    pairs' bounds.
    """
    objective = costs.problem.objective
    maximises, better = objective.maximises, max if objective.maximises else min
    best, bounds = known, list[float]()
    for pair, limit in _promising_first(costs, known, budget, threads):
        if best is not None and better(limit, best.value) == best.value:
            break
        found = None
        if best is None or not budget.is_spent():
            found = search(pair, _of_a_pair(report, best, maximises))
        if found is None and budget.is_spent():
            bounds.append(limit)
        if found is None:
            continue
        bounds.append(found.bound)
        if best is None or better(found.value, best.value) != best.value:
            best = replace(
                found,
                chosen=tuple((_in_scopes_of(costs, pair, t), n) for t, n in found.chosen),
                runners_up=tuple(_in_scopes_of(costs, pair, t) for t in found.runners_up),
            )
    if best is None or best is known:
        return known
    bound = better([*bounds, best.value]) if known is None else known.bound
    best = replace(best, bound=bound, interrupted=budget.cancelled.is_set())
    report(Progress(phase="pairs of GPU types", elapsed_s=budget.elapsed_s(), incumbent=best.value, bound=best.bound))
    return best


def _promising_first(
    costs: CostTables, known: Outcome | None, budget: Budget, threads: int
) -> list[tuple[CostTables, float]]:  # fmt: skip
    """Return every pair, without stage copies and attention workers, with a limit on its value, the best limit first.

    A type whose best replica of a role serves theta requests/s per GPU (or per unit of cost) serves at most theta times
    its GPUs; if one type has both roles, its GPUs are divided between them. Pricing need not look below a theta at
    which the limit could not beat ``known``, whatever the other role's theta.
    """
    objective = costs.problem.objective
    family = replace(costs.problem.family, max_copies=1, max_pool=0, roles=(Role.PREFILL, Role.DECODE))
    plain = replace(costs, problem=replace(costs.problem, family=family))
    gpus = list(dict.fromkeys(c.gpu for c in costs.classes))
    counts = {gpu: sum(c.available for c in costs.classes if c.gpu == gpu) for gpu in gpus}
    demand = (objective.demand_rps or 0.0) / costs.problem.assumptions.planned_utilisation
    floors = dict.fromkeys(gpus, 0.0)
    if known is not None and known.value > 0.0:
        enough = 1.0 - ROUNDING
        floors = {
            gpu: enough * (known.value / counts[gpu] if objective.maximises else demand / known.value) for gpu in gpus
        }
    ratios_budget = budget.share(0.5)  # the other half is for the pairs
    theta = {gpu: _best_ratios(plain.of_types(gpu, gpu), floors[gpu], ratios_budget, threads) for gpu in gpus}
    found = []
    for prefill in gpus:
        for decode in gpus:
            with np.errstate(divide="ignore"):
                effort = 1.0 / theta[prefill][0] + 1.0 / theta[decode][1]
                shared = counts[prefill] / effort
            if not objective.maximises:
                limit = effort * demand
            elif prefill == decode:
                limit = shared
            else:
                limit = min(counts[prefill] * theta[prefill][0], counts[decode] * theta[decode][1])
            if limit > 0.0 if objective.maximises else limit < np.inf:
                found.append((plain.of_types(prefill, decode), float(limit)))
    return sorted(found, key=lambda one: one[1], reverse=objective.maximises)


def _best_ratios(pair: CostTables, floor: float, budget: Budget, threads: int) -> FloatArray:
    """Return the highest rate per GPU, or per unit of cost, of a prefill and a decode replica, or ``floor``; [2]."""
    family, kind = pair.problem.family, pair.problem.objective.kind
    prices = np.zeros(len(pair.resources.rows))
    for row, (g, p) in enumerate(pair.resources.rows):
        price = pair.classes[g].usd_per_hour or 0.0
        prices[row] = (max(price, CHEAPEST) if kind is ObjectiveKind.COST else 1.0) if p == 1 else 0.0
    ratios = np.zeros(2)
    every = configurations(pair)
    for place, role in enumerate((Role.PREFILL, Role.DECODE)):
        for side in sorted({c.side for c in every if pair.mixes[c.mix].role is role}):
            pricer = Pricer(
                pair, [c for c in every if c.side == side], np.zeros_like(prices), max_copies=family.max_copies,
                max_pool=family.max_pool, threads=threads, tolerance=TOLERANCE,
            )  # fmt: skip
            priced = pricer.price(prices, floor, 1.0, budget, rate_cap=np.inf)
            ratios[place] = max(ratios[place], priced.ratio_bound)
        if not np.isfinite(ratios[place]):
            ratios[place] = _dense_ratio(pair, role, prices)
    return ratios


def _dense_ratio(pair: CostTables, role: Role, prices: FloatArray) -> float:
    """Return a bound on the role's ratio from dense work alone, which takes no time."""
    layers = pair.scopes[0].tables.num_layers
    speeds = layers_per_s(pair, role)
    of_gpu = {g: price for (g, p), price in zip(pair.resources.rows, prices, strict=True) if p == 1}
    return max(float(speeds[g] / price) / layers for g, price in of_gpu.items() if price > 0.0)


def _in_scopes_of(costs: CostTables, pair: CostTables, template: Template) -> Template:
    """Return a template of cost tables of two GPU types as one of the whole tables."""
    zones, mix = pair.scopes[template.scope].zones, pair.mixes[template.mix]
    here = (i for i, scope in enumerate(costs.scopes) if scope.zones == zones and scope.serves(mix))
    return replace(template, scope=next(here))


def _of_a_pair(report: Report, best: Outcome | None, maximises: bool) -> Report:
    """Return a report without a pair's bound, which does not hold for other pairs, and with the best incumbent."""
    better = max if maximises else min

    def told(progress: Progress) -> None:
        known = [value for value in (progress.incumbent, best.value if best else None) if value is not None]
        report(replace(progress, incumbent=better(known) if known else None, bound=None, gap=None))

    return told
