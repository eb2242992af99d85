"""The common part of all heuristics: a search over a fleet's GPUs, whose plan has a bound from dense work."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hetis.solver.budget import Budget, Progress, Report
from hetis.solver.errors import NoPlanFoundError
from hetis.solver.placement.binding import BoundStage
from hetis.solver.placement.fleet import class_of_slots, class_prices
from hetis.solver.placement.outcome import SHARES, layers_per_s, rate_bound
from hetis.solver.placement.replicas.tables import CostTables, FloatArray
from hetis.solver.placement.replicas.tabulation import build_cost_tables
from hetis.solver.placement.replicas.template import Template
from hetis.solver.placement.solve import objective_scale, replica_plan
from hetis.solver.plan import KvRoute, Plan, ReplicaPlan, Role, SolveResult, Status
from hetis.solver.problem import PlacementProblem
from hetis.solver.published.replicas import FleetGpus, ReplicaDuty, ReplicaSearch, duty_of

OUT_OF_TIME = "the time limit ended its search: the plan is the best that it had found by then"
WITHOUT_PROOF = "a heuristic as published, without a proof of its own: alone it has the bound of the fleet's dense work"


class Decisions(NamedTuple):
    """The decisions of a heuristic."""

    replicas: Sequence[ReplicaPlan]
    routes: Sequence[KvRoute] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Search:
    """The search of one heuristic; ``seed`` is for heuristics that draw random numbers."""

    costs: CostTables
    gpus: FleetGpus
    replicas: ReplicaSearch
    budget: Budget
    report: Report
    seed: int

    @property
    def zones(self) -> tuple[str, ...]:
        return self.costs.problem.cluster.zones()

    def tell(self, phase: str, incumbent: float | None = None) -> None:
        self.report(Progress(phase=phase, elapsed_s=self.budget.elapsed_s(), incumbent=incumbent))

    def replica_bytes(self, headroom: float) -> float:
        """Return the estimated memory of a replica: weights, and ``headroom`` times as many bytes of KV."""
        model = self.costs.problem.model
        ends = model.embedding_params * (1 if model.tie_embeddings else 2)
        return (1.0 + headroom) * ((model.params() - ends) * model.weight_bytes + ends * model.embedding_bytes)

    def best(self, gpus: Sequence[int], duty: ReplicaDuty) -> Template | None:
        """Return the best replica on these GPUs, or None if there are none or it does not fit."""
        return self.replicas.best_replica(self.gpus.composition(gpus), duty) if gpus else None

    def duty(self, role: Role, zone: str) -> ReplicaDuty:
        return duty_of(self.costs, role, zone)

    def on_gpus(self, template: Template, gpus: Sequence[int]) -> ReplicaPlan:
        return replica_plan(self.costs, template, self.bound(template, gpus))

    def bound(self, template: Template, gpus: Sequence[int]) -> list[BoundStage]:
        """Place TP groups inside nodes, the largest first, each in the fullest node that holds it.

        TP sizes are powers of two, so this succeeds for every shape that the group's nodes admit.
        """
        free: dict[tuple[int, str], list[int]] = defaultdict(list)
        for gpu in sorted(gpus):
            free[self.gpus.kind(gpu)].append(gpu)
        ranks = [self.costs.ranks[stage.rank] for stage in template.stages]
        bound = [BoundStage() for _ in ranks]
        for i in sorted(range(len(ranks)), key=lambda i: (-ranks[i][1], i)):
            device_class, tp = ranks[i]
            places = [kind for kind, left in free.items() if kind[0] == device_class and len(left) >= tp]
            place = min(places, key=lambda kind: (len(free[kind]), kind[1]))
            bound[i].devices.extend(self.gpus.names[gpu] for gpu in free[place][:tp])
            del free[place][:tp]
        return bound


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A published heuristic."""

    name: str  # name of the strategy
    summary: str  # one sentence for people
    search: Callable[[Search], Decisions]  # finds replicas; finding none proves nothing
    max_gpus: int  # the largest fleet for which it is meant: on larger ones the search would take too long
    does: str
    finds: str  # the kind of plan that it looks for, in the message that none was found
    splits_roles: bool = False  # whether it needs prefill and decode replicas
    notes: str  # what was reconstructed

    def solve(self, problem: PlacementProblem, *, budget: Budget, seed: int, report: Report) -> Plan:
        """Return the plan that the heuristic finds; ``problem.family`` is the strategy's own family.

        Raises:
            NoPlanFoundError: it finds no plan, which proves nothing.
        """
        size = problem.cluster.num_gpus()
        if size > self.max_gpus:
            raise NoPlanFoundError(f"{self.name} {self.does}: {size} GPUs, it is meant for {self.max_gpus} at most")
        if self.splits_roles and not problem.family.splits_roles:
            raise NoPlanFoundError(f"{self.name} needs prefill and decode replicas")
        costs = build_cost_tables(problem)
        if self.splits_roles and (size < 2 or not costs.ranks):
            raise NoPlanFoundError(f"{self.name} needs two GPUs at least, one to prefill and one to decode")
        rooms = [problem.profiles[c.gpu].room_bytes for c in costs.classes]
        gpus = FleetGpus.of(problem.cluster, costs.classes, rooms)
        found = self.search(Search(costs, gpus, ReplicaSearch(costs, budget), budget, report, seed))
        if not found.replicas:
            if budget.is_spent():
                raise NoPlanFoundError(f"no plan found within {budget.elapsed_s():.1f} s; allow more time")
            raise NoPlanFoundError(f"{self.name} found no {self.finds}")
        cut = (OUT_OF_TIME,) if budget.remaining_s() <= 0.0 else ()
        notes = (WITHOUT_PROOF, self.notes, *found.notes, *cut)
        return plan_of(costs, self.name, found._replace(notes=notes), budget)


def plan_of(costs: CostTables, strategy: str, found: Decisions, budget: Budget) -> Plan:
    """Return the plan with the bound from dense work, which no plan of any strategy exceeds.

    Raises:
        NoPlanFoundError: cost or GPUs are minimised and the plan serves less than the demand.
    """
    problem, objective = costs.problem, costs.problem.objective
    rate = sum(r.rate for r in found.replicas if r.role is Role.UNIFIED) + sum(r.rate for r in found.routes)
    goodput = problem.assumptions.planned_utilisation * rate
    demand = objective.demand_rps
    if not objective.maximises and demand is not None and goodput < demand * (1.0 - 1e-9):
        raise NoPlanFoundError(f"{strategy} serves {goodput:.4g} requests/s, {demand:.4g} are demanded")
    used, workers = _used(costs, found)
    value, bound = _value_and_bound(costs, used, rate)
    notes = found.notes
    if not objective.maximises:
        notes = (*notes, f"the heuristic maximises the rate: it uses what serves {goodput:.4g} requests/s")
    return Plan(
        strategy=strategy,
        family=problem.family.describe(problem.model),
        result=SolveResult(
            status=Status.INTERRUPTED if budget.cancelled.is_set() else Status.FEASIBLE,
            objective=objective.kind,
            value=value,
            bound=bound,
            gap=abs(bound - value) / abs(value) if value else 0.0,
            unit=objective.unit,
            solve_s=budget.elapsed_s(),
            utilisation=problem.assumptions.planned_utilisation,
            unified_lanes=problem.assumptions.lanes.unified,
            prefill_lanes=problem.assumptions.lanes.prefill,
        ),
        objective=objective,
        replicas=tuple(found.replicas),
        kv_routes=tuple(found.routes),
        prices=class_prices(costs.classes, used, workers, duals=[0.0] * len(costs.classes)),  # heuristics have no duals
        notes=notes,
    )


def _used(costs: CostTables, found: Decisions) -> Iterator[Counter[int]]:
    """Yield the GPUs of every class that the plan uses, and the attention workers among them."""
    class_of = class_of_slots(costs.classes)
    device_class = {d.name: class_of[d.group.name, d.gpu] for d in costs.problem.cluster.devices()}
    used = {name for replica in found.replicas for name in replica.devices()}
    workers = {name for replica in found.replicas for pool in replica.attention_workers for name in pool.devices}
    for names in (used, workers):
        yield Counter(device_class[name] for name in names)


def _value_and_bound(costs: CostTables, used: Counter[int], rate: float) -> tuple[float, float]:
    problem, goal = costs.problem, costs.problem.objective.kind.goal
    if goal.maximises:
        scale = objective_scale(problem)
        return scale * rate, scale * max(rate, rate_bound(costs))
    types = problem.cluster.gpu_types
    row_costs = np.array([goal.cost(types[c.gpu], c.usd_per_hour) for c in costs.classes])
    value = float(sum(row_costs[row] * count for row, count in used.items()))
    needed = (problem.objective.demand_rps or 0.0) / problem.assumptions.planned_utilisation
    bound = least_cost(costs, needed, row_costs)
    return value, min(value, goal.tightened(bound, value))


def least_cost(costs: CostTables, demand: float, unit_costs: FloatArray) -> float:
    """Return a lower bound on the cost of serving ``demand`` requests/s; ``unit_costs`` [N] are per GPU and class.

    A GPU that spends its time on dense work alone computes at most a known number of layers per second: u of prompts
    and outputs together, p of prompts, d of outputs. A plan that serves r requests/s computes r L layers of either, so
    for every share q from 0 to 1, as in `rate_bound`,

        r L  =  q r L + (1 - q) r L  <=  sum over GPUs of max(u, q p, (1 - q) d)

    The cheapest GPUs per layer and second come first, the last class in part. The bound is infinite if the fleet is too
    small.
    """
    unified, prefill, decode = (layers_per_s(costs, role) for role in (Role.UNIFIED, Role.PREFILL, Role.DECODE))
    least = 0.0
    for q in SHARES:
        speed = np.maximum(unified, np.maximum(q * prefill, (1.0 - q) * decode))
        per_layer = unit_costs / np.maximum(speed, 1e-300)
        needed, cost = demand * costs.scopes[0].tables.num_layers, 0.0
        for g in np.argsort(per_layer, kind="stable"):
            taken = min(needed, float(speed[g] * costs.classes[g].available))
            cost += taken * float(per_layer[g])
            needed -= taken
        least = max(least, cost if needed <= 1e-12 else np.inf)
    return least
