"""The order in which to stop and start replicas, so that the lowest capacity during the change is as high as possible.

Replicas whose GPUs are idle start first; a replica stops when one that starts needs its GPUs, or at the very end if its
GPUs are not needed. Both can only raise the capacity: more replicas never serve less. The remaining choice is the order
of the starts that need something stopped. Starting two of them at once stops as much as starting them in turn and
delays the first of them, so they start one by one, and the best order is a path through the sets of started replicas:

    best(S) = max over j in S of  min(best(S - j), capacity(what runs when j has stopped what it needs, S - j started))

This is exact for up to `MAX_EXACT` starts. For more, the start with the least dip comes first, and the bound is the
best that the first and the last start allow, over all choices of these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

MAX_EXACT = 10  # maximum starts that need something stopped

Capacity = Callable[[frozenset[int], frozenset[int]], float]  # (old replicas that run, new ones that run)


class Action(StrEnum):
    START = "start"
    STOP = "stop"


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """A replica of the new plan that has to start, and the running replicas whose GPUs it needs."""

    replica: int
    needs: frozenset[int]
    start_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step: ``replicas`` of the new plan start together, or those of the old one stop.

    Attributes:
        seconds: time until the last of them serves; 0 for a stop.
        capacity: capacity during the step.
        capacity_after: capacity once it is done.
    """

    action: Action
    replicas: tuple[int, ...]
    seconds: float
    capacity: float
    capacity_after: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Transition:
    """The steps from the running plan to the new one.

    Attributes:
        before, after: capacities of what runs now and of the new plan. If routers send running replicas other requests
            from the first step on, the capacity during that step may be another one than ``before``.
        lowest: the lowest capacity during the change, both ends included.
        best_lowest: no order has a higher lowest capacity.
        seconds: duration of all steps in sequence.
        lost: requests that ``after`` would have served in that time and the steps do not.
    """

    steps: tuple[Step, ...]
    before: float
    after: float
    lowest: float
    best_lowest: float
    seconds: float
    lost: float

    def since(self, before: float) -> Transition:
        """Return the transition from another capacity than that during its first step."""
        lowest, best = min(self.lowest, before), min(self.best_lowest, before)
        return replace(self, before=before, lowest=lowest, best_lowest=best)


def plan_transition(
    running: Sequence[int], stays: Sequence[int], starts: Sequence[Start], capacity: Capacity
) -> Transition:
    """Return the order with the highest lowest capacity.

    Args:
        running: old replicas that serve now.
        stays: old replicas that never stop.
        starts: replicas that have to start.
        capacity: capacity of old and new replicas together; it never falls when a replica joins.
    """
    runs, started = frozenset(running), frozenset[int]()
    before = capacity(runs, started)
    steps: list[Step] = []

    def take(action: Action, replicas: frozenset[int], seconds: float = 0.0) -> None:
        nonlocal runs, started
        now, names = capacity(runs, started), tuple(sorted(replicas))
        runs, started = (runs, started | replicas) if action is Action.START else (runs - replicas, started)
        then = capacity(runs, started)
        steps.append(Step(action=action, replicas=names, seconds=seconds, capacity=now, capacity_after=then))

    free = [start for start in starts if not start.needs & runs]
    blocked = [start for start in starts if start.needs & runs]
    if free:
        take(Action.START, frozenset(start.replica for start in free), max(start.start_s for start in free))
    if len(blocked) <= MAX_EXACT:
        whole = capacity(frozenset(stays), frozenset(start.replica for start in starts))
        order, best_lowest = _exact(blocked, runs, started, capacity, whole)
    else:
        order, best_lowest = _greedy(blocked, runs, started, capacity)
    for start in order:
        if stopping := start.needs & runs:
            take(Action.STOP, stopping)
        take(Action.START, frozenset({start.replica}), start.start_s)
    if left := runs - frozenset(stays):
        take(Action.STOP, left)
    after = capacity(runs, started)
    return Transition(
        steps=tuple(steps),
        before=before,
        after=after,
        lowest=min(before, after, *(step.capacity for step in steps), *(step.capacity_after for step in steps)),
        best_lowest=min(before, after, best_lowest),
        seconds=sum(step.seconds for step in steps),
        lost=sum(step.seconds * max(0.0, after - step.capacity) for step in steps),
    )


def _exact(
    blocked: Sequence[Start], runs: frozenset[int], started: frozenset[int], capacity: Capacity, after: float
) -> tuple[list[Start], float]:
    """Return the best order by dynamic programs over the sets of started replicas, and its lowest capacity.

    The first program finds the highest lowest capacity, the second one, among all orders that keep it, the order that
    loses the fewest requests of those that ``after``, the capacity of the new plan, would serve.
    """
    every = range(1, 1 << len(blocked))
    # The capacity during each last start of a set of starts: (its index, capacity)
    during = [list[tuple[int, float]]()]
    for done in every:
        members = [j for j in range(len(blocked)) if done >> j & 1]
        left = runs.difference(*(blocked[j].needs for j in members))
        others = (started | {blocked[i].replica for i in members if i != j} for j in members)
        during.append([(j, capacity(left, other)) for j, other in zip(members, others, strict=True)])
    lowest = [math.inf]
    for done in every:
        lowest.append(max(min(lowest[done ^ (1 << j)], now) for j, now in during[done]))
    lost = [(0.0, -1)]  # of each set, and its last start
    for done in every:
        kept = ((j, now, lost[done ^ (1 << j)][0] if now >= lowest[-1] else math.inf) for j, now in during[done])
        lost.append(min((least + blocked[j].start_s * max(0.0, after - now), j) for j, now, least in kept))
    order, done = list[Start](), (1 << len(blocked)) - 1
    while done:
        order.append(blocked[lost[done][1]])
        done ^= 1 << lost[done][1]
    return order[::-1], lowest[-1]


def _greedy(
    blocked: Sequence[Start], runs: frozenset[int], started: frozenset[int], capacity: Capacity
) -> tuple[list[Start], float]:
    """Order the starts by least dip; the bound is the lower of the best first and the best last start."""
    every = frozenset(start.replica for start in blocked)
    first = max(capacity(runs - start.needs, started) for start in blocked)
    at_end = runs.difference(*(start.needs for start in blocked))
    final = max(capacity(at_end, started | (every - {start.replica})) for start in blocked)
    order, waiting = list[Start](), list(blocked)
    while waiting:
        chosen = max(
            waiting, key=lambda s: (capacity(runs - s.needs, started), capacity(runs - s.needs, started | {s.replica}))
        )
        waiting.remove(chosen)
        order.append(chosen)
        runs, started = runs - chosen.needs, started | {chosen.replica}
    return order, min(first, final)
