"""Settings of the fleet: reporting intervals, tolerated silence, limits of messages."""

from __future__ import annotations

from dataclasses import dataclass

from google.protobuf import duration_pb2

from hetis.v1 import agent_service_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSettings:
    """Settings; times are in seconds.

    Attributes:
        heartbeat_s: agents send something at least this often.
        lease_s: a node that was silent for this long is LOST; for a node known before the planner started, silence
        counts
            from its start.
        suspect_s: a node that was silent for this long is SUSPECT; a broken stream makes it so at once.
        kv_change_ratio, kv_thresholds, min_report_s: as in the API's ``Settings``.
        answer_s: a delta without an answer is sent again, under the same nonce, after this long.
        retry_s: an assignment refused for lack of an engine is tried again after this long.
        start_s: a replica that does not serve this long after its GPUs were free has failed.
        drain_s: a draining replica is stopped after this long, whatever still runs.
        publish_s: the least time between two updates for watchers and observers of states.
        tick_s: how often leases and deadlines are checked.
        reconnect_s: agents reconnect within this time after a Goodbye.
        piece_bytes: most bytes of the head maps of one replica, all pieces together.
    """

    heartbeat_s: float = 5.0
    lease_s: float = 20.0
    suspect_s: float = 8.0
    kv_change_ratio: float = 0.02
    kv_thresholds: tuple[float, ...] = (0.8, 0.9, 0.95)
    min_report_s: float = 1.0
    answer_s: float = 10.0
    retry_s: float = 5.0
    start_s: float = 900.0
    drain_s: float = 1800.0
    publish_s: float = 0.25
    tick_s: float = 0.25
    reconnect_s: float = 5.0
    piece_bytes: int = 256 * 2**20

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


def duration(seconds: float) -> duration_pb2.Duration:
    """Return seconds as a message, exact to the nanosecond."""
    nanos = round(seconds * 1e9)
    return duration_pb2.Duration(seconds=nanos // 10**9, nanos=nanos % 10**9)


def seconds_of(duration: duration_pb2.Duration) -> float:
    return duration.seconds + duration.nanos / 1e9
