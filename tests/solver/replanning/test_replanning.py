"""Re-planning: compared with brute force on tiny fleets, and its promises on steady input, moves and bounds."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from hetis.solver.advice import without
from hetis.solver.budget import Budget
from hetis.solver.check import check_plan
from hetis.solver.cluster import Cluster, GpuSlots, Link, Network, NodeGroup
from hetis.solver.constraints import Exclude, Selection, Unit
from hetis.solver.engine_rules import EngineRules
from hetis.solver.errors import InfeasibleError, NoPlanFoundError
from hetis.solver.plan import Objective, ObjectiveKind, Plan, Role
from hetis.solver.planning import solve_placement
from hetis.solver.problem import PlacementProblem
from hetis.solver.replanning import replanner as replanning
from hetis.solver.replanning.change import HALF_DONE, ChangeCosts, Fate, ReplanningProblem
from hetis.solver.replanning.fresh import Fresh
from hetis.solver.replanning.replanner import Replanning, solve_replanning
from hetis.solver.replanning.replanning_check import check_replanning
from hetis.solver.replanning.transition import Action
from tests.solver.instances import SMALL_FAMILY, make_node, make_problem, make_profile, make_workload, problems
from tests.solver.oracle import best_plan_value
from tests.solver.searching import plan_or_none

UNIFIED = replace(SMALL_FAMILY, roles=(Role.UNIFIED,), max_pool=1)
# Weights load instantly, so that every start takes the same time: the oracle needs only rates.
AT_ONCE = ChangeCosts(horizon_s=100.0, restart_s=20.0, load_bytes_per_s=1e30)
TWO_TYPES = {"A": make_profile("A", usable_bytes=30_000_000), "B": make_profile("B", usable_bytes=12_000_000)}


def fleet(num_a: int, num_b: int, *, objective: Objective | None = None) -> PlacementProblem:
    """Return single-GPU nodes: one A holds the model, two B are needed."""
    nodes = [make_node("a", "A", nodes=num_a)] if num_a else []
    nodes += [make_node("b", "B", nodes=num_b)] if num_b else []
    nodes = [replace(node, numbered=True) for node in nodes]
    goal = objective or Objective(ttft_limit_s=None, tpot_limit_s=None)
    return make_problem(nodes, profiles=TWO_TYPES, family=UNIFIED, objective=goal)


def replanned(running: Plan, problem: PlacementProblem, costs: ChangeCosts = AT_ONCE, **more: object) -> Replanning:
    """Return the answer, after it has passed every check."""
    posed = ReplanningProblem(running=running, problem=problem, costs=costs, **more)  # type: ignore[arg-type]
    found = solve_replanning(posed)
    assert not check_plan(found.plan, problem)
    assert not check_replanning(posed, found)
    return found


def best_by_enumeration(running: Plan, problem: PlacementProblem, costs: ChangeCosts) -> float:
    """Return the best net goodput over every set of running replicas that stays, with the best plan on the rest."""
    there = {device.name for device in problem.cluster.devices()}
    whole = [replica for replica in running.replicas if set(replica.devices()) <= there]
    share, goodput = costs.served_share(costs.restart_s), problem.assumptions.planned_utilisation
    best = 0.0
    for size in range(len(whole) + 1):
        for kept in itertools.combinations(whole, size):
            left = left_over(problem.cluster, {device for replica in kept for device in replica.devices()})
            value = goodput * sum(replica.rate for replica in kept)
            if left is not None:
                value += share * best_plan_value(replace(problem, cluster=left))
            stopped = (replica for replica in whole if replica not in kept)
            value -= goodput * sum(HALF_DONE * replica.planned_seats for replica in stopped) / costs.horizon_s
            best = max(best, value)
    return best


def left_over(cluster: Cluster, taken: set[str]) -> Cluster | None:
    """Return every node as a group of its own, without the GPUs in use."""
    groups = []
    for group in cluster.node_groups:
        for i in range(group.count):
            name, index, slots = group.node_name(i), 0, []
            for part in group.gpus:
                free = sum(f"{name}/{k}" not in taken for k in range(index, index + part.count))
                index += part.count
                slots += [GpuSlots(gpu=part.gpu, count=free, usd_per_hour=part.usd_per_hour)] if free else []
            if slots:
                groups.append(NodeGroup(name=name, gpus=tuple(slots), zone=group.zone, nic=group.nic))
    return replace(cluster, node_groups=tuple(groups)) if groups else None


@given(problems(max_gpus=4, family=UNIFIED, num_zones=1))
@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_steady_input_gives_a_steady_plan(problem: PlacementProblem) -> None:
    running = plan_or_none(problem)
    if running is None:
        return
    found = replanned(running, problem)
    assert found.plan.replicas == running.replicas
    assert found.change.count(Fate.KEPT) == len(running.replicas)
    assert not found.change.moved
    assert not found.transition.steps
    assert found.gap <= 1e-5


@pytest.mark.parametrize("lost", ["a-0", "a-1", "b-0", "b-1"])
@pytest.mark.parametrize("max_moves", [None, 1])
def test_the_answer_is_the_best_by_enumeration_when_a_node_is_lost(lost: str, max_moves: int | None) -> None:
    problem = fleet(2, 3)
    running = solve_placement(problem)
    left = replace(problem, cluster=without(problem.cluster, [lost]))
    found = replanned(running, left, max_moves=max_moves)
    best = best_by_enumeration(running, left, AT_ONCE)
    if max_moves is None:
        assert found.value == pytest.approx(best, rel=1e-5)
        assert found.gap <= 1e-4
    assert found.value <= best * (1 + 1e-6)
    assert found.value <= found.bound * (1 + 1e-9)


@given(problems(max_gpus=4, family=UNIFIED, num_zones=1))
@settings(max_examples=10, suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_the_answer_is_the_best_by_enumeration_on_random_fleets(problem: PlacementProblem) -> None:
    names = [group.node_name(i) for group in problem.cluster.node_groups for i in range(group.count)]
    if len(names) < 2:
        return
    left = replace(problem, cluster=without(problem.cluster, names[:1]))
    try:
        running = solve_placement(problem)
        found = replanned(running, left)
    except InfeasibleError:
        return
    best = best_by_enumeration(running, left, AT_ONCE)
    assert found.value == pytest.approx(best, rel=1e-4)
    assert found.bound >= best * (1 - 1e-6)


@pytest.mark.parametrize(("before", "after"), [((1, 2), (3, 2)), ((1, 4), (2, 1))])
def test_no_answer_as_good_moves_fewer_gpus(before: tuple[int, int], after: tuple[int, int]) -> None:
    running, problem = solve_placement(fleet(*before)), fleet(*after)
    found = replanned(running, problem)
    moved = len(found.change.moved)
    assert moved > 0
    again = replanned(running, problem, max_moves=moved)
    assert again.value == pytest.approx(found.value, rel=1e-6)
    fewer = replanned(running, problem, max_moves=moved - 1)
    assert fewer.value < found.value * (1 - 1e-6)
    assert fewer.bound >= fewer.value


def test_nothing_moves_when_nothing_may() -> None:
    running, problem = solve_placement(fleet(1, 2)), fleet(3, 4)
    found = replanned(running, problem, max_moves=0)
    assert found.change.count(Fate.KEPT) == len(running.replicas)
    assert found.gap <= 1e-5


def test_a_gain_that_a_restart_eats_up_is_left_alone() -> None:
    """Two B serve; an A that joins would hardly start within the horizon."""
    running, problem = solve_placement(fleet(0, 2)), fleet(1, 2)
    short = ChangeCosts(horizon_s=21.0, restart_s=20.0, load_bytes_per_s=1e30)
    kept = replanned(running, problem, costs=short)
    assert kept.change.count(Fate.KEPT) == len(running.replicas)
    assert kept.value >= solve_placement(fleet(0, 2)).result.value * (1 - 1e-9)


@pytest.mark.parametrize("kind", [ObjectiveKind.COST, ObjectiveKind.GPUS])
def test_the_least_cost_keeps_what_serves_the_demand(kind: ObjectiveKind) -> None:
    most = solve_placement(fleet(3, 2)).result.value
    goal = Objective(kind=kind, ttft_limit_s=None, tpot_limit_s=None, demand_rps=0.6 * most)
    problem = fleet(3, 2, objective=goal)
    running = solve_placement(problem)
    steady = replanned(running, problem)
    assert steady.plan.replicas == running.replicas
    assert steady.bound <= steady.value * (1 + 1e-9)
    lost = running.replicas[0].devices()[0].partition("/")[0]
    left = replace(problem, cluster=without(problem.cluster, [lost]))
    found = replanned(running, left)
    assert found.plan.served_rate() * problem.assumptions.planned_utilisation >= 0.6 * most * (1 - 1e-9)
    assert found.bound <= found.value * (1 + 1e-9)
    assert found.change.count(Fate.KEPT) == len(running.replicas) - 1
    posed = ReplanningProblem(running=running, problem=left, costs=AT_ONCE)
    for wrong in ({"value": 0.5 * found.value}, {"bound": 1.1 * found.value}, {"gap": found.gap + 0.1}):
        assert check_replanning(posed, replace(found, **wrong))


@given(problems(max_gpus=5, family=SMALL_FAMILY), problems(max_gpus=5, family=SMALL_FAMILY))
@settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_answers_of_every_role_and_zone_pass_their_checks(before: PlacementProblem, after: PlacementProblem) -> None:
    """The new fleet is that of another problem of the same model: devices may have another type, or be gone."""
    after = replace(
        after, model=before.model, profiles={**before.profiles, **after.profiles}, objective=before.objective
    )
    try:
        running = solve_placement(before)
        found = replanned(running, after, costs=ChangeCosts(horizon_s=60.0, restart_s=1.0, load_bytes_per_s=1e7))
    except InfeasibleError:
        return
    assert found.bound >= found.value - 1e-6 * abs(found.value)
    assert found.transition.lowest <= found.transition.best_lowest + 1e-9


def test_a_demand_that_needs_more_moves_is_refused_with_the_reason() -> None:
    most = solve_placement(fleet(2, 0)).result.value
    goal = Objective(kind=ObjectiveKind.GPUS, ttft_limit_s=None, tpot_limit_s=None, demand_rps=0.9 * most)
    running = solve_placement(fleet(2, 0, objective=goal))
    problem = replace(fleet(3, 0, objective=goal), cluster=without(fleet(4, 0).cluster, ["a-0"]))
    with pytest.raises(InfeasibleError, match="at most 0 GPUs may change their work"):
        replanned(running, problem, max_moves=0)


@pytest.mark.parametrize(
    ("costs", "max_moves", "reason"),
    [
        (AT_ONCE, 0, "at most 0 GPUs may change their work"),
        (replace(AT_ONCE, horizon_s=10.0), None, "nothing serves within 10 s: every start takes at least 20 s"),
    ],
)
def test_a_fleet_with_nothing_in_common_is_refused_with_the_reason(
    costs: ChangeCosts, max_moves: int | None, reason: str
) -> None:
    running, problem = solve_placement(fleet(1, 0)), fleet(0, 2)
    with pytest.raises(InfeasibleError, match=reason):
        replanned(running, problem, costs=costs, max_moves=max_moves)


def test_limits_that_no_replica_of_a_large_fleet_keeps_are_refused_with_the_reasons_of_placement() -> None:
    kinds = "BCD"
    profiles = {name: make_profile(name, usable_bytes=6_000_000) for name in kinds} | {"A": TWO_TYPES["A"]}
    running = solve_placement(make_problem([make_node("a", "A")], profiles=profiles, family=UNIFIED))
    nodes = [replace(make_node(name.lower(), name, nodes=60), numbered=True) for name in kinds]
    tight = Objective(ttft_limit_s=1e-5, tpot_limit_s=1e-6)
    problem = make_problem(nodes, profiles=profiles, family=UNIFIED, objective=tight)
    with pytest.raises(InfeasibleError) as placed:
        solve_placement(problem)
    with pytest.raises(InfeasibleError) as refused:
        replanned(running, problem)
    assert refused.value.reasons == placed.value.reasons


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (Budget(), "no plan was found, nor was it proved that there is none"),
        (Budget(time_limit_s=60.0), "allow more time"),
    ],
)
def test_more_time_is_only_asked_for_if_it_was_limited(
    monkeypatch: pytest.MonkeyPatch, budget: Budget, words: str
) -> None:
    nothing = Fresh(templates=(), value=None, bound=1.0, row_prices=np.zeros(0))
    monkeypatch.setattr(replanning, "search_fresh", lambda *_: nothing)
    posed = ReplanningProblem(running=solve_placement(fleet(1, 0)), problem=fleet(0, 2), costs=AT_ONCE)
    with pytest.raises(NoPlanFoundError, match=words):
        solve_replanning(posed, budget=budget)


def test_new_traffic_resets_engines_and_leaves_weights_where_they_are() -> None:
    problem = fleet(2, 0)
    running = solve_placement(problem)
    other = replace(problem, workload=make_workload((200, 5)))
    slow = ChangeCosts(horizon_s=1e5, restart_s=20.0, load_bytes_per_s=1e3)
    found = replanned(running, other, costs=slow)
    assert [(c.fate, c.start_s) for c in found.continued] == [(Fate.RESET, 20.0)] * 2
    assert not found.change.moved
    assert found.value <= found.bound


def test_a_replica_whose_nodes_differ_now_still_runs_until_it_is_stopped() -> None:
    """Its stage has copies on two nodes, of which one has another price now: the tables have no such replica."""
    problem = replace(fleet(2, 0), family=replace(UNIFIED))
    alone = solve_placement(fleet(1, 0))
    [replica] = alone.replicas
    [stage] = replica.stages
    both = replace(stage, copies=2, devices=("a-0/0", "a-1/0"))
    pair = replace(replica, stages=(both,), in_flight=2, rate=2 * replica.rate)
    running = replace(alone, replicas=(pair,))
    [group] = problem.cluster.node_groups
    [slots] = group.gpus
    dear = replace(slots, usd_per_hour=9.0)
    names = [group.node_name(i) for i in range(2)]
    groups = [replace(group, name=names[0], count=1, numbered=False)]
    groups += [replace(group, name=names[1], count=1, numbered=False, gpus=(dear,))]
    found = replanned(running, replace(problem, cluster=replace(problem.cluster, node_groups=tuple(groups))))
    assert found.lost == ()
    assert found.transition.steps[0].action is Action.STOP
    assert found.transition.before > 0.0
    dropped = problem.assumptions.planned_utilisation * HALF_DONE * pair.planned_seats / AT_ONCE.horizon_s
    assert found.value < AT_ONCE.served_share(AT_ONCE.restart_s) * found.plan.result.value - 0.99 * dropped
    posed = ReplanningProblem(running=running, problem=problem, costs=AT_ONCE)
    same = solve_replanning(posed)
    assert check_replanning(posed, replace(same, lost=(0,)))


@pytest.mark.parametrize("joining", [[], [make_node("c", "B", zone="north")]], ids=["reordered", "joined"])
def test_replicas_are_kept_if_zones_are_reordered_or_join(joining: list[NodeGroup]) -> None:
    nodes = [make_node("a", "A", zone="east"), make_node("b", "A", zone="west")]
    problem = make_problem(nodes, profiles=TWO_TYPES, family=replace(UNIFIED, roles=(Role.PREFILL, Role.DECODE)))
    running = solve_placement(problem)
    assert [r.role for r in running.replicas if r.sends_afar] == [Role.PREFILL]
    now = make_problem([*joining, *reversed(nodes)]).cluster
    found = replanned(running, replace(problem, cluster=now), max_moves=0)
    assert found.change.count(Fate.KEPT) == len(running.replicas)


def test_a_replica_on_gpus_that_may_no_longer_be_used_runs_until_it_is_stopped() -> None:
    """Its engine may have come to refuse a type, for example. The GPUs are there all the same: nothing was lost."""
    running = solve_placement(fleet(2, 2))
    on_b = [i for i, replica in enumerate(running.replicas) if any(s.gpu == "B" for s in replica.stages)]
    forbidden = Exclude(gpus=Selection(unit=Unit.TYPE, name="B"))
    found = replanned(running, replace(fleet(2, 2), constraints=(forbidden,)))
    stopped = [number for step in found.transition.steps if step.action is Action.STOP for number in step.replicas]
    assert (found.lost, stopped) == ((), on_b)
    assert on_b


def test_replicas_that_avoid_a_slow_link_keep_what_they_serve() -> None:
    """They hand over KV in a set of nodes without the slow link, and still do."""
    network = Network(
        default=Link(bytes_per_s=5e8, latency_s=1e-5),
        between_nodes={("a-0", "a-1"): Link(bytes_per_s=1e6, latency_s=1e-2)},
    )
    apart = replace(UNIFIED, roles=(Role.PREFILL, Role.DECODE))
    problem = make_problem([make_node("a", "A", nodes=3)], profiles=TWO_TYPES, family=apart, network=network)
    running = solve_placement(problem)
    found = replanned(running, problem)
    assert found.change.count(Fate.KEPT) == len(running.replicas)
    assert not found.change.moved
    assert found.plan.result.value == pytest.approx(running.result.value)
    assert found.value <= found.bound


def test_an_engines_plan_does_not_mention_replicas_over_several_zones() -> None:
    engine = replace(UNIFIED, max_pool=0, in_flight=(1, 2), engine=EngineRules(name="vllm", max_stages=2))
    nodes = [make_node("a", "A", zone="east"), make_node("b", "A", zone="west")]
    problem = make_problem(nodes, profiles=TWO_TYPES, family=engine)
    assert replanned(solve_placement(problem), problem).plan.notes == ()


def test_an_engines_replica_just_within_the_ttft_limit_is_kept() -> None:
    engine = replace(UNIFIED, max_pool=0, in_flight=(1, 2), engine=EngineRules(name="vllm", max_stages=2))
    problem = make_problem([make_node("a", "A")], profiles=TWO_TYPES, family=engine)
    problem = replace(problem, objective=Objective(ttft_limit_s=None, tpot_limit_s=None))
    [replica] = solve_placement(problem).replicas
    problem = replace(problem, objective=Objective(ttft_limit_s=1.001 * replica.ttft_s, tpot_limit_s=None))
    running = solve_placement(problem)
    assert running.replicas == (replica,)
    found = replanned(running, problem)
    assert [continued.fate for continued in found.continued] == [Fate.KEPT]
    assert found.plan.replicas == running.replicas
