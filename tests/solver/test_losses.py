"""The rest of a plan after losing a node or a zone: worked out by hand, and never above what the rest can serve."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given

from hetis.solver.advice import worst_node, worst_zone
from hetis.solver.engine_rules import EngineRules
from hetis.solver.model import GpuPrecision
from hetis.solver.placement.families import run_by
from hetis.solver.plan import KvRoute, Plan, ReplicaPlan, Role
from hetis.solver.planning import solve_placement
from hetis.solver.problem import PlacementProblem
from tests.solver.instances import SMALL_FAMILY, make_model, make_node, make_problem, problems
from tests.solver.searching import plan_or_none


def two_zones() -> tuple[Plan, PlacementProblem]:
    """A plan of one replica, to be replaced, and a problem of two nodes in the east and one in the west."""
    groups = [make_node("e", "A", gpus=2, nodes=2, zone="east"), make_node("w", "A", gpus=2, zone="west")]
    problem = make_problem(groups, model=make_model(num_layers=4), family=replace(SMALL_FAMILY, roles=(Role.UNIFIED,)))
    return solve_placement(problem), problem


def on(
    replica: ReplicaPlan, rate: float, *devices: str, role: Role = Role.UNIFIED, to: tuple[str, ...] = ()
) -> ReplicaPlan:
    stage = replace(replica.stages[0], devices=devices)
    return replace(replica, rate=rate, stages=(stage,), attention_workers=(), role=role, kv_zones=to)


def test_the_worst_node_takes_every_replica_that_has_a_gpu_there() -> None:
    plan, problem = two_zones()
    one = plan.replicas[0]
    both = on(one, 3.0, "e-0/0", "e-1/0"), on(one, 2.0, "e-0/1"), on(one, 4.0, "w/0")
    node, zone = worst_node(replace(plan, replicas=both), problem), worst_zone(replace(plan, replicas=both), problem)
    assert node is not None
    assert zone is not None
    assert (node.name, node.rate, node.share) == ("e-0", 4.0, pytest.approx(4 / 9))
    assert (zone.name, zone.rate, zone.share) == ("east", 4.0, pytest.approx(4 / 9))


def test_halves_of_requests_need_one_another_and_the_routes_between_zones() -> None:
    plan, problem = two_zones()
    one = plan.replicas[0]
    replicas = (
        on(one, 5.0, "e-0/0", role=Role.PREFILL, to=("east", "west")),
        on(one, 3.0, "e-1/0", role=Role.DECODE),
        on(one, 2.0, "w/0", role=Role.DECODE),
    )
    routes = (KvRoute(prefill=0, decode=1, rate=3.0), KvRoute(prefill=0, decode=2, rate=2.0))
    node = worst_node(replace(plan, replicas=replicas, kv_routes=routes), problem)
    assert node is not None
    assert (node.name, node.rate) == ("e-0", 0.0)
    twice = (*replicas, on(one, 5.0, "e-1/1", role=Role.PREFILL, to=("east", "west")))
    node = worst_node(replace(plan, replicas=twice, kv_routes=routes), problem)
    assert node is not None
    assert (node.name, node.rate) == ("e-1", 2.0)  # of the 5 that are prefilled, only the west decodes any
    assert worst_node(replace(plan, replicas=()), problem) is None


@pytest.mark.parametrize("apart_by", ["precision", "vendor"])
def test_only_replicas_of_one_precision_and_vendor_need_one_another(apart_by: str) -> None:
    groups = [make_node("a", "A", nodes=3), make_node("b", "B", nodes=2)]
    problem = make_problem(
        groups, model=make_model(num_layers=4), family=run_by(SMALL_FAMILY, EngineRules(name="vllm"))
    )
    alike, types = problem, problem.cluster.gpu_types
    if apart_by == "precision":
        own = GpuPrecision(gpu="A", weights="A's", weight_bytes=2.0, kv_bytes=1.0)
        problem = replace(problem, model=replace(problem.model, precisions=(own,)))
    else:
        of_two = types | {"B": replace(types["B"], vendor="AMD")}
        problem = replace(problem, cluster=replace(problem.cluster, gpu_types=of_two))
    plan = solve_placement(alike)
    one = plan.replicas[0]
    of_a = replace(one, stages=(replace(one.stages[0], gpu="A"),))
    of_b = replace(one, stages=(replace(one.stages[0], gpu="B"),))
    replicas = (
        on(of_a, 8.0, "a-0/0", role=Role.PREFILL, to=("default",)),
        on(of_a, 5.0, "a-1/0", role=Role.DECODE),
        on(of_a, 5.0, "a-2/0", role=Role.DECODE),
        on(of_b, 3.0, "b-0/0", role=Role.PREFILL, to=("default",)),
        on(of_b, 2.0, "b-1/0", role=Role.DECODE),
    )
    routes = (
        KvRoute(prefill=0, decode=1, rate=4.0),
        KvRoute(prefill=0, decode=2, rate=4.0),
        KvRoute(prefill=3, decode=4, rate=2.0),
    )
    plan = replace(plan, replicas=replicas, kv_routes=routes)
    loss, of_equals = worst_node(plan, problem), worst_node(plan, alike)
    assert loss is not None
    assert (loss.name, loss.rate, loss.whole) == ("a-0", 2.0, 10.0), "what B prefills, no A decodes"
    assert loss.whole == plan.served_rate()
    assert of_equals is not None
    assert (of_equals.name, of_equals.rate, of_equals.whole) == ("a-0", 3.0, 10.0)


@given(problems(max_gpus=6, family=SMALL_FAMILY))
def test_what_is_left_is_what_the_replicas_elsewhere_have(problem: PlacementProblem) -> None:
    plan = plan_or_none(problem)
    if plan is None:
        assume(False)
    loss = worst_node(plan, problem)
    assume(loss is not None)
    assert loss is not None
    assert 0.0 <= loss.share <= 1.0 + 1e-9
    left = [r for r in plan.replicas if not any(name.startswith(f"{loss.name}/") for name in r.devices())]
    rates = {role: sum(r.rate for r in left if r.role is role) for role in Role}
    assert loss.rate <= rates[Role.UNIFIED] + min(rates[Role.PREFILL], rates[Role.DECODE]) + 1e-9
    assert loss.rate >= rates[Role.UNIFIED] - 1e-9
    if not plan.kv_routes:
        assert loss.rate == pytest.approx(rates[Role.UNIFIED])
    zone = worst_zone(plan, problem)
    assert (zone is None) == (len(problem.cluster.zones()) == 1)
    assert zone is None or zone.rate <= loss.rate + 1e-9
