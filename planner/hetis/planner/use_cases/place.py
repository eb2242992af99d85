"""`hetis-plan place`, step by step: `load` -> `pose` -> `search` (which binds) -> `describe` -> `check` -> report.

`place` takes a loaded problem through these steps, and adds the requested studies of the plan. `make_plan` is its core,
which `compare` and the service's solver jobs share. `hetis.planner.report.plan` draws the result of `place`.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from hetis.formats import catalogue
from hetis.formats.traces import PrefixHitRate
from hetis.planner.use_cases import equal_stages, service_level
from hetis.planner.use_cases.any_engine import search_again
from hetis.planner.use_cases.engine_values import with_engine_values
from hetis.planner.use_cases.listing import kinds_in_a_zone, refuse_unlisted, stages_to_list
from hetis.planner.use_cases.precision import for_engine, in_precision, notes_on_exchange
from hetis.planner.use_cases.queueing import with_queueing
from hetis.planner.use_cases.robustness.profile_errors import profile_notes, with_profile_errors
from hetis.planner.use_cases.robustness.study import Robustness, study, with_robustness
from hetis.planner.use_cases.service_level import ServiceLevel
from hetis.planner.use_cases.sources import (
    CONSTRAINTS,
    ENGINE_SETTINGS,
    Inputs,
    LoadedInputs,
    engine_settings_data,
    load_inputs,
    with_asked,
)
from hetis.planner.use_cases.surviving import check_survival, surviving_plan, with_losses
from hetis.planner.use_cases.tightening import is_other_than_best, verified_plan
from hetis.planner.use_cases.verification import misses, promising, verification_of
from hetis.planner.use_cases.verify import MISSES_AT, RunReport, needs_verifying
from hetis.planner.use_cases.versions import installed_versions
from hetis.profiler.defaults import default_profile
from hetis.solver.budget import Budget, Progress, Report, SearchSettings
from hetis.solver.cluster import Cluster
from hetis.solver.errors import InvalidProblemError, NoPlanFoundError, UncheckedPlanError
from hetis.solver.model import ModelSpec
from hetis.solver.plan import DEFAULT_STRATEGY, DEFAULT_TIME_LIMIT_S, Objective, ObjectiveKind, Plan, Role
from hetis.solver.problem import NOTHING_SET, EngineRules, EngineSettings, PlacementProblem
from hetis.solver.search_clock import search_seconds
from hetis.solver.workload import Workload

if TYPE_CHECKING:
    from hetis.solver.placement.infeasible import Market, Offer
    from hetis.solver.planning import ConstraintPrice

DEFAULT_TTFT_S = 2.0
DEFAULT_TPOT_S = 0.1
LEAST_TO_SIMULATE_S = 30.0  # however short the time limit; most plans of small fleets need seconds
TO_SIMULATE_S = 120.0  # if no time limit was requested: a plan with attention workers that misses a limit needs minutes
TO_SEARCH = 0.5  # share of the time left for another search: the rest is for the simulation of its plan
TO_SURVIVE = 0.5  # share of the time left for each search for a plan that survives a loss: others may follow
CUT_SHORT = 0.5  # share of the time limit of a search that its gap shows to have been cut short
SHORT_TIME = 20.0  # times what the first plan's simulation took, about as long as a search for a lower rate may take
PLACES = ("node", "zone")  # kinds of places whose loss a plan may have to survive
MODEL_VALUE = "model_value"  # entry of `Plan.inputs`: the best plan's by the model, if this is another
CONSTRAINT_PRICES = "constraint_prices"  # entry of `Plan.inputs`: the cost of every constraint, if requested
ONE_TOKEN = "requests have one output token, so that a limit on TPOT does not apply"
STOPPED_EARLY = "stopped before its simulation ended: it is not known at which rate traffic keeps the limits"
OUT_OF_TIME = "the time limit ended its simulation: it is not known at which rate traffic keeps the limits"
SEARCH_OUT_OF_TIME = "the time limit ended the search for a plan that keeps its limits at its planned rate"
KV_IS_FOR_ENGINES = "engines must be configured to transfer KV along the routes"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementSettings:
    """Settings of the search, all of which are recorded in ``plan.inputs``.

    ``roles``: those that replicas may have; empty: all roles of the strategy. ``engine``: the engine whose rules plans
    must obey; None: any engine. ``keep_stages``: whether to search pipelines of as many stages as its rules have; if
    not, of fewer where those are too many to list (`listing`). ``simplest_within``: the share of the optimum that a
    plan on fewer nodes may lose. ``survive``: ``node`` or ``zone`` if the demand must be served even if any one of them
    is lost; empty: neither.
    """

    strategy: str = DEFAULT_STRATEGY
    roles: tuple[Role, ...] = ()
    engine: EngineRules | None = None
    keep_stages: bool = False
    time_limit_s: float = DEFAULT_TIME_LIMIT_S
    gap_target: float = 0.001
    seed: int = 0
    threads: int = 1
    simplest_within: float = 0.0
    survive: str = ""

    def problem(self, inputs: Inputs, objective: Objective, *, least_stages: int = 1) -> PlacementProblem:
        """Return the problem that these inputs define, with the strategy's family of plans.

        Its engine has fewer stages than ``engine`` if those are too many to list, but at least ``least_stages``.

        Raises:
            InvalidProblemError: the inputs contradict each other, the strategy lacks one of the roles, or stages that
                must be kept are too many.
        """
        problem = inputs.problem(objective, self.strategy, self.roles, self.engine)
        if self.engine is None:
            return problem
        if self.keep_stages:
            refuse_unlisted(problem)
            return problem
        stages = max(stages_to_list(problem), least_stages)
        if stages >= self.engine.max_stages:
            return problem
        return inputs.problem(objective, self.strategy, self.roles, replace(self.engine, max_stages=stages))


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementRequest:
    """A request for ``place``: files, names or values, and options."""

    cluster: str | Cluster
    model: str | ModelSpec
    workload: str | Workload
    prefix_hit_rate: PrefixHitRate | None = None  # replaces the workload's own; None: keep that
    profiles: Sequence[str] = ()
    pins: Sequence[str] = ()  # texts of the ``--pin`` options
    forbids: Sequence[str] = ()  # texts of the ``--forbid`` options
    weights: str | None = None  # precision by names of `hetis.formats.dtypes`; None: the checkpoint's
    kv: str | None = None  # precision by names of `hetis.formats.dtypes`; None: the checkpoint's
    # Drafted tokens and their acceptance, such as ``1:0.85``; None: no drafts unless the model's file specifies some
    mtp: str | None = None
    objective: Objective
    settings: PlacementSettings = PlacementSettings()
    engine_settings: EngineSettings = NOTHING_SET  # settings with which engines are started, whatever is planned
    verify: bool = True  # whether to simulate the plan before it is shown
    simulation_limit_s: float = math.inf  # seconds that simulations may take, with the searches that follow them
    service_level: ServiceLevel = service_level.DEFAULT  # the level that the plan must keep in the simulation
    other_engines: bool = True  # whether to report the values of plans for other engines
    price_pins: bool = False  # whether to report the cost of every constraint
    profile_error: float | None = None  # study the plan under profiles that are off by up to this share; None: no study


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedPlan:
    """A plan that passed the checker, with its studies."""

    plan: Plan
    robustness: Robustness | None = None
    prices: tuple[ConstraintPrice, ...] = ()


def load(request: PlacementRequest) -> LoadedInputs:
    """Read the files and names of a request.

    Raises:
        DocumentError: contains the problems of all inputs.
        InvalidProblemError: the objective needs a demanded rate and has none, or a GPU type has no profile.
    """
    loaded = load_inputs(
        cluster=request.cluster, model=request.model, workload=request.workload, profiles=request.profiles,
        prefix_hit_rate=request.prefix_hit_rate,
    ).with_constraints(pins=request.pins, forbids=request.forbids)  # fmt: skip
    loaded = loaded.at(request.engine_settings)
    _require_demand(request.objective, loaded.inputs.workload)
    loaded = in_precision(loaded, weights=request.weights, kv=request.kv, mtp=request.mtp)
    return for_engine(loaded, request.settings.engine)


def pose(request: PlacementRequest, loaded: LoadedInputs) -> PlacementProblem:
    """Return the problem: the inputs, the objective, and the strategy's family of plans.

    Raises:
        InvalidProblemError: the inputs contradict each other, the strategy lacks one of the roles, or there is no
            demand that could survive a loss.
    """
    settings = request.settings
    problem = settings.problem(loaded.inputs, request.objective)
    if settings.survive:
        check_survival(problem, settings.survive)
    return problem


def place(
    request: PlacementRequest,
    loaded: LoadedInputs,
    problem: PlacementProblem,
    *,
    cancelled: threading.Event,
    report: Report,
) -> PlacedPlan:
    """Search, describe and check a plan, then verify, price and study it as requested.

    The time limit applies to the search; those for tighter limits together may take the same time again, a study, too,
    and so may the prices. Simulations, together with the searches for tighter limits, have a limit of their own.

    Raises:
        InfeasibleError: no plan of the family exists; names GPUs of the catalogue that could be added.
        NoPlanFoundError: the search stopped before a plan was found.
        UncheckedPlanError: the plan fails the independent checker.
    """
    settings = request.settings

    def budget() -> Budget:
        return Budget(time_limit_s=settings.time_limit_s, clock=search_seconds, cancelled=cancelled)

    plan = make_plan(
        loaded,
        problem,
        settings,
        budget=budget(),
        report=report,
        market=catalogue_market,
        beside_equal_stages=True,
        beside_engines=request.other_engines,
        asked=request.objective,
    )
    problem = replace(problem, objective=plan.objective)  # its demand is larger if a loss must be survived
    if request.verify:
        whole = replace(budget(), time_limit_s=request.simulation_limit_s)
        plan = simulated_plan(
            plan, loaded, problem, settings, level=request.service_level, budget=budget, cancelled=cancelled,
            report=report, limit_s=request.simulation_limit_s,
        )  # fmt: skip
        plan = equal_stages.with_kept_rate(
            plan, problem, seed=settings.seed, cancelled=_Spent(whole), report=simulation_report(plan, report)
        )
    else:
        plan = with_queueing(plan, problem)
    prices = _constraint_prices(plan, problem, settings, budget(), report) if request.price_pins else ()
    if prices:
        plan = replace(plan, inputs={**plan.inputs, CONSTRAINT_PRICES: _price_rows(prices)})
    if request.profile_error is None or not plan.replicas:
        return PlacedPlan(plan=plan, prices=prices)
    found = study(
        plan, problem, error=request.profile_error, seed=settings.seed, budget=budget(), threads=settings.threads,
        report=report,
    )  # fmt: skip
    return PlacedPlan(plan=with_robustness(plan, found), robustness=found, prices=prices)


def make_plan(
    loaded: LoadedInputs,
    problem: PlacementProblem,
    settings: PlacementSettings,
    *,
    budget: Budget,
    report: Report,
    market: Market | None = None,
    beside_equal_stages: bool = False,
    beside_engines: bool = False,
    asked: Objective | None = None,
    on_search: Callable[[], None] = lambda: None,
) -> Plan:
    """Search for a plan, complete it with its inputs and notes, check it, and add the effects of its profiles' errors.

    If no plan exists, ``market`` contains the GPUs that could be added (None: do not look). ``beside_equal_stages``
    adds the value of equal stages, and ``beside_engines`` those of plans for other engines, which takes additional
    time. If a loss must be survived, several searches share the budget: each may take half of what is left of it.
    ``asked`` is the objective as requested, with limits that do not apply to the problem's requests; None: the
    problem's. ``on_search`` is called before each search.

    Raises:
        InfeasibleError: no plan of the family exists.
        NoPlanFoundError: the search stopped before a plan was found.
        UncheckedPlanError: the plan fails the independent checker.
    """

    survive = settings.survive

    def find(posed: PlacementProblem, *, explains: bool = True) -> Plan:
        on_search()
        own = _part_of(budget, explains=explains) if survive else budget
        return search(posed, settings, budget=own, report=report, market=market)

    try:
        plan = surviving_plan(find, partial(find, explains=False), problem, survive) if survive else find(problem)
    except NoPlanFoundError as error:
        if not survive or budget.cancelled.is_set() or math.isinf(budget.time_limit_s):
            raise
        raise NoPlanFoundError(f"{error}; all searches for --survive share {budget.time_limit_s:.4g} s") from None
    asked, problem = asked or problem.objective, replace(problem, objective=plan.objective)
    plan = with_asked(describe(plan, loaded, problem, settings), asked)
    is_compared = settings.strategy == DEFAULT_STRATEGY and plan.replicas and not survive  # they do not survive
    if beside_equal_stages and is_compared:
        plan = equal_stages.with_values(plan, problem, settings.seed, budget.cancelled)
    if beside_engines and is_compared:
        plan = with_engine_values(
            plan, problem, seed=settings.seed, time_limit_s=settings.time_limit_s, cancelled=budget.cancelled,
            report=report,
        )  # fmt: skip
    return _checked(plan, problem, losses=beside_equal_stages)


def _part_of(budget: Budget, *, explains: bool) -> Budget:
    """Return the budget of the next of several searches, however many may follow.

    Raises:
        NoPlanFoundError: no time is left.
    """
    left_s = budget.remaining_s()
    if left_s <= 0.0:
        raise NoPlanFoundError("the time limit ended before the search for a plan that survives a loss")
    return replace(budget, time_limit_s=TO_SURVIVE * left_s, explains=explains)


def simulated_plan(
    plan: Plan, loaded: LoadedInputs, problem: PlacementProblem, settings: PlacementSettings, *, level: ServiceLevel,
    budget: Callable[[], Budget], cancelled: threading.Event, report: Report, losses: bool = True, again: bool = True,
    limit_s: float = math.inf,
) -> Plan:  # fmt: skip
    """Simulate a plan of `make_plan`; if it misses a limit, search again with a tighter one (`verified_plan`).

    A plan that maximises its rate is simulated at that rate, whatever rate is demanded of it.

    There is no other search for a plan that survives a loss, or without ``again``. ``budget`` returns the budget of one
    search; all further ones together have the same time. ``losses``: add the effects of losses to another plan. Once
    cancelled, or after ``limit_s`` of simulations and further searches, the plan is returned as far as it was verified,
    with a note if that is not at all, or if time ended the other search.

    Raises:
        UncheckedPlanError: the other plan fails the independent checker.
    """

    spent_s, whole = 0.0, replace(budget(), time_limit_s=limit_s)

    def searched(posed: PlacementProblem, within: Budget) -> Plan:
        return search(posed, settings, budget=within, report=report)

    def find(posed: PlacementProblem) -> Plan:
        nonlocal spent_s
        rest = budget()
        left_s = min(rest.time_limit_s - spent_s, TO_SEARCH * whole.remaining_s())
        rest = replace(rest, time_limit_s=left_s, explains=False)
        try:
            other = search_again(posed, settings.strategy, searched, rest)
        finally:
            spent_s += rest.elapsed_s()
        return describe(other, loaded, problem, settings)

    def of_equal_stages() -> Plan | None:
        if settings.strategy != DEFAULT_STRATEGY:
            return None
        equal = equal_stages.other_plan(plan, problem, settings.seed, _Spent(whole))
        return None if equal is None else describe(equal, loaded, problem, settings)

    def is_short() -> bool:
        """Return whether another search may use up the time that is left, as this one has used up its own."""
        was_cut_short = (
            plan.result.gap > settings.gap_target and plan.result.solve_s > CUT_SHORT * settings.time_limit_s
        )
        return was_cut_short or whole.remaining_s() < SHORT_TIME * whole.elapsed_s()

    plan, again, asked = held_to(level, plan), again and not settings.survive, plan.objective
    plan = promising(plan)
    problem = replace(problem, objective=plan.objective)  # its demand is larger if a loss must be survived
    found = verified_plan(
        plan, problem, find if again else None, seed=settings.seed, cancelled=_Spent(whole),
        report=simulation_report(plan, report), is_short=is_short, equal_stages=of_equal_stages,
    )  # fmt: skip
    found, problem = replace(found, objective=asked), replace(problem, objective=asked)
    found = noted_if_stopped(found, cancelled, whole)
    simulated = verification_of(found)
    if again and simulated is not None and not simulated.kept and whole.is_spent() and not cancelled.is_set():
        found = replace(found, notes=(*found.notes, SEARCH_OUT_OF_TIME))
    if not is_other_than_best(found):
        return found
    found = replace(found, inputs={**found.inputs, MODEL_VALUE: plan.result.value})
    return _checked(found, problem, losses=losses)


class _Spent(threading.Event):
    """An event that is set once a budget is spent: what only looks whether it is cancelled then ends in time, too."""

    def __init__(self, budget: Budget) -> None:
        super().__init__()
        self._budget = budget

    def is_set(self) -> bool:
        return self._budget.is_spent()


def time_to_simulate_s(time_limit_s: float | None) -> float:
    """Return the seconds for simulations, with the searches that follow them, after a search of this time limit.

    None means that no limit was requested.
    """
    return TO_SIMULATE_S if time_limit_s is None else max(LEAST_TO_SIMULATE_S, time_limit_s)


def noted_if_stopped(plan: Plan, cancelled: threading.Event, budget: Budget | None = None) -> Plan:
    """Return the plan with a note if it was to be simulated and was not, since that was cancelled or time ran out."""
    is_spent = budget is not None and budget.is_spent()
    if not (cancelled.is_set() or is_spent) or not needs_verifying(plan) or verification_of(plan) is not None:
        return plan
    return replace(plan, notes=(*plan.notes, STOPPED_EARLY if cancelled.is_set() else OUT_OF_TIME))


class StoppedSimulation(NamedTuple):
    """A simulation that ended before it decided: why, and the note about the rate that misses limits; empty: none."""

    why: str
    missed: str


def stopped_simulation_of(plan: Plan) -> StoppedSimulation | None:
    """Return what is known of a plan's stopped simulation; None: there is none, or it was not stopped."""
    why = next((note for note in (STOPPED_EARLY, OUT_OF_TIME) if note in plan.notes), None)
    if why is None or verification_of(plan) is not None:
        return None
    return StoppedSimulation(why, next((note for note in plan.notes if note.startswith(MISSES_AT)), ""))


def held_to(level: ServiceLevel, plan: Plan) -> Plan:
    """Return the plan with the service level that simulated traffic must keep."""
    if level == service_level.DEFAULT:
        return plan
    note = f"search and bound use p95 TTFT and mean TPOT; simulated traffic must keep {level}, without a bound"
    inputs = {**plan.inputs, service_level.SERVICE_LEVEL: level.data()}
    return replace(plan, inputs=inputs, notes=(*plan.notes, note))


def _checked(plan: Plan, problem: PlacementProblem, *, losses: bool) -> Plan:
    """Check a plan, and add the effects of its losses, if requested, and of its profiles' errors."""
    check(plan, problem)
    return with_profile_errors(with_losses(plan, problem) if losses else plan, problem)


def search(
    problem: PlacementProblem, settings: PlacementSettings, *, budget: Budget, report: Report,
    market: Market | None = None,
) -> Plan:  # fmt: skip
    """Find the best plan of the strategy's family and bind it to named GPUs, by `hetis.solver.planning`.

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
        threads=settings.threads,
        report=report,
        market=market,
        simplest_within=settings.simplest_within,
    )


def describe(plan: Plan, loaded: LoadedInputs, problem: PlacementProblem, settings: PlacementSettings) -> Plan:
    """Add its inputs to a plan, and notes about its links and profiles."""
    from hetis.solver.placement.explanation import link_sentences

    routed = (KV_IS_FOR_ENGINES, *link_sentences(plan, problem)) if plan.kv_routes else ()
    lengths = () if loaded.inputs.has_tpot else (ONE_TOKEN,)
    notes = (
        *plan.notes, *notes_on_stages(problem, settings), *loaded.notes, *lengths, *routed, *profile_notes(problem),
        *notes_on_exchange(plan, problem),
    )  # fmt: skip
    return replace(plan, inputs=inputs_of_plan(loaded, settings, problem), notes=notes)


def notes_on_stages(problem: PlacementProblem, settings: PlacementSettings) -> tuple[str, ...]:
    """Return a note if the problem's pipelines have fewer stages than the engine allows."""
    engine, of_engine = problem.family.engine, settings.engine
    if engine is None or of_engine is None or engine.max_stages >= of_engine.max_stages:
        return ()
    return (
        f"pipelines of up to {engine.max_stages} stage{'s' * (engine.max_stages > 1)}, not {of_engine.max_stages}: "
        f"{kinds_in_a_zone(problem)} kinds of GPUs in a zone; --max-stages allows more",
    )


def check(plan: Plan, problem: PlacementProblem) -> None:
    """Derive every number of the plan again, by code that shares nothing with the search.

    Raises:
        UncheckedPlanError: a number is wrong, or a constraint is violated.
    """
    from hetis.solver.check import check_plan

    if violations := check_plan(plan, problem):
        raise UncheckedPlanError(tuple(str(violation) for violation in violations))


def objective(
    kind: ObjectiveKind, *, ttft_s: float | None, tpot_s: float | None, demand_rps: float | None
) -> Objective:
    """Return the objective with its default limits. A limit of None is the default, infinity means no limit."""
    throughput = kind is ObjectiveKind.THROUGHPUT
    ttft_s = (float("inf") if throughput else DEFAULT_TTFT_S) if ttft_s is None else ttft_s
    tpot_s = (float("inf") if throughput else DEFAULT_TPOT_S) if tpot_s is None else tpot_s
    return Objective(
        kind=kind,
        ttft_limit_s=None if ttft_s == float("inf") else ttft_s,
        tpot_limit_s=None if tpot_s == float("inf") else tpot_s,
        demand_rps=demand_rps,
    )


def _require_demand(goal: Objective, workload: Workload) -> None:
    """Check that a rate is demanded: the traffic for the least cost or the fewest GPUs is not guessed.

    Raises:
        InvalidProblemError: no rate is demanded; names the trace's rate if there is one.
    """
    if not goal.maximises and goal.demand_rps is None:
        hint = "" if workload.rate_rps is None else f"; {workload.name} arrives at {workload.rate_rps:.4g} requests/s"
        raise InvalidProblemError(f"objective {goal.kind} needs a demanded rate: --rate{hint}")


def missed(plan: Plan, settings: PlacementSettings) -> list[str]:
    """Return the requirements of ``--strict`` that the plan does not meet."""
    result, found = plan.result, []
    if result.gap == float("inf"):
        found.append("the search stopped before it found a bound, so no gap is proven")
    elif result.gap > (allowed := settings.gap_target + settings.simplest_within) + 1e-9:
        found.append(f"the gap is {result.gap:.3%}, the target is {allowed:.3%}")
    demand = plan.objective.demand_rps
    if plan.objective.maximises and demand is not None and result.value < demand * (1 - 1e-9):
        found.append(f"the plan serves {result.value:.4g} requests/s, {demand:.4g} are demanded")
    simulated = verification_of(plan)
    if simulated is None and OUT_OF_TIME in plan.notes:
        found += [note for note in plan.notes if note == OUT_OF_TIME or note.startswith(MISSES_AT)]
    if simulated is not None and not simulated.kept:
        found.append(f"simulated at {simulated.rate_rps:.4g} requests/s: {', '.join(misses(simulated, plan))}")
    return found


def inputs_of_plan(loaded: LoadedInputs, settings: PlacementSettings, problem: PlacementProblem) -> dict[str, Any]:
    """Return ``plan.inputs`` for a plan made by `make_plan`."""
    return {
        "versions": installed_versions(),
        "roles": [role.value for role in problem.family.roles],
        **({"engine": asdict(rules)} if (rules := problem.family.engine) is not None else {}),
        **({ENGINE_SETTINGS: engine_settings_data(kept)} if (kept := problem.family.engine_settings) else {}),
        **({CONSTRAINTS: [str(each) for each in problem.constraints]} if problem.constraints else {}),
        "seed": settings.seed,
        "threads": settings.threads,
        "gap_target": settings.gap_target,
        "time_limit_s": settings.time_limit_s,
        **({"simplest_within": settings.simplest_within} if settings.simplest_within else {}),
        **({"survive": settings.survive} if settings.survive else {}),
        "origins": dict(loaded.origins),
        "digests": loaded.inputs.digests(),
        "documents": loaded.inputs.documents(),
    }


def simulation_report(plan: Plan, report: Report) -> RunReport:
    """Return a callback that reports simulations as progress of the search, for each quarter of a run's requests."""
    started_s, told = time.monotonic() - plan.result.solve_s, (0.0, 0, 0)

    def run(rate_rps: float, given: int, total: int) -> None:
        nonlocal told
        if told == (told := (rate_rps, given * 4 // max(total, 1), total)):
            return
        phase = f"simulating {rate_rps:.4g} requests/s, {given:,} of {total:,}"
        if not total:
            phase = "compiling the dispatcher (only once; takes a minute or two)"
        report(Progress(phase=phase, elapsed_s=time.monotonic() - started_s, incumbent=plan.result.value))

    return run


def _constraint_prices(
    plan: Plan, problem: PlacementProblem, settings: PlacementSettings, budget: Budget, report: Report
) -> tuple[ConstraintPrice, ...]:
    """Return the cost of every constraint; empty if the problem has none."""
    if not problem.constraints:
        return ()
    from hetis.solver.planning import price_constraints

    search = SearchSettings(
        budget=budget, gap_target=settings.gap_target, seed=settings.seed, threads=settings.threads, report=report
    )
    return price_constraints(problem, plan, search)


def _price_rows(prices: Sequence[ConstraintPrice]) -> list[dict[str, Any]]:
    """Return prices in the form in which they are stored in `Plan.inputs`."""
    return [
        {
            "constraints": [str(each) for each in price.constraints],
            "least": price.least,
            "most": price.most,
            "solved": price.is_solved,
        }
        for price in prices
    ]


def catalogue_market() -> Sequence[Offer]:
    """Return what could be added to any fleet: the catalogue's GPU types with a price, with their default profiles."""
    from hetis.solver.placement.infeasible import Offer

    offers = []
    for entry in catalogue.gpus():
        if entry.gpu.usd_per_hour is not None:
            try:
                _, profile = default_profile(entry.gpu)
            except InvalidProblemError:
                continue
            offers.append(Offer(gpu=entry.gpu, profile=profile))
    return offers
