"""A search without a plan gives the reasons, and the results of a search stopped early are still true."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hetis.solver.backends.highs import quiet_highs
from hetis.solver.budget import Budget, Progress, SearchSettings
from hetis.solver.check import check_plan
from hetis.solver.cluster import Link
from hetis.solver.engine_rules import EngineSettings
from hetis.solver.errors import InfeasibleError, InvalidProblemError, NoPlanFoundError
from hetis.solver.placement import master
from hetis.solver.placement.families import STRATEGIES
from hetis.solver.placement.infeasible import trials as trials_module
from hetis.solver.placement.infeasible.requirements import Requirement, Subject, requirements_of
from hetis.solver.placement.infeasible.trials import Trials
from hetis.solver.placement.replicas.tabulation import build_cost_tables
from hetis.solver.plan import ObjectiveKind, Status
from hetis.solver.planning import solve_placement
from hetis.solver.problem import PlacementProblem
from hetis.solver.replanning.fresh import search_fresh
from tests.solver.instances import NO_LIMITS, SMALL_FAMILY, make_model, make_node, make_problem, make_profile, problems
from tests.solver.oracle import best_plan_value
from tests.solver.placement.engines.families import FAMILIES as ENGINES_FAMILIES

KINDS = tuple(ObjectiveKind)
EXAMPLES = max(3, settings().max_examples // 5)
# Published heuristics prove nothing, so that they cannot give reasons why no plan exists.
SEARCHED = [name for name, strategy in STRATEGIES.items() if not strategy.is_published]
every_strategy = pytest.mark.parametrize("strategy", SEARCHED)


class Ticks:
    """A clock that advances by a second with every reading."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 1.0
        return self.now_s


def with_wide_zone_links(problem: PlacementProblem) -> PlacementProblem:
    """The search grants every replica a share of the links between zones, which the oracle does not model."""
    cluster = problem.cluster
    wide = Link(bytes_per_s=1e12, latency_s=1e-4)
    return replace(problem, cluster=replace(cluster, network=replace(cluster.network, zone_default=wide)))


def reasons(problem: PlacementProblem, strategy: str = "hetis") -> str:
    with pytest.raises(InfeasibleError) as caught:
        solve_placement(problem, strategy=strategy)
    assert str(caught.value) == "; ".join(caught.value.reasons)
    return str(caught.value)


# --- infeasible


@every_strategy
def test_too_little_memory_is_said_with_both_numbers(strategy: str) -> None:
    tiny = {"A": make_profile("A", usable_bytes=2_000_000)}
    problem = make_problem([make_node("a", "A", nodes=2)], profiles=tiny, model=make_model(num_layers=40))
    message = reasons(problem, strategy)
    assert "tiny needs " in message
    assert "for weights alone; this fleet has " in message


@every_strategy
@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"tpot_limit_s": 1e-6}, "mean TPOT limit 0.001 ms"),
        ({"ttft_limit_s": 1e-6}, "p95 TTFT limit 0.001 ms"),
    ],
)
def test_impossible_limit_is_named(strategy: str, limits: dict[str, float], words: str) -> None:
    problem = make_problem([make_node("a", "A", nodes=2)], objective=replace(NO_LIMITS, **limits))
    assert words in reasons(problem, strategy)


@every_strategy
@pytest.mark.parametrize("kind", [ObjectiveKind.COST, ObjectiveKind.GPUS])
def test_demand_beyond_the_fleet_is_named(strategy: str, kind: ObjectiveKind) -> None:
    objective = replace(NO_LIMITS, kind=kind, demand_rps=1e5)
    problem = make_problem([make_node("a", "A", nodes=3)], objective=objective)
    message = reasons(problem, strategy)
    assert message.startswith("demand 100000 requests/s is above what this fleet serves: ")


def test_heads_that_no_tp_size_splits_are_named() -> None:
    family = replace(SMALL_FAMILY, tp_sizes=(4,))
    problem = make_problem([make_node("a", "A", gpus=2)], family=family)
    assert "cannot be split by any of TP 4 on this fleet" in reasons(problem)


@settings(max_examples=EXAMPLES)
@given(problems(max_gpus=4, kinds=KINDS, family=SMALL_FAMILY))
def test_infeasible_is_only_said_of_problems_without_a_plan(problem: PlacementProblem) -> None:
    try:
        solve_placement(problem)
    except InfeasibleError as error:
        best = best_plan_value(problem)
        assert best in (0.0, float("inf")), f"there is a plan worth {best}, but: {error}"  # noqa: PT017
        assert error.reasons  # noqa: PT017
        assert all(error.reasons)  # noqa: PT017


FAMILIES = (
    *ENGINES_FAMILIES,
    *(STRATEGIES[name].restrict(replace(SMALL_FAMILY, name=name)) for name in ("hexgen2", "splitwise", "uniform")),
    SMALL_FAMILY.at(EngineSettings(max_num_seqs=2, kv_blocks=40)),
)


@settings(max_examples=2 * EXAMPLES)
@given(
    problem=st.sampled_from(FAMILIES).flatmap(lambda family: problems(max_gpus=4, kinds=KINDS, family=family)),
)
def test_every_family_has_reasons_for_having_no_plan(problem: PlacementProblem) -> None:
    """`tests.solver.searching` looks for none, and `tests.solver.placement.test_conflicts` whether they are true."""
    try:
        solve_placement(problem, strategy=problem.family.name)
    except InfeasibleError as error:
        assert error.reasons  # noqa: PT017
        assert all(error.reasons)  # noqa: PT017
    except (InvalidProblemError, NoPlanFoundError):
        assume(False)


# --- a time-out is no proof


@contextmanager
def milps_without_time(num_calls: int = 1 << 20) -> Iterator[list[float]]:
    """Give the first MILPs of placement no time at all; yield a list with one entry for each MILP begun."""
    begun = list[float]()

    def cut(options: Any = None, **settings: Any) -> Any:
        is_milp = options is not None and "mip_rel_gap" in options
        highs = quiet_highs(options, **settings)
        if is_milp:
            begun.append(0.0)
            if len(begun) <= num_calls:
                highs.setOptionValue("time_limit", 0.0)
        return highs

    with patch.object(master, "quiet_highs", cut):
        yield begun


@pytest.mark.parametrize("kind", [ObjectiveKind.THROUGHPUT, ObjectiveKind.GPUS])
def test_packings_that_ran_out_of_time_prove_nothing(kind: ObjectiveKind) -> None:
    demand = None if kind is ObjectiveKind.THROUGHPUT else 1.0
    problem = make_problem([make_node("a", "A", nodes=2)], objective=replace(NO_LIMITS, kind=kind, demand_rps=demand))
    with milps_without_time(), pytest.raises(NoPlanFoundError, match="nor a proof that there is none"):
        solve_placement(problem, strategy="uniform")
    equal = replace(problem, family=STRATEGIES["uniform"].restrict(problem.family))
    with milps_without_time():
        fresh = search_fresh(build_cost_tables(equal), SearchSettings())
    assert not fresh.is_empty
    assert math.isfinite(fresh.bound)
    assert (fresh.bound > 0.0) == problem.objective.maximises, "what is known without a packing"


# --- trials


def test_trials_search_only_what_nothing_simpler_answers() -> None:
    limits = replace(NO_LIMITS, tpot_limit_s=1.0, ttft_limit_s=100.0)
    problem = make_problem([make_node("a", "A", nodes=2)], objective=limits)
    asked = requirements_of(problem)
    trials = Trials(problem, SearchSettings())
    with patch.object(trials_module, "search", side_effect=AssertionError("searched")):
        kept = trials.of(asked)
        assert kept.exists is True, "equal stages do"
        assert trials.of(asked[1:]) is kept, "what keeps more keeps less"
        tight = [asked[0].at(1e-9)]
        refuted = trials.of(tight)
        assert refuted.exists is False, "dense work alone takes longer"
        assert trials.of([*tight, *asked[1:]]) is refuted
        with pytest.raises(AssertionError, match="searched"):
            trials.of([Requirement(subject=Subject.DEMAND, value=1.01 * first_rate(problem))])


@pytest.mark.parametrize("strategy", ["uniform", "hetis"])
def test_a_demand_met_by_gpus_that_cost_nothing_is_a_plan(strategy: str) -> None:
    objective = replace(NO_LIMITS, kind=ObjectiveKind.COST, demand_rps=1.0)
    problem = make_problem([make_node("a", "A", nodes=2)], objective=objective, usd_per_hour={"A": 0.0})
    result = solve_placement(problem, strategy=strategy).result
    assert (result.value, result.bound, result.status) == (0.0, 0.0, Status.OPTIMAL)


def first_rate(problem: PlacementProblem) -> float:
    """Search for the goodput of equal stages, whatever the problem."""
    free = replace(problem, objective=replace(NO_LIMITS, kind=ObjectiveKind.GOODPUT))
    return solve_placement(free, strategy="uniform").result.value


# --- invalid


def test_objective_without_its_demand_is_refused() -> None:
    with pytest.raises(InvalidProblemError, match=r"^objective cost needs a demanded rate$"):
        make_problem([make_node("a", "A")], objective=replace(NO_LIMITS, kind=ObjectiveKind.COST))


# --- stopped early


@pytest.mark.parametrize("strategy", ["hetis", "hexgen"])
def test_no_time_at_all_proves_nothing(strategy: str) -> None:
    problem = make_problem([make_node("a", "A", nodes=2)])
    budget = Budget(time_limit_s=0.0, clock=Ticks())
    try:
        plan = solve_placement(problem, strategy=strategy, budget=budget)
    except NoPlanFoundError as error:
        assert str(error).endswith("allow more time")  # noqa: PT017
    else:
        assert check_plan(plan, replace(problem, family=STRATEGIES[strategy].restrict(problem.family))) == ()


def test_cancelled_before_the_start_proves_nothing() -> None:
    problem = make_problem([make_node("a", "A", nodes=2)])
    budget = Budget()
    budget.cancelled.set()
    try:
        plan = solve_placement(problem, budget=budget)
    except NoPlanFoundError:
        return
    assert plan.result.status in (Status.INTERRUPTED, Status.OPTIMAL)
    assert check_plan(plan, problem) == ()


@settings(max_examples=EXAMPLES)
@given(problem=problems(max_gpus=4, kinds=KINDS, family=SMALL_FAMILY), ticks=st.integers(1, 60))
def test_plan_in_hand_when_time_runs_out_is_sound(problem: PlacementProblem, ticks: int) -> None:
    problem = with_wide_zone_links(problem)
    budget = Budget(time_limit_s=float(ticks), clock=Ticks())
    try:
        plan = solve_placement(problem, budget=budget)
    except NoPlanFoundError:
        return
    except InfeasibleError:
        assert best_plan_value(problem) in (0.0, float("inf"))
        return
    assert_truthful(problem, plan.result.value, plan.result.bound)
    assert check_plan(plan, problem) == ()


@settings(max_examples=EXAMPLES)
@given(problem=problems(max_gpus=4, kinds=KINDS, family=SMALL_FAMILY), news=st.integers(1, 6))
def test_cancelled_search_returns_what_it_has(problem: PlacementProblem, news: int) -> None:
    problem = with_wide_zone_links(problem)
    budget, seen = Budget(), list[Progress]()

    def cancel_after(progress: Progress) -> None:
        seen.append(progress)
        if len(seen) == news:
            budget.cancelled.set()

    try:
        plan = solve_placement(problem, budget=budget, report=cancel_after)
    except NoPlanFoundError:
        assert budget.cancelled.is_set()
        return
    except InfeasibleError:
        assert best_plan_value(problem) in (0.0, float("inf"))
        return
    if budget.cancelled.is_set():
        assert plan.result.status in (Status.INTERRUPTED, Status.OPTIMAL)
    assert_truthful(problem, plan.result.value, plan.result.bound)
    assert check_plan(plan, problem) == ()


def test_a_share_of_a_budget_ends_with_whoever_waits_for_it() -> None:
    callers = Budget()
    share = callers.of_its_own().share(0.5)
    assert not share.is_spent()
    callers.cancelled.set()
    assert share.is_spent()


def assert_truthful(problem: PlacementProblem, value: float, bound: float) -> None:
    best = best_plan_value(problem)
    low, high = (value, bound) if problem.objective.maximises else (bound, value)
    assert low * (1 - 1e-6) <= best <= high * (1 + 1e-6)


# --- progress


def test_news_never_gets_worse() -> None:
    seen = list[Progress]()
    nodes = [make_node("a", "A", gpus=4), make_node("b", "B", gpus=2)]
    problem = make_problem(nodes, profiles={"A": make_profile("A"), "B": make_profile("B", bytes_per_s=5e9)})
    solve_placement(problem, report=seen.append)
    incumbents = [p.incumbent for p in seen if p.incumbent is not None]
    assert incumbents == sorted(incumbents)
    assert incumbents
