"""Links shared by transfers in the background: one transfer at a time, at the speed of the slower end.

Every GPU has two ends, an outgoing and an incoming one, shared by all uses: KV from prefill to decode replicas and head
groups moved by re-dispatch wait for one another. The ranks of a tensor-parallel group count as their first.
"""

from __future__ import annotations


class SharedLink:
    """One end of transfers: a direction of a network card or the link between two zones; first come, first served."""

    __slots__ = ("busy_s", "free_s")

    def __init__(self) -> None:
        self.free_s = self.busy_s = 0.0


class FleetLinks:
    """The ends of a whole fleet, created at their first use."""

    def __init__(self) -> None:
        self._leaving: dict[str, SharedLink] = {}
        self._coming: dict[str, SharedLink] = {}
        self._between: dict[tuple[str, str], SharedLink] = {}

    def leaving(self, device: str) -> SharedLink:
        return self._leaving.setdefault(device, SharedLink())

    def coming(self, device: str) -> SharedLink:
        return self._coming.setdefault(device, SharedLink())

    def between(self, source: str, target: str) -> SharedLink:
        """Return the links from one zone to another."""
        return self._between.setdefault((source, target), SharedLink())


def transfer(now_s: float, seconds: float, *ends: SharedLink) -> float:
    """Occupy all ``ends`` for ``seconds`` as soon as all are free; return when it is done."""
    start_s = max(now_s, *(end.free_s for end in ends))
    for end in ends:
        end.free_s = start_s + seconds
        end.busy_s += seconds
    return start_s + seconds
