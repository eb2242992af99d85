"""The fleet as if nothing ran on it: replicas to choose from, and proofs that also hold together with running ones.

A *proof* bounds the worth of new replicas that are added to replicas that continue:

    enumerated  small fleets: a ceiling on the rate of every sub-fleet, by the exact search; packed by the master
    priced      larger ones: prices w of GPUs and rate prices a by column generation, with ``a_s rate <= cost + w use``
                for every replica of the family, so that replicas on GPUs u are worth at most w u

The first also lists the family of `uniform`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from hetis.solver.budget import Budget, Report, silent
from hetis.solver.cluster import Cluster, NodeGroup, node_of
from hetis.solver.placement.enumeration import explore_enumerated
from hetis.solver.placement.exact import TOLERANCES, ExactSearch, is_small
from hetis.solver.placement.generation import Bound, ColumnGeneration
from hetis.solver.placement.master import Columns, Master, Verdict
from hetis.solver.placement.outcome import rate_bound
from hetis.solver.placement.pipelines import uniform_templates
from hetis.solver.placement.search import row_costs_of, search
from hetis.solver.placement.tables import CostTables, FloatArray
from hetis.solver.placement.tabulation import build_cost_tables
from hetis.solver.placement.template import Template, interval_of
from hetis.solver.plan import ObjectiveKind
from hetis.solver.replanning.running import is_allowed

FINEST = 1e-6  # share by which ceilings of the exact search may exceed the rates found


@dataclass(frozen=True, slots=True, kw_only=True)
class Fresh:
    """The result of a search of the empty fleet.

    Attributes:
        templates: replicas to choose from.
        value, bound: value of the best plan found, and bound on all plans, in the master's unit.
        enumerated: ceilings on the rates of sub-fleets, as columns; if None, ``prices`` are the proof.
        prices: prices of column generation.
        row_prices: duals of the rows, if there are no ``prices``; [rows].
        is_empty: it is proved that no plan exists.
    """

    templates: tuple[Template, ...]
    value: float | None
    bound: float
    row_prices: FloatArray
    enumerated: Columns | None = None
    prices: Bound | None = None
    is_empty: bool = False


def search_fresh(
    costs: CostTables, demand: float | None, *, strategy: str, budget: Budget, gap_target: float, seed: int,
    threads: int, report: Report,
) -> Fresh:  # fmt: skip
    """Return replicas and a proof for the whole fleet; without time for more, what is known at once."""
    master = Master(costs.resources.limits, demand, costs.routes)
    if strategy == "uniform":
        return _enumerated(costs, master, uniform_templates(costs), budget, seed)
    if costs.problem.family.engine is not None:
        return _of_engine(costs, master, budget, gap_target, seed, report)
    if is_small(costs):
        found = _exact(costs, master, budget, seed)
        if found is not None:
            return found
    return _priced(costs, master, budget, gap_target, seed, threads, report)


def _exact(costs: CostTables, master: Master, budget: Budget, seed: int) -> Fresh | None:
    """Return the best replica of every sub-fleet; none is ruled out, since a plan that keeps replicas may need any."""
    search_of = ExactSearch(costs, master, row_costs_of(costs))
    nothing = {kind: np.zeros(len(f.rate)) for kind, f in search_of.frontiers.items()}
    for tolerance in (*TOLERANCES[:-1], FINEST):
        if not search_of.sweep(nothing, tolerance, budget):
            return None
    chosen, columns = search_of.columns(search_of.ceilings(FINEST), every=True)
    found = [(kind, v) for kind, v in chosen if search_of.frontiers[kind].rate[v] > 0.0]
    templates = tuple(search_of.template(kind, v) for kind, v in found)
    _, best = search_of.pack(search_of.rates(), budget.remaining_s(), seed)
    most = master.decide(columns, time_limit_s=budget.remaining_s(), seed=seed)
    duals = search_of.prices(search_of.rates())
    return Fresh(
        templates=templates,
        value=None if best.found is None else best.found.value,
        bound=_bound_of(most, costs, master),
        row_prices=np.zeros(len(costs.resources.rows)) if duals is None else duals.row_prices,
        enumerated=columns,
        is_empty=most.proves_none,
    )


def _enumerated(costs: CostTables, master: Master, templates: list[Template], budget: Budget, seed: int) -> Fresh:
    """Return the result for a family that is enumerated completely."""
    generation = ColumnGeneration(costs, master, row_costs_of(costs), budget=budget, report=silent)
    generation.pool.add(templates)
    columns = generation.pool.columns()
    best = master.decide(columns, time_limit_s=budget.remaining_s(), seed=seed)
    relaxed = master.solve_lp(columns) if templates else None
    return Fresh(
        templates=() if best.proves_none else tuple(generation.pool.templates),
        value=None if best.found is None else best.found.value,
        bound=_bound_of(best, costs, master),
        row_prices=np.zeros(len(costs.resources.rows)) if relaxed is None else relaxed.row_prices,
        enumerated=columns,
        is_empty=best.proves_none,
    )


def _bound_of(best: Verdict, costs: CostTables, master: Master) -> float:
    """Return a bound that no plan exceeds, from what HiGHS proved in its time."""
    if best.proves_none:
        return 0.0 if master.maximises else np.inf
    return _known_at_once(costs, master) if best.found is None else best.found.bound


def _priced(
    costs: CostTables, master: Master, budget: Budget, gap_target: float, seed: int, threads: int, report: Report
) -> Fresh:  # fmt: skip
    generation = ColumnGeneration(costs, master, row_costs_of(costs), budget=budget, report=report)
    generation.generate(uniform_templates(costs), threads=threads, gap_target=gap_target, choose_seed=seed)
    generation.choose(gap=gap_target / 10, seed=seed)
    known = generation.is_whole_family and np.isfinite(generation.bound.value) and np.any(generation.bound.row_prices)
    return Fresh(
        templates=tuple(generation.pool.templates),
        value=None if generation.incumbent is None else generation.incumbent.value,
        bound=generation.bound.value if known else _known_at_once(costs, master),
        row_prices=generation.bound.row_prices,
        prices=generation.bound if known else None,
        is_empty=not generation.may_have_plan,
    )


def _of_engine(
    costs: CostTables, master: Master, budget: Budget, gap_target: float, seed: int, report: Report
) -> Fresh:  # fmt: skip
    found = explore_enumerated(
        costs, master, row_costs_of(costs), budget=budget, gap_target=gap_target, seed=seed, report=report
    )  # fmt: skip
    return Fresh(
        templates=found.templates,
        value=found.value,
        bound=found.prices.value if found.prices is not None else _known_at_once(costs, master),
        row_prices=np.zeros(len(costs.resources.rows)) if found.prices is None else found.prices.row_prices,
        prices=found.prices,
        is_empty=found.is_empty,
    )


def _known_at_once(costs: CostTables, master: Master) -> float:
    return rate_bound(costs) if master.maximises else 0.0


# --- what remains of a fleet when some of its GPUs are taken


def search_left_over(
    costs: CostTables, taken: set[str], demand_rps: float | None, *, strategy: str, budget: Budget, gap_target: float,
    seed: int, threads: int,
) -> tuple[Template, ...]:  # fmt: skip
    """Return the replicas of the best plan on the GPUs that are not ``taken``, as replicas of the whole fleet.

    ``demand_rps``: the goodput that they have to serve if the objective is minimised.
    """
    left = _left_over(costs.problem.cluster, taken)
    if left is None:
        return ()
    objective = costs.problem.objective
    if objective.kind in (ObjectiveKind.COST, ObjectiveKind.GPUS):
        objective = replace(objective, demand_rps=demand_rps)
    part = build_cost_tables(replace(costs.problem, cluster=left, objective=objective))
    outcome = search(part, strategy, budget, gap_target, seed, threads, silent)
    if outcome is None:
        return ()
    found = (_translated(template, part, costs) for template, _ in outcome.chosen)
    return tuple(template for template in found if template is not None and is_allowed(costs, template))


def _left_over(cluster: Cluster, taken: set[str]) -> Cluster | None:
    """Return nodes with no taken GPUs unchanged, and every other node separately with its remaining GPUs."""
    groups: list[NodeGroup] = []
    touched = {node_of(device) for device in taken}
    for group in cluster.node_groups:
        whole = [i for i in range(group.count) if group.node_name(i) not in touched]
        if whole:
            groups.append(replace(group, name=f"{group.name}/", count=len(whole)))
        for i in range(group.count):
            name = group.node_name(i)
            if name in touched:
                slots, _ = group.slots_left(lambda index, _gpu, name=name: f"{name}/{index}" not in taken)  # type: ignore[misc]
                if slots:
                    groups.append(replace(group, name=f"{group.name}/{name}", count=1, gpus=slots))
    return replace(cluster, node_groups=tuple(groups)) if groups else None


def _translated(template: Template, part: CostTables, whole: CostTables) -> Template | None:
    """Translate a replica of the remaining fleet to the whole fleet: classes by the node groups they come from."""
    class_of = [_origin(part, g, whole) for g in range(len(part.classes))]
    stages = []
    for stage in template.stages:
        g, size = part.ranks[stage.rank]
        rank = whole.rank_of(class_of[g], size, part.rank_dp[stage.rank])
        if rank is None:
            return None
        pool_class = class_of[stage.pool_class] if stage.pool_class >= 0 else -1
        stages.append(replace(stage, rank=rank, pool_class=pool_class))
    mix, zones = part.mixes[template.mix], part.scopes[template.scope].zones
    mixes = [x for x, other in enumerate(whole.mixes) if other == mix]
    primaries = {whole.ranks[stage.rank][0] for stage in stages}
    scopes = [
        i
        for i, scope in enumerate(whole.scopes)
        if scope.zones == zones and scope.serves(mix) and all(map(scope.computes_on, primaries))
    ]
    if not mixes or not scopes:
        return None
    found = replace(template, scope=scopes[0], mix=mixes[0], stages=tuple(stages))
    return replace(found, interval_s=interval_of(whole, found))


def _origin(part: CostTables, g: int, whole: CostTables) -> int:
    """Return the class of the whole fleet from which a class of the remaining fleet comes."""
    name, gpu = part.classes[g].groups[0].name.partition("/")[0], part.classes[g].gpu
    return next(
        i for i, c in enumerate(whole.classes) if c.gpu == gpu and any(group.name == name for group in c.groups)
    )
