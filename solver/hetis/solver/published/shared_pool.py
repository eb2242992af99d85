"""Attention workers that serve every stage of a replica in turn: the best setting of a dense path with such a pool.

See "Shared pools" in `docs/cost-model.md`: every stage is timed as if the cards were its own, while a card is busy with
the work of all stages and holds the KV of all. Every stage gives away the same share of its head groups, rounded to
whole groups (Hetis solves a linear program for every batch, but a placement only needs its average).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hetis.solver import cost
from hetis.solver.cost import DeviceCost
from hetis.solver.placement.classes import IntArray
from hetis.solver.placement.tables import Atlas, FloatArray
from hetis.solver.placement.template import Template, TemplateStage
from hetis.solver.published.layers import Pipeline, best_split
from hetis.solver.published.pipelines import Ranks, ReplicaDuty, pipeline_of, priced


@dataclass(frozen=True, slots=True)
class SharedPool:
    """Cards of one class that a whole replica shares."""

    device_class: int
    cards: int


def best_with_pool(atlas: Atlas, duty: ReplicaDuty, ranks: Ranks, pool: SharedPool | None) -> Template | None:
    """Return the dense path at its best setting with these attention workers, or without; None if nothing fits."""
    best = _template(atlas, duty, ranks, None, np.zeros(len(ranks), dtype=np.int64), pipeline_of(atlas, duty, ranks))
    if pool is None:
        return best
    for given in _shares(atlas, ranks):
        candidate = _template(atlas, duty, ranks, pool, given, pooled_pipeline(atlas, duty, ranks, pool, given))
        if candidate is not None and (best is None or candidate.interval_s < best.interval_s):
            best = candidate
    return best


def pooled_pipeline(atlas: Atlas, duty: ReplicaDuty, ranks: Ranks, pool: SharedPool, given: IntArray) -> Pipeline:
    """Return the pipeline of a dense path whose stages give ``given`` [S] head groups per rank to the pool."""
    t = atlas.scopes[duty.scope].tables
    x, s = np.array(duty.mixes, dtype=np.int64), np.array(ranks, dtype=np.int64)
    layer_s = t.layer_s[np.ix_(x, s)]
    size = atlas.pool_sizes.index(pool.cards)
    entry = t.pool_start[s, pool.device_class] + (given - 1) * len(atlas.pool_sizes) + size
    pooled = t.pool_s[x[:, None], np.where(given > 0, entry, 0)]
    attention_s = np.where(given > 0, pooled, t.own_s[x[:, None], s, t.rank_groups[s]])
    own_chunk_s = t.own_s[x[:, None], s, t.rank_groups[s]] / t.iterations[x][:, None]
    chunk_s = np.where(given > 0, t.chunk.pool_s[x[:, None], np.where(given > 0, entry, 0)], own_chunk_s)
    pipeline = priced(atlas, duty, ranks, layer_s + attention_s, t.chunk.layer_s[np.ix_(x, s)] + chunk_s, given)
    worker = worker_cost(atlas, pool)
    card_s = np.zeros_like(layer_s)
    card_share = np.zeros(pipeline.room.shape)
    for j, (rank, k) in enumerate(zip(ranks, given.tolist(), strict=True)):
        tp = int(t.rank_tp[rank])
        queries = atlas.problem.model.q_heads // tp // int(t.rank_groups[rank])
        for i, mix in enumerate(atlas.mixes[index] for index in duty.mixes):
            load = -(-mix.micro_batch * k * tp // pool.cards)
            card_s[i, j] = mix.iterations * float(worker.decode_attention_s(float(load), queries))
        card_share[:, :, j] = _card_bytes(atlas, duty, tp * k, pool.cards) / worker.room_bytes()
    return pipeline._replace(card_s=card_s, card_share=card_share)


def worker_cost(atlas: Atlas, pool: SharedPool) -> DeviceCost:
    """Return the costs of a card of the pool."""
    c, model = atlas.classes[pool.device_class], atlas.problem.model
    shape = cost.rank_shape(model, 1)
    assert shape is not None, "one GPU holds all heads"
    return DeviceCost(model, atlas.problem.profiles[c.gpu], atlas.moments, shape, c.intra)


def _card_bytes(atlas: Atlas, duty: ReplicaDuty, groups: int, cards: int) -> FloatArray:
    """Return KV bytes of one layer on the fullest card, shape [X, F]; ``groups`` are those of all ranks together."""
    t = atlas.scopes[duty.scope].tables
    x = np.array(duty.mixes, dtype=np.int64)
    requests = t.micro_batch[x][:, None] * t.in_flight[None, :]
    pairs = -(-requests * groups // cards)
    result: FloatArray = pairs / requests * t.kv_tokens[x][:, :, 0] * t.kv_group_bytes
    return result


def _shares(atlas: Atlas, ranks: Ranks) -> Iterator[IntArray]:
    """Yield the head groups that every stage gives away, for ever larger shares; unsplittable stages keep all."""
    model = atlas.problem.model
    tps = np.array([atlas.ranks[rank][1] for rank in ranks], dtype=np.int64)
    groups = np.where(tps <= model.head_groups, np.maximum(1, model.head_groups // tps), 0)
    finest = int(groups.max(initial=0))
    for step in range(1, finest + 1):
        yield (groups * step + finest // 2) // finest


def _template(
    atlas: Atlas, duty: ReplicaDuty, ranks: Ranks, pool: SharedPool | None, given: IntArray, pipeline: Pipeline
) -> Template | None:
    split = best_split(pipeline)
    if split.x < 0:
        return None
    stages = [
        TemplateStage(rank, 1, layers)
        if pool is None or k == 0
        else TemplateStage(rank, 1, layers, pool.device_class, pool.cards, k)
        for rank, layers, k in zip(ranks, split.layers.tolist(), given.tolist(), strict=True)
    ]
    return Template(duty.scope, duty.mixes[split.x], split.f, tuple(stages), split.interval_s)
