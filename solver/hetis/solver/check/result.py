"""The result of a plan (family, value, bound, gap, status), the routes of its KV, and its table of device classes."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from typing import NamedTuple

from hetis.solver.check.replica_shapes import Fleet, is_in, slowest
from hetis.solver.check.violation import Broken, Rule, Violation, at
from hetis.solver.cluster import Link, NodeGroup
from hetis.solver.constraints import Duty, RestrictRole, Selected, in_words
from hetis.solver.model import ModelSpec
from hetis.solver.plan import ClassPrice, KvRoute, Plan, Role, Status
from hetis.solver.problem import APART, EXPLICIT_LINKS, LINKS_TO_ANY, OWN_LINKS, QUICK_LINKS, Build, PlacementProblem

_Kind = tuple[ModelSpec, str]  # the model in one precision, and the vendors between which its KV may go
OPTIMAL_GAP = 1e-6
RELATIVE = 1e-6  # rounding of a value or a gap
BOUND_ROUNDING = 1e-9
MOST_UTILISATION = 0.99  # queues of a saturated plan have no end
UNIFIED_ALONE = "; every replica prefills and decodes"

# --- the KV of prompts: routes between prefill and decode replicas, and all traffic between zones


def served_rate(plan: Plan) -> float:
    """Return the requests/s that a plan completes: those of unified replicas, and those that its routes carry."""
    ends = [(route.prefill, route.rate) for route in plan.kv_routes if 0 <= route.prefill < len(plan.replicas)]
    parts = [(replica.classes, replica.rate) for replica in plan.replicas if replica.role is Role.UNIFIED]
    parts += [(plan.replicas[number].classes, rate) for number, rate in ends]
    return served_of_all({one.name: one.share for one in plan.classes}, parts)


def served_of_all(share_of: Mapping[str, float], parts: Iterable[tuple[tuple[str, ...], float]]) -> float:
    """Return the requests/s of all classes that are served by ``parts`` for the classes named (none: all) together.

    Each class has its share of the requests of every part that serves it, in proportion to the classes there; the class
    of which the least is served limits them all.
    """
    if not share_of:
        return sum(rate for _, rate in parts)
    of_class = dict.fromkeys(share_of, 0.0)
    for classes, rate in parts:
        own = {name: share_of.get(name, 0.0) for name in classes or share_of}
        for name in own.keys() & of_class.keys():
            of_class[name] += rate * own[name] / sum(own.values())
    return min(rate / share_of[name] for name, rate in of_class.items())


def check_classes(plan: Plan, problem: PlacementProblem) -> list[Violation]:
    """Check the classes of requests: their bounds and shares, and that a pool serves one of them, or all."""
    shares = {one.name: 0.0 for one in problem.workload.classes}
    for one in problem.workload.bins if shares else ():
        bounds = ((each.name, each.max_prompt_tokens) for each in problem.workload.classes)
        shares[next(name for name, most in bounds if most is None or one.prompt_tokens <= most)] += one.weight
    wanted = [
        (each.name, each.max_prompt_tokens, shares[each.name] / sum(shares.values()))
        for each in problem.workload.classes
    ]
    stated = [(one.name, one.max_prompt_tokens, one.share) for one in plan.classes]
    violations: list[Violation] = []
    if [one[:2] for one in stated] != [one[:2] for one in wanted]:
        message = (
            f"are {[one[:2] for one in stated] or 'none'}, the workload has {[one[:2] for one in wanted] or 'none'}"
        )
        violations += at("classes", [(Rule.CLASSES, message)])
    else:
        for (name, _, said), (_, _, share) in zip(stated, wanted, strict=True):
            if not math.isclose(said, share, rel_tol=RELATIVE):
                message = f"has a share of {said:.9g} of the requests, the workload has {share:.9g}"
                violations += at(f"class {name}", [(Rule.CLASSES, message)])
    for number, replica in enumerate(plan.replicas):
        if replica.classes and (len(replica.classes) > 1 or replica.classes[0] not in shares):
            message = f"serves {', '.join(replica.classes)}, must be for one class of the workload, or for all"
            violations += at(f"replica {number}", [(Rule.CLASSES, message)])
    return violations


def check_routes(plan: Plan, problem: PlacementProblem, fleet: Fleet) -> list[Violation]:
    """Check that every route joins compatible replicas, and that no replica sends or receives more than its rate."""
    violations: list[Violation] = []
    flow: defaultdict[int, float] = defaultdict(float)
    seen: dict[tuple[int, int], int] = {}
    kinds = cache(partial(_computing_kinds, problem, fleet))
    for number, route in enumerate(plan.kv_routes):
        broken = list(_check_route(route, plan, problem, fleet, kinds))
        pair = (route.prefill, route.decode)
        if not broken and pair in seen:
            message = f"leads from replica {route.prefill} to {route.decode} like route {seen[pair]}, a pair has 1"
            broken.append((Rule.ROUTE, message))
        violations += at(f"route {number}", broken)
        seen.setdefault(pair, number)
        if not broken:
            flow[route.prefill] += route.rate
            flow[route.decode] += route.rate
    for number, rate in sorted(flow.items()):
        replica = plan.replicas[number]
        share = plan.result.prefill_load if replica.role is Role.PREFILL else 1.0
        if rate > share * replica.rate * (1 + RELATIVE):
            message = f"routes take {rate:.9g} requests/s, the {replica.role} replica's rate is {replica.rate:.9g}"
            message += f", of which it is sent {share:.9g}" if share < 1.0 else ""
            violations += at(f"replica {number}", [(Rule.ROUTE_RATE, message)])
    return violations


def _check_route(
    route: KvRoute, plan: Plan, problem: PlacementProblem, fleet: Fleet, kinds: Callable[[], set[_Kind]]
) -> Iterator[Broken]:
    if not 0 < route.rate < math.inf:
        yield Rule.FINITE, f"rate is {route.rate} requests/s, must be finite and > 0"
    wrong = []
    for role, number in ((Role.PREFILL, route.prefill), (Role.DECODE, route.decode)):
        if not 0 <= number < len(plan.replicas):
            wrong.append((Rule.ROUTE, f"{role} is replica {number}, the plan has {len(plan.replicas)}"))
        elif plan.replicas[number].role is not role:
            wrong.append((Rule.ROUTE, f"{role} is replica {number}, which is {plan.replicas[number].role}"))
    yield from wrong
    if wrong:
        return
    sender, receiver = plan.replicas[route.prefill], plan.replicas[route.decode]
    if not sender.stages or not receiver.stages:
        return  # a replica without layers is reported by `check_replica_structure`
    zone = _zone_of(receiver.devices(), fleet)
    if zone is not None and zone not in sender.kv_zones:
        allowed = ", ".join(sender.kv_zones) or "none"
        yield Rule.ROUTE, f"leads to zone {zone}, replica {route.prefill} may send to {allowed}"
    if sender.classes != receiver.classes:
        ends = (" and ".join(one.classes) or "all requests" for one in (sender, receiver))
        yield Rule.ROUTE, "leads from a replica for {} to one for {}".format(*ends)
    gpus = [replica.stages[0].gpu for replica in (sender, receiver)]
    if problem.model.on(gpus[0]) != problem.model.on(gpus[1]):
        yield Rule.ROUTE, f"leads from {gpus[0]} to {gpus[1]}, which hold the model in different precisions"
    if problem.family.engine is None:
        return
    types = problem.cluster.gpu_types
    known = [gpu for gpu in gpus if gpu in types]
    if len({_kind_of(gpu, problem) for gpu in known}) > 1:
        named = " to ".join(f"{gpu} ({types[gpu].vendor})" for gpu in known)
        yield Rule.ROUTE, f"leads from {named}, must stay with one vendor"
    if (own := _zone_of(sender.devices(), fleet)) != zone and len(kinds()) > 1:
        yield (
            Rule.ROUTE,
            f"leads from zone {own} to {zone}, must stay in one: GPUs of {len(kinds())} vendors or precisions compute",
        )


def _kind_of(gpu: str, problem: PlacementProblem) -> _Kind:
    """Return what a GPU's KV has in common with that of those with which it may be exchanged."""
    model, vendor = problem.model.on(gpu), problem.cluster.gpu_types[gpu].vendor
    return problem.kv_of(Build(model, vendor))


def _computing_kinds(problem: PlacementProblem, fleet: Fleet) -> set[_Kind]:
    """Return the kinds of KV of the GPUs that may compute layers."""

    def kinds_of(names: Iterable[str]) -> set[_Kind]:
        return {_kind_of(gpu, problem) for gpu in names}

    everywhere = kinds_of(problem.cluster.types_used())
    if len(everywhere) < 2:
        return everywhere
    barring = Selected(c.gpus for c in problem.constraints if isinstance(c, RestrictRole) and Duty.PRIMARY in c.barred)
    able = (device for device in fleet.devices.values() if not is_in(barring, device))
    return kinds_of({device.gpu for device in able})


def check_link_capacity(plan: Plan, problem: PlacementProblem, fleet: Fleet) -> list[Violation]:
    """Check the capacity of each direction of every link between zones.

    A unified replica's hop from one zone to another carries ``rate (Q + O) H s`` bytes/s, a route ``rate P L G kvb``.
    """
    model = problem.model  # in any precision: hops carry activations
    numbers = model.residual_streams * model.hidden
    of_ranges = {names: problem.of_classes(names).moments() for names in problem.ranges()}
    load: defaultdict[tuple[str | None, str | None], float] = defaultdict(float)
    for replica in plan.replicas:
        moments = of_ranges.get(replica.classes, of_ranges[()])
        hop_bytes = (moments.mean_computed + moments.mean_output) * numbers * model.activation_bytes
        for pair in pairwise(_zone_of(stage.devices, fleet) for stage in replica.stages):
            load[pair] += replica.rate * hop_bytes
    zones = [_zone_of(replica.devices(), fleet) for replica in plan.replicas]
    for route in plan.kv_routes:
        if not (0 <= route.prefill < len(zones) and 0 <= route.decode < len(zones)):
            continue  # reported elsewhere, as are replicas without stages
        if zones[route.prefill] is not None:
            sender = plan.replicas[route.prefill]
            own, moments = problem.model.on(sender.stages[0].gpu), of_ranges.get(sender.classes, of_ranges[()])
            kv_bytes = moments.mean_prompt * own.head_groups * own.kv_bytes_per_token_group() + own.state_bytes()
            load[zones[route.prefill], zones[route.decode]] += route.rate * own.num_layers * kv_bytes
    violations: list[Violation] = []
    for (here, there), bytes_per_s in load.items():
        if here is not None and there is not None and here != there:
            limit = problem.cluster.network.zone_link(here, there).bytes_per_s
            if bytes_per_s > limit * (1 + RELATIVE):
                message = f"replicas send {bytes_per_s:.6g} bytes/s, the link carries {limit:.6g} bytes/s"
                violations += at(f"zones {here} to {there}", [(Rule.LINK_CAPACITY, message)])
    return violations


def _zone_of(names: tuple[str, ...], fleet: Fleet) -> str | None:
    """Return the zone of the first device that exists; a stage in several zones is reported elsewhere."""
    return next((fleet.devices[name].group.zone for name in names if name in fleet.devices), None)


# --- value, bound, gap and status


def check_result(plan: Plan, problem: PlacementProblem, fleet: Fleet) -> list[Violation]:
    """Check that the value follows from the replicas, and that bound, gap and status are consistent."""
    not_finite = list(_check_finite(plan))
    violations = at("result", _check_question(plan, problem), not_finite)
    if plan.result.status is Status.INFEASIBLE:
        return violations + at("result", _check_infeasible(plan))
    if not not_finite and math.isfinite(served_rate(plan)):
        violations += at("result", _check_value(plan, problem, fleet), _check_bound(plan, problem))
    return violations


def _check_infeasible(plan: Plan) -> Iterator[Broken]:
    """Check that a plan that says that none exists has no replicas, and is worth nothing."""
    if plan.replicas:
        yield Rule.STATUS, f"status is infeasible, the plan has {len(plan.replicas)} replicas"
    result = plan.result
    for name, value in (("value", result.value), ("bound", result.bound), ("gap", result.gap)):
        if value:
            yield Rule.STATUS, f"status is infeasible, {name} is {value:.9g}, must be 0"


def _check_question(plan: Plan, problem: PlacementProblem) -> Iterator[Broken]:
    """Check that the plan matches the problem: the objective, and the wording of the bound's family.

    Plans from before the introduction of roles do not mention them: all their replicas are unified. Likewise, older
    plans with several precisions, and those of tenants, do not mention that GPUs of several kinds stay apart, and how
    explicit links count was another or not mentioned. A file does not tell which constraints come from the engine, so
    both of their wordings are the same.
    """
    wanted, result = problem.objective, plan.result
    if plan.objective != wanted:
        yield Rule.OBJECTIVE, f"the plan is for {plan.objective}, the problem asks for {wanted}"
    if result.objective is not wanted.kind:
        yield Rule.OBJECTIVE, f"objective is {result.objective}, must be {wanted.kind}"
    if result.unit != wanted.unit:
        yield Rule.OBJECTIVE, f"unit is {result.unit}, must be {wanted.unit}"
    family = _with_options(problem.describe_family(), problem)
    earlier = _without_links(family)
    said = _without_links(_with_options(plan.family, problem))
    if said not in (earlier, earlier.removesuffix(UNIFIED_ALONE), earlier.replace(f"; {APART}", "")):
        yield Rule.FAMILY, f'family is "{plan.family}", strategy {plan.strategy} searches "{family}"'


def _without_links(family: str) -> str:
    """Return the description of a family without that of explicit links, which earlier plans had otherwise or not."""
    for links in (EXPLICIT_LINKS, LINKS_TO_ANY, OWN_LINKS, QUICK_LINKS):
        family = family.replace(f"; {links}", "")
    return family


def _with_options(family: str, problem: PlacementProblem) -> str:
    """Return the description of a family with the engine's constraints as options."""
    engine = problem.family.engine
    options = {in_words(each, engine.name): str(each) for each in problem.constraints} if engine is not None else {}
    return "; ".join(options.get(part, part) for part in family.split("; "))


def _check_finite(plan: Plan) -> Iterator[Broken]:
    result = plan.result
    numbers = [("value", result.value), ("bound", result.bound), ("gap", result.gap), ("solve_s", result.solve_s)]
    numbers += [(f"dual of {price.gpu} in {price.zone}", price.dual) for price in plan.prices]
    if not 0 <= result.utilisation <= MOST_UTILISATION:
        yield Rule.VALUE, f"utilisation is {result.utilisation:.9g}, must be from 0 to {MOST_UTILISATION:g}"
    if not 0 < result.prefill_load <= 1:
        yield Rule.VALUE, f"load of prefill replicas is {result.prefill_load:.9g}, must be above 0 and at most 1"
    replicas = Counter(one.role for one in plan.replicas)
    for role, lanes in ((Role.UNIFIED, result.unified_lanes), (Role.PREFILL, result.prefill_lanes)):
        if not 1 <= lanes <= max(1, replicas[role]):
            yield Rule.VALUE, f"{lanes} {role} replicas share prompts, the plan has {replicas[role]}"
    for name, value in numbers:
        if name == "gap" and not result.value and value == math.inf:
            continue  # nothing is kept of a bound that is not 0
        if not 0 <= value < math.inf:
            yield Rule.FINITE, f"{name} is {value}, must be finite and >= 0"
    for one in plan.runners_up:
        if not 0 <= one.rate < math.inf:
            yield Rule.FINITE, f"rate of the runner-up {one.shape} is {one.rate} requests/s, must be finite and >= 0"


def _check_value(plan: Plan, problem: PlacementProblem, fleet: Fleet) -> Iterator[Broken]:
    objective, claimed = problem.objective, plan.result.value
    rate = served_rate(plan)
    goodput = plan.result.utilisation * rate
    goal = objective.kind.goal
    if goal.maximises:
        value = goodput if goal.is_planned else rate
    else:
        known = [(fleet.devices[name].gpu, name) for name in plan.devices() if name in fleet.devices]
        value = sum(goal.cost(problem.cluster.gpu_types[gpu], fleet.usd_per_hour(name)) for gpu, name in known)
    if not math.isclose(claimed, value, rel_tol=RELATIVE, abs_tol=1e-12):
        who = "the replicas and routes give" if plan.kv_routes else "the replicas give"
        yield Rule.VALUE, f"value is {claimed:.9g} {objective.unit}, {who} {value:.9g} {objective.unit}"
    demand = objective.demand_rps
    if not objective.maximises and demand is not None and goodput < demand * (1 - BOUND_ROUNDING):
        yield Rule.DEMAND, f"goodput is {goodput:.9g} requests/s, the demand is {demand:.9g} requests/s"


def _check_bound(plan: Plan, problem: PlacementProblem) -> Iterator[Broken]:
    result, maximises = plan.result, problem.objective.maximises
    over = result.value - result.bound if maximises else result.bound - result.value
    if over > BOUND_ROUNDING * abs(result.value):
        side = ">=" if maximises else "<="
        message = f"bound is {result.bound:.12g} {result.unit}, must be {side} the value {result.value:.12g}"
        yield Rule.BOUND, message
        return
    distance = abs(result.bound - result.value)
    gap = distance / abs(result.value) if result.value else (math.inf if distance else 0.0)
    if not math.isclose(result.gap, gap, rel_tol=RELATIVE, abs_tol=BOUND_ROUNDING):
        yield Rule.GAP, f"gap is {result.gap:.9g}, |bound - value| / |value| is {gap:.9g}"
    elif result.status is Status.OPTIMAL and gap > OPTIMAL_GAP * (1 + RELATIVE):
        yield Rule.STATUS, f"status is optimal at a gap of {gap:.9g}, the limit is {OPTIMAL_GAP:.9g}"


# --- the class table: a row for every device class, which counts its GPUs and those that the plan uses


def check_class_table(plan: Plan, fleet: Fleet) -> list[Violation]:
    """Check that the table has one row for every device class, with the cluster's GPUs and those in use."""
    if plan.result.status is Status.INFEASIBLE and not plan.prices:
        return []
    says = Counter(replace(row, dual=0.0) for row in plan.prices)
    has = Counter(_rows(plan, fleet))
    said = [f"has no row {_described(row)}" for row in (has - says).elements()]
    said += [f"has a {'second' if row in has else 'wrong'} row {_described(row)}" for row in (says - has).elements()]
    return at("class table", ((Rule.PRICES, words) for words in said))


def _described(row: ClassPrice) -> str:
    return (
        f"{row.gpu} x{row.gpus_per_node} in {row.zone}, {row.available} available, {row.used} used, "
        f"{row.as_attention_workers} attention workers"
    )


def _rows(plan: Plan, fleet: Fleet) -> Iterator[ClassPrice]:
    """Yield the rows that the table must have, without prices: classes that differ only in links have equal rows."""
    workers = {name for replica in plan.replicas for name in replica.worker_devices()}
    used = set(plan.devices())
    classes: defaultdict[EqualDevices, list[str]] = defaultdict(list)
    class_of: dict[tuple[str, str], EqualDevices] = {}
    explicit = _worst_node_links(fleet)
    for name, device in fleet.devices.items():
        kind = (device.group.name, device.gpu)
        if kind not in class_of:
            class_of[kind] = _class_of(device.group, device.gpu, fleet, explicit)
        classes[class_of[kind]].append(name)
    for device_class, names in classes.items():
        yield ClassPrice(
            gpu=device_class.gpu, zone=device_class.zone, gpus_per_node=device_class.gpus_per_node,
            available=len(names), used=len(used.intersection(names)),
            as_attention_workers=len(workers.intersection(names)), dual=0.0,
        )  # fmt: skip


class EqualDevices(NamedTuple):
    """GPUs that are interchangeable in every number of a plan."""

    gpu: str
    zone: str
    gpus_per_node: int
    nic: Link
    intra_link: Link
    usd_per_hour: float | None
    reserved_bytes: int
    node_link: Link | None  # worst explicit link of its nodes


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
        reserved_bytes=group.reserved_bytes(gpu),
        node_link=slowest(links) if links else None,
    )


def _worst_node_links(fleet: Fleet) -> dict[str, Link]:
    """Return the worst explicit link of every node that has one."""
    worst: dict[str, Link] = {}
    for pair, link in fleet.cluster.network.between_nodes.items():
        for node in pair:
            worst[node] = slowest([worst.get(node, link), link])
    return worst
