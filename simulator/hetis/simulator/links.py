"""Links that transfers in the background share: one after the other, as fast as the slower end allows.

Every GPU has two ends, what leaves it and what comes to it, whoever uses them: KV from prefill to decode replicas and
head groups that re-dispatch moves wait for one another. The ranks of a tensor-parallel group count as their first.
"""

from __future__ import annotations


class SharedLink:
    """One end of transfers: a direction of a network card, or of the link between two zones. First come, first go."""

    __slots__ = ("busy_s", "free_s")

    def __init__(self) -> None:
        self.free_s = self.busy_s = 0.0


class FleetLinks:
    """The ends of a whole fleet, made when they are first asked for."""

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
    """Occupies all ``ends`` for ``seconds`` as soon as all are free; returns when it is done."""
    start_s = max(now_s, *(end.free_s for end in ends))
    for end in ends:
        end.free_s = start_s + seconds
        end.busy_s += seconds
    return start_s + seconds
