"""The search finds the optimum of brute force, and its optimum changes as an optimum must."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetis.solver.budget import Budget, SearchSettings
from hetis.solver.check import check_plan
from hetis.solver.check.rederive import Rederivation
from hetis.solver.check.replica_shapes import Fleet, replica_shape
from hetis.solver.cluster import Link, Network
from hetis.solver.model import DraftShape
from hetis.solver.placement import search
from hetis.solver.placement.columns import Columns
from hetis.solver.placement.explanation.alternatives import runners_up_of
from hetis.solver.placement.families import STRATEGIES
from hetis.solver.placement.master import Master, MilpSolution
from hetis.solver.placement.optimum import search_enumerated
from hetis.solver.placement.outcome import Outcome
from hetis.solver.placement.replicas.tabulation import build_cost_tables
from hetis.solver.plan import Objective, ObjectiveKind, Plan, Status
from hetis.solver.planning import solve_placement
from hetis.solver.problem import PlacementProblem
from hetis.solver.profile import Fit, Profile
from tests.models import replace, shape_of
from tests.solver.instances import (
    NO_LIMITS,
    SMALL_FAMILY,
    make_compressed,
    make_model,
    make_node,
    make_problem,
    make_profile,
    problems,
)
from tests.solver.oracle import best_plan_value
from tests.solver.searching import plan_or_none, worth

KINDS = tuple(ObjectiveKind)
MAXIMISED = (ObjectiveKind.GOODPUT, ObjectiveKind.THROUGHPUT)
REL = 1e-6
EXAMPLES = settings().max_examples


def value_of(problem: PlacementProblem) -> float:
    return worth(plan_or_none(problem), problem)


def of_strategy(problem: PlacementProblem, strategy: str) -> PlacementProblem:
    """Return the problem with the family that a strategy searches, for the oracle and the checker."""
    return replace(problem, family=STRATEGIES[strategy].restrict(replace(SMALL_FAMILY, name=strategy)))


def assert_proven_optimal(problem: PlacementProblem, plan: Plan | None) -> None:
    best = best_plan_value(problem)
    if plan is None:
        assert best in (0.0, math.inf), f"no plan found, but brute force finds {best}"
        return
    result = plan.result
    assert check_plan(plan, problem) == ()
    assert result.value == pytest.approx(best, rel=REL)
    low, high = (result.value, result.bound) if problem.objective.maximises else (result.bound, result.value)
    assert low * (1 - REL) <= best <= high * (1 + REL)
    assert result.status is Status.OPTIMAL


# --- against brute force


@pytest.mark.parametrize("strategy", ["hetis", "hexgen"])
@given(problem=problems(max_gpus=4, kinds=KINDS))
def test_the_search_finds_the_optimum_of_brute_force(strategy: str, problem: PlacementProblem) -> None:
    problem = of_strategy(problem, strategy)
    assert_proven_optimal(problem, plan_or_none(problem, strategy))


@settings(max_examples=EXAMPLES // 6)
@given(problems(max_gpus=5, kinds=KINDS, family=SMALL_FAMILY))
def test_five_gpus_too(problem: PlacementProblem) -> None:
    assert_proven_optimal(problem, plan_or_none(problem))


KINDS_OF_LAYERS = {
    "states": replace(
        make_model(moe=shape_of(num_experts=4, active_experts=1, expert_intermediate=256, every=2)),
        linear=shape_of(layers=4, params=200_000, state_bytes=400_000.0, token_flops=100_000.0),
        vision_params=300_000,
    ),
    "windows": replace(make_model(), sliding_window=64, sliding_layers=4),
    "kept windows": replace(make_model(), sliding_window=64, sliding_layers=4, windows_free_kv=False),
    "drafts": replace(make_model(), draft=DraftShape(tokens=2, acceptance=0.8)),
    "indexer": replace(
        make_model(kv_heads=4),
        mla=shape_of(kv_lora_rank=48, qk_rope_head_dim=16, qk_nope_head_dim=32, v_head_dim=32, q_lora_rank=64),
        indexer=shape_of(top_tokens=64, heads=2, head_dim=16, key_bytes=20.0),
    ),
    "shared indexer": replace(
        make_model(kv_heads=4),
        mla=shape_of(kv_lora_rank=48, qk_rope_head_dim=16, qk_nope_head_dim=32, v_head_dim=32, q_lora_rank=64),
        indexer=shape_of(top_tokens=32, heads=2, head_dim=64, key_bytes=68.0, layers=2),
    ),
    "compressed": make_compressed(),
    "shared experts": make_model(
        kv_heads=1, moe=shape_of(num_experts=8, active_experts=1, expert_intermediate=512, first_dense_layers=1)
    ),
    "shared experts in some": make_model(
        num_layers=4, moe=shape_of(num_experts=4, active_experts=2, expert_intermediate=768, shared_experts=1, every=2)
    ),
}


@pytest.mark.parametrize("kind", KINDS_OF_LAYERS)
@settings(max_examples=EXAMPLES // 4)
@given(problem=problems(max_gpus=4, kinds=MAXIMISED, num_zones=1))
def test_layers_of_several_kinds_are_placed_at_no_loss(kind: str, problem: PlacementProblem) -> None:
    problem = replace(problem, model=KINDS_OF_LAYERS[kind], family=SMALL_FAMILY)
    assert_proven_optimal(problem, plan_or_none(problem))


def test_demand_just_met_by_the_whole_fleet_is_met() -> None:
    nodes = [make_node("a", "A", gpus=2, nodes=2)]
    most = solve_placement(make_problem(nodes)).result.value
    for share in (0.85, 0.95, 0.9999):
        objective = replace(NO_LIMITS, kind=ObjectiveKind.GPUS, demand_rps=share * most)
        problem = make_problem(nodes, objective=objective)
        assert_proven_optimal(problem, plan_or_none(problem))
    beyond = replace(NO_LIMITS, kind=ObjectiveKind.GPUS, demand_rps=1.001 * most)
    assert plan_or_none(make_problem(nodes, objective=beyond)) is None


# --- the claims of a plan are those of the cost model, to the last digit


@given(problems(max_gpus=5, kinds=KINDS, family=SMALL_FAMILY))
def test_numbers_of_a_plan_are_those_of_the_cost_model(problem: PlacementProblem) -> None:
    plan = plan_or_none(problem)
    if plan is None:
        return
    fleet, rederivation = Fleet.of(problem.cluster), Rederivation(problem)
    for replica in plan.replicas:
        derived = rederivation.of(replica_shape(replica, problem, fleet))
        assert replica.rate == pytest.approx(derived.rate, rel=1e-9)
        assert replica.tpot_s == pytest.approx(derived.t_s * derived.tpot_per_t, rel=1e-9)
        ttft_s = derived.ttft_s(derived.t_s)
        assert replica.ttft_s == pytest.approx(ttft_s, rel=1e-9)
        assert abs(replica.kv_tokens - derived.kv_tokens) <= 1


# --- how the optimum changes


@given(problems(max_gpus=4, kinds=MAXIMISED, family=SMALL_FAMILY))
def test_twice_the_time_for_everything_is_half_the_rate(problem: PlacementProblem) -> None:
    assert value_of(in_slow_motion(problem)) == pytest.approx(value_of(problem) / 2, rel=REL)


def in_slow_motion(problem: PlacementProblem) -> PlacementProblem:
    """Every time doubled: coefficients and latencies doubled, bandwidths halved, limits doubled."""
    cluster = problem.cluster
    return replace(
        problem,
        profiles={name: slower(profile) for name, profile in problem.profiles.items()},
        cluster=replace(
            cluster,
            gpu_types={
                name: replace(gpu, pcie_bytes_per_s=gpu.pcie_bytes_per_s / 2) for name, gpu in cluster.gpu_types.items()
            },
            node_groups=tuple(
                replace(group, nic=group.nic and slower_link(group.nic)) for group in cluster.node_groups
            ),
            network=Network(
                default=slower_link(cluster.network.default),
                zone_default=cluster.network.zone_default and slower_link(cluster.network.zone_default),
            ),
        ),
        objective=replace(
            problem.objective,
            ttft_limit_s=doubled(problem.objective.ttft_limit_s),
            tpot_limit_s=doubled(problem.objective.tpot_limit_s),
        ),
    )


def slower(profile: Profile) -> Profile:
    def fit(old: Fit) -> Fit:
        # `wire` multiplies a time that the halved bandwidth has doubled already.
        pieces = tuple(
            replace(
                p,
                fixed_s=2 * p.fixed_s,
                flop_s=2 * p.flop_s,
                byte_s=2 * p.byte_s,
                token_s=2 * p.token_s,
                head_s=2 * p.head_s,
            )
            for p in old.pieces
        )
        return replace(old, pieces=pieces)

    return replace(profile, fits=tuple(map(fit, profile.fits)))


def slower_link(link: Link) -> Link:
    return Link(bytes_per_s=link.bytes_per_s / 2, latency_s=2 * link.latency_s)


def doubled(limit_s: float | None) -> float | None:
    return None if limit_s is None else 2 * limit_s


Change = Callable[[PlacementProblem], PlacementProblem]


def one_more_node(problem: PlacementProblem) -> PlacementProblem:
    first, *others = problem.cluster.node_groups
    more = replace(first, count=first.count + 1, numbered=True)
    return replace(problem, cluster=replace(problem.cluster, node_groups=(more, *others)))


def another_group(problem: PlacementProblem) -> PlacementProblem:
    first = problem.cluster.node_groups[0]
    more = replace(first, name="another", count=1, numbered=False, nic=Link(bytes_per_s=1e8, latency_s=1e-4))
    return replace(problem, cluster=replace(problem.cluster, node_groups=(*problem.cluster.node_groups, more)))


def more_memory(problem: PlacementProblem) -> PlacementProblem:
    profiles = {n: replace(p, usable_bytes=int(1.3 * p.usable_bytes)) for n, p in problem.profiles.items()}
    return replace(problem, profiles=profiles)


def more_memory_on_one_type(problem: PlacementProblem) -> PlacementProblem:
    name = min(problem.profiles)
    grown = replace(problem.profiles[name], usable_bytes=problem.profiles[name].usable_bytes + 1_000_000)
    return replace(problem, profiles={**problem.profiles, name: grown})


def looser_limits(problem: PlacementProblem) -> PlacementProblem:
    old = problem.objective
    return replace(
        problem,
        objective=replace(old, ttft_limit_s=doubled(old.ttft_limit_s), tpot_limit_s=doubled(old.tpot_limit_s)),
    )


def no_limits(problem: PlacementProblem) -> PlacementProblem:
    return replace(problem, objective=replace(problem.objective, ttft_limit_s=None, tpot_limit_s=None))


def wider_family(problem: PlacementProblem) -> PlacementProblem:
    family = problem.family
    wider = replace(
        family,
        max_pool=family.max_pool + 1,
        micro_batches=(1, 4, 8, 16),
    )
    return replace(problem, family=wider)


@pytest.mark.parametrize(
    "better",
    [one_more_node, another_group, more_memory, more_memory_on_one_type, looser_limits, no_limits, wider_family],
)
@settings(max_examples=2 * EXAMPLES // 3)
@given(problem=problems(max_gpus=4, kinds=KINDS))
def test_more_to_choose_from_never_makes_the_optimum_worse(better: Change, problem: PlacementProblem) -> None:
    before, after = value_of(problem), value_of(better(problem))
    if problem.objective.maximises:
        assert after >= before * (1 - REL)
    else:
        assert after <= before * (1 + REL)


@settings(max_examples=EXAMPLES // 2)
@given(problems(max_gpus=4, kinds=KINDS), st.randoms(use_true_random=False))
def test_order_of_the_nodes_does_not_matter(problem: PlacementProblem, random: object) -> None:
    groups = list(problem.cluster.node_groups)
    random.shuffle(groups)  # type: ignore[attr-defined]
    other = replace(problem, cluster=replace(problem.cluster, node_groups=tuple(groups)))
    assert value_of(other) == pytest.approx(value_of(problem), rel=REL)


@settings(max_examples=EXAMPLES // 3)
@given(problems(max_gpus=5, kinds=KINDS))
def test_equal_arguments_give_equal_plans(problem: PlacementProblem) -> None:
    assert plan_or_none(problem) == plan_or_none(problem)


# --- larger fleets, and searches without time


def test_model_that_no_class_holds_alone_is_planned() -> None:
    """The fleet has too few of the cheapest stages: the search must go on to those it can form."""
    profiles = {name: make_profile(name, flops=3e11, bytes_per_s=3e9, usable_bytes=6_000_000) for name in "AC"}
    nodes = [make_node("a", "A"), make_node("c", "C")]
    problem = make_problem(nodes, profiles=profiles, model=make_model(num_layers=4))
    assert best_plan_value(problem) > 0
    assert_proven_optimal(problem, plan_or_none(problem))


@pytest.mark.parametrize("kind", [ObjectiveKind.COST, ObjectiveKind.GPUS])
@pytest.mark.parametrize("share", [0.3, 0.8, 0.99])
def test_demand_close_to_what_the_fleet_can_do_is_met(kind: ObjectiveKind, share: float) -> None:
    nodes = [make_node("a", "A", gpus=2), make_node("b", "B", gpus=2)]
    profiles = {"A": make_profile("A"), "B": make_profile("B", bytes_per_s=5e9)}
    most = solve_placement(make_problem(nodes, profiles=profiles)).result.value
    objective = replace(NO_LIMITS, kind=kind, demand_rps=share * most)
    problem = make_problem(nodes, profiles=profiles, objective=objective)
    assert_proven_optimal(problem, plan_or_none(problem))


def test_bound_is_close_on_a_fleet_of_a_hundred() -> None:
    nodes = [
        make_node("a", "A", gpus=4, nodes=8),
        make_node("b", "B", gpus=2, nodes=20),
        make_node("c", "C", gpus=8, nodes=4),
    ]
    profiles = {
        "A": make_profile("A", usable_bytes=12_000_000),
        "B": make_profile("B", flops=5e11, bytes_per_s=5e9, usable_bytes=6_000_000),
        "C": make_profile("C", flops=1e12, bytes_per_s=4e10, usable_bytes=25_000_000),
    }
    problem = make_problem(nodes, profiles=profiles)
    plan = solve_placement(problem)
    assert check_plan(plan, problem) == ()
    assert plan.result.value <= plan.result.bound
    assert plan.result.gap <= 0.01


def test_where_no_time_is_left_for_whole_counts_those_of_the_relaxation_are_rounded_down() -> None:
    def in_vain(
        _: Master, columns: Columns, *, start: MilpSolution | None = None, **__: object
    ) -> tuple[MilpSolution | None, bool]:
        return start, False

    problem = make_problem([make_node("a", "A", nodes=20)], objective=NO_LIMITS)
    with patch.object(Master, "solve_milp", in_vain):
        plan = plan_or_none(problem)
    assert plan is not None
    assert not check_plan(plan, problem)
    best = plan_or_none(problem)
    assert best is not None
    assert 0.5 * best.result.value < plan.result.value <= best.result.value * (1 + REL)


# --- worked out by hand


def test_one_card_and_one_choice_gives_the_rate_worked_by_hand() -> None:
    """One layer stack on one card, b = M = 1, C = 64: the numbers of docs/cost-model.md with round inputs."""
    family = replace(SMALL_FAMILY, micro_batches=(1,), chunk_tokens=(64,), max_pool=0)
    problem = make_problem(
        [make_node("a", "A")], family=family, profiles={"A": make_profile("A")}, objective=Objective(
            kind=ObjectiveKind.THROUGHPUT, ttft_limit_s=None, tpot_limit_s=None
        )
    )  # fmt: skip
    (replica,) = solve_placement(problem).replicas
    # 40 output tokens, one at a time, with prompts of 120 tokens in 1.875 chunks: 40 iterations of the only request.
    assert replica.tpot_s == pytest.approx(1 / replica.rate / 40, rel=1e-12)
    assert [stage.num_layers for stage in replica.stages] == [6]
    # At least the weights are read 40 times: 6 layers of 2-byte parameters at 2e10 bytes/s, and 5e-5 s per step.
    weight_s = 6 * problem.model.layer_params() * 2 / 2e10
    assert 1 / replica.rate > 40 * (weight_s + 5e-5)


@pytest.mark.parametrize("kind", [ObjectiveKind.THROUGHPUT, ObjectiveKind.GPUS])
def test_a_search_that_is_cut_short_is_no_worse_than_equal_stages(kind: ObjectiveKind) -> None:
    """Time runs out when the search has found a tenth of the optimum, or a plan that costs ten times as much."""
    now, is_most = [0.0], kind is ObjectiveKind.THROUGHPUT

    def poor(*arguments: Any, **named: Any) -> Outcome | None:
        found = search_enumerated(*arguments, **named)
        assert found is not None
        now[0] = 100.0
        return replace(found, value=found.value / 10 if is_most else found.value * 10)

    objective = Objective(kind=kind, ttft_limit_s=None, tpot_limit_s=None, demand_rps=None if is_most else 1.0)
    problem = make_problem([make_node("a", "A", gpus=4)], objective=objective)
    with patch.object(search, "search_enumerated", poor):
        plan = solve_placement(problem, budget=Budget(time_limit_s=1.0, clock=lambda: now[0]))
    equal, best = solve_placement(problem, strategy="uniform"), solve_placement(problem)
    assert plan.result.value == pytest.approx(equal.result.value)
    assert plan.result.bound == pytest.approx(best.result.bound)


def test_runners_up_have_all_layers_of_the_model() -> None:
    moe = shape_of(num_experts=4, active_experts=2, expert_intermediate=256, first_dense_layers=2)
    family = replace(SMALL_FAMILY, micro_batches=(1, 4), max_pool=0)
    problem = make_problem([make_node("a", "A", gpus=2)], model=make_model(moe=moe), family=family)
    shapes = [one.shape for one in solve_placement(problem, strategy="hetis").runners_up]
    assert shapes
    for shape in shapes:
        assert sum(map(int, re.findall(r" L(\d+)", shape))) == problem.model.num_layers


def test_only_a_proof_says_that_no_whole_number_of_a_shape_makes_a_better_plan() -> None:
    """A shape worth its GPUs at the prices is left out of the best plan by rounding, of others perhaps by chance."""
    costs = build_cost_tables(make_problem([make_node("a", "A", gpus=4)], family=SMALL_FAMILY))
    outcome = search.search(costs, SearchSettings())
    assert outcome is not None
    worth_it = replace(outcome, runners_up=outcome.runners_up[:1], row_prices=np.zeros_like(outcome.row_prices))
    for status, claim in [
        (Status.OPTIMAL, "no whole number of it"),
        (Status.FEASIBLE, "no better plan with it was found"),
    ]:
        (shape,) = runners_up_of(costs, worth_it, status)
        assert claim in shape.reason
    (shape,) = runners_up_of(costs, replace(worth_it, row_prices=1e9 + worth_it.row_prices), Status.FEASIBLE)
    assert "elsewhere" in shape.reason
