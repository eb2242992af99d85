"""Conflicts are minimal, and every relaxation works when it is applied: memory, links, limits, constraints, prices.

Obstacles are tested alone and in combination; each relaxation's suggestion is solved as a separate problem.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetis.solver.check import check_plan
from hetis.solver.cluster import Link, Network
from hetis.solver.constraints import AtMost, Duty, Exclude, Replicas, RestrictRole, Sum, Use, WithoutTp
from hetis.solver.engine_rules import Family
from hetis.solver.errors import InfeasibleError
from hetis.solver.placement.constrained_problem import apply_constraints, is_nothing_left
from hetis.solver.placement.families import STRATEGIES
from hetis.solver.placement.infeasible import ExplainedInfeasibleError, Infeasibility, Offer, Requirement
from hetis.solver.placement.infeasible.relaxations import with_added
from hetis.solver.placement.infeasible.requirements import Subject, keeping, requirements_of, with_faster_links
from hetis.solver.placement.outcome import rate_bound
from hetis.solver.placement.replicas.tabulation import build_cost_tables
from hetis.solver.plan import Objective, ObjectiveKind, Role
from hetis.solver.planning import solve_placement
from hetis.solver.problem import PlacementProblem
from tests.solver.instances import (
    NO_LIMITS,
    SMALL_FAMILY,
    make_gpu,
    make_model,
    make_node,
    make_problem,
    make_profile,
    problems,
)
from tests.solver.oracle import best_plan_value
from tests.solver.searching import plan_or_none
from tests.solver.test_constraints import best_by_brute_force, of, some_constraint, two_types

EXAMPLES = max(8, settings().max_examples // 4)
GPUS = ObjectiveKind.GPUS


def why(problem: PlacementProblem, *, strategy: str = "hetis", market: bool = False) -> Infeasibility:
    with pytest.raises(InfeasibleError) as caught:
        solve_placement(problem, strategy=strategy, market=(lambda: ()) if market else None)
    assert isinstance(caught.value, ExplainedInfeasibleError)
    assert caught.value.reasons == caught.value.why.reasons
    return caught.value.why


def exists(problem: PlacementProblem) -> bool:
    """Return whether a plan exists, by a separate solve, whose plan passes the checker."""
    plan = plan_or_none(problem, problem.family.name)
    assert plan is None or check_plan(plan, problem) == ()
    return plan is not None


def posed(problem: PlacementProblem, kept: Iterable[Requirement]) -> PlacementProblem:
    """Return the problem with these requirements alone, its demand among them."""
    kept = frozenset(kept)
    demand = [r.value for r in kept if r.subject is Subject.DEMAND]
    relaxed = keeping(problem, kept)
    objective = replace(
        relaxed.objective, kind=GPUS if demand else ObjectiveKind.GOODPUT, demand_rps=sum(demand) or None
    )
    return replace(relaxed, objective=objective)


def assert_smallest(problem: PlacementProblem, found: Infeasibility) -> None:
    """Assert that no conflict can be kept, but every conflict without any one member can."""
    assert found.conflicts
    for conflict in found.conflicts:
        assert conflict.is_minimal
        assert not exists(posed(problem, conflict.members)), list(map(str, conflict.members))
        for member in conflict.members:
            assert exists(posed(problem, set(conflict.members) - {member})), str(member)


def applied(problem: PlacementProblem, option: str) -> PlacementProblem:
    """Return the problem with an option changed as a relaxation suggests."""
    name, value = option.split(" ", 1)
    seconds = float(value[:-2]) * 1e-3 if value.endswith("ms") else float(value.rstrip("s"))
    field = {"--rate": "demand_rps", "--tpot": "tpot_limit_s", "--ttft": "ttft_limit_s"}[name]
    return replace(problem, objective=replace(problem.objective, **{field: seconds}))


# --- one obstacle at a time


def test_memory_alone_is_blamed_where_weights_do_not_fit() -> None:
    model = make_model()
    profile = make_profile("A", usable_bytes=1_000_000 + int(0.8 * model.params() * model.weight_bytes))
    problem = make_problem([make_node("a", "A")], profiles={"A": profile})
    found = why(problem, market=True)
    assert [m.subject for m in found.conflicts[0].members] == [Subject.MEMORY]
    assert "for weights alone" in found.reasons[0]
    assert_smallest(problem, found)
    weights, cards = found.relaxations
    assert exists(
        replace(problem, model=replace(problem.model, weight_bytes=1.0 if "8-bit" in weights.change else 0.53))
    )
    count = int(cards.change.split()[1])
    offer = Offer(gpu=make_gpu("A"), profile=profile)
    assert exists(with_added(problem, offer, count))
    assert cards.usd_per_hour == count
    if count > 1:
        assert not exists(with_added(problem, offer, count - 1))


def test_smaller_weights_come_before_more_gpus_where_time_is_short() -> None:
    problem = make_problem([make_node("a", "A")], profiles={"A": make_profile("A", usable_bytes=60_000_000)})
    quicker = replace(problem, objective=replace(problem.objective, tpot_limit_s=5e-4))
    assert not exists(quicker)
    fast = Offer(gpu=make_gpu("fast"), profile=make_profile("fast", bytes_per_s=8e10, usable_bytes=60_000_000))
    with pytest.raises(InfeasibleError) as caught:
        solve_placement(quicker, market=lambda: (fast,))
    assert isinstance(caught.value, ExplainedInfeasibleError)
    tpot, weights, *cards = caught.value.why.relaxations
    assert tpot.option.startswith("--tpot")
    assert (weights.change, weights.option) == ("8-bit weights", "--weights fp8")
    assert [one.change.split()[0] for one in cards] == ["add"] * len(cards) != []
    assert exists(replace(quicker, model=replace(quicker.model, weight_bytes=1.0)))


def test_the_cheapest_gpus_to_add_come_first() -> None:
    problem = make_problem([make_node("a", "A")], profiles={"A": make_profile("A", usable_bytes=4_000_000)})
    cheap = Offer(gpu=make_gpu("cheap", usd_per_hour=0.5), profile=make_profile("cheap", usable_bytes=30_000_000))
    dear = Offer(gpu=make_gpu("dear", usd_per_hour=5.0), profile=make_profile("dear", usable_bytes=60_000_000))
    with pytest.raises(InfeasibleError) as caught:
        solve_placement(problem, market=lambda: (dear, cheap))
    assert isinstance(caught.value, ExplainedInfeasibleError)
    rents = [r.usd_per_hour for r in caught.value.why.relaxations if r.change.startswith("add ")]
    assert rents == sorted(rents, key=float)
    assert rents[0] == 0.5


def test_slow_links_are_blamed_where_a_replica_needs_several_nodes() -> None:
    slow = Network(default=Link(bytes_per_s=1e5, latency_s=1e-2))
    problem = make_problem(
        [make_node("a", "A", nodes=4)],
        profiles={"A": make_profile("A", usable_bytes=6_000_000)},
        network=slow,
        objective=replace(NO_LIMITS, tpot_limit_s=0.01),
    )
    found = why(problem)
    assert {m.subject for m in found.conflicts[0].members} == {Subject.TPOT, Subject.LINKS, Subject.MEMORY}
    assert_smallest(problem, found)
    limit, links, *_ = found.relaxations
    assert exists(applied(problem, limit.option))
    factor = float(links.change.split()[1])
    assert exists(replace(problem, cluster=with_faster_links(problem.cluster, factor)))
    assert not exists(replace(problem, cluster=with_faster_links(problem.cluster, factor / 1.3)))


def test_a_strategy_is_blamed_where_another_has_a_plan() -> None:
    profiles = {name: make_profile(name, usable_bytes=4_800_000) for name in "AB"}
    problem = make_problem([make_node("a", "A", nodes=2), make_node("b", "B")], profiles=profiles)
    found = why(problem, strategy="uniform")
    assert Subject.STRATEGY in {m.subject for m in found.conflicts[0].members}
    assert any(r.option == "--strategy hetis" for r in found.relaxations)
    assert exists(problem)


def test_roles_are_blamed_where_weights_fit_only_once() -> None:
    profile = make_profile("A", usable_bytes=20_000_000)
    family = replace(SMALL_FAMILY, roles=(Role.PREFILL, Role.DECODE))
    problem = make_problem([make_node("a", "A")], profiles={"A": profile}, family=family)
    found = why(problem)
    assert Subject.ROLES in {m.subject for m in found.conflicts[0].members}
    assert exists(replace(problem, family=SMALL_FAMILY))


def test_only_members_whose_relaxation_is_enough_are_said_to_be() -> None:
    network = Network(default=Link(bytes_per_s=1e5, latency_s=0.1))
    problem = make_problem(
        [make_node("a", "A", nodes=2)],
        profiles={"A": make_profile("A", usable_bytes=12_000_000)},
        network=network,
        family=replace(SMALL_FAMILY, roles=(Role.PREFILL, Role.DECODE)),
        objective=replace(NO_LIMITS, tpot_limit_s=0.01, ttft_limit_s=0.5),
    )
    found = why(problem)
    (conflict,) = found.conflicts
    assert {m.subject for m in conflict.members} == {Subject.TTFT, Subject.ROLES, Subject.LINKS}
    assert not exists(replace(problem, objective=replace(problem.objective, ttft_limit_s=None)))
    assert found.reasons[0].endswith("; relaxing roles prefill,decode or links between nodes is enough")
    alone = why(replace(problem, objective=replace(problem.objective, tpot_limit_s=None)))
    assert alone.reasons[0].endswith("; relaxing any one of them is enough")


# --- constraints


def test_constraints_that_exclude_one_another_are_named_and_no_others() -> None:
    only_workers = RestrictRole(gpus=of("type=A"), duty=Duty.WORKER, only=True)
    problem = two_types(only_workers, WithoutTp(tp=4), Exclude(gpus=of("node=b")), Replicas(least=1, most=4))
    found = why(problem)
    (conflict,) = found.conflicts
    assert [m.constraint for m in conflict.members] == [only_workers, Exclude(gpus=of("node=b"))]
    assert_smallest(problem, found)
    for member in conflict.members:
        assert exists(
            replace(
                problem,
                constraints=tuple(each for each in problem.constraints if each != member.constraint),
            )
        )


def test_a_constraint_for_too_many_gpus_says_how_many_there_can_be() -> None:
    one, all_six = Replicas(least=1, most=1), Use(gpus=of("zone=default"), least=6)
    family = replace(SMALL_FAMILY, max_pool=0, tp_sizes=(2,))
    problem = replace(two_types(one, all_six), model=make_model(num_layers=2), family=family)  # two stages of two GPUs
    found = why(problem)
    assert_smallest(problem, found)
    (most,) = [r for r in found.relaxations if r.option.startswith("--pin zone=default:use=")]
    least = int(most.option.rpartition("=")[2])
    for count in (least, least + 1):
        changed = replace(problem, constraints=(one, replace(all_six, least=count)))
        assert exists(changed) is (count == least)


def test_a_constraint_for_too_many_replicas_says_how_many_there_can_be() -> None:
    many = Replicas(least=9, most=9)
    problem = two_types(many)
    (most,) = [r for r in why(problem).relaxations if r.option.startswith("--pin replicas=")]
    least = int(most.option.partition("=")[2].partition("..")[0])
    assert 1 < least < 9
    assert f"a plan with {least} exists" in most.sentence
    for count in (least, least + 1):
        assert exists(replace(problem, constraints=(replace(many, least=count),))) is (count == least)


def test_no_gpu_left_is_the_fault_of_whoever_forbids_them() -> None:
    found = why(two_types(Exclude(gpus=of("type=A")), Exclude(gpus=of("zone=default"))))
    assert [m.constraint for m in found.conflicts[0].members] == [Exclude(gpus=of("zone=default"))]


def test_demand_and_a_constraint_are_named_together() -> None:
    free = two_types()
    best = best_plan_value(free)
    problem = two_types(Exclude(gpus=of("node=a-0")), objective=replace(NO_LIMITS, kind=GPUS, demand_rps=0.95 * best))
    found = why(problem)
    (conflict,) = found.conflicts
    assert {Subject.DEMAND, Subject.CONSTRAINT} <= {m.subject for m in conflict.members}
    assert_smallest(problem, found)
    rate = next(r for r in found.relaxations if r.option.startswith("--rate "))
    assert exists(applied(problem, rate.option))


@pytest.mark.parametrize("of_what", list(Sum))
def test_a_rent_that_is_too_low_says_what_is_enough(of_what: Sum) -> None:
    """One GPU is too small for a replica, and each of these GPUs costs a dollar."""
    profile = make_profile("A", usable_bytes=4_800_000)
    problem = make_problem([make_node("a", "A", nodes=6)], profiles={"A": profile})
    constraint = AtMost(of=of_what, most=1.0)
    found = why(replace(problem, constraints=(constraint, WithoutTp(tp=4))))
    assert constraint in [m.constraint for m in found.conflicts[0].members]
    assert_smallest(replace(problem, constraints=(constraint, WithoutTp(tp=4))), found)
    (enough,) = [r for r in found.relaxations if r.about is not None and r.about.constraint == constraint]
    most = float(enough.option.partition("..")[2])
    assert 1.0 < most < 6.0
    assert exists(replace(problem, constraints=(replace(constraint, most=most),)))
    assert not exists(replace(problem, constraints=(replace(constraint, most=most - 1.0),)))


# --- anything, in combination


APART = tuple(STRATEGIES[name].restrict(replace(SMALL_FAMILY, name=name)) for name in ("hexgen2", "splitwise"))


@st.composite
def crowded(draw: st.DrawFn, families: tuple[Family, ...] = (SMALL_FAMILY,)) -> PlacementProblem:
    """Random problems with limits, a demand and constraints at once."""
    family = draw(st.sampled_from(families))
    problem = draw(problems(max_gpus=3, kinds=tuple(ObjectiveKind), family=family, num_zones=1))
    objective = replace(
        problem.objective,
        tpot_limit_s=draw(st.sampled_from((None, 1e-4, 2e-3))),
        ttft_limit_s=draw(st.sampled_from((None, 1e-3, 0.02))),
        demand_rps=None if problem.objective.maximises else draw(st.sampled_from((5.0, 200.0, 1e4))),
    )
    constraints = draw(st.lists(some_constraint(problem.cluster), max_size=2, unique=True))
    return replace(problem, objective=objective, constraints=tuple(constraints))


@settings(max_examples=EXAMPLES)
@given(crowded((SMALL_FAMILY, *APART)))
def test_conflicts_are_smallest_and_relaxations_work(problem: PlacementProblem) -> None:
    try:
        solve_placement(problem, strategy=problem.family.name)
    except ExplainedInfeasibleError as error:
        found = error.why
    else:
        return
    if not found.conflicts:
        return  # no GPU can be used at all
    assert best_by_brute_force(problem) == (0.0 if problem.objective.maximises else float("inf"))
    assert_smallest(problem, found)
    if len(found.conflicts) > 1:
        return  # statements about one conflict assume that the others are lifted
    for relaxation in found.relaxations:
        if relaxation.is_tried and relaxation.option.startswith(("--rate", "--tpot", "--ttft")):
            assert exists(applied(problem, relaxation.option)), relaxation.sentence
        if relaxation.is_tried and relaxation.about is not None and relaxation.about.constraint is not None:
            rest = tuple(each for each in problem.constraints if each != relaxation.about.constraint)
            assert exists(replace(problem, constraints=rest)), relaxation.sentence


# --- known before any search


@settings(max_examples=EXAMPLES)
@given(crowded())
def test_the_bound_from_dense_work_holds(problem: PlacementProblem) -> None:
    rate = replace(problem, objective=replace(problem.objective, kind=ObjectiveKind.THROUGHPUT))
    found = apply_constraints(rate)
    if not is_nothing_left(found):
        costs = build_cost_tables(found)
        assert best_by_brute_force(rate) <= rate_bound(costs) * (1 + 1e-9)
        assert rate_bound(costs) <= rate_bound(costs, with_constraints=False)
        assert rate_bound(costs, (Role.UNIFIED,), with_constraints=False) <= rate_bound(costs, with_constraints=False)


def test_what_dense_work_refutes_needs_no_time() -> None:
    from hetis.solver.budget import Budget

    for objective in (
        Objective(kind=GPUS, demand_rps=1e7, ttft_limit_s=None, tpot_limit_s=None),
        replace(NO_LIMITS, tpot_limit_s=1e-9),
        replace(NO_LIMITS, ttft_limit_s=1e-9),
    ):
        spent = Budget()
        spent.cancelled.set()
        with pytest.raises(InfeasibleError) as caught:
            solve_placement(two_types(objective=objective), budget=spent)
        assert "even at dense work alone" in str(caught.value) or "dense work alone takes longer" in str(caught.value)


def test_lifting_a_requirement_never_loses_a_plan() -> None:
    """`keeping` only widens a problem."""
    problem = two_types(Replicas(least=1, most=2), objective=replace(NO_LIMITS, tpot_limit_s=0.01))
    given_ = requirements_of(problem)
    whole = solve_placement(posed(problem, given_)).result.value
    for requirement in given_:
        lifted = solve_placement(posed(problem, set(given_) - {requirement})).result.value
        assert lifted >= whole * (1 - 1e-6), str(requirement)
