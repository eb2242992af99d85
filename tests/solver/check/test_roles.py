"""The checker on prefill and decode replicas, the routes between them, and cards that several stages share."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from hetis.solver.check import Rule, check_plan
from hetis.solver.check.memory import kv_tokens_of_a_copy, prompt_tokens_of_a_copy, staged_prompts_of_a_copy
from hetis.solver.check.replica_shapes import Fleet
from hetis.solver.check.result import check_routes
from hetis.solver.check.setting import Setting
from hetis.solver.check.timing import least_slack
from hetis.solver.cluster import Link, Network
from hetis.solver.constraints import Duty, RestrictRole, Selection, Unit
from hetis.solver.cost import chunk_spread, regime_of, regimes
from hetis.solver.placement.families import run_by
from hetis.solver.plan import AttentionWorkerPool, KvRoute, Objective, ObjectiveKind, Plan, Role, StagePlan
from hetis.solver.problem import EngineRules, Family, PlacementProblem
from hetis.solver.profile import Fit, Op, Piece, Profile
from tests.models import replace, shape_of
from tests.solver.claimed_plans import claimed, counted, derived_of, plan_of, rules, unclaimed
from tests.solver.instances import (
    FREE_FAMILY,
    MADE_UP,
    NO_LIMITS,
    make_model,
    make_node,
    make_problem,
    make_profile,
    make_workload,
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

Mutation = Callable[[Plan], Plan]


def replica_with(number: int, **changes: object) -> Mutation:
    def mutate(plan: Plan) -> Plan:
        replicas = list(plan.replicas)
        replicas[number] = replace(replicas[number], **changes)  # type: ignore[arg-type]
        return replace(plan, replicas=tuple(replicas))

    return mutate


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


# --- numbers worked out by hand


def token_problem(*, link: Link | None = None, **model: object) -> PlacementProblem:
    """A millisecond per token of dense work, a microsecond per byte of a message; the rest takes no time.

    P = 128, O = 40; a token's KV in one layer and group is 2 * 64 * 2 = 256 bytes, in both groups 512.
    """
    pieces = {Op.DENSE: Piece(token_s=1e-3), Op.TRANSFER: Piece(byte_s=1e-6, wire=1.0)}
    ops = (Op.DENSE, Op.PREFILL_ATTENTION, Op.DECODE_ATTENTION, Op.ALL_REDUCE, Op.TRANSFER)
    fits = tuple(Fit(op=op, pieces=(pieces.get(op, Piece()),), provenance=MADE_UP) for op in ops)
    profile = Profile(gpu="A", usable_bytes=50_000_000, reserve_bytes=1_000_000, fits=fits)
    network = Network(default=link or Link(bytes_per_s=1e9, latency_s=0.01))
    return make_problem(
        [make_node("a", "A", gpus=4)],
        profiles={"A": profile},
        network=network,
        workload=make_workload((128, 40)),
        model=make_model(**model),  # type: ignore[arg-type]
    )


ALONE = replace(WHOLE, devices=("a/0",))
PREFILL = unclaimed(ALONE, in_flight=1, role=Role.PREFILL, kv_zones=("default",))
DECODE = unclaimed(ALONE, in_flight=1, role=Role.DECODE)


def test_prefill_replica_takes_the_time_worked_by_hand() -> None:
    derived = derived_of(PREFILL, token_problem())
    # nc = 2, nd = 0. Computing: 2 * 64 ms = 128 ms a layer. Sending: 64 * 512 = 32768 bytes take 32.768 us on the wire
    # and 32.768 ms besides, twice 65.6 ms: hidden behind it. LM head of one token, twice.
    assert derived.t_s == pytest.approx(6 * 0.128 + 2 * 0.001)
    assert derived.tpot_per_t == 0.0
    # q = 0.9; p_wait = 0.9^(sqrt(4) - 1); wait = 2 RT / (1 - 0.9) / 2 * ln 18, RT = t / 2; the p95 prompt has 2 chunks.
    assert derived.ttft_s(derived.t_s) == pytest.approx(
        derived.t_s * (1.0 + 0.5 / 0.1 * math.log(18)) + derived.landing_s
    )
    assert derived.landing_s == pytest.approx(0.032768 + 32768e-9 + 0.01)


def test_prefill_replica_waits_for_a_slow_wire() -> None:
    problem = token_problem(link=Link(bytes_per_s=1e5, latency_s=0.0))
    derived = derived_of(PREFILL, problem)
    send_s = 0.032768 + 0.32768
    assert derived.t_s == pytest.approx(6 * 2 * send_s + 2 * 0.001)
    assert derived.landing_s == pytest.approx(send_s)


def test_decode_replica_takes_the_time_worked_by_hand() -> None:
    derived = derived_of(DECODE, token_problem())
    # nd = 10 iterations of 4 tokens: 40 ms a layer; but a prompt's KV, 128 * 512 bytes, takes 65.536 ms to arrive.
    arriving_s = 0.065536 + 65536e-9
    assert derived.t_s == pytest.approx(6 * arriving_s + 10 * 0.004)
    assert derived.tpot_per_t == pytest.approx(0.1)
    assert (derived.ttft_s(derived.t_s), derived.landing_s) == (0.0, 0.0)


HALVES = replace(ALONE, num_layers=3), replace(ALONE, first_layer=3, num_layers=3, devices=("a/1",))


def test_iterations_of_a_decode_pipeline_hardly_hold_one_another_up() -> None:
    problem = token_problem(link=Link(bytes_per_s=1e12, latency_s=0.0))
    # 10 iterations of 4 tokens: 3 layers of 4 ms, and on the last stage an LM head of 4 ms and a hop of 4 * 512 bytes.
    # But KV takes 65.536 ms a layer to arrive, longer than 10 * 4 ms.
    last_s = 3 * 0.065536 + 10 * (0.004 + 0.002048)
    for in_flight in (2, 3, 4):  # K = 2
        derived = derived_of(unclaimed(*HALVES, in_flight=in_flight, role=Role.DECODE), problem)
        assert derived.t_s == pytest.approx(1.02 * last_s, rel=1e-5)


def test_chunks_of_long_prompts_hold_one_another_up_in_a_tight_pipeline() -> None:
    link = Link(bytes_per_s=1e12, latency_s=0.0)
    problem = replace(token_problem(link=link), workload=make_workload((3840, 40)))
    # 60 chunks of 64 tokens: 3 layers of 64 ms, an LM head of one token and a hop of 32768 bytes.
    last_s = 60 * (3 * 0.064 + 0.001 + 0.032768)
    # A layer takes a token 2 * 589824 FLOPs and 4 * 4 * 64 for every token it attends to: 1920.5 in the mean, with a
    # standard deviation of 3840 / sqrt(12), near enough. So chunks differ by 0.361, of which 0.8 are lost.
    spread = 1024 * math.sqrt(3840**2 / 3 - 1920**2) / (2 * 589824 + 1024 * 1920.5)
    for in_flight, slack in ((2, 0.8 * spread), (3, 0.8 * spread), (4, 0.02)):
        derived = derived_of(unclaimed(*HALVES, in_flight=in_flight, role=Role.PREFILL, kv_zones=("default",)), problem)
        assert derived.t_s == pytest.approx((1 + slack) * last_s, rel=1e-5)


def test_short_prompts_leave_a_tight_prefill_pipeline_its_least_slack() -> None:
    problem = replace(token_problem(link=Link(bytes_per_s=1e12, latency_s=0.0)), workload=make_workload((64, 40)))
    one = unclaimed(*HALVES, in_flight=2, role=Role.PREFILL, kv_zones=("default",))
    assert derived_of(one, problem).t_s == pytest.approx(1.02 * (3 * 0.064 + 0.001 + 0.032768), rel=1e-5)


@pytest.mark.parametrize("window", [None, 512])
@pytest.mark.parametrize("lengths", [((128, 40),), ((4096, 40),), ((16, 5), (30_000, 300))])
def test_search_and_checker_know_the_same_slack(lengths: tuple[tuple[int, int], ...], window: int | None) -> None:
    model = replace(make_model(), sliding_window=window)
    problem = replace(token_problem(), model=model, workload=make_workload(*lengths))
    moments = problem.workload.moments()
    for role in Role:
        of_role = regimes(problem.assumptions, role, chunk_spread(model, moments))
        for in_flight, num_copies in ((1, 1), (2, 2), (3, 2), (4, 2), (4, 1)):
            setting = Setting(
                problem=problem, moments=moments, micro_batch=4, in_flight=in_flight, chunk_tokens=64, role=role
            )
            found = regime_of(of_role, in_flight=in_flight, num_copies=num_copies)
            assert tuple(found) == pytest.approx(least_slack(setting, num_copies), rel=1e-12)


def test_attention_workers_of_a_decode_replica_receive_their_groups_themselves() -> None:
    stage = replace(ALONE, kv_head_groups_kept=1)
    pool = AttentionWorkerPool(stage=0, gpu="A", devices=("a/1", "a/2"), kv_head_groups=1)
    fast = token_problem(link=Link(bytes_per_s=1e12, latency_s=0.0))
    derived = derived_of(unclaimed(stage, pools=(pool,), in_flight=1, role=Role.DECODE), fast)
    # The exchange: 4 pairs * 2 heads * 384 bytes leave in 3.072 ms, 10 times: with 40 ms 70.72 ms. KV of one group
    # takes 32.768 ms to the stage, half as long to either card.
    assert derived.t_s == pytest.approx(6 * 0.07072 + 0.04, rel=1e-6)
    nothing_kept = replace(stage, kv_head_groups_kept=0)
    one = replace(pool, devices=("a/1",), kv_head_groups=2)
    all_given = unclaimed(nothing_kept, pools=(one,), in_flight=1, role=Role.DECODE)
    # Nothing arrives at the stage; both groups of a prompt at the only card: 65.536 ms, less than 40 + 61.44 ms.
    assert derived_of(all_given, fast).t_s == pytest.approx(6 * 0.10144 + 0.04, rel=1e-6)
    # P L G kvb bytes for one request, but 61,440 bytes of exchange take as long for each byte: a longer prompt.
    long = replace(fast, workload=make_workload((512, 40)))
    assert derived_of(all_given, long).t_s == pytest.approx(6 * 0.262144 + 0.04, rel=1e-6)


def test_groups_held_by_several_ranks_travel_once() -> None:
    problem = token_problem(link=Link(bytes_per_s=1e12, latency_s=0.0), kv_heads=1)
    stage = replace(ALONE, tp=4, devices=("a/0", "a/1", "a/2", "a/3"), kv_head_groups_kept=1)
    derived = derived_of(replace(DECODE, stages=(stage,)), problem)
    assert derived.t_s == pytest.approx(6 * 0.04 + 0.04)  # 128 * 256 bytes take 32.8 ms, hidden behind 40 ms
    narrow = token_problem(link=Link(bytes_per_s=128 * 256 / 0.05, latency_s=0.0), kv_heads=1)
    assert derived_of(replace(DECODE, stages=(stage,)), narrow).t_s == pytest.approx(6 * (0.05 + 0.032768) + 0.04)


def test_prefix_layers_send_their_kv_too() -> None:
    moe = shape_of(num_experts=4, active_experts=2, expert_intermediate=256, first_dense_layers=1)
    problem = token_problem(link=Link(bytes_per_s=1e5, latency_s=0.0), moe=moe)
    assert derived_of(PREFILL, problem).t_s == pytest.approx(6 * 2 * (0.032768 + 0.32768) + 0.002)


def test_memory_of_both_roles_is_worked_by_hand() -> None:
    problem = token_problem()
    layer = 2 * (256 * 64 * 12 + 3 * 256 * 512)
    weights = 1e6 + 6 * layer + 2 * 512_000
    prefill = derived_of(PREFILL, problem)
    # Chunks of 64 tokens; logits of one; one prompt in flight, half of it there on average, and a chunk; another one of
    # 128 tokens that has not landed yet.
    fixed = weights + 64 * 2 * 2048 + 4 * 1000
    assert prefill.memory[0].num_bytes == pytest.approx(fixed + 3072 * (64 + 64 + 128))
    assert prefill.kv_tokens == pytest.approx((50e6 - fixed) / 3072)
    decode = derived_of(DECODE, problem)
    # Four tokens and their logits; four requests with headroom, and sqrt(4) prompts that arrive.
    fixed = weights + 4 * 2 * 2048 + 16_000
    kv_tokens = 4 * 155.5 + 1.645 * 2 * math.sqrt(1600 / 12) + 2 * 128
    assert decode.memory[0].num_bytes == pytest.approx(fixed + 3072 * kv_tokens)
    assert decode.kv_tokens == pytest.approx((50e6 - fixed) / 3072)


@pytest.mark.parametrize(("in_flight", "seats", "staged"), [(1, 1, 1.0), (1, 4, 2.0), (4, 4, 4.0), (9, 9, 9.0)])
def test_prompts_that_arrive_are_the_root_of_the_seats(in_flight: int, seats: int, staged: float) -> None:
    problem = token_problem()
    setting = setting_of(problem, Role.DECODE, in_flight=in_flight, micro_batch=seats)
    assert staged_prompts_of_a_copy(setting, 1) == pytest.approx(staged)
    # On two copies each holds half of the micro-batches, rounded up.
    halves = math.sqrt(math.ceil(in_flight / 2) * seats)
    assert staged_prompts_of_a_copy(setting, 2) == pytest.approx(halves)


def test_one_prompt_has_not_landed_and_unified_replicas_hand_none_over() -> None:
    problem = token_problem()
    for in_flight in (1, 6):
        prefill = setting_of(problem, Role.PREFILL, in_flight=in_flight, chunk_tokens=64)
        unified = setting_of(problem, Role.UNIFIED, in_flight=in_flight, micro_batch=4, chunk_tokens=64)
        assert (staged_prompts_of_a_copy(prefill, 1), staged_prompts_of_a_copy(unified, 1)) == (1.0, 0.0)


def test_prompts_that_arrive_keep_no_more_than_windows_leave() -> None:
    """Half of the layers slide over 32 of the 128 tokens of a prompt, so that 80 are kept in the mean layer."""
    whole = token_problem()
    freeing = replace(whole, model=replace(whole.model, sliding_window=32, sliding_layers=3))
    for problem, kept in ((whole, 128), (freeing, 80)):
        setting = setting_of(problem, Role.PREFILL, in_flight=1, chunk_tokens=64)
        assert kv_tokens_of_a_copy(setting, 1) - prompt_tokens_of_a_copy(setting, 1) == pytest.approx(kept)


def setting_of(
    problem: PlacementProblem, role: Role, *, in_flight: int, micro_batch: int = 0, chunk_tokens: int = 0
) -> Setting:
    """Return the setting of a replica with this role."""
    moments = problem.workload.moments(block_tokens=problem.assumptions.block_tokens)
    return Setting(
        problem=problem,
        moments=moments,
        micro_batch=micro_batch,
        in_flight=in_flight,
        chunk_tokens=chunk_tokens,
        role=role,
    )


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
