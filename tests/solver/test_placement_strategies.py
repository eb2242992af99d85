"""`hetis` is never below the strategies it contains, and each strategy keeps to its family."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings

from hetis.solver.budget import Budget
from hetis.solver.check import check_plan
from hetis.solver.errors import InfeasibleError, InvalidProblemError, NoPlanFoundError
from hetis.solver.placement import exact, frontier, frontier_sequential, search, solve_placement
from hetis.solver.placement.strategies import STRATEGIES
from hetis.solver.plan import ObjectiveKind, Plan
from hetis.solver.problem import PlacementProblem
from tests.solver.instances import SMALL_FAMILY, make_model, make_node, make_problem, make_profile, problems
from tests.solver.oracle import best_plan_value

KINDS = tuple(ObjectiveKind)
REL = 1e-6
EXAMPLES = max(3, settings().max_examples // 5)


def value_by(problem: PlacementProblem, strategy: str, *, exact: bool) -> float:
    def is_small(_: object) -> bool:
        return exact

    with patch.object(search, "is_small", is_small):
        try:
            return solve_placement(problem, strategy=strategy).result.value
        except InfeasibleError:
            return 0.0 if problem.objective.maximises else math.inf


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


@dataclass(frozen=True)
class Counted:
    """A search whose clock shows how many configurations have been explored."""

    plan: Plan | None
    explored: list[tuple[int, bytes, float]]  # configuration, options, tolerance

    @property
    def value(self) -> float:
        return 0.0 if self.plan is None else self.plan.result.value


def counted(problem: PlacementProblem, strategy: str = "hetis", limit: float = math.inf) -> Counted:
    """The exact search, until its clock shows ``limit``."""
    explored = list[tuple[int, bytes, float]]()

    def pipelined(*arguments: Any) -> int:
        options, tolerance, tag = arguments[2], arguments[7], arguments[11]
        explored.append((tag, options.layer_s.tobytes(), tolerance))
        found: int = frontier.explore(*arguments)
        return found

    def sequential(*arguments: Any) -> None:
        explored.append((arguments[9], arguments[2].layer_s.tobytes(), 0.0))
        frontier_sequential.explore_sequential(*arguments)

    with patch.object(exact, "explore", pipelined), patch.object(exact, "explore_sequential", sequential):
        try:
            budget = Budget(time_limit_s=limit, clock=lambda: float(len(explored)))
            return Counted(solve_placement(problem, strategy=strategy, budget=budget), explored)
        except NoPlanFoundError:
            return Counted(None, explored)


@pytest.fixture(scope="module", params=[((3, 1), 4e10, 9, 6), ((1, 3), 2e10, 11, 8)], ids=["3 + 1", "1 + 3"])
def of_two_kinds(request: pytest.FixtureRequest) -> PlacementProblem:
    gpus, bytes_per_s, megabytes, layers = request.param
    return make_problem(
        [make_node("a", "A", gpus=gpus[0]), make_node("b", "B", gpus=gpus[1])],
        profiles={
            "A": make_profile("A", bytes_per_s=bytes_per_s, usable_bytes=megabytes * 1_000_000),
            "B": make_profile("B", flops=1e12, bytes_per_s=4e20 / bytes_per_s, usable_bytes=megabytes * 1_000_000),
        },
        model=make_model(num_layers=layers, kv_heads=4),
        family=replace(SMALL_FAMILY, micro_batches=(1, 2, 4, 8, 16, 32)),
    )


@settings(max_examples=3 * EXAMPLES)
@given(problems(max_gpus=5, kinds=KINDS, family=SMALL_FAMILY))
def test_plans_of_uniform_are_sound(problem: PlacementProblem) -> None:
    restricted = replace(problem, family=STRATEGIES["uniform"].restrict(problem.family))
    try:
        plan = solve_placement(problem, strategy="uniform")
    except InfeasibleError:
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
    """One class, one TP size, layers that divide: the family of `uniform` without any doubt about what it is."""
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
    names = "hetis, uniform, hexgen, hexgen2, splitwise, splitwise-paper, hexgen-paper, hexgen2-paper, hetis-paper"
    with pytest.raises(InvalidProblemError, match=rf"^unknown strategy 'helix', must be one of {names}$"):
        solve_placement(make_problem([make_node("a", "A")]), strategy="helix")


@pytest.mark.parametrize("strategy", ["hetis", "hexgen"])
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "generated"])
def test_strategy_decides_the_shapes_and_says_so(strategy: str, exact: bool) -> None:
    """Equal layers and single types are what `uniform` is about; other strategies lift them, in their family too."""
    family = replace(SMALL_FAMILY, mixed_types=False, uneven_layers=False)
    problem = make_problem([make_node("a", "A"), make_node("b", "B")], family=family)
    with patch.object(search, "is_small", lambda _: exact):
        plan = solve_placement(problem, strategy=strategy)
    assert plan.family.startswith("stages of any GPU types; any number of layers per stage")
    assert check_plan(plan, replace(problem, family=STRATEGIES[strategy].restrict(family))) == ()
