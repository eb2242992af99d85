"""Handmade plans whose claims are those of the cost model, which tests of the checker then break."""

from __future__ import annotations

import math
from dataclasses import replace

from hetis.solver.check import Rule, check_plan
from hetis.solver.check.rederive import Derived, Rederivation
from hetis.solver.check.replica_shapes import Fleet, replica_shape
from hetis.solver.placement.fleet import device_classes
from hetis.solver.plan import (
    AttentionWorkerPool,
    ClassPrice,
    KvRoute,
    ObjectiveKind,
    Plan,
    ReplicaPlan,
    Role,
    SolveResult,
    StagePlan,
    Status,
)
from hetis.solver.problem import PlacementProblem


def unclaimed(
    *stages: StagePlan,
    pools: tuple[AttentionWorkerPool, ...] = (),
    in_flight: int = 4,
    role: Role = Role.UNIFIED,
    kv_zones: tuple[str, ...] = (),
) -> ReplicaPlan:
    """Return a replica whose numbers are not filled in yet."""
    return ReplicaPlan(
        rate=0.0,
        ttft_s=0.0,
        tpot_s=0.0,
        micro_batch=0 if role is Role.PREFILL else 4,
        in_flight=in_flight,
        chunk_tokens=0 if role is Role.DECODE else 64,
        kv_tokens=0,
        stages=stages,
        attention_workers=pools,
        role=role,
        kv_zones=kv_zones,
    )


def derived_of(replica: ReplicaPlan, problem: PlacementProblem) -> Derived:
    return Rederivation(problem).of(replica_shape(replica, problem, Fleet.of(problem.cluster)))


def claimed(replica: ReplicaPlan, problem: PlacementProblem, *, share: float = 1.0) -> ReplicaPlan:
    """Return the replica with the cost model's numbers, at a ``share`` of its rate."""
    derived = derived_of(replica, problem)
    return replace(
        replica,
        rate=share * derived.rate,
        ttft_s=derived.ttft_s(derived.t_s / share),
        tpot_s=derived.tpot_per_t * derived.t_s / share,
        kv_tokens=math.floor(derived.kv_tokens),
    )


def value_of(replicas: tuple[ReplicaPlan, ...], routes: tuple[KvRoute, ...], problem: PlacementProblem) -> float:
    rate = sum(replica.rate for replica in replicas if replica.role is Role.UNIFIED)
    rate += sum(route.rate for route in routes)
    num_gpus = len({name for replica in replicas for name in replica.devices()})
    return {
        ObjectiveKind.GOODPUT: 0.9 * rate,
        ObjectiveKind.THROUGHPUT: rate,
        ObjectiveKind.COST: 1.0 * num_gpus,  # every GPU costs 1 USD/h
        ObjectiveKind.GPUS: 1.0 * num_gpus,
    }[problem.objective.kind]


def plan_of(
    problem: PlacementProblem, *replicas: ReplicaPlan, routes: tuple[KvRoute, ...] = (), gap: float = 0.05
) -> Plan:
    """A plan of claimed replicas whose bound is ``gap`` away from its value."""
    value = value_of(replicas, routes, problem)
    bound = value * (1 + gap) if problem.objective.maximises else value * (1 - gap)
    result = SolveResult(
        status=Status.OPTIMAL if gap == 0 else Status.FEASIBLE,
        objective=problem.objective.kind,
        value=value,
        bound=bound,
        gap=gap,
        unit=problem.objective.unit,
        solve_s=0.1,
    )
    family = problem.family
    plan = Plan(
        strategy=family.name,
        family=family.describe(problem.model),
        result=result,
        objective=problem.objective,
        replicas=replicas,
        kv_routes=routes,
    )
    return counted(plan, problem)


def counted(plan: Plan, problem: PlacementProblem) -> Plan:
    """Return the plan with a class table that counts its devices; nothing has a price."""
    workers = {name for replica in plan.replicas for pool in replica.attention_workers for name in pool.devices}
    used = {name for replica in plan.replicas for name in replica.devices()}
    rows = []
    for device_class in device_classes(problem.cluster):
        names = {
            device.name
            for device in problem.cluster.devices()
            if device.group in device_class.groups and device.gpu == device_class.gpu
        }
        rows.append(
            ClassPrice(
                gpu=device_class.gpu,
                zone=device_class.zone,
                gpus_per_node=device_class.gpus_per_node,
                available=len(names),
                used=len(names & used),
                as_attention_workers=len(names & workers),
                dual=0.0,
            )
        )
    return replace(plan, prices=tuple(rows))


def rules(plan: Plan, problem: PlacementProblem) -> set[Rule]:
    return {violation.rule for violation in check_plan(plan, problem)}
