"""Which replica a request goes to."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol

from hetis.simulator.replica import ReplicaRun
from hetis.simulator.values import Settings

LONG_QUEUE_TOKENS = 2048  # a batch of prompts, as large as Splitwise lets it be


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


class FewestRequests:
    """The replica with the fewest requests waiting and running, however fast it is: the controller of AlpaServe, by
    which HexGen judges its plans."""

    def choose(self, replicas: Sequence[ReplicaRun]) -> ReplicaRun:
        return min(replicas, key=lambda replica: replica.outstanding)


class FewestTokens:
    """The prefill replica with the fewest prompt tokens waiting; unified ones where it has a batch of them waiting.

    Splitwise: the shortest queue of the prompt pool, and the mixed pool when all of them are long. Without prefill
    replicas, the shortest queue of the others.
    """

    def choose(self, replicas: Sequence[ReplicaRun]) -> ReplicaRun:
        prompt = [replica for replica in replicas if not replica.batching.micro_batch]
        mixed = [replica for replica in replicas if replica.batching.micro_batch]
        for pool in (prompt, mixed):
            waiting = {replica.number: replica.waiting_tokens() for replica in pool}
            shortest = min(pool, key=lambda replica: waiting[replica.number], default=None)
            if shortest is not None and waiting[shortest.number] <= LONG_QUEUE_TOKENS:
                return shortest
        return min(prompt or mixed, key=ReplicaRun.waiting_tokens)


def router_of(settings: Settings) -> Router:
    """The router that the settings name."""
    match settings.router:
        case "least-work":
            return LeastWork()
        case "weighted":
            return Weighted(settings.seed)
        case "fewest-requests":
            return FewestRequests()
        case "fewest-tokens":
            return FewestTokens()


def _work_s(replica: ReplicaRun) -> float:
    return (replica.outstanding + 1) / replica.rate
