"""Plans side by side: several strategies or engines on one problem, each checked, each with the best known bound.

`compare_engines` makes the plans; `simulate_plans` then treats each of them as `place` treats its own.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from hetis.formats.errors import internal_error
from hetis.planner.use_cases.climbing import Carriers, Climbed
from hetis.planner.use_cases.comparing.plan_figures import kept_of
from hetis.planner.use_cases.grouping import shapes_of
from hetis.planner.use_cases.place import make_plan, simulated_plan
from hetis.planner.use_cases.placement_settings import PlacementSettings
from hetis.planner.use_cases.precision import for_engine
from hetis.planner.use_cases.record.parts import Requested
from hetis.planner.use_cases.saved_plans import problem_of
from hetis.planner.use_cases.service_level import ServiceLevel
from hetis.planner.use_cases.sources import LoadedInputs
from hetis.planner.use_cases.verification.rates import ITERATIONS
from hetis.solver.budget import Budget, Report, one_of_several
from hetis.solver.check import check_plan
from hetis.solver.constraints import described
from hetis.solver.engine_rules import EngineRules
from hetis.solver.errors import HetisError, InfeasibleError, InvalidProblemError, NoPlanFoundError, UncheckedPlanError
from hetis.solver.placement.families import STRATEGIES, constraints_ignored
from hetis.solver.placement.outcome import sound_bound
from hetis.solver.placement.rungs import RUNGS
from hetis.solver.plan import DEFAULT_STRATEGY, Objective, Plan, SolveResult, Status
from hetis.solver.problem import PlacementProblem

# Every plan of a strategy is also one of its container for the same engine, whose bound therefore holds for it, too.
CONTAINERS: Mapping[str, str] = {"uniform": "hetis", "hexgen": "hetis", "splitwise": "hexgen2", "hexgen2": "hetis"}

ROUNDING = 1e-6  # relative difference from which one plan counts as better than another

_BOUND_OF = "the bound is that of strategy"  # start of a note

NO_PLAN, FAILED = "no plan", "failed"
DEFAULT_NAME = "place"


@dataclass(frozen=True, slots=True, kw_only=True)
class Searches:
    """What several searches have in common. ``budget`` returns the budget of the next one.

    With ``has_default``, the plan of the rung that `place` would choose joins those of strategy hetis on the highest.
    """

    loaded: LoadedInputs
    objective: Objective
    settings: PlacementSettings
    budget: Callable[[], Budget]
    report: Report
    carriers: Carriers | None = None
    has_default: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """The outcome of one strategy. ``status`` is its plan's, or what went wrong; ``reasons`` give details.

    ``problem`` is what the plan solves or, without one, what was to be solved; None: the inputs pose no problem.
    ``engine`` is the engine of its plans, or None for published heuristics; ``is_only_engine`` if none was requested;
    ``is_default`` if it is the plan of the rung that `place` chooses.
    """

    strategy: str
    engine: str | None = None
    is_only_engine: bool = False
    is_default: bool = False
    status: str
    problem: PlacementProblem | None = None
    plan: Plan | None = None
    reasons: tuple[str, ...] = ()
    solve_s: float = 0.0

    @property
    def name(self) -> str:
        """The name that distinguishes the outcome from the others."""
        name = DEFAULT_NAME if self.is_default else self.strategy
        return name if self.engine is None or self.is_only_engine else f"{name}-{self.engine}"


def compare_strategies(
    searches: Searches, strategies: Sequence[str], *, first: int = 1, total: int | None = None
) -> tuple[Compared, ...]:
    """Return the outcome of every strategy, in the order passed.

    Contained strategies are solved first, each with its own budget. A strategy without a plan is an outcome like any
    other. Once a budget is cancelled, the remaining strategies are not run. Progress calls them the ``first`` and the
    next ones of ``total`` (of these alone by default).

    Raises:
        InvalidProblemError: the objective needs something that the cluster lacks, such as a price.
    """
    found: dict[str, Compared] = {}
    for number, strategy in enumerate(ordered := _contained_first(strategies), start=first):
        report = one_of_several(searches.report, number, total or len(ordered), f"{strategy}: ")
        found[strategy] = planned(
            replace(searches, settings=replace(searches.settings, strategy=strategy), report=report)
        )
    for strategy in _contained_first(strategies):
        container = CONTAINERS.get(strategy)
        if container in found and found[strategy].plan is not None:
            note = f"the plan was found by strategy {strategy}, whose plans are all of {container}"
            found[container] = _with_better_plan(found[container], found[strategy].plan, note)
    plans = {name: compared.plan for name, compared in found.items() if compared.plan is not None}
    default = _default(searches, plans[DEFAULT_STRATEGY]) if searches.has_default and DEFAULT_STRATEGY in plans else ()
    return (*default, *(_with_best_bound(found[strategy], plans) for strategy in dict.fromkeys(strategies)))


def _default(searches: Searches, highest: Plan) -> tuple[Compared, ...]:
    """Return the outcome of the rung that `place` chooses, unless it is the plan of the highest."""
    report = one_of_several(searches.report, 1, 1, f"{DEFAULT_NAME}: ")
    chosen = planned(
        replace(searches, settings=replace(searches.settings, strategy=DEFAULT_STRATEGY, rung=""), report=report)
    )
    if chosen.plan is None or shapes_of(chosen.plan) == shapes_of(highest):
        return ()
    return (replace(chosen, is_default=True),)


def compare_engines(
    searches: Searches, strategies: Sequence[str], engines: Mapping[str, EngineRules]
) -> tuple[Compared, ...]:
    """Return `compare_strategies` for each engine, ordered by strategy and then by engine as passed.

    Published heuristics, which know no engine's rules, are run once.

    Raises:
        InvalidProblemError: the objective needs something that the cluster lacks, such as a price.
    """
    published = [name for name in strategies if STRATEGIES[name].is_published]
    searched = [name for name in strategies if name not in published]
    found, total = list[Compared](), len(searched) + len(published)
    for number, (name, rules) in enumerate(engines.items() if searched else (), start=1):
        report = searches.report
        if len(engines) > 1:
            report = one_of_several(report, number, len(engines), f"for {name}, ")
        own = replace(searches, settings=replace(searches.settings, engine=rules), report=report)
        found += (replace(outcome, engine=name) for outcome in compare_strategies(own, searched, total=total))
    unbound = replace(searches, settings=replace(searches.settings, engine=None))
    found += compare_strategies(unbound, published, first=len(searched) + 1, total=total)
    names, known = list(strategies), (*engines, None)
    return tuple(
        sorted(found, key=lambda one: (names.index(one.strategy), not one.is_default, known.index(one.engine)))
    )


def simulate_plans(
    compared: Sequence[Compared], searches: Searches, engines: Mapping[str, EngineRules], level: ServiceLevel
) -> tuple[Compared, ...]:
    """Return the outcomes of `compare_engines` with their plans simulated.

    For a plan that misses a limit at its planned rate the search is repeated (`simulated_plan`), each time with a
    budget of its own, unless it is a published one. Bounds are those of the first search. If the simulation or another
    search fails, the first plan remains, with the reason. ``solve_s`` counts both. Once a budget is cancelled, the
    remaining plans are left as they are.
    """
    found = []
    for number, outcome in enumerate(compared, start=1):
        if outcome.plan is not None and outcome.problem is not None:
            rules = None if outcome.engine is None else engines[outcome.engine]
            settings = replace(searches.settings, strategy=outcome.strategy, engine=rules)
            report = one_of_several(searches.report, number, len(compared), f"{outcome.name}: ")
            own = replace(searches, loaded=for_engine(searches.loaded, rules), settings=settings, report=report)
            outcome = _simulated(outcome, outcome.plan, outcome.problem, own, level)
        found.append(outcome)
    return tuple(found)


def _simulated(
    outcome: Compared, plan: Plan, problem: PlacementProblem, searches: Searches, level: ServiceLevel
) -> Compared:  # fmt: skip
    settings, whole = searches.settings, searches.budget()
    try:
        made = simulated_plan(
            Climbed(plan=plan, problem=problem_of(plan, problem), rung=Requested.of(plan).rung), searches.loaded,
            settings,
            level=level, budget=replace(whole, time_limit_s=math.inf, work_limit=ITERATIONS),
            report=searches.report, losses=False, again=not STRATEGIES[settings.strategy].is_published,
        )  # fmt: skip
    except HetisError as error:
        violations = error.violations if isinstance(error, UncheckedPlanError) else ()
        return replace(
            outcome, status=FAILED, reasons=(str(error), *violations), solve_s=outcome.solve_s + whole.elapsed_s()
        )
    simulated = made.plan
    lost = [note for note in plan.notes if note.startswith(_BOUND_OF) and note not in simulated.notes]
    return replace(
        outcome,
        plan=replace(simulated, notes=(*simulated.notes, *lost)),
        status=simulated.result.status.value,
        solve_s=outcome.solve_s + whole.elapsed_s(),
    )


def best_of(plans: Sequence[Plan]) -> int:
    """Return the position of the plan that serves most or, if a rate is demanded, of the one that costs least.

    Simulated plans count with the rate that traffic kept; those that miss limits at the demanded rate come after those
    that do not, and plans that were not simulated come last if others were.
    """
    every = [kept_of(plan) for plan in plans]

    def worth(number: int) -> tuple[bool, bool, float]:
        plan, kept = plans[number], every[number]
        value = plan.result.value if plan.objective.maximises else -plan.result.value
        if kept is None:
            return False, True, value
        return True, kept.is_all or plan.objective.maximises, value if kept.is_all else kept.rate_rps

    return max(range(len(plans)), key=worth)


def _contained_first(strategies: Iterable[str]) -> list[str]:
    return sorted(dict.fromkeys(strategies), key=lambda name: -len(_containers(name)))


def _containers(strategy: str) -> list[str]:
    """Return the strategies that contain this one, the closest first."""
    found = []
    while strategy in CONTAINERS:
        strategy = CONTAINERS[strategy]
        found.append(strategy)
    return found


def planned(searches: Searches) -> Compared:
    """Return the outcome of one search, by the strategy of the settings: its plan, or why there is none."""
    loaded, settings, budget = searches.loaded, searches.settings, searches.budget()
    none = Compared(strategy=settings.strategy, status=NO_PLAN)
    try:
        loaded = for_engine(loaded, settings.engine)
    except InvalidProblemError as error:
        return replace(none, reasons=(str(error),))
    if settings.engine is None and loaded.inputs.model.precisions:
        return replace(none, reasons=("a published heuristic plans for one precision, and this model has several",))
    problem = settings.problem(loaded.inputs, searches.objective)
    none = replace(none, problem=problem)
    if budget.cancelled.is_set():
        return replace(none, reasons=("interrupted before it ran",))
    if ignored := constraints_ignored(settings.strategy, problem.constraints):
        return replace(none, reasons=tuple(f"it cannot keep {described(each)}" for each in ignored))

    try:
        made = make_plan(
            loaded, problem, settings, budget=budget, report=searches.report, requested=searches.objective,
            carriers=searches.carriers,
        )  # fmt: skip
    except InfeasibleError as error:
        status, reasons = Status.INFEASIBLE.value, error.reasons
    except NoPlanFoundError as error:
        status, reasons = NO_PLAN, (str(error),)
    except UncheckedPlanError as error:
        status, reasons = FAILED, (str(error), *error.violations)
    except InvalidProblemError:
        raise
    except HetisError as error:
        status, reasons = FAILED, (str(error),)
    except Exception as error:
        if os.environ.get("HETIS_DEBUG") == "1":
            raise
        headline, lines = internal_error(error)  # in one strategy, which must not cost the plans of the others
        status, reasons = FAILED, (headline, *lines)
    else:
        status, reasons = made.plan.result.status.value, ()
        none = replace(none, plan=made.plan, problem=made.problem)
    return replace(none, status=status, reasons=reasons, solve_s=budget.elapsed_s())


def _with_better_plan(container: Compared, contained: Plan | None, note: str) -> Compared:
    """Return the container with a contained family's plan if its own search ended with a worse one.

    ``note`` is added to that plan.

    Bound and prices remain the container's. Every search has a time limit, so a heuristic may beat a truncated search.
    """
    own, problem = container.plan, container.problem
    if own is None or problem is None or contained is None or not _is_better(contained, own.result.value):
        return container
    duals = [price.dual for price in own.prices]
    result = _with_bound(replace(contained.result, solve_s=own.result.solve_s), own.result.bound, own.objective)
    better = replace(
        contained,
        strategy=own.strategy,
        family=own.family,
        result=replace(result, status=Status.FEASIBLE),
        prices=tuple(replace(price, dual=dual) for price, dual in zip(contained.prices, duals, strict=True)),
        runners_up=own.runners_up,
        notes=(*own.notes, note),
        inputs=own.inputs,
    )
    if check_plan(better, problem_of(own, problem)):
        return container
    return replace(container, plan=better, status=better.result.status.value)


def _was_searched_as_far(container: Plan, contained: Plan) -> bool:
    """Return whether the search for a plan was limited to no lower rung, nor to more layers, than that of another."""
    one, other = Requested.of(container), Requested.of(contained)
    order = list(RUNGS)
    if one.engine is None or other.engine is None or not (one.rung and other.rung):
        return one.engine == other.engine
    return order.index(one.rung) >= order.index(other.rung) and one.engine.min_layers <= other.engine.min_layers


def _is_better(plan: Plan, value: float) -> bool:
    ahead = plan.result.value - value
    return (ahead if plan.objective.maximises else -ahead) > ROUNDING * abs(plan.result.value)


def _with_best_bound(compared: Compared, plans: Mapping[str, Plan]) -> Compared:
    """Return the outcome with the bound of a containing strategy if that is better than its own."""
    plan = compared.plan
    if plan is None:
        return compared
    result, objective = plan.result, plan.objective
    containers = (name for name in _containers(compared.strategy) if name in plans)
    known = {name: plans[name].result.bound for name in containers if _was_searched_as_far(plans[name], plan)}
    known = {compared.strategy: result.bound} | known
    # The strategy's own bound, unless a container's is better.
    best = min(known, key=lambda name: known[name] if objective.maximises else -known[name])
    if best == compared.strategy:
        return replace(compared, plan=plan)
    note = f"{_BOUND_OF} {best}, which has all plans of {compared.strategy}"
    plan = replace(plan, result=_with_bound(result, known[best], objective), notes=(*plan.notes, note))
    return replace(compared, plan=plan)


def _with_bound(result: SolveResult, bound: float, objective: Objective) -> SolveResult:
    """Return the result with another bound.

    Raises:
        BrokenProofError: the bound contradicts the value by more than rounding explains.
    """
    bound = sound_bound(bound, result.value, maximises=objective.maximises)
    gap = abs(bound - result.value) / abs(result.value) if result.value else result.gap
    return replace(result, bound=bound, gap=gap)
