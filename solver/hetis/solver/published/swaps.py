"""Step C of HexGen-2: swaps of GPUs from serving groups with slack to groups that the maximum flow saturates.

A saturated group limits the flow, and a group with slack starves. Proposals come in this order: a group with slack
changes sides; one of its GPUs moves to a saturated group; two such groups exchange GPUs. The first proposal that
increases the flow is taken, and the new flow determines the saturated groups again, until no proposal helps. (HexGen-2
repeats its secondary partition to change sides; making this a proposal like the others is reconstructed.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hetis.solver.budget import Budget, Progress, Report
from hetis.solver.placement.template import Template
from hetis.solver.plan import Role
from hetis.solver.published.flow import Flow, Station, maximum_flow
from hetis.solver.published.graph import FleetGraph
from hetis.solver.published.parallelism import ReplicaSearch, composition
from hetis.solver.published.partition import Part
from hetis.solver.published.pipelines import ReplicaDuty

SATURATED = 1.0 - 1e-9  # share of a group's capacity
GAIN = 1.0 + 1e-9


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Serving groups and the side of each."""

    groups: tuple[Part, ...]
    roles: tuple[Role, ...]


@dataclass(frozen=True, slots=True)
class Evaluated:
    """An arrangement, the best replica of every group (None if none fits) and the maximum flow through them."""

    arrangement: Arrangement
    replicas: tuple[Template | None, ...]
    flow: Flow

    def loads(self) -> list[float]:
        """Return the share of every group's capacity that the flow takes, 1 for a group without capacity."""
        sent = {Role.PREFILL: iter(self.flow.prefill), Role.DECODE: iter(self.flow.decode)}
        return [
            1.0 if replica is None else next(sent[role]) / replica.rate
            for replica, role in zip(self.replicas, self.arrangement.roles, strict=True)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapNetwork:
    """The data for evaluating arrangements: duties by (role, zone), and the links between zones in requests/s."""

    graph: FleetGraph
    search: ReplicaSearch
    duties: Mapping[tuple[Role, str], ReplicaDuty]
    link_rates: Mapping[tuple[str, str], float]
    sends_afar: bool

    def evaluated(self, arrangement: Arrangement) -> Evaluated:
        replicas = tuple(
            self._replica(group, role) for group, role in zip(arrangement.groups, arrangement.roles, strict=True)
        )
        sides: dict[Role, list[Station]] = {Role.PREFILL: [], Role.DECODE: []}
        for group, role, replica in zip(arrangement.groups, arrangement.roles, replicas, strict=True):
            if replica is not None:
                zone = self.graph.zones[group[0]]
                sides[role].append(Station(rate=replica.rate, zone=zone, is_wide=self.sends_afar))
        flow = maximum_flow(sides[Role.PREFILL], sides[Role.DECODE], self.link_rates)
        return Evaluated(arrangement, replicas, flow)

    def _replica(self, group: Part, role: Role) -> Template | None:
        duty = self.duties[role, self.graph.zones[group[0]]]
        return self.search.best_replica(composition(self.graph, group), duty)


def improved(network: SwapNetwork, start: Evaluated, *, budget: Budget, seed: int, report: Report) -> Evaluated:
    """Return an arrangement at which no proposal increases the flow, or the best one once the budget is spent."""
    best, order = start, np.random.default_rng(seed)
    while True:
        better = None
        for proposal in proposals(network.graph, best, order):
            if budget.is_spent():
                return best
            candidate = network.evaluated(proposal)
            if candidate.flow.value > best.flow.value * GAIN:
                better = candidate
                break
        if better is None:
            return best
        best = better
        report(Progress(phase="swaps by maximum flow", elapsed_s=budget.elapsed_s(), incumbent=best.flow.value))


def proposals(graph: FleetGraph, found: Evaluated, order: np.random.Generator) -> Iterator[Arrangement]:
    """Yield arrangements that give a saturated group more, from groups with most slack; ties in random order."""
    loads, groups, roles = found.loads(), found.arrangement.groups, found.arrangement.roles
    lots = order.permutation(len(groups)).tolist()
    slack = sorted((g for g in lots if loads[g] < SATURATED), key=lambda g: loads[g])
    saturated = [g for g in lots if loads[g] >= SATURATED]
    for giver in slack:
        if roles.count(roles[giver]) > 1:
            yield with_other_role(found.arrangement, giver)
    pairs = [(g, t) for g in slack for t in saturated if graph.zones[groups[g][0]] == graph.zones[groups[t][0]]]
    for giver, taker in pairs:
        if len(groups[giver]) > 1:
            for gpu in _one_of_each_kind(graph, groups[giver]):
                yield _exchanged(found.arrangement, giver, (gpu,), taker, ())
    for giver, taker in pairs:
        for gpu in _one_of_each_kind(graph, groups[giver]):
            for other_gpu in _one_of_each_kind(graph, groups[taker]):
                if graph.kind(gpu) != graph.kind(other_gpu):
                    yield _exchanged(found.arrangement, giver, (gpu,), taker, (other_gpu,))


def with_other_role(arrangement: Arrangement, group: int) -> Arrangement:
    """Return the arrangement with one group on the other side."""
    roles = arrangement.roles
    other = Role.DECODE if roles[group] is Role.PREFILL else Role.PREFILL
    return replace(arrangement, roles=(*roles[:group], other, *roles[group + 1 :]))


def _one_of_each_kind(graph: FleetGraph, gpus: Sequence[int]) -> list[int]:
    return list({graph.kind(gpu): gpu for gpu in gpus}.values())


def _exchanged(
    arrangement: Arrangement, giver: int, given: tuple[int, ...], taker: int, taken: tuple[int, ...]
) -> Arrangement:
    groups = list(arrangement.groups)
    groups[giver] = tuple(sorted({*groups[giver], *taken} - {*given}))
    groups[taker] = tuple(sorted({*groups[taker], *given} - {*taken}))
    return replace(arrangement, groups=tuple(groups))
