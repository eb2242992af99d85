"""A fleet shared by tenants with different models: from files to a checked plan for each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

from hetis.formats.errors import DocumentError, Problem, single_problem
from hetis.formats.fields import read_data
from hetis.formats.positions import Text
from hetis.formats.tenants import FleetTenant, parse_tenants
from hetis.planner.use_cases.errors import UncheckedPlanError
from hetis.planner.use_cases.place import KV_IS_FOR_ENGINES, Settings, inputs_of_plan, objective
from hetis.planner.use_cases.robustness.notes import profile_notes
from hetis.planner.use_cases.sources import LoadedInputs, load_inputs
from hetis.solver.budget import Budget, Progress, Report, one_of_several
from hetis.solver.errors import NoPlanFoundError
from hetis.solver.plan import ObjectiveKind
from hetis.solver.tenants.problem import EnvyCell, FleetShares, Tenancy, Tenant, TenantRule
from hetis.solver.tenants.solve import FleetSearch


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedTenants:
    """The tenants of a file on a cluster, and the inputs of each, in the file's order."""

    tenancy: Tenancy
    inputs: tuple[LoadedInputs, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedFleet:
    """The fleet shared by the requested rule, and by others for comparison.

    Attributes:
        tenancy: the tenants with the families that were searched.
        answers: for the requested rule, then for the others that finished in time.
        envy: of the first answer, tenant by tenant; None if not requested or if no time was left.
    """

    tenancy: Tenancy
    answers: tuple[FleetShares, ...]
    envy: tuple[tuple[EnvyCell, ...], ...] | None


def load_tenancy(file: str, *, cluster: str, profiles: Sequence[str] = (), strategy: str = "hetis") -> LoadedTenants:
    """Read the tenants and everything they name.

    Raises:
        DocumentError: with the problems of all inputs together.
        InvalidProblemError: the tenants cannot share this fleet.
    """
    if cluster == "-":
        raise single_problem(cluster, "every tenant's problem is posed on the cluster: give a file, not standard input")
    data, source = read_data(file)
    given = parse_tenants(data, source).tenants
    problems: list[Problem] = []
    found: list[LoadedInputs] = []
    for index, tenant in enumerate(given):
        try:
            found.append(_load(tenant, cluster, profiles))
        except DocumentError as error:
            problems += [_in_file(problem, index, tenant, source) for problem in error.problems]
    if problems:
        raise DocumentError(list(dict.fromkeys(problems)))
    tenancy = Tenancy(
        tenants=tuple(_tenant(tenant, one, strategy) for tenant, one in zip(given, found, strict=True))
    )  # fmt: skip
    return LoadedTenants(tenancy=tenancy, inputs=tuple(found))


def _load(tenant: FleetTenant, cluster: str, profiles: Sequence[str]) -> LoadedInputs:
    return load_inputs(cluster=cluster, model=tenant.model, workload=tenant.workload, profiles=profiles)


def _in_file(problem: Problem, index: int, tenant: FleetTenant, source: Text) -> Problem:
    """Return a problem with a name or path of a tenant at the line that contains it; other problems unchanged."""
    for field, given in (("model", tenant.model), ("workload", tenant.workload)):
        if problem.line is None and problem.file in (field, given):  # an unknown name, or a missing file
            message = problem.message if problem.file == field else str(problem)
            return source.problem(("tenants", index, field), f"tenant {tenant.name}: {message}")
    return problem


def _tenant(tenant: FleetTenant, loaded: LoadedInputs, strategy: str) -> Tenant:
    goal = objective(
        ObjectiveKind(tenant.objective), ttft_s=tenant.ttft_s, tpot_s=tenant.tpot_s, demand_rps=None
    )  # fmt: skip
    problem = loaded.inputs.problem(goal, strategy)
    return Tenant(name=tenant.name, problem=problem, weight=tenant.weight, worth=tenant.worth)


def share_out_fleet(
    loaded: LoadedTenants, rules: Sequence[TenantRule], settings: Settings, *, with_envy: bool, budget: Budget,
    report: Report,
) -> SharedFleet:  # fmt: skip
    """Share the fleet by the first rule, and by the others while there is time; every answer has passed the checker.

    Raises:
        InfeasibleError: a tenant cannot be served on this fleet at all.
        NoPlanFoundError: stopped before there were shares by the first rule.
        UncheckedPlanError: an answer fails the independent checker.
    """
    number, count = 1, len(rules) + with_envy

    def told(progress: Progress) -> None:
        one_of_several(report, number, count)(progress)

    search = FleetSearch(
        loaded.tenancy, strategy=settings.strategy, budget=budget, gap_target=settings.gap_target, seed=settings.seed,
        threads=settings.threads, report=told,
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
    search: FleetSearch, loaded: LoadedTenants, rule: TenantRule, settings: Settings, report: Report
) -> FleetShares:
    """Return the checked answer by a rule, with completed plans."""
    from hetis.solver.tenants.check import check_fleet_shares

    report(Progress(phase=f"rule {rule}", elapsed_s=search.budget.elapsed_s()))
    answer = search.share(rule)
    shares = []
    for share, tenant, inputs in zip(answer.shares, search.tenants, loaded.inputs, strict=True):
        plan = share.plan
        if plan is not None:
            others = " and ".join(other.name for other in search.tenants if other.name != tenant.name)
            shared = () if not others else (
                f"tenant {tenant.name} shares the fleet with {others} by the rule {rule}; the bound is what it could "
                "serve with the whole fleet to itself",
            )  # fmt: skip
            routed = (KV_IS_FOR_ENGINES,) if plan.kv_routes else ()
            notes = tuple(chain(plan.notes, shared, routed, profile_notes(tenant.problem)))
            plan = replace(plan, inputs=inputs_of_plan(inputs, settings, tenant.problem), notes=notes)
        shares.append(replace(share, plan=plan))
    answer = replace(answer, shares=tuple(shares))
    wrong = check_fleet_shares(search.tenancy, answer)
    if wrong:
        raise UncheckedPlanError(wrong)
    return answer
