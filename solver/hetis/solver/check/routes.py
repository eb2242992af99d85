"""Checks of the KV of prompts: routes between prefill and decode replicas, and all traffic between zones."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise

from hetis.solver.check.fleet import Fleet
from hetis.solver.check.violation import Rule, Violation
from hetis.solver.plan import KvRoute, Plan, Role
from hetis.solver.problem import PlacementProblem

RELATIVE = 1e-6  # rounding of sums of rates


def served_rate(plan: Plan) -> float:
    """Return the requests/s that a plan completes: those of unified replicas, and those that its routes carry."""
    unified = sum(replica.rate for replica in plan.replicas if replica.role is Role.UNIFIED)
    return unified + sum(route.rate for route in plan.kv_routes)


def check_routes(plan: Plan, problem: PlacementProblem, fleet: Fleet) -> list[Violation]:
    """Check that every route joins two replicas that fit together, and none sends or receives more than its rate."""
    violations: list[Violation] = []
    flow: defaultdict[int, float] = defaultdict(float)
    seen: dict[tuple[int, int], int] = {}
    for number, route in enumerate(plan.kv_routes):
        broken = list(_check_route(route, f"route {number}", plan, problem, fleet))
        pair = (route.prefill, route.decode)
        if not broken and pair in seen:
            message = f"leads from replica {route.prefill} to {route.decode} like route {seen[pair]}, a pair has 1"
            broken.append(Violation(rule=Rule.ROUTE, where=f"route {number}", message=message))
        violations += broken
        seen.setdefault(pair, number)
        if not broken:
            flow[route.prefill] += route.rate
            flow[route.decode] += route.rate
    for number, rate in sorted(flow.items()):
        replica = plan.replicas[number]
        if rate > replica.rate * (1 + RELATIVE):
            message = f"routes take {rate:.9g} requests/s, the {replica.role} replica's rate is {replica.rate:.9g}"
            violations.append(Violation(rule=Rule.ROUTE_RATE, where=f"replica {number}", message=message))
    return violations


def _check_route(
    route: KvRoute, where: str, plan: Plan, problem: PlacementProblem, fleet: Fleet
) -> Iterator[Violation]:  # fmt: skip
    if not 0 < route.rate < math.inf:
        message = f"rate is {route.rate} requests/s, must be finite and > 0"
        yield Violation(rule=Rule.FINITE, where=where, message=message)
    ends_exist = True
    for name, number, role in (
        ("prefill", route.prefill, Role.PREFILL),
        ("decode", route.decode, Role.DECODE),
    ):
        if not 0 <= number < len(plan.replicas):
            message = f"{name} is replica {number}, the plan has {len(plan.replicas)}"
            yield Violation(rule=Rule.ROUTE, where=where, message=message)
            ends_exist = False
        elif plan.replicas[number].role is not role:
            message = f"{name} is replica {number}, which is {plan.replicas[number].role}"
            yield Violation(rule=Rule.ROUTE, where=where, message=message)
            ends_exist = False
    if not ends_exist:
        return
    zone, allowed = _zone_of(plan.replicas[route.decode].devices(), fleet), plan.replicas[route.prefill].kv_zones
    if zone is not None and zone not in allowed:
        message = f"leads to zone {zone}, replica {route.prefill} may send to {', '.join(allowed) or 'none'}"
        yield Violation(rule=Rule.ROUTE, where=where, message=message)
    sender, receiver = (plan.replicas[number].stages[0].gpu for number in (route.prefill, route.decode))
    if problem.model.on(sender) != problem.model.on(receiver):
        message = f"leads from {sender} to {receiver}, which hold the model in different precisions"
        yield Violation(rule=Rule.ROUTE, where=where, message=message)


def check_link_capacity(plan: Plan, problem: PlacementProblem, fleet: Fleet) -> list[Violation]:
    """Check the capacity of each direction of every link between zones.

    A unified replica's hop from one zone to another carries ``rate (Q + O) H s`` bytes/s, a route ``rate P L G kvb``.
    """
    model = problem.model
    workload = problem.workload.clipped_to(model.max_position)
    moments = workload.moments(block_tokens=problem.assumptions.block_tokens)
    hop_bytes = (moments.mean_computed + moments.mean_output) * model.hidden * model.activation_bytes
    kv_bytes = moments.mean_prompt * model.head_groups * model.kv_bytes_per_token_group() + model.state_bytes()
    kv_bytes *= model.num_layers
    load: defaultdict[tuple[str, str], float] = defaultdict(float)
    for here, there, rate in _hops(plan, fleet):
        load[here, there] += rate * hop_bytes
    for here, there, rate in _deliveries(plan, fleet):
        load[here, there] += rate * kv_bytes
    violations = []
    for (here, there), bytes_per_s in load.items():
        limit = problem.cluster.network.zone_link(here, there).bytes_per_s
        if bytes_per_s > limit * (1 + RELATIVE):
            message = f"replicas send {bytes_per_s:.6g} bytes/s, the link carries {limit:.6g} bytes/s"
            violations.append(Violation(rule=Rule.LINK_CAPACITY, where=f"zones {here} to {there}", message=message))
    return violations


def _hops(plan: Plan, fleet: Fleet) -> Iterator[tuple[str, str, float]]:
    """Yield zone pairs that activations cross, with their rate in requests/s."""
    for replica in plan.replicas:
        zones = [_zone_of(stage.devices, fleet) for stage in replica.stages]
        for here, there in pairwise(zones):
            if here is not None and there is not None and here != there:
                yield here, there, replica.rate


def _deliveries(plan: Plan, fleet: Fleet) -> Iterator[tuple[str, str, float]]:
    """Yield zone pairs that the KV of prompts crosses, with its rate in requests/s."""
    zones = [_zone_of(replica.devices(), fleet) for replica in plan.replicas]
    for route in plan.kv_routes:
        if 0 <= route.prefill < len(zones) and 0 <= route.decode < len(zones):  # others are reported elsewhere
            here, there = zones[route.prefill], zones[route.decode]
            if here is not None and there is not None and here != there:
                yield here, there, route.rate


def _zone_of(names: tuple[str, ...], fleet: Fleet) -> str | None:
    """Return the zone of the first device that exists; a stage in several zones is reported elsewhere."""
    return next((fleet.devices[name].group.zone for name in names if name in fleet.devices), None)
