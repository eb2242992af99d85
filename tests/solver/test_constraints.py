"""Plans keep what is pinned and forbidden, and are the best that do, as brute force confirms."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hetis.solver.check import check_plan
from hetis.solver.cluster import Cluster, Link, Network
from hetis.solver.constraints import (
    DUTY_OF_ROLE,
    AtMost,
    Constraint,
    Constraints,
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
from hetis.solver.engine_rules import EngineRules, Family
from hetis.solver.errors import InfeasibleError, InvalidProblemError, NoPlanFoundError
from hetis.solver.placement.families import run_by
from hetis.solver.plan import ObjectiveKind, Plan, Role
from hetis.solver.planning import solve_placement
from hetis.solver.problem import PlacementProblem
from tests.solver.best_replicas import StageOption, Wanted
from tests.solver.device_classes import device_classes
from tests.solver.instances import (
    NO_LIMITS,
    SMALL_FAMILY,
    make_node,
    make_problem,
    make_profile,
    problems,
)
from tests.solver.oracle import best_plan_value
from tests.solver.searching import plan_or_none, worth

EXAMPLES = max(8, settings().max_examples // 4)


def of(text: str) -> Selection:
    unit, _, name = text.partition("=")
    return Selection(unit=Unit(unit), name=name)


def two_types(*constraints: Constraint, **options: object) -> PlacementProblem:
    """Two nodes of two quick cards and one of two small ones."""
    profiles = {"A": make_profile("A", bytes_per_s=4e10), "B": make_profile("B", usable_bytes=12_000_000)}
    nodes = [make_node("a", "A", nodes=2, gpus=2), make_node("b", "B", gpus=2)]
    return replace(make_problem(nodes, profiles=profiles, **options), constraints=constraints)  # type: ignore[arg-type]


def used(plan: Plan) -> set[str]:
    return {name for replica in plan.replicas for name in replica.devices()}


def workers(plan: Plan) -> set[str]:
    return {name for replica in plan.replicas for name in replica.worker_devices()}


def solved(problem: PlacementProblem, strategy: str = "hetis") -> Plan:
    """Return a plan that passes the checker."""
    plan = solve_placement(problem, strategy=strategy)
    assert check_plan(plan, replace(problem, family=problem.family)) == ()
    return plan


# --- brute force


def without_nodes(cluster: Cluster, constraints: Constraints) -> Cluster:
    """Return the cluster without the excluded nodes, types and zones, found node by node."""
    groups = []
    for group in cluster.node_groups:
        gone = 0
        kept = group
        for constraint in constraints:
            if isinstance(constraint, Exclude):
                name = constraint.gpus.name
                if constraint.gpus.unit is Unit.NODE:
                    gone += sum(name == group.node_name(i) for i in range(group.count))
                elif constraint.gpus.unit is Unit.TYPE:
                    kept = replace(kept, gpus=tuple(slots for slots in kept.gpus if slots.gpu != name))
                elif group.zone == name:
                    gone = group.count
        if gone < group.count and kept.gpus:
            groups.append(replace(kept, count=group.count - gone))
    return replace(cluster, node_groups=tuple(groups))


def best_by_brute_force(problem: PlacementProblem) -> float:
    """Return the best value of a plan that keeps the constraints; 0 or infinity if there is none."""
    constraints, family = problem.constraints, problem.family
    cluster = without_nodes(problem.cluster, constraints)
    sizes = tuple(tp for tp in family.tp_sizes if WithoutTp(tp=tp) not in constraints)
    nothing = worth(None, problem)
    if not cluster.node_groups or not sizes:
        return nothing
    family = replace(family, tp_sizes=sizes, max_pool=0 if WithoutWorkers() in constraints else family.max_pool)
    kept = [each for each in constraints if isinstance(each, RestrictRole)]

    def barred(gpu: str, zone: str) -> set[Duty]:
        return {duty for each in kept if each.gpus.name in (gpu, zone) for duty in each.barred}

    def may_be(option: StageOption) -> bool:
        own = option.device_class
        pools = [other for other, _ in option.groups[option.shape.copies :]]
        return Duty.PRIMARY not in barred(own.gpu, own.zone) and not any(
            Duty.WORKER in barred(other.gpu, other.zone) for other in pools
        )

    classes = list(device_classes(cluster))

    def may_serve(wanted: Wanted) -> bool:
        return not any(
            DUTY_OF_ROLE[wanted.role] in barred(c.gpu, c.zone)
            for c, sizes in zip(classes, wanted.need, strict=True)
            if sizes
        )

    def may_plan(chosen: list[Wanted]) -> bool:
        count, taken = Counter[str](), dict.fromkeys(Sum, 0.0)
        for wanted in chosen:
            for c, sizes in zip(classes, wanted.need, strict=True):
                count[c.gpu] += sum(sizes)
                count[c.zone] += sum(sizes)
                taken[Sum.GPUS] += sum(sizes)
                taken[Sum.USD] += sum(sizes) * c.usd_per_hour
        return (
            all(count[each.gpus.name] >= each.least for each in constraints if isinstance(each, Use))
            and all(each.allows(len(chosen)) for each in constraints if isinstance(each, Replicas))
            and all(taken[each.of] <= each.most + 1e-9 for each in constraints if isinstance(each, AtMost))
        )

    plain = replace(problem, constraints=(), cluster=cluster, family=family)
    return best_plan_value(plain, may_be=may_be, may_serve=may_serve, may_plan=may_plan)


@st.composite
def some_constraint(draw: st.DrawFn, cluster: Cluster) -> Constraint:
    """Draw a constraint that refers to the cluster."""
    types = sorted({slots.gpu for group in cluster.node_groups for slots in group.gpus})
    nodes = [group.node_name(i) for group in cluster.node_groups for i in range(group.count)]
    kind = draw(st.sampled_from(("out", "out", "keep", "keep", "use", "use", "tp", "workers", "replicas", "sum")))
    places = [of(f"type={gpu}") for gpu in types]
    match kind:
        case "out":
            out = [of(f"node={node}") for node in nodes] + (places if len(places) > 1 else [])
            return Exclude(gpus=draw(st.sampled_from(out)))
        case "keep":
            duty = draw(st.sampled_from(list(Duty)))
            return RestrictRole(gpus=draw(st.sampled_from(places)), duty=duty, only=draw(st.integers(0, 2)) == 0)
        case "use":
            place = draw(st.sampled_from([*places, *(of(f"zone={zone}") for zone in cluster.zones())]))
            most = sum(
                group.count * slots.count
                for group in cluster.node_groups
                for slots in group.gpus
                if place.name in (slots.gpu, group.zone)
            )
            return Use(gpus=place, least=draw(st.integers(1, most)))
        case "tp":
            return WithoutTp(tp=draw(st.sampled_from(SMALL_FAMILY.tp_sizes)))
        case "workers":
            return WithoutWorkers()
        case "sum":
            return AtMost(of=draw(st.sampled_from(list(Sum))), most=float(draw(st.integers(1, 4))))
    least = draw(st.integers(0, 2))
    return Replicas(least=least, most=draw(st.sampled_from((None, max(1, least), least + 1))))


@st.composite
def constrained(draw: st.DrawFn, family: Family = SMALL_FAMILY) -> PlacementProblem:
    """Draw small problems with a constraint or two, most of which have a plan."""
    kinds = (ObjectiveKind.GOODPUT, ObjectiveKind.THROUGHPUT, ObjectiveKind.GPUS)
    problem = draw(problems(max_gpus=4, kinds=kinds, family=family, num_zones=1))
    constraints = draw(st.lists(some_constraint(problem.cluster), min_size=1, max_size=2, unique=True))
    return replace(problem, constraints=tuple(constraints))


@settings(max_examples=EXAMPLES)
@given(constrained())
def test_no_plan_that_keeps_the_will_is_better(problem: PlacementProblem) -> None:
    best = best_by_brute_force(problem)
    plan = plan_or_none(problem)
    if plan is None:
        assert best == worth(None, problem)
        return
    assert check_plan(plan, problem) == ()
    assert plan.result.value == pytest.approx(best, rel=1e-5)
    assert plan.result.bound == pytest.approx(best, rel=1e-5)


ENGINES_FAMILY = run_by(
    replace(SMALL_FAMILY, chunk_tokens=(64,)), EngineRules(name="vllm-hetis", max_stages=3, max_pooled_stages=2)
)


@settings(max_examples=EXAMPLES)
@given(constrained(ENGINES_FAMILY))
def test_no_plan_of_an_engine_that_keeps_the_will_is_better(problem: PlacementProblem) -> None:
    assume(not problem.model.forbidden_cuts)
    best = best_by_brute_force(problem)
    plan = plan_or_none(problem, gap_target=0.0)
    if plan is None:
        assert best == worth(None, problem)
        return
    assert check_plan(plan, problem) == ()
    assert plan.result.value == pytest.approx(best, rel=1e-6)


# --- every constraint


def test_a_gpu_that_is_left_out_keeps_the_names_of_the_others() -> None:
    plan = solved(two_types(Exclude(gpus=of("gpu=a-0/0"))))
    assert used(plan) == {"a-0/1", "a-1/0", "a-1/1", "b/0", "b/1"}
    row = next(price for price in plan.prices if price.gpu == "A")
    assert (row.available, row.used) == (4, 3)


def test_left_out_gpus_of_equal_nodes_are_left_out_of_each() -> None:
    problem = replace(two_types(), cluster=two_types().cluster)
    groups = (
        replace(
            problem.cluster.node_groups[0],
            gpus=(problem.cluster.node_groups[1].gpus[0], problem.cluster.node_groups[0].gpus[0]),
        ),
    )
    mixed = replace(problem, cluster=replace(problem.cluster, node_groups=groups))  # B B A A in each of two nodes
    plan = solved(replace(mixed, constraints=(Exclude(gpus=of("type=B")),)))
    assert used(plan) == {"a-0/2", "a-0/3", "a-1/2", "a-1/3"}


def test_a_type_kept_for_attention_is_that_or_idle() -> None:
    only = RestrictRole(gpus=of("type=B"), duty=Duty.WORKER, only=True)
    plan = solved(two_types(only, Use(gpus=of("type=B"), least=2)))
    assert {"b/0", "b/1"} == workers(plan)


def test_a_node_kept_for_prompts_holds_prefill_replicas_alone() -> None:
    plan = solved(
        two_types(RestrictRole(gpus=of("node=a-1"), duty=Duty.PREFILL, only=True), Use(gpus=of("node=a-1"), least=1))
    )
    there = [replica for replica in plan.replicas if any(name.startswith("a-1/") for name in replica.devices())]
    assert there
    assert {replica.role for replica in there} == {Role.PREFILL}


def idle_replicas(plan: Plan) -> list[int]:
    """Return the prefill and decode replicas that no KV leaves or reaches."""
    routed = {end for route in plan.kv_routes for end in (route.prefill, route.decode)}
    return [i for i, replica in enumerate(plan.replicas) if replica.role is not Role.UNIFIED and i not in routed]


def with_slow_cards(zone: str, network: Network | None, limit_s: float | None, *pins: Constraint) -> PlacementProblem:
    """Two quick cards, and four in a zone that are too slow to prefill within a TTFT limit of 3 ms."""
    nodes = [make_node("a", "A", gpus=2), make_node("b", "B", gpus=4, zone=zone)]
    slow = make_profile("B", flops=3e11, bytes_per_s=3e9, usable_bytes=12_000_000)
    profiles = {"A": make_profile("A", flops=4e12, bytes_per_s=4e10), "B": slow}
    objective = replace(NO_LIMITS, ttft_limit_s=limit_s)
    return replace(make_problem(nodes, profiles=profiles, network=network, objective=objective), constraints=pins)


def test_a_constraint_keeps_no_idle_replica() -> None:
    only = RestrictRole(gpus=of("type=B"), duty=Duty.DECODE, only=True)
    plan = solved(with_slow_cards("default", None, None, only))
    assert idle_replicas(plan) == []
    without = solved(with_slow_cards("default", None, None, Exclude(gpus=of("type=B"))))
    assert plan.result.value == pytest.approx(without.result.value)


def test_gpus_that_must_be_used_serve_requests() -> None:
    """Decode replicas behind a link that carries no prompt's KV keep no pin."""
    network = Network(default=Link(bytes_per_s=5e8, latency_s=1e-5), zone_default=Link(bytes_per_s=1e-3, latency_s=1.0))
    use = Use(gpus=of("type=B"), least=2)
    assert idle_replicas(solved(with_slow_cards("west", network, None, use))) == []
    with pytest.raises(NoPlanFoundError, match="keeps the pins with replicas that all serve requests"):
        solve_placement(with_slow_cards("west", network, 0.003, use))


def test_replicas_are_counted() -> None:
    assert len(solved(two_types(Replicas(least=1, most=1))).replicas) == 1
    assert len(solved(two_types(Replicas(least=6, most=None))).replicas) == 6


def test_rent_is_kept_to_on_small_and_large_fleets() -> None:
    nodes = [make_node("a", "A", nodes=30, gpus=2), make_node("b", "B", nodes=10, gpus=2)]
    profiles = {"A": make_profile("A", bytes_per_s=4e10), "B": make_profile("B")}
    large = make_problem(nodes, profiles=profiles, usd_per_hour={"A": 2.0, "B": 0.5})
    for problem, most in ((two_types(), 3.0), (large, 25.0)):
        plan = solved(replace(problem, constraints=(AtMost(of=Sum.USD, most=most),)))
        prices = {gpu: kind.usd_per_hour or 0.0 for gpu, kind in problem.cluster.gpu_types.items()}
        assert sum(prices[price.gpu] * price.used for price in plan.prices) <= most * (1 + 1e-9)
        assert plan.result.value > 0.5 * best_rate_of(problem) * most / sum(
            prices[price.gpu] * price.available for price in plan.prices
        )


def test_rent_too_low_for_any_replica_is_proved_to_be_for_an_engine() -> None:
    cheap = AtMost(of=Sum.USD, most=0.1)
    problem = replace(two_types(cheap), family=ENGINES_FAMILY)
    with pytest.raises(InfeasibleError):
        solve_placement(problem)
    one_card = min(gpu.usd_per_hour or 0.0 for gpu in problem.cluster.gpu_types.values())
    just_enough = replace(problem, constraints=(AtMost(of=Sum.USD, most=one_card),))
    assert solve_placement(just_enough).result.value > 0.0


def best_rate_of(problem: PlacementProblem) -> float:
    return solve_placement(problem).result.value


def test_a_constraint_for_what_is_not_there_is_refused() -> None:
    with pytest.raises(
        InvalidProblemError, match=r"--forbid node=x: tiny has no node x; --pin type=A:use=9: tiny has 4"
    ):
        solve_placement(two_types(Exclude(gpus=of("node=x")), Use(gpus=of("type=A"), least=9)))


def test_heuristics_as_published_leave_gpus_out_and_refuse_other_constraints() -> None:
    plan = solve_placement(two_types(Exclude(gpus=of("node=a-0"))), strategy="hetis-paper")
    assert not any(name.startswith("a-0/") for name in used(plan))
    with pytest.raises(InvalidProblemError, match="--pin replicas=1: strategy hetis-paper can only leave out"):
        solve_placement(two_types(Replicas(least=1, most=1)), strategy="hetis-paper")


def test_zones_are_left_out_with_their_links() -> None:
    nodes = [make_node("e", "A", nodes=2, zone="east"), make_node("w", "A", nodes=2, zone="west")]
    problem = replace(make_problem(nodes), constraints=(Exclude(gpus=of("zone=west")),))
    assert used(solved(problem)) == {"e-0/0", "e-1/0"}


def test_a_large_fleet_keeps_its_pins_and_its_bound() -> None:
    nodes = [make_node("a", "A", nodes=30, gpus=2), make_node("b", "B", nodes=10, gpus=2)]
    profiles = {"A": make_profile("A", bytes_per_s=4e10), "B": make_profile("B", bytes_per_s=3e9)}
    problem = make_problem(nodes, profiles=profiles, objective=replace(NO_LIMITS, tpot_limit_s=0.01))
    free = solve_placement(problem)
    pinned = solved(replace(problem, constraints=(Use(gpus=of("type=B"), least=15), Replicas(least=1, most=20))))
    assert sum(name.startswith("b-") for name in used(pinned)) >= 15
    assert len(pinned.replicas) <= 20
    assert pinned.result.value <= free.result.bound * (1 + 1e-9)
