"""The answer of a heuristic as a plan, with its value, a bound from dense work, and a class table."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hetis.solver.budget import Budget
from hetis.solver.errors import NoPlanFoundError
from hetis.solver.model import ModelSpec
from hetis.solver.placement.binding import BoundStage
from hetis.solver.placement.classes import class_of_slots, class_prices
from hetis.solver.placement.out_of_reach import rate_bound
from hetis.solver.placement.tables import Atlas
from hetis.solver.placement.template import Template
from hetis.solver.plan import KvRoute, ObjectiveKind, Plan, ReplicaPlan, Role, SolveResult, Status
from hetis.solver.problem import PlacementProblem
from hetis.solver.published.graph import FleetGraph
from hetis.solver.published.work_bound import least_cost

WITHOUT_PROOF = "a heuristic as published, without a proof of its own: alone it has the bound of the fleet's dense work"


@dataclass(frozen=True, slots=True, kw_only=True)
class HeuristicPlan:
    """The decisions of a heuristic."""

    replicas: tuple[ReplicaPlan, ...]
    kv_routes: tuple[KvRoute, ...] = ()
    notes: tuple[str, ...]


def refuse_larger(problem: PlacementProblem, most: int, *, strategy: str, does: str) -> None:
    """Restrict a heuristic to fleets of at most ``most`` GPUs; ``does`` names what would take too long with more.

    Raises:
        NoPlanFoundError: there are more.
    """
    size = problem.cluster.num_gpus()
    if size > most:
        raise NoPlanFoundError(f"{strategy} {does}: {size} GPUs, it is meant for {most} at most")


def no_plan(budget: Budget, message: str) -> NoPlanFoundError:
    """Return the error of a heuristic without a plan: out of time, or for the reason in ``message``."""
    if budget.is_spent():
        return NoPlanFoundError(f"no plan found within {budget.elapsed_s():.1f} s; allow more time")
    return NoPlanFoundError(message)


def plan_of(atlas: Atlas, strategy: str, answer: HeuristicPlan, budget: Budget) -> Plan:
    """Return the plan with the bound from dense work, which no plan of any strategy exceeds.

    Raises:
        NoPlanFoundError: cost or GPUs are minimised and the plan serves less than the demand.
    """
    problem, objective = atlas.problem, atlas.problem.objective
    rate = sum(r.rate for r in answer.replicas if r.role is Role.UNIFIED) + sum(r.rate for r in answer.kv_routes)
    goodput = problem.assumptions.planned_utilisation * rate
    demand = objective.demand_rps
    if not objective.maximises and demand is not None and goodput < demand * (1.0 - 1e-9):
        raise NoPlanFoundError(f"{strategy} serves {goodput:.4g} requests/s, {demand:.4g} are demanded")
    used = _used(atlas, answer)
    value, bound = _value_and_bound(atlas, used[0], rate)
    gap = abs(bound - value) / abs(value) if value else 0.0
    notes = answer.notes
    if not objective.maximises:
        notes = (*notes, f"the heuristic maximises the rate: it uses what serves {goodput:.4g} requests/s")
    return Plan(
        strategy=strategy,
        family=problem.family.describe(problem.model),
        result=SolveResult(
            status=Status.INTERRUPTED if budget.cancelled.is_set() else Status.FEASIBLE,
            objective=objective.kind,
            value=value,
            bound=bound,
            gap=gap,
            unit=objective.unit,
            solve_s=budget.elapsed_s(),
        ),
        objective=objective,
        replicas=answer.replicas,
        kv_routes=answer.kv_routes,
        prices=class_prices(atlas.classes, *used, duals=[0.0] * len(atlas.classes)),  # heuristics have no duals
        notes=notes,
    )


def _value_and_bound(atlas: Atlas, used: Counter[int], rate: float) -> tuple[float, float]:
    problem, kind = atlas.problem, atlas.problem.objective.kind
    if problem.objective.maximises:
        scale = problem.assumptions.planned_utilisation if kind is ObjectiveKind.GOODPUT else 1.0
        return scale * rate, scale * max(rate, rate_bound(atlas))
    costs = np.array([1.0 if kind is ObjectiveKind.GPUS else c.usd_per_hour or 0.0 for c in atlas.classes])
    value = float(sum(costs[row] * count for row, count in used.items()))
    needed = (problem.objective.demand_rps or 0.0) / problem.assumptions.planned_utilisation
    bound = least_cost(atlas, needed, costs)
    return value, min(value, math.ceil(bound - 1e-6) if kind is ObjectiveKind.GPUS else bound)


def _used(atlas: Atlas, answer: HeuristicPlan) -> tuple[Counter[int], Counter[int]]:
    """Return the GPUs of every class that the plan uses, and the attention workers among them."""
    class_of = class_of_slots(atlas.classes)
    device_class = {d.name: class_of[d.group.name, d.gpu] for d in atlas.problem.cluster.devices()}
    used = {name for replica in answer.replicas for name in replica.devices()}
    workers = {name for replica in answer.replicas for pool in replica.attention_workers for name in pool.devices}
    return Counter(device_class[name] for name in used), Counter(device_class[name] for name in workers)


def weight_bytes(model: ModelSpec) -> float:
    """Return the bytes of all weights of a model."""
    ends = model.embedding_params * (1 if model.tie_embeddings else 2)
    return (model.params() - ends) * model.weight_bytes + ends * model.embedding_bytes


def replica_bytes(model: ModelSpec, headroom: float) -> float:
    """Return the estimated memory of a replica: weights, and ``headroom`` times as many bytes of KV."""
    return (1.0 + headroom) * weight_bytes(model)


def named_stages(atlas: Atlas, graph: FleetGraph, group: Sequence[int], template: Template) -> list[BoundStage]:
    """Place TP groups inside nodes, the largest first, each in the fullest node that holds it.

    TP sizes are powers of two, so this succeeds for every shape that the group's nodes admit.
    """
    free: dict[tuple[int, str], list[int]] = defaultdict(list)
    for gpu in sorted(group):
        free[graph.kind(gpu)].append(gpu)
    ranks = [atlas.ranks[stage.rank] for stage in template.stages]
    bound = [BoundStage() for _ in ranks]
    for i in sorted(range(len(ranks)), key=lambda i: (-ranks[i][1], i)):
        device_class, tp = ranks[i]
        places = [kind for kind, gpus in free.items() if kind[0] == device_class and len(gpus) >= tp]
        place = min(places, key=lambda kind: (len(free[kind]), kind[1]))
        bound[i].devices.extend(graph.names[gpu] for gpu in free[place][:tp])
        del free[place][:tp]
    return bound
