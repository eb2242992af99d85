"""Limits on the rate of a caller's changes: each is a transaction that reaches the disk, and they are serialised."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from hetis.planner.failures import quota_exceeded
from hetis.planner.service.access import NEEDED, STANDBY_READS
from hetis.planner.service.identity import CallerRole

WRITES = frozenset(
    method
    for method, roles in NEEDED.items()
    if CallerRole.VIEWER not in roles
    and method not in STANDBY_READS
    and method.split(".")[-1].partition("/")[0] not in ("DispatchService", "AgentService")
)
"""The methods that are limited. Dispatch does not touch the disk, and a node has only one agent stream."""
_MOST_REMEMBERED = 10_000


@dataclass(slots=True)
class _Bucket:
    tokens: float
    filled_s: float


class WriteRates:
    """A token bucket per caller, from which each call takes one token.

    Args:
        per_s: tokens added per second.
        burst: capacity of a bucket.
        clock: monotonic seconds.
    """

    def __init__(self, *, per_s: float = 100.0, burst: int = 500, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_s, self._burst, self._clock = per_s, burst, clock
        self._buckets: dict[str, _Bucket] = {}

    def take(self, method: str, caller: str) -> None:
        """Take a token from the caller's bucket if the method is a write.

        Raises:
            ServiceError: QUOTA_EXCEEDED, with the time when the caller may continue.
        """
        if method not in WRITES:
            return
        now_s = self._clock()
        bucket = self._buckets.get(caller)
        if bucket is None:
            self._forget_full(now_s)
            bucket = self._buckets[caller] = _Bucket(float(self._burst), now_s)
        bucket.tokens = min(self._burst, bucket.tokens + self._per_s * (now_s - bucket.filled_s))
        bucket.filled_s = now_s
        if bucket.tokens < 1:
            raise quota_exceeded(
                caller,
                "writes_per_second",
                f"{caller} has changed things more than {self._per_s:g} times a second",
                limit=self._per_s,
                retry_after_s=(1 - bucket.tokens) / self._per_s,
            )
        bucket.tokens -= 1

    def _forget_full(self, now_s: float) -> None:
        """Drop full buckets when there are many; callers are names of credentials, but these can be numerous."""
        if len(self._buckets) >= _MOST_REMEMBERED:
            full_s = self._burst / self._per_s
            self._buckets = {name: kept for name, kept in self._buckets.items() if now_s - kept.filled_s < full_s}
