"""Groups of equal replicas of a plan, and a plan's shapes in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hetis.solver.check.fleet import ReplicaShape
from hetis.solver.plan import Plan, ReplicaPlan, Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Equal replicas.

    Attributes:
        count: their number.
        shape: the inputs of their times, with engine settings as planned.
        claimed: share of the derived rate that the plan claims; below 1 if links are uneven, as the worst one counts.
        zones: of the stages, in order.
        kv_zones: zones to which prefill replicas may send KV.
    """

    count: int
    shape: ReplicaShape
    claimed: float
    zones: tuple[str, ...]
    kv_zones: tuple[str, ...]


def structure_of(plan: Plan) -> Mapping[str, int]:
    """Return the shapes of the replicas in words, with the number of each, without changeable batches and chunks."""
    counts: dict[str, int] = {}
    for replica in plan.replicas:
        shape = describe(replica)
        counts[shape] = counts.get(shape, 0) + 1
    return dict(sorted(counts.items()))


def describe(replica: ReplicaPlan) -> str:
    """Return ``A100-PCIe-80GB TP4 52 layers + 2 L4 | RTX-3090 TP2 ×2 28 layers``, with the role in front."""
    pools = {pool.stage: pool for pool in replica.attention_workers}
    stages = []
    for position, stage in enumerate(replica.stages):
        text = f"{stage.gpu} {replica.parallel_sizes(stage)} {stage.num_layers} layers"
        if (pool := pools.get(position)) is not None:
            text += f" + {len(pool.devices)} {pool.gpu} ({pool.kv_head_groups} head groups)"
        stages.append(text)
    role = "" if replica.role is Role.UNIFIED else f"{replica.role}: "
    return role + " | ".join(stages)
