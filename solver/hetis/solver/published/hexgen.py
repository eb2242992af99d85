"""`hexgen-paper`: HexGen's genetic search (ICML'24, arXiv 2311.11514) under our cost model.

`docs/strategies.md` lists what is reconstructed. Offspring come from mutations alone, as in HexGen's published code. A
moved GPU comes from the machine that holds most of the receiving group, if the giving group has one there; a split
takes a random share of every machine, rounded up or down at random, so that machines of one GPU can part. HexGen ranks
individuals first by their number of groups and later by simulated attainment of a deadline; here the rate within the
limits ranks them, with the number of groups breaking ties.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from hetis.solver.plan import Role
from hetis.solver.published.heuristic import Decisions, Search
from hetis.solver.published.replicas import FleetGpus, Part

GENERATIONS, OFFSPRING, SURVIVORS, TOURNAMENT = 300, 10, 3, 3  # as in HexGen's code
MOST_IDLE_GENERATIONS = 100  # generations without a better individual, after which the search ends
HEADROOM = 0.1  # ratio of a group's spare memory to the weights: HexGen's code has 144 GB for Llama-2 70B
LEAST_SHARE, MOST_SHARE = 0.1, 0.9  # share of every machine that goes to the new group of a split
MOVES = 0.5  # share of mutations that are moves
MERGES = 1 / 3  # share of merges among the other mutations, which change the number of groups
ATTEMPTS = 20  # attempts to find a mutation that leaves enough memory in all groups

Individual = tuple[Part, ...]  # serving groups


def search_hexgen(search: Search) -> Decisions:
    """Return the plan that HexGen's genetic search finds."""
    order, replicas = random.Random(search.seed), []
    mutations = Mutations(search.gpus, search.replica_bytes(HEADROOM), order)
    for zone in search.zones:
        duty = search.duty(Role.UNIFIED, zone)

        def fitness(one: Individual) -> tuple[float, int]:
            """Return the rate and the number of groups."""
            found = [search.best(group, duty) for group in one]  # noqa: B023  (used within this turn)
            return sum(template.rate for template in found if template is not None), len(one)

        for group in evolved((search.gpus.of_zone(zone),), mutations.mutated, fitness, order, search):
            template = search.best(group, duty)
            if template is not None:
                replicas.append(search.on_gpus(template, group))
    return Decisions(replicas)


def evolved(
    start: Individual, mutated: Callable[[Individual], Individual], fitness: Callable[[Individual], tuple[float, int]],
    order: random.Random, search: Search,
) -> Individual:  # fmt: skip
    """Return the fittest individual of all generations; it always survives, and others are drawn by tournament."""
    fit, population, last_gain = cache(fitness), [start], 0
    for generation in range(GENERATIONS):
        if search.budget.is_spent() or generation - last_gain > MOST_IDLE_GENERATIONS:
            break
        candidates = population + [mutated(order.choice(population)) for _ in range(OFFSPRING)]
        best = max(candidates, key=fit)
        last_gain = generation if fit(best) > fit(population[0]) else last_gain
        drawn = [order.choices(candidates, k=TOURNAMENT) for _ in range(SURVIVORS - 1)]
        population = [best, *(max(some, key=fit) for some in drawn)]
        search.tell(f"generation {generation + 1}", fit(best)[0] or None)
    return population[0]


@dataclass(frozen=True, slots=True)
class Mutations:
    """Changes of an individual that leave at least ``least_bytes`` of room in every group."""

    gpus: FleetGpus
    least_bytes: float
    order: random.Random

    def mutated(self, one: Individual) -> Individual:
        """Return the individual after a random change, or itself if no attempt leaves enough memory."""
        rooms = self.gpus.room_bytes.tolist()
        for _ in range(ATTEMPTS):
            if len(one) == 1:
                changed = self._split(one)
            elif self.order.random() < MOVES:
                changed = self._moved(one)
            else:
                changed = self._merged(one) if self.order.random() < MERGES else self._split(one)
            if all(sum(rooms[gpu] for gpu in group) >= self.least_bytes for group in changed):
                return tuple(sorted(changed))
        return one

    def _moved(self, one: Individual) -> Individual:
        """Move a GPU to another group, preferably from the machine that holds most of that group."""
        giver, taker = self.order.sample(range(len(one)), 2)
        main, _ = Counter(self.gpus.kind(gpu) for gpu in one[taker]).most_common(1)[0]
        suited = [gpu for gpu in one[giver] if self.gpus.kind(gpu) == main] or list(one[giver])
        gpu = self.order.choice(suited)
        left = tuple(other for other in one[giver] if other != gpu)
        groups = (left if i == giver else group for i, group in enumerate(one) if i != taker)
        return (*groups, tuple(sorted((*one[taker], gpu))))

    def _split(self, one: Individual) -> Individual:
        """Form a new group from the same share of the GPUs on every machine of a group, on average."""
        chosen = self.order.randrange(len(one))
        share = self.order.uniform(LEAST_SHARE, MOST_SHARE)
        leaving: set[int] = set()
        for kind, count in Counter(self.gpus.kind(gpu) for gpu in one[chosen]).items():
            of_kind = [gpu for gpu in one[chosen] if self.gpus.kind(gpu) == kind]
            leaving.update(of_kind[: int(share * count + self.order.random())])
        staying = tuple(gpu for gpu in one[chosen] if gpu not in leaving)
        return (*(group for i, group in enumerate(one) if i != chosen), staying, tuple(sorted(leaving)))

    def _merged(self, one: Individual) -> Individual:
        first, second = self.order.sample(range(len(one)), 2)
        rest = (group for i, group in enumerate(one) if i not in (first, second))
        return (*rest, tuple(sorted((*one[first], *one[second]))))
