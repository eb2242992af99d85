"""Choice of the replica for a request."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Protocol

from hetis.simulator.replica import ReplicaRun
from hetis.simulator.values import Settings

LONG_QUEUE_TOKENS = 2048  # a batch of prompts, at the maximum size in Splitwise


class Router(Protocol):
    """Chooses among replicas that are up."""

    def choose(self, replicas: Sequence[ReplicaRun]) -> ReplicaRun:
        """Return one of at least one replica that takes prompts."""


class _Turns:
    """Smooth weighted round robin: each share of the turns is in proportion, as evenly as whole turns allow."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._credit: dict[int, float] = {}

    def next(self, weights: Mapping[int, float]) -> int:
        """Return which of these has the next turn."""
        credit = self._credit
        for number, weight in weights.items():
            if number not in credit:
                credit[number] = self._random.random() * weight  # so that not all turns begin with the same one
            credit[number] += weight
        best = max(weights, key=credit.__getitem__)
        credit[best] -= sum(weights.values())
        return best


class LeastWork:
    """The router to the replica that would finish its requests and the new one first, at its planned rate.

    The work of a prefill replica is not comparable with that of a unified one, which keeps its requests until they
    have decoded: the former would look idle and be overloaded. So the two kinds take turns in proportion to their
    planned rates, and the least work decides among replicas of a kind.
    """

    def __init__(self, seed: int) -> None:
        self._turns = _Turns(seed)

    def choose(self, replicas: Sequence[ReplicaRun]) -> ReplicaRun:
        kinds: dict[int, list[ReplicaRun]] = {}
        for replica in replicas:
            kinds.setdefault(int(replica.decodes), []).append(replica)
        if len(kinds) > 1:
            rates = {kind: sum(replica.rate for replica in alike) for kind, alike in kinds.items()}
            return min(kinds[self._turns.next(rates)], key=_work_s)
        return min(replicas, key=_work_s)


class Weighted:
    """The router to each replica in proportion to its planned rate, independent of its queue."""

    def __init__(self, seed: int) -> None:
        self._turns = _Turns(seed)

    def choose(self, replicas: Sequence[ReplicaRun]) -> ReplicaRun:
        by_number = {replica.number: replica for replica in replicas}
        return by_number[self._turns.next({number: replica.rate for number, replica in by_number.items()})]


class FewestRequests:
    """The router to the replica with the fewest requests waiting and running, regardless of its speed: the controller
    of AlpaServe, by which HexGen judges its plans."""

    def choose(self, replicas: Sequence[ReplicaRun]) -> ReplicaRun:
        return min(replicas, key=lambda replica: replica.outstanding)


class FewestTokens:
    """The router to the prefill replica with the fewest waiting prompt tokens, or to unified ones if it has a batch.

    Splitwise: the shortest queue of the prompt pool, and the mixed pool when all of them are long. Without prefill
    replicas, the shortest queue of the others.
    """

    def choose(self, replicas: Sequence[ReplicaRun]) -> ReplicaRun:
        prompt = [replica for replica in replicas if not replica.decodes]
        mixed = [replica for replica in replicas if replica.decodes]
        for pool in (prompt, mixed):
            waiting = {replica.number: replica.waiting_tokens() for replica in pool}
            shortest = min(pool, key=lambda replica: waiting[replica.number], default=None)
            if shortest is not None and waiting[shortest.number] <= LONG_QUEUE_TOKENS:
                return shortest
        return min(prompt or mixed, key=ReplicaRun.waiting_tokens)


def router_of(settings: Settings) -> Router:
    """Return the router that the settings name."""
    match settings.router:
        case "least-work":
            return LeastWork(settings.seed)
        case "weighted":
            return Weighted(settings.seed)
        case "fewest-requests":
            return FewestRequests()
        case "fewest-tokens":
            return FewestTokens()


def _work_s(replica: ReplicaRun) -> float:
    return (replica.outstanding + 1) / replica.rate
