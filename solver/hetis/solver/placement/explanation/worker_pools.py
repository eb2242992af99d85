"""What pools of attention workers do for their stages, or why there are none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from hetis.solver.check.replica_shapes import PoolShape, StageShape, slowest
from hetis.solver.cluster import Link
from hetis.solver.model import ModelSpec
from hetis.solver.placement.explanation.idle_gpus import idle_classes
from hetis.solver.placement.explanation.replica_view import ReplicaView, main_view
from hetis.solver.placement.families import ENGINES
from hetis.solver.placement.fleet import Part
from hetis.solver.placement.wording import in_bytes, in_time, stage_name
from hetis.solver.plan import Plan, Role
from hetis.solver.problem import PlacementProblem

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
        f"without workers {in_time(alone_s)}{_plugin(view, i)}"
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


def _plugin(view: ReplicaView, i: int) -> str:
    """Return what the engine's hosts take for workers besides the exchange, if anything is charged."""
    plugin = view.problem.family.plugin
    if not plugin.local_s:
        return ""
    share = view.plugin_s(i) / view.times()[i].total_s
    low, high = in_time(plugin.exchange_low_s), in_time(plugin.exchange_high_s)
    return (
        f"; the plugin takes {in_time(plugin.local_s)} of every layer and iteration besides, with what is no longer "
        f"scheduled ahead {share:.0%} of the stage's time, and {in_time(plugin.exchange_s)} of each exchange "
        f"({low} to {high}; {plugin.source})"
    )


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

    before_s, local_s = view.attention_s(stage)[0], view.problem.family.plugin.local_s
    beside_chunk_s = view.attention_s(stage, beside_chunk=True)[0]

    def added_s(k: int, p: int) -> float:
        """Return the seconds that the pool adds per request and layer, with the plugin's own there."""
        pooled = replace(stage, pool=PoolShape(gpu=gpu, cards=p, head_groups=k, link=link))
        with_chunk_s = max(view.attention_s(pooled, beside_chunk=True)) - beside_chunk_s + view.late_s(pooled)
        return view.per_request(with_chunk_s + local_s, max(view.attention_s(pooled)) - before_s + local_s)

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
        f"against {in_time(before_s)} without; with {f'{in_time(local_s)} of the plugin and ' if local_s else ''}"
        "the KV of prefills that makes the stage "
        f"{abs(change):.1f}% {'slower' if change >= 0 else 'faster'} and frees {in_bytes(freed)} of "
        "KV on each of its GPUs."
    )
