"""From a loaded problem to a plan that has been checked and says what it was made from."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from hetis.planner.use_cases.errors import UncheckedPlanError
from hetis.planner.use_cases.robustness.notes import profile_notes, with_profile_errors
from hetis.planner.use_cases.sources import LoadedInputs
from hetis.planner.use_cases.verify import misses, verification_of
from hetis.planner.use_cases.versions import installed_versions
from hetis.solver.budget import Budget, Report
from hetis.solver.errors import InvalidProblemError
from hetis.solver.plan import Objective, ObjectiveKind, Plan, Role
from hetis.solver.problem import EngineRules, PlacementProblem
from hetis.solver.workload import Workload

if TYPE_CHECKING:
    from hetis.solver.placement.infeasible import Market

DEFAULT_TTFT_S = 2.0
DEFAULT_TPOT_S = 0.1
DEFAULT_STRATEGY = "hetis"
EQUAL_STAGES = "equal_stages_value"  # entry of `Plan.inputs`: what `uniform` reaches, null where it has no plan
SIMPLE_SETUPS = "simple_setups"  # and this: the same by TP size, where every replica has that one
EQUAL_STAGES_S = 5.0  # at most, to find both
KV_IS_FOR_ENGINES = "engines hand KV over along the routes; you set them up for it"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to search; all of it goes into ``plan.inputs``. ``roles``: those that replicas may have; empty: all of the
    strategy. ``engine``: the one whose rules plans keep to; None: any."""

    strategy: str = DEFAULT_STRATEGY
    roles: tuple[Role, ...] = ()
    engine: EngineRules | None = None
    time_limit_s: float = 60.0
    gap_target: float = 0.001
    seed: int = 0
    threads: int = 1


def objective(
    kind: ObjectiveKind, *, ttft_s: float | None, tpot_s: float | None, demand_rps: float | None
) -> Objective:
    """The objective with its default limits; None asks for the default, infinity lifts a limit."""
    throughput = kind is ObjectiveKind.THROUGHPUT
    ttft_s = (float("inf") if throughput else DEFAULT_TTFT_S) if ttft_s is None else ttft_s
    tpot_s = (float("inf") if throughput else DEFAULT_TPOT_S) if tpot_s is None else tpot_s
    return Objective(
        kind=kind,
        ttft_limit_s=None if ttft_s == float("inf") else ttft_s,
        tpot_limit_s=None if tpot_s == float("inf") else tpot_s,
        demand_rps=demand_rps,
    )


def require_demand(kind: ObjectiveKind, demand_rps: float | None, workload: Workload) -> None:
    """Refuses to guess how much traffic the least cost and the fewest GPUs are for.

    Raises:
        InvalidProblemError: no rate is demanded; names the rate of the trace, where it has one.
    """
    if kind in (ObjectiveKind.COST, ObjectiveKind.GPUS) and demand_rps is None:
        hint = "" if workload.rate_rps is None else f"; {workload.name} arrives at {workload.rate_rps:.4g} requests/s"
        raise InvalidProblemError(f"objective {kind} needs a demanded rate: --rate{hint}")


def make_plan(
    loaded: LoadedInputs,
    problem: PlacementProblem,
    settings: Settings,
    *,
    budget: Budget,
    report: Report,
    market: Market | None = None,
    beside_equal_stages: bool = False,
) -> Plan:
    """Solves, completes the plan with its inputs and notes, checks it, and says what its profiles' errors make of it.

    Where no plan exists, ``market`` says which GPUs could be added (None: nobody asks). ``beside_equal_stages`` asks
    what equal stages reach, which takes time of its own.

    Raises:
        InfeasibleError: no plan of the family exists.
        NoPlanFoundError: stopped before one was found.
        UncheckedPlanError: the plan fails the independent checker.
    """
    from hetis.solver.check import check_plan
    from hetis.solver.placement.explanation.routes import link_sentences
    from hetis.solver.placement.solve import equal_stages_value
    from hetis.solver.planning import solve_placement

    plan = solve_placement(
        problem,
        strategy=settings.strategy,
        budget=budget,
        gap_target=settings.gap_target,
        seed=settings.seed,
        threads=settings.threads,
        report=report,
        market=market,
    )
    routed = (KV_IS_FOR_ENGINES, *link_sentences(plan, problem)) if plan.kv_routes else ()
    notes = (*plan.notes, *routed, *profile_notes(problem))
    inputs = inputs_of_plan(loaded, settings, problem)
    if beside_equal_stages and settings.strategy == DEFAULT_STRATEGY and plan.replicas:
        alone = Budget(time_limit_s=EQUAL_STAGES_S, clock=time.monotonic, cancelled=budget.cancelled)
        inputs[EQUAL_STAGES] = equal_stages_value(problem, budget=alone, seed=settings.seed)
        most = max(slots.count for group in problem.cluster.node_groups for slots in group.gpus)
        sizes = [tp for tp in problem.family.tp_sizes if tp <= most]
        inputs[SIMPLE_SETUPS] = {
            str(tp): equal_stages_value(
                replace(problem, family=replace(problem.family, tp_sizes=(tp,))), budget=alone, seed=settings.seed
            )
            for tp in sizes
        }
    plan = replace(plan, inputs=inputs, notes=notes)
    violations = check_plan(plan, problem)
    if violations:
        raise UncheckedPlanError(tuple(str(violation) for violation in violations))
    return with_profile_errors(plan, problem)


def missed(plan: Plan, settings: Settings) -> list[str]:
    """What ``--strict`` asks for and the plan does not reach."""
    result, found = plan.result, []
    if result.gap == float("inf"):
        found.append("the search stopped before it had a bound, so that no gap is proven")
    elif result.gap > settings.gap_target + 1e-9:
        found.append(f"the gap is {result.gap:.3%}, asked for {settings.gap_target:.3%}")
    demand = plan.objective.demand_rps
    if plan.objective.maximises and demand is not None and result.value < demand * (1 - 1e-9):
        found.append(f"the plan serves {result.value:.4g} requests/s, {demand:.4g} are demanded")
    simulated = verification_of(plan)
    if simulated is not None and not simulated.kept:
        found.append(f"simulated at {simulated.rate_rps:.4g} requests/s: {', '.join(misses(simulated, plan))}")
    return found


def inputs_of_plan(loaded: LoadedInputs, settings: Settings, problem: PlacementProblem) -> dict[str, Any]:
    """What ``plan.inputs`` holds of a plan made so."""
    return {
        "versions": installed_versions(),
        "roles": [role.value for role in problem.family.roles],
        **({"engine": asdict(settings.engine)} if settings.engine is not None else {}),
        **({"will": [str(wish) for wish in problem.will]} if problem.will else {}),
        "seed": settings.seed,
        "threads": settings.threads,
        "gap_target": settings.gap_target,
        "time_limit_s": settings.time_limit_s,
        "origins": dict(loaded.origins),
        "digests": loaded.inputs.digests(),
        "documents": loaded.inputs.documents(),
    }
