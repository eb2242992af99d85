"""Checks of a re-planning by what it states: the GPUs it names, what they held, the costs and the order of steps."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

from hetis.solver.check.replica_shapes import Fleet
from hetis.solver.check.result import served_of_all
from hetis.solver.plan import ObjectiveKind, ReplicaPlan, Role
from hetis.solver.problem import Build, PlacementProblem
from hetis.solver.replanning.change import HALF_DONE, Fate, ReplanningProblem, holdings, holdings_of, is_same
from hetis.solver.replanning.replanner import Replanning
from hetis.solver.replanning.transition import Action

RELATIVE = 1e-6


def check_replanning(given: ReplanningProblem, found: Replanning) -> list[str]:
    """Return every error as a sentence; `check_plan` checks the plan itself."""
    if len(found.continued) != len(found.plan.replicas):
        return [f"{len(found.continued)} replicas are listed, the plan has {len(found.plan.replicas)}"]
    return [
        *_check_lost(given, found),
        *_check_continued(given, found),
        *_check_moves(given, found),
        *_check_starts(given, found),
        *_check_value(given, found),
        *_check_bound(given, found),
        *_check_steps(given, found),
        *_check_capacities(given, found),
    ]


def _check_lost(given: ReplanningProblem, found: Replanning) -> Iterator[str]:
    """Check which running replicas lost GPUs: a GPU of the same name and type is the same GPU."""
    there = {device.name: device.gpu for device in given.problem.cluster.devices()}

    def is_lost(replica: ReplicaPlan) -> bool:
        return any(there.get(device) != part.gpu for part in replica.parts() for device in part.devices)

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
    """Check the time until each replica serves: its GPUs that were not in the replica it continues load all they hold.

    A replica that is kept serves at once.
    """
    for number, (replica, continued) in enumerate(zip(found.plan.replicas, found.continued, strict=True)):
        old = None if continued.old is None else given.running.replicas[continued.old]
        kept = frozenset[str]() if old is None else frozenset(old.devices())
        model = given.problem.model
        loads = [holding.weight_bytes(model) for device, holding in holdings_of(replica) if device not in kept]
        start_s = 0.0 if continued.fate is Fate.KEPT else given.costs.start_s(max(loads, default=0.0))
        if not _is_close(start_s, continued.start_s):
            yield f"replica {number} ({continued.fate}) starts in {start_s:.6g} s, not in {continued.start_s:.6g} s"


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
    pairs = zip(found.plan.replicas, found.continued, strict=True)
    rates = [replica.rate * given.costs.served_share(continued.start_s) for replica, continued in pairs]
    value = _served(given.problem, found.plan.replicas, rates)
    for number in _stopped(given, found):
        value -= HALF_DONE * given.running.replicas[number].planned_seats / given.costs.horizon_s
    return value * _scale(given.problem)


def _scale(problem: PlacementProblem) -> float:
    """Return the rate that counts, per saturated request/s."""
    return 1.0 if problem.objective.kind is ObjectiveKind.THROUGHPUT else problem.assumptions.planned_utilisation


def _served(problem: PlacementProblem, replicas: Sequence[ReplicaPlan], rates: Sequence[float]) -> float:
    """Return the requests/s that replicas serve together at these rates."""
    parts = list[tuple[tuple[str, ...], float]]()
    for classes in {one.classes for one in replicas}:
        own = [(rate, one) for rate, one in zip(rates, replicas, strict=True) if one.classes == classes]
        parts += [(classes, rate) for rate, one in own if one.role is Role.UNIFIED]
        if len(apart := [(rate, one) for rate, one in own if one.role is not Role.UNIFIED]) > 1:
            parts.append((classes, _most_handed_over(problem, [one for _, one in apart], [rate for rate, _ in apart])))
    return served_of_all(problem.workload.shares, parts)


def _most_handed_over(problem: PlacementProblem, replicas: Sequence[ReplicaPlan], rates: Sequence[float]) -> float:
    """Return the most requests/s that prefill replicas can hand over to decode replicas at these rates.

    It is a largest flow: a prefill replica sends to decode replicas that hold the same model in its ``kv_zones``, and
    the KV that leaves a zone is limited by the link. What replicas over several zones take of links is not counted.
    """
    import networkx as nx

    fleet, model, graph = Fleet.of(problem.cluster), problem.model, nx.DiGraph()
    graph.add_nodes_from(("source", "sink"))
    prompt_bytes = model.prompt_kv_bytes(problem.moments().mean_prompt)
    received = defaultdict[tuple[str, Build], float](float)  # by all decode replicas of a zone and kind of KV
    for number, (replica, rate) in enumerate(zip(replicas, rates, strict=True)):
        zone, build = fleet.zones_of(replica.devices())[0], problem.kv_of(problem.build_of(replica.stages[0].gpu))
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


def _check_steps(given: ReplanningProblem, found: Replanning) -> Iterator[str]:
    """Check that nothing starts on busy GPUs or twice, and that in the end the plan runs and nothing else."""
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
            if number in started:
                yield f"replica {number} starts twice"
            started.add(number)
    if set(runs) != stays:
        yield "replicas of before still run at the end"
    starting = {i for i, c in enumerate(found.continued) if c.fate is not Fate.KEPT}
    if started != starting:
        yield f"{len(started)} replicas start, {len(starting)} are to"


def _check_capacities(given: ReplanningProblem, found: Replanning) -> Iterator[str]:
    """Check the capacity of every step, and what the transition sums up.

    Where a replica runs that the plan does not keep, whose rate is not stated for the problem as it is now, capacities
    are only compared with each other.
    """
    change, problem = found.transition, given.problem
    kept = {c.old: number for number, c in enumerate(found.continued) if c.fate is Fate.KEPT}
    others = {i for i in range(len(given.running.replicas)) if i not in kept and i not in found.lost}
    serving = set(kept.values())

    def is_wrong(claimed: float) -> bool:
        chosen = [found.plan.replicas[number] for number in sorted(serving)]
        derived = _scale(problem) * _served(problem, chosen, [replica.rate for replica in chosen])
        return claimed < derived * (1.0 - RELATIVE) if others else not _is_close(derived, claimed)

    # Behind the router of the new plan, what runs may serve another rate than it did.
    moved = [
        i for i in kept if i is not None and given.running.replicas[i].classes != found.plan.replicas[kept[i]].classes
    ]
    capacity = change.steps[0].capacity if moved and change.steps else change.after if moved else change.before
    if is_wrong(capacity):
        yield f"the running plan is said to serve {change.before:.9g} requests/s"
    for number, step in enumerate(change.steps):
        is_start = step.action is Action.START
        longest_s = max((found.continued[i].start_s for i in step.replicas), default=0.0) if is_start else 0.0
        if not _is_close(longest_s, step.seconds):
            yield f"step {number} takes {longest_s:.6g} s, not {step.seconds:.6g} s"
        if not _is_close(capacity, step.capacity):
            yield f"during step {number} {capacity:.9g} requests/s can be served, not {step.capacity:.9g}"
        capacity = step.capacity_after
        serving |= set(step.replicas) if is_start else set()
        others -= set() if is_start else set(step.replicas)
        more, less = (capacity, step.capacity) if is_start else (step.capacity, capacity)
        if is_wrong(capacity) or more < less * (1.0 - RELATIVE):
            yield f"after step {number} {capacity:.9g} requests/s are said to be served"
    claims = [change.before, change.after, *(each for s in change.steps for each in (s.capacity, s.capacity_after))]
    lost = sum(step.seconds * max(0.0, change.after - step.capacity) for step in change.steps)
    for name, derived, claimed in (
        ("capacity at the end", capacity, change.after),
        ("lowest capacity", min(claims), change.lowest),
        ("duration", sum(step.seconds for step in change.steps), change.seconds),
        ("requests lost", lost, change.lost),
    ):
        if not _is_close(derived, claimed):
            yield f"the {name} is {derived:.9g}, not {claimed:.9g}"
    if change.lowest > change.best_lowest * (1.0 + RELATIVE):
        yield f"the lowest capacity {change.lowest:.9g} is above the highest possible, {change.best_lowest:.9g}"


def _is_close(derived: float, claimed: float) -> bool:
    return math.isclose(derived, claimed, rel_tol=RELATIVE, abs_tol=1e-12)
