"""`hexgen-paper`: HexGen's genetic search (ICML'24, arXiv 2311.11514) under our cost model.

An individual divides the GPUs of a zone into serving groups, one replica each. Every group gets its best pipeline of TP
groups (`parallelism.py`), and the sum of the groups' rates is the individual's fitness. Offspring come from mutations
alone, as in HexGen's published code: a GPU moves to another group (from the machine that most of that group is on, if
the giver has one), a group is split by a random share of every machine, or two groups merge. All groups must keep
memory for the weights and a tenth more.

Reconstructed, or required by our model beyond the paper:

- HexGen ranks individuals first by their number of groups and later by simulated attainment of a deadline. Here the
  cost model's rate within the limits ranks them, with the number of groups breaking ties.
- HexGen merges once in a thousand or more changes of groups; here a third of them merge, which finds better plans
  sooner.
- The best individual stays in the population, so the last generation is no worse than the others. The search ends
  after a hundred generations without a better one.
- Each GPU type of a group has one TP degree, as for `hexgen2-paper`. (b, M, C) and the layers follow from our family.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from hetis.solver.budget import Budget, Progress, Report
from hetis.solver.placement.solve import replica_plan
from hetis.solver.placement.tabulation import build_atlas
from hetis.solver.placement.template import Template
from hetis.solver.plan import Plan, ReplicaPlan, Role
from hetis.solver.problem import PlacementProblem
from hetis.solver.published.graph import FleetGraph, graph_of
from hetis.solver.published.parallelism import ReplicaSearch, composition
from hetis.solver.published.partition import Part
from hetis.solver.published.pipelines import ReplicaDuty, duty_of
from hetis.solver.published.plans import (
    WITHOUT_PROOF,
    HeuristicPlan,
    named_stages,
    no_plan,
    plan_of,
    refuse_larger,
    replica_bytes,
)

GENERATIONS, OFFSPRING, SURVIVORS, TOURNAMENT = 300, 10, 3, 3  # as in HexGen's code
PATIENCE = 100  # generations without a better individual, after which the search ends
HEADROOM = 0.1  # ratio of a group's spare memory to the weights: 144 GB for Llama-2 70B in HexGen's code
LEAST_SHARE, MOST_SHARE = 0.1, 0.9  # of every machine that goes to the new group of a split
MOVES = 0.5  # share of the mutations
MERGES = 1 / 3  # share of the other mutations, which change the number of groups
ATTEMPTS = 20  # at a mutation that leaves enough memory in all groups
MAX_GPUS = 1024  # groups are lists of GPUs

NOTES = (
    WITHOUT_PROOF,
    "HexGen reconstructed: fitness is the rate under the cost model, groups inside zones, more merges than in its code "
    "(docs/strategies.md)",
)

Individual = tuple[Part, ...]  # serving groups


def solve_hexgen(problem: PlacementProblem, *, budget: Budget, seed: int, report: Report) -> Plan:
    """Return the plan that HexGen's genetic search finds.

    Raises:
        NoPlanFoundError: it finds none, which proves nothing.
    """
    refuse_larger(problem, MAX_GPUS, strategy="hexgen-paper", does="mutates GPU by GPU")
    atlas = build_atlas(problem)
    graph = graph_of(atlas)
    search, order = ReplicaSearch(atlas), random.Random(seed)
    mutations = Mutations(graph, replica_bytes(problem.model, HEADROOM), order)
    replicas: list[ReplicaPlan] = []
    for zone in problem.cluster.zones():
        duty = duty_of(atlas, Role.UNIFIED, zone)
        everything = tuple(gpu for gpu in range(graph.num_gpus) if graph.zones[gpu] == zone)
        fitness = partial(_fitness, search, graph, duty)
        best = evolved((everything,), mutations.mutated, fitness, order, budget=budget, report=report)
        for group in best:
            template = _replica(search, graph, group, duty)
            if template is not None:
                replicas.append(replica_plan(atlas, template, named_stages(atlas, graph, group, template)))
    if not replicas:
        raise no_plan(budget, "hexgen-paper found no groups that serve a request within the limits")
    return plan_of(atlas, "hexgen-paper", HeuristicPlan(replicas=tuple(replicas), notes=NOTES), budget)


def evolved(
    start: Individual, mutated: Callable[[Individual], Individual], fitness: Callable[[Individual], tuple[float, int]],
    order: random.Random, *, budget: Budget, report: Report,
) -> Individual:  # fmt: skip
    """Return the fittest individual of all generations; it always survives, and others are drawn by tournament."""
    known: dict[Individual, tuple[float, int]] = {}

    def fit(one: Individual) -> tuple[float, int]:
        if one not in known:
            known[one] = fitness(one)
        return known[one]

    population = [start]
    last_gain = 0
    for generation in range(GENERATIONS):
        if budget.is_spent() or generation - last_gain > PATIENCE:
            break
        offspring = [mutated(order.choice(population)) for _ in range(OFFSPRING)]
        candidates = population + offspring
        best = max(candidates, key=fit)
        last_gain = generation if fit(best) > fit(population[0]) else last_gain
        drawn = [order.choices(candidates, k=TOURNAMENT) for _ in range(SURVIVORS - 1)]
        population = [best, *(max(some, key=fit) for some in drawn)]
        report(
            Progress(phase=f"generation {generation + 1}", elapsed_s=budget.elapsed_s(), incumbent=fit(best)[0] or None)
        )
    return population[0]


@dataclass(frozen=True, slots=True)
class Mutations:
    """Changes of an individual that leave at least ``least_bytes`` of room in every group."""

    graph: FleetGraph
    least_bytes: float
    order: random.Random

    def mutated(self, one: Individual) -> Individual:
        """Return the individual after a random change, or itself if no attempt leaves enough memory."""
        rooms = self.graph.room_bytes.tolist()
        for _ in range(ATTEMPTS):
            changed = self._change_of(one)(one)
            if all(sum(rooms[gpu] for gpu in group) >= self.least_bytes for group in changed):
                return tuple(sorted(changed))
        return one

    def _change_of(self, one: Individual) -> Callable[[Individual], Individual]:
        if len(one) == 1:
            return self._split
        if self.order.random() < MOVES:
            return self._moved
        return self._merged if self.order.random() < MERGES else self._split

    def _moved(self, one: Individual) -> Individual:
        """Move a GPU to another group, preferably from the machine that most of the taker is on."""
        giver, taker = self.order.sample(range(len(one)), 2)
        main, _ = Counter(self.graph.kind(gpu) for gpu in one[taker]).most_common(1)[0]
        suited = [gpu for gpu in one[giver] if self.graph.kind(gpu) == main] or list(one[giver])
        gpu = self.order.choice(suited)
        groups = {**dict(enumerate(one)), giver: tuple(g for g in one[giver] if g != gpu)}
        return (*(g for i, g in groups.items() if i != taker), tuple(sorted((*one[taker], gpu))))

    def _split(self, one: Individual) -> Individual:
        """Make a new group of the same share of the GPUs of every machine of a group."""
        chosen = self.order.randrange(len(one))
        share = self.order.uniform(LEAST_SHARE, MOST_SHARE)
        kinds = Counter(self.graph.kind(gpu) for gpu in one[chosen])
        leaving: list[int] = []
        for kind, count in kinds.items():
            leaving += [gpu for gpu in one[chosen] if self.graph.kind(gpu) == kind][: round(share * count)]
        staying = tuple(gpu for gpu in one[chosen] if gpu not in set(leaving))
        return (*(group for i, group in enumerate(one) if i != chosen), staying, tuple(sorted(leaving)))

    def _merged(self, one: Individual) -> Individual:
        first, second = self.order.sample(range(len(one)), 2)
        rest = tuple(group for i, group in enumerate(one) if i not in (first, second))
        return (*rest, tuple(sorted((*one[first], *one[second]))))


def _fitness(search: ReplicaSearch, graph: FleetGraph, duty: ReplicaDuty, one: Individual) -> tuple[float, int]:
    """Return the rate and the number of groups."""
    found = [_replica(search, graph, group, duty) for group in one]
    return sum(template.rate for template in found if template is not None), len(one)


def _replica(search: ReplicaSearch, graph: FleetGraph, group: Part, duty: ReplicaDuty) -> Template | None:
    return search.best_replica(composition(graph, group), duty) if group else None
