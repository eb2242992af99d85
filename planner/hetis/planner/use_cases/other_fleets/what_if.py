"""The value of another fleet: the same problem solved before and after, and what the two proofs imply.

Nodes are added and removed; every answer is a solve, with the options of `hetis-plan place`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from hetis.planner.use_cases.comparing.compare import FAILED, Compared, Searches, planned
from hetis.planner.use_cases.other_fleets.additions import FleetChange
from hetis.planner.use_cases.record.parts import Requested
from hetis.planner.use_cases.sources import LoadedInputs
from hetis.profiler.defaults import default_profile
from hetis.solver.advice import (
    Change,
    Difference,
    Proven,
    difference,
    usd_per_hour_of,
    with_added,
    without,
)
from hetis.solver.budget import one_of_several
from hetis.solver.cluster import Cluster
from hetis.solver.constraints import Constraint, Exclude, RestrictRole, Unit
from hetis.solver.errors import UncheckedPlanError
from hetis.solver.plan import Objective, Status
from hetis.solver.problem import PlacementProblem
from hetis.solver.replanning.change import PlanChange, plan_change


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the two fleets: its plan, and what the plan proves.

    ``usd_per_hour`` is the price of the whole fleet; None: at least one GPU has no price.
    """

    loaded: LoadedInputs
    outcome: Compared
    proven: Proven
    usd_per_hour: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class WhatIf:
    """The results before and after. ``plan_change``: the changes of replicas; None if either side has no plan."""

    objective: Objective
    change: FleetChange
    before: Side
    after: Side
    difference: Difference
    plan_change: PlanChange | None


def what_if(searches: Searches, change: FleetChange) -> WhatIf:
    """Solve for the present and for the changed fleet, each with a budget of its own.

    Raises:
        InvalidProblemError: a node is unknown, a type has no profile, or no node is left.
        UncheckedPlanError: a plan fails the independent checker.
    """
    side = _solver(searches, count=2)
    changed = changed_inputs(searches.loaded, change)
    before, after = side(searches.loaded, "before"), side(changed, "after")
    return WhatIf(
        objective=searches.objective,
        change=change,
        before=before,
        after=after,
        difference=_difference(before, after, searches.objective),
        plan_change=_plan_change(before, after),
    )


def _solver(searches: Searches, *, count: int) -> Callable[[LoadedInputs, str], Side]:
    """Return a function that solves for each of ``count`` fleets, and numbers them in its progress reports.

    All are planned on the rung that the first one is worth, unless another fleet has no plan there.
    """
    numbers, rung = itertools.count(1), searches.settings.rung
    nothing, anything = (0.0, math.inf) if searches.objective.maximises else (math.inf, 0.0)

    def side(loaded: LoadedInputs, name: str) -> Side:
        nonlocal rung
        report = one_of_several(searches.report, next(numbers), count, f"{name}: ")
        own = replace(searches, loaded=loaded, report=report)
        outcome = planned(replace(own, settings=replace(searches.settings, rung=rung)))
        if outcome.plan is None and rung != searches.settings.rung:
            outcome = planned(own)
        if outcome.plan is not None:
            rung = rung or Requested.of(outcome.plan).rung
        if outcome.status == FAILED:
            raise UncheckedPlanError(outcome.reasons)
        if outcome.plan is not None:
            proven = Proven(value=outcome.plan.result.value, bound=outcome.plan.result.bound)
        else:
            proved = outcome.status == Status.INFEASIBLE.value
            proven = Proven(value=nothing, bound=nothing if proved else anything)
        return Side(loaded=loaded, outcome=outcome, proven=proven, usd_per_hour=usd_per_hour_of(loaded.inputs.cluster))

    return side


def _difference(before: Side, after: Side, objective: Objective) -> Difference:
    change = _kind_of_change(before.outcome.problem, after.outcome.problem)
    return difference(before.proven, after.proven, maximises=objective.maximises, change=change)


def _kind_of_change(before: PlacementProblem | None, after: PlacementProblem | None) -> Change:
    """Return grown or shrunk if every plan of one problem is known to be one of the other, of the same value."""
    if before is None or after is None:
        return Change.OTHER
    if _has_all_plans_of(before, after):
        return Change.GROWN
    return Change.SHRUNK if _has_all_plans_of(after, before) else Change.OTHER


def _has_all_plans_of(smaller: PlacementProblem, larger: PlacementProblem) -> bool:
    """Return whether every plan of a problem is known to be one of the other, of the same value.

    Not so with several zones, since a replica's share of the links between them shrinks as the fleet grows; nor with
    explicit links between nodes, since the sets of nodes inside which they are charged depend on all nodes.
    With more kinds of GPUs, the family may have fewer stages (`listing`), or constraints that the engine makes.
    """
    fleets = smaller.cluster, larger.cluster
    if len({zone for fleet in fleets for zone in fleet.zones()}) > 1:
        return False
    if any(fleet.network.between_nodes for fleet in fleets) or smaller.family != larger.family:
        return False
    types = smaller.cluster.types_used()
    if not all(_is_on_others(each, types) for each in set(larger.constraints).difference(smaller.constraints)):
        return False
    fewer, more = ({(device.name, device.gpu) for device in fleet.devices()} for fleet in fleets)
    return fewer <= more


def _is_on_others(constraint: Constraint, types: Collection[str]) -> bool:
    """Return whether a constraint keeps only GPUs of types other than these from some duty."""
    if not isinstance(constraint, Exclude | RestrictRole):
        return False
    return constraint.gpus.unit is Unit.TYPE and constraint.gpus.name not in types


def _plan_change(before: Side, after: Side) -> PlanChange | None:
    old, new, problem = before.outcome.plan, after.outcome.plan, before.outcome.problem
    if old is None or new is None or problem is None:
        return None
    return plan_change(old, new, problem.model, problem.moments_of_ranges())


def changed_inputs(loaded: LoadedInputs, change: FleetChange) -> LoadedInputs:
    """Return the inputs with a changed fleet; new types get `default_profile`."""
    cluster = with_added(loaded.inputs.cluster, change.add, change.shape)  # first: nothing else may be left
    if change.remove:
        cluster = without(cluster, change.remove)
    return with_cluster(loaded, cluster)


def with_cluster(loaded: LoadedInputs, cluster: Cluster, origin: str | None = None) -> LoadedInputs:
    """Return the model, workload and profiles on another fleet; types without a profile get `default_profile`."""
    used = cluster.types_used()
    profiles, origins = dict(loaded.inputs.profiles), dict(loaded.origins.get("profiles", {}))
    for gpu in used:
        if gpu not in profiles:
            origins[gpu], profiles[gpu] = default_profile(cluster.gpu_types[gpu])
    kept = {gpu: profiles[gpu] for gpu in used}
    named: Mapping[str, Any] = {**loaded.origins, "profiles": {gpu: o for gpu, o in origins.items() if gpu in used}}
    return LoadedInputs(
        inputs=replace(loaded.inputs, cluster=cluster, profiles=kept),
        origins=named if origin is None else {**named, "cluster": origin},
    )
