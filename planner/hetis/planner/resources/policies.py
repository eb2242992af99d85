"""What a cluster's policy may say."""

from __future__ import annotations

from google.protobuf.duration_pb2 import Duration

from hetis.planner.resources.checking import Checks
from hetis.v1 import cluster_pb2

_LONGEST_S = 315_576_000_000  # of a valid Duration


def check_policy(checks: Checks, policy: cluster_pb2.ClusterPolicy, field: str) -> None:
    """The limits that stand in ``cluster.proto``."""
    ratio = policy.deviation_ratio
    checks.require(0 <= ratio <= 100, f"{field}.deviation_ratio", f"is {ratio}, must be from 0 to 100")
    mark = policy.high_water
    checks.require(0 <= mark <= 1, f"{field}.high_water", f"is {mark}, must be above 0 and at most 1, or 0 for 0.9")
    for name, least_s, most_s, words in (
        ("redispatch_interval", 0.0, 3600.0, "0 to 1 hour"),
        ("prepare_timeout", 0.1, 600.0, "100 ms to 10 minutes"),
        ("placement_patience", 1.0, 86400.0, "1 s to 24 hours"),
    ):
        if policy.HasField(name):  # type: ignore[arg-type]
            _check_duration(checks, getattr(policy, name), f"{field}.{name}", least_s, most_s, words)


def _check_duration(checks: Checks, duration: Duration, field: str, least_s: float, most_s: float, words: str) -> None:
    signs_agree = duration.seconds * duration.nanos >= 0
    valid = abs(duration.seconds) <= _LONGEST_S and abs(duration.nanos) < 10**9 and signs_agree
    if checks.require(valid, field, f"is no valid duration: {duration.seconds} s and {duration.nanos} ns"):
        seconds = duration.seconds + duration.nanos / 1e9
        checks.require(least_s <= seconds <= most_s, field, f"is {seconds:g} s, must be {words}")
