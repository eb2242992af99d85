"""Counters of the fleet since it started: plain numbers for exporters."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True)
class FleetCounters:
    """Counters, which only grow.

    Attributes:
        messages: from agents, by the field that was set.
        reports_dropped: reports that a newer one had overtaken.
        deltas: sent, by the field that was set.
        nacks: by reason.
        streams: opened; `takeovers` of them ended another stream of their node.
        refusals: streams of another run of an agent while one was connected.
        redispatches: ended ones, by state.
        replicas_ignored: replicas of other nodes or of nobody, which a node mentioned after too many of the kind.
        contradictions: reports of an authority that contradict its first: a bug, here or there.
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
