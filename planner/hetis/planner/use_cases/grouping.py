"""Groups of equal replicas: a plan of thousands of replicas has a few dozen shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hetis.solver.plan import ReplicaPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaGroup:
    """Replicas that differ only in the names of their devices.

    Attributes:
        first: the representative of all of them.
        numbers: their positions in the plan, from 0.
        rate: saturated rate of all of them together, requests/s.
    """

    first: ReplicaPlan
    numbers: tuple[int, ...]
    rate: float


def group_replicas(replicas: Sequence[ReplicaPlan]) -> tuple[ReplicaGroup, ...]:
    """Group equal replicas, the group with the highest rate first."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for number, replica in enumerate(replicas):
        groups.setdefault(_shape(replica), []).append(number)
    found = (
        ReplicaGroup(first=replicas[numbers[0]], numbers=tuple(numbers), rate=sum(replicas[n].rate for n in numbers))
        for numbers in groups.values()
    )
    return tuple(sorted(found, key=lambda group: -group.rate))


def _shape(replica: ReplicaPlan) -> tuple[object, ...]:
    stages = tuple((s.gpu, s.tp, s.copies, s.first_layer, s.num_layers, s.kv_head_groups_kept) for s in replica.stages)
    pools = tuple((p.stage, p.gpu, len(p.devices), p.kv_head_groups, p.shared) for p in replica.attention_workers)
    # Four digits: replicas of one template on different nodes may differ in the last digits.
    times = tuple(f"{value:.4g}" for value in (replica.rate, replica.ttft_s, replica.tpot_s))
    sizes = (replica.micro_batch, replica.in_flight, replica.chunk_tokens, replica.kv_tokens)
    return stages, pools, times, sizes, replica.role, replica.kv_zones
