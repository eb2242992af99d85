"""The GPU types of a replica that compute its dense layers, and those that become attention workers: Hetis's 5% rule.

The cost of a dense path is C = C_comp + C_comm: the seconds for which a request occupies the slowest stage's compute,
and the seconds of all its all-reduces and hops along the pipeline. It is taken at a reference mix, without decode
attention, which Hetis later spreads by heads. GPUs of one type on one node form a TP group as wide as possible;
different nodes and types are joined by pipeline parallelism, the fastest type first. Starting from all types, the
slowest one leaves as long as it reduces the cost by no more than 5%. (The exact terms of C, the reference mix, and that
whole types leave are reconstructed. On the paper's cluster this leaves A100 and RTX 3090 in the dense path and P100 for
attention, as reported.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hetis.solver import cost
from hetis.solver.cost import DeviceCost
from hetis.solver.placement.tables import Atlas
from hetis.solver.published.layers import best_split
from hetis.solver.published.parallelism import Composition, tp_groups
from hetis.solver.published.pipelines import Ranks, ReplicaDuty, priced

LEAST_GAIN = 0.05  # delta: share of the cost by which a type must reduce it to stay in the dense path
REFERENCE_BATCH, REFERENCE_CHUNK = 32, 512


@dataclass(frozen=True, slots=True)
class DensePath:
    """The stages of the dense path, its cost, and the device classes left for attention, fastest first."""

    ranks: Ranks
    cost_s: float
    leavers: tuple[int, ...]


def dense_path(atlas: Atlas, duty: ReplicaDuty, group: Composition) -> DensePath | None:
    """Return a replica's dense path on these GPUs after the 5% rule, or None if they cannot hold the weights."""
    reference = _reference(atlas, duty)
    staying = sorted(group, key=lambda part: (-_speed(atlas, reference, part[0]), part[0]))
    best, leavers = _path(atlas, reference, staying), list[int]()
    while len(staying) > 1:
        without = _path(atlas, reference, staying[:-1])
        if best is not None and (without is None or without.cost_s * (1.0 - LEAST_GAIN) > best.cost_s):
            break
        leavers.insert(0, staying.pop()[0])
        best = without
    return None if best is None else DensePath(best.ranks, best.cost_s, tuple(leavers))


def _reference(atlas: Atlas, duty: ReplicaDuty) -> ReplicaDuty:
    """Return the same duty at one mix, the family's closest to the reference."""

    def distance(x: int) -> tuple[float, float]:
        mix = atlas.mixes[x]
        return abs(np.log(mix.chunk_tokens / REFERENCE_CHUNK)), abs(np.log(mix.micro_batch / REFERENCE_BATCH))

    return ReplicaDuty(duty.role, duty.scope, (min(duty.mixes, key=distance),))


def _speed(atlas: Atlas, reference: ReplicaDuty, device_class: int) -> float:
    """Return the layers per second of one GPU."""
    t = atlas.scopes[reference.scope].tables
    speeds = [
        1.0 / (tp * t.layer_s[reference.mixes[0], s]) for s, (c, tp) in enumerate(atlas.ranks) if c == device_class
    ]
    return float(max(speeds, default=0.0))


def _path(atlas: Atlas, reference: ReplicaDuty, parts: list[tuple[int, tuple[int, ...]]]) -> DensePath | None:
    """Return the dense path over all GPUs of these classes, in order, or None if it cannot hold the weights."""
    rank_of = {rank: s for s, rank in enumerate(atlas.ranks)}
    stages: list[int] = []
    for device_class, nodes in parts:
        sizes = [tp for c, tp in atlas.ranks if c == device_class]
        stages += [rank_of[device_class, tp] for count in nodes for tp in tp_groups(count, sizes)]
    cost_s = _cost_s(atlas, reference, tuple(stages)) if stages else np.inf
    return DensePath(tuple(stages), cost_s, ()) if cost_s < np.inf else None


def _cost_s(atlas: Atlas, reference: ReplicaDuty, ranks: Ranks) -> float:
    """Return C = C_comp + C_comm at the split of layers that balances compute; infinity if the weights do not fit."""
    t = atlas.scopes[reference.scope].tables
    x, s = reference.mixes[0], np.array(ranks)
    reduce_s = np.array([_all_reduce_s(atlas, x, rank) for rank in ranks])
    # No head group is kept, because the KV of the stages is decided later.
    compute_s = (t.layer_s[x, s] - reduce_s)[None, :]
    p = priced(atlas, reference, ranks, compute_s, np.zeros_like(compute_s), t.rank_groups[s])
    even = p._replace(
        fixed_s=np.zeros_like(p.fixed_s),
        in_flight=np.array([2 * len(ranks)]),
        room=p.room[:, :1].copy(),
        card_share=p.card_share[:, :1].copy(),
        t_cap=np.full((1, 1), np.inf),
        trip_cap=np.full((1, 1), np.inf),
        without_chunk=p.without_chunk[:, :1].copy(),
        full=cost.Regime(0.0, 0.0),
    )
    split = best_split(even)
    if split.x < 0:
        return float("inf")
    return float(split.interval_s + split.layers @ reduce_s + t.hop_s[x, s[1:]].sum())


def _all_reduce_s(atlas: Atlas, x: int, rank: int) -> float:
    """Return the seconds of a request in the all-reduces of one layer."""
    device_class, tp = atlas.ranks[rank]
    c, mix, model = atlas.classes[device_class], atlas.mixes[x], atlas.problem.model
    shape = cost.rank_shape(model, tp)
    assert shape is not None, "rank types are valid shapes"
    device = DeviceCost(model, atlas.problem.profiles[c.gpu], atlas.moments, shape, c.intra)
    with_chunk, plain = mix.micro_batch + mix.chunk_tokens, mix.micro_batch
    reduce_s = mix.chunk_iterations * device.reduce_s(with_chunk) + mix.plain_iterations * device.reduce_s(plain)
    return float(2.0 * reduce_s)
