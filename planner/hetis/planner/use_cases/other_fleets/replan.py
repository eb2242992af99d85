"""Re-planning: from a plan file and a new fleet to a checked plan, what it keeps of the old one, and the transition."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from hetis.formats.documents import load_cluster, load_model, load_workload
from hetis.formats.errors import DocumentError, Problem, attempt, single_problem
from hetis.formats.traces import PrefixHitRate
from hetis.formats.workload import with_prefix_hits
from hetis.planner.use_cases.describing import describe
from hetis.planner.use_cases.other_fleets.what_if import with_cluster
from hetis.planner.use_cases.place import with_service_level
from hetis.planner.use_cases.placement_settings import PlacementSettings
from hetis.planner.use_cases.precision import for_engine
from hetis.planner.use_cases.record.parts import MadeFrom, Requested, Verified
from hetis.planner.use_cases.robustness.profile_errors import with_profile_errors
from hetis.planner.use_cases.saved_plans import (
    PlanAndProblem,
    differing_fields,
    load_plan_and_problem,
    unconfirmed,
)
from hetis.planner.use_cases.sources import LoadedInputs, impossible_profiles, load_profiles, named, unused_profiles
from hetis.planner.use_cases.surviving import ENOUGH, left_without, with_losses
from hetis.planner.use_cases.verification.classes import NEEDS_ROUTER
from hetis.planner.use_cases.verification.outcome import NGINX, settings_of
from hetis.planner.use_cases.verification.rates import kept_plan, simulation_report
from hetis.solver.budget import Budget, Report
from hetis.solver.check import check_plan
from hetis.solver.cluster import Cluster, node_of
from hetis.solver.constraints import Constraints, misfits
from hetis.solver.errors import HetisError, UncheckedPlanError
from hetis.solver.model import ModelSpec
from hetis.solver.placement.rungs import RUNGS
from hetis.solver.plan import PLANNED_UTILISATION, Lanes, Objective, Plan, Role
from hetis.solver.problem import PlacementProblem
from hetis.solver.replanning.change import ChangeCosts, Fate, ReplanningProblem
from hetis.solver.replanning.replanner import Replanning, keeps, solve_replanning
from hetis.solver.replanning.replanning_check import check_replanning
from hetis.solver.workload import Workload

ON_ANY_NODES = "replicas may span any number of nodes: the GPUs that are free do not fit as few as were allowed"
SHARING_TRIES = 2  # searches for a plan whose replicas are as many as they are assumed to be
NOTE = "re-planned from a running plan; value and bound are those of the fleet, without the cost of the change"


@dataclass(frozen=True, slots=True, kw_only=True)
class PosedReplan:
    """A problem of re-planning. ``warnings`` point out oddities of the running plan.

    ``requested`` is the objective, of which limits that do not apply to the requests are not in the problem's.
    ``survived`` is the kind of place without any one of which the running plan had to serve its demand; empty: none.
    """

    running: Plan
    loaded: LoadedInputs
    problem: PlacementProblem
    requested: Objective
    survived: str
    settings: PlacementSettings
    warnings: tuple[str, ...]


def _of_another_model(planned: ModelSpec, requested: ModelSpec) -> str:
    """Return why a plan is not one of the requested model, which may have the same name."""
    if planned.name != requested.name:
        return f"is a plan of {planned.name}, not of {requested.name} as --model says"
    others = ", ".join(differing_fields(planned, requested))
    return f"is a plan of {planned.name} with other {others} than --model says; without --model it is kept"


def load_replanning(
    *, running: str, cluster: str, workload: str | None, model: str | None, profiles: Sequence[str],
    rate_rps: float | None, settings: PlacementSettings, prefix_hit_rate: PrefixHitRate | None = None,
) -> PosedReplan:  # fmt: skip
    """Read the running plan and the new fleet.

    The model, objective, strategy and roles are the plan's, and so are profiles and traffic unless others are
    specified.

    Raises:
        DocumentError: contains the problems of all files, such as a profile of a GPU type that the fleet lacks; or the
            plan is for another model than ``model``.
        InvalidProblemError: a GPU type has no profile and none can be modelled.
    """
    problems: list[Problem] = []
    found = attempt(lambda: load_plan_and_problem(running), problems)
    fleet = attempt(lambda: load_cluster(cluster), problems)
    traffic = None
    if workload is not None:
        traffic = attempt(lambda: load_workload(workload, prefix_hit_rate=prefix_hit_rate), problems)
    spec = attempt(lambda: load_model(model), problems) if model is not None else None
    given = load_profiles(profiles, problems)
    if fleet is not None:
        problems += unused_profiles(given, fleet)
        problems += impossible_profiles(given, fleet.gpu_types)
    if problems or found is None or fleet is None:
        raise DocumentError(problems)
    inputs = found.inputs
    if spec is not None and spec != inputs.model:
        raise single_problem(running, _of_another_model(inputs.model, spec))
    origins = dict(MadeFrom.of(found.plan).origins)
    loaded = with_cluster(
        LoadedInputs(
            inputs=replace(
                inputs,
                workload=traffic if traffic is not None else with_prefix_hits(inputs.workload, prefix_hit_rate),
                profiles={**inputs.profiles, **{gpu: profile for gpu, (_, profile) in given.items()}},
            ),
            origins=_origins(origins, workload, {gpu: path for gpu, (path, _) in given.items()}),
        ),
        fleet,
        cluster,
    )
    objective = Requested.of(found.plan).objective(found.plan.objective, running)
    if rate_rps is not None:
        objective = replace(objective, demand_rps=rate_rps)
    posed = pose_replanning(found, loaded, objective, settings)
    return replace(posed, warnings=(*found.warnings, *unconfirmed(found, running), *posed.warnings))


def pose_replanning(
    found: PlanAndProblem, loaded: LoadedInputs, objective: Objective, settings: PlacementSettings
) -> PosedReplan:
    """Return the problem of re-planning from a running plan, with other inputs or another objective than it has.

    Strategy and roles are the plan's; so are engine and rung, unless ``settings`` have a rung, and the classes of its
    pools, if it has any, unless the workload has others.

    Raises:
        InvalidProblemError: the inputs contradict each other.
    """
    family = found.problem.family
    engine, rung = family.engine, settings.rung or Requested.of(found.plan).rung
    if engine is not None:  # another rung has no more of the running plan's limit on nodes
        engine = named(replace(engine, max_nodes=None) if settings.rung else engine, engine.name)
    roles = family.roles if not settings.rung else ()
    settings = replace(settings, strategy=found.plan.strategy, roles=roles, engine=engine, rung=rung)
    loaded = for_engine(loaded, engine)
    warnings = [*_nothing_in_common(found.plan, loaded.inputs.cluster)]
    posed = loaded.inputs.problem(objective, settings.strategy, settings.roles, settings.engine)
    kept, ignored, absent = _constraints(posed)
    dropped = [f"re-planning does not support {each}" for each in ignored]
    dropped += [f"{each} refers to something that the fleet lacks, and is not kept for later" for each in absent]
    survived = Requested.of(found.plan).survive
    if survived:
        dropped.append(
            f"re-planning does not support --survive {survived}: the next plan serves {objective.demand_rps:.4g} "
            f"requests/s with all {survived}s"
        )
    workload, empty = _in_classes(found, loaded.inputs.workload)
    if empty:
        dropped.append(f"class {empty} has no requests in {workload.name}: the next plan has no pools of classes")
    inputs = replace(loaded.inputs, constraints=kept, workload=workload)
    loaded = replace(loaded, inputs=inputs, notes=(*loaded.notes, *dropped))
    deepest = max((len(replica.stages) for replica in found.plan.replicas), default=1)
    problem = settings.problem(inputs, objective, least_stages=deepest)
    if found.plan.classes and workload.classes:
        of_classes = replace(problem.workload, classes=workload.classes)
        problem = replace(problem, workload=of_classes, objective=inputs.applicable_limits(objective))
    if rung:
        problem = replace(problem, family=RUNGS[rung].restrict(problem.family, settings.strategy))
    warnings += dropped
    problem = problem.at(min(PLANNED_UTILISATION, found.plan.result.utilisation or PLANNED_UTILISATION))
    return PosedReplan(
        running=found.plan, loaded=loaded, problem=problem, requested=objective, survived=survived, settings=settings,
        warnings=tuple(warnings),
    )  # fmt: skip


def _in_classes(found: PlanAndProblem, workload: Workload) -> tuple[Workload, str]:
    """Return the traffic in the classes of a plan's pools, and the first of them without requests, if any."""
    if not found.plan.classes or workload.classes:
        return workload, ""
    cut = replace(workload, classes=found.inputs.workload.classes)
    empty = next((name for name, share in cut.shares.items() if not share), "")
    return (workload if empty else cut), empty


@dataclass(frozen=True, slots=True, kw_only=True)
class Survival:
    """The loss that the running plan had to survive, and what the next plan serves then."""

    place: str  # ``node`` or ``zone``, any one of which may be lost
    demand_rps: float
    left_rps: float  # planned requests/s that remain without the worst one

    @property
    def survives(self) -> bool:
        return self.left_rps >= self.demand_rps * ENOUGH

    def __str__(self) -> str:
        served = f"{min(self.left_rps, self.demand_rps):.4g} of {self.demand_rps:.4g} requests/s"
        return f"{served} are served when any one {self.place} is lost"


def survival_of(plan: Plan, posed: PosedReplan) -> Survival | None:
    """Return whether a plan survives what the running plan had to survive; None if that was nothing."""
    if not posed.survived:
        return None
    left_rps = left_without(plan, posed.problem, posed.survived)
    return Survival(place=posed.survived, demand_rps=posed.requested.demand_rps or 0.0, left_rps=left_rps)


def too_wide(plan: Plan, problem: PlacementProblem) -> bool:
    """Return whether a replica is on more nodes than its engine's rules allow."""
    most = None if problem.family.engine is None else problem.family.engine.max_nodes
    nodes = (len({node_of(device) for device in replica.devices()}) for replica in plan.replicas)
    return most is not None and max(nodes, default=0) > most


def on_any_nodes(problem: PlacementProblem) -> PlacementProblem:
    """Return the problem with replicas on any number of nodes."""
    engine = problem.family.engine
    assert engine is not None, "it limits nodes"
    return replace(problem, family=replace(problem.family, engine=replace(engine, max_nodes=None)))


def _with_kept_settings(plan: Plan, found: Replanning, running: Plan) -> Plan:
    """Return the plan in which replicas that do not stop may run as many requests at once as before."""
    replicas = tuple(
        replace(replica, max_num_seqs=running.replicas[continued.old].max_num_seqs)
        if continued.fate is Fate.KEPT and continued.old is not None
        else replica
        for replica, continued in zip(plan.replicas, found.continued, strict=True)
    )
    return replace(plan, replicas=replicas)


def _constraints(problem: PlacementProblem) -> tuple[Constraints, Constraints, Constraints]:
    """Return the constraints that re-planning keeps, those that it ignores, and those on what the fleet lacks."""
    cluster, tp_sizes = problem.cluster, problem.family.tp_sizes
    absent = tuple(each for each in problem.constraints if any(misfits((each,), cluster, tp_sizes)))
    others = [each for each in problem.constraints if each not in absent]
    kept = tuple(each for each in others if keeps(replace(problem, constraints=(each,))))
    return kept, tuple(each for each in others if each not in kept), absent


def _nothing_in_common(running: Plan, fleet: Cluster) -> Iterator[str]:
    """Yield a warning if no GPU of the running plan is left, most likely because nodes were renamed."""
    used = {(device, part.gpu) for one in running.replicas for part in one.parts() for device in part.devices}
    if used and not any((device.name, device.gpu) in used for device in fleet.devices()):
        yield (
            f"none of the {len(used)} GPUs of the running plan, such as {min(used)[0]}, is in cluster {fleet.name}:"
            " every replica starts from scratch (GPUs match by node name, number and type)"
        )


def _origins(saved: dict[str, object], workload: str | None, profiles: dict[str, str]) -> dict[str, object]:
    before = saved.get("profiles")
    others = before if isinstance(before, dict) else {}
    return {**saved, "profiles": {**others, **profiles}, **({} if workload is None else {"workload": workload})}


def _sharing_prompts(
    question: ReplanningProblem, found: Replanning, solve: Callable[[ReplanningProblem], Replanning], budget: Budget
) -> tuple[ReplanningProblem, Replanning]:
    """Return a better answer, with its question, in which all replicas of a pool share prompts, or what was found.

    Replicas that each wait alone may need settings for their limit on TTFT with which those that run serve less.
    """
    running, problem = question.running, question.problem
    kept = sum(continued.fate is Fate.KEPT for continued in found.continued)
    if kept + len(found.lost) == len(running.replicas) or not any(problem.limits_of_classes().values()):
        return question, found
    lanes, sign = _lanes_of_all(running, found.lost), 1.0 if problem.objective.maximises else -1.0
    for _ in range(SHARING_TRIES):
        if budget.is_spent():
            break
        shared = replace(question, problem=problem.at(problem.assumptions.planned_utilisation, lanes))
        try:
            again = solve(shared)
        except HetisError:
            break
        if _lanes_of_all(again.plan) == lanes:
            is_better = sign * again.value > sign * found.value and not too_wide(again.plan, problem)
            return (shared, again) if is_better else (question, found)
        lanes = _lanes_of_all(again.plan)
    return question, found


def _lanes_of_all(plan: Plan, without: Collection[int] = ()) -> Lanes:
    """Return the lanes of a plan all of whose replicas but some share prompts."""
    replicas = tuple(one for number, one in enumerate(plan.replicas) if number not in without)
    of_role = Counter(one.role for one in replicas)
    unified, prefill = (max(1, of_role[role]) for role in (Role.UNIFIED, Role.PREFILL))
    result = replace(plan.result, unified_lanes=unified, prefill_lanes=prefill, prefill_load=1.0)
    return replace(plan, replicas=replicas, result=result).lanes()


def replan(
    posed: PosedReplan,
    costs: ChangeCosts,
    max_moves: int | None,
    *,
    verify: bool = True,
    budget: Budget,
    report: Report,
) -> Replanning:
    """Solve, complete the plan with its inputs and notes, check the plan and the change, and simulate the plan.

    It is held to the running plan's service level. If it misses a limit, that is reported, and not searched again.

    Raises:
        InfeasibleError: no plan exists, or none within ``max_moves``.
        NoPlanFoundError: the search stopped before a plan was found.
        UncheckedPlanError: the plan or the change fails its checks.
    """
    settings = posed.settings
    question = ReplanningProblem(running=posed.running, problem=posed.problem, costs=costs, max_moves=max_moves)

    solve = partial(
        solve_replanning, strategy=settings.strategy, budget=budget, gap_target=settings.gap_target,
        seed=settings.seed, report=report,
    )  # fmt: skip
    found = solve(question)
    if too_wide(found.plan, posed.problem):  # the search counts the fewest nodes on which a replica's GPUs fit
        posed = replace(posed, problem=on_any_nodes(posed.problem), settings=replace(settings, rung=""))
        question = replace(question, problem=posed.problem)
        found = solve(question)
        found = replace(found, plan=replace(found.plan, notes=(*found.plan.notes, ON_ANY_NODES)))
    else:
        question, found = _sharing_prompts(question, found, solve, budget)
    notes = (*found.plan.notes, NOTE, *((NEEDS_ROUTER,) if any(one.classes for one in found.plan.replicas) else ()))
    plan = _with_kept_settings(replace(found.plan, notes=notes), found, posed.running)
    plan = describe(plan, posed.loaded, posed.problem, settings, posed.requested, rung=posed.settings.rung)
    plan = with_service_level(plan, Requested.of(posed.running).service_level)
    if (survival := survival_of(plan, posed)) is not None:
        plan = replace(with_losses(plan, posed.problem), notes=(*plan.notes, str(survival)))
    found = replace(found, plan=plan)
    violations = [str(violation) for violation in check_plan(plan, posed.problem)]
    violations += check_replanning(question, found)
    if violations:
        raise UncheckedPlanError(tuple(violations))
    plan = with_profile_errors(plan, posed.problem)
    if verify:
        reporter = simulation_report(plan, report)
        unlimited = Budget(cancelled=budget.cancelled)
        before = Verified.of(posed.running).verification
        router = NGINX if before is None else settings_of(before).router  # it stays in front
        plan = kept_plan(plan, posed.problem, seed=settings.seed, budget=unlimited, report=reporter, router=router)
    return replace(found, plan=plan)
