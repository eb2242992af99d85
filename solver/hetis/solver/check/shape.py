"""The shapes and links that determine a replica's numbers, without device names; equal shapes have equal numbers."""

from __future__ import annotations

from dataclasses import dataclass

from hetis.solver.cluster import Link
from hetis.solver.plan import Role


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolShape:
    """The attention workers of one copy of a stage: p ``cards`` with k ``head_groups`` of every TP rank."""

    gpu: str
    cards: int
    head_groups: int
    link: Link  # between the stage and the pool


@dataclass(frozen=True, slots=True, kw_only=True)
class StageShape:
    """A stage: TP size n, copies c, repeated ``layers`` l (without the prefix layers of the first stage)."""

    gpu: str
    tp: int
    copies: int
    layers: int
    intra_link: Link  # between the GPUs of a TP group
    hop_link: Link  # the link that every hop into the stage is charged
    pool: PoolShape | None = None
    kv_link: Link | None = None  # the slowest link over which a prefill replica's KV may leave


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaShape:
    """A replica: its stages in order, b ``micro_batch``, M ``in_flight``, C ``chunk_tokens``.

    The copies of its one stage share their experts and iterate together if ``attention_dp`` is over 1, their number.
    ``shared_by`` has an entry for every set of stages that one card serves: their positions.
    """

    micro_batch: int
    in_flight: int
    chunk_tokens: int
    stages: tuple[StageShape, ...]
    role: Role = Role.UNIFIED
    attention_dp: int = 1
    shared_by: tuple[tuple[int, ...], ...] = ()
    slowest_link: Link | None = None  # anywhere in the cluster; None for a decode replica

    def pool_of(self, position: int) -> PoolShape:
        """Return the attention workers of a stage that has them."""
        pool = self.stages[position].pool
        assert pool is not None
        return pool
