"""From a saved plan back to its problem, by the documents in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from hetis.formats.constraints import constraints_from_texts
from hetis.formats.documents import from_data, load_plan
from hetis.formats.errors import DocumentError, Problem, attempt, did_you_mean, single_problem
from hetis.planner.use_cases.record.parts import MadeFrom, Requested
from hetis.planner.use_cases.sources import Inputs, family_of
from hetis.solver.cluster import Cluster
from hetis.solver.constraints import Constraint, Constraints, Exclude, RestrictRole, WithoutWorkers, in_words
from hetis.solver.errors import InvalidProblemError
from hetis.solver.model import ModelSpec
from hetis.solver.plan import Plan, Role
from hetis.solver.problem import PlacementProblem
from hetis.solver.profile import Profile
from hetis.solver.workload import Workload

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanAndProblem:
    """A plan read from a file, and the problem that it claims to solve; ``warnings`` point out oddities."""

    plan: Plan
    inputs: Inputs  # those of the problem
    problem: PlacementProblem
    warnings: tuple[str, ...]


def load_plan_and_problem(path: str) -> PlanAndProblem:
    """Read a plan, and rebuild its problem from the documents saved in it.

    Raises:
        DocumentError: the plan, or a document in it, is not usable.
    """
    return problem_of_plan(load_plan(path), path)


def problem_of_plan(plan: Plan, name: str) -> PlanAndProblem:
    """Rebuild the problem of a plan from the documents saved in it; ``name`` is the plan's in messages.

    Raises:
        DocumentError: the plan, or a document in it, is not usable.
    """
    made_from, requested = MadeFrom.of(plan), Requested.checked(plan, name)
    inputs = inputs_from_documents(made_from.documents, name)
    _check_family(plan, requested, name)
    warnings = []
    if made_from.digests != inputs.digests():
        warnings.append("the inputs saved in the plan differ from those it was made from: their digests do not match")
    constraints = _constraints_of(plan, requested, inputs.cluster, name)
    inputs = replace(inputs, constraints=constraints, engine_settings=requested.engine_settings)
    try:
        roles, engine = requested.roles or (Role.UNIFIED,), requested.engine
        problem = inputs.problem(plan.objective, plan.strategy, roles, engine, with_classes=bool(plan.classes))
        problem = problem_of(plan, problem)
    except InvalidProblemError as error:
        raise single_problem(name, str(error)) from None
    return PlanAndProblem(plan=plan, inputs=inputs, problem=problem, warnings=tuple(warnings))


def problem_of(plan: Plan, problem: PlacementProblem) -> PlacementProblem:
    """Return the problem that a plan solves among others: with its objective, its engine's limits, and on its rung."""
    from hetis.solver.placement.rungs import RUNGS

    requested = Requested.of(plan)
    family = problem.family if requested.engine is None else replace(problem.family, engine=requested.engine)
    if requested.rung:
        family = RUNGS[requested.rung].restrict(family, plan.strategy)
    problem = replace(problem, objective=plan.objective, family=family)
    return problem.at(plan.result.utilisation, plan.lanes())


def unconfirmed(found: PlanAndProblem, name: str) -> Iterator[str]:
    """Yield a warning if the checker does not confirm a plan: it names the first violation, and how many others."""
    from hetis.solver.check import check_plan

    if violations := check_plan(found.plan, found.problem):
        rest = f", and {len(violations) - 1} more" if len(violations) > 1 else ""
        yield f"{name} does not pass `hetis-plan check`: {violations[0]}{rest}"


def inputs_from_documents(documents: Any, path: str) -> Inputs:
    """Return the inputs from which `Inputs.documents` made documents; ``path`` is the plan's name in messages.

    Raises:
        DocumentError: contains the problems of all documents.
    """
    names = ("cluster", "model", "workload", "profiles")
    if not isinstance(documents, dict) or not all(isinstance(documents.get(name), dict) for name in names):
        raise single_problem(path, f"inputs.documents must hold {', '.join(names)}: the plan is checked against them")
    problems: list[Problem] = []

    def read(kind: type[T], data: Any, where: str) -> T | None:
        name = f"{path}: inputs.documents.{where}"
        value = attempt(lambda: from_data(data, name=name), problems)
        if value is not None and not isinstance(value, kind):
            problems.append(Problem(file=name, message=f"is a {type(value).__name__}, expected a {kind.__name__}"))
            return None
        return value

    cluster = read(Cluster, documents["cluster"], "cluster")
    model = read(ModelSpec, documents["model"], "model")
    workload = read(Workload, documents["workload"], "workload")
    profiles = {gpu: read(Profile, data, f"profiles.{gpu}") for gpu, data in documents["profiles"].items()}
    if problems or cluster is None or model is None or workload is None:
        raise DocumentError(problems)
    known = {gpu: profile for gpu, profile in profiles.items() if profile is not None}
    return Inputs(cluster=cluster, model=model, workload=workload, profiles=known)


def differing_fields(one: ModelSpec, other: ModelSpec) -> list[str]:
    """Return the fields in which two models differ, which may have the same name."""
    given = (field.name for field in fields(ModelSpec) if field.init)
    return [name for name in given if getattr(one, name) != getattr(other, name)]


def _constraints_of(plan: Plan, requested: Requested, cluster: Cluster, path: str) -> Constraints:
    """Return the constraints that a plan claims to obey, if there are any."""
    try:
        found = constraints_from_texts(requested.constraints, cluster)
    except DocumentError as error:
        raise DocumentError(
            replace(problem, path="inputs.constraints", file=path, message=str(problem)) for problem in error.problems
        ) from None
    name = None if requested.engine is None else requested.engine.name
    return tuple(_as_described(each, plan, name) for each in found)


def _as_described(constraint: Constraint, plan: Plan, name: str | None) -> Constraint:
    """Return a constraint of a plan as one of its engine if the plan's family says that it is; options do not."""
    if name is None or not isinstance(constraint, Exclude | RestrictRole | WithoutWorkers):
        return constraint
    words = in_words(constraint, name)
    is_its = words != str(constraint) and words in plan.family.split("; ")
    return replace(constraint, by=name) if is_its else constraint


def _check_family(plan: Plan, requested: Requested, path: str) -> None:
    """Raise DocumentError if the plan's strategy is unknown, or lacks its roles or its engine, or names no engine."""
    from hetis.solver.placement.families import STRATEGIES

    if plan.strategy not in STRATEGIES:
        message = f"unknown strategy {plan.strategy}, expected one of {', '.join(STRATEGIES)}"
        raise single_problem(path, message + did_you_mean(plan.strategy, STRATEGIES))
    try:
        family_of(plan.strategy, requested.roles or (Role.UNIFIED,))
    except InvalidProblemError as error:
        raise single_problem(path, f"inputs.roles: {error}") from None
    if requested.engine is None and not STRATEGIES[plan.strategy].is_published:
        raise single_problem(path, "the plan names no engine: place it again")
    try:
        family_of(plan.strategy, engine=requested.engine)
    except InvalidProblemError as error:
        raise single_problem(path, f"inputs.engine must be an engine and its limits: {error}") from None
