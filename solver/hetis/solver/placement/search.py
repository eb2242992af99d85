"""The choice of a search: equal stages enumerated, sub-fleets exactly, or column generation, zones merged or not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from hetis.solver.budget import Budget, Progress, Report, silent
from hetis.solver.compiled import is_cached
from hetis.solver.errors import NoPlanFoundError
from hetis.solver.placement.enumeration import search_enumerated
from hetis.solver.placement.exact import is_small
from hetis.solver.placement.frontier import explore
from hetis.solver.placement.generation import ColumnGeneration
from hetis.solver.placement.master import UNDECIDED, Master
from hetis.solver.placement.nodes import NodeProgram, counts_of_kinds, kind_of
from hetis.solver.placement.out_of_reach import rate_bound
from hetis.solver.placement.outcome import Outcome, sound_bound
from hetis.solver.placement.passes import solve_exactly
from hetis.solver.placement.pinned_columns import pinned_columns
from hetis.solver.placement.pins import Pins, pins_of
from hetis.solver.placement.pool import Bound, Pool
from hetis.solver.placement.pricing import KERNELS
from hetis.solver.placement.tables import CostTables, FloatArray
from hetis.solver.placement.tabulation import build_cost_tables
from hetis.solver.placement.types_of_roles import search_types
from hetis.solver.placement.uniform import uniform_templates
from hetis.solver.placement.zones import merged_problem, rate_prices_of, row_prices_of, zone_templates
from hetis.solver.plan import ObjectiveKind
from hetis.solver.problem import PlacementProblem

RELAXATION, COLUMNS = 0.6, 0.8  # shares of the time left, with pins: for the relaxation, then for the pins' columns


def search(
    costs: CostTables, strategy: str, budget: Budget, gap_target: float, seed: int, threads: int, report: Report, *,
    simplest_within: float = 0.0,
) -> Outcome | None:  # fmt: skip
    """Return the best replicas found with a bound, or None if the family is empty or the budget ended before a plan.

    With ``simplest_within``, a share of the best value, an engine's replicas use the fewest nodes that lose no more
    than this share. Progress is in the master's unit: saturated requests/s, or what is minimised.
    """
    if not costs.ranks:
        return None
    family = costs.problem.family

    def of_types(pair: CostTables, news: Report) -> Outcome | None:
        try:
            return search(pair, strategy, budget, gap_target, seed, threads, news)
        except NoPlanFoundError:  # no plan of this pair is known to keep the pins
            if family.one_type_per_role:
                raise
            return None

    if family.one_type_per_role and costs.role_types is None:
        return search_types(costs, of_types, None, budget, threads, report)
    pins = pins_of(costs.problem.constraint_index, costs.classes, costs.resources)
    master = Master(costs.resources.limits, demanded_rate(costs.problem), costs.routes, pins)
    row_costs = row_costs_of(costs)
    if strategy == "uniform":
        return _enumerate_uniform(costs, master, row_costs, budget, seed)
    if family.engine is not None:
        outcome = search_enumerated(
            costs, master, row_costs, budget=budget, gap_target=gap_target, seed=seed, report=report,
            simplest_within=simplest_within,
        )  # fmt: skip
        is_short = budget.is_spent() and not simplest_within
        if is_short and (outcome is None or abs(outcome.bound - outcome.value) > gap_target * outcome.value):
            return _better(outcome, _first_plan(costs, budget, seed), master)
        return outcome
    if is_small(costs):
        _announce_compilation((explore,), budget, report)
        outcome = solve_exactly(costs, master, row_costs, budget=budget, report=report, seed=seed)
        if budget.is_spent() and (outcome is None or abs(outcome.bound - outcome.value) > gap_target * outcome.value):
            return _better(outcome, _first_plan(costs, budget, seed), master)
        return outcome
    part = budget if pins is None else budget.share(RELAXATION)
    generation = ColumnGeneration(costs, master, row_costs, budget=part, report=report)
    outcome = _generate(generation, part, gap_target, seed, threads)
    if pins is not None:
        outcome = _pinned(generation, outcome, pins, budget, gap_target, seed, threads)
    # Pairs of GPU types are searched without attention workers.
    if outcome is not None and family.splits_roles and family.decode_keeps_heads and costs.role_types is None:
        outcome = search_types(costs, of_types, outcome, budget, threads, report)
    return outcome


def _pinned(
    generation: ColumnGeneration, known: Outcome | None, pins: Pins, budget: Budget, gap_target: float, seed: int,
    threads: int,
) -> Outcome | None:  # fmt: skip
    """Return the best choice that keeps the pins, with columns generated for them; None if there is provably none.

    Raises:
        NoPlanFoundError: no choice was found, nor proved impossible.
    """
    if not generation.may_have_plan:
        return None
    prices = generation.bound.row_prices
    found = pinned_columns(generation.costs, pins, generation.row_costs, prices, budget.share(COLUMNS), threads)
    generation.pool.add(tuple(found))
    generation.choose(gap=gap_target / 10, seed=seed)
    outcome = generation.outcome()
    if outcome is None:
        raise NoPlanFoundError("no plan was found that keeps the pins on GPUs and replicas, nor proved impossible")
    return outcome if known is None else _with_bound(outcome, known.bound, maximises=generation.master.maximises)


def _with_bound(outcome: Outcome, bound: float, *, maximises: bool) -> Outcome:
    """Return an outcome with another valid bound, if that is tighter."""
    tightest = (min if maximises else max)(outcome.bound, bound)
    return replace(outcome, bound=sound_bound(tightest, outcome.value, maximises=maximises))


def _generate(
    generation: ColumnGeneration, budget: Budget, gap_target: float, seed: int, threads: int
) -> Outcome | None:
    """Run column generation, with zones merged or not."""
    costs, master, row_costs = generation.costs, generation.master, generation.row_costs
    _announce_compilation(KERNELS, budget, generation.report)
    if master.demand is not None and not _can_serve(generation, master.demand, threads, gap_target):
        generation.may_have_plan = False
        return None
    one_zone, relaxed = merged_problem(costs.problem), None
    if one_zone is not None:
        merged = build_cost_tables(one_zone, is_relaxation=True)
        if costs.role_types is not None:
            merged = merged.of_types(*costs.role_types)
        outcome = _search_merged(merged, generation, threads, gap_target, seed)
        if outcome is not None:
            return outcome
        relaxed = generation.bound.value if generation.is_whole_family else None
    outcome = generation.solve(uniform_templates(costs), threads=threads, gap_target=gap_target, seed=seed)
    if outcome is None and generation.may_have_plan and master.pins is None and not budget.is_spent():
        # The columns found fit in no packing, which proves nothing.
        return solve_exactly(costs, master, row_costs, budget=budget, report=generation.report, seed=seed)
    if outcome is None or relaxed is None:
        return outcome
    # The bound of the relaxation holds whatever the search over separate zones proves.
    return _with_bound(outcome, relaxed, maximises=master.maximises)


def _announce_compilation(kernels: Sequence[Callable[..., object]], budget: Budget, report: Report) -> None:
    if not all(map(is_cached, kernels)):
        report(Progress(phase="compiling the search, once per installation", elapsed_s=budget.elapsed_s()))


def _can_serve(generation: ColumnGeneration, demand: float, threads: int, gap_target: float) -> bool:
    """Return whether the fleet's best rate may reach the demand; ``generation`` keeps the columns of that search."""
    costs = generation.costs
    fastest = ColumnGeneration(
        costs,
        Master(costs.resources.limits, None, costs.routes),
        np.zeros(len(costs.resources.rows)),
        budget=generation.budget,
        report=silent,
    )
    fastest.generate(uniform_templates(costs), threads=threads, gap_target=gap_target)
    generation.pool.add(fastest.pool.templates)
    return fastest.bound.value >= demand * (1.0 - 1e-9)


def _search_merged(
    merged: CostTables, generation: ColumnGeneration, threads: int, gap_target: float, seed: int
) -> Outcome | None:
    """Search a fleet of several zones through its one-zone relaxation; return None if that leaves too wide a gap.

    ``generation`` keeps the columns found.
    """
    master = Master(merged.resources.limits, generation.master.demand, merged.routes)
    relaxed = ColumnGeneration(
        merged, master, row_costs_of(merged), budget=generation.budget, report=generation.report
    )  # fmt: skip
    relaxed.generate(uniform_templates(merged), threads=threads, gap_target=gap_target)
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
    generation.choose(gap=gap_target / 10, seed=seed)
    small_enough = generation.gap() <= max(gap_target, 0.005)
    return generation.outcome() if small_enough or generation.budget.is_spent() else None


def demanded_rate(problem: PlacementProblem) -> float | None:
    """Return the saturated rate that the demanded goodput takes, or None if the rate is maximised."""
    objective = problem.objective
    if objective.maximises:
        return None
    assert objective.demand_rps is not None, "PlacementProblem checks it"
    return objective.demand_rps / problem.assumptions.planned_utilisation


def row_costs_of(costs: CostTables) -> FloatArray:
    """Return the cost of one unit of each row in the objective: rent or one GPU for the rows that count GPUs."""
    kind = costs.problem.objective.kind
    units = []
    for device_class, p in costs.resources.rows:
        price = costs.classes[device_class].usd_per_hour or 0.0
        unit = {ObjectiveKind.COST: price, ObjectiveKind.GPUS: 1.0}.get(kind, 0.0)
        units.append(unit if p == 1 else 0.0)
    return np.array(units)


def equal_stages(costs: CostTables, budget: Budget, seed: int) -> Outcome | None:
    """Return the best plan of equal stages, which takes little time, or None if none was found.

    One role may have several GPU types. The bound holds for the family of `uniform` only.
    """
    if not costs.ranks:
        return None
    pins = pins_of(costs.problem.constraint_index, costs.classes, costs.resources)
    master = Master(costs.resources.limits, demanded_rate(costs.problem), costs.routes, pins)
    try:
        return _enumerate_uniform(costs, master, row_costs_of(costs), budget, seed)
    except NoPlanFoundError:
        return None


def _enumerate_uniform(
    costs: CostTables, master: Master, row_costs: FloatArray, budget: Budget, seed: int
) -> Outcome | None:
    """Enumerate the small family of `uniform`: every GPU type, TP size and number of stages at its best."""
    pool = Pool(costs, row_costs)
    pool.add(uniform_templates(costs))
    if not pool.templates:
        return None
    columns = pool.columns()
    engine, extend, is_whole = costs.problem.family.engine, None, True
    if engine is not None and engine.max_nodes is not None:
        kinds, of_columns = counts_of_kinds([kind_of(costs, template) for template in pool.templates])
        program = NodeProgram.of(costs.classes, kinds, engine.max_nodes)
        if program is None:
            raise NoPlanFoundError(UNDECIDED)
        is_whole, extend = program.is_whole, partial(program.extend, kinds_of_columns=of_columns.tolist())
    verdict = master.decide(columns, time_limit_s=budget.remaining_s(), seed=seed, extend=extend)
    found, relaxed = verdict.found, master.solve_lp(columns)
    if found is None or relaxed is None:
        if not (verdict.proves_none and is_whole) and not budget.is_spent():
            raise NoPlanFoundError(UNDECIDED)
        return None
    others = sorted((t for t, n in zip(pool.templates, found.counts, strict=True) if not n), key=lambda t: -t.rate)
    return Outcome(
        chosen=tuple((t, int(n)) for t, n in zip(pool.templates, found.counts, strict=True) if n),
        value=found.value,
        bound=found.bound if is_whole else relaxed.value,
        row_prices=relaxed.row_prices,
        rate_prices=relaxed.rate_prices,
        flows=found.flows,
        runners_up=tuple(others[:5]),
        interrupted=budget.cancelled.is_set(),
    )


def _better(found: Outcome | None, first: Outcome | None, master: Master) -> Outcome | None:
    """Return the better of an interrupted search's outcome and the plan of equal stages, with the former's bound."""
    if found is None or first is None:
        return first if found is None else found
    is_ahead = first.value > found.value if master.maximises else first.value < found.value
    return _with_bound(first, found.bound, maximises=master.maximises) if is_ahead else found


def _first_plan(costs: CostTables, budget: Budget, seed: int) -> Outcome | None:
    """Return a quick plan of equal stages, bounded by dense work alone."""
    outcome = equal_stages(costs, Budget(cancelled=budget.cancelled), seed)
    bound = rate_bound(costs) if costs.problem.objective.maximises else 0.0
    return None if outcome is None else replace(outcome, bound=bound)
