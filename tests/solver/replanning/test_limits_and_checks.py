"""What constraints, zones and the checker of re-plannings allow."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hetis.solver.advice import without
from hetis.solver.budget import Budget, SearchSettings, silent
from hetis.solver.cluster import Link, NodeGroup
from hetis.solver.constraints import Constraint, Duty, RestrictRole, Selection, Unit
from hetis.solver.errors import InvalidProblemError
from hetis.solver.placement.constrained_problem import apply_constraints
from hetis.solver.placement.replicas.tabulation import build_cost_tables
from hetis.solver.plan import Plan, Role
from hetis.solver.planning import solve_placement
from hetis.solver.problem import PlacementProblem
from hetis.solver.replanning import fresh as fresh_search
from hetis.solver.replanning.change import ChangeCosts, Fate, ReplanningProblem
from hetis.solver.replanning.replanner import Survivors, solve_replanning
from hetis.solver.replanning.replanning_check import check_replanning
from hetis.solver.replanning.running import Candidate
from hetis.solver.replanning.transition import Action
from tests.solver.instances import make_node, make_problem, make_workload
from tests.solver.replanning.test_replanning import AT_ONCE, TWO_TYPES, UNIFIED, fleet, replanned


def barred(node: str, *duties: Duty) -> tuple[Constraint, ...]:
    gpus = Selection(unit=Unit.NODE, name=node)
    return tuple(RestrictRole(gpus=gpus, duty=duty, only=False) for duty in duties)


def with_workers(nodes: list[NodeGroup], *constraints: Constraint) -> PlacementProblem:
    """Return a problem with so much KV that A wants attention workers, with which it serves more."""
    problem = make_problem(
        nodes, profiles=TWO_TYPES, family=replace(UNIFIED, max_pool=2), workload=make_workload((60, 200))
    )
    return replace(problem, constraints=constraints)


def served_with_workers() -> Plan:
    """Return a plan whose attention workers are the GPUs of node b."""
    nodes = [make_node("a", "A", zone="east"), make_node("b", "B", gpus=2, zone="east")]
    running = solve_placement(with_workers(nodes, *barred("b", Duty.PRIMARY)))
    [replica] = running.replicas
    assert {name.partition("/")[0] for name in replica.worker_devices()} == {"b"}
    return running


def options_of(running: Plan, problem: PlacementProblem) -> list[Candidate]:
    problem = apply_constraints(problem)
    posed = ReplanningProblem(running=running, problem=problem, costs=AT_ONCE)
    return Survivors(posed, build_cost_tables(problem)).candidates


@pytest.mark.parametrize(("zone", "duty"), [("east", None), ("west", None), ("east", Duty.WORKER)])
def test_lost_workers_are_replaced_by_gpus_that_may_be_workers_there(zone: str, duty: Duty | None) -> None:
    running = served_with_workers()
    nodes = [make_node("a", "A", zone="east"), make_node("c", "B", gpus=2, zone=zone)]
    problem = with_workers(nodes, *(barred("c", duty) if duty is not None else ()))
    pools = [stage.pool_class for option in options_of(running, problem) for stage in option.template.stages]
    assert any(pool >= 0 for pool in pools) == (zone == "east" and duty is None)
    replanned(running, problem)


def test_a_stage_that_lost_its_workers_takes_their_head_groups_back() -> None:
    """It reads no weights and none of its GPUs moves."""
    running = served_with_workers()
    slow = ChangeCosts(horizon_s=100.0, restart_s=20.0, load_bytes_per_s=1e6)
    found = replanned(running, with_workers([make_node("a", "A", zone="east")]), costs=slow, max_moves=0)
    assert [(c.fate, c.start_s) for c in found.continued] == [(Fate.CHANGED, 20.0)]
    assert not found.change.moved


def test_a_lost_replica_is_not_replaced_by_gpus_that_may_not_have_its_role() -> None:
    nodes = [make_node("a", "A", gpus=2), make_node("b", "A", gpus=2), make_node("c", "A", gpus=4)]
    problem = make_problem(nodes, profiles=TWO_TYPES, family=replace(UNIFIED, roles=(Role.PREFILL, Role.DECODE)))
    decoding = (*barred("a", Duty.PREFILL), *barred("c", Duty.PREFILL))
    running = solve_placement(replace(problem, constraints=(*decoding, *barred("b", Duty.DECODE))))
    left = replace(problem, cluster=without(problem.cluster, ["b"]), constraints=decoding)
    assert options_of(running, left)
    assert not [o for o in options_of(running, left) if running.replicas[o.old].role is Role.PREFILL]


def test_replicas_for_the_remaining_gpus_keep_constraints_on_duties() -> None:
    nodes = [make_node("a", "A", nodes=2), make_node("b", "B", gpus=2)]
    settings = SearchSettings(strategy="hetis", budget=Budget(), gap_target=1e-3, seed=0, report=silent)
    for duties, has_pool in (((Duty.PRIMARY,), True), ((Duty.PRIMARY, Duty.WORKER), False)):
        costs = build_cost_tables(apply_constraints(with_workers(nodes, *barred("b", *duties))))
        [template] = fresh_search.search_left_over(costs, {"a-0/0"}, None, settings)
        assert any(stage.pool_class >= 0 for stage in template.stages) == has_pool


def test_a_plan_by_a_heuristic_has_no_replanning() -> None:
    running, problem = solve_placement(fleet(1, 0)), fleet(1, 0)
    with pytest.raises(InvalidProblemError, match="has no re-planning"):
        solve_replanning(ReplanningProblem(running=running, problem=problem), strategy="hetis-paper")


def test_costs_and_moves_out_of_range_are_refused() -> None:
    with pytest.raises(InvalidProblemError, match=r"horizon_s is 0"):
        ChangeCosts(horizon_s=0.0)
    with pytest.raises(InvalidProblemError, match=r"max_moves is -1"):
        ReplanningProblem(running=solve_placement(fleet(1, 0)), problem=fleet(1, 0), max_moves=-1)


def test_the_checker_finds_what_is_wrong() -> None:
    problem = fleet(2, 2)
    running = solve_placement(problem)
    left = replace(problem, cluster=without(problem.cluster, ["a-0"]))
    posed = ReplanningProblem(running=running, problem=left, costs=AT_ONCE)
    found = solve_replanning(posed)
    assert not check_replanning(posed, found)
    assert check_replanning(posed, replace(found, value=2 * found.value))
    assert check_replanning(posed, replace(found, bound=0.5 * found.value))
    assert check_replanning(posed, replace(found, continued=()))
    started = [replace(c, fate=Fate.KEPT, old=0) for c in found.continued]
    assert check_replanning(posed, replace(found, continued=tuple(started)))


def test_the_checker_derives_the_transition() -> None:
    for before, after in (((2, 2), (1, 4)), ((1, 4), (2, 1)), ((2, 3), (3, 2))):
        posed = ReplanningProblem(running=solve_placement(fleet(*before)), problem=fleet(*after), costs=AT_ONCE)
        found = solve_replanning(posed)
        change = found.transition
        assert not check_replanning(posed, found)
        again = tuple(step for step in change.steps if step.action is Action.START)
        wrong: list[dict[str, Any]] = [
            {"lowest": 2 * change.lowest + 1},
            {"lowest": change.best_lowest + 5},
            {"before": 1e9, "after": 1e9},
            {"before": 0.5 * change.before},
            {"lost": change.lost + 7.0},
            {"seconds": change.seconds + 1.0},
        ]
        if change.steps:
            wrong.append({"steps": tuple(replace(step, capacity_after=-3.0) for step in change.steps)})
            wrong.append({"steps": tuple(replace(step, seconds=1e3) for step in change.steps)})
            wrong.append({"steps": (*change.steps, *again)})
        for values in wrong:
            assert check_replanning(posed, replace(found, transition=replace(change, **values)))


def test_the_checker_derives_the_starts_of_replicas_that_are_reset() -> None:
    problem = fleet(2, 0)
    slow = ChangeCosts(horizon_s=1e5, restart_s=20.0, load_bytes_per_s=1e3)
    posed = ReplanningProblem(
        running=solve_placement(problem), problem=replace(problem, workload=make_workload((200, 5))), costs=slow
    )
    found = solve_replanning(posed)
    assert not check_replanning(posed, found)
    assert any(c.fate is Fate.RESET for c in found.continued)
    at_once = replace(found, continued=tuple(replace(c, start_s=0.0) for c in found.continued))
    assert "(reset) starts in 20 s, not in 0 s" in check_replanning(posed, at_once)[0]


def test_the_checker_derives_what_prefill_replicas_hand_over() -> None:
    nodes = [make_node("a", "A", zone="east"), make_node("b", "A", zone="west")]
    problem = make_problem(nodes, profiles=TWO_TYPES, family=replace(UNIFIED, roles=(Role.PREFILL, Role.DECODE)))
    found = replanned(solve_placement(problem), problem)
    posed = ReplanningProblem(running=solve_placement(problem), problem=problem, costs=AT_ONCE)
    assert "the net value is" in check_replanning(posed, replace(found, value=1.01 * found.value))[0]
    slow = replace(problem.cluster.network, between_zones={("east", "west"): Link(bytes_per_s=1.0, latency_s=0.0)})
    apart = replace(posed, problem=replace(problem, cluster=replace(problem.cluster, network=slow)))
    assert "the net value is" in check_replanning(apart, found)[0]
