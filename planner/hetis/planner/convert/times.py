"""Times in messages and of clocks."""

from __future__ import annotations

from google.protobuf.timestamp_pb2 import Timestamp


def timestamp(time_s: float) -> Timestamp:
    """Return the timestamp of a Unix time, to the microsecond."""
    whole = int(time_s // 1)
    return Timestamp(seconds=whole, nanos=min(round((time_s - whole) * 1e6), 999_999) * 1000)


def optional_timestamp(time_s: float | None) -> Timestamp | None:
    """Return the timestamp, or None if there is no time, so that the field is left unset."""
    return None if time_s is None else timestamp(time_s)
