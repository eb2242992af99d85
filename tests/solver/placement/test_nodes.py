"""Replicas on few nodes: the plan found is the best of those, and is bound to no more nodes than allowed."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hetis.solver.check import check_plan
from hetis.solver.cluster import NodeGroup
from hetis.solver.constraints import Replicas
from hetis.solver.engine_rules import EngineRules, Family
from hetis.solver.errors import InfeasibleError, InvalidProblemError, NoPlanFoundError
from hetis.solver.placement.families import STRATEGIES, run_by
from hetis.solver.placement.fleet import device_classes
from hetis.solver.placement.nodes import pack_within
from hetis.solver.placement.replicas.kinds import Kind, fewest_nodes
from hetis.solver.plan import ObjectiveKind, Plan, Role, Status
from hetis.solver.planning import solve_placement
from hetis.solver.problem import PlacementProblem
from tests.solver.instances import make_model, make_node, make_problem, problems
from tests.solver.placement.test_packing import every_way
from tests.solver.searching import plan_or_none

REL = 1e-6
EXAMPLES = settings().max_examples
RULES = EngineRules(name="vllm-hetis", max_stages=4, max_pooled_stages=2)
FAMILY = run_by(Family(max_pool=2, tp_sizes=(1, 2), micro_batches=(1, 4, 16), chunk_tokens=(64,)), RULES)
UNIFIED = replace(FAMILY, roles=(Role.UNIFIED,))
MAXIMISED = (ObjectiveKind.GOODPUT, ObjectiveKind.THROUGHPUT)


def on_nodes(problem: PlacementProblem, most: int | None) -> PlacementProblem:
    """Return the problem with replicas on at most this many nodes."""
    return replace(problem, family=replace(problem.family, engine=replace(RULES, max_nodes=most)))


def solved(problem: PlacementProblem, strategy: str = "hetis") -> Plan | None:
    """Return a plan that the checker accepts, proved as far as it claims."""
    try:
        plan = plan_or_none(problem, strategy, gap_target=0.0)
    except NoPlanFoundError:
        return None
    if plan is None:
        return None
    held = replace(problem, family=STRATEGIES[strategy].restrict(problem.family))
    assert check_plan(plan, held) == ()
    assert problem.family.engine is not None
    return plan


def value_of(problem: PlacementProblem) -> float:
    """Return the value of the best plan of a problem whose rate is maximised."""
    plan = solved(problem)
    assert plan is None or plan.result.status is Status.OPTIMAL
    return 0.0 if plan is None else plan.result.value


@settings(max_examples=EXAMPLES)
@given(problem=problems(max_gpus=6, kinds=MAXIMISED, family=UNIFIED, num_zones=1))
def test_replicas_inside_nodes_serve_what_every_node_serves_alone(problem: PlacementProblem) -> None:
    assume(not problem.model.forbidden_cuts)
    groups = problem.cluster.node_groups
    assume(all(len(group.gpus) == 1 for group in groups))
    alone = (
        group.count * value_of(replace(problem, cluster=replace(problem.cluster, node_groups=(group.node(0),))))
        for group in groups
    )
    assert value_of(on_nodes(problem, 1)) == pytest.approx(sum(alone), rel=REL)


@settings(max_examples=EXAMPLES)
@given(problem=problems(max_gpus=5, kinds=tuple(ObjectiveKind), family=FAMILY), most=st.integers(1, 3))
def test_more_nodes_are_never_worse_and_enough_are_as_good_as_any(problem: PlacementProblem, most: int) -> None:
    assume(not problem.model.forbidden_cuts)
    one, more, free = (solved(on_nodes(problem, number)) for number in (most, most + 1, None))
    num_nodes = sum(group.count for group in problem.cluster.node_groups)
    if free is None:
        assert one is None
        assert more is None
        return
    sign = 1.0 if problem.objective.maximises else -1.0
    for limited in (one, more):
        if limited is not None:
            assert sign * limited.result.value <= sign * free.result.value * (1 + sign * REL)
    if one is not None:
        assert more is not None
        assert sign * one.result.value <= sign * more.result.bound * (1 + sign * REL)
    is_alone = all(len(group.gpus) == 1 for group in problem.cluster.node_groups)
    if most >= num_nodes and is_alone:
        assert one is not None
        assert one.result.value == pytest.approx(free.result.value, rel=REL)


@given(
    st.lists(st.lists(st.sampled_from((1, 1, 2)), min_size=1, max_size=3), min_size=1, max_size=3),
    st.integers(2, 4),
    st.integers(1, 3),
    st.integers(1, 2),
)
def test_replicas_are_packed_on_so_many_nodes_where_there_is_a_way(
    replicas: list[list[int]], node_size: int, num_nodes: int, most: int
) -> None:
    ways = [way for way in every_way(replicas, node_size, num_nodes) if max(map(len, way)) <= most]
    classes = device_classes(make_problem([make_node("a", "A", gpus=node_size, nodes=num_nodes)]).cluster)
    kinds: list[Kind] = [((0, tuple(sorted(sizes, reverse=True))),) for sizes in replicas]
    found = pack_within(classes, kinds, most, time_limit_s=60.0, seed=0)
    assert (found is None) == (not ways)
    if found is None:
        return
    assert sum(len(set(nodes[0])) for nodes in found) == min(sum(map(len, way)) for way in ways)
    load = [0] * num_nodes
    for kind, nodes in zip(kinds, found, strict=True):
        assert len(set(nodes[0])) <= most
        assert len(set(nodes[0])) >= fewest_nodes(kind[0][1], node_size)
        for size, node in zip(kind[0][1], nodes[0], strict=True):
            load[node] += size
    assert max(load) <= node_size


def nodes_of(plan: Plan) -> int:
    """Return the number of nodes of each replica, summed over all."""
    return sum(len({name.rpartition("/")[0] for name in replica.devices()}) for replica in plan.replicas)


def four_gpus_wanted() -> PlacementProblem:
    """Nodes of three GPUs, and a model that needs four."""
    groups = [make_node("a", "A", gpus=3, nodes=4)]
    return make_problem(groups, model=make_model(num_layers=60), family=replace(UNIFIED, tp_sizes=(1,)))


@pytest.mark.parametrize("strategy", ["hetis", "uniform"])
def test_a_replica_that_takes_more_nodes_than_it_may_is_in_no_plan(strategy: str) -> None:
    problem = four_gpus_wanted()
    free = solved(problem, strategy)
    assert free is not None
    on_two, on_one = solved(on_nodes(problem, 2), strategy), solved(on_nodes(problem, 1), strategy)
    assert on_two is not None
    assert max(len({name.rpartition("/")[0] for name in r.devices()}) for r in on_two.replicas) <= 2
    assert on_one is None


def pinned(problem: PlacementProblem, least: int) -> PlacementProblem:
    """Return the problem with at least so many replicas."""
    return replace(problem, constraints=(Replicas(least=least, most=None),))


@pytest.mark.parametrize("least", [3, 4])
def test_replicas_that_nodes_have_no_room_for_are_proved_so(least: int) -> None:
    """Replicas take two GPUs: three are possible across nodes, and two inside them."""
    groups = [make_node("a", "A", gpus=3, nodes=2)]
    problem = make_problem(groups, model=make_model(num_layers=30), family=replace(UNIFIED, tp_sizes=(1,)))
    with pytest.raises(InfeasibleError):
        solve_placement(pinned(on_nodes(problem, 1), least), strategy="hetis", gap_target=0.0)
    possible = pinned(on_nodes(problem, 1), 2)
    assert check_plan(solve_placement(possible, strategy="hetis", gap_target=0.0), possible) == ()
    across = pinned(on_nodes(problem, 2), 3)
    assert len(solve_placement(across, strategy="hetis", gap_target=0.0).replicas) == 3


@settings(max_examples=EXAMPLES)
@given(problem=problems(max_gpus=6, kinds=tuple(ObjectiveKind), family=UNIFIED, num_zones=1))
def test_the_most_replicas_inside_nodes_are_those_of_every_node_alone(problem: PlacementProblem) -> None:
    assume(not problem.model.forbidden_cuts)
    assume(problem.objective.maximises)
    groups = problem.cluster.node_groups
    assume(all(len(group.gpus) == 1 for group in groups))

    def most_of(group: NodeGroup) -> int:
        alone = replace(problem, cluster=replace(problem.cluster, node_groups=(group.node(0),)))
        counts = range(1, sum(slots.count for slots in group.gpus) + 1)
        return next((n - 1 for n in counts if solved(pinned(on_nodes(alone, None), n)) is None), counts[-1])

    most = sum(group.count * most_of(group) for group in groups)
    limited = on_nodes(problem, 1)
    if most:
        assert solved(pinned(limited, most)) is not None
    with pytest.raises(InfeasibleError):
        solve_placement(pinned(limited, most + 1), strategy="hetis", gap_target=0.0)


def test_the_checker_counts_the_nodes_of_a_replica() -> None:
    problem = make_problem([make_node("a", "A", nodes=2)], model=make_model(num_layers=20), family=UNIFIED)
    plan = solved(problem)
    assert plan is not None
    spread = next(replica for replica in plan.replicas if len(replica.devices()) == 2)
    violations = check_plan(replace(plan, replicas=(spread,)), on_nodes(problem, 1))
    assert any("lies on 2 nodes (a-0, a-1), may lie on 1" in violation.message for violation in violations)
    with pytest.raises(InvalidProblemError, match="max_nodes is 0"):
        replace(RULES, max_nodes=0)
