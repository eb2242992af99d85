"""Checks of the settings, the place and the GPU types that a replica's role requires."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from hetis.solver.check.fleet import Fleet
from hetis.solver.check.violation import Rule, Violation
from hetis.solver.plan import Plan, ReplicaPlan, Role
from hetis.solver.problem import PlacementProblem


def check_role(replica: ReplicaPlan, where: str, problem: PlacementProblem, fleet: Fleet) -> Iterator[Violation]:
    """Check that the family has the role, and that the replica's zone and KV destinations suit it."""
    if replica.role not in problem.family.roles:
        message = f"is {replica.role}, the family has {', '.join(problem.family.roles)} replicas"
        yield Violation(rule=Rule.ROLE, where=where, message=message)
    zones = fleet.zones_of(name for name in replica.devices() if name in fleet.devices)
    if replica.role is not Role.UNIFIED and len(zones) > 1:
        message = f"is {replica.role} and lies in {len(zones)} zones ({', '.join(zones)}), must lie in 1"
        yield Violation(rule=Rule.ROLE_ZONE, where=where, message=message)
    allowed = [(zones, "its own zone"), (fleet.zones, "all zones")]
    if replica.role is not Role.PREFILL:
        allowed = [((), "none")]
    if len(set(replica.kv_zones)) < len(replica.kv_zones) or all(
        set(replica.kv_zones) != set(names) for names, _ in allowed
    ):
        must = " or ".join(f"{word} ({', '.join(names)})" if names else word for names, word in allowed)
        message = f"kv_zones of a {replica.role} replica are {', '.join(replica.kv_zones) or 'none'}, must be {must}"
        yield Violation(rule=Rule.KV_ZONES, where=where, message=message)


def check_types_of_roles(plan: Plan, problem: PlacementProblem) -> list[Violation]:
    """Check that all replicas of a role use one GPU type if the family requires that."""
    if not problem.family.one_type_per_role:
        return []
    types: defaultdict[Role, set[str]] = defaultdict(set)
    for replica in plan.replicas:
        types[replica.role] |= {stage.gpu for stage in replica.stages}
        types[replica.role] |= {pool.gpu for pool in replica.attention_workers}
    return [
        Violation(
            rule=Rule.ROLE_TYPE,
            where="plan",
            message=f"{role} replicas use {len(gpus)} GPU types ({', '.join(sorted(gpus))}), the family allows 1",
        )
        for role, gpus in types.items()
        if role is not Role.UNIFIED and len(gpus) > 1
    ]
