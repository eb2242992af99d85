"""Guided swaps: from groups with slack to saturated ones, every GPU in one group still, and the flow only rises."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hetis.solver.budget import Budget, silent
from hetis.solver.cluster import Link, Network
from hetis.solver.placement.strategies import STRATEGIES
from hetis.solver.placement.tabulation import build_atlas
from hetis.solver.plan import Role
from hetis.solver.published import swaps
from hetis.solver.published.graph import fleet_graph
from hetis.solver.published.parallelism import ReplicaSearch
from hetis.solver.published.pipelines import duty_of
from hetis.solver.published.swaps import SATURATED, Arrangement, improved, proposals
from tests.solver.instances import make_node, make_problem, make_profile, make_workload

ALL = set(range(6))
# Vertices 0 to 2 are weak cards, 3 to 5 strong ones; prompts are long: one weak card cannot prefill for all.
UNBALANCED = Arrangement(((0,), (1, 2, 3, 4, 5)), (Role.PREFILL, Role.DECODE))


@pytest.fixture(scope="module")
def network() -> swaps.SwapNetwork:
    weak, strong = make_profile("A", flops=5e11), make_profile("B", flops=8e12)
    nodes = [make_node("weak", "A", gpus=3), make_node("strong", "B", gpus=3)]
    fast = Network(default=Link(bytes_per_s=1e11, latency_s=1e-6))
    problem = make_problem(nodes, profiles={"A": weak, "B": strong}, network=fast, workload=make_workload((800, 10)))
    atlas = build_atlas(replace(problem, family=STRATEGIES["hexgen2-paper"].restrict(problem.family)))
    return swaps.SwapNetwork(
        graph=fleet_graph(problem.cluster, atlas.classes, [1.0, 1.0]),
        search=ReplicaSearch(atlas),
        duties={(role, "default"): duty_of(atlas, role, "default") for role in (Role.PREFILL, Role.DECODE)},
        link_rates={},
        sends_afar=False,
    )


def test_a_bottleneck_gets_gpus_until_none_helps(network: swaps.SwapNetwork) -> None:
    start = network.evaluated(UNBALANCED)
    assert start.loads()[0] >= SATURATED
    assert start.loads()[1] < SATURATED
    found = improved(network, start, budget=Budget(), seed=0, report=silent)
    assert found.flow.value > 1.2 * start.flow.value
    assert {gpu for group in found.arrangement.groups for gpu in group} == ALL
    assert sum(len(group) for group in found.arrangement.groups) == len(ALL)
    for proposal in proposals(network.graph, found, np.random.default_rng(0)):
        assert network.evaluated(proposal).flow.value <= found.flow.value * (1 + 1e-9)


def test_proposals_move_gpus_from_slack_to_saturated_groups_only(network: swaps.SwapNetwork) -> None:
    start = network.evaluated(UNBALANCED)
    for proposal in proposals(network.graph, start, np.random.default_rng(0)):
        assert {gpu for group in proposal.groups for gpu in group} == ALL
        assert len(proposal.groups[0]) >= len(UNBALANCED.groups[0])
        assert proposal.roles == UNBALANCED.roles  # either side keeps a group


def test_a_third_group_may_change_sides(network: swaps.SwapNetwork) -> None:
    three = Arrangement(((0,), (1, 2), (3, 4, 5)), (Role.PREFILL, Role.DECODE, Role.DECODE))
    start = network.evaluated(three)
    changed = [p.roles for p in proposals(network.graph, start, np.random.default_rng(0)) if p.roles != three.roles]
    assert changed
    assert all(Role.PREFILL in roles and Role.DECODE in roles for roles in changed)


def test_a_group_without_a_replica_counts_as_saturated(network: swaps.SwapNetwork) -> None:
    none_fits = replace(network.evaluated(UNBALANCED), replicas=(None, None))
    assert none_fits.loads() == [1.0, 1.0]


def test_a_spent_budget_ends_the_swaps(network: swaps.SwapNetwork) -> None:
    start = network.evaluated(UNBALANCED)
    budget = Budget()
    budget.cancelled.set()
    assert improved(network, start, budget=budget, seed=0, report=silent) == start
