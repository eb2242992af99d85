"""Published heuristics: plans pass the checker, are reproducible, and never beat the strategy that contains them."""

from __future__ import annotations

import itertools
import math
from unittest.mock import patch

import pytest
from hypothesis import given, settings

from hetis.solver.budget import Budget
from hetis.solver.check import check_plan
from hetis.solver.cluster import Link, Network
from hetis.solver.errors import InfeasibleError, NoPlanFoundError
from hetis.solver.placement.families import STRATEGIES
from hetis.solver.placement.replicas.tabulation import build_cost_tables
from hetis.solver.plan import Objective, ObjectiveKind, Plan, Role, Status
from hetis.solver.planning import solve_placement
from hetis.solver.problem import PlacementProblem
from hetis.solver.published import PUBLISHED, hetis_paper, heuristic
from hetis.solver.published.hetis_paper import dense_path
from hetis.solver.published.replicas import duty_of
from tests.models import replace
from tests.solver.instances import (
    NO_LIMITS,
    SMALL_FAMILY,
    make_model,
    make_node,
    make_problem,
    make_profile,
    make_workload,
    problems,
)

KINDS = tuple(ObjectiveKind)
REL = 1e-6
EXAMPLES = max(5, settings().max_examples // 2)


def planned(problem: PlacementProblem, strategy: str, *, seed: int = 0) -> Plan | None:
    try:
        return solve_placement(problem, strategy=strategy, seed=seed)
    except (NoPlanFoundError, InfeasibleError):
        return None


def restricted(problem: PlacementProblem, strategy: str) -> PlacementProblem:
    return replace(problem, family=STRATEGIES[strategy].restrict(problem.family))


def test_every_published_heuristic_is_a_strategy() -> None:
    assert {name for name, strategy in STRATEGIES.items() if strategy.is_published} == set(PUBLISHED)


@pytest.mark.parametrize("strategy", sorted(PUBLISHED))
@settings(max_examples=EXAMPLES)
@given(problem=problems(max_gpus=8, kinds=KINDS))
def test_every_plan_passes_the_checker(strategy: str, problem: PlacementProblem) -> None:
    plan = planned(problem, strategy)
    if plan is not None:
        assert plan.strategy == strategy
        assert plan.result.status is Status.FEASIBLE
        assert check_plan(plan, restricted(problem, strategy)) == ()


@pytest.mark.parametrize("strategy", sorted(PUBLISHED))
@settings(max_examples=5)
@given(problem=problems(max_gpus=8))
def test_the_same_seed_gives_the_same_plan(strategy: str, problem: PlacementProblem) -> None:
    assert planned(problem, strategy, seed=3) == planned(problem, strategy, seed=3)


@settings(max_examples=EXAMPLES)
@given(problem=problems(max_gpus=6, kinds=(ObjectiveKind.COST, ObjectiveKind.GPUS)))
def test_the_bound_on_cost_holds_for_hexgen2(problem: PlacementProblem) -> None:
    published, proven = planned(problem, "hexgen2-paper"), planned(problem, "hexgen2")
    if published is not None:
        assert proven is not None
        assert published.result.bound <= proven.result.value * (1 + REL)
        assert proven.result.value <= published.result.value * (1 + REL)


def strong_and_weak(*, objective: Objective = NO_LIMITS) -> PlacementProblem:
    """Two strong cards, and four weak ones with much memory."""
    nodes = [make_node("strong", "A", gpus=2), make_node("weak", "B", gpus=4)]
    profiles = {
        "A": make_profile("A", flops=2e13, bytes_per_s=2e11, usable_bytes=40_000_000),
        "B": make_profile("B", flops=1e11, bytes_per_s=4e10, usable_bytes=60_000_000),
    }
    return make_problem(nodes, profiles=profiles, objective=objective)


def test_a_type_that_hardly_helps_becomes_attention_workers_of_every_stage() -> None:
    plan = planned(strong_and_weak(), "hetis-paper")
    assert plan is not None
    primaries = {stage.gpu for replica in plan.replicas for stage in replica.stages}
    assert primaries == {"A"}
    assert all(pool.shared and pool.gpu == "B" for replica in plan.replicas for pool in replica.attention_workers)


@pytest.mark.parametrize(
    ("worker_bytes", "micro_batch", "kept"),
    [(3_000_000, 4, [1, 1]), (6_000_000, 4, [0, 0]), (20_000_000, 16, [0, 0])],
)
def test_shared_cards_hold_the_kv_of_all_stages(worker_bytes: int, micro_batch: int, kept: list[int]) -> None:
    """Two strong cards need a stage each for the weights; the workers' memory decides how much decodes at once."""
    nodes = [make_node("strong", "A", nodes=2), make_node("weak", "B", gpus=2)]
    profiles = {
        "A": make_profile("A", flops=2e13, bytes_per_s=2e10, usable_bytes=8_000_000),
        "B": make_profile("B", flops=1e11, bytes_per_s=2e11, usable_bytes=worker_bytes),
    }
    fast = Network(default=Link(bytes_per_s=1e11, latency_s=1e-7))
    problem = make_problem(nodes, profiles=profiles, network=fast, workload=make_workload((300, 200)))
    plan = planned(problem, "hetis-paper")
    assert plan is not None
    (replica,) = plan.replicas
    assert [stage.kv_head_groups_kept for stage in replica.stages] == kept
    assert replica.micro_batch == micro_batch
    assert {pool.devices for pool in replica.attention_workers} == {("weak/0", "weak/1")}
    assert [pool.stage for pool in replica.attention_workers] == [0, 1]
    assert check_plan(plan, restricted(problem, "hetis-paper")) == ()


@pytest.mark.parametrize(("flops", "stays"), [(4e12, True), (1e12, True), (1e11, False), (1e10, False)])
def test_a_type_leaves_the_dense_path_that_takes_five_percent_off_it_at_most(flops: float, stays: bool) -> None:
    """Two strong cards of 8e12 FLOP/s and one weak one; memory and links are ample, so that computing decides."""
    profiles = {
        "A": make_profile("A", flops=8e12, usable_bytes=10**9),
        "B": make_profile("B", flops=flops, bytes_per_s=1e12, usable_bytes=10**9),
    }
    problem = make_problem(
        [make_node("a", "A", gpus=2), make_node("b", "B")],
        profiles=profiles,
        model=make_model(num_layers=60),
        workload=make_workload((4000, 10)),
        network=Network(default=Link(bytes_per_s=1e12, latency_s=0.0)),
    )
    costs = build_cost_tables(restricted(problem, "hetis-paper"))
    duty, strong, weak = duty_of(costs, Role.UNIFIED, "default"), (0, (2,)), (1, (1,))
    without, by_rule = dense_path(costs, duty, (strong,)), dense_path(costs, duty, (strong, weak))
    with patch.object(hetis_paper, "LEAST_GAIN", -math.inf):
        everyone = dense_path(costs, duty, (strong, weak))
    assert without is not None
    assert by_rule is not None
    assert everyone is not None
    gain = 1.0 - everyone.cost_s / without.cost_s
    assert (gain > 0.05) == stays
    assert by_rule.leavers == (() if stays else (1,))
    if flops == 1e11:
        assert gain > 0.0  # it would help, but only a little


def test_cards_that_leave_the_dense_path_stay_idle_where_heads_cannot_be_split() -> None:
    """Windows that free KV in some layers leave nothing to attention workers: the family has no pools."""
    problem = strong_and_weak()
    model = replace(problem.model, sliding_window=64, sliding_layers=3)
    plan = planned(replace(problem, model=model), "hetis-paper")
    assert plan is not None
    assert {stage.gpu for replica in plan.replicas for stage in replica.stages} == {"A"}
    assert not any(replica.attention_workers for replica in plan.replicas)


def test_types_of_equal_strength_stay_in_the_dense_path() -> None:
    nodes = [make_node("a", "A", gpus=2), make_node("b", "B", gpus=2)]
    plan = planned(make_problem(nodes), "hetis-paper")
    assert plan is not None
    assert {stage.gpu for replica in plan.replicas for stage in replica.stages} == {"A", "B"}


def test_hexgen2_paper_routes_all_that_it_serves() -> None:
    plan = planned(strong_and_weak(), "hexgen2-paper")
    assert plan is not None
    assert {replica.role for replica in plan.replicas} == {Role.PREFILL, Role.DECODE}
    share = make_problem([make_node("a", "A")]).assumptions.planned_utilisation
    assert plan.result.value == pytest.approx(share * sum(route.rate for route in plan.kv_routes))


def test_kv_goes_to_another_zone_where_that_serves_more() -> None:
    """One fast card in each zone: alone neither zone can prefill and decode, so KV has to cross."""
    nodes = [make_node("a", "A", zone="east"), make_node("b", "A", zone="west")]
    fast = Link(bytes_per_s=5e9, latency_s=1e-5)
    problem = make_problem(nodes, network=Network(default=fast, zone_default=fast))
    plan = planned(problem, "hexgen2-paper")
    assert plan is not None
    assert check_plan(plan, restricted(problem, "hexgen2-paper")) == ()
    prefill = next(replica for replica in plan.replicas if replica.role is Role.PREFILL)
    assert set(prefill.kv_zones) == {"east", "west"}


def test_a_slow_link_between_zones_limits_the_flow() -> None:
    nodes = [make_node("a", "A", zone="east"), make_node("b", "A", zone="west")]
    values = []
    for bytes_per_s in (5e9, 1e7):
        link = Link(bytes_per_s=bytes_per_s, latency_s=1e-5)
        problem = make_problem(nodes, network=Network(default=Link(bytes_per_s=5e9, latency_s=1e-5), zone_default=link))
        plan = planned(problem, "hexgen2-paper")
        assert plan is not None
        assert check_plan(plan, restricted(problem, "hexgen2-paper")) == ()
        values.append(plan.result.value)
    assert values[1] < 0.5 * values[0]


@pytest.mark.parametrize("strategy", sorted(PUBLISHED))
def test_out_of_time_is_told_from_not_found(strategy: str) -> None:
    seconds = iter(range(100))
    budget = Budget(time_limit_s=0.5, clock=lambda: float(next(seconds)))
    tight = Objective(ttft_limit_s=1e-6, tpot_limit_s=1e-6)
    with pytest.raises(NoPlanFoundError, match=r"^no plan found within .* s; allow more time$"):
        solve_placement(strong_and_weak(objective=tight), strategy=strategy, budget=budget)
    with pytest.raises(NoPlanFoundError, match=rf"^{strategy} found no "):
        solve_placement(strong_and_weak(objective=tight), strategy=strategy)


@pytest.mark.parametrize("strategy", ["hexgen-paper", "hexgen2-paper"])
def test_a_search_ends_soon_after_its_time_and_its_plan_says_so(strategy: str) -> None:
    """The clock advances whenever it is read, which is before each shape of each group."""
    reads = itertools.count()
    budget = Budget(time_limit_s=8.5, clock=lambda: float(next(reads)))
    plan = solve_placement(strong_and_weak(), strategy=strategy, budget=budget)
    assert heuristic.OUT_OF_TIME in plan.notes
    assert next(reads) < 200
    whole = planned(strong_and_weak(), strategy)
    assert whole is not None
    assert heuristic.OUT_OF_TIME not in whole.notes


def test_one_gpu_cannot_prefill_and_decode_apart() -> None:
    with pytest.raises(NoPlanFoundError, match=r"^hexgen2-paper needs two GPUs at least"):
        solve_placement(make_problem([make_node("a", "A")]), strategy="hexgen2-paper")


@pytest.mark.parametrize("strategy", sorted(PUBLISHED))
def test_a_fleet_too_large_for_the_heuristic_is_refused_with_its_size(strategy: str) -> None:
    problem = make_problem([make_node("a", "A", gpus=8, nodes=1000)], family=replace(SMALL_FAMILY, max_pool=0))
    with pytest.raises(NoPlanFoundError, match=r"8000 GPUs, it is meant for (1024|4096) at most$"):
        solve_placement(problem, strategy=strategy)


@pytest.mark.parametrize("strategy", sorted(PUBLISHED))
def test_a_demand_beyond_the_heuristic_is_no_plan_but_no_proof_either(strategy: str) -> None:
    objective = Objective(kind=ObjectiveKind.GPUS, ttft_limit_s=None, tpot_limit_s=None, demand_rps=1e6)
    with pytest.raises(NoPlanFoundError, match=r"serves .* requests/s, 1e\+06 are demanded$"):
        solve_placement(strong_and_weak(objective=objective), strategy=strategy)
