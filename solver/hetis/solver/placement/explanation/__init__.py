"""Explanations of a plan from its own numbers and the cost model alone, without another search.

Sentences that say "at least" or "at most" are proofs; the others compare numbers of the cost model.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from hetis.solver.check.fleet import PoolShape, StageShape, left_out_by, slowest
from hetis.solver.cluster import Cluster, Link, node_of
from hetis.solver.constraints import Exclude
from hetis.solver.cost import DeviceCost, LargestBatch, rank_shape, state_bytes_per_copy
from hetis.solver.errors import InvalidProblemError
from hetis.solver.model import ModelSpec
from hetis.solver.placement.explanation.replica_view import ReplicaView, main_view, replica_views
from hetis.solver.placement.families import ENGINES, STRATEGIES
from hetis.solver.placement.fleet import DeviceClass, Part, device_classes
from hetis.solver.placement.wording import in_bytes, in_percent, in_time, in_time_above, num_layers, stage_name
from hetis.solver.plan import ClassPrice, Explanation, IdleGpus, ObjectiveKind, Plan, Role, StageTime
from hetis.solver.problem import PlacementProblem

__all__ = ["explain_plan"]


def explain_plan(plan: Plan, problem: PlacementProblem) -> Explanation:
    """Explain where memory and time go, what limits every replica, and why GPUs are idle.

    Replicas that differ only in device names are explained once, under the number of the first. ``bottlenecks`` has one
    sentence for each of these, in the order of their numbers.

    Raises:
        InvalidProblemError: the plan names devices, layers or settings that its problem does not have.
    """
    views = replica_views(plan, problem)
    return Explanation(
        memory=tuple(bar for view in views for bar in view.memory()),
        stage_times=tuple(part for view in views for part in view.times()),
        bottlenecks=tuple(what_binds(view) for view in views),
        idle=tuple(why_idle(plan, problem, views)),
        attention_workers="\n".join(attention_workers(plan, problem, views)),
        kv_routes=tuple(route_sentences(plan, problem)),
    )


# --- the limits of a replica: its busiest stage, the latency limits and KV room it uses up, the next larger batch


NEAR = 0.95  # share of a limit from which it counts as binding


def what_binds(view: ReplicaView) -> str:
    """Return one sentence on the stage, the wire, the limits and the memory that determine the rate."""
    times = view.times()
    busiest = view.busiest()
    rate = f"busy {in_time(busiest.total_s / busiest.copies)} of every {in_time(view.interval_s(times))}"
    name = f"stage {busiest.stage + 1} ({stage_name(view.shape, view.shape.stages[busiest.stage])})"
    if view.shape.shared_by and max(view.shared_card_s()) > max(busiest.total_s / busiest.copies, view.round_s(times)):
        sentence = f"the attention workers that its stages share are always busy, {name} is {rate}"
    elif len(times) == 1:
        sentence = f"{name} is {rate}"
    elif view.shape.in_flight == 1:
        sentence = f"one micro-batch passes through all {len(times)} stages, so that their sum counts: {name} is {rate}"
    elif view.round_s(times) > busiest.total_s / busiest.copies * (1 + 1e-9):
        sentence = (
            f"{view.shape.in_flight} micro-batches in flight are too few to keep any stage busy: {name} is {rate}"
        )
    else:
        sentence = f"{name} is {rate}"
    role = "" if view.role is Role.UNIFIED else f" ({view.role})"
    return f"replica {view.number}{role}: {sentence}{_wire(view, busiest)}; {_limits(view)}{_next_size(view, times)}."


def _wire(view: ReplicaView, busiest: StageTime) -> str:
    """Return how long the KV of a request is on the wire, compared with the time of its busiest stage."""
    if view.role is Role.UNIFIED:
        return ""
    way = "leaves" if view.role is Role.PREFILL else "arrives"
    text = f", KV {way} in {in_time(busiest.kv_wire_s)} of the {in_time(busiest.total_s)} that a request takes there"
    if busiest.kv_wait_s > 0:
        text += f", {busiest.kv_wait_s / busiest.total_s:.0%} of which is waiting for it"
    return text


def _limits(view: ReplicaView) -> str:
    """Return which of the latency limits and the KV room are nearly used up."""
    objective, one = view.problem.objective, view.replica
    said = [
        (value / limit, f"{name} {in_time(value)} of {in_time(limit)}")
        for name, value, limit in (
            ("mean TPOT", one.tpot_s, objective.tpot_limit_s),
            ("p95 TTFT", one.ttft_s, objective.ttft_limit_s),
        )
        if limit is not None and value > 0  # prefill replicas have no TPOT, decode replicas no TTFT
    ]
    full, where = view.kv_fill()
    said.append((full, f"KV room {full:.0%} planned ({where})"))
    binding = [text for share, text in said if share >= NEAR]
    if binding:
        return f"{'a limit binds' if len(binding) == 1 else 'limits bind'}: {', '.join(binding)}"
    return f"no limit is within 5%: {', '.join(text for _, text in said)}"


def _next_size(view: ReplicaView, times: tuple[StageTime, ...]) -> str:
    """Return what prevents the next larger micro-batch, or for a prefill replica the next larger chunk."""
    family, b, C = view.problem.family, view.mix.micro_batch, view.mix.chunk_tokens
    prefills = view.role is Role.PREFILL
    larger = [
        size for size in (family.chunk_tokens if prefills else family.micro_batches) if size > (C if prefills else b)
    ]
    if not larger:
        return ""
    size, objective = min(larger), view.problem.objective
    grown = (
        view.with_sizes(micro_batch=b, chunk_tokens=size)
        if prefills
        else view.with_sizes(micro_batch=size, chunk_tokens=C)
    )
    interval_s = grown.interval_s(grown.times())
    short = [bar for bar in grown.memory() if bar.free_bytes < 0]
    breaks = [
        f"takes {name} to {in_time_above(value, limit)}"
        for name, value, limit in (
            ("mean TPOT", grown.tpot_s(interval_s), objective.tpot_limit_s),
            ("p95 TTFT", grown.ttft_s(interval_s), objective.ttft_limit_s),
        )
        if limit is not None and value > limit * (1 + 1e-9)
    ]
    if short:
        breaks.append(f"lacks {in_bytes(-min(bar.free_bytes for bar in short))} on a GPU of stage {short[0].stage + 1}")
    gain = view.interval_s(times) / interval_s - 1
    effect = " and ".join(breaks) if breaks else f"changes the rate by {gain:+.1%}"
    return f"; the next {'chunk' if prefills else 'batch'} size, {size}, {effect}"


# --- idle GPUs: their marginal worth, why they form no replica of their own, what they would do to another


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
    is_throughput = plan.objective.kind is ObjectiveKind.THROUGHPUT
    rate = plan.served_rate() * (1.0 if is_throughput else problem.assumptions.planned_utilisation)
    return rate >= demand_rps * (1 - NOTHING)


def _costs(view: ReplicaView, device_class: DeviceClass, idle: int) -> list[DeviceCost]:
    """Return the costs of one TP group of every size that ``idle`` GPUs allow."""
    sizes = [n for n in view.problem.family.tp_sizes if n <= min(idle, device_class.gpus_per_node)]
    usable = [n for n in sizes if rank_shape(view.problem.model, n) is not None]
    return [view.cost(device_class.gpu, n, device_class.intra) for n in usable]


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
        cost.dense_s(b + C) + 2 * cost.reduce_s(b + C) + cost.prefill_s(C) + cost.mixed_factor * own_s,
        cost.dense_s(b) + 2 * cost.reduce_s(b) + own_s,
    )


# --- what pools of attention workers do for their stages, or why there are none


MAX_POOLS = 3  # maximum number of pools described in the paragraph


def attention_workers(plan: Plan, problem: PlacementProblem, views: tuple[ReplicaView, ...]) -> Iterator[str]:
    """Yield a paragraph on each of the plan's pools; if it has none, on what one would do to the busiest stage."""
    pools = [(view, i) for view in views for i, stage in enumerate(view.shape.stages) if stage.pool is not None]
    for view, i in pools[:MAX_POOLS]:
        yield _used_pool(view, i)
    if (rest := len(pools) - MAX_POOLS) > 0:
        yield f"{rest} more {'pool is' if rest == 1 else 'pools are'} like these."
    if pools:
        return
    if not views:
        yield "No replica of the plan could have attention workers."
    elif problem.family.max_pool == 0:
        rules = problem.family.engine
        if rules is not None and rules.name in ENGINES and ENGINES[rules.name].max_pool == 0:
            yield f"None: {rules.name} does not have them."
        else:
            yield f"None: strategy {plan.strategy} does not use them."
    else:
        yield " ".join(_unused_pools(plan, main_view(views)))


def _used_pool(view: ReplicaView, i: int) -> str:
    stage = view.shape.stages[i]
    pool, cost = stage.pool, view.stage_cost(stage)
    assert pool is not None
    own_s, pool_s = view.attention_s(stage)
    whole = replace(stage, pool=None)
    alone_s, _ = view.attention_s(whole)
    moved = pool.head_groups * view.layers(i) * view.problem.model.kv_bytes_per_token_group()
    moved_bytes = moved * (view.kv_tokens(stage.copies) - view.prompt_tokens(stage.copies))
    text = (
        f"Replica {view.number}, stage {i + 1}: {pool.head_groups} of {cost.shape.groups} head groups of every rank "
        f"live on {pool.cards * stage.copies} {pool.gpu}, {in_bytes(moved_bytes)} of KV less on each "
        f"{stage.gpu}. Decode attention of a layer and iteration takes {in_time(own_s)}{_beside_chunk(view, stage)} "
        f"there and {in_time(pool_s)} on the workers, exchange of {in_time(_exchange_s(view, stage, pool))} included; "
        f"without workers {in_time(alone_s)}"
    )
    stages = tuple(whole if j == i else other for j, other in enumerate(view.shape.stages))
    shared_by = tuple(tuple(j for j in positions if j != i) for positions in view.shape.shared_by)
    without = replace(view, shape=replace(view.shape, stages=stages, shared_by=shared_by))
    bar = next(bar for bar in without.memory() if bar.stage == i)
    if bar.free_bytes < 0:
        return f"{text}, but {in_bytes(-bar.free_bytes)} of KV would not fit."
    gain = view.interval_s(view.times()) / without.interval_s(without.times()) - 1
    return f"{text}, and its KV would fit: that changes the rate by {gain:+.1%}."


def _beside_chunk(view: ReplicaView, stage: StageShape) -> str:
    """Return how much longer decode attention of a stage takes in iterations with a chunk, if it does."""
    factor = view.stage_cost(stage).mixed_factor
    return f" ({factor:.3g} times that beside a chunk)" if view.role is Role.UNIFIED and factor != 1.0 else ""


def _exchange_s(view: ReplicaView, stage: StageShape, pool: PoolShape) -> float:
    cost, b = view.pool_cost(stage, pool.gpu, pool.link), view.mix.micro_batch
    load = cost.load(b, pool.head_groups, pool.cards)
    worker_s = float(cost.worker.decode_attention_s(load, cost.primary.shape.queries_per_group))
    return float(cost.attention_s(b, pool.head_groups, pool.cards)) - worker_s


def _why_heads_stay(model: ModelSpec) -> Iterator[str]:
    """Yield the reasons for `ModelSpec.heads_can_move`."""
    if model.all_heads_share:
        yield "layers keep state other than the KV of single heads"
    if model.frees_some_kv:
        yield "windows free the KV of some layers only"
    if model.draft is not None:
        yield "layers verify drafts"


def _unused_pools(plan: Plan, view: ReplicaView) -> Iterator[str]:
    busiest = view.busiest()
    stage = view.shape.stages[busiest.stage]
    own_s, _ = view.attention_s(stage)
    share = busiest.decode_attention_s / busiest.total_s
    full, where = view.kv_fill()
    yield (
        f"None. Decode attention is {share:.1%} of the time of stage {busiest.stage + 1} of replica {view.number} "
        f"({stage_name(view.shape, stage)}), {in_time(own_s)} per layer and iteration{_beside_chunk(view, stage)}; "
        f"KV room is {full:.0%} planned ({where})."
    )
    if not view.problem.model.heads_can_move:
        yield f"No head can be computed elsewhere: {' and '.join(_why_heads_stay(view.problem.model))}."
        return
    if not view.stage_cost(stage).shape.splits_groups:
        yield "Its ranks share head groups, so none of them can move."
        return
    idle = idle_classes(plan, view.problem.cluster)
    devices = view.replica.stages[busiest.stage].devices
    (zone,) = view.fleet.zones_of(devices)
    near = [(each.idle, each.device_class) for each in idle if each.device_class.zone == zone]
    if not idle:
        yield "No GPU is left for this."
    elif not near:
        yield f"The idle GPUs are in other zones than the stage ({zone})."
    for count, device_class in near:
        link = slowest([*view.fleet.nic_links(devices), device_class.link_in(view.problem.cluster, Part((zone,)))])
        yield _unused_pool(view, busiest.stage, device_class.gpu, count, link)


def _unused_pool(view: ReplicaView, i: int, gpu: str, idle: int, link: Link) -> str:
    """Compare no pool with the pool of 1, 2, 4, ... or all idle cards that costs the stage the least time."""
    stage = view.shape.stages[i]
    cost, model = view.pool_cost(stage, gpu, link), view.problem.model
    groups = cost.primary.shape.groups
    most = min(idle, view.problem.family.max_pool) // stage.copies
    if most == 0:
        return f"{idle} idle {gpu} are fewer than the stage has copies."

    before_s = view.attention_s(stage)[0]
    beside_chunk_s = view.attention_s(stage, beside_chunk=True)[0]

    def added_s(k: int, p: int) -> float:
        """Return the seconds that the pool adds per request and layer."""
        pooled = replace(stage, pool=PoolShape(gpu=gpu, cards=p, head_groups=k, link=link))
        with_chunk_s = max(view.attention_s(pooled, beside_chunk=True)) - beside_chunk_s + view.late_s(pooled)
        return view.per_request(with_chunk_s, max(view.attention_s(pooled)) - before_s)

    sizes = sorted({*(size for size in (1, 2, 4, 8, 16) if size < most), most})
    k, p = min(((k, p) for k in range(1, groups + 1) for p in sizes), key=lambda kp: added_s(*kp))
    pool = PoolShape(gpu=gpu, cards=p, head_groups=k, link=link)
    own_s, pool_s = view.attention_s(replace(stage, pool=pool))
    tokens = view.kv_tokens(stage.copies) - view.prompt_tokens(stage.copies)
    freed = k * view.layers(i) * model.kv_bytes_per_token_group() * tokens
    change = 100 * view.layers(i) * added_s(k, p) / view.times()[i].total_s
    return (
        f"{k} of {groups} head groups on {p} {gpu} take {in_time(pool_s)} "
        f"({in_time(_exchange_s(view, stage, pool))} of it exchange) beside {in_time(own_s)} on the stage, "
        f"against {in_time(before_s)} without; with the KV of prefills that makes the stage "
        f"{abs(change):.1f}% {'slower' if change >= 0 else 'faster'} and frees {in_bytes(freed)} of "
        "KV on each of its GPUs."
    )


# --- the limit on traffic between prefill and decode replicas: one of the sides, or the links between zones


USED_UP = 1 - 1e-4  # share of a side's rate from which the side counts as limiting its traffic
MAX_LINKS = 5  # maximum number of links described, the fullest first


def route_sentences(plan: Plan, problem: PlacementProblem) -> Iterator[str]:
    """Yield sentences on the sides, and on every link between zones that KV crosses."""
    if all(replica.role is Role.UNIFIED for replica in plan.replicas):
        return
    yield _sides(plan)
    yield from link_sentences(plan, problem)


def link_sentences(plan: Plan, problem: PlacementProblem) -> Iterator[str]:
    """Yield how much of the links between zones KV uses, the fullest first; nothing if all KV stays in its zone."""
    loads = _loads(plan, problem)
    links = sorted(loads, key=lambda pair: -loads[pair] / problem.cluster.network.zone_link(*pair).bytes_per_s)
    kv_bytes = _prompt_bytes(problem)
    for here, there in links[:MAX_LINKS]:
        bytes_per_s, limit = loads[here, there], problem.cluster.network.zone_link(here, there).bytes_per_s
        yield (
            f"From {here} to {there} go {bytes_per_s / kv_bytes:.3g} prompts/s of {in_bytes(kv_bytes)} of KV each, "
            f"{bytes_per_s / limit:.0%} of what the link carries ({limit / 1e9:.3g} GB/s)."
        )
    if len(links) > MAX_LINKS:
        yield f"{len(links) - MAX_LINKS} more links between zones carry less."


def _sides(plan: Plan) -> str:
    """Return the rates of both sides, and which of them the traffic exhausts."""
    rates = {role: sum(one.rate for one in plan.replicas if one.role is role) for role in (Role.PREFILL, Role.DECODE)}
    flow = sum(route.rate for route in plan.kv_routes)
    full = [role for role, rate in rates.items() if flow >= rate * USED_UP]
    match full:
        case [one]:
            other = Role.DECODE if one is Role.PREFILL else Role.PREFILL
            why = f"the {one} side limits, {1 - flow / rates[other]:.1%} of the {other} side is unused"
        case []:
            why = "neither side is fully used: the permitted pairs or the links between zones limit"
        case _:
            why = "both sides are fully used"
    return (
        f"Prefill replicas give {rates[Role.PREFILL]:.4g} requests/s, decode replicas "
        f"{rates[Role.DECODE]:.4g}, and {flow:.4g} go from one to the other: {why}."
    )


def _loads(plan: Plan, problem: PlacementProblem) -> dict[tuple[str, str], float]:
    """Return bytes/s of KV by pair of zones, without routes inside a zone."""
    zone_of_node = {node: group.zone for node, group in problem.cluster.nodes()}
    ends = {number for route in plan.kv_routes for number in (route.prefill, route.decode)}
    zones = {number: zone_of_node[node_of(plan.replicas[number].stages[0].devices[0])] for number in ends}
    loads: defaultdict[tuple[str, str], float] = defaultdict(float)
    for route in plan.kv_routes:
        here, there = zones[route.prefill], zones[route.decode]
        if here != there:
            loads[here, there] += route.rate * _prompt_bytes(problem)
    return dict(loads)


def _prompt_bytes(problem: PlacementProblem) -> float:
    """Return the KV bytes of a mean prompt."""
    return problem.model.prompt_kv_bytes(problem.moments().mean_prompt)
