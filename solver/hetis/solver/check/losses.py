"""What is left of a plan without its worst node or zone, derived anew from its named GPUs.

A replica is lost with any of its GPUs. What is left is the rate of the unified replicas that remain, and the most KV
that can flow from prefill to decode replicas that remain: between zones, no more than before (a maximum flow).
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict, deque
from collections.abc import Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass

from hetis.solver.check.result import RELATIVE, served_of_all, served_rate
from hetis.solver.check.violation import Broken, Rule, Violation, at
from hetis.solver.cluster import node_of
from hetis.solver.plan import Plan, Role
from hetis.solver.problem import PlacementProblem


@dataclass(frozen=True, slots=True, kw_only=True)
class StatedLoss:
    """What a plan states of the worst ``node`` or ``zone``: its name, and saturated requests/s without and with it."""

    place: str
    name: str
    left: float
    whole: float


def check_losses(plan: Plan, problem: PlacementProblem, stated: Collection[StatedLoss]) -> tuple[Violation, ...]:
    """Return what is wrong with the losses that a plan of valid structure states.

    It may state less than the maximum flow where KV flows between zones.
    """
    return tuple(
        violation for loss in stated for violation in at(f"loss of a {loss.place}", _check(plan, problem, loss))
    )


def _check(plan: Plan, problem: PlacementProblem, loss: StatedLoss) -> Iterator[Broken]:
    left = left_without(plan, problem, loss.place)
    whole, worst = served_rate(plan), min(left.values(), default=0.0)
    if not math.isclose(loss.whole, whole, rel_tol=RELATIVE):
        yield Rule.LOSS, f"{loss.whole:.9g} requests/s are stated to be served before it, the plan serves {whole:.9g}"
    if loss.name not in left:
        yield Rule.LOSS, f"{loss.name} is stated to be the worst, no replica is there"
        return
    is_less = _crosses_zones(plan) and loss.left <= worst
    if not is_less and not math.isclose(loss.left, worst, rel_tol=RELATIVE, abs_tol=RELATIVE * whole):
        yield Rule.LOSS, f"{loss.left:.9g} requests/s are stated to be left, {worst:.9g} are without the worst"
    elif left[loss.name] > worst + RELATIVE * whole and not _crosses_zones(plan):
        yield Rule.LOSS, f"{loss.name} is stated to be the worst, without it {left[loss.name]:.9g} requests/s are left"


def _crosses_zones(plan: Plan) -> bool:
    return any(len(replica.kv_zones) > 1 for replica in plan.replicas)


def left_without(plan: Plan, problem: PlacementProblem, place: str) -> Mapping[str, float]:
    """Return the saturated requests/s that are left without each ``node`` or ``zone`` that the plan uses."""
    zone_of = {device.node: device.group.zone for device in problem.cluster.devices()}
    nodes = [{node_of(name) for name in replica.devices()} for replica in plan.replicas]
    used = [{zone_of[node] for node in mine} if place == "zone" else mine for mine in nodes]
    whole, found = served_rate(plan), dict[str, float]()
    for name in sorted(set().union(*used)):
        found[name] = min(whole, _served_by(plan, problem, zone_of, [name not in mine for mine in used]))
    return found


Site = tuple[str, Hashable]  # a zone and a kind of KV, in which KV flows freely


def _served_by(plan: Plan, problem: PlacementProblem, zone_of: Mapping[str, str], remains: list[bool]) -> float:
    """Return the most requests/s that the replicas that remain serve."""
    parts = dict[tuple[str, ...], float]()
    for classes in {replica.classes for replica in plan.replicas}:
        own = [is_left and one.classes == classes for one, is_left in zip(plan.replicas, remains, strict=True)]
        parts[classes] = _served_together(plan, problem, zone_of, own)
    return served_of_all({one.name: one.share for one in plan.classes}, parts.items())


def _served_together(plan: Plan, problem: PlacementProblem, zone_of: Mapping[str, str], remains: list[bool]) -> float:
    """Return the most requests/s of the replicas that remain, which serve the same classes."""
    sites: list[Site] = [
        (zone_of[node_of(replica.devices()[0])], problem.kv_of(problem.build_of(replica.stages[0].gpu)))
        for replica in plan.replicas
    ]
    room: defaultdict[Hashable, defaultdict[Hashable, float]] = defaultdict(lambda: defaultdict(float))
    unified = 0.0
    for replica, site, is_left in zip(plan.replicas, sites, remains, strict=True):
        if not is_left:
            continue
        if replica.role is Role.UNIFIED:
            unified += replica.rate
        elif replica.role is Role.DECODE:
            room["decode", site]["sink"] += replica.rate
        else:
            sender = "afar" if set(replica.kv_zones) - {site[0]} else "here", site
            room["source"][sender] += replica.rate
            room[sender]["decode", site] = math.inf
    for route in plan.kv_routes:
        if sites[route.prefill] != sites[route.decode]:
            room["afar", sites[route.prefill]]["decode", sites[route.decode]] += route.rate
    return unified + _maximum_flow(room)


def _maximum_flow(room: defaultdict[Hashable, defaultdict[Hashable, float]]) -> float:
    """Return the maximum flow from source to sink (Edmonds and Karp); ``room`` becomes what is left on each edge."""
    total = 0.0
    while True:
        came_from, waiting = dict[Hashable, Hashable]({"source": ""}), deque[Hashable](["source"])
        while waiting and "sink" not in came_from:
            here = waiting.popleft()
            for there, left in list(room[here].items()):
                if left > 0.0 and there not in came_from:
                    came_from[there] = here
                    waiting.append(there)
        if "sink" not in came_from:
            return total
        path = list[Hashable](["sink"])
        while path[-1] != "source":
            path.append(came_from[path[-1]])
        edges = [(a, b) for b, a in itertools.pairwise(path)]
        flow = min(room[a][b] for a, b in edges)
        for a, b in edges:
            room[a][b] -= flow
            room[b][a] += flow
        total += flow
