"""The value of another fleet: the same problem solved before and after, and what the two proofs imply.

`what_if` adds and removes nodes; `buy_next` adds the same number of GPUs of each type on a market list, one type at a
time. Every answer is a solve, with the options of `hetis-plan place`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from hetis.planner.use_cases.comparing.compare import FAILED, NO_PLAN, Compared, Searches, planned
from hetis.planner.use_cases.other_fleets.additions import FleetChange
from hetis.planner.use_cases.placement_settings import PlacementSettings
from hetis.planner.use_cases.record.parts import MadeFrom, Requested
from hetis.planner.use_cases.saved_plans import PlanAndProblem
from hetis.planner.use_cases.sources import LoadedInputs
from hetis.profiler.defaults import default_profile
from hetis.solver.advice import (
    Addition,
    Change,
    Difference,
    NodeShape,
    Proven,
    difference,
    usd_per_hour_of,
    with_added,
    without,
)
from hetis.solver.budget import Budget, Report, one_of_several
from hetis.solver.cluster import Cluster
from hetis.solver.constraints import Constraint, Exclude, RestrictRole, Unit
from hetis.solver.errors import UncheckedPlanError
from hetis.solver.plan import Objective, Status
from hetis.solver.problem import PlacementProblem
from hetis.solver.replanning.change import PlanChange, plan_change

T = TypeVar("T")


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


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedOffer:
    """A GPU type on the market, added to the fleet and solved again."""

    addition: Addition  # the GPU type, the number added, and the price
    # Estimated marginal value of one GPU of the type in the plan before; None: the fleet has none of this type
    dual: float | None
    after: Side
    difference: Difference  # the effect of all added GPUs together
    # Value of the plan found, less that of the plan before: a fleet without one serves 0 requests/s at infinite cost
    gain: float

    @property
    def usd_per_hour(self) -> float | None:
        """The price of one GPU per hour, or None if it is unknown."""
        return _price(self.addition)


@dataclass(frozen=True, slots=True, kw_only=True)
class BuyNext:
    """The market, the best purchase per dollar first: by the gain of the plans found, then by what is proven."""

    objective: Objective
    shape: NodeShape
    count: int
    before: Side
    offers: tuple[ListedOffer, ...]
    left_out: tuple[str, ...]  # types for which no time was left, or which were cancelled


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


def buy_next(searches: Searches, market: Sequence[Addition], shape: NodeShape) -> BuyNext:
    """Solve again with each type of the market added, starting with the type of the highest dual per dollar.

    Once a budget is cancelled, the remaining types are left out and named in the result.

    Raises:
        InvalidProblemError: a type has no profile, and none can be modelled.
        UncheckedPlanError: a plan fails the independent checker.
    """
    side, objective = _solver(searches, count=1 + len(market)), searches.objective
    fleets = {a.gpu.name: changed_inputs(searches.loaded, FleetChange(add=(a,), shape=shape)) for a in market}
    before = side(searches.loaded, "before")
    duals = _duals(before)
    offers, left_out = [], []
    for addition in sorted(market, key=lambda a: -_per_dollar(duals.get(a.gpu.name, 0.0), _price(a))):
        name = addition.gpu.name
        after = side(fleets[name], f"with {addition.count} {name}")
        if after.outcome.plan is None and after.outcome.status == NO_PLAN:
            left_out.append(name)
            continue
        gain = 0.0 if after.proven.value == before.proven.value else after.proven.value - before.proven.value
        known = _difference(before, after, objective)
        offers.append(ListedOffer(addition=addition, dual=duals.get(name), after=after, difference=known, gain=gain))
    sign = 1.0 if objective.maximises else -1.0

    def worth(offer: ListedOffer) -> tuple[float, float, float]:
        gain = sign * offer.gain / offer.addition.count
        # The last is for first plans: all of them gain the same infinite cost.
        return -_per_dollar(gain, offer.usd_per_hour), -gain, -sign * offer.after.proven.value

    return BuyNext(
        objective=objective,
        shape=shape,
        count=market[0].count if market else 0,
        before=before,
        offers=tuple(sorted(offers, key=worth)),
        left_out=tuple(left_out),
    )


def buy_next_to_plan(
    found: PlanAndProblem, market: Sequence[Addition], shape: NodeShape, *, time_limit_s: float,
    budget: Callable[[], Budget], report: Report,
) -> BuyNext:  # fmt: skip
    """Answer `buy_next` for an existing plan, with its inputs, constraints, objective, strategy and engine.

    Raises:
        InvalidProblemError, UncheckedPlanError: as raised by `buy_next`.
    """
    plan, family, origins = found.plan, found.problem.family, MadeFrom.of(found.plan).origins
    loaded = LoadedInputs(inputs=found.inputs, origins=origins)
    settings = PlacementSettings(
        strategy=plan.strategy, roles=family.roles, engine=family.engine, time_limit_s=time_limit_s,
        rung=Requested.of(plan).rung, least_layers=1,
    )  # fmt: skip
    searches = Searches(loaded=loaded, objective=plan.objective, settings=settings, budget=budget, report=report)
    return buy_next(searches, market, shape)


def _price(addition: Addition) -> float | None:
    return addition.usd_per_hour if addition.usd_per_hour is not None else addition.gpu.usd_per_hour


def _per_dollar(gain: float, usd_per_hour: float | None) -> float:
    return gain / usd_per_hour if usd_per_hour else 0.0


def _duals(side: Side) -> dict[str, float]:
    """Return for each type the highest dual among its classes."""
    duals: dict[str, float] = {}
    for price in side.outcome.plan.prices if side.outcome.plan is not None else ():
        duals[price.gpu] = max(duals.get(price.gpu, 0.0), price.dual)
    return duals


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
