"""Times of the KV of prompts on its way from prefill to decode replicas, as seen by one of the two."""

from __future__ import annotations

from hetis.solver.check.fleet import ReplicaShape, StageShape
from hetis.solver.cost import DeviceCost, Mix, PoolCost


def layer_wire_s(cost: DeviceCost, pool: PoolCost | None, stage: StageShape, mix: Mix) -> float:
    """Return wire: seconds for the KV of one request and layer to leave a prefill stage or reach a decode stage."""
    if stage.kv_link is not None:  # a prefill stage
        chunk_s = float(cost.kv_transfer_s(mix.chunk_tokens, cost.shape.groups, stage.kv_link))
        return cost.moments.mean_prompt / mix.chunk_tokens * chunk_s
    moved = 0 if stage.pool is None else stage.pool.head_groups
    kept_s = float(cost.kv_transfer_s(cost.moments.mean_prompt, cost.shape.groups - moved, stage.hop_link))
    if stage.pool is None or pool is None:
        return kept_s
    return max(kept_s, float(pool.receive_s(moved, stage.pool.cards)))


def landing_s(costs: list[DeviceCost], shape: ReplicaShape) -> float:
    """Return the seconds that the last KV of a prompt adds to a prefill replica's TTFT; 0 for other roles."""
    links = [(cost, stage.kv_link) for cost, stage in zip(costs, shape.stages, strict=True)]
    return max((cost.landing_s(shape.chunk_tokens, link) for cost, link in links if link is not None), default=0.0)
