"""GPUs shared among tenants: a fleet with a plan for each model, and fair shares of GPU types."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hetis.formats import catalogue
from hetis.formats.documents import load_model, load_workload
from hetis.formats.errors import DocumentError, Problem, attempt, single_problem
from hetis.formats.fields import read_data
from hetis.formats.positions import Text
from hetis.formats.tenants import FleetTenantPart, ShareInputs, parse_tenants
from hetis.planner.use_cases.climbing import Carriers, climb
from hetis.planner.use_cases.describing import describe
from hetis.planner.use_cases.place import search
from hetis.planner.use_cases.placement_settings import PlacementSettings
from hetis.planner.use_cases.precision import for_engine
from hetis.planner.use_cases.request import objective
from hetis.planner.use_cases.sources import LoadedInputs, engine_rules, family_of, load_inputs
from hetis.profiler.defaults import default_profile
from hetis.solver.budget import Budget, Progress, Report, one_of_several
from hetis.solver.cluster import Cluster, GpuSlots, Link, Network, NodeGroup
from hetis.solver.errors import InfeasibleError, InvalidProblemError, NoPlanFoundError, UncheckedPlanError
from hetis.solver.model import ModelSpec
from hetis.solver.placement.rungs import Known
from hetis.solver.plan import DEFAULT_STRATEGY, OTHER_TENANTS, Objective, ObjectiveKind, Plan
from hetis.solver.problem import PlacementProblem
from hetis.solver.shares.fair_shares import solve_shares
from hetis.solver.shares.properties import Claim, Properties, Round, best_claim, next_round, properties_of
from hetis.solver.shares.share_problem import FairnessRule, GpuShare, ShareJob, ShareProblem, Shares, ShareTenant
from hetis.solver.tenants.fleet_search import FleetSearch
from hetis.solver.tenants.tenancy import EnvyCell, FleetShares, Tenancy, Tenant, TenantRule
from hetis.solver.workload import Workload

TO_CLIMB = 0.25  # share of the time for choosing the tenants' rungs

# --- a fleet: from files to a checked plan for each tenant


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedTenants:
    """The tenants in a file with their cluster, and the inputs of each tenant in the file's order.

    ``asked``: each tenant's objective as requested, of which limits that do not apply to its requests are not in its
    problem's.
    """

    tenancy: Tenancy
    inputs: tuple[LoadedInputs, ...]
    asked: tuple[Objective, ...]
    rungs: tuple[str, ...] = ()  # of each tenant's plans; empty: not chosen yet


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedFleet:
    """The fleet shared by the requested rule, and by other rules for comparison."""

    tenancy: Tenancy  # the tenants, with the families that were searched
    answers: tuple[FleetShares, ...]  # for the requested rule, then for the other rules that finished in time
    # Envy under the first answer, by tenant and other tenant; None if not requested or if no time was left
    envy: tuple[tuple[EnvyCell, ...], ...] | None


def load_tenancy(
    file: str, *, cluster: str, settings: PlacementSettings, profiles: Sequence[str] = ()
) -> LoadedTenants:  # fmt: skip
    """Read the tenants and everything they name; plans are for the engine of the settings.

    Raises:
        DocumentError: contains the problems of all inputs.
        InvalidProblemError: the tenants cannot share this fleet.
    """
    if cluster == "-":
        raise single_problem(cluster, "the cluster is read once per tenant: give a file, not standard input")
    data, source = read_data(file)
    given = parse_tenants(data, source).tenants
    problems: list[Problem] = []
    found: list[LoadedInputs] = []
    for index, tenant in enumerate(given):
        try:
            loaded = load_inputs(cluster=cluster, model=tenant.model, workload=tenant.workload, profiles=profiles)
            found.append(for_engine(loaded, settings.engine))
        except DocumentError as error:
            problems += [_in_file(problem, index, tenant, source) for problem in error.problems]
    if problems:
        raise DocumentError(list(dict.fromkeys(problems)))
    asked = tuple(
        objective(ObjectiveKind(one.objective), ttft_s=one.ttft, tpot_s=one.tpot, demand_rps=None) for one in given
    )
    problems_of = (settings.problem(loaded.inputs, goal) for loaded, goal in zip(found, asked, strict=True))
    tenants = tuple(
        Tenant(name=one.name, problem=problem, weight=one.weight, worth=one.worth)
        for one, problem in zip(given, problems_of, strict=True)
    )
    return LoadedTenants(tenancy=Tenancy(tenants=tenants), inputs=tuple(found), asked=asked)


def _in_file(problem: Problem, index: int, tenant: FleetTenantPart, source: Text) -> Problem:
    """Return a problem with a tenant's name or path at the line that contains it, and any other problem unchanged."""
    for field, given in (("model", tenant.model), ("workload", tenant.workload)):
        if problem.line is None and problem.file in (field, given):  # an unknown name, or a missing file
            message = problem.message if problem.file == field else str(problem)
            return source.problem(("tenants", index, field), f"tenant {tenant.name}: {message}")
    return problem


def on_rungs(
    loaded: LoadedTenants, settings: PlacementSettings, *, budget: Budget, report: Report, carriers: Carriers | None
) -> LoadedTenants:
    """Return the tenants with their plans on the rung that each is worth with the whole fleet to itself.

    A tenant without a plan there may have any.
    """
    tenants, rungs = list[Tenant](), list[str]()
    for number, tenant in enumerate(loaded.tenancy.tenants):
        told = one_of_several(report, number + 1, len(loaded.inputs), f"{tenant.name} alone: ")

        def find(posed: PlacementProblem, own: Budget, known: Known | None, told: Report = told) -> Plan:
            return search(posed, settings, budget=own, report=told, known=known)

        own = budget.share(TO_CLIMB / (len(loaded.inputs) - number), explains=False)
        try:
            made = climb(find, own, tenant.problem, settings.strategy, settings.climbing(carriers))
        except (InfeasibleError, NoPlanFoundError):
            tenants.append(tenant)
            rungs.append("")
            continue
        tenants.append(replace(tenant, problem=made.problem))
        rungs.append(made.rung)
    return replace(loaded, tenancy=Tenancy(tenants=tuple(tenants)), rungs=tuple(rungs))


def share_out_fleet(
    loaded: LoadedTenants, rules: Sequence[TenantRule], settings: PlacementSettings, *, with_envy: bool, budget: Budget,
    report: Report, carriers: Carriers | None = None,
) -> SharedFleet:  # fmt: skip
    """Share the fleet by the first rule, and by the others while there is time; every answer has passed the checker.

    Plans are on the rung that each tenant is worth (`on_rungs`).

    Raises:
        InfeasibleError: a tenant cannot be served on this fleet at all.
        NoPlanFoundError: the search stopped before there were shares by the first rule.
        UncheckedPlanError: an answer fails the independent checker.
    """
    loaded = on_rungs(loaded, settings, budget=budget, report=report, carriers=carriers)
    number, count = 1, len(rules) + with_envy

    def told(progress: Progress) -> None:
        one_of_several(report, number, count)(progress)

    search = FleetSearch(
        loaded.tenancy, strategy=settings.strategy, budget=budget, gap_target=settings.gap_target, seed=settings.seed,
        report=told,
    )  # fmt: skip
    first, *others = rules
    answers = [_finished(search, loaded, first, settings, told)]
    for rule in others:
        if budget.is_spent():
            break
        number += 1
        try:
            answers.append(_finished(search, loaded, rule, settings, told))
        except NoPlanFoundError:
            break  # the time is up; the answers so far suffice
    number = count
    envy = search.envy(answers[0]) if with_envy and not budget.is_spent() else None
    return SharedFleet(tenancy=search.tenancy, answers=tuple(answers), envy=envy)


def _finished(
    search: FleetSearch, loaded: LoadedTenants, rule: TenantRule, settings: PlacementSettings, report: Report
) -> FleetShares:
    """Return the checked answer for one rule, with completed plans."""
    from hetis.solver.tenants.share_check import check_fleet_shares

    report(Progress(phase=f"rule {rule}", elapsed_s=search.budget.elapsed_s()))
    answer = search.share(rule)
    held = {share.name: list(share.plan.devices()) if share.plan else [] for share in answer.shares}
    shares = []
    each = zip(answer.shares, search.tenants, loaded.inputs, loaded.asked, loaded.rungs, strict=True)
    for share, tenant, inputs, asked, rung in each:
        plan = share.plan
        if plan is not None:
            others = " and ".join(other.name for other in search.tenants if other.name != tenant.name)
            shared = () if not others else (
                f"tenant {tenant.name} shares the fleet with {others} by the rule {rule}; the bound is what it could "
                "serve with the whole fleet to itself",
            )  # fmt: skip
            of_others = {name: own for name, own in held.items() if name != tenant.name}
            held_by = {OTHER_TENANTS: of_others} if of_others else {}
            plan = replace(plan, inputs=held_by, notes=(*plan.notes, *shared))
            plan = describe(plan, inputs, tenant.problem, settings, asked, rung=rung)
        shares.append(replace(share, plan=plan))
    answer = replace(answer, shares=tuple(shares))
    if wrong := check_fleet_shares(search.tenancy, answer):
        raise UncheckedPlanError(wrong)
    return answer


# --- GPU types: shares from a ShareProblem file; missing speed-ups are derived from our own placements


NETWORK = Link(bytes_per_s=12.5e9, latency_s=20e-6)  # 100 Gbps between nodes, for deriving speed-ups
GAP = 0.005  # relative gap of the placements from which speed-ups are derived


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """Shares under each requested rule, and their properties; under fewer rules if the work was stopped."""

    problem: ShareProblem
    shares: tuple[Shares, ...]  # by the first rule, by those that finished, and the equal split
    properties: tuple[Properties, ...]
    derived: tuple[str, ...]  # jobs (``tenant/job``) whose speed-ups come from our placements
    rounds: tuple[Round, ...]  # whole GPUs under the first rule, round by round
    # The most profitable false claims of the first claimants, of all unless stopped, by the first rule: inflated,
    # deflated
    claims: tuple[tuple[Claim, Claim], ...]


def share_out(
    inputs: ShareInputs, rules: tuple[FairnessRule, ...], *, budget: Budget, tell: Callable[[str], None],
    rounds: int = 0, claims: int = 0,
) -> Sharing:  # fmt: skip
    """Share the GPUs under every rule and check the answers.

    For the first rule, also return ``rounds`` rounds of whole GPUs, and the best of ``claims`` false claims for each
    claimant. Once the budget is spent, further rules, rounds and claims are left out.

    Raises:
        DocumentError: a model, workload or GPU type from which speed-ups are derived is unknown.
        InvalidProblemError: a model runs on none of the GPU types.
        NoPlanFoundError: the budget was spent before all speed-ups were derived.
    """
    problem, derived = share_problem(inputs, budget=budget, tell=tell)
    needed = (rules[0], FairnessRule.EQUAL)  # the equal split, to which shares are compared, takes no search
    shares = tuple(solve_shares(problem, rule) for rule in rules if rule in needed or not budget.is_spent())
    _require_checked(problem, shares)
    return Sharing(
        problem=problem,
        shares=shares,
        properties=tuple(properties_of(problem, answer.amounts) for answer in shares),
        derived=derived,
        rounds=_rounds(problem, shares[0], rounds, budget),
        claims=_claims(problem, rules[0], claims, budget, tell),
    )


def _rounds(problem: ShareProblem, shares: Shares, count: int, budget: Budget) -> tuple[Round, ...]:
    found, owed = list[Round](), np.zeros_like(shares.amounts)
    while len(found) < count and not budget.is_spent():
        found.append(next_round(problem, shares.amounts, owed))
        owed = found[-1].owed
    return tuple(found)


def _claims(
    problem: ShareProblem, rule: FairnessRule, tries: int, budget: Budget, tell: Callable[[str], None]
) -> tuple[tuple[Claim, Claim], ...]:
    if tries == 0 or budget.is_spent():
        return ()
    tell(f"trying {tries} false claims of every job, up and down")
    return tuple(
        (
            best_claim(problem, rule, claimant, inflate=True, tries=tries),
            best_claim(problem, rule, claimant, inflate=False, tries=tries),
        )
        for claimant in range(len(problem.weights))
        if not budget.is_spent()
    )


def share_problem(
    inputs: ShareInputs, *, budget: Budget, tell: Callable[[str], None]
) -> tuple[ShareProblem, tuple[str, ...]]:
    """Return the problem of a file, and the names of the jobs whose speed-ups were derived.

    Raises NoPlanFoundError if the budget was spent before all of them were.
    """
    work = _models_and_workloads(inputs)
    known: dict[tuple[str, str], Mapping[str, float]] = {}  # jobs with the same work share one derivation
    derived = []
    tenants = []
    for tenant in inputs.tenants:
        jobs = []
        for job in tenant.jobs:
            speedups: Mapping[str, float] | None = job.speedups
            if job.model is not None and job.workload is not None:
                name = f"{tenant.name}/{job.name}"
                pair = (job.model, job.workload)
                if pair not in known:
                    tell(f"speed-ups of {name} from placements on each GPU type")
                    known[pair] = _derived_speedups(inputs, *work[pair], budget=budget)
                speedups = known[pair]
                derived.append(name)
            assert speedups is not None, "a file must give speed-ups, or a model and its workload"
            jobs.append(
                ShareJob(name=job.name, speedups=tuple(speedups[gpu] for gpu in inputs.gpus), min_gpus=job.min_gpus)
            )
        tenants.append(ShareTenant(name=tenant.name, weight=tenant.weight, jobs=tuple(jobs)))
    gpus = tuple(GpuShare(gpu=gpu, count=count) for gpu, count in inputs.gpus.items())
    return ShareProblem(gpus=gpus, tenants=tuple(tenants)), tuple(derived)


def _models_and_workloads(inputs: ShareInputs) -> Mapping[tuple[str, str], tuple[ModelSpec, Workload]]:
    """Return the models and workloads for deriving speed-ups, by their names in the file, or report all errors."""
    problems: list[Problem] = []
    found = {}
    asked = dict.fromkeys(
        (job.model, job.workload)
        for tenant in inputs.tenants
        for job in tenant.jobs
        if job.model is not None and job.workload is not None
    )
    for model, workload in asked:
        spec = attempt(lambda name=model: load_model(name), problems)  # type: ignore[misc]
        traffic = attempt(lambda name=workload: load_workload(name), problems)  # type: ignore[misc]
        if spec is not None and traffic is not None:
            found[model, workload] = (spec, traffic)
    if asked:
        for gpu in inputs.gpus:
            try:
                catalogue.find_gpu(gpu)
            except catalogue.UnknownNameError as error:
                problems.append(Problem(file="gpus", message=f"{error}; speed-ups can be derived for known types only"))
    if problems:
        raise DocumentError(problems)
    return found


def _derived_speedups(
    inputs: ShareInputs, model: ModelSpec, workload: Workload, *, budget: Budget
) -> Mapping[str, float]:
    """Return the goodput per GPU of the best placement on all GPUs of each type alone; 0 if the model does not fit.

    Raises NoPlanFoundError if the budget was spent before all of them were found.
    """
    from hetis.solver.planning import solve_placement

    rates = {}
    for name, count in inputs.gpus.items():
        try:
            fleet = _one_type(name, count, inputs.gpus_per_node, model, workload)
            plan = solve_placement(fleet, budget=budget, gap_target=GAP)
            if budget.is_spent():  # a placement that was cut short says nothing about the GPU type
                raise NoPlanFoundError(f"stopped while the speed-ups of {model.name} were derived from placements")
            rates[name] = plan.result.value / count
        except InfeasibleError:
            rates[name] = 0.0
    if not any(rates.values()):
        raise InvalidProblemError(
            f"{model.name} with {workload.name} cannot be served on any of {', '.join(rates)} alone"
        )
    return rates


def _one_type(name: str, count: int, per_node: int, model: ModelSpec, workload: Workload) -> PlacementProblem:
    gpu = catalogue.find_gpu(name).gpu
    size = min(count, per_node)
    groups = [NodeGroup(name="full", count=count // size, gpus=(GpuSlots(gpu=gpu.name, count=size),))]
    if count % size:
        groups.append(NodeGroup(name="rest", count=1, gpus=(GpuSlots(gpu=gpu.name, count=count % size),)))
    return PlacementProblem(
        cluster=Cluster(
            name=name, node_groups=tuple(groups), gpu_types={gpu.name: gpu}, network=Network(default=NETWORK)
        ),
        model=model,
        workload=workload.clipped_to(model.max_position),
        profiles={gpu.name: default_profile(gpu)[1]},
        objective=Objective(kind=ObjectiveKind.GOODPUT),
        family=family_of(DEFAULT_STRATEGY, engine=engine_rules(None, DEFAULT_STRATEGY)),
    )


def _require_checked(problem: ShareProblem, shares: tuple[Shares, ...]) -> None:
    """Raise `UncheckedPlanError` if the independent checker finds an error."""
    from hetis.solver.shares.shares_check import check_shares

    found = tuple(f"{answer.rule}: {sentence}" for answer in shares for sentence in check_shares(problem, answer))
    if found:
        raise UncheckedPlanError(found)
