"""The compact MILP and the brute-force oracle, written independently, find the same optimum."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, assume, given, settings

from hetis.solver.cluster import Link, Network
from hetis.solver.errors import InvalidProblemError
from hetis.solver.plan import Objective, ObjectiveKind, Role, Status
from hetis.solver.problem import Family, PlacementProblem
from tests.solver.instances import FREE_FAMILY, NO_LIMITS, make_model, make_node, make_problem, make_profile, problems
from tests.solver.oracle import best_plan_value
from tests.solver.specified import EVERY, is_soon_solved, solve_specification

UNIFIED = replace(FREE_FAMILY, roles=(Role.UNIFIED,))
# The specification has no copies that share experts.
TINY_FAMILY = replace(UNIFIED, micro_batches=(4,), in_flight=(1, 2), max_pool=1, tp_sizes=(1, 2), attention_dp=())
UNIFORM = replace(TINY_FAMILY, name="uniform", mixed_types=False, uneven_layers=False, max_pool=0)
KINDS = tuple(ObjectiveKind)


def specified_value(problem: PlacementProblem) -> float:
    """Return the MILP's value with as many slots as the fleet could fill."""
    slots = problem.cluster.num_gpus()
    return solve_specification(problem, num_replicas=slots, num_stages=slots).value


@EVERY
@pytest.mark.parametrize("family", [TINY_FAMILY, UNIFORM], ids=["hetis", "uniform"])
def test_specification_agrees_with_brute_force(family: Family, every: bool) -> None:
    num = 20 if every else 6

    @settings(max_examples=num, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(problems(max_gpus=3, kinds=KINDS, family=family))
    def agrees(problem: PlacementProblem) -> None:
        assume(every or is_soon_solved(problem))
        assert specified_value(problem) == pytest.approx(best_plan_value(problem), rel=1e-6)

    agrees()


def pipeline_problem(**changes: object) -> PlacementProblem:
    """A model that fits on no single card: one A and one B, or A with attention workers."""
    nodes = [make_node("a", "A"), make_node("b", "B"), make_node("c", "C")]
    profiles = {
        "A": make_profile("A", usable_bytes=6_500_000),
        "B": make_profile("B", usable_bytes=6_500_000, bytes_per_s=5e9),
        "C": make_profile("C", usable_bytes=3_000_000, bytes_per_s=5e9),
    }
    problem = make_problem(nodes, profiles=profiles, family=TINY_FAMILY, model=make_model(num_layers=6))
    return replace(problem, **changes)  # type: ignore[arg-type]


def test_specification_splits_a_model_over_stages_of_different_types() -> None:
    problem = pipeline_problem()
    result = solve_specification(problem, num_replicas=1, num_stages=3)
    assert result.status is Status.OPTIMAL
    assert result.value == pytest.approx(best_plan_value(problem), rel=1e-6)
    assert result.value > 0
    assert " > " in result.replicas[0]


def test_specification_respects_forbidden_cuts() -> None:
    free = pipeline_problem()
    cut = replace(free, model=make_model(num_layers=6, forbidden_cuts=frozenset({3, 4, 5})))
    value = solve_specification(cut, num_replicas=1, num_stages=3).value
    assert value == pytest.approx(best_plan_value(cut), rel=1e-6)
    assert value < best_plan_value(free)


def test_more_slots_only_help_until_the_fleet_is_full() -> None:
    problem = make_problem([make_node("a", "A", nodes=2)], family=TINY_FAMILY)
    values = [solve_specification(problem, num_replicas=n, num_stages=n).value for n in (1, 2, 3)]
    assert values[0] < values[1]
    assert values[1:] == pytest.approx([best_plan_value(problem)] * 2, rel=1e-6)


def test_fixed_values_stand_in_for_the_family() -> None:
    problem = make_problem([make_node("a", "A")], family=UNIFIED)
    values = [
        solve_specification(problem, num_replicas=1, num_stages=1, micro_batches=(b,)).value
        for b in problem.family.micro_batches
    ]
    assert max(values) == pytest.approx(best_plan_value(problem), rel=1e-6)
    assert max(values) == pytest.approx(solve_specification(problem, num_replicas=1, num_stages=1).value, rel=1e-6)


@pytest.mark.parametrize(("kind", "nothing"), [(ObjectiveKind.GOODPUT, 0.0), (ObjectiveKind.COST, math.inf)])
def test_no_plan_is_an_answer(kind: ObjectiveKind, nothing: float) -> None:
    objective = Objective(kind=kind, ttft_limit_s=None, tpot_limit_s=1e-6, demand_rps=1.0)
    problem = make_problem([make_node("a", "A")], family=TINY_FAMILY, objective=objective)
    result = solve_specification(problem, num_replicas=1, num_stages=1)
    assert (result.status, result.value, result.replicas) == (Status.INFEASIBLE, nothing, ())
    assert best_plan_value(problem) == nothing


def test_demand_that_no_plan_meets_is_infeasible() -> None:
    objective = replace(NO_LIMITS, kind=ObjectiveKind.GPUS, demand_rps=1e6)
    problem = make_problem([make_node("a", "A")], family=TINY_FAMILY, objective=objective)
    assert solve_specification(problem, num_replicas=1, num_stages=1).value == math.inf
    assert best_plan_value(problem) == math.inf


def test_time_limit_leaves_a_bound() -> None:
    nodes = [make_node("a", "A", gpus=2), make_node("b", "B", gpus=2)]
    profiles = {"A": make_profile("A"), "B": make_profile("B", bytes_per_s=5e9)}
    problem = make_problem(nodes, profiles=profiles, family=UNIFIED)
    result = solve_specification(problem, num_replicas=3, num_stages=3, micro_batches=(4,), time_limit_s=0.5)
    assert result.value <= best_plan_value(problem) * (1 + 1e-6)
    assert result.bound >= result.value * (1 - 1e-9)


def test_explicit_node_links_are_refused() -> None:
    link = Link(bytes_per_s=1e9, latency_s=0.0)
    network = Network(default=link, between_nodes={("a-0", "a-1"): link})
    problem = make_problem([make_node("a", "A", nodes=2)], network=network)
    with pytest.raises(InvalidProblemError, match=r"^the specification does not know explicit links between nodes$"):
        solve_specification(problem, num_replicas=1, num_stages=1)


def test_prefill_and_decode_replicas_are_refused() -> None:
    problem = make_problem([make_node("a", "A")])
    with pytest.raises(InvalidProblemError, match=r"^the specification does not know prefill and decode replicas$"):
        solve_specification(problem, num_replicas=1, num_stages=1)
