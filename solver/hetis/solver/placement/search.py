"""The choice of a search: enumerating equal stages, exact or by column generation, with zones merged or not.

*Zones merged.* If zones differ only in their numbers of nodes, the fleet with all nodes in one zone is a relaxation of
the real one: links inside a zone are at least as fast as links between zones, every replica of the real family is a
replica there, and what it takes is available there. So its bound holds, at the cost of one zone instead of all of them
and their combinations, and each of its replicas can be placed in any zone that has the GPUs.

*Pairs of types.* In the family of `splitwise` all prefill replicas have one GPU type and all decode replicas have one.
Each pair of types is a problem of its own, and most are ruled out early. Searches of wider families end with it, too:
any pair that could beat their plan is searched, so they are never worse.

*Columns for pins*, which the relaxation does not need because pricing ignores pins. For each pin, GPUs that must be
used are priced at almost nothing. If the number of replicas is limited, pricing looks for columns fast enough to be
among so few, with each GPU type almost free in turn. If rent or GPUs are limited, they serve as the price of a replica.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from hetis.solver.budget import Budget, Progress, Report, SearchSettings, silent
from hetis.solver.cluster import Network
from hetis.solver.compiled import is_cached
from hetis.solver.errors import NoPlanFoundError
from hetis.solver.placement.enumeration import search_enumerated
from hetis.solver.placement.exact import is_small, solve_exactly
from hetis.solver.placement.fleet import DeviceClass
from hetis.solver.placement.frontier import explore
from hetis.solver.placement.generation import Bound, ColumnGeneration, Pool
from hetis.solver.placement.master import UNDECIDED, Master, Pins, master_of, master_with_pins
from hetis.solver.placement.nodes import NodeProgram, counts_of_kinds, kind_of
from hetis.solver.placement.outcome import Outcome, layers_per_s, rate_bound, sound_bound
from hetis.solver.placement.pipelines import uniform_templates
from hetis.solver.placement.pricing import KERNELS, pricers_of, whole
from hetis.solver.placement.tables import CostTables, FloatArray, Scope
from hetis.solver.placement.tabulation import build_cost_tables
from hetis.solver.placement.template import Template, interval_of, stages_in
from hetis.solver.plan import ObjectiveKind, Role
from hetis.solver.problem import PlacementProblem

RELAXATION, COLUMNS = 0.6, 0.8  # shares of the time left with pins: for the relaxation, then for the pins' columns


def search(costs: CostTables, settings: SearchSettings, *, simplest_within: float = 0.0) -> Outcome | None:
    """Return the best replicas found with a bound, or None if the family is empty or the budget ended before a plan.

    With ``simplest_within``, a share of the best value, an engine's replicas use the fewest nodes that lose no more
    than this share. Progress is in the master's unit: saturated requests/s, or what is minimised.
    """
    if not costs.ranks:
        return None
    family, budget = costs.problem.family, settings.budget
    if family.one_type_per_role and costs.role_types is None:
        return search_types(costs, settings, None)
    master = master_with_pins(costs)
    if settings.strategy == "uniform":
        return _enumerate_uniform(costs, master, settings)
    if family.engine is not None or is_small(costs):
        if family.engine is not None:
            outcome = search_enumerated(costs, master, settings, simplest_within)
        else:
            _announce_compilation((explore,), settings)
            outcome = solve_exactly(costs, master, settings)
        is_short = budget.is_spent() and not (family.engine is not None and simplest_within)
        if is_short and (outcome is None or abs(outcome.bound - outcome.value) > settings.gap_target * outcome.value):
            return _better(outcome, _first_plan(costs, settings), master)
        return outcome
    generation = ColumnGeneration(costs, master, settings if master.pins is None else settings.within(RELAXATION))
    outcome = _generate(generation)
    if master.pins is not None:
        outcome = _pinned(generation, outcome, master.pins, settings)
    # Pairs of GPU types are searched without attention workers.
    if outcome is not None and family.splits_roles and family.decode_keeps_heads and costs.role_types is None:
        outcome = search_types(costs, settings, outcome)
    return outcome


def _pinned(
    generation: ColumnGeneration, known: Outcome | None, pins: Pins, settings: SearchSettings
) -> Outcome | None:
    """Return the best choice that keeps the pins, with columns generated for them; None if there is provably none.

    Raises:
        NoPlanFoundError: no choice was found, nor proved impossible.
    """
    if not generation.may_have_plan:
        return None
    generation.pool.add(tuple(pinned_columns(generation, pins, settings.budget.share(COLUMNS))))
    generation.choose()
    outcome = generation.outcome()
    if outcome is None:
        raise NoPlanFoundError(
            "no plan was found that keeps the pins on GPUs and replicas, nor a proof that there is none"
        )
    return outcome if known is None else _with_bound(outcome, known.bound, maximises=generation.master.maximises)


def _with_bound(outcome: Outcome, bound: float, *, maximises: bool) -> Outcome:
    """Return an outcome with another valid bound, if that is tighter."""
    tightest = (min if maximises else max)(outcome.bound, bound)
    return replace(outcome, bound=sound_bound(tightest, outcome.value, maximises=maximises))


def _generate(generation: ColumnGeneration) -> Outcome | None:
    """Run column generation, with zones merged or not."""
    costs, master, settings = generation.costs, generation.master, generation.settings
    _announce_compilation(KERNELS, settings)
    if master.demand is not None and not _can_serve(generation, master.demand):
        generation.may_have_plan = False
        return None
    one_zone, relaxed = merged_problem(costs.problem), None
    if one_zone is not None:
        merged = build_cost_tables(one_zone, is_relaxation=True)
        if costs.role_types is not None:
            merged = merged.of_types(*costs.role_types)
        outcome = _search_merged(merged, generation)
        if outcome is not None:
            return outcome
        relaxed = generation.bound.value if generation.is_whole_family else None
    outcome = generation.solve(uniform_templates(costs))
    if outcome is None and generation.may_have_plan and master.pins is None and not settings.budget.is_spent():
        # The columns found fit in no packing, which proves nothing.
        return solve_exactly(costs, master, settings)
    if outcome is None or relaxed is None:
        return outcome
    # The bound of the relaxation holds whatever the search over separate zones proves.
    return _with_bound(outcome, relaxed, maximises=master.maximises)


def _announce_compilation(kernels: Sequence[Callable[..., object]], settings: SearchSettings) -> None:
    if not all(map(is_cached, kernels)):
        settings.tell("compiling the search, once per installation")


def _can_serve(generation: ColumnGeneration, demand: float) -> bool:
    """Return whether the fleet's best rate may reach the demand; ``generation`` keeps the columns of that search."""
    costs = generation.costs
    fastest = ColumnGeneration(costs, master_of(costs, None), replace(generation.settings, report=silent))
    fastest.generate(uniform_templates(costs))
    generation.pool.add(fastest.pool.templates)
    return fastest.bound.value >= demand * (1.0 - 1e-9)


def _search_merged(merged: CostTables, generation: ColumnGeneration) -> Outcome | None:
    """Search the one-zone relaxation, whose columns ``generation`` keeps; return None if the gap left is too wide."""
    relaxed = ColumnGeneration(merged, master_of(merged, generation.master.demand), generation.settings)
    relaxed.generate(uniform_templates(merged))
    if not np.isfinite(relaxed.bound.value):
        return None
    relaxed.vary()
    generation.pool.add(zone_templates(merged, generation.costs, relaxed.pool.templates))
    generation.bound = Bound(
        relaxed.bound.value,
        row_prices_of(merged, generation.costs, relaxed.bound.row_prices),
        np.zeros_like(generation.costs.routes.capacity),
        rate_prices_of(merged, generation.costs, relaxed.bound.rate_prices),
    )
    generation.is_whole_family = True
    generation.choose()
    small_enough = generation.gap() <= max(generation.settings.gap_target, 0.005)
    return generation.outcome() if small_enough or generation.budget.is_spent() else None


def equal_stages(costs: CostTables, settings: SearchSettings) -> Outcome | None:
    """Return a quickly found best plan of equal stages; roles may mix GPU types, the bound is that of `uniform`."""
    if not costs.ranks:
        return None
    try:
        return _enumerate_uniform(costs, master_with_pins(costs), settings)
    except NoPlanFoundError:
        return None


def _enumerate_uniform(costs: CostTables, master: Master, settings: SearchSettings) -> Outcome | None:
    """Enumerate the small family of `uniform`: every GPU type, TP size and number of stages at its best."""
    pool, budget = Pool(costs, master.row_costs), settings.budget
    pool.add(uniform_templates(costs))
    if not pool.templates:
        return None
    columns, engine, extend, is_whole = pool.columns(), costs.problem.family.engine, None, True
    if engine is not None and engine.max_nodes is not None:
        kinds, of_columns = counts_of_kinds([kind_of(costs, template) for template in pool.templates])
        program = NodeProgram.of(costs.classes, kinds, engine.max_nodes)
        if program is None:
            raise NoPlanFoundError(UNDECIDED)
        is_whole, extend = program.is_whole, partial(program.extend, kinds_of_columns=of_columns.tolist())
    verdict = master.decide(columns, time_limit_s=budget.remaining_s(), seed=settings.seed, extend=extend)
    found, relaxed = verdict.found, master.solve_lp(columns)
    if found is None or relaxed is None:
        if not (verdict.proves_none and is_whole) and not budget.is_spent():
            raise NoPlanFoundError(UNDECIDED)
        return None
    counted = list(zip(pool.templates, found.counts.tolist(), strict=True))
    others = sorted((t for t, n in counted if not n), key=lambda t: -t.rate)
    return Outcome(
        chosen=tuple((t, n) for t, n in counted if n),
        value=found.value,
        bound=found.bound if is_whole else relaxed.value,
        row_prices=relaxed.row_prices,
        rate_prices=relaxed.rate_prices,
        flows=found.flows,
        runners_up=tuple(others[:5]),
        interrupted=budget.cancelled.is_set(),
    )


def _better(found: Outcome | None, first: Outcome | None, master: Master) -> Outcome | None:
    """Return the better of an interrupted search's outcome and the plan of equal stages, with the search's bound."""
    if found is None or first is None:
        return first if found is None else found
    is_ahead = first.value > found.value if master.maximises else first.value < found.value
    return _with_bound(first, found.bound, maximises=master.maximises) if is_ahead else found


def _first_plan(costs: CostTables, settings: SearchSettings) -> Outcome | None:
    """Return a quick plan of equal stages, bounded by dense work alone."""
    outcome = equal_stages(costs, replace(settings, budget=Budget(cancelled=settings.budget.cancelled)))
    bound = rate_bound(costs) if costs.problem.objective.maximises else 0.0
    return None if outcome is None else replace(outcome, bound=bound)


# --- zones merged


MERGED = "all zones"


def merged_problem(problem: PlacementProblem) -> PlacementProblem | None:
    """Return the same fleet in one zone, or None if that is not a relaxation or there is just one zone."""
    cluster, zones, network = problem.cluster, problem.cluster.zones(), problem.cluster.network
    inside = {network.zone_link(zone, zone) for zone in zones}
    if len(zones) < 2 or len(inside) != 1 or network.between_nodes:
        return None
    link = inside.pop()
    between = [network.zone_link(a, b) for i, a in enumerate(zones) for b in zones[i + 1 :]]
    if any(other.slower_of(link) != other for other in between):
        return None  # some zones have faster links to each other than inside
    groups = tuple(replace(group, zone=MERGED, nic=group.nic or network.default) for group in cluster.node_groups)
    return replace(problem, cluster=replace(cluster, node_groups=groups, network=Network(default=link)))


def _kind(c: DeviceClass) -> tuple[object, ...]:
    return c.gpu, c.gpus_per_node, c.nic, c.intra, c.usd_per_hour, c.constraints


def zone_templates(merged: CostTables, costs: CostTables, templates: list[Template]) -> list[Template]:
    """Return every template in every zone with its GPU classes; prefill replicas also as senders to all zones."""
    found = []
    mixes_like: dict[tuple[int, int, int], list[int]] = {}
    for x, mix in enumerate(costs.mixes):
        mixes_like.setdefault((mix.micro_batch, mix.chunk_tokens, mix.attention_dp), []).append(x)
    for scope, part in enumerate(costs.scopes):
        if len(part.zones) != 1:
            continue
        here = {_kind(c): g for g, c in enumerate(costs.classes) if c.zone == part.zones[0]}
        class_of = [here.get(_kind(c), -1) for c in merged.classes]
        for template in templates:
            stages = stages_in(costs, merged, class_of, template)
            mix = merged.mixes[template.mix]
            alike = mixes_like[mix.micro_batch, mix.chunk_tokens, mix.attention_dp]
            for x in alike if stages and part.serves(mix) else ():
                moved = replace(template, scope=scope, mix=x, stages=stages)
                if mix.role is not Role.UNIFIED:  # KV to or from other zones takes longer
                    moved = replace(moved, interval_s=interval_of(costs, moved))
                    if moved.interval_s > part.tables.t_cap[x, moved.in_flight_index]:
                        continue
                found.append(moved)
    return found


def row_prices_of(merged: CostTables, costs: CostTables, prices: FloatArray) -> FloatArray:
    """Return prices of the merged fleet's rows for the rows of the real fleet."""
    of_kind = {(_kind(merged.classes[g]), p): prices[i] for i, (g, p) in enumerate(merged.resources.rows)}
    return np.array([of_kind.get((_kind(costs.classes[g]), p), 0.0) for g, p in costs.resources.rows])


def rate_prices_of(merged: CostTables, costs: CostTables, prices: FloatArray) -> FloatArray:
    """Return rate prices of the merged fleet's sides for the sides of the real one, the same in every zone."""
    if not costs.routes.splits_roles:
        return prices
    local, _, receiving = merged.routes.parts(prices)
    return np.concatenate([prices[:1], np.repeat([local[0], local[0], receiving[0]], len(costs.routes.zones))])


# --- pairs of GPU types


PAIR_TOLERANCE = 1e-3  # tolerance of ratios that only rule out pairs
ROUNDING = 1e-9  # ratio by which a limit may exceed the value from which it is computed
CHEAPEST = 1e-9  # USD/h, so that free GPUs have a finite ratio


def search_types(costs: CostTables, settings: SearchSettings, known: Outcome | None) -> Outcome | None:
    """Return the best of ``known`` and every pair of GPU types, skipping pairs that cannot beat the best so far.

    ``known`` comes from a family that contains all pairs, so its bound holds. Without it the bound is the worst of the
    pairs' bounds.
    """
    objective, budget = costs.problem.objective, settings.budget
    maximises, better = objective.maximises, max if objective.maximises else min
    best, bounds = known, list[float]()
    for pair, limit in _promising_first(costs, known, settings):
        if best is not None and better(limit, best.value) == best.value:
            break
        found = None
        if best is None or not budget.is_spent():
            found = _search_pair(pair, replace(settings, report=_of_a_pair(settings.report, best, maximises)))
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
    settings.tell("pairs of GPU types", best.value, best.bound)
    return best


def _search_pair(pair: CostTables, settings: SearchSettings) -> Outcome | None:
    try:
        return search(pair, settings)
    except NoPlanFoundError:  # no plan of this pair is known that keeps the pins
        if pair.problem.family.one_type_per_role:
            raise
        return None


def _promising_first(
    costs: CostTables, known: Outcome | None, settings: SearchSettings
) -> list[tuple[CostTables, float]]:
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
        floors = {gpu: known.value / counts[gpu] if objective.maximises else demand / known.value for gpu in gpus}
    part = settings.within(0.5)  # the other half is for searching the pairs
    theta = {gpu: _best_ratios(plain.of_types(gpu, gpu), (1.0 - ROUNDING) * floors[gpu], part) for gpu in gpus}
    found = []
    for prefill, decode in itertools.product(gpus, gpus):
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


def _best_ratios(pair: CostTables, floor: float, settings: SearchSettings) -> FloatArray:
    """Return the highest rate per GPU, or per unit of cost, of a prefill and a decode replica, or ``floor``; [2]."""
    kind, prices = pair.problem.objective.kind, np.zeros(len(pair.resources.rows))
    for row, (g, p) in enumerate(pair.resources.rows):
        price = pair.classes[g].usd_per_hour or 0.0
        prices[row] = (max(price, CHEAPEST) if kind is ObjectiveKind.COST else 1.0) if p == 1 else 0.0
    ratios = dict.fromkeys((Role.PREFILL, Role.DECODE), 0.0)
    for pricer in pricers_of(pair, np.zeros_like(prices), whole(pair.problem.family), settings.threads, PAIR_TOLERANCE):
        if pricer.configurations:
            role = pair.mixes[pricer.configurations[0].mix].role
            priced = pricer.price(prices, floor, 1.0, settings.budget, rate_cap=np.inf)
            ratios[role] = max(ratios[role], priced.ratio_bound)
    return np.array([r if np.isfinite(r) else _dense_ratio(pair, role, prices) for role, r in ratios.items()])


def _dense_ratio(pair: CostTables, role: Role, prices: FloatArray) -> float:
    """Return a bound on the role's ratio from dense work alone, which takes no time to compute."""
    layers, speeds = pair.scopes[0].tables.num_layers, layers_per_s(pair, role)
    of_gpu = {g: price for (g, p), price in zip(pair.resources.rows, prices, strict=True) if p == 1}
    return max(float(speeds[g] / price) / layers for g, price in of_gpu.items() if price > 0.0)


def _in_scopes_of(costs: CostTables, pair: CostTables, template: Template) -> Template:
    """Return a template of cost tables of two GPU types as one of the whole tables."""
    of_pair, mix = pair.scopes[template.scope], pair.mixes[template.mix]
    here = (
        i
        for i, scope in enumerate(costs.scopes)
        if (scope.part, scope.place, scope.build) == (of_pair.part, of_pair.place, of_pair.build) and scope.serves(mix)
    )
    return replace(template, scope=next(here))


def _of_a_pair(report: Report, best: Outcome | None, maximises: bool) -> Report:
    """Return a report that omits a pair's bound, which does not hold for other pairs, and gives the best incumbent."""
    better = max if maximises else min

    def told(progress: Progress) -> None:
        known = [value for value in (progress.incumbent, best.value if best else None) if value is not None]
        report(replace(progress, incumbent=better(known) if known else None, bound=None, gap=None))

    return told


# --- columns for pins


CHEAP = 1e-3  # price of GPUs that must be used, as a ratio to other prices
KEEP = 0.7  # share of the best ratio that a column must reach
PIN_TOLERANCE = 1e-2
QUICK = (0.0, 0.6, 0.4, 0.8, 0.25)  # minimum rate of a replica, as a share of the highest rate per allowed replica


def pinned_columns(generation: ColumnGeneration, pins: Pins, budget: Budget) -> Iterator[Template]:
    """Yield replicas that pins may require; GPUs that no pin requires have the prices of the bound."""
    costs, prices, most = generation.costs, generation.bound.row_prices, float(pins.upper[-1])
    each = rate_bound(costs) / most if np.isfinite(most) else 0.0
    free = [row > 0.0 for row in pins.wanted.T if row.any()]
    if each:  # if few replicas are allowed, GPUs of any type may be left idle
        rows = costs.resources.rows
        free += [np.zeros(len(rows), dtype=bool)]
        types = dict.fromkeys(c.gpu for c in costs.classes)
        free += [np.array([costs.classes[g].gpu == gpu for g, _ in rows]) for gpu in types]
    asked = [np.where(cheap, CHEAP * prices, prices) for cheap in free]
    asked += [np.maximum(row, CHEAP * row.max()) for row in pins.dear.T]  # the best rate per limited unit
    for least in dict.fromkeys(share * each for share in QUICK):
        quick = replace(costs, scopes=tuple(_quick(scope, least) for scope in costs.scopes))
        row_costs, family = generation.master.row_costs, whole(costs.problem.family)
        for pricer in pricers_of(quick, row_costs, family, generation.settings.threads, PIN_TOLERANCE):
            for each_prices in asked:
                if not budget.is_spent():
                    yield from pricer.price(each_prices, 0.0, KEEP, budget, rate_cap=np.inf).templates


def _quick(scope: Scope, least_rate: float) -> Scope:
    """Return the scope with replicas of at least this rate only."""
    if least_rate <= 0.0:
        return scope
    return scope.changed(lambda tables: tables._replace(t_cap=np.minimum(tables.t_cap, 1.0 / least_rate)))
