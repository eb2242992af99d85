"""The checker accepts sound plans, agrees with numbers worked out by hand, and rejects every kind of broken plan."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis.solver.check import Rule, check_plan
from hetis.solver.check.rederive import Rederivation
from hetis.solver.check.replica_shapes import Fleet, replica_shape
from hetis.solver.cluster import Link, Network
from hetis.solver.plan import (
    AttentionWorkerPool,
    ClassPrice,
    Objective,
    ObjectiveKind,
    Plan,
    StagePlan,
    Status,
)
from hetis.solver.problem import EXPLICIT_LINKS, LINKS_TO_ANY, OWN_LINKS, PlacementProblem
from tests.solver.claimed_plans import claimed, counted, derived_of, plan_of, rules, unclaimed
from tests.solver.instances import (
    FREE_FAMILY,
    NO_LIMITS,
    make_model,
    make_node,
    make_problem,
    make_profile,
)

A_STAGE = StagePlan(
    gpu="A", tp=2, copies=1, first_layer=0, num_layers=3, devices=("a-0/0", "a-0/1"), kv_head_groups_kept=1
)
B_STAGE = StagePlan(
    gpu="B", tp=1, copies=2, first_layer=3, num_layers=3, devices=("b-0/0", "b-1/0"), kv_head_groups_kept=1
)
C_POOL = AttentionWorkerPool(stage=1, gpu="C", devices=("c/0", "c/1"), kv_head_groups=1)
A_ALONE = replace(A_STAGE, tp=1, num_layers=6, devices=("a-1/0",), kv_head_groups_kept=2)


def the_problem(*, objective: Objective = NO_LIMITS, **family: object) -> PlacementProblem:
    """Four A and two B on nodes of two, two C on one node, all in the east; a node of four A in the west."""
    nodes = [
        make_node("a", "A", gpus=2, nodes=2, zone="east"),
        make_node("b", "B", gpus=2, nodes=2, zone="east"),
        make_node("c", "C", gpus=2, zone="east"),
        make_node("w", "A", gpus=4, zone="west"),
    ]
    model = make_model(num_layers=6, kv_heads=2, forbidden_cuts=frozenset({2}))
    return make_problem(nodes, model=model, objective=objective, family=replace(FREE_FAMILY, **family))  # type: ignore[arg-type]


def sound(problem: PlacementProblem) -> Plan:
    """Two replicas: A with tensor parallelism before two copies of B with attention workers on C; one A alone."""
    first = claimed(unclaimed(A_STAGE, B_STAGE, pools=(C_POOL,)), problem)
    return plan_of(problem, first, claimed(unclaimed(A_ALONE), problem))


def test_what_is_derived_alone_is_what_is_derived_with_all_else() -> None:
    problem = the_problem()
    derivation, fleet = Rederivation(problem), Fleet.of(problem.cluster)
    for replica in sound(problem).replicas:
        shape = replica_shape(replica, problem, fleet)
        whole = derivation.of(shape)
        assert (derivation.rate(shape), derivation.chunk_s(shape)) == (whole.rate, whole.chunk_s)


# --- sound plans


@pytest.mark.parametrize("kind", list(ObjectiveKind))
def test_sound_plan_has_no_violations(kind: ObjectiveKind) -> None:
    problem = the_problem(objective=Objective(kind=kind, ttft_limit_s=5.0, tpot_limit_s=5.0, demand_rps=1.0))
    assert check_plan(sound(problem), problem) == ()


@given(st.floats(0.5, 1.0), st.sampled_from((0.0, 1e-7, 0.3)))
def test_plan_may_claim_less_than_its_rate_where_links_are_uneven(share: float, gap: float) -> None:
    problem = the_problem()
    replica = claimed(unclaimed(A_STAGE, B_STAGE, pools=(C_POOL,)), problem, share=share)
    assert check_plan(plan_of(problem, replica, gap=gap), problem) == ()


def test_a_plan_that_claims_less_than_its_rate_has_the_latency_that_it_claims() -> None:
    problem = the_problem()
    replica = claimed(unclaimed(A_STAGE, B_STAGE, pools=(C_POOL,)), problem, share=0.5)
    derived = derived_of(replica, problem)
    tpot_s, ttft_s = derived.t_s * derived.tpot_per_t, derived.ttft_s(derived.t_s)
    assert replica.tpot_s == pytest.approx(2 * tpot_s)
    for limits, expected in (
        ((None, 1.5 * tpot_s), {Rule.TPOT_LIMIT}),
        ((None, 2.1 * tpot_s), set()),
        (((ttft_s + replica.ttft_s) / 2, None), {Rule.TTFT_LIMIT}),
        ((1.01 * replica.ttft_s, None), set()),
    ):
        limited = replace(problem, objective=replace(problem.objective, ttft_limit_s=limits[0], tpot_limit_s=limits[1]))
        assert rules(plan_of(limited, replica), limited) == expected


@pytest.mark.parametrize(("share", "expected"), [(0.5, {Rule.RATE}), (1 - 1e-5, {Rule.RATE}), (1.0, set())])
def test_plan_must_claim_its_rate_where_all_links_are_even(share: float, expected: set[Rule]) -> None:
    """Rate, value and bound all halved: nothing in the result reveals it."""
    problem = make_problem([make_node("a", "A", nodes=2)], family=FREE_FAMILY)
    stage = replace(A_STAGE, tp=1, devices=("a-0/0",), kv_head_groups_kept=2)
    replica = unclaimed(stage, replace(stage, first_layer=3, devices=("a-1/0",)))
    assert rules(plan_of(problem, claimed(replica, problem, share=share), gap=0.0), problem) == expected
    pair = {("a-0", "a-1"): Link(bytes_per_s=5e8, latency_s=1e-5)}
    named = replace(problem.cluster, network=replace(problem.cluster.network, between_nodes=pair))
    uneven = replace(problem, cluster=named)
    assert rules(plan_of(uneven, claimed(replica, uneven, share=share), gap=0.0), uneven) == set()


def test_class_table_that_counts_right_is_sound() -> None:
    problem = the_problem()
    assert check_plan(replace(sound(problem), prices=RIGHT_TABLE), problem) == ()


def test_infeasible_result_without_replicas_is_sound() -> None:
    problem = the_problem()
    nothing = replace(sound(problem), replicas=(), prices=())
    infeasible = replace(nothing.result, status=Status.INFEASIBLE, value=0.0, bound=0.0, gap=0.0)
    assert check_plan(replace(nothing, result=infeasible), problem) == ()
    for number in ({"value": 100.0}, {"bound": 3.0}, {"gap": 7.0}):
        claiming = replace(nothing, result=replace(infeasible, **number))
        assert [violation.rule for violation in check_plan(claiming, problem)] == [Rule.STATUS]


# --- broken plans: each kind is detected, and by its own rule alone; claims near their limits are in test_rounding

Mutation = Callable[[Plan], Plan]
RIGHT_TABLE = (
    ClassPrice(gpu="A", zone="east", gpus_per_node=2, available=4, used=3, as_attention_workers=0, dual=1.0),
    ClassPrice(gpu="B", zone="east", gpus_per_node=2, available=4, used=2, as_attention_workers=0, dual=0.0),
    ClassPrice(gpu="C", zone="east", gpus_per_node=2, available=2, used=2, as_attention_workers=2, dual=0.0),
    ClassPrice(gpu="A", zone="west", gpus_per_node=4, available=4, used=0, as_attention_workers=0, dual=1.0),
)


HALVES_OF_THE_WEST = (replace(RIGHT_TABLE[3], available=2),) * 2


def replica_with(number: int = 0, **changes: object) -> Mutation:
    def mutate(plan: Plan) -> Plan:
        replicas = list(plan.replicas)
        replicas[number] = replace(replicas[number], **changes)  # type: ignore[arg-type]
        return replace(plan, replicas=tuple(replicas))

    return mutate


def stages(a: StagePlan = A_STAGE, b: StagePlan = B_STAGE) -> Mutation:
    return replica_with(stages=(a, b))


def pools(*pool: AttentionWorkerPool) -> Mutation:
    return replica_with(attention_workers=pool)


def scaled(name: str, factor: float, number: int = 0) -> Mutation:
    return lambda plan: replica_with(number, **{name: getattr(plan.replicas[number], name) * factor})(plan)


def result_with(**changes: object) -> Mutation:
    return lambda plan: replace(plan, result=replace(plan.result, **changes))  # type: ignore[arg-type]


def with_result_of_rates(plan: Plan) -> Plan:
    """Return the plan with the goodput that its replicas claim."""
    value = 0.9 * sum(replica.rate for replica in plan.replicas)
    return result_with(value=value, bound=value * (1 + plan.result.gap))(plan)


def table_row(row: int, **changes: object) -> Mutation:
    rows = list(RIGHT_TABLE)
    rows[row] = replace(rows[row], **changes)  # type: ignore[arg-type]
    return lambda plan: replace(plan, prices=tuple(rows))


BROKEN: list[tuple[str, Rule, Mutation]] = [
    ("unknown node", Rule.KNOWN_DEVICE, stages(a=replace(A_STAGE, devices=("x/0", "a-0/1")))),
    ("unknown index", Rule.KNOWN_DEVICE, stages(a=replace(A_STAGE, devices=("a-0/0", "a-0/2")))),
    ("unknown pool device", Rule.KNOWN_DEVICE, pools(replace(C_POOL, devices=("c/0", "c/7")))),
    ("device twice in a stage", Rule.DEVICE_ONCE, stages(a=replace(A_STAGE, devices=("a-0/0", "a-0/0")))),
    (
        "device in two replicas",
        Rule.DEVICE_ONCE,
        replica_with(1, stages=(replace(A_ALONE, devices=("a-0/1",)),)),
    ),
    ("device twice in a pool", Rule.DEVICE_ONCE, pools(replace(C_POOL, devices=("c/0", "c/0")))),
    ("too few devices", Rule.DEVICE_COUNT, stages(b=replace(B_STAGE, devices=("b-0/0",)))),
    (
        "too many devices",
        Rule.DEVICE_COUNT,
        replica_with(1, stages=(replace(A_ALONE, devices=("a-1/0", "a-1/1")),)),
    ),
    ("no devices", Rule.DEVICE_COUNT, replica_with(1, stages=(replace(A_ALONE, devices=()),))),
    ("pool not a multiple of copies", Rule.DEVICE_COUNT, pools(replace(C_POOL, devices=("c/0",)))),
    ("stage of another type", Rule.GPU_TYPE, stages(b=replace(B_STAGE, devices=("b-0/0", "a-1/1")))),
    ("pool of another type", Rule.GPU_TYPE, pools(replace(C_POOL, devices=("c/0", "b-0/1")))),
    ("TP group on two nodes", Rule.TP_NODE, stages(a=replace(A_STAGE, devices=("a-0/0", "a-1/1")))),
    (
        "TP size that divides no heads",
        Rule.TP_SIZE,
        replica_with(1, stages=(replace(A_ALONE, tp=3, devices=("w/0", "w/1", "w/2")),)),
    ),
    ("TP size of 0", Rule.TP_SIZE, replica_with(1, stages=(replace(A_ALONE, tp=0, devices=()),))),
    ("no copies", Rule.COPIES, replica_with(1, stages=(replace(A_ALONE, copies=0, devices=()),))),
    (
        "stage in two zones",
        Rule.STAGE_ZONE,
        replica_with(1, stages=(replace(A_ALONE, copies=2, devices=("a-1/0", "w/0")),)),
    ),
    ("first layers missing", Rule.LAYERS, stages(a=replace(A_STAGE, first_layer=1, num_layers=2))),
    ("layer twice", Rule.LAYERS, stages(b=replace(B_STAGE, first_layer=2, num_layers=4))),
    ("layer missing", Rule.LAYERS, stages(a=replace(A_STAGE, num_layers=2))),
    ("last layer missing", Rule.LAYERS, stages(b=replace(B_STAGE, num_layers=2))),
    ("beyond the last layer", Rule.LAYERS, stages(b=replace(B_STAGE, num_layers=4))),
    ("wrong order", Rule.LAYERS, stages(a=replace(A_STAGE, first_layer=3), b=replace(B_STAGE, first_layer=0))),
    ("no stages", Rule.LAYERS, replica_with(1, stages=())),
    (
        "stage without layers",
        Rule.STAGE_LAYERS,
        stages(a=replace(A_STAGE, num_layers=0), b=replace(B_STAGE, first_layer=0, num_layers=6)),
    ),
    (
        "forbidden cut",
        Rule.CUT,
        stages(a=replace(A_STAGE, num_layers=2), b=replace(B_STAGE, first_layer=2, num_layers=4)),
    ),
    (
        "pool of no stage",
        Rule.POOL_STAGE,
        pools(C_POOL, replace(C_POOL, stage=2, devices=("b-0/1", "b-1/1"), gpu="B")),
    ),
    (
        "second pool of a stage",
        Rule.POOL_STAGE,
        pools(C_POOL, replace(C_POOL, devices=("b-0/1", "b-1/1"), gpu="B")),
    ),
    ("empty pool", Rule.POOL_SIZE, pools(replace(C_POOL, devices=()))),
    ("pool in another zone", Rule.POOL_ZONE, pools(replace(C_POOL, gpu="A", devices=("w/0", "w/1")))),
    ("head group missing", Rule.HEAD_GROUPS, stages(b=replace(B_STAGE, kv_head_groups_kept=0))),
    ("head group twice", Rule.HEAD_GROUPS, stages(b=replace(B_STAGE, kv_head_groups_kept=2))),
    ("head groups on no pool", Rule.HEAD_GROUPS, stages(a=replace(A_STAGE, kv_head_groups_kept=0))),
    (
        "pool without head groups",
        Rule.HEAD_GROUPS,
        lambda plan: stages(b=replace(B_STAGE, kv_head_groups_kept=2))(pools(replace(C_POOL, kv_head_groups=0))(plan)),
    ),
    (
        "negative head groups",
        Rule.HEAD_GROUPS,
        lambda plan: stages(b=replace(B_STAGE, kv_head_groups_kept=-1))(pools(replace(C_POOL, kv_head_groups=3))(plan)),
    ),
    ("micro-batch of 0", Rule.SETTING, replica_with(micro_batch=0)),
    ("micro-batch not in the family", Rule.SETTING, replica_with(micro_batch=5)),
    ("in flight not in the family", Rule.SETTING, replica_with(in_flight=5)),
    ("chunk not in the family", Rule.SETTING, replica_with(chunk_tokens=65)),
    ("fewer in flight than copies", Rule.IN_FLIGHT, replica_with(in_flight=2)),
    ("rate too high", Rule.RATE, lambda plan: with_result_of_rates(scaled("rate", 1.00001)(plan))),
    ("no KV room", Rule.KV_TOKENS, replica_with(kv_tokens=0)),
    ("rate not a number", Rule.FINITE, replica_with(rate=math.nan)),
    ("infinite TTFT", Rule.FINITE, replica_with(ttft_s=math.inf)),
    ("negative TPOT", Rule.FINITE, replica_with(tpot_s=-1.0)),
    ("negative KV room", Rule.FINITE, replica_with(kv_tokens=-1)),
    ("value not a number", Rule.FINITE, result_with(value=math.nan)),
    ("infinite bound", Rule.FINITE, result_with(bound=math.inf)),
    ("infinite gap", Rule.FINITE, result_with(gap=math.inf)),
    ("negative time", Rule.FINITE, result_with(solve_s=-1.0)),
    ("dual not a number", Rule.FINITE, table_row(0, dual=math.nan)),
    ("negative dual", Rule.FINITE, table_row(0, dual=-5.0)),
    ("another family", Rule.FAMILY, lambda plan: replace(plan, family="anything at all")),
    ("another objective", Rule.OBJECTIVE, result_with(objective=ObjectiveKind.THROUGHPUT)),
    ("another unit", Rule.OBJECTIVE, result_with(unit="USD/h")),
    ("another limit", Rule.OBJECTIVE, lambda plan: replace(plan, objective=Objective(tpot_limit_s=9.0))),
    ("infeasible with replicas", Rule.STATUS, result_with(status=Status.INFEASIBLE)),
    ("table counts too many", Rule.PRICES, table_row(0, available=5)),
    ("table counts unused devices", Rule.PRICES, table_row(1, used=3)),
    ("table counts too few workers", Rule.PRICES, table_row(2, as_attention_workers=1)),
    ("table names an unknown class", Rule.PRICES, table_row(3, gpus_per_node=8)),
    ("table leaves a class out", Rule.PRICES, lambda plan: replace(plan, prices=RIGHT_TABLE[:3])),
    (
        "table lists a class twice",
        Rule.PRICES,
        lambda plan: replace(plan, prices=(*RIGHT_TABLE, RIGHT_TABLE[3])),
    ),
    (
        "table splits a class",
        Rule.PRICES,
        lambda plan: replace(plan, prices=(*RIGHT_TABLE[:3], *HALVES_OF_THE_WEST)),
    ),
    ("no table", Rule.PRICES, lambda plan: replace(plan, prices=())),
]


@pytest.mark.parametrize(("rule", "mutate"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_broken_plan_is_caught_by_its_own_rule_alone(rule: Rule, mutate: Mutation) -> None:
    problem = the_problem()
    plan = sound(problem)
    broken = mutate(plan)
    if broken.prices == plan.prices:  # devices may have changed: recount them, so that the class table is right
        broken = counted(broken, problem)
    assert rules(broken, problem) == {rule}


SMALLER_FAMILIES: list[tuple[Rule, dict[str, object]]] = [
    (Rule.POOL_SIZE, {"max_pool": 0}),
    (Rule.ONE_TYPE, {"mixed_types": False}),
    (Rule.TP_SIZE, {"tp_sizes": (1,)}),
]


@pytest.mark.parametrize(("rule", "smaller"), SMALLER_FAMILIES)
def test_plan_outside_the_family_is_caught(rule: Rule, smaller: dict[str, object]) -> None:
    problem = the_problem(**smaller)  # type: ignore[arg-type]
    assert rules(replace(sound(the_problem()), family=problem.family.describe()), problem) == {rule}


def test_uneven_layers_are_caught_where_the_family_forbids_them() -> None:
    problem, even = the_problem(), the_problem(uneven_layers=False)
    uneven = unclaimed(replace(A_STAGE, num_layers=4), replace(B_STAGE, first_layer=4, num_layers=2), pools=(C_POOL,))
    plan = plan_of(problem, claimed(uneven, problem))
    assert rules(plan, problem) == set()
    assert rules(replace(plan, family=even.family.describe()), even) == {Rule.EQUAL_LAYERS}
    assert rules(sound(even), even) == set()


def with_usable_bytes(problem: PlacementProblem, gpu: str, usable_bytes: int) -> PlacementProblem:
    return replace(problem, profiles={**problem.profiles, gpu: make_profile(gpu, usable_bytes=usable_bytes)})


@pytest.mark.parametrize(("gpu", "rule"), [("A", Rule.RANK_MEMORY), ("C", Rule.WORKER_MEMORY)])
def test_memory_is_checked_on_ranks_and_attention_workers(gpu: str, rule: Rule) -> None:
    problem = the_problem()
    replica = unclaimed(A_STAGE, B_STAGE, pools=(C_POOL,))
    needed = max(
        use.num_bytes for use in derived_of(replica, problem).memory if use.rule is rule and gpu_of(use.where) == gpu
    )
    for usable_bytes, expected in ((math.ceil(needed), set()), (math.floor(needed) - 1, {rule})):
        tight = with_usable_bytes(problem, gpu, usable_bytes)
        assert rules(plan_of(tight, claimed(replica, tight)), tight) == expected


def gpu_of(where: str) -> str:
    return {"stage 1": "A", "stage 2": "B", "attention workers of stage 2": "C"}[where]


def test_memory_violation_names_bytes_and_limit() -> None:
    problem = with_usable_bytes(the_problem(), "A", 2_000_000)
    replica = claimed(unclaimed(A_ALONE), the_problem())
    violation = check_plan(plan_of(problem, replace(replica, kv_tokens=0)), problem)[0]
    needed = derived_of(replica, problem).memory[0].num_bytes
    assert violation.where == "replica 0 stage 1"
    assert violation.message == f"a device must hold {needed:.0f} bytes, 2000000 bytes are usable"


@pytest.mark.parametrize("kind", [ObjectiveKind.COST, ObjectiveKind.GPUS])
def test_bound_above_the_value_and_another_value_are_caught(kind: ObjectiveKind) -> None:
    objective = replace(NO_LIMITS, kind=kind, demand_rps=1.0)
    problem = the_problem(objective=objective)
    replica = claimed(unclaimed(A_ALONE), problem)
    assert rules(result_with(bound=1.001)(plan_of(problem, replica)), problem) == {Rule.BOUND}
    assert rules(result_with(value=2.0, bound=2.0, gap=0.0)(plan_of(problem, replica)), problem) == {Rule.VALUE}


def test_traffic_between_zones_must_fit_the_link() -> None:
    """Two replicas whose stages lie in different zones: each fits the link, both together do not."""
    nodes = [make_node("e", "A", gpus=2, zone="east"), make_node("w", "A", gpus=2, zone="west")]
    slow = Link(bytes_per_s=2e6, latency_s=0.0)
    network = Network(default=Link(bytes_per_s=5e8, latency_s=0.0), between_zones={("west", "east"): slow})
    problem = make_problem(nodes, network=network, family=FREE_FAMILY)
    east = replace(A_STAGE, tp=1, devices=("e/0",), kv_head_groups_kept=2)
    west = replace(east, first_layer=3, devices=("w/0",))
    one = claimed(unclaimed(east, west), problem)
    other = replace(one, stages=(replace(east, devices=("e/1",)), replace(west, devices=("w/1",))))
    back = replace(one, stages=(replace(east, devices=("w/1",)), replace(west, devices=("e/1",))))
    assert rules(plan_of(problem, one), problem) == set()
    assert rules(plan_of(problem, one, other), problem) == {Rule.LINK_CAPACITY}
    assert rules(plan_of(problem, one, back), problem) == set()  # the link has the same capacity in the other direction


def test_explicit_node_link_slows_only_the_stages_that_use_it() -> None:
    nodes = [make_node("a", "A", nodes=3)]
    pair = {("a-1", "a-0"): Link(bytes_per_s=1e6, latency_s=1e-2)}
    network = Network(default=Link(bytes_per_s=5e8, latency_s=0.0), between_nodes=pair)
    problem = make_problem(nodes, network=network, family=FREE_FAMILY)
    stage = replace(A_STAGE, tp=1, devices=("a-0/0",), kv_head_groups_kept=2)
    slow = unclaimed(stage, replace(stage, first_layer=3, devices=("a-1/0",)))
    fast = unclaimed(stage, replace(stage, first_layer=3, devices=("a-2/0",)))
    assert derived_of(slow, problem).rate < 0.5 * derived_of(fast, problem).rate
    moved = replace(claimed(fast, problem), stages=slow.stages)
    assert Rule.RATE in rules(plan_of(problem, moved), problem)
    older = plan_of(problem, claimed(fast, problem))
    assert rules(older, problem) == set(), "plans that do not mention explicit links"
    assert OWN_LINKS in problem.describe_family()
    assert rules(replace(older, family=problem.describe_family()), problem) == set()
    for earlier in (EXPLICIT_LINKS, LINKS_TO_ANY):
        in_words = problem.describe_family().replace(OWN_LINKS, earlier)
        assert rules(replace(older, family=in_words), problem) == set(), "plans by the worst link of a group or node"


def test_broken_replica_does_not_hide_the_next() -> None:
    problem = the_problem()
    plan = scaled("rate", 1.01, number=1)(stages(a=replace(A_STAGE, tp=3))(sound(problem)))
    assert {v.where.split()[1] for v in check_plan(plan, problem) if v.where.startswith("replica")} == {"0", "1"}
