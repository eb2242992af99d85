"""The checker on constraints: one plan breaks each; another, which differs only in that respect, keeps it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hetis.solver.check import Rule, check_plan
from hetis.solver.check.replica_shapes import Fleet
from hetis.solver.constraints import (
    AtMost,
    Constraint,
    Duty,
    Exclude,
    Replicas,
    RestrictRole,
    Selection,
    Sum,
    Unit,
    Use,
    WithoutTp,
    WithoutWorkers,
)
from hetis.solver.plan import AttentionWorkerPool, KvRoute, Plan, Role, StagePlan
from hetis.solver.problem import PlacementProblem
from tests.solver.claimed_plans import plan_of, unclaimed
from tests.solver.instances import make_node, make_problem

STAGE = StagePlan(
    gpu="A", tp=2, copies=1, first_layer=0, num_layers=6, devices=("a-0/0", "a-0/1"), kv_head_groups_kept=1
)
POOL = AttentionWorkerPool(stage=0, gpu="C", devices=("c/0",), kv_head_groups=1)
ALONE = replace(STAGE, tp=1, devices=("a-1/0",), kv_head_groups_kept=2)


def the_problem() -> PlacementProblem:
    nodes = [make_node("a", "A", gpus=2, nodes=2, zone="east"), make_node("c", "C", gpus=2, zone="east")]
    return make_problem([*nodes, make_node("w", "B", zone="west")], usd_per_hour={"A": 2.0, "B": 1.0, "C": 0.5})


def the_plan(problem: PlacementProblem) -> Plan:
    """A unified replica of TP 2 with an attention worker, a prefill and a decode replica: four A, one C and one B."""
    one = unclaimed(replace(STAGE, kv_head_groups_kept=0), pools=(POOL,))
    prefill = unclaimed(ALONE, role=Role.PREFILL, kv_zones=("east",))
    decode = unclaimed(replace(ALONE, gpu="B", devices=("w/0",)), role=Role.DECODE)
    return replace(plan_of(problem, one, prefill, decode), kv_routes=(KvRoute(prefill=1, decode=2, rate=1.0),))


def of(unit: Unit, name: str) -> Selection:
    return Selection(unit=unit, name=name)


def only(unit: Unit, name: str, duty: Duty) -> RestrictRole:
    return RestrictRole(gpus=of(unit, name), duty=duty, only=True)


def never(unit: Unit, name: str, duty: Duty) -> RestrictRole:
    return RestrictRole(gpus=of(unit, name), duty=duty, only=False)


KEPT_AND_BROKEN: list[tuple[Constraint, Constraint]] = [
    (Exclude(gpus=of(Unit.GPU, "a-1/1")), Exclude(gpus=of(Unit.GPU, "a-1/0"))),
    (Exclude(gpus=of(Unit.GPU, "c/1")), Exclude(gpus=of(Unit.GPU, "c/0"))),
    (Exclude(gpus=of(Unit.GPU, "c/1")), Exclude(gpus=of(Unit.NODE, "c"))),
    (Exclude(gpus=of(Unit.GPU, "c/1")), Exclude(gpus=of(Unit.TYPE, "B"))),
    (Exclude(gpus=of(Unit.GPU, "c/1")), Exclude(gpus=of(Unit.ZONE, "west"))),
    (only(Unit.TYPE, "C", Duty.WORKER), only(Unit.TYPE, "A", Duty.WORKER)),
    (never(Unit.TYPE, "C", Duty.PRIMARY), never(Unit.TYPE, "C", Duty.WORKER)),
    (only(Unit.NODE, "a-1", Duty.PREFILL), only(Unit.NODE, "a-0", Duty.PREFILL)),
    (only(Unit.TYPE, "B", Duty.DECODE), never(Unit.TYPE, "B", Duty.DECODE)),
    (only(Unit.TYPE, "C", Duty.UNIFIED), never(Unit.TYPE, "C", Duty.UNIFIED)),
    (Use(gpus=of(Unit.TYPE, "A"), least=3), Use(gpus=of(Unit.TYPE, "A"), least=4)),
    (Use(gpus=of(Unit.NODE, "c"), least=1), Use(gpus=of(Unit.NODE, "c"), least=2)),
    (WithoutTp(tp=4), WithoutTp(tp=2)),
    (WithoutTp(tp=4), WithoutTp(tp=1)),
    (Replicas(least=3, most=3), Replicas(least=4, most=None)),
    (Replicas(least=0, most=3), Replicas(least=0, most=2)),
    (AtMost(of=Sum.GPUS, most=5), AtMost(of=Sum.GPUS, most=4)),
    (AtMost(of=Sum.USD, most=7.5), AtMost(of=Sum.USD, most=7.4)),
]  # fmt: skip


@pytest.mark.parametrize(("kept", "broken"), KEPT_AND_BROKEN, ids=str)
def test_what_breaks_a_constraint_is_seen_and_nothing_else(kept: Constraint, broken: Constraint) -> None:
    problem = the_problem()
    plan = the_plan(problem)
    asked = replace(problem, constraints=(kept, broken))
    found = {violation.where for violation in check_plan(plan, asked) if violation.rule is Rule.CONSTRAINT}
    assert found == {str(broken)}


@pytest.mark.parametrize("broken", [Use(gpus=of(Unit.TYPE, "B"), least=1), Replicas(least=3, most=3)], ids=str)
def test_replicas_that_no_kv_leaves_or_reaches_keep_no_pin(broken: Constraint) -> None:
    problem = the_problem()
    idle = replace(the_plan(problem), kv_routes=())
    asked = replace(problem, constraints=(broken,))
    assert {v.where for v in check_plan(idle, asked) if v.rule is Rule.CONSTRAINT} == {str(broken)}


def test_copies_that_share_experts_on_as_many_gpus_break_a_constraint_on_a_tp_size() -> None:
    problem = the_problem()
    stage = replace(ALONE, copies=2, devices=("a-0/0", "a-0/1"))
    apart = plan_of(problem, unclaimed(stage))
    together = replace(apart, replicas=(replace(apart.replicas[0], expert_parallel=True),))
    asked = replace(problem, constraints=(WithoutTp(tp=2), WithoutTp(tp=4)))
    for plan, broken in ((apart, set[str]()), (together, {"--forbid tp=2"})):
        assert {v.where for v in check_plan(plan, asked) if v.rule is Rule.CONSTRAINT} == broken


def test_attention_workers_break_a_constraint_for_none() -> None:
    problem = the_problem()
    asked = replace(problem, constraints=(WithoutWorkers(),))
    with_workers = the_plan(problem)
    without = plan_of(problem, unclaimed(STAGE))
    assert [v.rule for v in check_plan(with_workers, asked) if v.rule is Rule.CONSTRAINT] == [Rule.CONSTRAINT]
    assert not [v for v in check_plan(without, asked) if v.rule is Rule.CONSTRAINT]


@pytest.mark.parametrize("indices", [(), (5, 1), (0, 7)])
def test_gpus_of_a_node_with_two_types_have_the_price_of_their_own(indices: tuple[int, ...]) -> None:
    problem = the_problem()
    (node,) = (group for group in problem.cluster.node_groups if group.name == "c")
    (slots,) = node.gpus
    priced = (replace(slots, count=1, usd_per_hour=9.0), replace(slots, gpu="B", count=1))
    mixed = replace(node, gpus=priced, indices=indices)
    groups = tuple(mixed if group.name == "c" else group for group in problem.cluster.node_groups)
    problem = replace(problem, cluster=replace(problem.cluster, node_groups=groups))
    second = plan_of(problem, unclaimed(replace(ALONE, gpu="B", devices=(f"c/{[*indices, 1, 1][1]}",))))
    for most, is_kept in ((1.0, True), (0.99, False)):
        asked = replace(problem, constraints=(AtMost(of=Sum.USD, most=most),))
        assert is_kept == (Rule.CONSTRAINT not in {v.rule for v in check_plan(second, asked)})


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (Exclude(gpus=of(Unit.TYPE, "C")), "c/0 is used"),
        (Exclude(gpus=of(Unit.TYPE, "A")), "a-0/0, a-0/1, a-1/0 are used"),
        (Exclude(gpus=of(Unit.ZONE, "east")), "a-0/0, a-0/1, a-1/0 and 1 more are used"),
    ],
)
def test_a_broken_constraint_names_the_first_devices(constraint: Constraint, message: str) -> None:
    problem = replace(the_problem(), constraints=(constraint,))
    (found,) = (v for v in check_plan(the_plan(the_problem()), problem) if v.rule is Rule.CONSTRAINT)
    assert found.message == message


def test_a_device_that_is_left_out_is_not_called_unknown() -> None:
    problem = replace(the_problem(), constraints=(Exclude(gpus=of(Unit.TYPE, "C")),))
    plan = the_plan(the_problem())
    said = [v.message for v in check_plan(plan, problem) if v.rule is Rule.KNOWN_DEVICE]
    assert said == ["device c/0 is left out by a constraint"]
    moved = replace(plan.replicas[0], stages=(replace(plan.replicas[0].stages[0], devices=("x/0", "x/1")),))
    said = [v.message for v in check_plan(replace(plan, replicas=(moved,)), problem) if v.rule is Rule.KNOWN_DEVICE]
    size = problem.cluster.num_gpus()
    unknown = [f"device x/{index} is not among the {size} devices of the cluster" for index in range(2)]
    assert [one for one in said if "x/" in one] == unknown


def test_what_any_constraint_leaves_out_is_not_in_the_fleet() -> None:
    problem = the_problem()
    out = (Exclude(gpus=of(Unit.GPU, "c/1")), Exclude(gpus=of(Unit.NODE, "a-1")), WithoutTp(tp=4))
    left = {"a-0/0", "a-0/1", "c/0", "w/0"}
    assert set(Fleet.of(problem.cluster).without_left_out(out).devices) == left
