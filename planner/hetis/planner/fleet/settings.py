"""The fleet's settings, the automatic reactions that a cluster's policy allows, and the fleet's counters."""

# ruff: noqa: RUF009  # `_from` and `_counted` return fields, not defaults

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from google.protobuf.duration_pb2 import Duration

from hetis.planner.convert.names import duration, seconds_of
from hetis.solver.redispatch.triggers import THETA
from hetis.v1 import agent_service_pb2, cluster_pb2

Mode = cluster_pb2.ReactionMode


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSettings:
    """Settings of the fleet. Times are in seconds.

    Attributes:
        kv_change_ratio, kv_thresholds, min_report_s: as in the API's ``Settings``.
    """

    heartbeat_s: float = 5.0  # the longest silence of a connected agent
    # A node that was silent for so long is LOST; for a node known before the planner started, silence counts from the
    # planner's start
    lease_s: float = 20.0
    suspect_s: float = 8.0  # a node that was silent for so long is SUSPECT; after a broken stream it is SUSPECT at once
    kv_change_ratio: float = 0.02
    kv_thresholds: tuple[float, ...] = (0.8, 0.9, 0.95)
    min_report_s: float = 1.0
    answer_s: float = 10.0  # a delta without an answer is sent again after so long, with the same nonce
    retry_s: float = 5.0  # an assignment that was refused for lack of an engine is sent again after so long
    start_s: float = 900.0  # a replica that does not serve so long after its GPUs became free has failed
    drain_s: float = 1800.0  # a draining replica is stopped after so long, whatever is still running
    publish_s: float = 0.25  # shortest time between two updates of states for watchers and observers
    tick_s: float = 0.25  # how often leases and deadlines are checked
    reconnect_s: float = 5.0  # agents reconnect within so long after a Goodbye
    piece_bytes: int = 256 * 2**20  # limit on the head maps of one replica, in bytes, all pieces together

    def __post_init__(self) -> None:
        if not self.heartbeat_s < self.suspect_s < self.lease_s:
            raise ValueError(
                f"heartbeat_s {self.heartbeat_s}, suspect_s {self.suspect_s} and lease_s {self.lease_s} must rise"
            )

    def to_proto(self) -> agent_service_pb2.Settings:
        """Return the settings that are sent to agents."""
        return agent_service_pb2.Settings(
            heartbeat_interval=duration(self.heartbeat_s),
            lease=duration(self.lease_s),
            kv_change_ratio=self.kv_change_ratio,
            kv_thresholds=self.kv_thresholds,
            min_report_interval=duration(self.min_report_s),
        )


def _from(name: str, default: Any) -> Any:
    """Return the field of a policy that is read from this field of a `ClusterPolicy`, where it may be unset."""
    return field(default=default, metadata={"name": name})


@dataclass(frozen=True, slots=True, kw_only=True)
class RedispatchPolicy:
    """The part of a `ClusterPolicy` about re-dispatch."""

    mode: Mode.ValueType = _from("redispatch", Mode.REACTION_MODE_AUTOMATIC)  # OFF, ADVISORY or AUTOMATIC
    deviation_ratio: float = _from("deviation_ratio", THETA)  # share by which the slowest device may exceed the ideal
    # Share of a device's KV blocks above which head groups should leave; None: the stage's own
    high_water: float | None = _from("high_water", None)
    interval_s: float = _from("redispatch_interval", 5.0)  # shortest time between two re-dispatches of a replica
    prepare_timeout_s: float = _from("prepare_timeout", 30.0)  # longest that the preparation of a re-dispatch may take
    kv_bytes: float = _from("redispatch_kv_bytes", math.inf)  # limit on the KV that a re-dispatch may move

    @property
    def is_off(self) -> bool:
        return self.mode == Mode.REACTION_MODE_OFF

    @property
    def is_advisory(self) -> bool:
        return self.mode == Mode.REACTION_MODE_ADVISORY


@dataclass(frozen=True, slots=True, kw_only=True)
class ProposalPolicy:
    """The part of a `ClusterPolicy` about proposals: ``mode``, and how long a change of capacity must have lasted."""

    mode: Mode.ValueType = _from("placement", Mode.REACTION_MODE_ADVISORY)
    patience_s: float = _from("placement_patience", 300.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficPolicy:
    """The part of a `ClusterPolicy` about changes of traffic."""

    mode: Mode.ValueType = _from("traffic", Mode.REACTION_MODE_ADVISORY)
    changes_per_hour: int = _from("traffic_changes_per_hour", 20)
    cool_down_s: float = _from("traffic_cool_down", 300.0)


P = TypeVar("P", RedispatchPolicy, ProposalPolicy, TrafficPolicy)


def policy_from(kind: type[P], message: cluster_pb2.ClusterPolicy) -> P:
    """Return a part of a policy; what is unset, or 0 without a presence of its own, has its default."""
    names = {one.metadata["name"]: one.name for one in fields(kind)}
    given = dict[str, Any]()
    for one, value in message.ListFields():
        if one.name in names:
            given[names[one.name]] = seconds_of(value) if isinstance(value, Duration) else value
    return kind(**given)


def _counted(metric: str, text: str, *, by: str = "") -> Any:
    """Return the field of a counter, with its metric's name, help and, if it counts by something, label."""
    return field(default_factory=Counter if by else int, metadata={"metric": metric, "help": text, "label": by})


@dataclass(slots=True, kw_only=True)
class FleetCounters:
    """Counters of events, which never decrease."""

    messages: Counter[str] = _counted("agent_messages", "Messages from agents.", by="kind")
    deltas: Counter[str] = _counted("deltas_sent", "Deltas sent to agents.", by="kind")
    nacks: Counter[str] = _counted("deltas_refused", "Deltas that agents refused.", by="reason")
    redispatches: Counter[str] = _counted("redispatches_ended", "Re-dispatches that ended.", by="state")
    reports_dropped: int = _counted("reports_dropped", "Reports that arrived after a newer one.")
    streams: int = _counted("agent_streams", "Agent streams opened.")
    takeovers: int = _counted("agent_takeovers", "Streams that replaced an earlier stream of their node.")
    refusals: int = _counted("agent_refusals", "Streams refused because another agent was connected as the node.")
    hellos_refused: Counter[str] = _counted(
        "agent_hellos_refused", "Streams refused at their first message.", by="reason"
    )
    replicas_ignored: int = _counted(
        "replicas_ignored", "Ignored reports of foreign replicas from nodes that reported too many."
    )
    values_dropped: Counter[str] = _counted(
        "report_values_dropped",
        "Values in reports of agents that cannot be: not finite, negative, too large.",
        by="field",
    )
    errors: Counter[str] = _counted(
        "fleet_errors", "Steps of the fleet that failed because of a bug; see the log.", by="step"
    )
    contradictions: int = _counted("contradictions", "Reports of an authority that contradict its first one: a bug.")
