"""Settings of the fleet, the automatic reactions that a cluster's policy allows, and counters."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

from hetis.planner.convert.names import duration, seconds_of
from hetis.solver.redispatch.triggers import THETA
from hetis.v1 import agent_service_pb2, cluster_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSettings:
    """Settings; times are in seconds.

    Attributes:
        kv_change_ratio, kv_thresholds, min_report_s: as in the API's ``Settings``.
    """

    heartbeat_s: float = 5.0  # agents send something at least this often
    # A node that was silent for this long is LOST; for a node known before the planner started, silence counts from its
    # start
    lease_s: float = 20.0
    suspect_s: float = 8.0  # a node that was silent for this long is SUSPECT; a broken stream makes it so at once
    kv_change_ratio: float = 0.02
    kv_thresholds: tuple[float, ...] = (0.8, 0.9, 0.95)
    min_report_s: float = 1.0
    answer_s: float = 10.0  # a delta without an answer is sent again, under the same nonce, after this long
    retry_s: float = 5.0  # an assignment refused for lack of an engine is tried again after this long
    start_s: float = 900.0  # a replica that does not serve this long after its GPUs were free has failed
    drain_s: float = 1800.0  # a draining replica is stopped after this long, whatever still runs
    publish_s: float = 0.25  # the least time between two updates for watchers and observers of states
    tick_s: float = 0.25  # how often leases and deadlines are checked
    reconnect_s: float = 5.0  # agents reconnect within this time after a Goodbye
    piece_bytes: int = 256 * 2**20  # most bytes of the head maps of one replica, all pieces together

    def __post_init__(self) -> None:
        if not self.heartbeat_s < self.suspect_s < self.lease_s:
            raise ValueError(
                f"heartbeat_s {self.heartbeat_s}, suspect_s {self.suspect_s} and lease_s {self.lease_s} must rise"
            )

    def to_proto(self) -> agent_service_pb2.Settings:
        """Return the settings that agents get."""
        return agent_service_pb2.Settings(
            heartbeat_interval=duration(self.heartbeat_s),
            lease=duration(self.lease_s),
            kv_change_ratio=self.kv_change_ratio,
            kv_thresholds=self.kv_thresholds,
            min_report_interval=duration(self.min_report_s),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RedispatchPolicy:
    """The re-dispatch part of a `ClusterPolicy`."""

    mode: cluster_pb2.ReactionMode.ValueType = cluster_pb2.REACTION_MODE_AUTOMATIC  # OFF, ADVISORY or AUTOMATIC
    deviation_ratio: float = THETA  # share that the slowest device may be above the ideal
    # Share of a device's KV blocks above which head groups leave; None: the stage's own
    high_water: float | None = None
    interval_s: float = 5.0  # least time between two re-dispatches of a replica
    prepare_timeout_s: float = 30.0  # how long the preparation of one may take
    kv_bytes: float = math.inf  # most KV that one may move

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
        interval_s=_seconds(message, "redispatch_interval", default.interval_s),
        prepare_timeout_s=_seconds(message, "prepare_timeout", default.prepare_timeout_s),
        kv_bytes=float(message.redispatch_kv_bytes) or math.inf,
    )


def proposal_policy(message: cluster_pb2.ClusterPolicy) -> ProposalPolicy:
    default = ProposalPolicy()
    patience_s = _seconds(message, "placement_patience", default.patience_s)
    return ProposalPolicy(mode=message.placement or default.mode, patience_s=patience_s)


def _seconds(message: cluster_pb2.ClusterPolicy, field: str, default_s: float) -> float:
    return seconds_of(getattr(message, field)) if message.HasField(field) else default_s  # type: ignore[arg-type]


@dataclass(slots=True, kw_only=True)
class FleetCounters:
    """Counters, which only grow."""

    messages: Counter[str] = field(default_factory=Counter)  # from agents, by the field that was set
    reports_dropped: int = 0  # reports that a newer one had overtaken
    deltas: Counter[str] = field(default_factory=Counter)  # sent, by the field that was set
    nacks: Counter[str] = field(default_factory=Counter)  # by reason
    streams: int = 0  # opened; `takeovers` of them ended another stream of their node
    takeovers: int = 0
    refusals: int = 0  # streams of another run of an agent while one was connected
    redispatches: Counter[str] = field(default_factory=Counter)  # ended ones, by state
    replicas_ignored: int = 0  # replicas of other nodes or of nobody, which a node mentioned after too many of the kind
    contradictions: int = 0  # reports of an authority that contradict its first: a bug, here or there
