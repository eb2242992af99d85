"""Why a plan is as it is, from the plan's own numbers and the cost model alone: nothing is searched again.

Letters are those of `docs/cost-model.md`. Sentences that say "at least" or "at most" are proofs; the others compare
numbers of the cost model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from hetis.solver.check.fleet import Fleet, replica_shape, slowest
from hetis.solver.check.shape import PoolShape, ReplicaShape, StageShape
from hetis.solver.check.structure import check_replica_structure
from hetis.solver.cluster import Cluster, Link
from hetis.solver.cost import (
    DeviceCost,
    Mix,
    PoolCost,
    intra_link,
    kv_tokens_per_copy,
    mix_of,
    rank_shape,
    slack,
    tpot_per_interval,
    ttft_per_interval,
)
from hetis.solver.errors import InvalidProblemError
from hetis.solver.explain import Explanation, IdleGpus, MemoryBar, StageTime
from hetis.solver.placement.classes import DeviceClass, device_classes
from hetis.solver.plan import ClassPrice, Plan, ReplicaPlan
from hetis.solver.problem import PlacementProblem
from hetis.solver.workload import WorkloadMoments

NEAR = 0.95  # a limit used to this share is said to bind
NOTHING = 1e-6  # a dual below this share of the objective is none
MAX_POOLS = 3  # pools that the paragraph on attention workers describes


def explain_plan(plan: Plan, problem: PlacementProblem) -> Explanation:
    """Where memory and time go, what limits every replica, and why GPUs are idle.

    Replicas that differ in device names alone are explained once, under the number of the first of them:
    ``bottlenecks`` has one sentence for each of these, in the order of their numbers.

    Raises:
        InvalidProblemError: the plan names devices, layers or settings that its problem does not have.
    """
    views = _views(plan, problem)
    return Explanation(
        memory=tuple(bar for view in views for bar in view.memory()),
        stage_times=tuple(part for view in views for part in view.times()),
        bottlenecks=tuple(_bottleneck(view) for view in views),
        idle=tuple(_idle(plan, problem, views)),
        attention_workers=" ".join(_attention_workers(plan, problem, views)),
    )


@dataclass(frozen=True, slots=True)
class _View:
    """A replica of the plan and what its numbers follow from."""

    problem: PlacementProblem
    moments: WorkloadMoments
    fleet: Fleet  # the devices of all replicas that are explained
    number: int
    count: int  # replicas like this one
    replica: ReplicaPlan
    shape: ReplicaShape
    mix: Mix

    def with_batch(self, micro_batch: int) -> _View:
        """The same stages, decoding other micro-batches."""
        mix = mix_of(self.moments, micro_batch=micro_batch, chunk_tokens=self.mix.chunk_tokens)
        return replace(self, mix=mix, shape=replace(self.shape, micro_batch=micro_batch))

    def cost(self, gpu: str, tp: int, intra: Link) -> DeviceCost:
        shape = rank_shape(self.problem.model, tp)
        assert shape is not None, f"the structure check has let TP {tp} pass"
        return DeviceCost(self.problem.model, self.problem.profiles[gpu], self.moments, shape, intra)

    def stage_cost(self, stage: StageShape) -> DeviceCost:
        return self.cost(stage.gpu, stage.tp, stage.intra_link)

    def pool_cost(self, stage: StageShape, gpu: str, link: Link) -> PoolCost:
        worker = self.cost(gpu, 1, intra_link(self.problem.cluster.gpu_types[gpu], None))
        return PoolCost(self.stage_cost(stage), worker, link)

    def per_request(self, with_chunk_s: float, plain_s: float) -> float:
        return self.mix.chunk_iterations * with_chunk_s + self.mix.plain_iterations * plain_s

    def layers(self, position: int) -> int:
        """Layers of a stage, prefix layers included."""
        return self.shape.stages[position].layers + self._prefix(position)

    def _prefix(self, position: int) -> int:
        return self.problem.model.prefix_layers if position == 0 else 0

    # --- time

    def times(self) -> tuple[StageTime, ...]:
        parts = [self._time(i) for i in range(len(self.shape.stages))]
        slowest_s = max(part.total_s / part.copies for part in parts)
        return tuple(replace(part, is_bottleneck=part.total_s / part.copies == slowest_s) for part in parts)

    def _time(self, i: int) -> StageTime:
        stage, prefix, mix = self.shape.stages[i], self._prefix(i), self.mix
        cost, b, C = self.stage_cost(stage), mix.micro_batch, mix.chunk_tokens
        dense_s = stage.layers * self.per_request(cost.dense_s(b + C), cost.dense_s(b))
        if prefix:
            dense_s += prefix * self.per_request(
                cost.dense_s(b + C, prefix_layer=True), cost.dense_s(b, prefix_layer=True)
            )
        transfer_s = 0.0
        if i > 0:
            transfer_s += self.per_request(cost.hop_s(b + C, stage.hop_link), cost.hop_s(b, stage.hop_link))
        if stage.pool is not None:
            pool = self.pool_cost(stage, stage.pool.gpu, stage.pool.link)
            ship_s = float(pool.ship_s(C, stage.pool.head_groups, stage.pool.cards))
            transfer_s += self.layers(i) * mix.chunk_iterations * ship_s
        is_last = i == len(self.shape.stages) - 1
        parts = {
            "dense_s": dense_s,
            "all_reduce_s": self.layers(i) * 2 * self.per_request(cost.reduce_s(b + C), cost.reduce_s(b)),
            "prefill_attention_s": self.layers(i) * mix.chunk_iterations * cost.prefill_s(C),
            "decode_attention_s": self.layers(i) * mix.iterations * max(self.attention_s(stage)),
            "transfer_s": transfer_s,
            "head_s": self.per_request(cost.head_s(b + 1), cost.head_s(b)) if is_last else 0.0,
            "other_s": self.per_request(cost.step_s(b + C), cost.step_s(b)),
        }
        return StageTime(
            replica=self.number,
            stage=i,
            gpu=stage.gpu,
            tp=stage.tp,
            copies=stage.copies,
            total_s=sum(parts.values()),
            is_bottleneck=False,
            **parts,
        )

    def attention_s(self, stage: StageShape) -> tuple[float, float]:
        """Decode attention of one layer and iteration: on the stage's own ranks, and on its pool, exchange included."""
        cost, pool, b = self.stage_cost(stage), stage.pool, self.mix.micro_batch
        moved = 0 if pool is None else pool.head_groups
        own_s = float(cost.decode_attention_s(b * (cost.shape.groups - moved), cost.shape.queries_per_group))
        if pool is None:
            return own_s, 0.0
        return own_s, float(self.pool_cost(stage, pool.gpu, pool.link).attention_s(b, moved, pool.cards))

    def interval_s(self, times: tuple[StageTime, ...]) -> float:
        """t"""
        return (1 + self.slack()) * max(max(p.total_s / p.copies for p in times), self.round_s(times))

    def round_s(self, times: tuple[StageTime, ...]) -> float:
        """Seconds between completions if nothing but the round trip held micro-batches back."""
        return sum(part.total_s for part in times) / self.shape.in_flight

    def slack(self) -> float:
        copies = sum(stage.copies for stage in self.shape.stages)
        return slack(self.problem.assumptions, in_flight=self.shape.in_flight, num_copies=copies)

    def tpot_s(self, interval_s: float) -> float:
        return interval_s * tpot_per_interval(self.moments, self.mix, self.shape.in_flight)

    def ttft_s(self, interval_s: float) -> float:
        return interval_s * ttft_per_interval(self.moments, self.problem.assumptions, self.mix, self.shape.in_flight)

    # --- memory

    def requests(self, copies: int) -> int:
        """D b: requests whose KV a copy holds."""
        return -(-self.shape.in_flight // copies) * self.mix.micro_batch

    def kv_tokens(self, copies: int) -> float:
        """Tkv"""
        micro_batches = -(-self.shape.in_flight // copies)
        return kv_tokens_per_copy(self.problem.model, self.moments, self.problem.assumptions, self.mix, micro_batches)

    def memory(self) -> Iterator[MemoryBar]:
        for i, stage in enumerate(self.shape.stages):
            yield self._rank_memory(i, stage)
            if stage.pool is not None:
                yield self._worker_memory(i, stage, stage.pool)

    def _rank_memory(self, i: int, stage: StageShape) -> MemoryBar:
        cost, is_last = self.stage_cost(stage), i == len(self.shape.stages) - 1
        weights = stage.layers * cost.layer_bytes()
        weights += cost.prefix_bytes() if i == 0 else 0.0
        tables = int(i == 0) + int(is_last)
        weights += cost.embedding_bytes() * (min(tables, 1) if self.problem.model.tie_embeddings else tables)
        activations = cost.activation_bytes(self.mix.micro_batch + self.mix.chunk_tokens)
        activations += cost.logit_bytes(self.mix.micro_batch) if is_last else 0.0
        kept = cost.shape.groups - (stage.pool.head_groups if stage.pool is not None else 0)
        kv = self.layers(i) * kept * self.problem.model.kv_bytes_per_token_group() * self.kv_tokens(stage.copies)
        return self._bar(i, "primary", stage.gpu, stage.tp * stage.copies, weights, kv, activations)

    def _worker_memory(self, i: int, stage: StageShape, pool: PoolShape) -> MemoryBar:
        """The fullest card."""
        requests, group_bytes = self.requests(stage.copies), self.problem.model.kv_bytes_per_token_group()
        pairs = -(-requests * pool.head_groups * stage.tp // pool.cards)
        kv = self.layers(i) * pairs / requests * self.kv_tokens(stage.copies) * group_bytes
        return self._bar(i, "attention worker", pool.gpu, pool.cards * stage.copies, 0.0, kv, 0.0)

    def _bar(
        self, i: int, role: str, gpu: str, num_devices: int, weights: float, kv: float, activations: float
    ) -> MemoryBar:
        profile = self.problem.profiles[gpu]
        # A profile may have measured more than the catalogue's rounded number.
        nominal = max(self.problem.cluster.gpu_types[gpu].memory_bytes, profile.usable_bytes)
        parts = [round(part) for part in (weights, kv, activations)]
        return MemoryBar(
            replica=self.number,
            stage=i,
            role=role,
            gpu=gpu,
            num_devices=num_devices,
            nominal_bytes=nominal,
            unusable_bytes=nominal - profile.usable_bytes,
            reserve_bytes=profile.reserve_bytes,
            weight_bytes=parts[0],
            kv_bytes=parts[1],
            activation_bytes=parts[2],
            free_bytes=profile.usable_bytes - profile.reserve_bytes - sum(parts),
        )


def _views(plan: Plan, problem: PlacementProblem) -> tuple[_View, ...]:
    """The first replica of every shape."""
    first: dict[ReplicaPlan, int] = {}
    count: dict[ReplicaPlan, int] = {}
    for number, one in enumerate(plan.replicas):
        key = _nameless(one)
        first.setdefault(key, number)
        count[key] = count.get(key, 0) + 1
    fleet = _fleet_of(problem.cluster, {name for n in first.values() for name in plan.replicas[n].devices()})
    workload = problem.workload.clipped_to(problem.model.max_position)
    moments = workload.moments(block_tokens=problem.assumptions.block_tokens)
    views = []
    for key, number in first.items():
        one = plan.replicas[number]
        for violation in check_replica_structure(one, f"replica {number}", problem, fleet):
            raise InvalidProblemError(f"plan cannot be explained: {violation}")
        mix = mix_of(moments, micro_batch=one.micro_batch, chunk_tokens=one.chunk_tokens)
        views.append(_View(problem, moments, fleet, number, count[key], one, replica_shape(one, problem, fleet), mix))
    return tuple(views)


def _nameless(one: ReplicaPlan) -> ReplicaPlan:
    """The replica with the number of devices in place of their names."""
    return replace(
        one,
        stages=tuple(replace(stage, devices=(str(len(stage.devices)),)) for stage in one.stages),
        attention_workers=tuple(replace(p, devices=(str(len(p.devices)),)) for p in one.attention_workers),
    )


def _fleet_of(cluster: Cluster, names: set[str]) -> Fleet:
    """The devices of these names; the others of a large fleet are not kept."""
    return Fleet(cluster=cluster, devices={d.name: d for d in cluster.devices() if d.name in names} if names else {})


# --- what binds


def _bottleneck(view: _View) -> str:
    times = view.times()
    busiest = next(part for part in times if part.is_bottleneck)
    rate = f"busy {_time(busiest.total_s / busiest.copies)} of every {_time(view.interval_s(times))}"
    name = f"stage {busiest.stage + 1} ({_label(view.shape.stages[busiest.stage])})"
    if len(times) == 1:
        sentence = f"{name} is {rate}"
    elif view.shape.in_flight == 1:
        sentence = f"one micro-batch walks through all {len(times)} stages, so that their sum counts: {name} is {rate}"
    elif view.round_s(times) > busiest.total_s / busiest.copies * (1 + 1e-9):
        sentence = (
            f"{view.shape.in_flight} micro-batches in flight are too few to keep any stage busy: {name} is {rate}"
        )
    else:
        sentence = f"{name} is {rate}"
    return f"replica {view.number}: {sentence}; {_limits(view)}{_next_batch(view, times)}."


def _limits(view: _View) -> str:
    """Which of the latency limits and the KV room are nearly used up."""
    objective, one = view.problem.objective, view.replica
    said = [
        (value / limit, f"{name} {_time(value)} of {_time(limit)}")
        for name, value, limit in (
            ("mean TPOT", one.tpot_s, objective.tpot_limit_s),
            ("p95 TTFT", one.ttft_s, objective.ttft_limit_s),
        )
        if limit is not None
    ]
    full, where = _kv_fill(view)
    said.append((full, f"KV room {full:.0%} planned ({where})"))
    binding = [text for share, text in said if share >= NEAR]
    if binding:
        return f"{'a limit binds' if len(binding) == 1 else 'limits bind'}: {', '.join(binding)}"
    return f"no limit is within 5%: {', '.join(text for _, text in said)}"


def _kv_fill(view: _View) -> tuple[float, str]:
    """Planned KV over the room for it, where it is scarcest, and where that is."""
    fills = []
    for bar in view.memory():
        room = bar.kv_bytes + bar.free_bytes
        whose = f"stage {bar.stage + 1}" if bar.role == "primary" else f"attention workers of stage {bar.stage + 1}"
        fills.append((bar.kv_bytes / room if room > 0 else 0.0, whose))
    return max(fills)


def _next_batch(view: _View, times: tuple[StageTime, ...]) -> str:
    """What stands in the way of the next larger micro-batch."""
    larger = [size for size in view.problem.family.micro_batches if size > view.mix.micro_batch]
    if not larger:
        return ""
    grown, objective = view.with_batch(min(larger)), view.problem.objective
    interval_s = grown.interval_s(grown.times())
    short = [bar for bar in grown.memory() if bar.free_bytes < 0]
    breaks = [
        f"takes {name} to {_over(value, limit)}"
        for name, value, limit in (
            ("mean TPOT", grown.tpot_s(interval_s), objective.tpot_limit_s),
            ("p95 TTFT", grown.ttft_s(interval_s), objective.ttft_limit_s),
        )
        if limit is not None and value > limit * (1 + 1e-9)
    ]
    if short:
        breaks.append(f"lacks {_size(-min(bar.free_bytes for bar in short))} on a GPU of stage {short[0].stage + 1}")
    gain = view.interval_s(times) / interval_s - 1
    effect = " and ".join(breaks) if breaks else f"changes the rate by {gain:+.1%}"
    return f"; the next batch size, {grown.mix.micro_batch}, {effect}"


# --- idle GPUs


def _idle(plan: Plan, problem: PlacementProblem, views: tuple[_View, ...]) -> Iterator[IdleGpus]:
    for price, device_class in _idle_classes(plan, problem):
        reason = "; ".join(_why_idle(plan, problem, views, price, device_class))
        yield IdleGpus(gpu=price.gpu, zone=price.zone, count=price.available - price.used, reason=reason)


def _idle_classes(plan: Plan, problem: PlacementProblem) -> list[tuple[ClassPrice, DeviceClass]]:
    """Prices of classes with idle GPUs; the table of a plan lists the classes in their order."""
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


def _why_idle(
    plan: Plan, problem: PlacementProblem, views: tuple[_View, ...], price: ClassPrice, device_class: DeviceClass
) -> Iterator[str]:
    unit = plan.objective.unit
    if plan.objective.demand_rps is not None and views:
        yield f"the demand of {plan.objective.demand_rps:g} requests/s is met without them"
    elif price.dual <= NOTHING * abs(plan.result.value):
        yield "one more adds nothing to the bound"
    else:
        yield f"one more adds at most {price.dual:.3g} {unit} to the bound"
    if views:
        # The shape that most of the traffic goes to speaks for the plan.
        view = max(views, key=lambda v: v.count * v.replica.rate)
        idle = price.available - price.used
        yield from _alone(view, device_class, idle)
        yield from _joining(view, device_class, idle)
    if plan.result.gap > NOTHING:
        yield f"a gap of {_percent(plan.result.gap)} is left, so that a use for them may exist"


def _costs(view: _View, device_class: DeviceClass, idle: int) -> list[DeviceCost]:
    """One TP group of every size that so many GPUs allow."""
    sizes = [n for n in view.problem.family.tp_sizes if n <= min(idle, device_class.gpus_per_node)]
    usable = [n for n in sizes if rank_shape(view.problem.model, n) is not None]
    return [view.cost(device_class.gpu, n, device_class.intra) for n in usable]


def _alone(view: _View, device_class: DeviceClass, idle: int) -> Iterator[str]:
    """Why these GPUs make no replica of their own, where that can be proved in a line."""
    model, family, limit_s = view.problem.model, view.problem.family, view.problem.objective.tpot_limit_s
    tokens = min(family.micro_batches) + min(family.chunk_tokens)
    costs = _costs(view, device_class, idle)
    if not costs:
        return
    fit = {c: max(0, math.floor((c.room_bytes() - c.activation_bytes(tokens)) / c.layer_bytes())) for c in costs}
    held = math.floor(max(idle * layers / c.shape.tp for c, layers in fit.items()))
    repeated = model.num_layers - model.prefix_layers
    if held < repeated:
        yield f"the {idle:,} idle hold at most {held} of {repeated} layers, KV left out"
        return
    # b n_it / O >= 1, so that TPOT is at least one plain iteration of one request.
    fastest = min(costs, key=lambda c: c.dense_s(1) + 2 * c.reduce_s(1))
    token_s = repeated * (fastest.dense_s(1) + 2 * fastest.reduce_s(1))
    if limit_s is not None and token_s > limit_s:
        took = _over(token_s, limit_s)
        yield f"alone, they take at least {took} per token (TP{fastest.shape.tp}), limit {_time(limit_s)}"


def _joining(view: _View, device_class: DeviceClass, idle: int) -> Iterator[str]:
    """What it does to the plan's main shape to move layers onto these GPUs."""
    model, limit_s, mix = view.problem.model, view.problem.objective.tpot_limit_s, view.mix
    zones = tuple(dict.fromkeys((*view.fleet.zones_of(view.replica.devices()), device_class.zone)))
    link = device_class.link_in(view.problem.cluster, zones)
    busiest = next(part for part in view.times() if part.is_bottleneck)
    stage = view.shape.stages[busiest.stage]
    there_s = _layer_s(view, view.stage_cost(stage))
    tried = []
    for cost in _costs(view, device_class, idle):
        room = cost.room_bytes() - cost.activation_bytes(mix.micro_batch + mix.chunk_tokens)
        kv_bytes = cost.shape.groups * model.kv_bytes_per_token_group() * view.kv_tokens(1)
        layers = min(math.floor(room / (cost.layer_bytes() + kv_bytes)), view.layers(busiest.stage))
        if layers > 0:
            tried.append((_layer_s(view, cost), layers, cost))
    if not tried:
        yield f"beside the KV of {view.requests(1)} requests no layer fits on one"
        return
    layer_s, layers, cost = min(tried, key=lambda each: each[0])
    name = f"{device_class.gpu} TP{cost.shape.tp}"
    tpot = view.mix.micro_batch / view.moments.mean_output
    work = f"at b = {mix.micro_batch}, {_layers(layers)} cost a token {_time(tpot * layers * layer_s)} on {name}"
    work += f", {_time(tpot * layers * there_s)} on {_label(stage)}"
    if limit_s is None:
        yield work
        return
    b, C = mix.micro_batch, mix.chunk_tokens
    added_s = layers * (layer_s - there_s)
    added_s += view.per_request(cost.hop_s(b + C, link) + cost.step_s(b + C), cost.hop_s(b, link) + cost.step_s(b))
    tpot_s = (1 + view.slack()) * tpot * (sum(part.total_s for part in view.times()) + added_s)
    if tpot_s > limit_s:
        yield f"{work}: TPOT grows to about {_over(tpot_s, limit_s)}, limit {_time(limit_s)}"
    else:
        yield work


def _layer_s(view: _View, cost: DeviceCost) -> float:
    """w of a repeated layer without attention workers."""
    b, C = view.mix.micro_batch, view.mix.chunk_tokens
    own_s = float(cost.decode_attention_s(b * cost.shape.groups, cost.shape.queries_per_group))
    return view.per_request(
        cost.dense_s(b + C) + 2 * cost.reduce_s(b + C) + cost.prefill_s(C) + own_s,
        cost.dense_s(b) + 2 * cost.reduce_s(b) + own_s,
    )


# --- attention workers


def _attention_workers(plan: Plan, problem: PlacementProblem, views: tuple[_View, ...]) -> Iterator[str]:
    pools = [(view, i) for view in views for i, stage in enumerate(view.shape.stages) if stage.pool is not None]
    for view, i in pools[:MAX_POOLS]:
        yield _used_pool(view, i)
    if len(pools) > MAX_POOLS:
        yield f"{len(pools) - MAX_POOLS} more pools are like these."
    if pools:
        return
    if not views:
        yield "The plan has no replica that could have attention workers."
    elif problem.family.max_pool == 0:
        yield f"None: strategy {plan.strategy} does not use them."
    else:
        yield from _unused_pools(plan, max(views, key=lambda v: v.count * v.replica.rate))


def _used_pool(view: _View, i: int) -> str:
    stage = view.shape.stages[i]
    pool, cost = stage.pool, view.stage_cost(stage)
    assert pool is not None
    own_s, pool_s = view.attention_s(stage)
    whole = replace(stage, pool=None)
    alone_s, _ = view.attention_s(whole)
    moved = pool.head_groups * view.layers(i) * view.problem.model.kv_bytes_per_token_group()
    moved_bytes = moved * view.kv_tokens(stage.copies)
    text = (
        f"Replica {view.number}, stage {i + 1}: {pool.head_groups} of {cost.shape.groups} head groups of every rank "
        f"live on {pool.cards * stage.copies} {pool.gpu}, {_size(moved_bytes)} of KV less on each "
        f"{stage.gpu}. Decode attention of a layer and iteration takes {_time(own_s)} there and {_time(pool_s)} on the "
        f"workers, exchange of {_time(_exchange_s(view, stage, pool))} included; without workers {_time(alone_s)}"
    )
    stages = tuple(whole if j == i else other for j, other in enumerate(view.shape.stages))
    without = replace(view, shape=replace(view.shape, stages=stages))
    bar = next(bar for bar in without.memory() if bar.stage == i)
    if bar.free_bytes < 0:
        return f"{text}, but {_size(-bar.free_bytes)} of KV would not fit."
    gain = view.interval_s(view.times()) / without.interval_s(without.times()) - 1
    return f"{text}, and its KV would fit: that changes the rate by {gain:+.1%}."


def _exchange_s(view: _View, stage: StageShape, pool: PoolShape) -> float:
    cost, b = view.pool_cost(stage, pool.gpu, pool.link), view.mix.micro_batch
    load = cost.load(b, pool.head_groups, pool.cards)
    worker_s = float(cost.worker.decode_attention_s(load, cost.primary.shape.queries_per_group))
    return float(cost.attention_s(b, pool.head_groups, pool.cards)) - worker_s


def _unused_pools(plan: Plan, view: _View) -> Iterator[str]:
    times = view.times()
    busiest = next(part for part in times if part.is_bottleneck)
    stage = view.shape.stages[busiest.stage]
    own_s, _ = view.attention_s(stage)
    share = busiest.decode_attention_s / busiest.total_s
    full, where = _kv_fill(view)
    yield (
        f"None. Decode attention is {share:.1%} of the time of stage {busiest.stage + 1} of replica {view.number} "
        f"({_label(stage)}), {_time(own_s)} per layer and iteration; KV room is {full:.0%} planned ({where})."
    )
    if not view.stage_cost(stage).shape.splits_groups:
        yield "Its ranks share head groups, so that none can move."
        return
    idle = _idle_classes(plan, view.problem)
    devices = view.replica.stages[busiest.stage].devices
    (zone,) = view.fleet.zones_of(devices)
    near = [(price.available - price.used, c) for price, c in idle if c.zone == zone]
    if not idle:
        yield "No GPU is left to be one."
    elif not near:
        yield f"The idle GPUs are in other zones than the stage ({zone})."
    for count, device_class in near:
        link = slowest([*view.fleet.nic_links(devices), device_class.link_in(view.problem.cluster, (zone,))])
        yield _unused_pool(view, busiest.stage, device_class.gpu, count, link)


def _unused_pool(view: _View, i: int, gpu: str, idle: int, link: Link) -> str:
    """Of the pools of 1, 2, 4, ... and all idle cards, the one that costs the stage least time, against none."""
    stage = view.shape.stages[i]
    cost, model = view.pool_cost(stage, gpu, link), view.problem.model
    groups, mix = cost.primary.shape.groups, view.mix
    most = min(idle, view.problem.family.max_pool) // stage.copies
    if most == 0:
        return f"{idle} idle {gpu} are fewer than the stage has copies."

    before_s = view.attention_s(stage)[0]

    def added_s(k: int, p: int) -> float:
        """Seconds of a request and layer that the pool adds."""
        own, there = view.attention_s(replace(stage, pool=PoolShape(gpu=gpu, cards=p, head_groups=k, link=link)))
        ship_s = float(cost.ship_s(mix.chunk_tokens, k, p))
        return mix.iterations * (max(own, there) - before_s) + mix.chunk_iterations * ship_s

    sizes = sorted({*(size for size in (1, 2, 4, 8, 16) if size < most), most})
    k, p = min(((k, p) for k in range(1, groups + 1) for p in sizes), key=lambda kp: added_s(*kp))
    pool = PoolShape(gpu=gpu, cards=p, head_groups=k, link=link)
    own_s, pool_s = view.attention_s(replace(stage, pool=pool))
    freed = k * view.layers(i) * model.kv_bytes_per_token_group() * view.kv_tokens(stage.copies)
    change = 100 * view.layers(i) * added_s(k, p) / view.times()[i].total_s
    return (
        f"{k} of {groups} head groups on {p} {gpu} take {_time(pool_s)} ({_time(_exchange_s(view, stage, pool))} of "
        f"it exchange) beside {_time(own_s)} on the stage, against {_time(before_s)} without; with the KV of prefills "
        f"that makes the stage {abs(change):.1f}% {'slower' if change >= 0 else 'faster'} and frees {_size(freed)} of "
        "KV on each of its GPUs."
    )


# --- how numbers are written


def _label(stage: StageShape) -> str:
    return f"{stage.gpu} TP{stage.tp}{f' x{stage.copies}' if stage.copies > 1 else ''}"


def _layers(count: int) -> str:
    return "1 layer" if count == 1 else f"{count} layers"


def _time(seconds: float) -> str:
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * factor >= 0.9995:
            value = seconds * factor
            return f"{value:.3g} {unit}" if value < 999.5 else f"{value:,.0f} {unit}"
    return f"{seconds * 1e6:.3g} us"


def _over(seconds: float, limit_s: float) -> str:
    """A time above a limit with the digits that show it: 100.3 ms where the limit is 100 ms."""
    if _time(seconds) != _time(limit_s):
        return _time(seconds)
    return f"{seconds:.4g} s" if seconds >= 1 else f"{seconds * 1e3:.4g} ms"


def _percent(ratio: float) -> str:
    return f"{ratio:.2%}" if ratio < 0.1 else f"{ratio:.0%}"


def _size(num_bytes: float) -> str:
    gib = num_bytes / 2**30
    return f"{gib:.1f} GiB" if gib >= 0.05 else f"{num_bytes / 2**20:.1f} MiB"
