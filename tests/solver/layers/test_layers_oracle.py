"""On tiny fleets every placement and, in steps, every routing is tried: none beats the plan or the bound."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from hetis.solver.layers.plan import PlacedNode, judge
from hetis.solver.layers.problem import LayersProblem, Links, NodeType, TimeTable
from hetis.solver.layers.solve import solve_layers
from tests.solver.layers.instances import links_of, paths, problems, ranges, splits

STEPS = 4  # steps of a path's share
MOST_PATHS = 5
CLOSE = 2e-3  # ratio by which the search may miss the best


def best_by_enumeration(problem: LayersProblem) -> float:
    """Return the best rate over all ranges and all ways to split requests among paths in quarters."""
    best = 0.0
    for nodes in ranges(problem):
        routes = paths(problem, nodes)[:MOST_PATHS]
        for shares in splits(len(routes), STEPS) if routes else ():
            used = [(path, share) for path, share in zip(routes, shares, strict=True) if share > 0]
            names = {node.name for path, _ in used for node in path}
            passed = tuple(node for node in nodes if node.name in names)
            best = max(best, judge(problem, passed, links_of(used)).rate_rps)
    return best


@settings(max_examples=8)
@given(problems(max_nodes=3, max_layers=3))
def test_no_placement_is_better_than_the_plan_or_its_bound(problem: LayersProblem) -> None:
    best = best_by_enumeration(problem)
    plan = solve_layers(problem)
    assert best <= plan.bound_rps * (1 + 1e-9)
    assert best * (1 - CLOSE) <= plan.rate_rps <= plan.bound_rps * (1 + 1e-9)


@settings(max_examples=3)
@given(problems(max_nodes=4, max_layers=2))
def test_nor_is_any_of_four_nodes(problem: LayersProblem) -> None:
    best = best_by_enumeration(problem)
    plan = solve_layers(problem)
    assert best <= plan.bound_rps * (1 + 1e-9)
    assert best * (1 - CLOSE) <= plan.rate_rps


def test_the_bound_is_reached_where_one_node_does_all() -> None:
    """One request is in flight for 100 KV tokens: 60 of the prompt, twice 20 of outputs.

    Its round trip: (d(1) / 2 + d(N / 2) + (1 + N / 2) p / O) = 5 + 10 + (1 + 1) * 40 / 20 = 19 ms for N = 2.
    """
    table = TimeTable(sizes=(1.0, 2.0), seconds=(0.01, 0.011))
    kind = NodeType(
        name="A",
        count=1,
        tokens_per_s=(1e6,),
        kv_token_layers=(200.0,),
        prompt=TimeTable(sizes=(60.0,), seconds=(0.04,)),
        decode=table,
    )
    problem = LayersProblem(
        name="one",
        num_layers=1,
        node_types=(kind,),
        mean_prompt_tokens=60,
        mean_output_tokens=20,
        links=Links(bandwidth=1e9, latency_s=0.0, activation_bytes=1000),
    )
    plan = solve_layers(problem)
    assert plan.judgement.in_flight == pytest.approx(2)
    assert plan.judgement.round_trip_s == pytest.approx(0.019)
    assert plan.rate_rps == pytest.approx(2 / (20 * 0.019))
    assert plan.gap < 1e-3


def test_a_helper_that_runs_only_the_first_layer_pays() -> None:
    """A has room for 4,000 KV entries, B, which is fast, for 400 of one layer: too few for a stage of its own.

    With A[0,3) alone 4000 / 3 KV tokens per layer are in flight, with B[0,1) before it for some requests 4400 / 3.
    """
    slow = TimeTable(sizes=(1.0, 100.0), seconds=(1e-3, 1.1e-3))
    fast = TimeTable(sizes=(1.0, 100.0), seconds=(1e-5, 1.1e-5))
    kinds = (
        NodeType(name="A", count=1, tokens_per_s=(1e6,) * 3, kv_token_layers=(4e3,) * 3, prompt=slow, decode=slow),
        NodeType(name="B", count=1, tokens_per_s=(1e6,), kv_token_layers=(400.0,), prompt=fast, decode=fast),
    )
    problem = LayersProblem(
        name="helper",
        num_layers=3,
        node_types=kinds,
        mean_prompt_tokens=50,
        mean_output_tokens=50,
        links=Links(bandwidth=1e12, latency_s=0.0, activation_bytes=1),
    )
    a = PlacedNode(name="A-0", kind="A", first_layer=0, num_layers=3)
    alone = judge(problem, (a,), links_of([((a,), 1.0)]))
    plan = solve_layers(problem)
    loads = {load.node.name: load for load in plan.judgement.loads}
    assert plan.judgement.in_flight == pytest.approx(alone.in_flight * 1.1, rel=1e-3)
    assert plan.rate_rps > 1.05 * alone.rate_rps
    assert 0 < loads["B-0"].visits < 1
    assert loads["A-0"].layer_share[0] < loads["A-0"].layer_share[1] == pytest.approx(1)


def unlike(kinds: tuple[NodeType, ...], num_layers: int, prompt: float, output: float, links: Links) -> LayersProblem:
    return LayersProblem(
        name="unlike",
        num_layers=num_layers,
        node_types=kinds,
        mean_prompt_tokens=prompt,
        mean_output_tokens=output,
        links=links,
    )


def test_nodes_that_slow_everybody_down_stay_idle() -> None:
    """One request on a B in the stage is slower than twenty on each A: moving one of the four nodes is not enough."""
    slow = TimeTable(sizes=(0.0, 8.0, 300.0), seconds=(0.0434, 0.0459, 0.0472))
    kinds = (
        NodeType(name="A", count=2, tokens_per_s=(2323.0,), kv_token_layers=(5710.0,)),
        NodeType(
            name="B",
            count=2,
            tokens_per_s=(2398.0,),
            kv_token_layers=(4137.0,),
            prompt=TimeTable(sizes=(100.0, 1000.0), seconds=(0.0024, 0.2)),
            decode=slow,
        ),
    )
    problem = unlike(kinds, 1, 1.0, 250.0, Links(bandwidth=2.44e7, latency_s=1e-3, activation_bytes=16384))
    plan = solve_layers(problem)
    assert {node.kind for node in plan.nodes} == {"A"}
    assert best_by_enumeration(problem) == pytest.approx(plan.rate_rps)


def test_few_requests_are_left_to_slow_nodes_with_much_room() -> None:
    """B has twenty times the room, and gets a quarter of the requests."""
    kinds = (
        NodeType(
            name="A",
            count=2,
            tokens_per_s=(1276.0,),
            kv_token_layers=(2255.0,),
            prompt=TimeTable(sizes=(100.0, 1000.0), seconds=(0.0145, 0.2)),
            decode=TimeTable(sizes=(0.0,), seconds=(0.00265,)),
        ),
        NodeType(name="B", count=2, tokens_per_s=(710.0, 208.0), kv_token_layers=(40877.0, 45417.0)),
    )
    problem = unlike(kinds, 2, 900.0, 30.0, Links(bandwidth=3.35e6, latency_s=1e-3, activation_bytes=0))
    plan = solve_layers(problem)
    visits = {load.node.name: load.visits for load in plan.judgement.loads}
    assert best_by_enumeration(problem) <= plan.rate_rps
    assert visits["A-0"] == pytest.approx(visits["A-1"], rel=1e-3)
    assert 0.7 < visits["A-0"] < 0.8


def test_a_node_with_a_hundredth_of_the_room_takes_half_of_the_requests() -> None:
    """A weight by KV room alone would leave the node idle, and eight times that would cut the chain between the two."""
    kinds = (
        NodeType(name="A", count=1, tokens_per_s=(642.0, 450.0, 202.0, 160.0), kv_token_layers=(575, 1521, 779, 1476)),
        NodeType(
            name="B",
            count=1,
            tokens_per_s=(264.0, 121.0, 68.7, 65.3),
            kv_token_layers=(95178, 131802, 151632, 157325),
            prompt=TimeTable(sizes=(100.0, 1000.0), seconds=(0.0782, 0.2)),
            decode=TimeTable(sizes=(2.0, 4.0, 64.0), seconds=(0.00258, 0.00469, 0.0435)),
        ),
    )
    problem = unlike(kinds, 4, 1.0, 250.0, Links(bandwidth=2.09e9, latency_s=1e-3, activation_bytes=16384))
    plan = solve_layers(problem)
    assert best_by_enumeration(problem) <= plan.rate_rps
    assert all(load.node.num_layers == 4 and 0.4 < load.visits < 0.6 for load in plan.judgement.loads)
