"""`hetis` is never below the strategies it contains, and each strategy keeps to its family."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings

from hetis.solver.budget import Budget
from hetis.solver.check import check_plan
from hetis.solver.errors import InvalidProblemError
from hetis.solver.placement import exact, frontier, search
from hetis.solver.placement.families import STRATEGIES
from hetis.solver.plan import ObjectiveKind, Plan, Status
from hetis.solver.planning import solve_placement
from hetis.solver.problem import PlacementProblem
from tests.solver.instances import SMALL_FAMILY, make_model, make_node, make_problem, make_profile, problems
from tests.solver.oracle import best_plan_value
from tests.solver.searching import plan_or_none, worth

KINDS = tuple(ObjectiveKind)
REL = 1e-6
EXAMPLES = max(3, settings().max_examples // 5)


def value_by(problem: PlacementProblem, strategy: str, *, exact: bool) -> float:
    def is_small(_: object) -> bool:
        return exact

    with patch.object(search, "is_small", is_small):
        return worth(plan_or_none(problem, strategy), problem)


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "generated"])
@settings(max_examples=EXAMPLES)
@given(problem=problems(max_gpus=6, kinds=KINDS, family=SMALL_FAMILY))
def test_hetis_is_never_worse_than_hexgen_nor_hexgen_than_uniform(exact: bool, problem: PlacementProblem) -> None:
    hetis, hexgen, uniform = (value_by(problem, name, exact=exact) for name in ("hetis", "hexgen", "uniform"))
    if problem.objective.maximises:
        assert hetis >= hexgen * (1 - REL)
        assert hexgen >= uniform * (1 - REL)
    else:
        assert hetis <= hexgen * (1 + REL)
        assert hexgen <= uniform * (1 + REL)


def searched(problem: PlacementProblem, strategy: str = "hetis", limit: float = math.inf) -> tuple[Plan, float]:
    """Run the exact search until it has explored ``limit`` stage options; return the plan and the number explored."""
    explored = [0.0]

    def clocked(kernel: Callable[..., Any], *arguments: Any) -> Any:
        explored[0] += len(arguments[2].rank)
        return kernel(*arguments)

    with (
        patch.object(exact, "explore", partial(clocked, frontier.explore)),
        patch.object(exact, "explore_sequential", partial(clocked, frontier.explore_sequential)),
    ):
        budget = Budget(time_limit_s=limit, clock=lambda: explored[0])
        return solve_placement(problem, strategy=strategy, budget=budget), explored[0]


@pytest.mark.parametrize(("gpus", "bytes_per_s", "megabytes", "layers"), [((3, 1), 4e10, 9, 6), ((1, 3), 2e10, 11, 8)])
def test_hetis_cut_short_has_what_ends_in_its_share_and_loses_no_work(
    gpus: tuple[int, int], bytes_per_s: float, megabytes: int, layers: int
) -> None:
    problem = make_problem(
        [make_node("a", "A", gpus=gpus[0]), make_node("b", "B", gpus=gpus[1])],
        profiles={
            "A": make_profile("A", bytes_per_s=bytes_per_s, usable_bytes=megabytes * 1_000_000),
            "B": make_profile("B", flops=1e12, bytes_per_s=4e20 / bytes_per_s, usable_bytes=megabytes * 1_000_000),
        },
        model=make_model(num_layers=layers, kv_heads=4),
        family=replace(SMALL_FAMILY, micro_batches=(1, 2, 4, 8, 16, 32), max_copies=3, max_pool=3),
    )
    whole, taken = searched(problem)
    uniform, _ = searched(problem, "uniform")
    for strategy, share in (("hexgen", 1 / 4), ("hexgen2", 1 / 8)):
        part, enough = searched(problem, strategy)
        limit = enough / share
        assert limit < taken / 1.5, "cut long before its end"
        cut, _ = searched(problem, limit=limit)
        assert cut.result.value >= part.result.value * (1 - REL)
        assert cut.result.value > uniform.result.value * 1.01, "what is left when nothing was searched"
    for more in (1.5, 1.75):  # the whole family is cut at a quarter, and resumed after its parts
        late, _ = searched(problem, limit=more * taken)
        assert late.result.status is Status.OPTIMAL
        assert late.result.value == pytest.approx(whole.result.value)


@settings(max_examples=3 * EXAMPLES)
@given(problems(max_gpus=5, kinds=KINDS, family=SMALL_FAMILY))
def test_plans_of_uniform_are_sound(problem: PlacementProblem) -> None:
    restricted = replace(problem, family=STRATEGIES["uniform"].restrict(problem.family))
    plan = plan_or_none(problem, strategy="uniform")
    if plan is None:
        return
    assert check_plan(plan, restricted) == ()


@settings(max_examples=3 * EXAMPLES)
@given(problems(max_gpus=4, kinds=KINDS, family=SMALL_FAMILY))
def test_uniform_never_beats_single_types_and_equal_layers(problem: PlacementProblem) -> None:
    """The checker's restriction is a little wider: it lets classes of one type, and TP sizes, share a replica."""
    restricted = replace(problem, family=STRATEGIES["uniform"].restrict(problem.family))
    best = best_plan_value(restricted)
    assert value_by(problem, "uniform", exact=True) <= best * (1 + REL)


@pytest.mark.parametrize("gpus", [1, 2, 4])
@settings(max_examples=EXAMPLES // 2)
@given(problem=problems(max_gpus=1, kinds=KINDS, num_zones=1))
def test_uniform_is_optimal_where_one_shape_of_stage_exists(gpus: int, problem: PlacementProblem) -> None:
    """One class, one TP size, layers that divide: so that the family of `uniform` is unambiguous."""
    gpu = next(iter(problem.profiles))
    node = make_node("n", gpu, gpus=gpus)
    family = STRATEGIES["uniform"].restrict(replace(SMALL_FAMILY, tp_sizes=(1,), in_flight=(1, 2, 4)))
    cluster = replace(problem.cluster, node_groups=(node,))
    problem = replace(problem, cluster=cluster, family=family, model=make_model(num_layers=12))
    best = best_plan_value(problem)
    value = value_by(problem, "uniform", exact=True)
    assert value == pytest.approx(best, rel=REL)


def narrowed(strategy: str) -> Plan:
    nodes = [make_node("a", "A", gpus=2), make_node("b", "B", gpus=2)]
    return solve_placement(make_problem(nodes), strategy=strategy)


def test_plan_names_its_strategy_and_family() -> None:
    assert narrowed("hetis").strategy == "hetis"
    assert narrowed("uniform").family.startswith("one device class and TP size per replica; equal layers per stage")
    assert "no stage copies; no attention workers" in narrowed("hexgen").family


def test_unknown_strategy_is_refused() -> None:
    names = (
        "hetis, uniform, hexgen, hexgen2, hexgen3, splitwise, splitwise-paper, hexgen-paper, hexgen2-paper, hetis-paper"
    )
    with pytest.raises(InvalidProblemError, match=rf"^unknown strategy 'helix', must be one of {names}$"):
        solve_placement(make_problem([make_node("a", "A")]), strategy="helix")


@pytest.mark.parametrize("strategy", ["hetis", "hexgen"])
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "generated"])
def test_strategy_decides_the_shapes_and_says_so(strategy: str, exact: bool) -> None:
    """Equal layers and single types define `uniform`; other strategies lift them, in their family as well."""
    family = replace(SMALL_FAMILY, mixed_types=False, uneven_layers=False)
    problem = make_problem([make_node("a", "A"), make_node("b", "B")], family=family)
    with patch.object(search, "is_small", lambda _: exact):
        plan = solve_placement(problem, strategy=strategy)
    assert plan.family.startswith("stages of any GPU types; any number of layers per stage")
    assert check_plan(plan, replace(problem, family=STRATEGIES[strategy].restrict(family))) == ()
