"""Which replica a request goes to."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol

from hetis.simulator.replica import ReplicaRun


class Router(Protocol):
    """Chooses among replicas that are up."""

    def choose(self, replicas: Sequence[ReplicaRun]) -> ReplicaRun:
        """One of at least one replica that takes prompts."""


class LeastWork:
    """The replica that would be done with its requests, and the new one, first, at its planned rate."""

    def choose(self, replicas: Sequence[ReplicaRun]) -> ReplicaRun:
        return min(replicas, key=_work_s)


class Weighted:
    """Each in proportion to its planned rate, as evenly as whole requests allow (smooth weighted round robin)."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._credit: dict[int, float] = {}

    def choose(self, replicas: Sequence[ReplicaRun]) -> ReplicaRun:
        total, credit = 0.0, self._credit
        for replica in replicas:
            if replica.number not in credit:
                credit[replica.number] = self._random.random() * replica.rate  # not all begin with the same one
            credit[replica.number] += replica.rate
            total += replica.rate
        best = max(replicas, key=lambda replica: credit[replica.number])
        credit[best.number] -= total
        return best


def _work_s(replica: ReplicaRun) -> float:
    return (replica.outstanding + 1) / replica.rate
