"""The automatic reactions that a cluster's policy allows, with the defaults of the API."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hetis.planner.fleet.settings import seconds_of
from hetis.solver.redispatch.triggers import THETA
from hetis.v1 import cluster_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class RedispatchPolicy:
    """The re-dispatch part of a `ClusterPolicy`.

    Attributes:
        mode: OFF, ADVISORY or AUTOMATIC.
        deviation_ratio: share that the slowest device may be above the ideal.
        high_water: share of a device's KV blocks above which head groups leave; None: the stage's own.
        interval_s: least time between two re-dispatches of a replica.
        prepare_timeout_s: how long the preparation of one may take.
        kv_bytes: most KV that one may move.
    """

    mode: cluster_pb2.ReactionMode.ValueType = cluster_pb2.REACTION_MODE_AUTOMATIC
    deviation_ratio: float = THETA
    high_water: float | None = None
    interval_s: float = 5.0
    prepare_timeout_s: float = 30.0
    kv_bytes: float = math.inf

    @property
    def is_off(self) -> bool:
        return self.mode == cluster_pb2.REACTION_MODE_OFF

    @property
    def is_advisory(self) -> bool:
        return self.mode == cluster_pb2.REACTION_MODE_ADVISORY


@dataclass(frozen=True, slots=True, kw_only=True)
class ProposalPolicy:
    """The proposal part of a `ClusterPolicy`: ``mode``, and how long capacity must have changed."""

    mode: cluster_pb2.ReactionMode.ValueType = cluster_pb2.REACTION_MODE_ADVISORY
    patience_s: float = 300.0


def redispatch_policy(message: cluster_pb2.ClusterPolicy) -> RedispatchPolicy:
    default = RedispatchPolicy()
    return RedispatchPolicy(
        mode=message.redispatch or default.mode,
        deviation_ratio=message.deviation_ratio if message.HasField("deviation_ratio") else default.deviation_ratio,
        high_water=message.high_water or None,
        interval_s=seconds_of(message.redispatch_interval)
        if message.HasField("redispatch_interval")
        else default.interval_s,
        prepare_timeout_s=seconds_of(message.prepare_timeout)
        if message.HasField("prepare_timeout")
        else default.prepare_timeout_s,
        kv_bytes=float(message.redispatch_kv_bytes) or math.inf,
    )


def proposal_policy(message: cluster_pb2.ClusterPolicy) -> ProposalPolicy:
    default = ProposalPolicy()
    return ProposalPolicy(
        mode=message.placement or default.mode,
        patience_s=seconds_of(message.placement_patience)
        if message.HasField("placement_patience")
        else default.patience_s,
    )
