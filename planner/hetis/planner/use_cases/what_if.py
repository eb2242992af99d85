"""The value of another fleet: the same problem solved before and after, and what the two proofs imply.

`what_if` adds and removes nodes; `buy_next` adds the same number of GPUs of each type on a market list, one type per
solve. Every answer is a solve, with the options of `hetis-plan place`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hetis.planner.use_cases.compare import FAILED, NO_PLAN, Compared, planned
from hetis.planner.use_cases.errors import UncheckedPlanError
from hetis.planner.use_cases.place import Settings
from hetis.planner.use_cases.sources import Inputs, LoadedInputs, PlanAndProblem
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
from hetis.solver.budget import Budget, Progress, Report, one_of_several
from hetis.solver.cluster import Cluster
from hetis.solver.plan import Objective, Status
from hetis.solver.problem import Assumptions
from hetis.solver.replanning.change import PlanChange, plan_change

Solve = Callable[[LoadedInputs, str], Compared]  # inputs, and the name in progress reports


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the two fleets: its plan, and what that proves.

    ``usd_per_hour`` is the price of the whole fleet; None: a GPU has none.
    """

    loaded: LoadedInputs
    outcome: Compared
    proven: Proven
    usd_per_hour: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetChange:
    """Nodes or groups to remove, GPUs to add, and the nodes in which they come."""

    remove: tuple[str, ...] = ()
    add: tuple[Addition, ...] = ()
    shape: NodeShape


@dataclass(frozen=True, slots=True, kw_only=True)
class WhatIf:
    """The results before and after. ``plan_change``: the changes of replicas; None if a side has no plan."""

    objective: Objective
    change: FleetChange
    before: Side
    after: Side
    difference: Difference
    plan_change: PlanChange | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A GPU type on the market, added to the fleet and solved again.

    Attributes:
        addition: the type, the number added, and the price.
        dual: estimated marginal value of one GPU of the type in the plan before; None: the fleet has none of it.
        difference: the effect of all added GPUs together.
    """

    addition: Addition
    dual: float | None
    after: Side
    difference: Difference

    @property
    def usd_per_hour(self) -> float | None:
        """The price of one GPU per hour, or None if unknown."""
        price = self.addition.usd_per_hour
        return price if price is not None else self.addition.gpu.usd_per_hour


@dataclass(frozen=True, slots=True, kw_only=True)
class BuyNext:
    """The market, the best purchase per dollar first: by the gain of the plans found, then by what is proven."""

    objective: Objective
    shape: NodeShape
    count: int
    before: Side
    offers: tuple[Offer, ...]
    left_out: tuple[str, ...]  # types for which no time was left, or that were cancelled


def what_if(
    loaded: LoadedInputs,
    objective: Objective,
    settings: Settings,
    change: FleetChange,
    *,
    budget: Callable[[], Budget],
    report: Report,
) -> WhatIf:
    """Solve on the present and on the changed fleet, each with its own budget.

    Raises:
        InvalidProblemError: an unknown node, a type without profile, no node left.
        UncheckedPlanError: a plan fails the independent checker.
    """
    solve = _solver(objective, settings, budget, report, count=2)
    changed = changed_inputs(loaded, change)
    before = _side(loaded, "before", solve, objective)
    after = _side(changed, "after", solve, objective)
    return WhatIf(
        objective=objective,
        change=change,
        before=before,
        after=after,
        difference=_difference(before, after, objective),
        plan_change=_plan_change(before, after),
    )


def buy_next(
    loaded: LoadedInputs,
    objective: Objective,
    settings: Settings,
    market: Sequence[Addition],
    shape: NodeShape,
    *,
    budget: Callable[[], Budget],
    report: Report,
) -> BuyNext:
    """Solve again with every type of the market added, types of the highest dual per dollar first.

    Once a budget is cancelled, the remaining types are left out and named.

    Raises:
        InvalidProblemError: a type has no profile and none can be modelled.
        UncheckedPlanError: a plan fails the independent checker.
    """
    solve = _solver(objective, settings, budget, report, count=1 + len(market))
    fleets = {a.gpu.name: changed_inputs(loaded, FleetChange(add=(a,), shape=shape)) for a in market}
    before = _side(loaded, "before", solve, objective)
    duals = _duals(before)
    offers, left_out = [], []
    for addition in sorted(market, key=lambda a: -_per_dollar(duals.get(a.gpu.name, 0.0), _price(a))):
        name = addition.gpu.name
        after = _side(fleets[name], f"with {addition.count} {name}", solve, objective)
        if after.outcome.plan is None and after.outcome.status == NO_PLAN:
            left_out.append(name)
            continue
        gain = _difference(before, after, objective)
        offers.append(Offer(addition=addition, dual=duals.get(name), after=after, difference=gain))
    sign = 1.0 if objective.maximises else -1.0

    def worth(offer: Offer) -> tuple[float, float]:
        found = sign * offer.difference.found / offer.addition.count
        return -_per_dollar(found, offer.usd_per_hour), -found

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
        InvalidProblemError, UncheckedPlanError: as `buy_next`.
    """
    plan, problem = found.plan, found.problem
    inputs = Inputs(
        cluster=problem.cluster, model=problem.model, workload=problem.workload, profiles=problem.profiles,
        constraints=problem.constraints, engine_settings=problem.family.engine_settings,
    )  # fmt: skip
    origins = plan.inputs.get("origins")
    loaded = LoadedInputs(inputs=inputs, origins=origins if isinstance(origins, Mapping) else {})
    settings = Settings(
        strategy=plan.strategy, roles=problem.family.roles, engine=problem.family.engine, time_limit_s=time_limit_s
    )
    return buy_next(loaded, plan.objective, settings, market, shape, budget=budget, report=report)


def _price(addition: Addition) -> float | None:
    return addition.usd_per_hour if addition.usd_per_hour is not None else addition.gpu.usd_per_hour


def _per_dollar(gain: float, usd_per_hour: float | None) -> float:
    return gain / usd_per_hour if usd_per_hour else 0.0


def _duals(side: Side) -> dict[str, float]:
    """Return the highest dual among the classes of every type."""
    duals: dict[str, float] = {}
    for price in side.outcome.plan.prices if side.outcome.plan is not None else ():
        duals[price.gpu] = max(duals.get(price.gpu, 0.0), price.dual)
    return duals


def _solver(
    objective: Objective, settings: Settings, budget: Callable[[], Budget], report: Report, *, count: int
) -> Solve:
    """Return a function that solves for each of ``count`` fleets and numbers them in its progress."""
    numbers = itertools.count(1)

    def solve(loaded: LoadedInputs, name: str) -> Compared:
        numbered = one_of_several(report, next(numbers), count)

        def told(progress: Progress) -> None:
            phase = progress.phase.removeprefix(f"{settings.strategy}: ")
            numbered(replace(progress, phase=f"{name}: {phase}"))

        outcome = planned(loaded, objective, settings, budget(), told)
        if outcome.status == FAILED:
            raise UncheckedPlanError(outcome.reasons)
        return outcome

    return solve


def _side(loaded: LoadedInputs, name: str, solve: Solve, objective: Objective) -> Side:
    outcome = solve(loaded, name)
    return Side(
        loaded=loaded,
        outcome=outcome,
        proven=_proven(outcome, objective),
        usd_per_hour=usd_per_hour_of(loaded.inputs.cluster),
    )


def _proven(outcome: Compared, objective: Objective) -> Proven:
    nothing, anything = (0.0, math.inf) if objective.maximises else (math.inf, 0.0)
    if outcome.plan is not None:
        return Proven(value=outcome.plan.result.value, bound=outcome.plan.result.bound)
    proved = outcome.status == Status.INFEASIBLE.value
    return Proven(value=nothing, bound=nothing if proved else anything)


def _difference(before: Side, after: Side, objective: Objective) -> Difference:
    change = _kind_of_change(before.loaded.inputs.cluster, after.loaded.inputs.cluster)
    return difference(before.proven, after.proven, maximises=objective.maximises, change=change)


def _kind_of_change(before: Cluster, after: Cluster) -> Change:
    """Return grown or shrunk if one fleet contains the other; with several zones that implies nothing about plans."""
    if len(set(before.zones()) | set(after.zones())) > 1:
        return Change.OTHER
    old, new = (dict.fromkeys(d.name + d.gpu for d in cluster.devices()) for cluster in (before, after))
    if old.keys() <= new.keys():
        return Change.GROWN
    return Change.SHRUNK if new.keys() <= old.keys() else Change.OTHER


def _plan_change(before: Side, after: Side) -> PlanChange | None:
    old, new = before.outcome.plan, after.outcome.plan
    if old is None or new is None:
        return None
    inputs = before.loaded.inputs
    workload = inputs.workload.clipped_to(inputs.model.max_position)
    moments = workload.moments(block_tokens=Assumptions().block_tokens)
    return plan_change(old, new, inputs.model, moments)


def changed_inputs(loaded: LoadedInputs, change: FleetChange) -> LoadedInputs:
    """Return the inputs with another fleet; new types get `default_profile`."""
    cluster = with_added(loaded.inputs.cluster, change.add, change.shape)  # first: nothing else may be left
    if change.remove:
        cluster = without(cluster, change.remove)
    return with_cluster(loaded, cluster)


def with_cluster(loaded: LoadedInputs, cluster: Cluster, origin: str | None = None) -> LoadedInputs:
    """Return model, workload and profiles on another fleet; types without a profile get `default_profile`."""
    used = dict.fromkeys(slots.gpu for group in cluster.node_groups for slots in group.gpus)
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
