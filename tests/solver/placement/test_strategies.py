"""`hetis` is never below the strategies it contains, and each strategy keeps to its family."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings

from hetis.solver.check import check_plan
from hetis.solver.errors import InvalidProblemError
from hetis.solver.placement.families import STRATEGIES
from hetis.solver.plan import ObjectiveKind, Plan
from hetis.solver.planning import solve_placement
from hetis.solver.problem import PlacementProblem
from tests.solver.instances import SMALL_FAMILY, make_model, make_node, make_problem, problems
from tests.solver.oracle import best_plan_value
from tests.solver.searching import plan_or_none, worth

KINDS = tuple(ObjectiveKind)
REL = 1e-6
EXAMPLES = max(3, settings().max_examples // 5)


def value_by(problem: PlacementProblem, strategy: str) -> float:
    return worth(plan_or_none(problem, strategy), problem)


@settings(max_examples=EXAMPLES)
@given(problem=problems(max_gpus=6, kinds=KINDS, family=SMALL_FAMILY))
def test_hetis_is_never_worse_than_hexgen_nor_hexgen_than_uniform(problem: PlacementProblem) -> None:
    hetis, hexgen, uniform = (value_by(problem, name) for name in ("hetis", "hexgen", "uniform"))
    if problem.objective.maximises:
        assert hetis >= hexgen * (1 - REL)
        assert hexgen >= uniform * (1 - REL)
    else:
        assert hetis <= hexgen * (1 + REL)
        assert hexgen <= uniform * (1 + REL)


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
    assert value_by(problem, "uniform") <= best * (1 + REL)


@pytest.mark.parametrize("gpus", [1, 2, 4])
@settings(max_examples=EXAMPLES // 2)
@given(problem=problems(max_gpus=1, kinds=KINDS, num_zones=1))
def test_uniform_is_optimal_where_one_shape_of_stage_exists(gpus: int, problem: PlacementProblem) -> None:
    """One class, one TP size, layers that divide: so that the family of `uniform` is unambiguous."""
    gpu = next(iter(problem.profiles))
    node = make_node("n", gpu, gpus=gpus)
    family = STRATEGIES["uniform"].restrict(replace(SMALL_FAMILY, tp_sizes=(1,)))
    cluster = replace(problem.cluster, node_groups=(node,))
    problem = replace(problem, cluster=cluster, family=family, model=make_model(num_layers=12))
    best = best_plan_value(problem)
    value = value_by(problem, "uniform")
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
def test_strategy_decides_the_shapes_and_says_so(strategy: str) -> None:
    """Equal layers and single types define `uniform`; other strategies lift them, in their family as well."""
    family = replace(SMALL_FAMILY, mixed_types=False, uneven_layers=False)
    problem = make_problem([make_node("a", "A"), make_node("b", "B")], family=family)
    plan = solve_placement(problem, strategy=strategy)
    assert plan.family.startswith("stages of any GPU types; any number of layers per stage")
    assert check_plan(plan, replace(problem, family=STRATEGIES[strategy].restrict(family))) == ()
