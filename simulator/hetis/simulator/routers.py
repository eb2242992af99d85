"""Routers: which replica gets a request."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Generic, TypeVar

from hetis.simulator.replica import ReplicaRun
from hetis.simulator.values import RequestLog, Settings
from hetis.solver.plan import Plan
from hetis.solver.workload import Workload

LONG_QUEUE_TOKENS = 2048  # the maximum size of a batch of prompts in Splitwise
# Of llm-d's scorer of prompt tokens under way: 1,024 of them count as much as all requests in flight.
TOKENS_WEIGHT, MOST_TOKENS = 32, 32_768
_WHOLE = 1000  # sum of the integer weights of routers


Router = Callable[[Sequence[ReplicaRun]], ReplicaRun]
"""Chooses a replica from one or more that are up and accept prompts."""
Key = TypeVar("Key", bound=Hashable)


def weight(share: float) -> int:
    """Return the integer weight that routers get for a share, at least 1 if the share is positive."""
    return max(round(share * _WHOLE), 1) if share > 0 else 0


class _Turns(Generic[Key]):
    """Smooth weighted round robin: each share of the turns is in proportion, as evenly as whole turns allow."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._credit: dict[Key, float] = {}

    def next(self, weights: Mapping[Key, float]) -> Key:
        """Return the key whose turn is next."""
        credit = self._credit
        for key, weight in weights.items():
            if key not in credit:
                credit[key] = self._random.random() * weight  # so that turns do not always begin with the same key
            credit[key] += weight
        best = max(weights, key=credit.__getitem__)
        credit[best] -= sum(weights.values())
        return best


class Nginx:
    """Router to entry points in turn, in proportion to their planned rates, except full ones while others are not.

    So do nginx's servers with a `weight` and `max_conns`, and again as `backup` without `max_conns`
    (`hetis.planner.export.routing`). Turns keep prompts apart, so that few wait for others in their lane, and replicas
    that have fallen behind do not fall behind further. The queue model assumes the same (`hetis.solver.queueing`).

    An entry point is a unified replica, or what pairs the replicas that KV routes join, which is full when these are
    (`ReplicaPlan.most_held`). Among the prefill replicas of an entry point, the one with the fewest requests by weight
    is next, and of several it is their turn by weight, as in nginx's `least_conn`; without ``fewest`` they take turns,
    as behind SGLang's router, which names the prefill replica itself.
    """

    def __init__(self, seed: int, plan: Plan, replicas: Sequence[ReplicaRun], *, fewest: bool = True) -> None:
        self._fewest, self._turns, self._inside = fewest, _Turns[int](seed), _Turns[int](seed)
        self._replicas, joined = replicas, {n: group[0] for group in plan.joined_by_routes() for n in group}
        self._entry = {one.number: joined.get(one.number, one.number) for one in replicas}
        self._members = dict[int, list[ReplicaRun]]()
        for one in replicas:
            self._members.setdefault(self._entry[one.number], []).append(one)
        self._most = {
            entry: sum(plan.replicas[one.number].most_held for one in own) for entry, own in self._members.items()
        }
        self._weights = dict[int, int]()  # of prefill replicas
        for own in self._members.values():
            rates = {one.number: one.rate for one in own if not one.decodes}
            self._weights |= {number: weight(rate / (sum(rates.values()) or 1.0)) for number, rate in rates.items()}
        self._seen: Sequence[ReplicaRun] = ()
        self._rates = dict[int, float]()

    def __call__(self, replicas: Sequence[ReplicaRun]) -> ReplicaRun:
        if replicas is not self._seen:  # usually they are all that take prompts
            self._seen, self._rates = replicas, {}
            for one in replicas:
                self._rates[self._entry[one.number]] = self._rates.get(self._entry[one.number], 0.0) + one.rate
        free = {entry: rate for entry, rate in self._rates.items() if not self._is_full(entry)}
        entry = self._turns.next(free or self._rates)
        takers = [one for one in replicas if self._entry[one.number] == entry]
        return takers[0] if len(takers) == 1 else self._replicas[self._next_of(takers)]

    def _next_of(self, takers: Sequence[ReplicaRun]) -> int:
        held = {one.number: one.unanswered() * self._fewest / self._weights[one.number] for one in takers}
        fewest = min(held.values())
        return self._inside.next({number: self._weights[number] for number in held if held[number] == fewest})

    def _is_full(self, entry: int) -> bool:
        return sum(one.outstanding for one in self._members[entry]) >= self._most[entry]


class Weighted:
    """Router to all replicas in proportion to their planned rates, regardless of their queues."""

    def __init__(self, seed: int) -> None:
        self._turns = _Turns[int](seed)

    def __call__(self, replicas: Sequence[ReplicaRun]) -> ReplicaRun:
        by_number = {replica.number: replica for replica in replicas}
        return by_number[self._turns.next({number: replica.rate for number, replica in by_number.items()})]


class WeightedRandom:
    """Router that draws replicas in proportion to their planned rates, regardless of their queues."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def __call__(self, replicas: Sequence[ReplicaRun]) -> ReplicaRun:
        return self._random.choices(replicas, [replica.rate for replica in replicas])[0]


class EndpointPicker:
    """Router to the replica with the highest score, as llm-d's endpoint picker with the scorers that exports configure.

    Scores are of the planned seats (or rate, for prefill), of prompt tokens under way, and of requests in flight, which
    are not told of prefill replicas: llm-d counts requests there until they are answered. The route draws a pool first:
    the unified replicas, or what KV routes join. Sources, in pkg/epp/framework/plugins of llm-d/llm-d-router: README.md
    of `tokenload`, `inflightload` and `attributeweight`, `active_request.go`, and `picker.go` of `maxscore`.
    """

    def __init__(self, seed: int, plan: Plan) -> None:
        self._random, self._turns, self._plan = random.Random(seed), _Turns[int](seed), plan
        self._pool = {n: group[0] for group in plan.joined_by_routes() for n in group}

    def __call__(self, replicas: Sequence[ReplicaRun]) -> ReplicaRun:
        pools = dict[int, list[ReplicaRun]]()
        for one in replicas:
            pools.setdefault(self._pool.get(one.number, -1), []).append(one)
        [pool] = self._random.choices([*pools.values()], [sum(one.rate for one in pool) for pool in pools.values()])
        weights = [self._plan.replicas[one.number].planned_seats if one.decodes else one.rate for one in pool]
        held, most = max(1, *(one.outstanding for one in pool)), max(weights)
        scores = dict[int, float]()
        for place, (one, weight) in enumerate(zip(pool, weights, strict=True)):
            tokens = min(one.prompt_tokens_under_way(), MOST_TOKENS)
            idle = 1.0 - one.outstanding / held if one.decodes else 0.0
            scores[place] = weight / most + idle + TOKENS_WEIGHT * (1.0 - tokens / MOST_TOKENS)
        best = max(scores.values())
        return pool[self._turns.next({place: 1.0 for place, score in scores.items() if score == best})]


def fewest_requests(replicas: Sequence[ReplicaRun]) -> ReplicaRun:
    """Return the replica with the fewest requests waiting and running, regardless of its speed.

    This is the controller of AlpaServe, with which HexGen evaluates its plans.
    """
    return min(replicas, key=lambda replica: replica.outstanding)


def fewest_tokens(replicas: Sequence[ReplicaRun]) -> ReplicaRun:
    """Return the prefill replica with the fewest waiting prompt tokens, or a unified one if it has a batch.

    As in Splitwise: the shortest queue of the prompt pool, or the mixed pool if all of them are long. Without prefill
    replicas, the shortest queue of the others.
    """
    prompt = [replica for replica in replicas if not replica.decodes]
    mixed = [replica for replica in replicas if replica.decodes]
    for pool in (prompt, mixed):
        waiting = {replica.number: replica.waiting_tokens() for replica in pool}
        shortest = min(pool, key=lambda replica: waiting[replica.number], default=None)
        if shortest is not None and waiting[shortest.number] <= LONG_QUEUE_TOKENS:
            return shortest
    return min(prompt or mixed, key=ReplicaRun.waiting_tokens)


class NginxOfClass(Nginx):
    """Router to the entry points that serve a class, by an nginx `upstream` of its own.

    Of entry points for all requests it has the seats of its class's share, and counts its own requests alone.
    """

    def __init__(
        self, seed: int, plan: Plan, replicas: Sequence[ReplicaRun], name: str, log: RequestLog, *, fewest: bool = True
    ) -> None:
        super().__init__(seed, plan, replicas, fewest=fewest)
        self._log, self._given = log, dict[int, list[int]]()  # requests by entry point for all
        for entry, own in self._members.items():
            if not plan.replicas[own[0].number].classes:
                self._given[entry] = []
                self._most[entry] = math.ceil(self._most[entry] * plan.class_shares()[name])

    def give(self, replicas: Sequence[ReplicaRun], request: int) -> ReplicaRun:
        """Return the replica for a request."""
        chosen = self(replicas)
        if (own := self._given.get(self._entry[chosen.number])) is not None:
            own.append(request)
        return chosen

    def _is_full(self, entry: int) -> bool:
        if (given := self._given.get(entry)) is None:
            return super()._is_full(entry)
        if len(given) >= self._most[entry]:  # only then, those that have ended are left out
            log = self._log
            here = (one for one in given if self._entry.get(log.replica[one]) == entry)
            self._given[entry] = given = [one for one in here if math.isnan(log.finished_s[one])]
        return len(given) >= self._most[entry]


class RangeRouter:
    """Routes the requests of each class by a router of their own, among the replicas that serve the class."""

    def __init__(
        self, plan: Plan, workload: Workload, settings: Settings, replicas: Sequence[ReplicaRun], log: RequestLog
    ) -> None:
        self._workload, self._log = workload, log
        self._of = [replica.classes for replica in plan.replicas]
        self._routers: dict[str, Router | NginxOfClass] = {}
        for one in plan.classes:
            self._routers[one.name] = router_of(settings, plan, replicas)
            if settings.router in ("nginx", "sglang"):
                self._routers[one.name] = NginxOfClass(
                    settings.seed, plan, replicas, one.name, log, fewest=settings.router == "nginx"
                )

    def serving(self, replicas: Sequence[ReplicaRun], request: int) -> list[ReplicaRun]:
        """Return the replicas that serve the class of a request."""
        name = self._class_of(request)
        return [one for one in replicas if not self._of[one.number] or name in self._of[one.number]]

    def choose(self, replicas: Sequence[ReplicaRun], request: int) -> ReplicaRun | None:
        """Return one of the replicas that serve a request's class; None: there is none."""
        if not replicas:
            return None
        router = self._routers[self._class_of(request)]
        return router.give(replicas, request) if isinstance(router, NginxOfClass) else router(replicas)

    def _class_of(self, request: int) -> str:
        return self._workload.class_of(self._log.prompt[request]).name


def router_of(settings: Settings, plan: Plan, replicas: Sequence[ReplicaRun]) -> Router:
    """Return the router that the settings name, in front of a plan's replicas."""
    match settings.router:
        case "nginx":
            return Nginx(settings.seed, plan, replicas)
        case "sglang":
            return Nginx(settings.seed, plan, replicas, fewest=False)
        case "llm-d":
            return EndpointPicker(settings.seed, plan)
        case "weighted":
            return Weighted(settings.seed)
        case "weighted-random":
            return WeightedRandom(settings.seed)
        case "fewest-requests":
            return fewest_requests
        case "fewest-tokens":
            return fewest_tokens
