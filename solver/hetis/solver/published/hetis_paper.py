"""`hetis-paper`: the search that Hetis (SC'25, arXiv 2509.08309) describes, under our cost model.

`docs/strategies.md` lists what is reconstructed. Zones are planned separately, and GPUs are dealt to its replicas in
the order of their nodes. Degrees of data parallelism are tried from the cheapest on: the first one at which every
replica fits memory and limits is taken, or else the one with the highest rate.

**5% rule.** The cost of a dense path is C = C_comp + C_comm: the seconds for which a request occupies the slowest
stage's compute, and the seconds of all its all-reduces and hops along the pipeline. It is taken at a reference mix,
without decode attention, which Hetis later spreads by heads. The fastest type comes first in the pipeline.

**Shared attention workers** serve every stage in turn (see "Shared pools" in `docs/cost-model.md`). If several types
have left the dense path, the one that serves best becomes the pool. The others, and GPUs left over by an uneven deal,
are idle.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import numpy as np

from hetis.solver import cost, mixes
from hetis.solver.cost import DeviceCost
from hetis.solver.placement.fleet import IntArray
from hetis.solver.placement.replicas.tables import CostTables
from hetis.solver.placement.replicas.template import Template, TemplateStage, kv_tokens_held
from hetis.solver.placement.solve import replica_plan
from hetis.solver.plan import ReplicaPlan, Role
from hetis.solver.published.heuristic import Decisions, Search
from hetis.solver.published.replicas import (
    Composition,
    Part,
    Pipeline,
    Ranks,
    ReplicaDuty,
    best_split,
    fastest,
    pipeline_of,
    priced,
    template_of,
    tp_groups,
)

LEAST_GAIN = 0.05  # delta: share of the cost by which a type must reduce it to stay in the dense path
REFERENCE_BATCH, REFERENCE_CHUNK = 32, 512


class DensePath(NamedTuple):
    """The stages of the dense path, its cost, and the device classes left for attention, fastest first."""

    ranks: Ranks
    cost_s: float
    leavers: tuple[int, ...]


class SharedPool(NamedTuple):
    """Cards of one class that a whole replica shares."""

    device_class: int
    cards: int


@dataclass(frozen=True, slots=True)
class ReplicaShare:
    """The GPUs of one replica and its dense path."""

    gpus: Part
    path: DensePath


def search_hetis_paper(search: Search) -> Decisions:
    """Return the plan that the search of Hetis finds."""
    replicas = [replica for zone in search.zones for replica in _of_zone(search, zone)]
    pools = {pool.gpu for replica in replicas for pool in replica.attention_workers}
    note = "no attention workers: no type left the dense path, or giving head groups to those that did serves less"
    if pools:
        note = f"attention workers of whole replicas: {', '.join(sorted(pools))}"
    return Decisions(replicas, notes=(note,))


def _of_zone(search: Search, zone: str) -> list[ReplicaPlan]:
    """Return the replicas of one zone at the cheapest feasible degree of data parallelism."""
    duty = search.duty(Role.UNIFIED, zone)
    best: list[tuple[ReplicaShare, Template]] = []

    @cache
    def replica(group: Composition, path: DensePath) -> Template | None:
        """Return the best replica on a dense path; a pool has as many cards of a type that left as pool sizes allow."""
        sizes = {g: [size for size in search.costs.pool_sizes if size <= sum(nodes)] for g, nodes in group}
        pools = [SharedPool(g, max(sizes[g])) for g, _ in group if g in path.leavers and sizes[g]]
        candidates: list[SharedPool | None] = [*pools] or [None]
        return fastest(best_with_pool(search.costs, duty, path.ranks, pool) for pool in candidates)

    def rate(chosen: Sequence[tuple[ReplicaShare, Template]]) -> float:
        return sum(template.rate for _, template in chosen)

    degrees = sorted(_degrees(search, duty, zone), key=lambda shares: 1.0 / sum(1.0 / s.path.cost_s for s in shares))
    for shares in degrees:
        if search.budget.is_spent():
            break
        found = [(share, replica(search.gpus.composition(share.gpus), share.path)) for share in shares]
        valid = [(share, template) for share, template in found if template is not None]
        is_complete = bool(valid) and len(valid) == len(shares)
        if is_complete or rate(valid) > rate(best):
            best = valid
        search.tell(f"{len(shares)} replicas", rate(best))
        if is_complete:
            break
    return [_on_gpus(search, template, share.gpus) for share, template in best]


def _degrees(search: Search, duty: ReplicaDuty, zone: str) -> Iterator[list[ReplicaShare]]:
    """Yield the replicas' shares for every number of replicas whose dense paths hold the weights."""
    members: dict[int, list[int]] = defaultdict(list)
    for gpu in search.gpus.of_zone(zone):
        members[int(search.gpus.device_class[gpu])].append(gpu)
    room = float(sum(search.gpus.room_bytes[gpus].sum() for gpus in members.values()))
    path_of = cache(lambda group: dense_path(search.costs, duty, group) if group else None)
    for degree in range(1, max(1, int(room / search.replica_bytes(0.0))) + 1):
        shares = []
        for number in range(degree):
            gpus: list[int] = []
            for of_type in members.values():
                each = len(of_type) // degree
                gpus += of_type[number * each : (number + 1) * each]
            path = path_of(search.gpus.composition(gpus))
            if path is None:
                break
            shares.append(ReplicaShare(tuple(gpus), path))
        else:
            yield shares


def _on_gpus(search: Search, template: Template, gpus: Part) -> ReplicaPlan:
    """Return the replica on named GPUs; the cards of its pool are listed with every stage that they serve."""
    costs, stages = search.costs, search.bound(template, gpus)
    pooled = next((stage for stage in template.stages if stage.pool_class >= 0), None)
    if pooled is None:
        return replica_plan(costs, template, stages)
    pool = SharedPool(pooled.pool_class, pooled.pool_cards)
    of_class = (gpu for gpu in gpus if search.gpus.device_class[gpu] == pool.device_class)
    workers = [search.gpus.names[gpu] for gpu in of_class][: pool.cards]
    for stage, bound in zip(template.stages, stages, strict=True):
        if stage.pool_class >= 0:
            bound.workers.extend(workers)
    plan = replica_plan(costs, template, stages)
    return replace(
        plan,
        kv_tokens=min(plan.kv_tokens, _shared_room(costs, template, pool)),
        attention_workers=tuple(replace(each, shared=True) for each in plan.attention_workers),
    )


def _shared_room(costs: CostTables, template: Template, pool: SharedPool) -> int:
    """Return the replica's tokens whose KV fits on the fullest card, over all stages."""
    t = costs.scopes[template.scope].tables
    per_token = 0.0
    for i, stage in enumerate(template.stages):
        if stage.pool_class >= 0:
            held, _ = kv_tokens_held(costs, template, stage)
            requests = held * int(t.micro_batch[template.mix])
            pairs = np.ceil(requests * stage.pool_groups * int(t.rank_tp[stage.rank]) / pool.cards - 1e-9)
            layers = stage.layers + (t.prefix_layers if i == 0 else 0)
            per_token += layers * float(pairs) / requests * t.kv_group_bytes
    return int(_card(costs, pool.device_class, 1).room_bytes() / per_token)


# --- the 5% rule


def dense_path(costs: CostTables, duty: ReplicaDuty, group: Composition) -> DensePath | None:
    """Return a replica's dense path on these GPUs after the 5% rule, or None if they cannot hold the weights."""

    def distance(x: int) -> tuple[float, float]:
        mix = costs.mixes[x]
        return abs(np.log(mix.chunk_tokens / REFERENCE_CHUNK)), abs(np.log(mix.micro_batch / REFERENCE_BATCH))

    x = min(duty.mixes, key=distance)  # the mix of the family that is closest to the reference
    duty, t = replace(duty, mixes=(x,)), costs.scopes[duty.scope].tables
    speeds: dict[int, float] = defaultdict(float)  # layers per second of one GPU
    for s, (g, tp) in enumerate(costs.ranks):
        speeds[g] = max(speeds[g], 1.0 / (tp * float(t.layer_s[x, s])))
    staying = sorted(group, key=lambda part: (-speeds[part[0]], part[0]))
    best, leavers = _path(costs, duty, staying), list[int]()
    while len(staying) > 1:
        without = _path(costs, duty, staying[:-1])
        if best is not None and (without is None or without.cost_s * (1.0 - LEAST_GAIN) > best.cost_s):
            break
        leavers.insert(0, staying.pop()[0])
        best = without
    return None if best is None else best._replace(leavers=tuple(leavers))


def _path(costs: CostTables, duty: ReplicaDuty, parts: Sequence[tuple[int, tuple[int, ...]]]) -> DensePath | None:
    """Return the dense path over all GPUs of these classes, in order, or None if it cannot hold the weights.

    Its cost is that at the split of layers that balances compute.
    """
    ranks: list[int] = []
    for device_class, nodes in parts:
        rank_of = {tp: s for s, (c, tp) in enumerate(costs.ranks) if c == device_class}
        ranks += [rank_of[tp] for count in nodes for tp in tp_groups(count, list(rank_of))]
    if not ranks:
        return None
    t, (x,), s = costs.scopes[duty.scope].tables, duty.mixes, np.array(ranks)
    reduce_s = np.array([_all_reduce_s(costs, x, rank) for rank in ranks])
    # No head group is kept, because the stages' KV is decided later.
    compute_s = (t.layer_s[x, s] - reduce_s)[None, :]
    p = priced(costs, duty, tuple(ranks), compute_s, np.zeros_like(compute_s), t.rank_groups[s]).unlimited_at(0)
    even = p._replace(
        fixed_s=np.zeros_like(p.fixed_s), in_flight=np.array([2 * len(ranks)]), full=mixes.Regime(0.0, 0.0)
    )
    split = best_split(even)
    if split.x < 0:
        return None
    cost_s = float(split.interval_s + split.layers @ reduce_s + t.hop_s[x, s[1:]].sum())
    return DensePath(tuple(ranks), cost_s, ())


def _all_reduce_s(costs: CostTables, x: int, rank: int) -> float:
    """Return the seconds that a request spends in the all-reduces of one layer."""
    mix, device = costs.mixes[x], _card(costs, *costs.ranks[rank])
    with_chunk, plain = mix.micro_batch + mix.chunk_tokens, mix.micro_batch
    return float(mix.chunk_iterations * device.reduces_s(with_chunk) + mix.plain_iterations * device.reduces_s(plain))


def _card(costs: CostTables, device_class: int, tp: int) -> DeviceCost:
    """Return the costs of a GPU of a class in a TP group of this size; on its own it holds all heads."""
    c, model = costs.classes[device_class], costs.problem.model
    shape = cost.rank_shape(model, tp)
    assert shape is not None, "rank types are valid shapes, and one GPU holds all heads"
    return DeviceCost(model, costs.problem.profile_of(c.gpu, c.reserved_bytes), costs.moments, shape, c.intra)


# --- shared attention workers


def best_with_pool(costs: CostTables, duty: ReplicaDuty, ranks: Ranks, pool: SharedPool | None) -> Template | None:
    """Return the dense path at its best setting with these attention workers, or without; None if nothing fits."""
    without = template_of(duty, [TemplateStage(rank, 0) for rank in ranks], pipeline_of(costs, duty, ranks))
    if pool is None:
        return without
    found = [without]
    for given in _shares(costs, duty, ranks, pool):
        stages = [
            TemplateStage(rank, 0, pool.device_class, pool.cards, k) if k else TemplateStage(rank, 0)
            for rank, k in zip(ranks, given.tolist(), strict=True)
        ]
        found.append(template_of(duty, stages, pooled_pipeline(costs, duty, ranks, pool, given)))
    return fastest(found)


def _shares(costs: CostTables, duty: ReplicaDuty, ranks: Ranks, pool: SharedPool) -> Iterator[IntArray]:
    """Yield the head groups that every stage gives away, for ever larger shares; stages that cannot give any keep all.

    A stage cannot if its ranks share head groups, or if the family has no such attention workers for it.
    """
    model = costs.problem.model
    tps = np.array([costs.ranks[rank][1] for rank in ranks], dtype=np.int64)
    has_pool = costs.scopes[duty.scope].tables.pool_start[np.array(ranks), pool.device_class] >= 0
    groups = np.where((tps <= model.head_groups) & has_pool, np.maximum(1, model.head_groups // tps), 0)
    finest = int(groups.max(initial=0))
    for step in range(1, finest + 1):
        yield (groups * step + finest // 2) // finest


def pooled_pipeline(costs: CostTables, duty: ReplicaDuty, ranks: Ranks, pool: SharedPool, given: IntArray) -> Pipeline:
    """Return the pipeline of a dense path whose stages give ``given`` [S] head groups per rank to the pool."""
    t = costs.scopes[duty.scope].tables
    x, s = np.array(duty.mixes, dtype=np.int64), np.array(ranks, dtype=np.int64)
    size = costs.pool_sizes.index(pool.cards)
    entry = t.pool_start[s, pool.device_class] + (given - 1) * len(costs.pool_sizes) + size
    at, kept = (x[:, None], np.where(given > 0, entry, 0)), (x[:, None], s, t.rank_groups[s])
    attention_s = np.where(given > 0, t.pool_s[at], t.own_s[kept])
    chunk_attention_s = np.where(given > 0, t.chunk.pool_s[at], t.chunk.own_s[kept])
    compute_s, chunk_s = t.layer_s[np.ix_(x, s)] + attention_s, t.chunk.layer_s[np.ix_(x, s)] + chunk_attention_s
    pipeline, worker = priced(costs, duty, ranks, compute_s, chunk_s, given), _card(costs, pool.device_class, 1)
    card_s, card_share = np.zeros_like(compute_s), np.zeros(pipeline.room.shape)
    requests = t.micro_batch[x][:, None] * t.in_flight[None, :]
    for j, (rank, k) in enumerate(zip(ranks, given.tolist(), strict=True)):
        tp = int(t.rank_tp[rank])
        queries = costs.problem.model.q_heads // tp // int(t.rank_groups[rank])
        for i, mix in enumerate(costs.mixes[index] for index in duty.mixes):
            load = -(-mix.micro_batch * k * tp // pool.cards)
            card_s[i, j] = mix.iterations * float(worker.decode_attention_s(float(load), queries))
        pairs = -(-requests * tp * k // pool.cards)  # on the fullest card
        card_bytes = pairs / requests * t.kv_tokens[x] * t.kv_group_bytes
        card_share[:, :, j] = card_bytes / worker.room_bytes()
    return pipeline._replace(card_s=card_s, card_share=card_share)
