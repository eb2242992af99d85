"""Limits on a caller's open streams: each costs memory and, at every change, time of the only event loop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from hetis.planner.failures import Reason, ServiceError
from hetis.planner.service.access import is_open

MOST_OF_A_CALLER = 100
"""Watches and downloads of one caller, by its credentials."""
MOST_OF_A_HOST = 100
"""Streams of one host to services open to anybody: health and reflection."""
MOST_OF_ALL_HOSTS = 1_000
MOST_OF_ENGINES = 1_000
"""Dispatch streams of one caller: engines use their agents' credentials, which nodes may share."""
_DISPATCH = "/hetis.v1.DispatchService/DispatchRequests"
_UNLIMITED = "/hetis.v1.AgentService/ConnectNode"  # one per node, whose agents may share credentials


class StreamLimits:
    """Counts open streams."""

    def __init__(self) -> None:
        self._open: Counter[str] = Counter()

    @contextmanager
    def opened(self, method: str, *, caller: str, peer: str) -> Iterator[None]:
        """Count a stream as open within the context. ``peer`` is in gRPC's form, with its port.

        Raises:
            ServiceError: TOO_MANY_STREAMS.
        """
        limits = _limits(method, caller, peer)
        for key, most in limits.items():
            if self._open[key] >= most:
                raise ServiceError(
                    Reason.ERROR_REASON_TOO_MANY_STREAMS,
                    f"{key} has {most} streams open already, and may have no more: end one first",
                    metadata={"max_streams": most},
                )
        self._open.update(limits.keys())
        try:
            yield
        finally:
            for key in limits:
                self._open[key] -= 1
                if not self._open[key]:
                    del self._open[key]


def _limits(method: str, caller: str, peer: str) -> dict[str, int]:
    if is_open(method):
        return {f"host {peer.rpartition(':')[0]}": MOST_OF_A_HOST, "everybody together": MOST_OF_ALL_HOSTS}
    if method == _DISPATCH:
        return {f"caller {caller}, for dispatch,": MOST_OF_ENGINES}
    return {} if method == _UNLIMITED else {f"caller {caller}": MOST_OF_A_CALLER}
