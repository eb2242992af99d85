"""The rate that remains after the loss of a node or a zone, and plans that are large enough to survive one."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import cache

from hetis.planner.use_cases.record.parts import Losses
from hetis.solver.advice import without_nodes, worst_node, worst_zone
from hetis.solver.cluster import NodeGroup
from hetis.solver.constraints import AtMost, Exclude, Replicas, RestrictRole, Selection, Unit, Use, misfits
from hetis.solver.errors import InfeasibleError, InvalidProblemError, NoPlanFoundError
from hetis.solver.plan import KvRoute, ObjectiveKind, Plan, ReplicaPlan, SolveResult, Status
from hetis.solver.problem import PlacementProblem

MOST_TRIES = 6  # demands that are tried
ENOUGH = 1.0 - 1e-9
FEW_NODES = (2, 3, 4, 6, 8)  # numbers of nodes that are tried, each node with a plan of its own
FEW_ZONES = 3  # plans of up to so many zones, and of all but one, are tried besides those of all zones
LEAST_GROWTH = 1.01  # factor by which a demand grows at least from try to try
CLOSE = 0.01  # share of a zone's rate: a smaller surplus is not worth another search

Find = Callable[[PlacementProblem], Plan]  # raises InfeasibleError, NoPlanFoundError


def with_losses(plan: Plan, problem: PlacementProblem) -> Plan:
    """Return the plan with its worst loss of any one node, and of any one zone."""
    found = {"node": worst_node(plan, problem), "zone": worst_zone(plan, problem)}
    return Losses(by_place={kind: loss for kind, loss in found.items() if loss is not None}).on(plan)


def left_without(plan: Plan, problem: PlacementProblem, place: str) -> float:
    """Return the planned requests/s that remain without the worst ``node`` or ``zone``."""
    lost = (worst_zone if place == "zone" else worst_node)(plan, problem)
    return 0.0 if lost is None else problem.assumptions.planned_utilisation * lost.rate


def surviving_plan(find: Find, probe: Find, problem: PlacementProblem, place: str) -> Plan:
    """Return a plan that serves the demand even if any one ``node`` or ``zone`` is lost.

    It is the plan for a larger demand, which is in its objective. ``probe`` searches as ``find`` does, but does not
    explain why there is no plan, which would take longer than the search.

    In a plan for N nodes (zones) that survives, each of the N sets of N - 1 of them serves at least the demand D.
    Divide the sum of what these sets serve by N - 1: no replica is used more than fully, so the whole plan serves at
    least D N / (N - 1). The best plan for that rate is therefore a bound on all plans that survive; if there is none,
    none survives, and if it survives itself, it is the answer.

    Raises:
        InvalidProblemError: the objective has no demand to keep, or its zones or constraints rule the question out.
        NoPlanFoundError: no such plan was found.
        InfeasibleError: there is no plan for a demand that such a plan must serve, or for the fleet without some node.
    """
    check_survival(problem, place)
    demand, alone = _demand(problem), find(problem)
    if (left := left_without(alone, problem, place)) >= demand * ENOUGH:
        return _with_cost(alone, alone, place, demand, left, least=alone.result.bound)
    num = len(problem.cluster.zones()) if place == "zone" else problem.cluster.num_nodes()
    if num < 2:
        raise InfeasibleError((f"--survive {place}: the fleet has no other {place}",))
    posed = _for(problem, demand * num / (num - 1))
    first = _larger(find, posed, demand, place)
    if place == "node":
        plan = _without_a_node(find, probe, problem, first)
    elif left_without(first, problem, place) < demand * ENOUGH:
        plan = _united(_Zones(probe, problem).cheapest(), first, posed)
    else:
        plan = first
    given, left = plan.objective.demand_rps or 0.0, left_without(plan, problem, place)
    return _with_cost(plan, alone, place, given, left, least=first.result.bound)


def check_survival(problem: PlacementProblem, place: str) -> None:
    """Check that a problem has a demand to keep, and that its zones and constraints allow the question.

    Raises InvalidProblemError if not.
    """
    if problem.objective.maximises or problem.objective.demand_rps is None:
        raise InvalidProblemError("--survive needs a demand: use --objective cost or gpus, with --rate")
    if place != "zone":
        return
    if len(problem.cluster.zones()) < 2:
        raise InvalidProblemError(f"--survive zone: all GPUs of cluster {problem.cluster.name} are in one zone")
    for constraint in problem.constraints:
        if isinstance(constraint, Use | Replicas | AtMost):
            raise InvalidProblemError(
                f"{constraint} applies to the whole fleet, but --survive zone plans every zone on its own"
            )


def _without_a_node(find: Find, probe: Find, problem: PlacementProblem, first: Plan) -> Plan:
    """Return the cheapest of several plans that survive the loss of a node, with the bound of ``first``.

    One is for a demand that grows from that of ``first`` until enough remains, others are plans of few nodes.
    """
    demand = _demand(problem)
    found = [_grown(probe, problem, first, demand)]
    if found[0] is not first:
        found += [_inside_nodes(probe, problem, demand), _spread(probe, problem)]
    plans = [replace(one, family=first.family) for one in found if one is not None]
    if not plans:
        _refuse_needed_nodes(find, probe, problem)
        raise NoPlanFoundError(
            f"no plan was found that serves {demand:.4g} requests/s without its worst node, nor proved that there is "
            "none"
        )
    plan = min(plans, key=lambda one: one.result.value)
    return replace(plan, result=bounded_by(plan.result, first.result.bound))


def _refuse_needed_nodes(find: Find, probe: Find, problem: PlacementProblem) -> None:
    """Check that no node is known to be needed: what remains of a plan without a node is a plan of the other nodes.

    A constraint that counts over the whole fleet need not hold for what remains, so nothing is known then.

    Raises:
        InfeasibleError: the other nodes have no plan for the demand; names the node, and why there is none.
    """
    if any(isinstance(each, Use | Replicas | AtMost) for each in problem.constraints):
        return
    for node, *_ in _equal_nodes(problem):
        posed = _lacking(problem, node)
        try:
            probe(posed)
        except NoPlanFoundError:
            continue
        except InfeasibleError as short:
            why = f"--survive node: without node {node}, the others must serve {_demand(problem):.4g} requests/s"
            try:
                find(posed)  # once more, for the reasons
            except InfeasibleError as error:
                raise InfeasibleError((why, *error.reasons)) from None
            except NoPlanFoundError:
                raise InfeasibleError((why, *short.reasons)) from None


def _grown(probe: Find, problem: PlacementProblem, plan: Plan, demand: float) -> Plan | None:
    """Increase the demand of a plan by its worst loss until enough remains; None: no such plan was found.

    Each step assumes that the next plan loses as much. It may be infeasible if the plan has replicas that span many
    nodes; then half the step is tried.
    """
    utilisation, given, too_much = problem.assumptions.planned_utilisation, plan.objective.demand_rps or 0.0, math.inf
    for _ in range(MOST_TRIES):
        lost = worst_node(plan, problem)
        rate, whole = (0.0, given) if lost is None else (utilisation * lost.rate, utilisation * lost.whole)
        if rate >= demand * ENOUGH:
            return plan
        wanted = max(given * LEAST_GROWTH, demand + whole - rate)
        wanted = wanted if wanted < too_much else (given + too_much) / 2.0
        try:
            plan = probe(_for(problem, wanted))
        except InfeasibleError:
            too_much = wanted
        except NoPlanFoundError:
            return None
        else:
            given = wanted
    return plan if left_without(plan, problem, "node") >= demand * ENOUGH else None


def _inside_nodes(probe: Find, problem: PlacementProblem, demand: float) -> Plan | None:
    """Return a plan with each replica inside one node, so that a loss affects few replicas; None: none was found."""
    engine = problem.family.engine
    if engine is None or engine.max_nodes == 1:
        return None
    posed = replace(problem, family=replace(problem.family, engine=replace(engine, max_nodes=1)))
    plan = _if_any(probe, posed)
    return None if plan is None else _grown(probe, posed, plan, demand)


def _if_any(probe: Find, problem: PlacementProblem) -> Plan | None:
    """Return the plan that a search finds, or None."""
    try:
        return probe(problem)
    except (InfeasibleError, NoPlanFoundError):
        return None


def _spread(probe: Find, problem: PlacementProblem) -> Plan | None:
    """Return the cheapest plan of a few nodes, planned one by one, all but one of which serve the demand.

    None if none was found.

    One of equal nodes is searched for all.
    """
    demand, best = _demand(problem), None
    if any(isinstance(each, Use | Replicas | AtMost) for each in problem.constraints):
        return None  # these count over the whole fleet

    @cache
    def plan_of(node: str, rate: float) -> Plan | None:
        return _if_any(probe, _only_in(Unit.NODE, node, _for(problem, rate)))

    alike = _equal_nodes(problem)
    for number in FEW_NODES:
        rate = demand / (number - 1)
        able = [(plan.result.value, node) for nodes in alike if (plan := plan_of(nodes[0], rate)) for node in nodes]
        chosen = sorted(able)[:number]
        if len(chosen) == number and (best is None or sum(value for value, _ in chosen) < best[0]):
            best = sum(value for value, _ in chosen), [node for _, node in chosen], rate
    if best is None:
        return None
    _, nodes, rate = best
    parts = {node: plan for node in nodes if (plan := plan_of(node, rate)) is not None}
    if len(parts) < len(nodes):
        return None
    posed = _for(problem, rate * len(nodes))
    first = next(iter(parts.values()))
    plan = _united(parts, replace(first, objective=posed.objective), posed)
    return plan if left_without(plan, problem, "node") >= demand * ENOUGH else None


def _equal_nodes(problem: PlacementProblem) -> list[list[str]]:
    """Return the nodes of the cluster, together those for which the same plan of a single node is the best."""
    named = (Unit.NODE, Unit.GPU)
    are_named = any(
        isinstance(each, Exclude | RestrictRole) and each.gpus.unit in named for each in problem.constraints
    )
    found = dict[NodeGroup, list[str]]()
    for node, group in problem.cluster.nodes():
        kind = group if are_named else replace(group, name="node", count=1, numbered=False)
        found.setdefault(kind, []).append(node)
    return list(found.values())


def _only_in(unit: Unit, name: str, problem: PlacementProblem) -> PlacementProblem:
    """Return the problem with all nodes, or zones, but this one left out."""
    nodes = (node for node, _ in problem.cluster.nodes())
    others = (other for other in (nodes if unit is Unit.NODE else problem.cluster.zones()) if other != name)
    left_out = (Exclude(gpus=Selection(unit=unit, name=other)) for other in others)
    return replace(problem, constraints=(*problem.constraints, *left_out))


def _lacking(problem: PlacementProblem, node: str) -> PlacementProblem:
    """Return the problem of a fleet without the node, which reasons then treat as no requirement of the user's."""
    cluster = without_nodes(problem.cluster, [node])
    kept = (each for each in problem.constraints if not any(misfits((each,), cluster, problem.family.tp_sizes)))
    return replace(problem, cluster=cluster, constraints=tuple(kept))


def bounded_by(result: SolveResult, bound: float) -> SolveResult:
    """Return a result with the bound of a more general problem, and the gap and status that follow from it."""
    from hetis.solver.placement.solve import OPTIMAL_GAP

    distance = abs(result.value - bound)
    gap = distance / abs(result.value) if result.value else (math.inf if distance else 0.0)  # GPUs may cost nothing
    return replace(result, bound=bound, gap=gap, status=Status.OPTIMAL if gap <= OPTIMAL_GAP else Status.FEASIBLE)


def _larger(find: Find, posed: PlacementProblem, demand: float, place: str) -> Plan:
    """Return a plan for a larger demand; if there is none, the reasons begin with why that demand was required."""
    try:
        return find(posed)
    except InfeasibleError as error:
        if _demand(posed) == demand:
            raise
        why = f"with all {place}s, {_demand(posed):.4g} requests/s are needed to serve {demand:.4g} without any one"
        raise InfeasibleError((f"--survive {place}: {why}", *error.reasons)) from None


class _Zones:
    """Plans of single zones that together serve a demand without any one of them."""

    def __init__(self, probe: Find, problem: PlacementProblem) -> None:
        self._probe, self._problem, self._demand = probe, problem, _demand(problem)
        self._plan = cache(self._planned)

    def cheapest(self) -> Mapping[str, Plan]:
        """Return the plans by zone: of all zones, or of fewer zones if that costs less.

        Raises:
            NoPlanFoundError: the zones do not serve the demand without the largest one.
        """
        zones = self._problem.cluster.zones()
        fewer = (num for num in range(2, len(zones)) if num <= FEW_ZONES or num == len(zones) - 1)
        found = [self._plans(zones), *(self._cheapest_of(zones, num) for num in fewer)]
        plans = [self._trimmed(one) for one in found if one is not None]
        if not plans:
            raise NoPlanFoundError(
                f"no plan was found that serves {self._demand:.4g} requests/s without its worst zone, with replicas "
                "that lie in one zone each, nor was it proved that there is none"
            )
        return min(plans, key=_value)

    def _cheapest_of(self, zones: Collection[str], num: int) -> dict[str, Plan] | None:
        """Return the cheapest plans of ``num`` zones for equal rates, or None if too few zones can serve that rate."""
        plans = {zone: self._plan(zone, self._demand / (num - 1)) for zone in zones}
        able = {zone: plan for zone, plan in plans.items() if plan is not None}
        chosen = sorted(able, key=lambda zone: able[zone].result.value)[:num]
        return {zone: able[zone] for zone in chosen} if len(chosen) == num else None

    def _plans(self, zones: Collection[str]) -> dict[str, Plan] | None:
        """Return plans of these zones for equal rates, or for as much as a zone can serve.

        None if that is too little.
        """
        most = dict.fromkeys(zones, float("inf"))
        while True:
            rate = _equal_rate(self._demand, most)
            if rate is None:
                return None
            shares = {zone: min(rate, most[zone]) for zone in zones}
            found = {zone: self._plan(zone, share) for zone, share in shares.items() if share > 0.0}
            lacking = [zone for zone, plan in found.items() if plan is None]
            if not lacking:
                return {zone: plan for zone, plan in found.items() if plan is not None}
            for zone in lacking:
                most[zone] = self._most(zone) if most[zone] == float("inf") else 0.0

    def _trimmed(self, plans: dict[str, Plan]) -> dict[str, Plan]:
        """Return the plans with smaller ones in zones where the others serve more than required, by whole replicas."""
        for zone in plans:
            others = [self._rate(plan) for other, plan in plans.items() if other != zone]
            needed = max(self._demand + max(others) - sum(others), self._demand / len(plans) * CLOSE)
            if sum(others) >= self._demand and needed < (1.0 - CLOSE) * self._rate(plans[zone]):
                smaller = self._plan(zone, needed)
                if smaller is not None and smaller.result.value < plans[zone].result.value:
                    plans = {**plans, zone: smaller}
        return plans

    def _planned(self, zone: str, rate: float) -> Plan | None:
        try:
            return self._probe(_only_in(Unit.ZONE, zone, _for(self._problem, rate)))
        except InfeasibleError:
            return None

    def _most(self, zone: str) -> float:
        """Return the planned rate that a zone can serve, or 0 if it cannot run the model."""
        goal = replace(self._problem.objective, kind=ObjectiveKind.GOODPUT, demand_rps=None)
        try:
            posed = _only_in(Unit.ZONE, zone, replace(self._problem, objective=goal))
            return self._probe(posed).result.value * (1.0 - 1e-6)
        except InfeasibleError:
            return 0.0

    def _rate(self, plan: Plan) -> float:
        return self._problem.assumptions.planned_utilisation * plan.served_rate()


def _equal_rate(demand: float, most: Mapping[str, float]) -> float | None:
    """Return the least rate per zone with which all zones but the largest serve the demand; None if there is none.

    A zone that cannot serve this rate serves as much as it can, ``most``.
    """
    full = 0.0  # rate of the zones that serve as much as they can
    waiting = sorted(most.values())
    while len(waiting) > 1:
        rate = (demand - full) / (len(waiting) - 1)
        if rate <= waiting[0]:
            return max(rate, 0.0)
        full += waiting.pop(0)
    return None


def _united(parts: Mapping[str, Plan], whole: Plan, problem: PlacementProblem) -> Plan:
    """Return the plans of several zones as one plan.

    ``whole``, the plan for the same problem, provides the bound and the prices.
    """
    from hetis.solver.placement.constrained_problem import restored

    replicas, routes = list[ReplicaPlan](), list[KvRoute]()
    for part in parts.values():
        first = len(replicas)
        replicas += part.replicas
        routes += (replace(one, prefill=one.prefill + first, decode=one.decode + first) for one in part.kv_routes)
    solve_s = whole.result.solve_s + sum(part.result.solve_s for part in parts.values())
    result = replace(whole.result, value=_value(parts), solve_s=solve_s)
    result = bounded_by(result, whole.result.bound)
    plan = replace(whole, result=result, replicas=tuple(replicas), kv_routes=tuple(routes), runners_up=())
    return restored(plan, problem, problem)


def _value(parts: Mapping[str, Plan]) -> float:
    return sum(part.result.value for part in parts.values())


def _for(problem: PlacementProblem, demand_rps: float) -> PlacementProblem:
    return replace(problem, objective=replace(problem.objective, demand_rps=demand_rps))


def _demand(problem: PlacementProblem) -> float:
    return problem.objective.demand_rps or 0.0


def _with_cost(plan: Plan, alone: Plan, place: str, given: float, rate: float, *, least: float) -> Plan:
    """Return the plan with a note on the cost of surviving; ``least`` is a bound for all plans that survive."""
    demand, unit = alone.objective.demand_rps or 0.0, plan.objective.unit
    if plan is alone:
        note = f"losing any one {place} costs nothing extra: {rate:.4g} of {demand:.4g} requests/s are served then"
    else:
        value, without = plan.result.value, alone.result.value
        more = f"{value / without - 1.0:.1%}" if without else f"{value:.4g} {unit}"
        note = (
            f"sized for {given:.4g} requests/s, so that {rate:.4g} are served when any one {place} is lost: {more} "
            f"more than {without:.4g} {unit} of the plan for {demand:.4g} requests/s without that; no plan "
            f"that keeps it takes less than {least:.4g} {unit}"
        )
    return replace(plan, notes=(*plan.notes, note))
