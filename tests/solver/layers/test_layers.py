"""Plans of layers: their promises hold, the bound behaves, and the checker detects wrong ones."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetis.formats.documents import load_layers_problem
from hetis.solver.budget import Budget, Progress
from hetis.solver.errors import InfeasibleError, InvalidProblemError
from hetis.solver.layers import solve
from hetis.solver.layers.annealing import LayerPlacement, new_sweep, rate_of, tabulate
from hetis.solver.layers.bound import rate_bound
from hetis.solver.layers.check import check_layers_plan
from hetis.solver.layers.plan import LayersPlan, LinkShare, PricedInterval, judge
from hetis.solver.layers.problem import LayersProblem, NodeType, TimeTable
from hetis.solver.layers.solve import named, solve_layers, solve_max_flow
from tests.solver.layers.instances import problems

LOOSE = 0.02  # the bound halves intervals down to about this precision
EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.fixture(scope="module")
def example() -> LayersProblem:
    return load_layers_problem(EXAMPLES / "layers-24.yaml")


@pytest.fixture(scope="module")
def plan(example: LayersProblem) -> LayersPlan:
    return solve_layers(example)


@settings(max_examples=15)
@given(problems(max_nodes=6, max_layers=8), st.integers(0, 2**32 - 1))
def test_the_compiled_rate_is_that_of_the_docs(problem: LayersProblem, seed: int) -> None:
    tables, dice = tabulate(problem), random.Random(seed)
    kind = np.repeat(np.arange(len(problem.node_types)), [one.count for one in problem.node_types])
    held = np.array([dice.randint(0, problem.most_layers(problem.node_types[t])) for t in kind])
    first = np.array([dice.randint(0, problem.num_layers - k) for k in held])
    placement = LayerPlacement(first, held, np.array([dice.uniform(0.2, 5) for _ in kind]))
    sweep = new_sweep(len(kind), problem.num_layers)
    rate = rate_of(placement, tables, False, sweep)
    covered = set(range(problem.num_layers)) <= {
        layer for begin, k in zip(first, held, strict=True) for layer in range(begin, begin + k)
    }
    if not covered:
        assert rate == 0
        return
    nodes, links, idle = named(problem, placement, tables, sweep)
    judgement = judge(problem, nodes, links)
    assert judgement.rate_rps == pytest.approx(rate, rel=1e-9)
    assert len(nodes) + len(idle) == problem.num_nodes
    flow = rate_of(placement, tables, True, sweep)
    by_flow = named(problem, placement, tables, sweep, flow_only=True)
    assert judge(problem, *by_flow[:2]).flow_rps == pytest.approx(flow, rel=1e-9)
    bound = rate_bound(tables, served=rate)
    assert rate <= bound.rate_rps * (1 + 1e-9)
    proof = LayersPlan(nodes=nodes, links=links, judgement=judgement, bound=bound, idle=idle)
    assert check_layers_plan(problem, proof) == ()


@settings(max_examples=20)
@given(problems(max_nodes=6, max_layers=8), st.integers(0, 2**32 - 1))
def test_requests_are_mixed_at_every_layer_and_fewest_links_are_worth_the_same(
    problem: LayersProblem, seed: int
) -> None:
    tables, dice = tabulate(problem), random.Random(seed)
    kind = np.repeat(np.arange(len(problem.node_types)), [one.count for one in problem.node_types])
    held = np.array([problem.most_layers(problem.node_types[t]) for t in kind])
    first = np.array([dice.randint(0, problem.num_layers - k) for k in held])
    placement = LayerPlacement(first, held, np.array([dice.uniform(0.2, 5) for _ in kind]))
    sweep = new_sweep(len(kind), problem.num_layers)
    if rate_of(placement, tables, False, sweep) == 0:
        return
    nodes, links, _ = named(problem, placement, tables, sweep)
    ends: dict[str | None, int] = {node.name: node.end_layer for node in nodes}
    carried = {(link.source, link.target): link.share for link in links}
    assert len(carried) == len(links)
    for (source, target), share in carried.items():
        at = ends.get(source, 0)
        left = sum(flow for (name, _), flow in carried.items() if name == source)
        entered = sum(flow for (name, to), flow in carried.items() if to == target and ends.get(name, 0) == at)
        passed = sum(flow for (name, _), flow in carried.items() if ends.get(name, 0) == at)
        assert share == pytest.approx(left * entered / passed, rel=1e-6)
    with mock.patch.object(solve, "MOST_MIXED", 0):
        _, fewest, _ = named(problem, placement, tables, sweep)
    assert len(fewest) <= len(links)
    assert judge(problem, nodes, fewest).rate_rps == pytest.approx(judge(problem, nodes, links).rate_rps, rel=1e-6)


@settings(max_examples=6)
@given(problems(max_nodes=5, max_layers=6))
def test_every_plan_passes_the_checker_and_is_not_above_its_bound(problem: LayersProblem) -> None:
    plan = solve_layers(problem)
    assert check_layers_plan(problem, plan) == ()
    assert 0 < plan.rate_rps <= plan.bound_rps * (1 + 1e-9)


def slower(problem: LayersProblem, factor: float) -> LayersProblem:
    """Return the problem with ``factor`` times as long times."""

    def table(one: TimeTable | None) -> TimeTable | None:
        return None if one is None else replace(one, seconds=tuple(factor * seconds for seconds in one.seconds))

    def kind(one: NodeType) -> NodeType:
        rates = tuple(rate / factor for rate in one.tokens_per_s)
        return replace(one, tokens_per_s=rates, prompt=table(one.prompt), decode=table(one.decode))

    links = replace(
        problem.links, bandwidth=problem.links.bandwidth / factor, latency_s=factor * problem.links.latency_s
    )
    return replace(problem, node_types=tuple(kind(one) for one in problem.node_types), links=links)


def bound_of(problem: LayersProblem, served: float = 1e-9) -> float:
    return rate_bound(tabulate(problem), served=served).rate_rps


@settings(max_examples=3)
@given(problems(max_nodes=6, max_layers=8))
def test_the_bound_halves_when_all_times_double(problem: LayersProblem) -> None:
    assert bound_of(slower(problem, 2.0)) == pytest.approx(bound_of(problem) / 2, rel=LOOSE)


@settings(max_examples=3)
@given(problems(max_nodes=6, max_layers=8))
def test_the_bound_ignores_the_order_of_types(problem: LayersProblem) -> None:
    turned = replace(problem, node_types=problem.node_types[::-1])
    assert bound_of(turned) == pytest.approx(bound_of(problem), rel=LOOSE)


@settings(max_examples=3)
@given(problems(max_nodes=6, max_layers=8))
def test_the_bound_never_falls_with_more_memory(problem: LayersProblem) -> None:
    kinds = tuple(
        replace(kind, kv_token_layers=tuple(1.5 * room for room in kind.kv_token_layers)) for kind in problem.node_types
    )
    assert bound_of(replace(problem, node_types=kinds)) >= bound_of(problem) * (1 - LOOSE)


def test_the_search_is_the_same_for_the_same_seed(example: LayersProblem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solve, "MOVES_PER_NODE", 200)
    monkeypatch.setattr(solve, "FINAL_MOVES_PER_NODE", 200)
    assert solve_layers(example, seed=3) == solve_layers(example, seed=3)
    assert solve_layers(example, seed=3).nodes != solve_layers(example, seed=4).nodes


def test_24_nodes_are_placed_within_a_few_per_cent_of_the_bound(example: LayersProblem, plan: LayersPlan) -> None:
    assert plan.gap < 0.06
    assert check_layers_plan(example, plan) == ()


def test_most_flow_is_not_most_served(
    example: LayersProblem, plan: LayersPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(solve, "MOVES_PER_NODE", 2000)
    monkeypatch.setattr(solve, "FINAL_MOVES_PER_NODE", 2000)
    flow = solve_max_flow(example)
    assert flow.flow_rps > plan.flow_rps
    assert flow.rate_rps < 0.8 * plan.rate_rps


def test_more_nodes_serve_more(example: LayersProblem, plan: LayersPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solve, "MOVES_PER_NODE", 1000)
    monkeypatch.setattr(solve, "FINAL_MOVES_PER_NODE", 1000)
    kinds = tuple(replace(kind, count=2 * kind.count) for kind in example.node_types)
    assert solve_layers(replace(example, node_types=kinds)).rate_rps > 1.5 * plan.rate_rps


def test_nodes_that_cannot_hold_all_layers_are_told_apart(example: LayersProblem) -> None:
    few = replace(example, node_types=(replace(example.node_types[2], count=3),))
    most = 3 * len(example.node_types[2].tokens_per_s)
    with pytest.raises(InfeasibleError, match=f"the 3 nodes can hold {most} layers, the model has 80"):
        solve_layers(few)


def test_a_spent_budget_gives_what_there_is(example: LayersProblem) -> None:
    ticks = iter(range(10_000))
    news: list[Progress] = []
    budget = Budget(time_limit_s=3, clock=lambda: float(next(ticks)))
    plan = solve_layers(example, budget=budget, report=news.append)
    assert plan.stopped
    assert check_layers_plan(example, plan) == ()
    assert [progress.phase for progress in news][-1] == "bound"


def with_intervals(plan: LayersPlan, **changes: float) -> LayersPlan:
    """Return the plan with these changes in every interval of its proof."""
    intervals = tuple(replace(interval, **changes) for interval in plan.bound.intervals)
    return replace(plan, bound=replace(plan.bound, intervals=intervals))


TAMPERED: dict[str, tuple[Callable[[LayersPlan], LayersPlan], str]] = {
    "a better rate": (lambda p: replace(p, judgement=replace(p.judgement, rate_rps=2 * p.rate_rps)), "says that it"),
    "more in flight": (lambda p: replace(p, judgement=replace(p.judgement, in_flight=1e4)), "has in flight 10000"),
    "a lower bound": (lambda p: replace(p, bound=replace(p.bound, rate_rps=0.9 * p.rate_rps)), "more than its bound"),
    "a bound not proved": (lambda p: replace(p, bound=replace(p.bound, rate_rps=p.rate_rps * 1.001)), "may serve"),
    "no proof": (lambda p: replace(p, bound=replace(p.bound, intervals=())), "nothing is proved"),
    "a hole": (
        lambda p: replace(p, bound=replace(p.bound, intervals=p.bound.intervals[:5] + p.bound.intervals[6:])),
        "nothing is proved for",
    ),
    "no room claimed": (
        lambda p: replace(
            p, bound=replace(p.bound, intervals=(PricedInterval(least=0, most=1e9, price_s=float("inf")),))
        ),
        "may serve",
    ),
    "no bound": (lambda p: replace(p, bound=replace(p.bound, rate_rps=float("nan"))), "more than its bound nan"),
    "no rate": (lambda p: replace(p, judgement=replace(p.judgement, rate_rps=float("nan"))), "says that it serves nan"),
    "a bound beyond nothing": (lambda p: replace(p, bound=replace(p.bound, beyond_rps=float("nan"))), "beyond nan"),
    "intervals from nowhere": (lambda p: with_intervals(p, least=float("nan")), "nothing is proved for"),
    "no prices": (lambda p: with_intervals(p, price_s=float("nan")), "may serve nan"),
    "no nodes": (
        lambda p: replace(p, nodes=(), links=(), idle=(*p.idle, *(node.name for node in p.nodes))),
        "no node holds a layer",
    ),
    "a lost link": (lambda p: replace(p, links=p.links[1:]), "enter"),
    "a node that is not there": (lambda p: replace(p, idle=("T4-99",)), "there is no node T4-99"),
    "a node twice": (lambda p: replace(p, nodes=(*p.nodes, p.nodes[0])), "is used 2 times"),
    "a lost node": (lambda p: replace(p, nodes=p.nodes[1:]), "neither used nor idle"),
    "too many layers": (
        lambda p: replace(p, nodes=(replace(p.nodes[0], num_layers=60), *p.nodes[1:])),
        "holds 60 layers, can hold",
    ),
    "a skipped layer": (
        lambda p: replace(p, links=(*p.links, LinkShare(source=None, target=p.nodes[-1].name, share=0.1))),
        "does not hold layer 0",
    ),
    "an early answer": (
        lambda p: replace(p, links=(*p.links, LinkShare(source=p.nodes[0].name, target=None, share=0.1))),
        "the last is 79",
    ),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_the_checker_sees(what: str, example: LayersProblem, plan: LayersPlan) -> None:
    change, message = TAMPERED[what]
    found = check_layers_plan(example, change(plan))
    assert any(message in sentence for sentence in found), found


def test_numbers_given_as_integers_compile_nothing_anew(example: LayersProblem) -> None:
    as_floats = replace(example, mean_prompt_tokens=100.0, mean_output_tokens=200.0)
    as_integers = replace(example, mean_prompt_tokens=100, mean_output_tokens=200)
    assert numba.typeof(tabulate(as_floats)) == numba.typeof(tabulate(as_integers))


def test_a_time_table_is_linear_between_its_sizes_and_goes_on() -> None:
    table = TimeTable(sizes=(2.0, 4.0, 8.0), seconds=(1.0, 2.0, 6.0))
    assert [table.at(size) for size in (0, 2, 3, 4, 6, 8, 10)] == [1, 1, 1.5, 2, 4, 6, 8]
    assert TimeTable(sizes=(4.0,), seconds=(2.0,)).at(8) == 4


@pytest.mark.parametrize(
    ("sizes", "seconds", "message"),
    [
        ((), (), "need one or more pairs"),
        ((1.0, 1.0), (1.0, 2.0), "must ascend"),
        ((1.0, 2.0), (2.0, 1.0), "must not fall"),
        ((1.0,), (0.0,), "takes no time"),
        ((-1.0,), (1.0,), "finite and >= 0"),
    ],
)
def test_a_wrong_time_table_is_refused(sizes: tuple[float, ...], seconds: tuple[float, ...], message: str) -> None:
    with pytest.raises(InvalidProblemError, match=message):
        TimeTable(sizes=sizes, seconds=seconds)
