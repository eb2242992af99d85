"""`hetis-plan place`, step by step: `pose` -> `search` (which binds) -> `describe` -> `check` -> simulation -> report.

A `PosedPlacement` takes a problem through these steps, and adds the requested studies of the plan. `make_plan` is its
core, which `compare` and the service's solver jobs share. `hetis.planner.report.plan` draws the result.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from hetis.planner.use_cases import service_level
from hetis.planner.use_cases.climbing import Carriers, Climbed, climb, may_replace, with_least_layers
from hetis.planner.use_cases.describing import describe
from hetis.planner.use_cases.idle import with_uses_of_idle
from hetis.planner.use_cases.placement_settings import PlacementSettings, settings_of
from hetis.planner.use_cases.precision import for_engine, in_precision
from hetis.planner.use_cases.prices import catalogue_market
from hetis.planner.use_cases.record.forms import RungFound
from hetis.planner.use_cases.record.parts import Requested, Rungs, Surviving, Verified
from hetis.planner.use_cases.request import PlacementRequest, path_or_value, ratio_of
from hetis.planner.use_cases.robustness.profile_errors import with_profile_errors
from hetis.planner.use_cases.saved_plans import problem_of
from hetis.planner.use_cases.service_level import ServiceLevel
from hetis.planner.use_cases.sources import LoadedInputs, engine_settings, load_inputs
from hetis.planner.use_cases.surviving import check_survival, most_left, surviving_plan, with_losses
from hetis.planner.use_cases.verification import classes, equal_stages
from hetis.planner.use_cases.verification.outcome import router_of
from hetis.planner.use_cases.verification.rates import ITERATIONS, kept_plan, simulation_report
from hetis.solver.backends.search_clock import search_seconds
from hetis.solver.budget import Budget, Report, SearchSettings, silent
from hetis.solver.errors import InfeasibleError, InvalidProblemError, UncheckedPlanError
from hetis.solver.placement.rungs import Known
from hetis.solver.plan import DEFAULT_STRATEGY, PLANNED_UTILISATION, Objective, Plan
from hetis.solver.problem import PlacementProblem
from hetis.solver.workload import Workload

if TYPE_CHECKING:
    from hetis.solver.placement.infeasible import Market

AGAIN = 0.5  # of the work of simulations, which is left for each further plan
FAR_BELOW = 0.75  # of the usual utilisation: below, pools are also searched at the one that the plan without keeps


def read_inputs(request: PlacementRequest) -> LoadedInputs:
    """Read the files and names of a request, for any engine.

    Raises:
        DocumentError: contains the problems of all inputs.
        InvalidProblemError: the objective needs a demanded rate and has none, or a GPU type has no profile.
    """
    request.check()
    loaded = load_inputs(
        cluster=path_or_value(request.cluster),
        model=path_or_value(request.model),
        workload=path_or_value(request.workload),
        profiles=[str(os.fspath(path)) for path in request.profiles],
        prefix_hit_rate=request.hit_rate,
        burstiness=request.burstiness,
    ).with_constraints(pins=request.pin, forbids=request.forbid)  # fmt: skip
    share = request.gpu_memory_utilization
    settings = engine_settings(
        max_num_seqs=request.max_num_seqs,
        chunk_tokens=request.chunk_tokens,
        kv_blocks=request.kv_blocks,
        min_context=request.min_context,
        gpu_memory_utilization=None if share is None else ratio_of(share),
    )
    loaded = loaded.at(settings)
    _require_demand(request.goal, loaded.inputs.workload)
    return in_precision(loaded, weights=request.weights, kv=request.kv, mtp=request.mtp)


def pose(request: PlacementRequest, carriers: Carriers | None = None) -> PosedPlacement:
    """Read the files and names of a request for its engine, and return the problem that they define.

    ``carriers`` says which export targets carry a plan, without which its rung is not the default.

    Raises:
        DocumentError: contains the problems of all inputs.
        InvalidProblemError: the inputs contradict each other, the strategy lacks one of the roles, or there is no
            demand that could survive a loss.
    """
    settings = settings_of(request)
    loaded = for_engine(read_inputs(request), settings.engine)
    problem = settings.problem(loaded.inputs, request.goal)
    check_survival(problem, settings.survive, settings.keep)
    cuts = classes.cuts_of(request.classes, loaded.inputs.workload) if request.classes else {}
    if cuts and problem.family.engine is None:
        raise InvalidProblemError(f"--classes {request.classes}: strategy {request.strategy} knows no classes")
    return PosedPlacement(request=request, loaded=loaded, problem=problem, settings=settings, carriers=carriers)


@dataclass(frozen=True, slots=True, kw_only=True)
class PosedPlacement:
    """A request with its inputs and its problem, and the steps from there to a plan, until they are ``cancelled``."""

    request: PlacementRequest
    loaded: LoadedInputs
    problem: PlacementProblem
    settings: PlacementSettings
    carriers: Carriers | None
    cancelled: threading.Event = field(default_factory=threading.Event)

    def place(self, report: Report) -> Climbed:
        """Find a plan and verify it, as `prove` and `verify`."""
        return self.verify(self.prove(report), report)

    def prove(self, report: Report) -> Climbed:
        """Search, describe and check a plan: the answer by the cost model, before any simulation.

        Raises:
            InfeasibleError: no plan of the family exists; names GPUs of the catalogue that could be added.
            NoPlanFoundError: the search stopped before a plan was found.
            UncheckedPlanError: the plan fails the independent checker.
        """
        return make_plan(
            self.loaded, self.problem, self.settings, budget=self._budget(), report=report, market=catalogue_market,
            beside_equal_stages=True, requested=self.request.goal,
            carriers=self.carriers,
        )  # fmt: skip

    def verify(self, made: Climbed, report: Report) -> Climbed:
        """Simulate a plan of `prove` as requested: its value becomes the rate kept in simulation.

        Simulations share a limit.

        Raises:
            UncheckedPlanError: the plan, or that of a simpler rung which keeps more, fails the independent checker.
        """
        if self.request.verify:
            made = simulated_plan(
                made, self.loaded, self.settings, level=self.request.service_level, budget=self._budget_to_simulate(),
                report=report,
            )  # fmt: skip
        return self._with_classes(made, self._budget(), report)

    def _budget(self) -> Budget:
        """Return the budget of a search by work, which the clock ends at a requested time limit, or else much later."""
        guard = 1.0 if self.request.time_limit is not None else equal_stages.GUARD
        return equal_stages.search_budget(self.settings.time_limit_s, self.cancelled, guard)

    def _budget_to_simulate(self) -> Budget:
        limit_s, work = self.request.simulation_limit_s, self.request.simulated_tens * ITERATIONS
        return Budget(time_limit_s=limit_s, work_limit=work, clock=search_seconds, cancelled=self.cancelled)

    def _with_classes(self, made: Climbed, budget: Budget, report: Report) -> Climbed:
        """Return the plan with pools of classes of requests, on the same rung, if it is worth them (`classes.choose`).

        Raises:
            UncheckedPlanError: it fails the independent checker.
        """
        request, settings, workload = self.request, self.settings, self.loaded.inputs.workload
        cuts = classes.cuts_of(request.classes, workload)
        if not cuts or not made.plan.replicas or budget.is_spent():
            return made
        requested = self.loaded.inputs.applicable_limits(request.goal)
        evaluated, known = dict[Hashable, Any](), Known(_by_the_model(made.plan), made.problem.family)
        at_usual = dict[Hashable, Plan]()  # by classes

        def find(posed: PlacementProblem) -> Iterator[Plan]:
            find_left = survivors(settings, budget, report)
            best = None if settings.survive else found(posed, known)
            if best is not None:
                if best.replicas != made.plan.replicas:
                    yield described(best, posed)
                if not best.objective.kind.goal.is_planned:
                    return
            # Queues of pools are modelled without overflow into others, so simulation may keep more of pools that serve
            # most at a given utilisation: the usual one and, where far less is kept than the model says, the kept one.
            kept = posed.assumptions.planned_utilisation
            for utilisation in (PLANNED_UTILISATION, kept)[: 2 if 0.0 < kept < FAR_BELOW * PLANNED_UTILISATION else 1]:
                if best is None:
                    own = served_at(posed, utilisation)
                    yield described(surviving_plan(find_left, own, settings.survive, settings.keep), posed)
                    continue
                is_usual = utilisation == PLANNED_UTILISATION
                busiest = at_usual_rate(posed) if is_usual else found(served_at(posed, utilisation))
                bound = (max if best.objective.maximises else min)(best.result.bound, busiest.result.value)
                yield described(replace(busiest, result=busiest.result.bounded_by(bound)), posed)

        def served_at(posed: PlacementProblem, utilisation: float) -> PlacementProblem:
            assumptions = replace(posed.at(utilisation).assumptions, chooses_utilisation=False)
            return replace(posed, assumptions=assumptions)

        def at_usual_rate(posed: PlacementProblem) -> Plan:
            if posed.workload.classes not in at_usual:
                at_usual[posed.workload.classes] = found(served_at(posed, PLANNED_UTILISATION))
            return at_usual[posed.workload.classes]

        def found(posed: PlacementProblem, known: Known | None = None) -> Plan:
            best = search(posed, settings, budget=budget, report=report, known=known, evaluated=evaluated)
            return simplified(best, posed, settings, budget, report, evaluated)

        def described(plan: Plan, posed: PlacementProblem) -> Plan:
            inputs = replace(self.loaded.inputs, workload=replace(workload, classes=posed.workload.classes))
            plan = describe(plan, replace(self.loaded, inputs=inputs), posed, settings, requested, rung=made.rung)
            check(plan, posed)
            return with_losses(replace(plan, notes=(*plan.notes, classes.NEEDS_ROUTER)), posed)

        def verified(one: classes.WithClasses) -> Plan:
            return kept_plan(
                with_service_level(one.plan, request.service_level), one.problem, seed=settings.seed,
                budget=self._budget_to_simulate(), report=simulation_report(one.plan, report),
                router=router_of(settings.target),
            )  # fmt: skip

        chosen = classes.choose(
            classes.WithClasses(plan=made.plan, problem=made.problem), requested, cuts, find, worth=settings.worth,
            seed=settings.seed, budget=budget, report=report, carriers=self.carriers, target=settings.target,
            verified=verified if request.verify else None,
            promise=None if settings.survive or not requested.kind.goal.is_planned else at_usual_rate,
        )  # fmt: skip
        return replace(made, plan=chosen.plan, problem=chosen.problem)


def _by_the_model(plan: Plan) -> Plan:
    """Return the plan with what it keeps by the cost model, or in simulation if that is less."""
    modelled = Verified.of(plan).model_value
    value = plan.result.value if modelled is None else min(modelled, plan.result.value)
    return replace(plan, result=replace(plan.result, value=value))


def make_plan(
    loaded: LoadedInputs,
    problem: PlacementProblem,
    settings: PlacementSettings,
    *,
    budget: Budget,
    report: Report,
    market: Market | None = None,
    beside_equal_stages: bool = False,
    requested: Objective | None = None,
    on_search: Callable[[], None] = lambda: None,
    carriers: Carriers | None = None,
) -> Climbed:
    """Search for a plan, complete it with its inputs and notes, check it, and add the effects of its profiles' errors.

    It is of the requested rung or, by default, of the highest one that is worth it (`climb`).

    If no plan exists, ``market`` contains the GPUs that could be added (None: do not look). ``beside_equal_stages``
    adds the value of equal stages, which takes additional time.
    ``requested`` is the objective as requested, with limits that do not apply to the problem's requests; None: the
    problem's. ``on_search`` is called before each search.

    Raises:
        InfeasibleError: no plan of the family exists.
        NoPlanFoundError: the search stopped before a plan was found.
        UncheckedPlanError: the plan fails the independent checker.
    """

    from hetis.solver.planning import require_simplicity

    survive, evaluated = settings.survive, dict[Hashable, Any]()
    if settings.simplest_within:
        require_simplicity(problem, settings.strategy)

    def find(posed: PlacementProblem, own: Budget, known: Known | None = None) -> Plan:
        on_search()
        if survive:
            return surviving_plan(survivors(settings, own, report), posed, survive, settings.keep)
        return search(posed, settings, budget=own, report=report, market=market, known=known, evaluated=evaluated)

    def simplify(best: Plan, posed: PlacementProblem) -> Plan:
        return best if survive else simplified(best, posed, settings, budget, report, evaluated)

    try:
        if problem.family.engine is None:
            made = Climbed(plan=simplify(find(problem, budget), problem), problem=problem)
        else:
            made = climb(find, budget, problem, settings.strategy, settings.climbing(carriers), simplify)
    except InfeasibleError as error:
        if not survive:
            raise
        raise _not_surviving(error, problem, settings, budget) from None
    requested, problem = requested or problem.objective, problem_of(made.plan, made.problem)
    plan = Rungs(found=made.rungs).on(describe(made.plan, loaded, problem, settings, requested, rung=made.rung))
    is_compared = settings.strategy == DEFAULT_STRATEGY and plan.replicas and not survive  # they do not survive
    if beside_equal_stages and is_compared:
        plan = equal_stages.with_values(plan, problem, settings.seed, budget.cancelled)
        plan = with_uses_of_idle(plan, problem, loaded, settings.seed, equal_stages.budget_of_one(budget.cancelled))
    return replace(made, plan=_checked(plan, problem, losses=beside_equal_stages), problem=problem)


def _not_surviving(
    error: InfeasibleError, problem: PlacementProblem, settings: PlacementSettings, budget: Budget
) -> InfeasibleError:
    """Return why no plan survives: how much is left at most after a loss, if any plan leaves something."""
    demand, place = problem.objective.demand_rps, settings.survive
    if problem.objective.maximises or demand is None or budget.is_spent():
        return error
    quiet = replace(budget, time_limit_s=budget.remaining_s(), explains=False)
    most = most_left(survivors(settings, quiet, silent), with_least_layers(problem, 1), place)
    if most is None:
        return error
    left, bound = Surviving.of(most).left_rps or 0.0, Surviving.of(most).bound_rps or 0.0
    why = f"--survive {place}: no plan serves {demand:.4g} requests/s without its worst {place}"
    return InfeasibleError((why, f"{left:.4g} can be left after the loss of any one, and at most {bound:.4g}"))


def survivors(settings: PlacementSettings, budget: Budget, report: Report) -> Callable[..., tuple[Plan, float | None]]:
    """Return a search for plans that survive a loss, with the bound on what any of them leaves."""

    def find(posed: PlacementProblem, keep: float | None) -> tuple[Plan, float | None]:
        from hetis.solver.placement.losses.survival import Survive
        from hetis.solver.planning import solve_surviving

        survive = Survive(place=settings.survive, keep=keep, simplest_within=settings.simplest_within)
        return solve_surviving(
            posed, survive, strategy=settings.strategy, budget=budget, gap_target=settings.gap_target,
            seed=settings.seed, report=report,
        )  # fmt: skip

    return find


def simulated_plan(
    made: Climbed, loaded: LoadedInputs, settings: PlacementSettings, *, level: ServiceLevel,
    budget: Budget, report: Report, losses: bool = True, again: bool = True,
) -> Climbed:  # fmt: skip
    """Simulate a plan of `make_plan`, whose value becomes the rate that it keeps (`kept_plan`).

    If that is less than the best plan of another rung promises, the latter is simulated, too, and may be returned
    (`may_replace`). That is not done for a plan that survives a loss, or without ``again``. ``losses``: add the
    effects of losses to a plan whose value has changed.

    Raises:
        UncheckedPlanError: the plan that is returned fails the independent checker.
    """

    def simulated(one: Climbed, plan: Plan, rungs: tuple[RungFound, ...]) -> Climbed:
        kept = kept_plan(
            with_service_level(plan, level), one.problem, seed=settings.seed, budget=budget,
            report=simulation_report(plan, report), router=router_of(settings.target),
        )  # fmt: skip
        rows = tuple(replace(row, value=kept.result.value) if row.is_chosen else row for row in rungs)
        problem = problem_of(kept, one.problem)
        checked = kept if kept.result == plan.result else _checked(Rungs(found=rows).on(kept), problem, losses=losses)
        return replace(one, plan=checked, problem=problem, rungs=rows)

    found, within = simulated(made, made.plan, made.rungs), settings.simplest_within
    others = () if settings.survive or not again else made.others
    for other in sorted(others, key=lambda one: -one.plan.result.value) if made.plan.objective.maximises else others:
        if not may_replace(other, found, settings.worth, within) or budget.cancelled.is_set():
            continue
        posed = replace(other, problem=replace(other.problem, objective=other.plan.objective))
        simple = simplified(other.plan, posed.problem, settings, Budget(cancelled=budget.cancelled), report)
        described = describe(simple, loaded, posed.problem, settings, made.plan.objective, rung=other.rung)
        rungs = tuple(replace(one, is_chosen=one.name == other.rung) for one in found.rungs)
        budget.work = min(budget.work, budget.work_limit * (1.0 - AGAIN))
        tried = simulated(posed, Rungs(found=rungs).on(described), rungs)
        if Verified.of(tried.plan).verification is not None and may_replace(tried, found, settings.worth):
            note = f"of rung {other.rung}: simulated, it keeps more than the best plan of rung {found.rung}"
            found = replace(tried, plan=replace(tried.plan, notes=(*tried.plan.notes, note)))
    return found


def with_service_level(plan: Plan, level: ServiceLevel) -> Plan:
    """Return the plan with the service level that simulated traffic must keep."""
    if level == service_level.DEFAULT:
        return plan
    note = f"search and bound use p95 TTFT and mean TPOT; simulated traffic must keep {level}, without a bound"
    requested = replace(Requested.of(plan), service_level=level)
    return requested.on(replace(plan, notes=(*plan.notes, note)))


def _checked(plan: Plan, problem: PlacementProblem, *, losses: bool) -> Plan:
    """Check a plan, and add the effects of its losses, if requested, and of its profiles' errors."""
    check(plan, problem)
    return with_profile_errors(with_losses(plan, problem) if losses else plan, problem)


def search(
    problem: PlacementProblem, settings: PlacementSettings, *, budget: Budget, report: Report,
    market: Market | None = None, known: Known | None = None, evaluated: dict[Hashable, Any] | None = None,
) -> Plan:  # fmt: skip
    """Find the best plan of the strategy's family and bind it to named GPUs, by `hetis.solver.planning`.

    It may be the ``known`` one of a smaller family, whose search left what it ``evaluated``.

    Raises:
        InfeasibleError: no plan of the family exists.
        NoPlanFoundError: the search stopped before a plan was found.
    """
    from hetis.solver.planning import solve_placement

    return solve_placement(
        problem,
        strategy=settings.strategy,
        budget=budget,
        gap_target=settings.gap_target,
        seed=settings.seed,
        report=report,
        market=market,
        known=known,
        evaluated=evaluated,
    )


def simplified(
    best: Plan, problem: PlacementProblem, settings: PlacementSettings, budget: Budget, report: Report,
    evaluated: dict[Hashable, Any] | None = None,
) -> Plan:  # fmt: skip
    """Return the simplest plan that loses no more than requested against a plan of `search`, if any loss is accepted.

    Raises:
        InvalidProblemError: the strategy has no simplest plans.
    """
    from hetis.solver.planning import simplify_placement

    if not settings.simplest_within:
        return best
    how = SearchSettings(
        strategy=settings.strategy, budget=budget, gap_target=settings.gap_target, seed=settings.seed, report=report,
        evaluated={} if evaluated is None else evaluated,
    )  # fmt: skip
    return simplify_placement(problem, best, settings.simplest_within, how)


def check(plan: Plan, problem: PlacementProblem) -> None:
    """Derive every number of the plan again, by code that shares nothing with the search.

    Raises:
        UncheckedPlanError: a number is wrong, or a constraint is violated.
    """
    from hetis.solver.check import check_plan

    if violations := check_plan(plan, problem):
        raise UncheckedPlanError(tuple(str(violation) for violation in violations))


def _require_demand(goal: Objective, workload: Workload) -> None:
    """Check that a rate is demanded: the traffic for the least cost or the fewest GPUs is not guessed.

    Raises:
        InvalidProblemError: no rate is demanded; names the trace's rate if there is one.
    """
    if not goal.maximises and goal.demand_rps is None:
        hint = "" if workload.rate_rps is None else f"; {workload.name} arrives at {workload.rate_rps:.4g} requests/s"
        raise InvalidProblemError(f"objective {goal.kind} needs a demanded rate: --rate{hint}")
