"""Explicit links between nodes: a replica pays for those among its own nodes only, and the search knows it."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hetis.solver import node_links
from hetis.solver.check import check_plan
from hetis.solver.cluster import Link, Network
from hetis.solver.constraints import Exclude, Selection, Unit
from hetis.solver.engine_rules import EngineRules, Family
from hetis.solver.errors import InvalidProblemError, NoPlanFoundError
from hetis.solver.node_links import NodeLinks, node_links_of
from hetis.solver.placement.constrained_problem import apply_constraints
from hetis.solver.placement.families import STRATEGIES
from hetis.solver.placement.fleet import MOST_PARTS
from hetis.solver.placement.replicas.tabulation import build_cost_tables
from hetis.solver.plan import ObjectiveKind, Plan, Role, Status
from hetis.solver.planning import solve_placement
from hetis.solver.problem import OWN_LINKS, QUICK_LINKS, PlacementProblem
from tests.solver.instances import SMALL_FAMILY, make_node, make_problem, make_profile, problems
from tests.solver.oracle import best_plan_value
from tests.solver.searching import plan_or_none

FAST, SLOW, SLOWER = (Link(bytes_per_s=b, latency_s=s) for b, s in ((5e8, 1e-5), (1e7, 1e-4), (1e6, 1e-2)))
UNIFIED = replace(SMALL_FAMILY, roles=(Role.UNIFIED,))
EXAMPLES = settings().max_examples


def problem_of(num_nodes: int, links: dict[tuple[str, str], Link], gpus: int = 1) -> PlacementProblem:
    """Nodes of A, of which two cards hold the model."""
    profiles = {"A": make_profile("A", usable_bytes=6_000_000)}
    network = Network(default=FAST, between_nodes=links)
    nodes = [make_node("a", "A", nodes=num_nodes, gpus=gpus)]
    return make_problem(nodes, profiles=profiles, network=network, family=UNIFIED)


def value_of(problem: PlacementProblem) -> float:
    return plan_of(problem).result.value


def plan_of(problem: PlacementProblem) -> Plan:
    plan = solve_placement(problem, strategy="hetis", gap_target=0.0)
    assert check_plan(plan, problem) == ()
    assert plan.result.status is Status.OPTIMAL
    return plan


def nodes_of(plan: Plan) -> list[set[str]]:
    return [{name.partition("/")[0] for name in replica.devices()} for replica in plan.replicas]


def test_a_replica_avoids_the_one_slow_pair() -> None:
    slow = problem_of(3, {("a-0", "a-1"): SLOWER})
    assert value_of(slow) == pytest.approx(value_of(problem_of(2, {})))
    assert {"a-0", "a-1"} not in nodes_of(plan_of(slow))
    assert value_of(problem_of(2, {("a-0", "a-1"): SLOWER})) < 0.5 * value_of(slow)


def test_links_of_excluded_nodes_do_not_count() -> None:
    links = {(f"a-{i}", "a-3"): SLOWER for i in range(3)}
    out = Exclude(gpus=Selection(unit=Unit.NODE, name="a-3"))
    problem = replace(problem_of(4, links), constraints=(out,))
    assert value_of(problem) == pytest.approx(value_of(problem_of(3, {})))
    assert OWN_LINKS not in problem.describe_family()
    assert OWN_LINKS in problem_of(4, links).describe_family()


def test_links_as_fast_as_the_network_change_nothing() -> None:
    problem = problem_of(3, {("a-0", "a-1"): FAST})
    assert node_links_of(problem.cluster) == NodeLinks(block_of={}, between={}, sets=(frozenset({0}),))
    assert plan_of(problem).replicas == plan_of(problem_of(3, {})).replicas
    assert problem.describe_family() == problem_of(3, {}).describe_family()


def test_racks_are_blocks() -> None:
    """Nodes with the same links to all others form one block, so two racks make three sets."""
    pairs = {(f"a-{i}", f"a-{j}"): SLOW for i in range(3) for j in range(3, 6)}
    links = node_links_of(problem_of(7, pairs).cluster)
    assert links.block_of == {"a-0": 1, "a-1": 1, "a-2": 1, "a-3": 2, "a-4": 2, "a-5": 2}
    assert links.between == {(1, 2): SLOW, (2, 1): SLOW}
    assert links.sets == (frozenset({0, 1}), frozenset({0, 2}), frozenset({0, 1, 2}))


def test_nodes_with_a_slow_link_to_each_other_are_in_no_common_block() -> None:
    links = node_links_of(problem_of(3, {("a-0", "a-1"): SLOW}).cluster)
    assert links.block_of == {"a-0": 1, "a-1": 2}


def measured(num_nodes: int, seed: int) -> dict[tuple[str, str], Link]:
    """Every link of a fleet as if measured: all a little slower than the network, and each in its own way."""
    draw = random.Random(seed)
    return {
        (f"a-{i}", f"a-{j}"): Link(bytes_per_s=draw.uniform(3.6e8, 4.8e8), latency_s=draw.uniform(1.1e-5, 1.9e-5))
        for i in range(num_nodes)
        for j in range(i + 1, num_nodes)
    }


@pytest.mark.parametrize("num_nodes", [5, 9, 40])
def test_a_bad_link_among_many_measured_ones_is_avoided(num_nodes: int) -> None:
    links = measured(num_nodes, num_nodes) | {("a-0", "a-1"): SLOWER}
    found = node_links_of(problem_of(num_nodes, links).cluster)
    assert found.quick is not None
    assert len(found.sets) <= node_links.MOST_SETS
    assert found.block_of["a-0"] != found.block_of["a-1"]
    assert SLOWER in found.between.values()


def test_a_plan_says_that_quick_links_count_as_the_slowest_of_them() -> None:
    problem = problem_of(5, measured(5, 5) | {("a-0", "a-1"): SLOWER})
    found, plan = node_links_of(problem.cluster), plan_of(problem)
    assert QUICK_LINKS in plan.family
    without = {(f"a-{i}", f"a-{j}"): found.quick or FAST for i in range(4) for j in range(i + 1, 4)}
    assert plan.result.value >= value_of(problem_of(4, without)) * (1 - 1e-9)


@given(num_nodes=st.integers(2, 30), seed=st.integers(0, 99), share=st.floats(0.0, 1.0))
def test_blocks_and_sets_are_few_and_charge_no_link_too_little(num_nodes: int, seed: int, share: float) -> None:
    draw = random.Random(seed)
    links = {pair: link for pair, link in measured(num_nodes, seed).items() if draw.random() < share}
    links |= {pair: draw.choice((SLOW, SLOWER)) for pair in links if draw.random() < 0.1}
    found = node_links_of(problem_of(num_nodes, links).cluster)
    assert len(found.sets) <= node_links.MOST_SETS
    for (a, b), link in links.items():
        blocks = found.block_of[a], found.block_of[b]
        assert found.between[blocks].slower_of(link) == found.between[blocks]
        assert any(set(blocks) <= some for some in found.sets)


@pytest.mark.parametrize("strategy", ["hetis-paper", "hexgen-paper"])
def test_published_heuristics_pay_for_the_slowest_link_of_their_nodes(strategy: str) -> None:
    problem = problem_of(4, {("a-0", "a-1"): SLOWER, ("a-2", "a-3"): SLOW})
    problem = replace(problem, family=STRATEGIES[strategy].restrict(problem.family))
    assert check_plan(solve_placement(problem, strategy=strategy), problem) == ()


@st.composite
def linked_problems(draw: st.DrawFn, max_gpus: int, family: Family = UNIFIED) -> PlacementProblem:
    """Draw tiny problems with explicit links of any speed among up to three nodes."""
    problem = draw(problems(max_gpus=max_gpus, kinds=tuple(ObjectiveKind), family=family))
    groups = problem.cluster.node_groups
    names = [group.node_name(i) for group in groups for i in range(group.count)][:3]
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    bandwidths, latencies = st.sampled_from((1e6, 2e7, 1e8, 1e9)), st.sampled_from((1e-5, 1e-4, 1e-3))
    links = st.none() | st.builds(Link, bytes_per_s=bandwidths, latency_s=latencies)
    between = {pair: link for pair in pairs if (link := draw(links)) is not None}
    wide = Link(bytes_per_s=1e12, latency_s=1e-4)  # the oracle knows no shares of links between zones
    network = replace(problem.cluster.network, zone_default=wide, between_nodes=between)
    return replace(problem, cluster=replace(problem.cluster, network=network))


@settings(max_examples=EXAMPLES)
@given(linked_problems(4))
def test_the_optimum_is_that_of_brute_force(problem: PlacementProblem) -> None:
    check_against_brute_force(problem)


def check_against_brute_force(problem: PlacementProblem) -> None:
    best = best_plan_value(problem)
    plan = plan_or_none(problem, strategy="hetis")
    if plan is None:
        assert best in (0.0, float("inf"))
        return
    # A stage may be charged less than the search charges it, since that charges its whole part of the fleet.
    assert list(check_plan(plan, problem)) == []
    assert plan.result.value == pytest.approx(best, rel=1e-6)


@settings(max_examples=EXAMPLES)
@given(
    problem=linked_problems(6, replace(SMALL_FAMILY, roles=(Role.PREFILL, Role.DECODE))),
    strategy=st.sampled_from(("hetis", "hexgen2", "splitwise", "splitwise-paper", "hexgen2-paper")),
)
def test_kv_of_plans_is_charged_no_faster_link_than_it_has(problem: PlacementProblem, strategy: str) -> None:
    problem = replace(problem, family=STRATEGIES[strategy].restrict(problem.family))
    try:
        plan = plan_or_none(problem, strategy)
    except (InvalidProblemError, NoPlanFoundError):
        return
    assert plan is None or list(check_plan(plan, problem)) == []


APART = replace(SMALL_FAMILY, roles=(Role.PREFILL, Role.DECODE))
FEW = replace(APART, max_pool=1, micro_batches=(1, 8))


def apart(num_nodes: int, links: dict[tuple[str, str], Link], gpus: int = 2) -> PlacementProblem:
    return replace(problem_of(num_nodes, links, gpus), family=APART)


def test_kv_is_not_charged_a_slow_link_that_it_does_not_use() -> None:
    """Two nodes that are quickly connected hand over KV at their own link, whatever other nodes there are."""
    alone, beside = value_of(apart(2, {})), plan_of(apart(3, {("a-0", "a-1"): SLOWER}))
    assert beside.result.value == pytest.approx(alone)
    assert all({"a-0", "a-1"} != set().union(*nodes) for nodes in exchanging(beside))
    assert value_of(apart(2, {("a-0", "a-1"): SLOWER})) < 0.5 * alone


def exchanging(plan: Plan) -> list[list[set[str]]]:
    """Return the nodes of the two replicas of every route of KV."""
    nodes = nodes_of(plan)
    return [[nodes[route.prefill], nodes[route.decode]] for route in plan.kv_routes]


@settings(max_examples=EXAMPLES)
@given(linked_problems(4, FEW))
def test_with_roles_apart_the_optimum_is_that_of_brute_force(problem: PlacementProblem) -> None:
    check_against_brute_force(problem)


@settings(max_examples=EXAMPLES)
@given(problem=linked_problems(4, FEW), of=st.sampled_from("AB"))
def test_a_node_behind_slow_links_takes_nothing_from_others(problem: PlacementProblem, of: str) -> None:
    """It is slower connected than all other nodes, so what these exchange inside their zone does not depend on it."""
    groups = tuple(replace(group, zone="default") for group in problem.cluster.node_groups)
    cluster = replace(problem.cluster, node_groups=groups)
    problem = replace(problem, cluster=cluster)
    gpu = of if of in cluster.gpu_types else next(iter(cluster.gpu_types))
    slowest = Link(bytes_per_s=1e5, latency_s=1e-2)
    nodes = [group.node_name(i) for group in cluster.node_groups for i in range(group.count)]
    added = make_node("slow", gpu)
    network = replace(
        cluster.network, between_nodes={**cluster.network.between_nodes, **{(node, "slow"): slowest for node in nodes}}
    )
    more = replace(problem, cluster=replace(cluster, node_groups=(*cluster.node_groups, added), network=network))
    alone = plan_or_none(problem)
    if alone is None:
        return
    before, after = alone.result.value, solve_placement(more, strategy="hetis").result.value
    sign = 1.0 if problem.objective.maximises else -1.0
    assert sign * after >= sign * before - 1e-6 * before


def tiers(num_nodes: int) -> dict[tuple[str, str], Link]:
    """Return links of which each node has slower ones than the one before."""
    bandwidths = {j: Link(bytes_per_s=4e8 / 2**j, latency_s=1e-4) for j in range(num_nodes)}
    return {(f"a-{i}", f"a-{j}"): bandwidths[j] for j in range(num_nodes) for i in range(j)}


@pytest.mark.parametrize(("num_nodes", "most"), [(7, MOST_PARTS), (4, 6)])
def test_sets_that_are_too_many_are_left_out_and_counted(
    num_nodes: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hetis.solver.placement.fleet.MOST_PARTS", most)
    problem = apart(num_nodes, tiers(num_nodes))
    costs = build_cost_tables(apply_constraints(problem))
    parts = [scope.part for scope in costs.scopes if scope.place.blocks is not None]
    assert 0 < len(parts) <= most
    assert costs.routes.num_left_out > 0
    if num_nodes == 4:  # the search among 7 nodes takes long
        assert f"{costs.routes.num_left_out} sets of nodes were not searched" in plan_of(problem).notes[-1]
    few = build_cost_tables(apply_constraints(apart(3, {("a-0", "a-1"): SLOWER})))
    assert (few.routes.num_left_out, len(few.routes.beside)) == (0, 2)


def test_without_slow_links_or_with_unified_replicas_there_are_only_whole_zones() -> None:
    for problem in (apart(3, {}), apart(3, {("a-0", "a-1"): FAST}), problem_of(3, {("a-0", "a-1"): SLOWER})):
        costs = build_cost_tables(apply_constraints(problem))
        assert costs.routes.beside == ()
        assert all(scope.place.blocks is None for scope in costs.scopes)


LINKED_ENGINE = replace(
    FEW, max_pool=0, attention_dp=(), in_flight=(1, 2), engine=EngineRules(name="vllm", max_stages=2)
)


@settings(max_examples=EXAMPLES)
@given(problem=linked_problems(4, LINKED_ENGINE), has_vendors=st.booleans())
def test_an_engines_optimum_with_roles_apart_is_that_of_brute_force(
    problem: PlacementProblem, has_vendors: bool
) -> None:
    assume(not problem.model.forbidden_cuts)
    if has_vendors:  # of which each has places of its own
        types = {
            name: replace(gpu, vendor="AMD" if name == "A" else "") for name, gpu in problem.cluster.gpu_types.items()
        }
        problem = replace(problem, cluster=replace(problem.cluster, gpu_types=types))
    best = best_plan_value(problem)
    plan = plan_or_none(problem, strategy="hetis", gap_target=0.0)
    if plan is None:
        assert best in (0.0, float("inf"))
        return
    assert list(check_plan(plan, problem)) == []
    assert plan.result.status is Status.OPTIMAL
    assert plan.result.value == pytest.approx(best, rel=1e-6)
