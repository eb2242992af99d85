"""The best plan of a tiny problem on an engine by brute force, written to be obviously right rather than fast.

Every role, every sequence of stages that a zone could hold, every split of the layers, every (b, M, C), then every set
of replicas that packs into the nodes, with the KV flows between zones as a separate linear program. Rates and bytes are
the checker's, so that the oracle shares nothing with the search.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping

from scipy.optimize import linprog

from hetis.solver.plan import ObjectiveKind, Role
from hetis.solver.problem import PlacementProblem
from tests.solver.best_replicas import StageOption, Wanted, best_replica_of_need, builds_of, kv_of
from tests.solver.device_classes import DeviceClass, device_classes
from tests.solver.node_fits import Need, combine, fits_nodes


def always(_: object) -> bool:
    return True


def best_plan_value(
    problem: PlacementProblem,
    *,
    may_be: Callable[[StageOption], bool] = always,
    may_serve: Callable[[Wanted], bool] = always,
    may_plan: Callable[[list[Wanted]], bool] = always,
) -> float:
    """Return the objective value of the best plan of the family; 0 (infinity when minimising) if there is none.

    Stages, replicas and plans that the predicates refuse are left out.
    """
    nodes = device_classes(problem.cluster)
    replicas = {w: r for w, r in best_replica_of_need(problem, nodes, may_be).items() if may_serve(w)}
    best = 0.0 if problem.objective.maximises else math.inf
    for wanted in packable_sets(list(replicas), nodes):
        rate = served_rate(problem, wanted, replicas)
        value = value_of(problem, nodes, [w.need for w in wanted], rate)
        is_better = value > best if problem.objective.maximises else value < best
        if is_better and is_one_type_per_role(problem, wanted) and may_plan(wanted):
            best = value
    return best


def is_one_type_per_role(problem: PlacementProblem, wanted: list[Wanted]) -> bool:
    types: dict[Role, set[str]] = {}
    for w in wanted:
        types.setdefault(w.role, set()).update(w.gpus)
    return not problem.family.one_type_per_role or all(len(gpus) == 1 for gpus in types.values())


def served_rate(problem: PlacementProblem, wanted: list[Wanted], rates: Mapping[Wanted, float]) -> float:
    """Return the requests/s of unified replicas, plus the most that prefill and decode replicas serve together."""
    kinds = dict.fromkeys(kv_of(problem, w.build) for w in wanted)
    if len(kinds) > 1:  # replicas of different builds cannot exchange KV
        alike = ([w for w in wanted if kv_of(problem, w.build) == kind] for kind in kinds)
        return sum(served_rate(problem, some, rates) for some in alike)
    total = sum(rates[w] for w in wanted if w.role is Role.UNIFIED)
    for exchange in dict.fromkeys(w.exchange for w in wanted):
        sending = [(w, rates[w]) for w in wanted if w.role is Role.PREFILL and w.exchange == exchange]
        receiving = [(w, rates[w]) for w in wanted if w.role is Role.DECODE and w.exchange == exchange]
        if not sending or not receiving:
            continue
        if len({w.zone for w in wanted}) == 1:
            total += min(sum(rate for _, rate in sending), sum(rate for _, rate in receiving))
        else:
            total += greatest_flow(problem, sending, receiving)
    return total


def greatest_flow(
    problem: PlacementProblem, sending: list[tuple[Wanted, float]], receiving: list[tuple[Wanted, float]]
) -> float:
    """Return the largest flow between prefill and decode replicas that may be joined, within rates and links."""
    model, zones, network = problem.model, problem.cluster.zones(), problem.cluster.network
    kv_bytes = problem.workload.moments().mean_prompt * model.num_layers * model.head_groups
    kv_bytes *= model.kv_bytes_per_token_group()
    num_kinds = len({kv_of(problem, build) for build in builds_of(problem)})
    pairs = [
        (i, j)
        for i, (s, _) in enumerate(sending)
        for j, (r, _) in enumerate(receiving)
        if r.zone in s.kv_zones and (r.zone == s.zone or num_kinds == 1)
    ]
    if not pairs:
        return 0.0
    rows, limits = [], []
    for i, (_, rate) in enumerate(sending):
        rows.append([float(pair[0] == i) for pair in pairs])
        limits.append(rate)
    for j, (_, rate) in enumerate(receiving):
        rows.append([float(pair[1] == j) for pair in pairs])
        limits.append(rate)
    for a, b in itertools.permutations(zones, 2):
        rows.append([float((sending[i][0].zone, receiving[j][0].zone) == (a, b)) for i, j in pairs])
        limits.append(network.zone_link(a, b).bytes_per_s / kv_bytes)
    found = linprog([-1.0] * len(pairs), A_ub=rows, b_ub=limits)
    assert found.success
    return float(-found.fun)


def value_of(problem: PlacementProblem, nodes: Mapping[DeviceClass, int], needs: list[Need], rate: float) -> float:
    """Return the objective value of replicas that take these devices and have this rate together."""
    objective, goodput = problem.objective, problem.assumptions.planned_utilisation * rate
    if objective.maximises:
        return rate if objective.kind is ObjectiveKind.THROUGHPUT else goodput
    if goodput < (objective.demand_rps or 0.0):
        return math.inf
    return sum(price_of(need, nodes, objective.kind) for need in needs)


def packable_sets(replicas: list[Wanted], nodes: Mapping[DeviceClass, int]) -> Iterator[list[Wanted]]:
    """Yield every multiset of replicas that fits into the nodes, the empty one included."""

    def extend(chosen: list[Wanted], start: int, taken: Need) -> Iterator[list[Wanted]]:
        yield chosen
        for i in range(start, len(replicas)):
            more = combine(taken, replicas[i].need)
            if fits_nodes(more, nodes):
                yield from extend([*chosen, replicas[i]], i, more)

    yield from extend([], 0, ((),) * len(nodes))


def price_of(need: Need, nodes: Mapping[DeviceClass, int], kind: ObjectiveKind) -> float:
    """Return the USD per hour of a replica, or its number of GPUs."""
    return sum(
        sum(sizes) * (device_class.usd_per_hour if kind is ObjectiveKind.COST else 1.0)
        for sizes, device_class in zip(need, nodes, strict=True)
    )
