"""The cost of the limits of a plan's engine: the values of plans for other engines, and the missing features."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from hetis.planner.use_cases.precision import constraints_of, refused_by
from hetis.planner.use_cases.record.forms import EngineValue
from hetis.planner.use_cases.record.parts import EqualStages, OtherEngines, Requested
from hetis.planner.use_cases.sources import family_of, memories_for, named
from hetis.planner.use_cases.verification.equal_stages import budget_of_one, value_within
from hetis.solver.budget import Budget, Progress, Report
from hetis.solver.cluster import Cluster
from hetis.solver.constraints import Constraint, Constraints, Exclude, RestrictRole, WithoutWorkers
from hetis.solver.engine_rules import EngineRules, Family
from hetis.solver.errors import InfeasibleError, InvalidProblemError, NoPlanFoundError
from hetis.solver.model import ModelSpec
from hetis.solver.placement.families import ENGINES, beyond
from hetis.solver.placement.rungs import RUNGS, Known
from hetis.solver.plan import Plan, Role
from hetis.solver.plugin_time import NO_PLUGIN
from hetis.solver.problem import PlacementProblem

SHARE = 0.1  # share of the limits on time and work that all these searches may take
SEARCHES = 2  # of each engine: a comparison needs no more, whose plan a search for that engine betters


def with_engine_values(
    plan: Plan, problem: PlacementProblem, *, seed: int, budget: Budget, report: Report, evaluated: dict[Hashable, Any]
) -> Plan:
    """Return the plan with the values of plans for other engines.

    All use the same profiles, so the values differ by what the engines can run and the memory that they take, and not
    by how fast they are. Takes at most a share of the limits of ``budget``, that of the plan's own search, which left
    what it ``evaluated``.
    """
    budget = Budget(
        time_limit_s=SHARE * budget.time_limit_s, work_limit=SHARE * budget.work_limit, clock=budget.clock,
        cancelled=budget.cancelled,
    )  # fmt: skip

    def started(engine: str) -> None:
        spent_s = plan.result.solve_s + budget.elapsed_s()
        report(Progress(phase=f"plans for {engine}", elapsed_s=spent_s, incumbent=plan.result.value))

    return OtherEngines(values=tuple(_values(plan, problem, seed, budget, started, evaluated))).on(plan)


def _values(
    plan: Plan, problem: PlacementProblem, seed: int, budget: Budget, started: Callable[[str], None],
    evaluated: dict[Hashable, Any],
) -> Iterator[EngineValue]:  # fmt: skip
    own, known = problem.family.engine, dict[Hashable, EngineValue]()
    assert own is not None, "it is the engine that others are compared with"
    of_engine = partial(constraints_of, problem.model, problem.cluster)
    own_constraints = [each for each in problem.constraints if each not in of_engine(own.name)]
    for name in ENGINES:
        if name == own.name:
            continue
        rules = named(own, name)
        constraints: Constraints = tuple(dict.fromkeys((*of_engine(name), *own_constraints)))
        family = family_of(plan.strategy, problem.family.roles, rules, problem.family.engine_settings)
        if rung := Requested.of(plan).rung:
            family = RUNGS[rung].restrict(family, plan.strategy)
        memories = memories_for(family, problem.cluster, problem.model, problem.profiles)
        has_its_memory = memories == problem.memories
        alike = _but_for_its_name(family, problem.model), constraints, tuple(memories.items())
        if alike not in known:
            lacks = _lacking(plan, problem, rules)
            runs = has_its_memory and not lacks
            found = EngineValue(engine=name, value=plan.result.value if runs else None, bound=None, lacks=lacks)
            if (
                runs
                and _has_all_of(problem.family, family, problem.model)
                and all(_is_kept(each, constraints) for each in problem.constraints)
            ):
                found = replace(found, bound=plan.result.bound)
            else:
                started(name)
                other = replace(problem, family=family, constraints=constraints, memories=memories)
                found = _searched(found, plan, other, own, seed, budget, evaluated)
                found = _by_equal_stages(found, plan, other, own, seed, budget.cancelled, is_known=has_its_memory)
            known[alike] = found
        yield replace(known[alike], engine=name)


def _lacking(plan: Plan, problem: PlacementProblem, rules: EngineRules) -> tuple[str, ...]:
    """Return what a plan needs and an engine lacks, in a few words each: features, and GPUs that it supports."""
    used = {stage.gpu for replica in plan.replicas for stage in replica.stages}
    refused = refused_by(problem.model, problem.cluster, rules.name)
    features = beyond(plan.replicas, rules, problem.cluster, problem.model)
    on_refused = (f"stages on {gpu}" for gpu in refused if gpu in used)
    return (
        *features,
        *_barred_workers(plan, problem, rules),
        *_across_vendors(plan, rules, problem.cluster),
        *on_refused,
    )


def _barred_workers(plan: Plan, problem: PlacementProblem, rules: EngineRules) -> Iterator[str]:
    """Yield that an engine has no attention workers for this model, if the plan has some and it has them for others."""
    has_workers = ENGINES[rules.name].max_pool and any(replica.attention_workers for replica in plan.replicas)
    barring = constraints_of(problem.model, problem.cluster, rules.name)
    if has_workers and any(isinstance(each, WithoutWorkers) for each in barring):
        yield "attention workers for this model"


def _across_vendors(plan: Plan, rules: EngineRules, cluster: Cluster) -> Iterator[str]:
    """Yield what keeps to no single vendor, which every engine needs (`PlacementProblem.build_of` and `kv_of`)."""
    vendors = [{cluster.gpu_types[stage.gpu].vendor for stage in replica.stages} for replica in plan.replicas]
    if any(len(each) > 1 for each in vendors):
        yield "replicas on GPUs of several vendors"
    ends = {frozenset(vendors[route.prefill] | vendors[route.decode]) for route in plan.kv_routes}
    if any(len(each) > 1 and not each <= set(rules.kv_vendors) for each in ends):
        yield "KV exchanged by GPUs of several vendors"


def _but_for_its_name(family: Family, model: ModelSpec) -> tuple[Family, tuple[int, ...]]:
    engine = family.engine
    assert engine is not None, "it is an engine's family"
    engine = replace(engine, name="", plugin=NO_PLUGIN) if not family.max_pool else replace(engine, name="")
    return replace(family, engine=engine), tuple(engine.stages_of(role, model) for role in Role)


def _has_all_of(family: Family, poorer: Family, model: ModelSpec) -> bool:
    """Return whether this family contains all plans of the ``poorer`` one of another engine, given equal limits."""
    return (
        family.engine is not None
        and poorer.engine is not None
        and family.max_pool >= poorer.max_pool
        and _as_deep(family.engine, poorer.engine, model)
    )


def _is_kept(constraint: Constraint, others: Constraints) -> bool:
    """Return whether plans that keep ``others`` keep a constraint: GPUs out of use also compute no layers."""
    excluded = isinstance(constraint, RestrictRole) and Exclude(gpus=constraint.gpus) in others
    return excluded or constraint in others


def _as_deep(rules: EngineRules, others: EngineRules, model: ModelSpec) -> bool:
    """Return whether an engine runs replicas of every role in at least as many stages as another one."""
    return all(rules.stages_of(role, model) >= others.stages_of(role, model) for role in Role)


def _searched(
    known: EngineValue, plan: Plan, problem: PlacementProblem, own: EngineRules, seed: int, budget: Budget,
    evaluated: dict[Hashable, Any],
) -> EngineValue:  # fmt: skip
    """Return what a search finds, or ``known``, the value of a plan that the engine runs, if that is better."""
    from hetis.solver.planning import solve_placement

    if budget.is_spent():
        return replace(known, why_not="no time was left")
    # What it runs of the plan's own engine needs no search.
    known_plan = None if known.value is None else Known(plan, replace(problem.family, engine=own))
    try:
        other = solve_placement(
            problem, strategy=plan.strategy, budget=budget, seed=seed, known=known_plan, most_searches=SEARCHES,
            evaluated=evaluated,
        )  # fmt: skip
    except InvalidProblemError as error:  # such as too many pipelines to list, if it runs more types of GPUs
        return replace(known, why_not=str(error))
    except InfeasibleError as error:
        return replace(known, why_not=error.reasons[0] if error.reasons else str(error))
    except NoPlanFoundError:
        return replace(known, why_not="none was found in time")
    value, bound = other.result.value, other.result.bound
    if not _is_better(value, known.value, plan):
        return replace(known, bound=bound)
    return replace(known, value=value, bound=bound, lacks=known.lacks or _lacking(other, problem, own))


def _by_equal_stages(
    known: EngineValue, plan: Plan, problem: PlacementProblem, own: EngineRules, seed: int,
    cancelled: threading.Event, *, is_known: bool = True,
) -> EngineValue:  # fmt: skip
    """Return the value of equal stages on an engine, or ``known`` if that is at least as good.

    Their replicas are unified, so they say nothing of plans without these.
    """
    other = problem.family.engine
    if Role.UNIFIED not in problem.family.roles:
        return known
    ours = EqualStages.of(plan).best
    if is_known and ours is not None and other is not None and _as_deep(other, own, problem.model):
        value = ours.value  # equal stages have no attention workers, and the other limits are the same
    elif known.value is not None:
        return known  # a separate search is made only for engines without any plan
    else:
        found = value_within(budget_of_one(cancelled), problem, seed)
        value = None if found is None else found.value
    better = value is not None and _is_better(value, known.value, plan)
    return replace(known, value=value, equal_stages=True) if better else known


def _is_better(value: float, known: float | None, plan: Plan) -> bool:
    return known is None or (value > known if plan.objective.maximises else value < known)
