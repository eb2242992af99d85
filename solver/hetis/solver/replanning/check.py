"""Checks of a re-planning by what it states: the GPUs it names, what they held, the costs and the order of steps."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

from hetis.solver.check.fleet import Fleet
from hetis.solver.plan import AttentionWorkerPool, ObjectiveKind, ReplicaPlan, Role, StagePlan
from hetis.solver.problem import Build, PlacementProblem
from hetis.solver.replanning.change import HALF_DONE, Fate, ReplanningProblem, holdings, holdings_of, in_flight, is_same
from hetis.solver.replanning.solve import Replanning
from hetis.solver.replanning.transition import Action

RELATIVE = 1e-6


def check_replanning(given: ReplanningProblem, found: Replanning) -> list[str]:
    """Return every error as a sentence; `check_plan` checks the plan itself."""
    if len(found.continued) != len(found.plan.replicas):
        return [f"{len(found.continued)} replicas are told of, the plan has {len(found.plan.replicas)}"]
    return [
        *_check_lost(given, found),
        *_check_continued(given, found),
        *_check_moves(given, found),
        *_check_starts(given, found),
        *_check_value(given, found),
        *_check_bound(given, found),
        *_check_steps(given, found),
    ]


def _check_lost(given: ReplanningProblem, found: Replanning) -> Iterator[str]:
    """Check which running replicas lost GPUs: a GPU of the same name and type is the same GPU."""
    there = {device.name: device.gpu for device in given.problem.cluster.devices()}

    def is_lost(replica: ReplicaPlan) -> bool:
        parts: list[StagePlan | AttentionWorkerPool] = [*replica.stages, *replica.attention_workers]
        return any(there.get(device) != part.gpu for part in parts for device in part.devices)

    lost = tuple(number for number, replica in enumerate(given.running.replicas) if is_lost(replica))
    if lost != found.lost:
        yield f"running replicas {list(found.lost)} are said to have lost GPUs, {list(lost)} have"


def _check_continued(given: ReplanningProblem, found: Replanning) -> Iterator[str]:
    """Check that kept replicas are the running ones and that those that are reset keep their weights."""
    olds = [continued.old for continued in found.continued if continued.old is not None]
    if len(olds) != len(set(olds)):
        yield "a running replica goes on twice"
    for number, (replica, continued) in enumerate(zip(found.plan.replicas, found.continued, strict=True)):
        if continued.old is None:
            continue
        old = given.running.replicas[continued.old]
        if continued.fate is Fate.KEPT and not is_same(old, replica):
            yield f"replica {number} is not the running replica {continued.old}, which it is said to be"
        if continued.fate is Fate.RESET and dict(holdings_of(old)) != dict(holdings_of(replica)):
            yield f"replica {number} has other weights than the running replica {continued.old}"


def _check_moves(given: ReplanningProblem, found: Replanning) -> Iterator[str]:
    held = holdings(given.running)
    moved = [device for device, holding in holdings(found.plan).items() if held.get(device) != holding]
    if sorted(moved) != sorted(found.change.moved):
        yield f"{len(moved)} GPUs do something else than before, {len(found.change.moved)} are named"
    if given.max_moves is not None and len(moved) > given.max_moves:
        yield f"{len(moved)} GPUs do something else than before, at most {given.max_moves} may"


def _check_starts(given: ReplanningProblem, found: Replanning) -> Iterator[str]:
    for replica, continued in zip(found.plan.replicas, found.continued, strict=True):
        if continued.fate is Fate.NEW:
            start_s = given.costs.start_s(_longest_load(given, replica))
            if not math.isclose(start_s, continued.start_s, rel_tol=RELATIVE):
                yield f"a new replica starts in {start_s:.6g} s, not in {continued.start_s:.6g} s"


def _check_value(given: ReplanningProblem, found: Replanning) -> Iterator[str]:
    """Check the net value against the replicas' rates or costs and starts.

    What is minimised lies in a range: how much of a replica's cost its dropped requests take is not stated.
    """
    if given.problem.objective.maximises:
        value = _net_rate(given, found)
        if not math.isclose(value, found.value, rel_tol=RELATIVE, abs_tol=1e-12):
            yield f"the net value is {value:.9g}, not {found.value:.9g}"
        return
    least, most = _net_costs(given, found)
    if not least * (1.0 - RELATIVE) <= found.value <= most * (1.0 + RELATIVE):
        yield f"the net value is between {least:.9g} and {most:.9g}, not {found.value:.9g}"


def _net_rate(given: ReplanningProblem, found: Replanning) -> float:
    pairs = list(zip(found.plan.replicas, found.continued, strict=True))
    rates = [replica.rate * given.costs.served_share(continued.start_s) for replica, continued in pairs]
    value = sum(rate for rate, (replica, _) in zip(rates, pairs, strict=True) if replica.role is Role.UNIFIED)
    value += _most_handed_over(given.problem, found.plan.replicas, rates)
    for number in _stopped(given, found):
        value -= HALF_DONE * in_flight(given.running.replicas[number]) / given.costs.horizon_s
    throughput = given.problem.objective.kind is ObjectiveKind.THROUGHPUT
    return value * (1.0 if throughput else given.problem.assumptions.planned_utilisation)


def _most_handed_over(problem: PlacementProblem, replicas: Sequence[ReplicaPlan], rates: Sequence[float]) -> float:
    """Return the most requests/s that prefill replicas can hand over to decode replicas at these rates.

    It is a largest flow: a prefill replica sends to decode replicas that hold the same model in its ``kv_zones``, and
    the KV that leaves a zone is limited by the link. What replicas over several zones take of links is not counted.
    """
    import networkx as nx

    fleet, model, graph = Fleet.of(problem.cluster), problem.model, nx.DiGraph()
    graph.add_nodes_from(("source", "sink"))
    moments = problem.workload.clipped_to(model.max_position).moments(block_tokens=problem.assumptions.block_tokens)
    prompt_bytes = model.prompt_kv_bytes(moments.mean_prompt)
    received = defaultdict[tuple[str, Build], float](float)  # by all decode replicas of a zone and build
    for number, (replica, rate) in enumerate(zip(replicas, rates, strict=True)):
        zone, build = fleet.zones_of(replica.devices())[0], problem.build_of(replica.stages[0].gpu)
        if replica.role is Role.DECODE:
            received[zone, build] += rate
        elif replica.role is Role.PREFILL:
            graph.add_edge("source", number, capacity=rate)
            graph.add_edges_from((number, ("link", zone, to, build)) for to in replica.kv_zones)
            for to in replica.kv_zones:
                carried = math.inf if to == zone else problem.cluster.network.zone_link(zone, to).bytes_per_s
                graph.add_edge(("link", zone, to, build), ("decode", to, build), capacity=carried / prompt_bytes)
    for (zone, build), rate in received.items():
        graph.add_edge(("decode", zone, build), "sink", capacity=rate)
    return float(nx.maximum_flow_value(graph, "source", "sink"))


def _net_costs(given: ReplanningProblem, found: Replanning) -> tuple[float, float]:
    """Return the least and the most that a plan costs, if requests of stopped replicas take none or all of theirs."""
    fleet, is_rent = Fleet.of(given.problem.cluster), given.problem.objective.kind is ObjectiveKind.COST

    def cost_of(replica: ReplicaPlan) -> float:
        names = dict.fromkeys(replica.devices())
        return sum(map(fleet.usd_per_hour, names)) if is_rent else float(len(names))

    pairs = zip(found.plan.replicas, found.continued, strict=True)
    least = sum(cost_of(replica) * (1.0 + c.start_s / given.costs.horizon_s) for replica, c in pairs)
    return least, least + sum(cost_of(given.running.replicas[number]) for number in _stopped(given, found))


def _stopped(given: ReplanningProblem, found: Replanning) -> list[int]:
    """Return the running replicas that do not stay, apart from those that lost GPUs."""
    kept = {c.old for c in found.continued if c.fate is Fate.KEPT}
    return [i for i in range(len(given.running.replicas)) if i not in kept and i not in found.lost]


def _check_bound(given: ReplanningProblem, found: Replanning) -> Iterator[str]:
    over = found.value - found.bound if given.problem.objective.maximises else found.bound - found.value
    if over > RELATIVE * abs(found.value):
        side = "below" if given.problem.objective.maximises else "above"
        yield f"the bound is {found.bound:.9g}, {side} the net value {found.value:.9g}"
    gap = abs(found.bound - found.value) / abs(found.value) if found.value else 0.0
    if not math.isclose(gap, found.gap, rel_tol=RELATIVE, abs_tol=1e-9):
        yield f"the gap is {gap:.9g}, not {found.gap:.9g}"


def _longest_load(given: ReplanningProblem, replica: ReplicaPlan) -> float:
    return max(holding.weight_bytes(given.problem.model) for _, holding in holdings_of(replica))


def _check_steps(given: ReplanningProblem, found: Replanning) -> Iterator[str]:
    """Check that nothing starts on busy GPUs, and that in the end the plan runs and nothing else."""
    lost = set(found.lost)
    runs = {i: set(r.devices()) for i, r in enumerate(given.running.replicas) if i not in lost}
    stays = {c.old for c in found.continued if c.fate is Fate.KEPT}
    started: set[int] = set()
    for step in found.transition.steps:
        for number in step.replicas:
            if step.action is Action.STOP:
                if runs.pop(number, None) is None or number in stays:
                    yield f"running replica {number} is stopped, which does not run or is to stay"
                continue
            devices = set(found.plan.replicas[number].devices())
            busy = [i for i, others in runs.items() if others & devices]
            if busy:
                yield f"replica {number} starts on GPUs of running replica {busy[0]}"
            started.add(number)
    if set(runs) != stays:
        yield "replicas of before still run at the end"
    starting = {i for i, c in enumerate(found.continued) if c.fate is not Fate.KEPT}
    if started != starting:
        yield f"{len(started)} replicas start, {len(starting)} are to"
