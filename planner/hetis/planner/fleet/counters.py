"""What the fleet counted since it started: plain numbers, for whoever exports them."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True)
class FleetCounters:
    """All only grow.

    Attributes:
        messages: of agents, by the field that was set.
        reports_dropped: that a newer one had overtaken.
        deltas: sent, by the field that was set.
        nacks: by reason.
        streams: that began; `takeovers` of them ended another of their node.
        refusals: streams of other runs of an agent, while one was connected.
        redispatches: that ended, by state.
        replicas_ignored: of other nodes or of nobody, that a node spoke of after too many of their kind.
        contradictions: second words of an authority that differ from its first: a bug, here or there.
    """

    messages: dict[str, int] = field(default_factory=dict)
    reports_dropped: int = 0
    deltas: dict[str, int] = field(default_factory=dict)
    nacks: dict[str, int] = field(default_factory=dict)
    streams: int = 0
    takeovers: int = 0
    refusals: int = 0
    redispatches: dict[str, int] = field(default_factory=dict)
    replicas_ignored: int = 0
    contradictions: int = 0


def count(table: dict[str, int], key: str) -> None:
    table[key] = table.get(key, 0) + 1
