"""Plans by any strategy, our own search or a published heuristic, and the prices of their constraints.

The best plan under all constraints has a value between the plan's value and its bound, and the best one without a
constraint has a value between value and bound of its own solve. The price of the constraint is the difference, known
within an interval and never below 0, because a plan that meets all constraints also meets fewer.

Importing this module loads HiGHS.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

from hetis.solver.budget import Budget, Report, SearchSettings, silent
from hetis.solver.errors import InvalidProblemError, NoPlanFoundError
from hetis.solver.placement.constrained_problem import apply_constraints, restored
from hetis.solver.placement.explanation.alternatives import with_simplicity
from hetis.solver.placement.families import STRATEGIES, constraints_ignored
from hetis.solver.placement.infeasible import Market
from hetis.solver.placement.losses.survival import Survive, search_surviving
from hetis.solver.placement.master import master_of
from hetis.solver.placement.optimum import simplest_enumerated
from hetis.solver.placement.outcome import Outcome
from hetis.solver.placement.replicas.tables import CostTables
from hetis.solver.placement.rungs import Known
from hetis.solver.placement.solve import in_objective_units, objective_scale, solve_family, solved_by
from hetis.solver.placement.utilisation import KeptOutcome, Unbeaten, search_simpler
from hetis.solver.plan import Plan
from hetis.solver.problem import PlacementProblem


def solve_placement(
    problem: PlacementProblem, *, strategy: str = "hetis", budget: Budget | None = None, gap_target: float = 0.001,
    seed: int = 0, report: Report = silent, market: Market | None = None,
    known: Known | None = None, evaluated: dict[Hashable, Any] | None = None,
) -> Plan:  # fmt: skip
    """Choose replicas for a fleet so that the objective is best, and prove how good the choice is.

    The search ends when the gap is at most ``gap_target``, the time is up or nothing is left that could help. With the
    same arguments and no time limit the plan is the same. If no plan exists, ``market`` gives GPU types that could be
    added (None: no search for any). Published heuristics prove little and have no target.

    A plan of a smaller family may be ``known``, which is returned with the bound of this one if nothing better is found
    where the utilisation is chosen. ``evaluated`` is what earlier searches of similar problems know of stages, to
    which this one adds.

    Raises:
        InvalidProblemError: unknown strategy, an objective without its demand, or a constraint that cannot be met.
        InfeasibleError: the family provably holds no plan; ``reasons`` list what is missing.
        NoPlanFoundError: the budget was spent before a plan was found.
    """
    if strategy not in STRATEGIES:
        raise InvalidProblemError(f"unknown strategy {strategy!r}, must be one of {', '.join(STRATEGIES)}")
    settings = SearchSettings(
        strategy=strategy, budget=budget or Budget(), gap_target=gap_target, seed=seed, report=report,
        evaluated={} if evaluated is None else evaluated,
    )  # fmt: skip
    problem = replace(problem.in_shared_precision(), family=STRATEGIES[strategy].restrict(problem.family))
    if STRATEGIES[strategy].is_published:
        plan = _by_published_heuristic(problem, settings)
    else:
        if known is not None:
            known = known._replace(family=STRATEGIES[strategy].restrict(known.family))
        plan = solve_family(problem, settings, market, known)
    return replace(plan, family=problem.describe_family())


def simplify_placement(problem: PlacementProblem, best: Plan, within: float, settings: SearchSettings) -> Plan:
    """Return the simplest of the plans that lose no more than a share of a problem's best plan, or that with a note.

    They are of an engine's family (`placement/losses/simplicity.py`). The plan's notes state its points, with a bound,
    and the loss; the plan's bound is that on the best.

    Raises:
        InvalidProblemError: the strategy has other families.
    """
    require_simplicity(problem, settings.strategy)
    problem = replace(problem.in_shared_precision(), family=STRATEGIES[settings.strategy].restrict(problem.family))
    maximises, value = best.objective.maximises, best.result.value
    least = value * (1.0 - within if maximises else 1.0 + within)

    def found_by(costs: CostTables, settings: SearchSettings) -> KeptOutcome:
        def find(tables: CostTables, more: float) -> Outcome | None:
            wanted = (more if maximises else 1.0) * least / objective_scale(tables.problem)
            return simplest_enumerated(tables, master_of(tables), settings, wanted)

        found = search_simpler(costs, best, least, find)
        if found is None:
            raise settings.stopped()
        return found

    try:
        found = solved_by(problem, settings, None, found_by)
    except NoPlanFoundError:
        return with_simplicity(best, None, within, value)
    assert not isinstance(found, Unbeaten), "what is found replaces the known plan"
    plan, outcome = found
    plan = replace(plan, family=problem.describe_family(), result=plan.result.bounded_by(best.result.bound))
    return with_simplicity(plan, outcome.simplicity, within, value)


def require_simplicity(problem: PlacementProblem, strategy: str) -> None:
    """Check that the simplest plans of a strategy are searched for; raises InvalidProblemError if not."""
    family = STRATEGIES[strategy].restrict(problem.family)
    if family.one_type_per_role or not family.uneven_layers or family.engine is None:
        raise InvalidProblemError("the simplest plan is only searched for by strategies hetis, hexgen and hexgen2")


def solve_surviving(
    problem: PlacementProblem, survive: Survive, *, strategy: str = "hetis", budget: Budget | None = None,
    gap_target: float = 0.001, seed: int = 0, report: Report = silent,
) -> tuple[Plan, float | None]:  # fmt: skip
    """Choose replicas so that most is served after the worst loss, or a demand through it; return a bound on that.

    If the rate is maximised, the plan leaves most after the loss, and serves most among such plans: value and bound
    are those of its whole rate, and the bound on what any plan leaves is returned. With `Survive.keep`, the whole rate
    is maximised, of which that share must be left. If cost is minimised, the demand must be left. Otherwise as
    `solve_placement`.

    Raises:
        InvalidProblemError: a strategy without a search of our own.
        InfeasibleError: no plan survives.
        NoPlanFoundError: none was found in time.
    """
    settings = SearchSettings(
        strategy=strategy, budget=budget or Budget(), gap_target=gap_target, seed=seed, report=report
    )
    problem = replace(problem.in_shared_precision(), family=STRATEGIES[strategy].restrict(problem.family))
    if STRATEGIES[strategy].is_published or not problem.family.uneven_layers:
        raise InvalidProblemError(f"strategy {strategy} does not plan for losses")

    def found_by(costs: CostTables, settings: SearchSettings) -> KeptOutcome | None:
        outcome = search_surviving(costs, survive, settings)
        return None if outcome is None else KeptOutcome(costs, outcome)

    found = solved_by(problem, settings, None, found_by, survives=True)
    assert not isinstance(found, Unbeaten), "no plan is known"
    (plan, outcome), scale = found, objective_scale(problem)
    plan = replace(plan, family=problem.describe_family())
    if survive.simplest_within:
        best = scale * (outcome.best_value or outcome.value)
        plan = with_simplicity(plan, outcome.simplicity, survive.simplest_within, best)
    return plan, None if outcome.left_bound is None else scale * outcome.left_bound


def _by_published_heuristic(problem: PlacementProblem, settings: SearchSettings) -> Plan:
    from hetis.solver.published import PUBLISHED

    searched, strategy = apply_constraints(problem), settings.strategy
    if problem.workload.classes:
        raise InvalidProblemError(f"strategy {strategy} has no pools of classes of requests")
    for constraint in constraints_ignored(strategy, problem.constraints):
        raise InvalidProblemError(f"{constraint}: strategy {strategy} can only leave out GPUs and TP sizes")
    report = in_objective_units(settings.report, problem)
    searched = replace(searched, node_links=None)  # they know one scope per zone: any node's slowest link counts
    plan = PUBLISHED[strategy].solve(searched, budget=settings.budget, seed=settings.seed, report=report)
    return plan if searched.cluster is problem.cluster else restored(plan, searched, problem)
