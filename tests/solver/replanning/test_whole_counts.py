"""The bound over whole counts of an engine's replicas: compared with brute force, and with every replica listed."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hetis.solver.advice import without
from hetis.solver.budget import SearchSettings
from hetis.solver.check import check_plan
from hetis.solver.engine_rules import EngineRules, Family
from hetis.solver.errors import InfeasibleError, InvalidProblemError
from hetis.solver.placement.enumeration import EnumeratedColumns
from hetis.solver.placement.families import run_by
from hetis.solver.placement.master import demanded_rate
from hetis.solver.placement.policy import POLICY
from hetis.solver.placement.replicas.tables import CostTables
from hetis.solver.placement.replicas.tabulation import build_cost_tables
from hetis.solver.placement.replicas.template import Template
from hetis.solver.plan import LEAST_DEMAND_RPS, Objective, ObjectiveKind, Plan, ReplicaPlan, Role
from hetis.solver.planning import solve_placement
from hetis.solver.problem import PlacementProblem
from hetis.solver.replanning import whole_counts
from hetis.solver.replanning.change import HALF_DONE, ChangeCosts, ReplanningProblem
from hetis.solver.replanning.fresh import search_fresh
from hetis.solver.replanning.net_master import ProgramLimits
from hetis.solver.replanning.replanner import Replanning, Survivors, solve_replanning
from hetis.solver.replanning.replanning_check import check_replanning
from hetis.solver.replanning.running import new_replica
from hetis.solver.replanning.whole_counts import WholeCounts
from tests.solver.instances import make_node, make_problem, make_profile, problems
from tests.solver.oracle import best_plan_value
from tests.solver.replanning.test_replanning import AT_ONCE, left_over

VLLM_HETIS = run_by(
    Family(max_pool=2, tp_sizes=(1, 2), micro_batches=(1, 4, 16), chunk_tokens=(64,)),
    EngineRules(name="vllm-hetis", max_stages=3, max_pooled_stages=2),
)
UNIFIED = replace(VLLM_HETIS, roles=(Role.UNIFIED,))
KINDS = (ObjectiveKind.GOODPUT, ObjectiveKind.THROUGHPUT, ObjectiveKind.COST, ObjectiveKind.GPUS)
SLOW_LOADS = ChangeCosts(horizon_s=60.0, restart_s=1.0, load_bytes_per_s=1e7)
ROUNDING = 1e-6


def less_a_node(problem: PlacementProblem) -> PlacementProblem | None:
    names = [group.node_name(i) for group in problem.cluster.node_groups for i in range(group.count)]
    return replace(problem, cluster=without(problem.cluster, names[:1])) if len(names) > 1 else None


def replanned(running: Plan, problem: PlacementProblem, costs: ChangeCosts, max_moves: int | None = None) -> Replanning:
    posed = ReplanningProblem(running=running, problem=problem, costs=costs, max_moves=max_moves)
    found = solve_replanning(posed)
    assert not check_plan(found.plan, problem)
    assert not check_replanning(posed, found)
    return found


def best_by_enumeration(running: Plan, problem: PlacementProblem) -> float:
    """Return the best net value over every set of running replicas that may stay; all starts take equally long."""
    there = {device.name for device in problem.cluster.devices()}
    whole = [replica for replica in running.replicas if set(replica.devices()) <= there]
    posed = ReplanningProblem(running=running, problem=problem, costs=AT_ONCE)
    keepable = Survivors(posed, build_cost_tables(problem)).keepable
    may_stay = [i for i, replica in enumerate(whole) if running.replicas.index(replica) in keepable]
    sets = (set(kept) for size in range(len(may_stay) + 1) for kept in itertools.combinations(may_stay, size))
    best = max if problem.objective.maximises else min
    return best(value_of_keeping(whole, kept, problem) for kept in sets)


def value_of_keeping(whole: list[ReplicaPlan], kept: set[int], problem: PlacementProblem) -> float:
    """Return the best net value if exactly these running replicas stay."""
    objective, start = problem.objective, AT_ONCE.restart_s / AT_ONCE.horizon_s
    goodput = 1.0 if objective.kind is ObjectiveKind.THROUGHPUT else problem.assumptions.planned_utilisation
    served = goodput * sum(whole[i].rate for i in kept)
    again = {i: HALF_DONE * r.planned_seats / AT_ONCE.horizon_s for i, r in enumerate(whole) if i not in kept}
    left = left_over(problem.cluster, {device for i in kept for device in whole[i].devices()})
    if objective.maximises:
        new = 0.0 if left is None else best_plan_value(replace(problem, cluster=left))
        return served + (1.0 - start) * new - goodput * sum(again.values())
    rents = [rent(replica, problem) for replica in whole]
    value = sum(rents[i] for i in kept) + sum(rents[i] * min(1.0, lost / whole[i].rate) for i, lost in again.items())
    assert objective.demand_rps is not None
    rest = objective.demand_rps - served
    if rest <= LEAST_DEMAND_RPS:
        return value
    if left is None:
        return math.inf
    asked = replace(objective, demand_rps=rest)
    return value + (1.0 + start) * best_plan_value(replace(problem, cluster=left, objective=asked))


def rent(replica: ReplicaPlan, problem: PlacementProblem) -> float:
    """Return what the objective counts of a replica."""
    if problem.objective.kind is ObjectiveKind.GPUS:
        return float(len(replica.devices()))
    price = {
        device.name: problem.cluster.price_of(slots) or 0.0
        for device in problem.cluster.devices()
        for slots in device.group.gpus
        if slots.gpu == device.gpu
    }
    return sum(price[name] for name in replica.devices())


@given(problems(max_gpus=4, family=UNIFIED, num_zones=1, kinds=KINDS))
@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_the_bound_contradicts_no_re_planning_found_by_brute_force(problem: PlacementProblem) -> None:
    left = less_a_node(problem)
    if left is None:
        return
    try:
        running = solve_placement(problem)
        found = replanned(running, left, AT_ONCE)
    except (InfeasibleError, InvalidProblemError):  # or the model may not be cut everywhere
        return
    best, rounding = best_by_enumeration(running, left), ROUNDING * abs(found.value)
    if problem.objective.maximises:
        assert found.bound >= best - rounding
        assert found.value <= best + rounding
    else:
        assert found.bound <= best + rounding
        assert found.value >= best - rounding


def every_replica(costs: CostTables) -> list[Template]:
    """Return the best replica of every composition of the family."""
    listed = EnumeratedColumns(costs, np.zeros(len(costs.resources.rows)), None)
    for each in listed.candidates:
        longest_s = np.full(len(each.fits), np.inf)
        which = each.worth_evaluating(longest_s)
        listed.add(each, each.found_among(which, longest_s[which]))
    return [listed.template(column) for column in range(listed.num_columns)]


@given(
    problems(max_gpus=5, family=VLLM_HETIS, kinds=KINDS),
    problems(max_gpus=5, family=VLLM_HETIS),
    st.sampled_from((None, 0, 1, 3)),
    st.sampled_from((AT_ONCE, SLOW_LOADS)),
    st.booleans(),
)
@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_the_bound_contradicts_no_choice_among_all_replicas(
    before: PlacementProblem, after: PlacementProblem, max_moves: int | None, change: ChangeCosts, is_same: bool
) -> None:
    """Whatever is known: a bad re-planning rules out few replicas, the best one all that are no better."""
    if is_same:
        after = less_a_node(before) or before
    else:
        profiles = {**before.profiles, **after.profiles}
        after = replace(after, model=before.model, profiles=profiles, objective=before.objective)
    try:
        running = solve_placement(before)
    except (InfeasibleError, InvalidProblemError):
        return
    if before.model.forbidden_cuts:  # which no search of an engine's family knows
        return
    costs = build_cost_tables(after)
    posed = ReplanningProblem(running=running, problem=after, costs=change, max_moves=max_moves)
    survivors, exactly = Survivors(posed, costs), SearchSettings(gap_target=0.0)
    options, demand = survivors.candidates, demanded_rate(after)
    fresh = search_fresh(costs, exactly)
    if fresh.prices is None:
        return
    for net in (survivors.master(demand), survivors.master(demand, changes_cost=False)):
        new = [new_replica(t, net.start_s(t)) for t in every_replica(costs)]
        best = net.choose([*options, *new], ProgramLimits(gap=0.0, nodes=100_000, time_limit_s=60.0, seed=0))
        if best is None or net.value_of(best.chosen) <= 0.0:
            continue
        proofs, value = WholeCounts(costs, fresh.prices, net.row_costs, exactly), net.value_of(best.chosen)
        loosest = math.inf if net.master.maximises else 0.0
        worse = 0.7 * value if net.master.maximises else 1.4 * value
        for known in (worse, value):
            bound = proofs.bound(net, options, survivors.busy, known, loosest)
            assert bound != loosest
            if net.master.maximises:
                assert bound >= value * (1.0 - ROUNDING)
            else:
                assert bound <= value * (1.0 + ROUNDING)


def just_above_one(kind: ObjectiveKind) -> PlacementProblem:
    """Return a demand that a replica on A and a tenth of a second one would serve."""
    profiles = {"A": make_profile("A", usable_bytes=30_000_000), "B": make_profile("B", usable_bytes=12_000_000)}
    nodes = [replace(make_node(name.lower(), name, nodes=3), numbered=True) for name in profiles]
    goal = Objective(ttft_limit_s=None, tpot_limit_s=None)
    prices = {"A": 3.0, "B": 1.9}
    problem = make_problem(nodes, profiles=profiles, family=UNIFIED, objective=goal, usd_per_hour=prices)
    one = solve_placement(replace(problem, cluster=without(problem.cluster, ["a-1", "a-2", "b-0", "b-1", "b-2"])))
    return replace(problem, objective=replace(goal, kind=kind, demand_rps=1.1 * one.result.value))


@pytest.mark.parametrize("is_lost", [False, True])
@pytest.mark.parametrize("kind", [ObjectiveKind.COST, ObjectiveKind.GPUS])
def test_a_fraction_of_a_replica_leaves_no_gap(kind: ObjectiveKind, is_lost: bool) -> None:
    problem = just_above_one(kind)
    running = solve_placement(problem)
    left = replace(problem, cluster=without(problem.cluster, ["a-0"])) if is_lost else problem
    found = replanned(running, left, AT_ONCE)
    assert found.gap <= 2e-3
    assert found.plan.result.gap <= 2e-3


@pytest.mark.parametrize("limit", ["most_listed", "most_proved"])
def test_the_bound_by_prices_remains_if_a_proof_takes_too_much(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_counts, "POLICY", replace(POLICY, **{limit: 0}))
    problem = just_above_one(ObjectiveKind.COST)
    found = replanned(solve_placement(problem), problem, AT_ONCE)
    assert 0.1 <= found.gap < 1.0
