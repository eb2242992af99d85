"""The fleet as if nothing ran on it: replicas to choose from, and proofs that also hold together with running ones.

A *proof* bounds the worth of new replicas that are added to replicas that continue:

    enumerated  the family of `uniform`: all its replicas, packed by the master
    priced      others: prices w of GPUs and rate prices a of the relaxation, with ``a_s rate <= cost + w use`` for
                every replica of the family, so that replicas on GPUs u are worth at most w u

*The bound on every re-planning* is the joint worth of kept and changed replicas and the best new ones. New replicas
serve at most ``share = 1 - d / horizon`` of the horizon, where d is the shortest start of any. Let w and a be the
prices of the relaxation, with ``a_s rate <= cost + w use`` for every replica on side s. Whatever continues, the
plan's net rate is at most

    max   sum_o (a_s net_o + s_r) x_o  +  sum_g share w_g u_g  +  sum of links price capacity
    s.t.  sum_o use_og x_o + u_g <= GPUs of g,   x_o of one replica <= 1,
          sum_o use_og x_o + u_g - m_g <= GPUs of g that do something now,   sum of m_g <= moves

over whole x and u: a small mixed program, whose bound by HiGHS is used. Where cost is minimised, new replicas cost at
least ``(1 + d / horizon) (pi demand - sum_o a_s rate_o x_o - w u - links)``, and at least 0.

Replicas of `uniform` are enumerated instead, each counted with the share of a replica whose weights are spread evenly
over its GPUs.

Prefill and decode replicas may be larger than any plan needs, and then serve all that it needs even during their start:
``share`` is 1 if w is the price of those.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hetis.solver.budget import SearchSettings
from hetis.solver.cluster import Cluster, NodeGroup, node_of
from hetis.solver.constraints import ConstraintIndex
from hetis.solver.placement.columns import Bound, Columns, columns_of, distinct
from hetis.solver.placement.constraint_rows import ClassRows
from hetis.solver.placement.fleet import UNIFIED
from hetis.solver.placement.master import Master, Verdict, master_of
from hetis.solver.placement.optimum import explore_enumerated
from hetis.solver.placement.outcome import CROSSING, rate_bound
from hetis.solver.placement.replicas.equal_stages import uniform_templates
from hetis.solver.placement.replicas.tables import CostTables, FloatArray
from hetis.solver.placement.replicas.tabulation import build_cost_tables
from hetis.solver.placement.replicas.template import Template, interval_of, stages_in, use_of
from hetis.solver.placement.search import search
from hetis.solver.plan import LEAST_DEMAND_RPS, ObjectiveKind, Role
from hetis.solver.replanning.change import Fate
from hetis.solver.replanning.net_master import ColumnList, NetMaster, ProgramLimits, Row
from hetis.solver.replanning.running import Candidate, has_stages, is_allowed, new_replica


@dataclass(frozen=True, slots=True, kw_only=True)
class Fresh:
    """The result of a search of the empty fleet.

    Attributes:
        templates: replicas to choose from.
        value, bound: value of the best plan found, and a bound on all plans, in the master's unit.
        enumerated: all replicas of the family, as columns; if None, ``prices`` are the proof.
        prices: prices of the relaxation.
        row_prices: duals of the rows, if there are no ``prices``; [rows].
        is_empty: whether it is proved that no plan exists.
    """

    templates: tuple[Template, ...]
    value: float | None
    bound: float
    row_prices: FloatArray
    enumerated: Columns | None = None
    prices: Bound | None = None
    is_empty: bool = False


def search_fresh(costs: CostTables, settings: SearchSettings) -> Fresh:
    """Return replicas and a proof for the whole fleet; if there is no time for more, what is known without a search."""
    master = master_of(costs)
    if costs.problem.family.uneven_layers:
        return _explored(costs, master, settings)
    return _enumerated(costs, master, distinct(costs, uniform_templates(costs)), settings)


def _enumerated(costs: CostTables, master: Master, templates: list[Template], settings: SearchSettings) -> Fresh:
    """Return the result for a family that is enumerated completely."""
    columns = columns_of(costs, templates, master.row_costs)
    best = master.decide(columns, time_limit_s=settings.budget.remaining_s(), seed=settings.seed)
    relaxed = master.solve_lp(columns) if templates else None
    return Fresh(
        templates=() if best.proves_none else tuple(templates),
        value=None if best.found is None else best.found.value,
        bound=_bound_of(best, costs, master),
        row_prices=np.zeros(len(costs.resources.rows)) if relaxed is None else relaxed.row_prices,
        enumerated=columns,
        is_empty=best.proves_none,
    )


def _bound_of(best: Verdict, costs: CostTables, master: Master) -> float:
    """Return a bound that no plan exceeds, from what HiGHS proved within its time."""
    if best.proves_none:
        return 0.0 if master.maximises else np.inf
    return _known_at_once(costs, master) if best.found is None else best.found.bound


def _explored(costs: CostTables, master: Master, settings: SearchSettings) -> Fresh:
    found = explore_enumerated(costs, master, settings)
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


# --- the rest of a fleet when some of its GPUs are taken


def search_left_over(
    costs: CostTables, taken: set[str], demand_rps: float | None, settings: SearchSettings
) -> tuple[Template, ...]:
    """Return the replicas of the best plan on the GPUs that are not ``taken``, as replicas of the whole fleet.

    ``demand_rps``: the goodput that they have to serve if the objective is minimised.
    """
    left = _left_over(costs.problem.cluster, taken)
    if left is None:
        return ()
    objective = costs.problem.objective
    if objective.kind in (ObjectiveKind.COST, ObjectiveKind.GPUS):
        assert demand_rps is not None, "the objective is minimised"
        # The remaining demand may be less than can be planned for; a replica for slightly more serves it, too.
        objective = replace(objective, demand_rps=max(demand_rps, LEAST_DEMAND_RPS))
    index = _index_of(left, costs.problem.constraint_index)
    part = build_cost_tables(replace(costs.problem, cluster=left, objective=objective, constraint_index=index))
    outcome = search(part, settings)
    if outcome is None:
        return ()
    found = (_translated(template, part, costs) for template, _ in outcome.chosen)
    return tuple(template for template in found if template is not None and is_allowed(costs, template))


def _left_over(cluster: Cluster, taken: set[str]) -> Cluster | None:
    """Return nodes without taken GPUs unchanged, and every other node as a group of its own with its remaining GPUs."""
    groups: list[NodeGroup] = []
    touched = {node_of(device) for device in taken}
    for group in cluster.node_groups:
        whole = [i for i in range(group.count) if group.node_name(i) not in touched]
        if whole:
            groups.append(replace(group, name=f"{group.name}/", count=len(whole)))
        for i in range(group.count):
            name = group.node_name(i)
            if name in touched:
                left = group.keeping(lambda index, _gpu, name=name: f"{name}/{index}" not in taken)  # type: ignore[misc]
                if left.gpus:
                    groups.append(replace(left, name=f"{group.name}/{name}", count=1))
    return replace(cluster, node_groups=tuple(groups)) if groups else None


def _index_of(left: Cluster, index: ConstraintIndex | None) -> ConstraintIndex | None:
    """Return the constraints on the GPUs of the whole fleet by the names of the groups that are left."""
    if index is None:
        return None
    found = {
        (group.name, slots.gpu): index.of(_origin_name(group), slots.gpu)
        for group in left.node_groups
        for slots in group.gpus
    }
    return replace(index, on=found)


def _origin_name(group: NodeGroup) -> str:
    """Return the name of the whole fleet's node group from which a group of `_left_over` comes."""
    return group.name.partition("/")[0]


def _translated(template: Template, part: CostTables, whole: CostTables) -> Template | None:
    """Translate a replica from the remaining fleet to the whole fleet; classes are matched by their node groups."""
    class_of = [_origin(part, g, whole) for g in range(len(part.classes))]
    stages = stages_in(whole, part, class_of, template)
    mix, before = part.mixes[template.mix], part.scopes[template.scope]
    mixes = [x for x, other in enumerate(whole.mixes) if other == mix]
    scopes = [
        i
        for i, scope in enumerate(whole.scopes)
        if (scope.zones, scope.number) == (before.zones, before.number)
        and scope.serves(mix)
        and has_stages(whole, scope, stages)
    ]
    if mix.role is not Role.UNIFIED and whole.routes.beside:
        inside = [whole.classes[class_of[g]] for g, c in enumerate(part.classes) if before.place.has(c)]
        scopes = [i for i in scopes if all(map(whole.scopes[i].place.has, inside))]
        scopes.sort(key=lambda i: len(whole.scopes[i].place.blocks or range(len(whole.scopes))))
    if not stages or not mixes or not scopes:
        return None
    found = replace(template, scope=scopes[0], mix=mixes[0], stages=stages)
    return replace(found, interval_s=interval_of(whole, found))


def _origin(part: CostTables, g: int, whole: CostTables) -> int:
    """Return the class of the whole fleet from which a class of the remaining fleet comes."""
    name, gpu = _origin_name(part.classes[g].groups[0]), part.classes[g].gpu
    return next(
        i for i, c in enumerate(whole.classes) if c.gpu == gpu and any(group.name == name for group in c.groups)
    )


# --- the bound on every re-planning


PARTS = 1 << 20  # units of the demand, in which the cost of what continuing replicas do not serve is counted


def bound_of(
    net: NetMaster, options: Sequence[Candidate], fresh: Fresh, busy: Mapping[int, int], ends: ProgramLimits
) -> float:
    """Return a bound: no re-planning is worth more (costs less), in the master's unit.

    ``busy`` [classes]: GPUs that do something in the running plan. Only those can do the same as before, whatever
    replica they are in, so a limit on moves bounds the use of every class: ``use_g - moved_g <= busy_g``.
    """
    if fresh.enumerated is not None:
        return by_enumeration(net, options, net_columns(net, fresh.enumerated), busy, ends)
    if fresh.prices is not None:
        return _by_prices(net, options, fresh.prices, busy, ends)
    return fresh.bound + sum(net.stay_rates.values()) if net.master.maximises else 0.0


def _bound(
    listed: ColumnList, limits: Mapping[Row, int], demand: float | None, ends: ProgramLimits,
    classes: ClassRows | None = None,
) -> float:  # fmt: skip
    """Return HiGHS's bound over whole counts, or the relaxation's if it has none in time; if neither, 0 or inf."""
    nothing = 0.0 if demand is None else np.inf
    if not listed.uses:
        return nothing
    of_rows, columns = np.array(list(limits.values()), dtype=np.int64), listed.columns()
    master = Master(of_rows, demand, listed.routes, classes=classes)
    relaxed = master.solve_lp(columns)
    if relaxed is None:
        return nothing
    found, _ = master.solve_milp(
        columns, nodes=ends.nodes, time_limit_s=ends.time_limit_s, gap=ends.gap, seed=ends.seed, stop=ends.stop
    )  # fmt: skip
    if found is None or not np.isfinite(found.bound):
        return relaxed.value
    return float((min if master.maximises else max)(found.bound, relaxed.value))


def _limits_of(net: NetMaster, *kinds: str) -> dict[Row, int]:
    """Return rows of the inventory of these kinds with their limits."""
    return {row: int(net.inventory.limits[i]) for row, i in net.inventory.rows.items() if row[0] in kinds}


def stay_of(net: NetMaster, option: Candidate) -> float:
    """Return what staying is worth in addition to the rate."""
    return net.stay_rates.get(option.running, 0.0) if net.master.maximises and option.fate is Fate.KEPT else 0.0


def _busy_limits(net: NetMaster, busy: Mapping[int, int]) -> dict[Row, int]:
    """Return a row per class for the GPUs that do the same as before, if moves are limited."""
    classes = range(len(net.costs.classes)) if ("moves",) in net.inventory.rows else ()
    return {("busy", g): busy.get(g, 0) for g in classes}


def _add_moves(listed: ColumnList) -> None:
    """Add the number of GPUs of each class that move."""
    for row in [row for row in listed.rows if row[0] == "busy"]:
        listed.add({row: -1, ("moves",): 1}, 0.0)


def _by_prices(
    net: NetMaster, options: Sequence[Candidate], prices: Bound, busy: Mapping[int, int], ends: ProgramLimits
) -> float:
    costs, maximises = net.costs, net.master.maximises
    start_s = net.least_start_s()
    share, later = net.change_costs.served_share(start_s), 1.0 + start_s / net.change_costs.horizon_s
    if costs.routes.splits_roles or not maximises:
        share = 1.0
    limits = _limits_of(net, "gpus", "replica", "moves") | _busy_limits(net, busy)
    numbered = {row: number for number, row in enumerate(limits)}
    listed = ColumnList(numbered, replace(costs.routes, splits_roles=False))
    for option in options:
        template, (rate, cost) = option.template, net.net(option)
        worth = float(prices.rate_prices[costs.side_of(template.scope, template.mix)])
        rate = min(rate, prices.value * net.share_of(template)) if maximises else rate  # no plan serves more
        use = Counter[Row]({("replica", option.running): 1})
        for g, size in new_replica(template).missing(costs):
            use["gpus", g] += size
            use["busy", g] += size
        listed.add(use, worth * rate + stay_of(net, option), cost)
    # New replicas get all room for larger TP groups: its worth is a constant, as is that of the links.
    finite = np.isfinite(costs.routes.capacity)
    fixed = float((prices.link_prices[finite] * costs.routes.capacity[finite]).sum())
    for (g, p), price, limit in zip(costs.resources.rows, prices.row_prices, costs.resources.limits, strict=True):
        if p == 1:
            listed.add({("gpus", g): 1, ("busy", g): 1}, share * float(price))
        else:
            fixed += float(price * limit)
    _add_moves(listed)
    if maximises:
        return (_bound(listed, limits, None, ends) + fixed) * (1.0 + CROSSING)
    demand = float(prices.rate_prices[UNIFIED]) * (net.master.demand or 0.0) - fixed
    if demand <= 0.0:
        return 0.0
    part = later * demand / PARTS
    listed.add({}, demand / PARTS, part)  # one unit of the demand, served by new replicas
    return max(0.0, _bound(listed, limits, demand, ends) - part) * (1.0 - CROSSING)


def by_enumeration(
    net: NetMaster, options: Sequence[Candidate], columns: Columns, busy: Mapping[int, int], ends: ProgramLimits
) -> float:
    """Return the bound of the same master, with `net_columns` in place of new replicas and all of its rows."""
    costs = net.costs
    rows: list[Row] = [("row", *row) for row in costs.resources.rows]
    limits = dict(zip(rows, map(int, costs.resources.limits), strict=True))
    limits |= _limits_of(net, "replica", "stays", "moves") | _busy_limits(net, busy)
    listed = ColumnList({row: number for number, row in enumerate(limits)}, costs.routes)
    for option in options:
        template, (rate, cost) = option.template, net.net(option)
        use = _with_busy(dict(zip(rows, map(int, use_of(costs, template)), strict=True)))
        use["replica", option.running] = 1
        if stay := stay_of(net, option):
            listed.add({("stays", option.running): 1}, stay)
            use["stays", option.running] = -1
        listed.add(use, rate, cost, costs.side_of(template.scope, template.mix))
    for k, taken in enumerate(columns.uses):
        use = _with_busy(dict(zip(rows, map(int, taken), strict=True)))
        listed.add(use, float(columns.rates[k]), float(columns.costs[k]), int(columns.sides[k]))
    _add_moves(listed)
    return _bound(listed, limits, net.master.demand, ends, net.master.classes)


def net_columns(net: NetMaster, columns: Columns) -> Columns:
    """Return new replicas with ceilings on their net rates, or the least that they cost, whatever they start with."""
    costs, horizon_s = net.costs, net.change_costs.horizon_s
    of_gpus = [p == 1 for _, p in costs.resources.rows]
    numbers, of_columns = np.unique(columns.uses[:, of_gpus].sum(axis=1), return_inverse=True)
    starts_s = [net.least_start_s(int(number)) for number in numbers]
    shares = np.array([net.change_costs.served_share(s) if net.master.maximises else 1.0 for s in starts_s])
    later = np.array([1.0 + s / horizon_s for s in starts_s])
    return replace(columns, rates=columns.rates * shares[of_columns], costs=columns.costs * later[of_columns])


def _with_busy(use: dict[Row, int]) -> dict[Row, int]:
    """Return the use of the rows ``("row", class, p)`` with that of the classes' GPUs, which are those of p = 1."""
    return use | {("busy", row[1]): count for row, count in use.items() if row[2] == 1}
