"""Column generation: its bounds are valid and its plans sound, wherever brute force or the exact search can tell."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetis.solver.budget import Budget
from hetis.solver.check import check_plan
from hetis.solver.cluster import GpuSlots, Link, NodeGroup
from hetis.solver.placement import search
from hetis.solver.placement.families import STRATEGIES
from hetis.solver.placement.fleet import UNIFIED
from hetis.solver.placement.master import Columns, Master, MilpSolution
from hetis.solver.placement.pricing import Priced, Pricer
from hetis.solver.placement.tabulation import build_cost_tables
from hetis.solver.placement.template import configurations, use_of
from hetis.solver.plan import Objective, ObjectiveKind, Plan
from hetis.solver.planning import solve_placement
from hetis.solver.problem import PlacementProblem
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
from tests.solver.oracle import best_plan_value
from tests.solver.searching import plan_or_none, worth

KINDS = tuple(ObjectiveKind)
REL = 1e-6
EXAMPLES = max(3, settings().max_examples // 5)  # column generation takes about a second each


def generated(problem: PlacementProblem, strategy: str = "hetis", *, threads: int = 1) -> Plan | None:
    """Plan by column generation, however small the fleet; return None if no plan exists."""
    with patch.object(search, "is_small", lambda _: False):
        return plan_or_none(problem, strategy, threads=threads)


def with_wide_zone_links(problem: PlacementProblem) -> PlacementProblem:
    """The search grants every replica a share of the links between zones, which the oracle does not model."""
    cluster = problem.cluster
    wide = Link(bytes_per_s=1e12, latency_s=1e-4)
    return replace(problem, cluster=replace(cluster, network=replace(cluster.network, zone_default=wide)))


def assert_claims_hold(problem: PlacementProblem, plan: Plan | None, best: float) -> None:
    """Assert that ``best`` is the optimum: no plan beats it, and no bound excludes it."""
    if plan is None:
        assert best in (0.0, math.inf), f"no plan found, but there is one worth {best}"
        return
    assert check_plan(plan, problem) == ()
    value, bound = plan.result.value, plan.result.bound
    low, high = (value, bound) if problem.objective.maximises else (bound, value)
    assert low <= best * (1 + REL), f"value or bound {low} above the optimum {best}"
    assert best <= high * (1 + REL), f"value or bound {high} below the optimum {best}"


@pytest.mark.parametrize("strategy", ["hetis", "hexgen"])
@settings(max_examples=EXAMPLES)
@given(problem=problems(max_gpus=4, kinds=KINDS))
def test_optimum_of_brute_force_lies_between_plan_and_bound(strategy: str, problem: PlacementProblem) -> None:
    family = STRATEGIES[strategy].restrict(replace(SMALL_FAMILY, name=strategy))
    problem = with_wide_zone_links(replace(problem, family=family))
    assert_claims_hold(problem, generated(problem, strategy), best_plan_value(problem))


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "generated"])
def test_workers_of_a_second_class_count_where_a_stage_has_no_room_without(exact: bool) -> None:
    """Stages on A have no room for KV, so that all need workers; the best plan is one replica with a B and a C."""
    slow = {name: make_profile(name, usable_bytes=60_000_000, flops=1e9) for name in "BC"}
    problem = make_problem(
        [make_node("a", "A", nodes=2), make_node("b", "B"), make_node("c", "C")],
        profiles={"A": make_profile("A", usable_bytes=8_000_000), **slow},
        model=make_model(num_layers=4),
        workload=make_workload((1500, 100)),
        family=replace(SMALL_FAMILY, max_copies=1, tp_sizes=(1,), micro_batches=(4,)),
    )
    plan = plan_or_none(problem) if exact else generated(problem)
    assert plan is not None
    best = best_plan_value(problem)
    assert plan.result.bound >= best * (1 - REL)
    if exact:
        assert plan.result.value == pytest.approx(best)


@settings(max_examples=EXAMPLES)
@given(problems(max_gpus=9, kinds=KINDS))
def test_optimum_of_the_exact_search_lies_between_plan_and_bound(problem: PlacementProblem) -> None:
    problem = replace(problem, family=SMALL_FAMILY)
    assert_claims_hold(problem, generated(problem), worth(plan_or_none(problem), problem))


@settings(max_examples=max(2, EXAMPLES // 2))
@given(problems(max_gpus=12, kinds=KINDS, family=SMALL_FAMILY))
def test_equal_arguments_give_equal_plans(problem: PlacementProblem) -> None:
    assert generated(problem) == generated(problem)


@settings(max_examples=max(2, EXAMPLES // 3))
@given(problems(max_gpus=8, kinds=KINDS, family=SMALL_FAMILY))
def test_threads_change_neither_soundness_nor_bounds(problem: PlacementProblem) -> None:
    one, two = generated(problem), generated(problem, threads=2)
    assert (one is None) == (two is None)
    if one is None or two is None:
        return
    assert check_plan(two, problem) == ()
    if problem.objective.maximises:
        assert max(one.result.value, two.result.value) <= min(one.result.bound, two.result.bound) * (1 + REL)
    else:
        assert max(one.result.bound, two.result.bound) <= min(one.result.value, two.result.value) * (1 + REL)


def test_model_that_no_class_holds_alone_is_planned() -> None:
    """The fleet has too few of the cheapest stages: the search must go on to those it can form."""
    profiles = {name: make_profile(name, flops=3e11, bytes_per_s=3e9, usable_bytes=6_000_000) for name in "AC"}
    nodes = [make_node("a", "A"), make_node("c", "C")]
    problem = make_problem(nodes, profiles=profiles, model=make_model(num_layers=4))
    best = best_plan_value(problem)
    assert best > 0
    assert_claims_hold(problem, generated(problem), best)


@pytest.mark.parametrize("usable_bytes", [10_000_000, 13_000_000])
def test_bound_holds_where_equal_classes_have_one_gpu_each(usable_bytes: int) -> None:
    """Penalties raise each other from class to class; without a limit, rounding errors would dominate the bound."""
    profiles = {name: make_profile(name, usable_bytes=usable_bytes) for name in "BC"}
    model = make_model(num_layers=6, forbidden_cuts=frozenset({2, 3}), tie_embeddings=True)
    for micro_batch in (1, 4, 16):
        family = replace(SMALL_FAMILY, micro_batches=(micro_batch,), in_flight=(1,))
        nodes = [NodeGroup(name="n", gpus=(GpuSlots(gpu="B", count=1), GpuSlots(gpu="C", count=1)))]
        problem = make_problem(nodes, profiles=profiles, model=model, family=family)
        assert_claims_hold(problem, generated(problem), best_plan_value(problem))


@pytest.mark.parametrize("kind", [ObjectiveKind.COST, ObjectiveKind.GPUS])
@pytest.mark.parametrize("share", [0.3, 0.8, 0.99])
def test_demand_close_to_what_the_fleet_can_do_is_met(kind: ObjectiveKind, share: float) -> None:
    nodes = [make_node("a", "A", gpus=2), make_node("b", "B", gpus=2)]
    profiles = {"A": make_profile("A"), "B": make_profile("B", bytes_per_s=5e9)}
    most = solve_placement(make_problem(nodes, profiles=profiles)).result.value
    objective = replace(NO_LIMITS, kind=kind, demand_rps=share * most)
    problem = make_problem(nodes, profiles=profiles, objective=objective)
    assert_claims_hold(problem, generated(problem), best_plan_value(problem))


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


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "generated"])
@pytest.mark.parametrize("bytes_per_s", [1e6, 1e7])
@settings(max_examples=max(2, EXAMPLES // 2))
@given(problem=problems(max_gpus=6, family=SMALL_FAMILY))
def test_slow_links_between_zones_are_never_overdrawn(
    exact: bool, bytes_per_s: float, problem: PlacementProblem
) -> None:
    network = replace(problem.cluster.network, zone_default=Link(bytes_per_s=bytes_per_s, latency_s=1e-5))
    small = {n: replace(p, usable_bytes=min(p.usable_bytes, 6_000_000)) for n, p in problem.profiles.items()}
    problem = replace(problem, cluster=replace(problem.cluster, network=network), profiles=small)
    plan = plan_or_none(problem) if exact else generated(problem)
    assert plan is None or check_plan(plan, problem) == ()


@settings(max_examples=EXAMPLES)
@given(
    problem=problems(max_gpus=4, family=SMALL_FAMILY), factors=st.lists(st.floats(0.5, 2.0), min_size=12, max_size=12)
)
def test_ceilings_kept_from_earlier_prices_hide_no_replica(problem: PlacementProblem, factors: list[float]) -> None:
    """One pricer at changing prices and ever lower caps gives the results of a new one, or weaker ones."""
    costs = build_cost_tables(problem)
    num_rows = len(costs.resources.rows)
    settings_of = {"max_copies": 2, "max_pool": 2, "threads": 1, "tolerance": 1e-4}
    every = [c for c in configurations(costs) if c.side == UNIFIED]
    kept, rate_cap = Pricer(costs, every, np.zeros(num_rows), **settings_of), 1e4  # type: ignore[arg-type]
    for at in range(3):
        prices = np.array([factors[(at * num_rows + row) % len(factors)] for row in range(num_rows)])
        new = Pricer(costs, every, np.zeros(num_rows), **settings_of)  # type: ignore[arg-type]
        rate_cap *= 0.5
        best = new.price(prices, 0.0, 1.0, Budget(), rate_cap=rate_cap)
        floor = 0.9 * best.ratio_bound
        again = kept.price(prices, floor, 1.0, Budget(), rate_cap=rate_cap, ease=0.01)
        for template in best.templates:
            ratio = min(template.rate, rate_cap) / float(prices @ use_of(costs, template))
            assert again.ratio_bound >= ratio * (1 - REL)


def test_a_replica_that_a_limit_keeps_fast_is_priced_whatever_rate_counts() -> None:
    """The replica cannot be slowed down to the cap, and may be part of a plan that serves less than it could."""
    limits = Objective(ttft_limit_s=0.05, tpot_limit_s=None)
    costs = build_cost_tables(make_problem([make_node("a", "A", gpus=2)], objective=limits))
    every = [c for c in configurations(costs) if c.side == UNIFIED]
    prices = np.ones(len(costs.resources.rows))
    pricer = Pricer(costs, every, 0.0 * prices, max_copies=2, max_pool=0, threads=1, tolerance=1e-4)
    priced = pricer.price(prices, 0.0, 1.0, Budget(), rate_cap=1e-3)
    assert priced.templates
    assert priced.ratio_bound >= 1e-3 / 2


def test_pricing_without_time_knows_nothing_and_says_so() -> None:
    costs = build_cost_tables(make_problem([make_node("a", "A", gpus=2)]))
    every = [c for c in configurations(costs) if c.side == UNIFIED]
    prices = np.ones(len(costs.resources.rows))
    pricer = Pricer(costs, every, 0.0 * prices, max_copies=2, max_pool=0, threads=1, tolerance=1e-4)
    spent = Budget()
    spent.cancelled.set()
    priced = pricer.price(prices, 0.0, 1.0, spent, rate_cap=np.inf)
    assert (priced.templates, priced.ratio_bound, priced.complete) == ((), np.inf, False)
    later = pricer.price(prices, 0.0, 1.0, Budget(), rate_cap=np.inf)  # nothing from the first pricing counts as proved
    assert later.complete
    assert later.templates
    assert later.ratio_bound < np.inf


def test_a_share_of_a_budget_ends_before_it_and_is_cancelled_with_it() -> None:
    readings = iter([10.0, 12.0, 12.0, 13.0, 15.5])
    budget = Budget(time_limit_s=8.0, clock=lambda: next(readings))
    part = budget.share(0.5)  # at 12 s, 6 s are left; the share's own start is not read again
    assert part.elapsed_s() == 5.5
    assert part.time_limit_s == 5.0
    assert not budget.cancelled.is_set()
    budget.cancelled.set()
    assert part.cancelled.is_set()


def test_a_budget_of_its_own_ends_with_the_callers_and_not_the_other_way_round() -> None:
    callers = Budget(time_limit_s=8.0, clock=lambda: 10.0)
    own, other = callers.of_its_own(), callers.of_its_own()
    own.cancelled.set()
    assert own.is_spent()
    assert not callers.is_spent()
    assert not other.is_spent()
    callers.cancelled.set()
    assert other.is_spent()
    assert not other.cancelled.is_set()


def test_where_no_time_is_left_for_whole_counts_those_of_the_relaxation_are_rounded_down() -> None:
    def in_vain(
        _: Master, columns: Columns, *, start: MilpSolution | None = None, **__: object
    ) -> tuple[MilpSolution | None, bool]:
        return start, False

    problem = make_problem([make_node("a", "A", nodes=20)], objective=NO_LIMITS)
    with patch.object(Master, "solve_milp", in_vain):
        plan = generated(problem)
    assert plan is not None
    assert not check_plan(plan, problem)
    best = generated(problem)
    assert best is not None
    assert 0.5 * best.result.value < plan.result.value <= best.result.value * (1 + REL)


def test_sides_with_few_configurations_are_priced_first() -> None:
    sizes: list[int] = []
    price = Pricer.price

    def noted(pricer: Pricer, *arguments: Any, **more: Any) -> Priced:
        sizes.append(len(pricer.configurations))
        return price(pricer, *arguments, **more)

    problem = make_problem([make_node("a", "A", nodes=3)], objective=NO_LIMITS)
    with patch.object(Pricer, "price", noted):
        assert generated(problem) is not None
    whole = len(configurations(build_cost_tables(problem)))
    rounds = [sizes[i : i + 4] for i in range(0, len(sizes), 4)]
    assert any(sum(one) == whole and one == sorted(one) and one[-1] > one[0] for one in rounds)
