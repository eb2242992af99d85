"""Guided swaps: from groups with slack to saturated ones, every GPU stays in one group, and the flow only rises."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hetis.solver.budget import Budget, silent
from hetis.solver.cluster import Link
from hetis.solver.cluster import Network as Links
from hetis.solver.placement.families import STRATEGIES
from hetis.solver.placement.replicas.tabulation import build_cost_tables
from hetis.solver.plan import Role
from hetis.solver.published.heuristic import Search
from hetis.solver.published.hexgen2 import SATURATED, Arrangement, FlowNetwork, proposals
from hetis.solver.published.replicas import FleetGpus, ReplicaSearch
from tests.solver.instances import make_node, make_problem, make_profile, make_workload

ALL = set(range(6))
# Vertices 0 to 2 are weak cards, 3 to 5 strong ones; prompts are long: one weak card cannot prefill for all.
UNBALANCED = Arrangement(((0,), (1, 2, 3, 4, 5)), (Role.PREFILL, Role.DECODE))


@pytest.fixture(scope="module")
def network() -> FlowNetwork:
    weak, strong = make_profile("A", flops=5e11), make_profile("B", flops=8e12)
    nodes = [make_node("weak", "A", gpus=3), make_node("strong", "B", gpus=3)]
    fast = Links(default=Link(bytes_per_s=1e11, latency_s=1e-6))
    problem = make_problem(nodes, profiles={"A": weak, "B": strong}, network=fast, workload=make_workload((800, 10)))
    costs = build_cost_tables(replace(problem, family=STRATEGIES["hexgen2-paper"].restrict(problem.family)))
    gpus = FleetGpus.of(problem.cluster, costs.classes, [1.0, 1.0])
    return FlowNetwork(Search(costs, gpus, ReplicaSearch(costs), Budget(), silent, 0), sends_afar=False)


def test_a_bottleneck_gets_gpus_until_none_helps(network: FlowNetwork) -> None:
    start = network.evaluated(UNBALANCED)
    assert start.loads[0] >= SATURATED
    assert start.loads[1] < SATURATED
    found = network.improved(start)
    assert found.rate > 1.2 * start.rate
    assert {gpu for group in found.arrangement.groups for gpu in group} == ALL
    assert sum(len(group) for group in found.arrangement.groups) == len(ALL)
    for proposal in proposals(network.search.gpus, found, np.random.default_rng(0)):
        assert network.evaluated(proposal).rate <= found.rate * (1 + 1e-9)


def test_proposals_move_gpus_from_slack_to_saturated_groups_only(network: FlowNetwork) -> None:
    start = network.evaluated(UNBALANCED)
    for proposal in proposals(network.search.gpus, start, np.random.default_rng(0)):
        assert {gpu for group in proposal.groups for gpu in group} == ALL
        assert len(proposal.groups[0]) >= len(UNBALANCED.groups[0])
        assert proposal.roles == UNBALANCED.roles  # either side keeps a group


def test_a_third_group_may_change_sides(network: FlowNetwork) -> None:
    three = Arrangement(((0,), (1, 2), (3, 4, 5)), (Role.PREFILL, Role.DECODE, Role.DECODE))
    start = network.evaluated(three)
    changed = [
        p.roles for p in proposals(network.search.gpus, start, np.random.default_rng(0)) if p.roles != three.roles
    ]
    assert changed
    assert all(Role.PREFILL in roles and Role.DECODE in roles for roles in changed)


def test_a_group_without_a_replica_counts_as_saturated(network: FlowNetwork) -> None:
    none_fits = FlowNetwork(network.search, False, NoReplicas(network.search.costs))
    assert none_fits.evaluated(UNBALANCED).loads == (1.0, 1.0)


class NoReplicas(ReplicaSearch):
    def best_replica(self, group: object, duty: object) -> None:
        return None


def test_a_spent_budget_ends_the_swaps(network: FlowNetwork) -> None:
    start, budget = network.evaluated(UNBALANCED), Budget()
    budget.cancelled.set()
    assert FlowNetwork(replace(network.search, budget=budget), False).improved(start) == start
