"""The search of a family: every pipeline that its engine runs, or equal stages, which are few."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from hetis.solver.budget import Budget, SearchSettings
from hetis.solver.errors import NoPlanFoundError
from hetis.solver.placement.columns import columns_of, distinct
from hetis.solver.placement.master import UNDECIDED, Master, master_of
from hetis.solver.placement.nodes import NodeProgram, counts_of_kinds
from hetis.solver.placement.optimum import bound_enumerated, search_enumerated
from hetis.solver.placement.outcome import ANY, Beyond, Outcome, rate_bound, sound_bound
from hetis.solver.placement.policy import POLICY
from hetis.solver.placement.replicas.equal_stages import uniform_templates
from hetis.solver.placement.replicas.kinds import kind_of
from hetis.solver.placement.replicas.tables import CostTables
from hetis.solver.placement.replicas.template import Template

Rated = Callable[[Template, int], float]  # requests/s of each of so many equal replicas


def search(costs: CostTables, settings: SearchSettings, *, beyond: Beyond = ANY) -> Outcome | None:
    """Return the best replicas found with a bound, or None if the family is empty or the budget ended before a plan.

    Progress is in the master's unit: saturated requests/s, or what is minimised.
    """
    if not costs.ranks:
        return None
    master, budget = master_of(costs), settings.budget
    if not costs.problem.family.uneven_layers:
        return _enumerate_uniform(costs, master, settings)
    outcome = search_enumerated(costs, master, settings, beyond)
    is_settled = outcome is not None and abs(outcome.bound - outcome.value) <= settings.gap_target * outcome.value
    if budget.is_spent() and not is_settled:
        return _better(outcome, _first_plan(costs, settings), master)
    return outcome


def bound_of(costs: CostTables, settings: SearchSettings) -> float:
    """Return a bound on every plan, by fractions of replicas alone if an engine's pipelines are searched."""
    if not costs.ranks:
        return 0.0
    if costs.problem.family.uneven_layers:
        return bound_enumerated(costs, master_of(costs), settings)
    found = _enumerate_uniform(costs, master_of(costs), settings)
    return 0.0 if found is None else found.bound


def equal_stages(costs: CostTables, settings: SearchSettings, rated: Rated | None = None) -> Outcome | None:
    """Return a quickly found best plan of equal stages; roles may mix GPU types, the bound is that of `uniform`.

    If replicas are ``rated``, among as many as the fleet has room for, the plan is best by that, and has no bound.
    """
    if not costs.ranks:
        return None
    try:
        return _enumerate_uniform(costs, master_of(costs), settings, rated)
    except NoPlanFoundError:
        return None


def _enumerate_uniform(
    costs: CostTables, master: Master, settings: SearchSettings, rated: Rated | None = None
) -> Outcome | None:
    """Enumerate the small family of `uniform`: every GPU type, TP size and number of stages at its best."""
    templates, budget = distinct(costs, uniform_templates(costs)), settings.budget
    if not templates:
        return None
    columns, engine = columns_of(costs, templates, master.row_costs), costs.problem.family.engine
    if rated is not None:
        with np.errstate(divide="ignore"):
            rooms = (costs.resources.limits / columns.uses).min(axis=1)
        rates = [rated(template, max(1, int(room))) for template, room in zip(templates, rooms, strict=True)]
        columns = replace(columns, rates=np.array(rates))
    extend, is_whole = None, True
    if engine is not None and engine.max_nodes is not None:
        kinds, of_columns = counts_of_kinds([kind_of(costs, template) for template in templates])
        program = NodeProgram.of(costs.classes, kinds, engine.max_nodes)
        if program is None:
            raise NoPlanFoundError(UNDECIDED)
        is_whole, extend = program.is_whole, partial(program.extend, kinds_of_columns=of_columns.tolist())
    budget.charge(len(templates))
    verdict = master.decide(
        columns, time_limit_s=budget.remaining_s(), seed=settings.seed, nodes=budget.nodes(POLICY.proof_nodes),
        extend=extend, charge=budget.charge,
    )  # fmt: skip
    found, relaxed = verdict.found, master.solve_lp(columns)
    if found is None or relaxed is None:
        if not (verdict.proves_none and is_whole) and not budget.is_spent():
            raise NoPlanFoundError(UNDECIDED)
        return None
    counted = list(zip(templates, found.counts.tolist(), strict=True))
    others = sorted((t for t, n in counted if not n), key=lambda t: -t.rate)
    return Outcome(
        chosen=tuple((t, n) for t, n in counted if n),
        value=found.value,
        bound=np.inf if rated is not None else found.bound if is_whole else relaxed.value,
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
    if not is_ahead:
        return found
    tightest = (max if not master.maximises else min)(first.bound, found.bound)
    return replace(first, bound=sound_bound(tightest, first.value, maximises=master.maximises))


def _first_plan(costs: CostTables, settings: SearchSettings) -> Outcome | None:
    """Return a quick plan of equal stages, bounded by dense work alone."""
    outcome = equal_stages(costs, replace(settings, budget=Budget(cancelled=settings.budget.cancelled)))
    bound = rate_bound(costs) if costs.problem.objective.maximises else 0.0
    return None if outcome is None else replace(outcome, bound=bound)
