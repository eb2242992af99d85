"""Explanations of idle GPUs: their marginal worth, why they make no replica alone, what they would do to another."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from hetis.solver.constraints import Exclude
from hetis.solver.cost import DeviceCost, rank_shape, state_bytes_per_copy
from hetis.solver.errors import InvalidProblemError
from hetis.solver.explain import IdleGpus
from hetis.solver.placement.classes import DeviceClass, device_classes
from hetis.solver.placement.explanation.replica_view import ReplicaView, main_view
from hetis.solver.placement.explanation.wording import in_percent, in_time, in_time_above, num_layers, stage_name
from hetis.solver.placement.strategies import STRATEGIES
from hetis.solver.plan import ClassPrice, Plan
from hetis.solver.problem import PlacementProblem

NOTHING = 1e-6  # share of the objective below which a dual counts as 0


def why_idle(plan: Plan, problem: PlacementProblem, views: tuple[ReplicaView, ...]) -> Iterator[IdleGpus]:
    """Yield the idle GPUs of every class with the reasons."""
    for price, device_class in idle_classes(plan, problem):
        forbidden, idle = _forbidden(problem, device_class), price.available - price.used
        reasons = [f"{forbidden:,} of them are forbidden"] if 0 < forbidden < idle else []
        reasons += _reasons(plan, problem, views, price, device_class) if forbidden < idle else ["they are forbidden"]
        reason = "; ".join(reasons)
        yield IdleGpus(gpu=price.gpu, zone=price.zone, count=price.available - price.used, reason=reason)


def _forbidden(problem: PlacementProblem, device_class: DeviceClass) -> int:
    """Return the number of GPUs of a class that a constraint excludes."""
    out = [each.gpus for each in problem.constraints if isinstance(each, Exclude)]
    if not out:
        return 0
    groups = {group.name for group in device_class.groups}
    return sum(
        any(gpus.takes(device=d.name, node=d.node, gpu=d.gpu, zone=d.group.zone) for gpus in out)
        for d in problem.cluster.devices()
        if d.group.name in groups and d.gpu == device_class.gpu
    )


def idle_classes(plan: Plan, problem: PlacementProblem) -> list[tuple[ClassPrice, DeviceClass]]:
    """Return the prices of classes with idle GPUs; a plan's table lists the classes in order."""
    classes = list(device_classes(problem.cluster))
    found = []
    for price in plan.prices:
        same = [c for c in classes if (c.gpu, c.zone, c.gpus_per_node) == (price.gpu, price.zone, price.gpus_per_node)]
        if not same:
            raise InvalidProblemError(f"plan has a price for {price.gpu} in {price.zone}, the cluster has no such GPUs")
        exact = [c for c in same if c.available == price.available] or same
        classes.remove(exact[0])
        if price.used < price.available:
            found.append((price, exact[0]))
    return found


def _reasons(
    plan: Plan, problem: PlacementProblem, views: tuple[ReplicaView, ...], price: ClassPrice, device_class: DeviceClass
) -> Iterator[str]:
    unit = plan.objective.unit
    if plan.objective.demand_rps is not None and views:
        yield f"the demand of {plan.objective.demand_rps:g} requests/s is met without them"
    elif STRATEGIES[plan.strategy].is_published:
        yield f"{plan.strategy} left them over: a heuristic as published has no prices to say why"
    elif price.dual <= NOTHING * abs(plan.result.value):
        yield "their price at the margin is 0: the relaxation is not short of them"
    else:
        yield f"at the margin each is worth {price.dual:.3g} {unit}, but the plan's whole replicas leave them over"
    if views:
        view = main_view(views)
        idle = price.available - price.used
        in_their_precision = problem.in_precision_of(device_class.gpu)
        yield from _alone(replace(view, problem=in_their_precision), device_class, idle)
        if in_their_precision.model == view.problem.model:
            yield from _joining(view, device_class, idle)
        else:
            yield f"they hold the model in another precision than {view.shape.stages[0].gpu}"
    if plan.result.gap > NOTHING:
        yield f"a gap of {in_percent(plan.result.gap)} is left, so that a use for them may exist"


def _costs(view: ReplicaView, device_class: DeviceClass, idle: int) -> list[DeviceCost]:
    """Return the costs of one TP group of every size that ``idle`` GPUs allow."""
    sizes = [n for n in view.problem.family.tp_sizes if n <= min(idle, device_class.gpus_per_node)]
    usable = [n for n in sizes if rank_shape(view.problem.model, n) is not None]
    return [view.cost(device_class.gpu, n, device_class.intra) for n in usable]


def _alone(view: ReplicaView, device_class: DeviceClass, idle: int) -> Iterator[str]:
    """Yield why these GPUs make no replica of their own, if one line can prove it."""
    model, family, limit_s = view.problem.model, view.problem.family, view.problem.objective.tpot_limit_s
    # A replica of one role processes only one kind of tokens.
    least = (min(family.micro_batches), min(family.chunk_tokens))
    tokens = min(least) if family.splits_roles else sum(least)
    costs = _costs(view, device_class, idle)
    if not costs:
        return
    fit = {c: max(0, math.floor((c.room_bytes() - c.activation_bytes(tokens)) / c.layer_bytes())) for c in costs}
    held = math.floor(max(idle * layers / c.shape.tp for c, layers in fit.items()))
    repeated = model.num_layers - model.prefix_layers
    if held < repeated:
        yield f"the {idle:,} idle hold at most {held} of {repeated} layers, KV left out"
        return
    # b n_it / O >= 1 / eta, so TPOT is at least one plain iteration of one request by the tokens that it adds.
    fastest = min(costs, key=lambda c: c.dense_s(1) + 2 * c.reduce_s(1))
    token_s = repeated * (fastest.dense_s(1) + 2 * fastest.reduce_s(1)) / model.emitted_tokens
    if limit_s is not None and token_s > limit_s:
        took = in_time_above(token_s, limit_s)
        could = ": they could only prefill" if family.splits_roles else ""
        yield f"alone, they take at least {took} per token (TP{fastest.shape.tp}), limit {in_time(limit_s)}{could}"


def _joining(view: ReplicaView, device_class: DeviceClass, idle: int) -> Iterator[str]:
    """Yield what moving layers onto these GPUs would do to the plan's main replica."""
    model, limit_s, mix = view.problem.model, view.problem.objective.tpot_limit_s, view.mix
    zones = tuple(dict.fromkeys((*view.fleet.zones_of(view.replica.devices()), device_class.zone)))
    link = device_class.link_in(view.problem.cluster, zones)
    busiest = view.busiest()
    stage = view.shape.stages[busiest.stage]
    there_s = _layer_s(view, view.stage_cost(stage))
    tried = []
    for cost in _costs(view, device_class, idle):
        room = cost.room_bytes() - cost.activation_bytes(mix.decode_tokens + mix.chunk_tokens)
        kv_bytes = cost.shape.groups * model.kv_bytes_per_token_group() * view.kv_tokens(1)
        kv_bytes += state_bytes_per_copy(model, mix, view.shape.in_flight) / cost.shape.tp
        layers = min(math.floor(room / (cost.layer_bytes() + kv_bytes)), view.layers(busiest.stage))
        if layers > 0:
            tried.append((_layer_s(view, cost), layers, cost))
    if not tried:
        yield f"beside the KV of {view.requests(1)} requests no layer fits on one"
        return
    layer_s, layers, cost = min(tried, key=lambda each: each[0])
    name = f"{device_class.gpu} TP{cost.shape.tp}"
    tpot = view.mix.micro_batch / view.moments.mean_output
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
        cost.dense_s(b + C) + 2 * cost.reduce_s(b + C) + cost.prefill_s(C) + own_s,
        cost.dense_s(b) + 2 * cost.reduce_s(b) + own_s,
    )
