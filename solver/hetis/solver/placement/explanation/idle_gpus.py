"""Why GPUs are idle: their marginal worth, why they form no replica of their own, what they would do to another."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from hetis.solver.check.replica_shapes import left_out_by
from hetis.solver.cluster import Cluster
from hetis.solver.constraints import Exclude
from hetis.solver.cost import DeviceCost, rank_shape
from hetis.solver.errors import InvalidProblemError
from hetis.solver.mixes import LargestBatch, state_bytes_per_copy
from hetis.solver.placement.explanation.facts import IdleGpus
from hetis.solver.placement.explanation.replica_view import ReplicaView, main_view
from hetis.solver.placement.families import STRATEGIES
from hetis.solver.placement.fleet import DeviceClass, Part, device_classes
from hetis.solver.placement.wording import in_percent, in_time, in_time_above, num_layers, stage_name
from hetis.solver.plan import ClassPrice, Plan
from hetis.solver.problem import PlacementProblem

NOTHING = 1e-6  # share of the objective below which a dual counts as 0


def why_idle(plan: Plan, problem: PlacementProblem, views: tuple[ReplicaView, ...]) -> Iterator[IdleGpus]:
    """Yield the idle GPUs of every class with the reasons."""
    for each in idle_classes(plan, problem.cluster):
        forbidden, idle = _forbidden(problem, each.device_class), each.idle
        reasons = [f"{forbidden:,} of them are forbidden"] if 0 < forbidden < idle else []
        reasons += (
            _reasons(plan, problem, views, each) if forbidden < idle else [_why_forbidden(problem, each.price.gpu)]
        )
        yield IdleGpus(gpu=each.price.gpu, zone=each.price.zone, count=idle, reason="; ".join(reasons))


def _forbidden(problem: PlacementProblem, device_class: DeviceClass) -> int:
    """Return the number of GPUs of a class that a constraint excludes."""
    if not any(isinstance(each, Exclude) for each in problem.constraints):
        return 0
    is_out, groups = left_out_by(problem.constraints), {group.name for group in device_class.groups}
    of_class = (d for d in problem.cluster.devices() if d.group.name in groups and d.gpu == device_class.gpu)
    return sum(map(is_out, of_class))


def _why_forbidden(problem: PlacementProblem, gpu: str) -> str:
    """Return who excludes all GPUs of a class: an engine excludes whole types."""
    by = next(
        (one.by for one in problem.constraints if isinstance(one, Exclude) and one.by and one.gpus.name == gpu), ""
    )
    return f"{by} does not run this model on them" if by else "they are forbidden"


class IdleClass(NamedTuple):
    """A class with idle GPUs, its price, and their number."""

    price: ClassPrice
    device_class: DeviceClass
    idle: int


def idle_classes(plan: Plan, cluster: Cluster) -> list[IdleClass]:
    """Return the classes with GPUs that neither the plan nor another tenant uses."""
    of_plan = zip(_classes_of(plan, cluster), held_by_class(plan, cluster), strict=True)
    found = [IdleClass(price, own, price.available - price.used - held) for (price, own), held in of_plan]
    return [each for each in found if each.idle > 0]


def held_by_class(plan: Plan, cluster: Cluster) -> list[int]:
    """Return how many GPUs of each of ``plan.prices`` other tenants hold."""
    names, classes = plan.held_by_others(), _classes_of(plan, cluster)
    if not names:
        return [0] * len(classes)
    held = Counter((device.group.name, device.gpu) for device in cluster.devices() if device.name in names)
    return [sum(held[group.name, own.gpu] for group in own.groups) for _, own in classes]


def _classes_of(plan: Plan, cluster: Cluster) -> list[tuple[ClassPrice, DeviceClass]]:
    """Return the class of each of ``plan.prices``; a plan's table lists the classes in order."""
    classes = list(device_classes(cluster))
    found = []
    for price in plan.prices:
        same = [c for c in classes if (c.gpu, c.zone, c.gpus_per_node) == (price.gpu, price.zone, price.gpus_per_node)]
        if not same:
            raise InvalidProblemError(f"plan has a price for {price.gpu} in {price.zone}, the cluster has no such GPUs")
        exact = [c for c in same if c.available == price.available] or same
        classes.remove(exact[0])
        found.append((price, exact[0]))
    return found


def _reasons(plan: Plan, problem: PlacementProblem, views: tuple[ReplicaView, ...], of: IdleClass) -> Iterator[str]:
    price, device_class, idle = of
    unit, demand_rps = plan.objective.unit, plan.objective.demand_rps
    if demand_rps is not None and _meets(demand_rps, plan, problem):
        yield f"by the model, the demand of {demand_rps:g} requests/s is met without them"
    elif STRATEGIES[plan.strategy].is_published:
        yield f"{plan.strategy} left them idle: a published heuristic has no prices that explain why"
    elif not plan.has_prices():
        yield "no tenant's share has them: the shares were found without prices, so what one is worth is unknown"
    elif price.dual <= NOTHING * abs(plan.result.value):
        # Of the relaxation alone, even if the bound is reached: one more GPU may make room for a larger replica.
        yield "their marginal price is 0: they are not scarce if fractions of replicas are allowed"
    else:
        yield f"each is worth {price.dual:.3g} {unit} at the margin, but the plan's whole replicas leave them idle"
    if views:
        view = main_view(views)
        yield from _alone(replace(view, problem=problem.in_precision_of(device_class.gpu)), device_class, idle)
        main = view.shape.stages[0].gpu
        theirs, its = problem.build_of(device_class.gpu), problem.build_of(main)
        if theirs.model != its.model:
            yield f"they hold the model in a different precision than {main}"
        elif theirs.vendor != its.vendor:
            yield f"they are {theirs.vendor}'s, and an engine's replica has GPUs of one vendor"
        else:
            yield from _joining(view, device_class, idle)
    if plan.result.gap > NOTHING and not plan.other_tenants():  # a tenant's gap is to the whole fleet to itself
        yield f"a gap of {in_percent(plan.result.gap)} remains, so that a use for them may exist"


def _meets(demand_rps: float, plan: Plan, problem: PlacementProblem) -> bool:
    """Return whether a plan reaches the demand; one of the highest rate may fall short of it."""
    if not plan.objective.maximises:
        return True
    return plan.planned_rate() >= demand_rps * (1 - NOTHING)


def _costs(view: ReplicaView, device_class: DeviceClass, idle: int) -> list[DeviceCost]:
    """Return the costs of one TP group of every size that ``idle`` GPUs allow."""
    sizes = [n for n in view.problem.family.tp_sizes if n <= min(idle, device_class.gpus_per_node)]
    usable = [n for n in sizes if rank_shape(view.problem.model, n) is not None]
    return [view.cost(device_class.gpu, n, device_class.intra, 1, device_class.reserved_bytes) for n in usable]


def _alone(view: ReplicaView, device_class: DeviceClass, idle: int) -> Iterator[str]:
    """Yield why these GPUs form no replica of their own, if a single line can prove it."""
    model, family, limit_s = view.problem.model, view.problem.family, view.problem.objective.tpot_limit_s
    # A replica of one role processes only one kind of tokens.
    least = (min(family.micro_batches), min(family.chunk_tokens))
    tokens = min(least) if family.splits_roles else sum(least)
    costs = _costs(view, device_class, idle)
    if not costs:
        return
    batch = LargestBatch(tokens, 1, 1, 1)
    fit = {c: max(0, math.floor((c.room_bytes() - c.activation_bytes(batch)) / c.layer_bytes())) for c in costs}
    held = math.floor(max(idle * layers / c.shape.tp for c, layers in fit.items()))
    repeated = model.num_layers - model.prefix_layers
    if held < repeated:
        prefix = model.prefix_layers
        layers = f"the {repeated} layers after the first {prefix}" if prefix else f"{repeated} layers"
        yield f"the {idle:,} idle hold at most {held} of {layers}, without KV"
        return
    # TPOT is at least one plain iteration of one request divided by the tokens that it adds.
    fastest = min(costs, key=lambda c: c.dense_s(1) + c.reduces_s(1))
    token_s = repeated * (fastest.dense_s(1) + fastest.reduces_s(1)) / model.emitted_tokens
    if limit_s is not None and token_s > limit_s:
        took = in_time_above(token_s, limit_s)
        could = ": they could only prefill" if family.splits_roles else ""
        yield f"alone, they take at least {took} per token (TP{fastest.shape.tp}), limit {in_time(limit_s)}{could}"


def _joining(view: ReplicaView, device_class: DeviceClass, idle: int) -> Iterator[str]:
    """Yield what moving layers onto these GPUs would do to the plan's main replica."""
    model, limit_s, mix = view.problem.model, view.problem.objective.tpot_limit_s, view.mix
    zones = tuple(dict.fromkeys((*view.fleet.zones_of(view.replica.devices()), device_class.zone)))
    link = device_class.link_in(view.problem.cluster, Part(zones))
    busiest = view.busiest()
    stage = view.shape.stages[busiest.stage]
    there_s = _layer_s(view, view.stage_cost(stage))
    tried = []
    for cost in _costs(view, device_class, idle):
        room = cost.room_bytes() - cost.activation_bytes(LargestBatch.of(mix, view.shape.in_flight))
        kv_bytes = cost.shape.groups * model.kv_bytes_per_token_group() * view.kv_tokens(1)
        states = state_bytes_per_copy(model, mix, view.shape.in_flight)
        kv_bytes += states / model.state_ranks(cost.shape.tp)
        layers = min(math.floor(room / (cost.layer_bytes() + kv_bytes)), view.layers(busiest.stage))
        if layers > 0:
            tried.append((_layer_s(view, cost), layers, cost))
    if not tried:
        yield f"beside the KV of {view.requests(1)} requests no layer fits on one"
        return
    layer_s, layers, cost = min(tried, key=lambda each: each[0])
    name = f"{device_class.gpu} TP{cost.shape.tp}"
    tpot = 1.0 / (mix.iterations * model.emitted_tokens)  # of a round trip's seconds per request
    work = f"at b = {mix.micro_batch}, {num_layers(layers)} cost a token {in_time(tpot * layers * layer_s)} on {name}"
    work += f", {in_time(tpot * layers * there_s)} on {stage_name(view.shape, stage)}"
    if limit_s is None:
        yield work
        return
    b, C = mix.micro_batch, mix.chunk_tokens
    added_s = layers * (layer_s - there_s)
    added_s += view.per_request(cost.hop_s(b + C, link) + cost.step_s(b + C), cost.hop_s(b, link) + cost.step_s(b))
    tpot_s = (1 + view.least_slack()) * tpot * (sum(part.total_s for part in view.times()) + added_s)
    if tpot_s > limit_s:
        yield f"{work}: TPOT grows to about {in_time_above(tpot_s, limit_s)}, limit {in_time(limit_s)}"
    else:
        yield work


def _layer_s(view: ReplicaView, cost: DeviceCost) -> float:
    """Return w of a repeated layer without attention workers."""
    b, C = view.mix.micro_batch, view.mix.chunk_tokens
    own_s = float(cost.decode_attention_s(b * cost.shape.groups, cost.shape.queries_per_group))
    return view.per_request(
        cost.dense_s(b + C) + cost.reduces_s(b + C) + cost.prefill_s(C) + cost.mixed_factor * own_s,
        cost.dense_s(b) + cost.reduces_s(b) + own_s,
    )
