"""The checker on prefill and decode replicas, the routes between them, and cards that several stages share."""

from __future__ import annotations

import math

import pytest

from hetis.solver.check import Rule, check_plan
from hetis.solver.check.replica_shapes import Fleet
from hetis.solver.check.result import check_routes
from hetis.solver.cluster import Link, Network
from hetis.solver.constraints import Duty, RestrictRole, Selection, Unit
from hetis.solver.engine_rules import EngineRules, Family
from hetis.solver.placement.families import run_by
from hetis.solver.plan import AttentionWorkerPool, KvRoute, Objective, ObjectiveKind, Plan, Role, StagePlan
from hetis.solver.problem import PlacementProblem
from hetis.solver.profile import Op, Piece
from tests.models import replace
from tests.solver.check.test_check import Mutation, replica_with
from tests.solver.claimed_plans import claimed, counted, derived_of, plan_of, rules, unclaimed
from tests.solver.instances import (
    FREE_FAMILY,
    NO_LIMITS,
    make_node,
    make_problem,
    make_profile,
)

FAST = Link(bytes_per_s=5e8, latency_s=1e-5)
BETWEEN = Link(bytes_per_s=4e8, latency_s=1e-3)
EVERYWHERE = ("east", "west")

WHOLE = StagePlan(gpu="A", tp=1, copies=1, first_layer=0, num_layers=6, devices=("a-0/0",), kv_head_groups_kept=2)
P_STAGE = replace(WHOLE, tp=2, devices=("a-0/0", "a-0/1"), kv_head_groups_kept=1)
D_STAGE = replace(WHOLE, gpu="B", copies=2, devices=("b-0/0", "b-1/0"), kv_head_groups_kept=1)
D_POOL = AttentionWorkerPool(stage=0, gpu="C", devices=("c/0", "c/1"), kv_head_groups=1)
FAR_STAGE = replace(WHOLE, devices=("w/0",))
UNIFIED_STAGE = replace(WHOLE, devices=("w/1",))


def the_problem(*, objective: Objective = NO_LIMITS, between: Link = BETWEEN, **family: object) -> PlacementProblem:
    """Four A, four B and two C in the east; four A in the west."""
    nodes = [
        make_node("a", "A", gpus=2, nodes=2, zone="east"),
        make_node("b", "B", gpus=2, nodes=2, zone="east"),
        make_node("c", "C", gpus=2, zone="east"),
        make_node("w", "A", gpus=4, zone="west"),
    ]
    return make_problem(
        nodes,
        network=Network(default=FAST, zone_default=between),
        objective=objective,
        family=replace(FREE_FAMILY, **family),  # type: ignore[arg-type]
    )


def sound(problem: PlacementProblem) -> Plan:
    """Prompts of replica 0 (east) are decoded by 1 (east, with attention workers) and 2 (west); 3 is unified."""
    replicas = (
        claimed(unclaimed(P_STAGE, role=Role.PREFILL, kv_zones=EVERYWHERE), problem),
        claimed(unclaimed(D_STAGE, pools=(D_POOL,), role=Role.DECODE), problem),
        claimed(unclaimed(FAR_STAGE, role=Role.DECODE), problem),
        claimed(unclaimed(UNIFIED_STAGE), problem),
    )
    most = replicas[0].rate / 2
    routes = (
        KvRoute(prefill=0, decode=1, rate=min(most, replicas[1].rate)),
        KvRoute(prefill=0, decode=2, rate=min(most, replicas[2].rate)),
    )
    return plan_of(problem, *replicas, routes=routes)


# --- sound plans


@pytest.mark.parametrize("kind", list(ObjectiveKind))
def test_sound_plan_with_roles_has_no_violations(kind: ObjectiveKind) -> None:
    problem = the_problem(objective=Objective(kind=kind, ttft_limit_s=5.0, tpot_limit_s=5.0, demand_rps=1.0))
    assert check_plan(sound(problem), problem) == ()


def test_prefill_replica_may_send_inside_its_zone_alone_and_then_owes_nothing_to_other_links() -> None:
    problem = the_problem(between=Link(bytes_per_s=1e6, latency_s=0.5))
    inside = unclaimed(P_STAGE, role=Role.PREFILL, kv_zones=("east",))
    everywhere = replace(inside, kv_zones=EVERYWHERE)
    assert derived_of(inside, problem).rate > 2 * derived_of(everywhere, problem).rate
    assert derived_of(inside, problem).landing_s + 0.5 < derived_of(everywhere, problem).landing_s
    assert rules(plan_of(problem, claimed(inside, problem), gap=0.0), problem) == set()


def test_replica_without_routes_adds_nothing() -> None:
    problem = the_problem()
    plan = sound(problem)
    idle = plan_of(problem, *plan.replicas)
    assert idle.result.value == pytest.approx(0.9 * plan.replicas[3].rate)
    assert rules(idle, problem) == set()


def test_kv_for_an_engine_stays_with_one_vendor_and_in_one_zone_where_there_are_several() -> None:
    problem = the_problem()
    plan = sound(problem)
    rules_of = EngineRules(name="vllm")
    engine = replace(problem, family=replace(run_by(problem.family, rules_of), max_pool=problem.family.max_pool))
    assert plan.replicas[1].stages[0].gpu == "B"

    def messages(posed: PlacementProblem) -> list[tuple[str, str]]:
        found = check_routes(plan, posed, Fleet.of(posed.cluster).without_left_out(posed.constraints))
        return [(one.where, one.message) for one in found]

    types = problem.cluster.gpu_types
    of_two = replace(engine.cluster, gpu_types=types | {name: replace(types[name], vendor="AMD") for name in "BC"})
    assert messages(engine) == []
    assert messages(replace(engine, cluster=of_two)) == [
        ("route 0", "leads from A (NVIDIA) to B (AMD), must stay with one vendor"),
        ("route 1", "leads from zone east to west, must stay in one: GPUs of 2 vendors or precisions compute"),
    ]
    assert messages(replace(problem, cluster=of_two)) == [], "any engine knows no vendors"
    across = replace(engine.family, engine=replace(rules_of, kv_vendors=("NVIDIA", "AMD")))
    assert messages(replace(engine, cluster=of_two, family=across)) == []
    to_intel = replace(engine.family, engine=replace(rules_of, kv_vendors=("NVIDIA", "Intel")))
    assert messages(replace(engine, cluster=of_two, family=to_intel)) == messages(replace(engine, cluster=of_two))
    barred = tuple(
        RestrictRole(gpus=Selection(unit=Unit.TYPE, name=name), duty=Duty.PRIMARY, only=False) for name in "BC"
    )
    workers_only = replace(engine, cluster=of_two, constraints=barred)
    assert messages(workers_only)[1:] == [], "what computes no layers counts for nothing"


@pytest.mark.parametrize(
    ("nodes", "wrong"),
    [
        (("a-0", "w"), {"replica 0", "replica 2"}),
        (("a-0", "b-1"), {"replica 0", "replica 1"}),
        (("a-0", "c"), {"replica 0"}),  # attention workers receive their part directly
        (("a-1", "b-0"), set()),  # not between replicas with a route
    ],
)
def test_kv_pays_for_the_explicit_links_between_the_nodes_of_its_route(nodes: tuple[str, str], wrong: set[str]) -> None:
    problem = the_problem()
    slow = {nodes: Link(bytes_per_s=1e4, latency_s=0.01)}
    network = replace(problem.cluster.network, between_nodes=slow)
    linked = replace(problem, cluster=replace(problem.cluster, network=network))
    plan = sound(problem)
    assert check_plan(plan, problem) == ()
    found = {(one.rule, one.where) for one in check_plan(plan, linked)}
    assert {where for rule, where in found if rule is Rule.RATE} == wrong
    assert check_plan(replace(plan, kv_routes=(), result=plan_of(problem, *plan.replicas).result), linked) == ()


# --- broken plans: each kind is detected, and by its own rule alone


def routes(*changed: KvRoute | dict[str, object]) -> Mutation:
    """Return the plan with other routes (whole ones, or changes to the present ones in order) and its new value."""

    def mutate(plan: Plan) -> Plan:
        new = tuple(
            change if isinstance(change, KvRoute) else replace(plan.kv_routes[i], **change)  # type: ignore[arg-type]
            for i, change in enumerate(changed)
        )
        served = plan.replicas[3].rate + sum(route.rate for route in new)
        result = replace(plan.result, value=0.9 * served, bound=0.9 * served * 1.05)
        return replace(plan, kv_routes=new, result=result if math.isfinite(served) else plan.result)

    return mutate


def another(route: int, **changes: object) -> Mutation:
    return lambda plan: routes(*plan.kv_routes, replace(plan.kv_routes[route], rate=1e-6, **changes))(plan)  # type: ignore[arg-type]


def split_over_zones(plan: Plan) -> Plan:
    halves = (
        replace(WHOLE, num_layers=3, devices=("a-1/0",)),
        replace(WHOLE, first_layer=3, num_layers=3, devices=("w/2",)),
    )
    return replica_with(0, stages=halves)(plan)


BROKEN: list[tuple[str, set[Rule], Mutation]] = [
    ("prefill replica that decodes", {Rule.SETTING}, replica_with(0, micro_batch=4)),
    ("prefill replica without chunks", {Rule.SETTING}, replica_with(0, chunk_tokens=0)),
    ("decode replica that prefills", {Rule.SETTING}, replica_with(1, chunk_tokens=64)),
    ("decode replica of nobody", {Rule.SETTING}, replica_with(1, micro_batch=0)),
    ("unified replica without chunks", {Rule.SETTING}, replica_with(3, chunk_tokens=0)),
    ("unified replica that does not decode", {Rule.SETTING}, replica_with(3, micro_batch=0)),
    ("replica over two zones", {Rule.ROLE_ZONE}, split_over_zones),
    ("pool of a prefill replica", {Rule.POOL_STAGE, Rule.HEAD_GROUPS}, lambda plan: _with_prefill_pool(plan)),
    ("prefill replica that sends nowhere", {Rule.KV_ZONES, Rule.ROUTE}, replica_with(0, kv_zones=())),
    ("prefill that sends to another zone alone", {Rule.KV_ZONES, Rule.ROUTE}, replica_with(0, kv_zones=("west",))),
    ("prefill that sends to an unknown zone", {Rule.KV_ZONES}, replica_with(0, kv_zones=("east", "west", "moon"))),
    ("zone listed twice", {Rule.KV_ZONES}, replica_with(0, kv_zones=("east", "west", "west"))),
    ("decode replica that sends KV", {Rule.KV_ZONES}, replica_with(2, kv_zones=("west",))),
    ("unified replica that sends KV", {Rule.KV_ZONES}, replica_with(3, kv_zones=("west",))),
    ("prefill rate too high", {Rule.RATE}, lambda plan: replica_with(0, rate=plan.replicas[0].rate * 1.001)(plan)),
    ("decode rate too high", {Rule.RATE}, lambda plan: replica_with(1, rate=plan.replicas[1].rate * 1.001)(plan)),
    ("TTFT without the landing", {Rule.TTFT}, lambda plan: _ttft_times(plan, 0.999)),
    ("TTFT too high", {Rule.TTFT}, lambda plan: _ttft_times(plan, 2.0)),
    ("TPOT of a prefill replica", {Rule.TPOT}, replica_with(0, tpot_s=0.01)),
    ("TTFT of a decode replica", {Rule.TTFT}, replica_with(1, ttft_s=0.01)),
    ("TPOT too low", {Rule.TPOT}, replica_with(1, tpot_s=0.0)),
    ("KV room of a prefill replica", {Rule.KV_TOKENS}, replica_with(0, kv_tokens=0)),
    ("route from nowhere", {Rule.ROUTE}, another(0, prefill=9)),
    ("route from the last replica, counted backwards", {Rule.ROUTE}, another(0, prefill=-4)),
    ("route to nowhere", {Rule.ROUTE}, another(0, decode=4)),
    ("route from a decode replica", {Rule.ROUTE}, another(0, prefill=2)),
    ("route to a unified replica", {Rule.ROUTE}, another(0, decode=3)),
    ("route to itself", {Rule.ROUTE}, another(0, decode=0)),
    ("route twice", {Rule.ROUTE}, another(0)),
    ("route of no rate", {Rule.FINITE}, routes({}, {"rate": 0.0})),
    ("route of a negative rate", {Rule.FINITE}, routes({}, {"rate": -1.0})),
    ("route that is not a number", {Rule.FINITE}, routes({}, {"rate": math.nan})),
    ("value without the routes", {Rule.VALUE}, lambda plan: replace(plan, kv_routes=())),
    ("prefill replica without stages", {Rule.LAYERS}, replica_with(0, stages=())),
    ("decode replica without stages", {Rule.LAYERS, Rule.POOL_STAGE}, replica_with(1, stages=())),
    ("route outside the zones of its replica", {Rule.ROUTE}, replica_with(0, kv_zones=("east",))),
]  # fmt: skip


def _with_prefill_pool(plan: Plan) -> Plan:
    pool = replace(D_POOL, gpu="A", devices=("a-1/0", "a-1/1"))
    stage = replace(P_STAGE, kv_head_groups_kept=0)
    return replica_with(0, stages=(stage,), attention_workers=(pool,))(plan)


def _ttft_times(plan: Plan, factor: float) -> Plan:
    return replica_with(0, ttft_s=plan.replicas[0].ttft_s * factor)(plan)


@pytest.mark.parametrize(("expected", "mutate"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_broken_plan_is_caught_by_its_own_rule_alone(expected: set[Rule], mutate: Mutation) -> None:
    problem = the_problem()
    assert rules(counted(mutate(sound(problem)), problem), problem) == expected


@pytest.mark.parametrize("side", [0, 1, 2])
def test_flow_above_the_rate_of_either_side_is_caught(side: int) -> None:
    problem = the_problem()
    plan = sound(problem)
    senders = [i for i, route in enumerate(plan.kv_routes) if side in (route.prefill, route.decode)]
    flow = sum(plan.kv_routes[i].rate for i in senders)
    for share, expected in ((1.0, False), (1.0001, True)):
        factor = share * plan.replicas[side].rate / flow
        scaled: list[dict[str, object]] = [
            {"rate": r.rate * factor} if i in senders else {"rate": 1e-3} for i, r in enumerate(plan.kv_routes)
        ]
        found = check_plan(routes(*scaled)(plan), problem)
        where = {v.where for v in found if v.rule is Rule.ROUTE_RATE}
        assert (f"replica {side}" in where) == expected


def test_flow_violation_names_flow_and_rate() -> None:
    problem = the_problem()
    plan = routes({"rate": 1e6}, {})(sound(problem))
    messages = [str(violation) for violation in check_plan(plan, problem)]
    over = 1e6 + plan.kv_routes[1].rate
    assert (
        f"replica 0: routes take {over:.9g} requests/s, the prefill replica's rate is {plan.replicas[0].rate:.9g} "
        "(route_rate)"
    ) in messages


def test_kv_of_routes_and_activations_of_spanning_replicas_share_a_link() -> None:
    """Each flow fits the link between the zones alone; both together do not, but one in the other direction does."""
    nodes = [make_node("e", "A", gpus=2, zone="east"), make_node("w", "A", gpus=2, zone="west")]
    between = Link(bytes_per_s=4e6, latency_s=0.0)
    problem = make_problem(nodes, network=Network(default=FAST, zone_default=between))
    half = replace(WHOLE, num_layers=3, devices=("e/0",))
    spanning = claimed(unclaimed(half, replace(half, first_layer=3, devices=("w/0",))), problem)
    spanning = replace(spanning, rate=3e6 / (160 * 256 * 2))  # (P + O) H s bytes per request: 3 MB/s
    prefill = claimed(unclaimed(replace(WHOLE, devices=("e/1",)), role=Role.PREFILL, kv_zones=EVERYWHERE), problem)
    decode = claimed(unclaimed(replace(WHOLE, devices=("w/1",)), role=Role.DECODE), problem)
    route = KvRoute(prefill=0, decode=1, rate=2e6 / (120 * 6 * 2 * 256))  # P L G kvb bytes per request: 2 MB/s
    assert route.rate < min(prefill.rate, decode.rate)
    assert Rule.LINK_CAPACITY not in rules(plan_of(problem, prefill, decode, routes=(route,)), problem)
    assert Rule.LINK_CAPACITY not in rules(plan_of(problem, spanning), problem)
    both = plan_of(problem, prefill, decode, spanning, routes=(route,))
    overdrawn = [v for v in check_plan(both, problem) if v.rule is Rule.LINK_CAPACITY]
    assert [(v.where, v.message) for v in overdrawn] == [
        ("zones east to west", "replicas send 5e+06 bytes/s, the link carries 4e+06 bytes/s")
    ]
    back = replace(spanning, stages=(replace(half, devices=("w/0",)), replace(half, first_layer=3, devices=("e/0",))))
    assert Rule.LINK_CAPACITY not in rules(plan_of(problem, prefill, decode, back, routes=(route,)), problem)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ({"roles": (Role.UNIFIED,)}, {Rule.ROLE}),
        ({"roles": (Role.PREFILL, Role.DECODE)}, {Rule.ROLE}),
        ({"one_type_per_role": True}, {Rule.ROLE_TYPE}),
    ],
    ids=["no roles", "nothing unified", "one type per role"],
)
def test_plan_outside_the_family_is_caught(family: dict[str, object], expected: set[Rule]) -> None:
    problem = the_problem(**family)  # type: ignore[arg-type]
    assert rules(replace(sound(the_problem()), family=problem.family.describe()), problem) == expected


def test_family_of_a_plan_from_before_there_were_roles_is_that_of_unified_replicas() -> None:
    problem = the_problem(roles=(Role.UNIFIED,))
    plan = plan_of(problem, claimed(unclaimed(UNIFIED_STAGE), problem))
    before, _, of_roles = plan.family.rpartition("; ")
    assert of_roles == "every replica prefills and decodes"
    assert rules(replace(plan, family=before), problem) == set()
    assert rules(replace(plan, family=before), the_problem()) == {Rule.FAMILY}


@pytest.mark.parametrize(("number", "name", "rule"), [(0, "ttft", Rule.TTFT_LIMIT), (1, "tpot", Rule.TPOT_LIMIT)])
def test_latency_of_a_role_above_its_limit_is_caught(number: int, name: str, rule: Rule) -> None:
    problem = the_problem()
    replica = sound(problem).replicas[number]
    latency_s = getattr(replica, f"{name}_s")
    for limit_s, expected in ((latency_s, set()), (latency_s * 0.9999, {rule})):
        limited = replace(problem, objective=replace(NO_LIMITS, **{f"{name}_limit_s": limit_s}))
        assert rules(plan_of(limited, replica, gap=0.0), limited) == expected


# --- cards that several stages share

SHARING = replace(FREE_FAMILY, name="hetis-paper")


def two_stages_sharing(family: Family = SHARING) -> tuple[PlacementProblem, Plan]:
    """Two stages on B, both served by both C."""
    problem = replace(the_problem(), family=family)
    first = replace(WHOLE, gpu="B", num_layers=4, devices=("b-0/0",), kv_head_groups_kept=1)
    last = replace(first, first_layer=4, num_layers=2, devices=("b-1/0",))
    pools = tuple(replace(D_POOL, stage=i, shared=True) for i in (0, 1))
    return problem, plan_of(problem, claimed(unclaimed(first, last, pools=pools), problem))


def test_cards_may_serve_all_stages_of_a_replica_where_the_strategy_shares_them() -> None:
    problem, plan = two_stages_sharing()
    assert check_plan(plan, problem) == ()
    assert plan.prices[2].as_attention_workers == 2
    ordinary, plan = two_stages_sharing(FREE_FAMILY)
    assert rules(plan, ordinary) == {Rule.SHARED_POOL}


def test_shared_cards_count_once_in_gpus_and_cost() -> None:
    problem, plan = two_stages_sharing()
    for kind in (ObjectiveKind.GPUS, ObjectiveKind.COST):
        counting = replace(problem, objective=replace(NO_LIMITS, kind=kind, demand_rps=1.0))
        assert rules(plan_of(counting, *plan.replicas), counting) == set()


def test_cards_in_two_pools_must_be_shared_in_both_and_by_one_replica() -> None:
    problem, plan = two_stages_sharing()
    (replica,) = plan.replicas
    shared, other = replica.attention_workers
    for pools in (
        (shared, replace(other, shared=False)),
        (replace(shared, shared=False), replace(other, shared=False)),
    ):
        assert Rule.DEVICE_ONCE in rules(replica_with(0, attention_workers=pools)(plan), problem)
    twice = replace(shared, devices=("c/0", "c/0"))
    assert Rule.DEVICE_ONCE in rules(replica_with(0, attention_workers=(twice, other))(plan), problem)
    second = replace(replica, stages=tuple(replace(s, devices=(f"b-{i}/1",)) for i, s in enumerate(replica.stages)))
    assert rules(plan_of(problem, replica, second), problem) == {Rule.DEVICE_ONCE}


def test_shared_card_holds_the_kv_of_every_stage_it_serves() -> None:
    problem, plan = two_stages_sharing()
    (replica,) = plan.replicas
    derived = derived_of(replica, problem)
    first, last, both = [use for use in derived.memory if use.rule is Rule.WORKER_MEMORY]
    assert both.where == "attention workers of stages 1, 2"
    assert both.num_bytes - 1e6 == pytest.approx(first.num_bytes - 1e6 + last.num_bytes - 1e6)
    for usable_bytes, expected in (
        (math.ceil(both.num_bytes), set()),
        (math.floor(both.num_bytes) - 1, {Rule.WORKER_MEMORY}),
    ):
        profiles = {**problem.profiles, "C": make_profile("C", usable_bytes=usable_bytes)}
        tight = replace(problem, profiles=profiles)
        assert rules(plan_of(tight, claimed(replica, tight)), tight) == expected


def with_slow_shared_cards() -> tuple[PlacementProblem, Plan]:
    """`two_stages_sharing`, with cards that take a second for a layer, whatever they hold."""
    problem, plan = two_stages_sharing()
    card = problem.profiles["C"]
    fits = (replace(f, pieces=(Piece(fixed_s=1.0),)) if f.op is Op.DECODE_ATTENTION else f for f in card.fits)
    slow = replace(problem, profiles={**problem.profiles, "C": replace(card, fits=tuple(fits))})
    return slow, plan_of(slow, claimed(plan.replicas[0], slow))


def test_shared_card_is_busy_with_every_stage_in_turn() -> None:
    problem, plan = with_slow_shared_cards()
    (replica,) = plan.replicas
    own = tuple(replace(pool, devices=(f"c/{i}",), shared=False) for i, pool in enumerate(replica.attention_workers))
    alone = replace(replica, attention_workers=own)
    iterations = 10  # O / b: 6 layers of both stages together, against the 4 of the larger
    assert derived_of(replica, problem).t_s == pytest.approx(1.02 * iterations * 6 * 1.0, rel=1e-3)
    assert derived_of(alone, problem).t_s == pytest.approx(1.02 * iterations * 4 * 1.0, rel=1e-2)


def test_replicas_joined_by_very_many_routes_are_found_at_once() -> None:
    """In the past 40,000 routes took a minute, and the 400,000 of a plan for a million GPUs would have taken hours."""
    # As replicas that are filled in turn are joined: 0 to 1, 2 to 1, 2 to 3 and so on.
    routes = tuple(KvRoute(prefill=i + i % 2, decode=i + 1 - i % 2, rate=1.0) for i in range(399_999))
    apart = KvRoute(prefill=500_000, decode=500_001, rate=1.0)
    plan = replace(sound(the_problem()), kv_routes=(*routes, apart))
    assert plan.joined_by_routes() == [list(range(400_000)), [500_000, 500_001]]
