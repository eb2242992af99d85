"""The result of a plan (family, value, bound, gap, status), the routes of its KV, and its table of device classes."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from hetis.solver.check.fleet import Fleet, slowest
from hetis.solver.check.violation import Rule, Violation
from hetis.solver.cluster import Link, NodeGroup
from hetis.solver.plan import KvRoute, ObjectiveKind, Plan, Role, Status
from hetis.solver.problem import PlacementProblem

# --- the KV of prompts: routes between prefill and decode replicas, and all traffic between zones


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


OPTIMAL_GAP = 1e-6
RELATIVE = 1e-6  # rounding of a value or a gap
BOUND_ROUNDING = 1e-9
UNIFIED_ALONE = "; every replica prefills and decodes"


def check_result(plan: Plan, problem: PlacementProblem, fleet: Fleet) -> list[Violation]:
    """Check that the value follows from the replicas, and that bound, gap and status contradict nothing."""
    violations = list(_check_objective(plan, problem))
    violations += _check_family(plan, problem)
    not_finite = list(_check_finite(plan))
    violations += not_finite
    if plan.result.status is Status.INFEASIBLE:
        if plan.replicas:
            violations.append(
                _violation(Rule.STATUS, f"status is infeasible, the plan has {len(plan.replicas)} replicas")
            )
        return violations
    if not not_finite and math.isfinite(served_rate(plan)):
        violations += _check_value(plan, problem, fleet)
        violations += _check_bound(plan, problem)
    return violations


def _violation(rule: Rule, message: str) -> Violation:
    return Violation(rule=rule, where="result", message=message)


def _check_objective(plan: Plan, problem: PlacementProblem) -> Iterator[Violation]:
    wanted, result = problem.objective, plan.result
    if plan.objective != wanted:
        yield _violation(Rule.OBJECTIVE, f"the plan is for {plan.objective}, the problem asks for {wanted}")
    if result.objective is not wanted.kind:
        yield _violation(Rule.OBJECTIVE, f"objective is {result.objective}, must be {wanted.kind}")
    if result.unit != wanted.unit:
        yield _violation(Rule.OBJECTIVE, f"unit is {result.unit}, must be {wanted.unit}")


def _check_family(plan: Plan, problem: PlacementProblem) -> Iterator[Violation]:
    """Check that the bound's family is the one that was searched, in the same words.

    Plans from before the introduction of roles do not mention them: all their replicas are unified.
    """
    family = problem.describe_family()
    if plan.family not in (family, family.removesuffix(UNIFIED_ALONE)):
        yield _violation(Rule.FAMILY, f'family is "{plan.family}", strategy {plan.strategy} searches "{family}"')


def _check_finite(plan: Plan) -> Iterator[Violation]:
    result = plan.result
    for name, value in (
        ("value", result.value),
        ("bound", result.bound),
        ("gap", result.gap),
        ("solve_s", result.solve_s),
    ):
        if not 0 <= value < math.inf:
            yield _violation(Rule.FINITE, f"{name} is {value}, must be finite and >= 0")
    for price in plan.prices:
        if not 0 <= price.dual < math.inf:
            message = f"dual of {price.gpu} in {price.zone} is {price.dual}, must be finite and >= 0"
            yield _violation(Rule.FINITE, message)
    for runner_up in plan.runners_up:
        if not 0 <= runner_up.rate < math.inf:
            message = f"rate of the runner-up {runner_up.shape} is {runner_up.rate} requests/s, must be finite and >= 0"
            yield _violation(Rule.FINITE, message)


def _check_value(plan: Plan, problem: PlacementProblem, fleet: Fleet) -> Iterator[Violation]:
    objective, claimed = problem.objective, plan.result.value
    rate = served_rate(plan)
    goodput = problem.assumptions.planned_utilisation * rate
    names = list(dict.fromkeys(name for replica in plan.replicas for name in replica.devices()))
    value = {
        ObjectiveKind.GOODPUT: goodput,
        ObjectiveKind.THROUGHPUT: rate,
        ObjectiveKind.COST: _usd_per_hour(names, fleet),
        ObjectiveKind.GPUS: float(len(names)),
    }[objective.kind]
    if not math.isclose(claimed, value, rel_tol=RELATIVE, abs_tol=1e-12):
        message = f"value is {claimed:.9g} {objective.unit}, {_who(plan)} {value:.9g} {objective.unit}"
        yield _violation(Rule.VALUE, message)
    demand = objective.demand_rps
    if not objective.maximises and demand is not None and goodput < demand * (1 - BOUND_ROUNDING):
        yield _violation(Rule.DEMAND, f"goodput is {goodput:.9g} requests/s, the demand is {demand:.9g} requests/s")


def _who(plan: Plan) -> str:
    return "the replicas and routes give" if plan.kv_routes else "the replicas give"


def _usd_per_hour(names: list[str], fleet: Fleet) -> float:
    """Return the price of these devices; one that does not exist costs nothing (it is reported elsewhere)."""
    total = 0.0
    for name in names:
        device = fleet.devices.get(name)
        if device is not None:
            total += _price_at(fleet, device.group, device.index)
    return total


def _price_at(fleet: Fleet, group: NodeGroup, index: int) -> float:
    """Return the price of the GPU at an index of a node; indices count through the node's slots in order."""
    for slots in group.gpus:
        if index < slots.count:
            return fleet.cluster.price_of(slots) or 0.0
        index -= slots.count
    raise AssertionError(f"node group {group.name} has no GPU {index}")


def _check_bound(plan: Plan, problem: PlacementProblem) -> Iterator[Violation]:
    result = plan.result
    over = result.value - result.bound if problem.objective.maximises else result.bound - result.value
    if over > BOUND_ROUNDING * abs(result.value):
        side = ">=" if problem.objective.maximises else "<="
        message = f"bound is {result.bound:.12g} {result.unit}, must be {side} the value {result.value:.12g}"
        yield _violation(Rule.BOUND, message)
        return
    distance = abs(result.bound - result.value)
    gap = distance / abs(result.value) if result.value else (math.inf if distance else 0.0)
    if not math.isclose(result.gap, gap, rel_tol=RELATIVE, abs_tol=BOUND_ROUNDING):
        yield _violation(Rule.GAP, f"gap is {result.gap:.9g}, |bound - value| / |value| is {gap:.9g}")
    elif result.status is Status.OPTIMAL and gap > OPTIMAL_GAP * (1 + RELATIVE):
        yield _violation(Rule.STATUS, f"status is optimal at a gap of {gap:.9g}, the limit is {OPTIMAL_GAP:.9g}")


# --- the class table: a row for every device class, which counts its GPUs and those that the plan uses


class Row(NamedTuple):
    """The contents of a row; device classes that differ only in links or price have equal rows."""

    gpu: str
    zone: str
    gpus_per_node: int
    available: int
    used: int  # by the plan, in any role
    as_attention_workers: int

    def __str__(self) -> str:
        return (
            f"{self.gpu} x{self.gpus_per_node} in {self.zone}, {self.available} available, {self.used} used, "
            f"{self.as_attention_workers} attention workers"
        )


def check_class_table(plan: Plan, fleet: Fleet) -> list[Violation]:
    """Check that the table has one row for every device class, with the cluster's GPUs and those in use."""
    if plan.result.status is Status.INFEASIBLE and not plan.prices:
        return []
    says = Counter(
        Row(row.gpu, row.zone, row.gpus_per_node, row.available, row.used, row.as_attention_workers)
        for row in plan.prices
    )
    has = Counter(_rows(plan, fleet))
    return [
        Violation(rule=Rule.PRICES, where="class table", message=f"{word} row {row}")
        for word, rows in (("has no", has - says), ("has a wrong", says - has))
        for row in rows.elements()
    ]


def _rows(plan: Plan, fleet: Fleet) -> Iterator[Row]:
    """Yield the rows that the table must have."""
    workers = {name for r in plan.replicas for pool in r.attention_workers for name in pool.devices}
    used = workers | {name for r in plan.replicas for stage in r.stages for name in stage.devices}
    classes: defaultdict[EqualDevices, list[str]] = defaultdict(list)
    class_of: dict[tuple[str, str], EqualDevices] = {}
    explicit = _worst_node_links(fleet)
    for name, device in fleet.devices.items():
        kind = (device.group.name, device.gpu)
        if kind not in class_of:
            class_of[kind] = _class_of(device.group, device.gpu, fleet, explicit)
        classes[class_of[kind]].append(name)
    for device_class, names in classes.items():
        yield Row(
            device_class.gpu,
            device_class.zone,
            device_class.gpus_per_node,
            len(names),
            len(used.intersection(names)),
            len(workers.intersection(names)),
        )


class EqualDevices(NamedTuple):
    """GPUs that no number of a plan distinguishes."""

    gpu: str
    zone: str
    gpus_per_node: int
    nic: Link
    intra_link: Link
    usd_per_hour: float | None
    node_link: Link | None  # the worst explicit link of its nodes


def _class_of(group: NodeGroup, gpu: str, fleet: Fleet, explicit: dict[str, Link]) -> EqualDevices:
    slots = [slots for slots in group.gpus if slots.gpu == gpu]
    count, prices = sum(s.count for s in slots), [fleet.cluster.price_of(s) for s in slots]
    known = [price * s.count for price, s in zip(prices, slots, strict=True) if price is not None]
    nodes = [group.node_name(i) for i in range(group.count)] if explicit else []
    links = [explicit[node] for node in nodes if node in explicit]
    return EqualDevices(
        gpu=gpu,
        zone=group.zone,
        gpus_per_node=count,
        nic=group.nic or fleet.cluster.network.default,
        intra_link=group.intra_link or fleet.board_link(gpu),
        usd_per_hour=None if None in prices else round(sum(known) / count, 9),
        node_link=slowest(links) if links else None,
    )


def _worst_node_links(fleet: Fleet) -> dict[str, Link]:
    """Return the worst explicit link of every node that has one."""
    worst: dict[str, Link] = {}
    for pair, link in fleet.cluster.network.between_nodes.items():
        for node in pair:
            worst[node] = slowest([worst.get(node, link), link])
    return worst
