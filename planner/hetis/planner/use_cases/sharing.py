"""A fleet shared among tenants, with a checked plan for each model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hetis.formats.errors import DocumentError, Problem, single_problem
from hetis.formats.kinds import read_data
from hetis.formats.positions import Text
from hetis.formats.tenants import FleetTenantPart, parse_tenants
from hetis.planner.use_cases.climbing import Carriers, climb
from hetis.planner.use_cases.describing import describe
from hetis.planner.use_cases.place import search
from hetis.planner.use_cases.placement_settings import PlacementSettings
from hetis.planner.use_cases.precision import for_engine
from hetis.planner.use_cases.request import objective
from hetis.planner.use_cases.sources import LoadedInputs, load_inputs
from hetis.solver.budget import Budget, Progress, Report, one_of_several
from hetis.solver.errors import InfeasibleError, NoPlanFoundError, UncheckedPlanError
from hetis.solver.placement.rungs import Known
from hetis.solver.plan import OTHER_TENANTS, Objective, ObjectiveKind, Plan
from hetis.solver.problem import PlacementProblem
from hetis.solver.tenants.fleet_search import FleetSearch
from hetis.solver.tenants.oef import OefOutcome, oef_outcomes
from hetis.solver.tenants.tenancy import FleetShares, Tenancy, Tenant, TenantRule

TO_CLIMB = 0.25  # share of the time for choosing the tenants' rungs


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedTenants:
    """The tenants in a file with their cluster, and the inputs of each tenant in the file's order.

    ``requested``: the objective of each tenant, of which limits that do not apply to its requests are not in its
    problem's.
    """

    tenancy: Tenancy
    inputs: tuple[LoadedInputs, ...]
    requested: tuple[Objective, ...]
    rungs: tuple[str, ...] = ()  # of each tenant's plans; empty: not chosen yet


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedFleet:
    """The fleet shared by the requested rule, and by other rules for comparison."""

    tenancy: Tenancy  # the tenants, with the families that were searched
    answers: tuple[FleetShares, ...]  # for the requested rule, then for the other rules that finished in time
    oef: tuple[OefOutcome, ...] = ()  # OEF's shares, if requested


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
    requested = tuple(
        objective(ObjectiveKind(one.objective), ttft_s=one.ttft, tpot_s=one.tpot, demand_rps=None) for one in given
    )
    problems_of = (settings.problem(loaded.inputs, goal) for loaded, goal in zip(found, requested, strict=True))
    tenants = tuple(
        Tenant(name=one.name, problem=problem, weight=one.weight, worth=one.worth)
        for one, problem in zip(given, problems_of, strict=True)
    )
    return LoadedTenants(tenancy=Tenancy(tenants=tenants), inputs=tuple(found), requested=requested)


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
        reporter = one_of_several(report, number + 1, len(loaded.inputs), f"{tenant.name} alone: ")

        def find(posed: PlacementProblem, own: Budget, known: Known | None, reporter: Report = reporter) -> Plan:
            return search(posed, settings, budget=own, report=reporter, known=known)

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
    loaded: LoadedTenants, rules: Sequence[TenantRule], settings: PlacementSettings, *, budget: Budget, report: Report,
    carriers: Carriers | None = None, with_oef: bool = False,
) -> SharedFleet:  # fmt: skip
    """Share the fleet by the first rule, and by the others while there is time; every answer has passed the checker.

    Plans are on the rung that each tenant is worth (`on_rungs`).

    Raises:
        InfeasibleError: a tenant cannot be served on this fleet at all.
        NoPlanFoundError: the search stopped before there were shares by the first rule.
        UncheckedPlanError: an answer fails the independent checker.
    """
    loaded = on_rungs(loaded, settings, budget=budget, report=report, carriers=carriers)
    number, count = 1, len(rules)

    def reporter(progress: Progress) -> None:
        one_of_several(report, number, count)(progress)

    search = FleetSearch(
        loaded.tenancy, strategy=settings.strategy, budget=budget, gap_target=settings.gap_target, seed=settings.seed,
        report=reporter,
    )  # fmt: skip
    first, *others = rules
    answers = [_finished(search, loaded, first, settings, reporter)]
    for rule in others:
        if budget.is_spent():
            break
        number += 1
        try:
            answers.append(_finished(search, loaded, rule, settings, reporter))
        except NoPlanFoundError:
            break  # the time is up; the answers so far suffice
    oef = oef_outcomes(search) if with_oef and not budget.is_spent() else ()
    return SharedFleet(tenancy=search.tenancy, answers=tuple(answers), oef=oef)


def _finished(
    search: FleetSearch, loaded: LoadedTenants, rule: TenantRule, settings: PlacementSettings, report: Report
) -> FleetShares:
    """Return the checked answer for one rule, with completed plans."""
    from hetis.solver.tenants.share_check import check_fleet_shares

    report(Progress(phase=f"rule {rule}", elapsed_s=search.budget.elapsed_s()))
    answer = search.share(rule)
    held = {share.name: list(share.plan.devices()) if share.plan else [] for share in answer.shares}
    shares = []
    each = zip(answer.shares, search.tenants, loaded.inputs, loaded.requested, loaded.rungs, strict=True)
    for share, tenant, inputs, requested, rung in each:
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
            plan = describe(plan, inputs, tenant.problem, settings, requested, rung=rung)
        shares.append(replace(share, plan=plan))
    answer = replace(answer, shares=tuple(shares))
    if wrong := check_fleet_shares(search.tenancy, answer):
        raise UncheckedPlanError(wrong)
    return answer
