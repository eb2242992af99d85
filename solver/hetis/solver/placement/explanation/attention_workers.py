"""Explanations of what pools of attention workers do for their stages, or why there are none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from hetis.solver.check.fleet import PoolShape, StageShape, slowest
from hetis.solver.cluster import Link
from hetis.solver.placement.explanation.idle import idle_classes
from hetis.solver.placement.explanation.replica_view import ReplicaView, main_view
from hetis.solver.placement.explanation.wording import in_bytes, in_time, stage_name
from hetis.solver.plan import Plan
from hetis.solver.problem import PlacementProblem

MAX_POOLS = 3  # pools that the paragraph describes


def attention_workers(plan: Plan, problem: PlacementProblem, views: tuple[ReplicaView, ...]) -> Iterator[str]:
    """Yield sentences on the plan's pools, or if there are none, on what one would do to the busiest stage."""
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
        yield from _unused_pools(plan, main_view(views))


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
        f"{stage.gpu}. Decode attention of a layer and iteration takes {in_time(own_s)} there and {in_time(pool_s)} on "
        f"the workers, exchange of {in_time(_exchange_s(view, stage, pool))} included; "
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


def _exchange_s(view: ReplicaView, stage: StageShape, pool: PoolShape) -> float:
    cost, b = view.pool_cost(stage, pool.gpu, pool.link), view.mix.micro_batch
    load = cost.load(b, pool.head_groups, pool.cards)
    worker_s = float(cost.worker.decode_attention_s(load, cost.primary.shape.queries_per_group))
    return float(cost.attention_s(b, pool.head_groups, pool.cards)) - worker_s


def _unused_pools(plan: Plan, view: ReplicaView) -> Iterator[str]:
    busiest = view.busiest()
    stage = view.shape.stages[busiest.stage]
    own_s, _ = view.attention_s(stage)
    share = busiest.decode_attention_s / busiest.total_s
    full, where = view.kv_fill()
    yield (
        f"None. Decode attention is {share:.1%} of the time of stage {busiest.stage + 1} of replica {view.number} "
        f"({stage_name(view.shape, stage)}), {in_time(own_s)} per layer and iteration; "
        f"KV room is {full:.0%} planned ({where})."
    )
    if not view.problem.model.heads_can_move:
        yield "No head can be computed apart: layers keep more than the KV of single heads, or less, or verify drafts."
        return
    if not view.stage_cost(stage).shape.splits_groups:
        yield "Its ranks share head groups, so that none can move."
        return
    idle = idle_classes(plan, view.problem)
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


def _unused_pool(view: ReplicaView, i: int, gpu: str, idle: int, link: Link) -> str:
    """Compare no pool with the one, of 1, 2, 4, ... or all idle cards, that costs the stage the least time."""
    stage = view.shape.stages[i]
    cost, model = view.pool_cost(stage, gpu, link), view.problem.model
    groups, mix = cost.primary.shape.groups, view.mix
    most = min(idle, view.problem.family.max_pool) // stage.copies
    if most == 0:
        return f"{idle} idle {gpu} are fewer than the stage has copies."

    before_s = view.attention_s(stage)[0]

    def added_s(k: int, p: int) -> float:
        """Return the seconds that the pool adds per request and layer."""
        pooled = replace(stage, pool=PoolShape(gpu=gpu, cards=p, head_groups=k, link=link))
        return mix.iterations * (max(view.attention_s(pooled)) - before_s) + mix.chunk_iterations * view.late_s(pooled)

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
