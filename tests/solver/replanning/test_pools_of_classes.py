"""Re-planning with pools of classes: compared with brute force on tiny fleets, and what routers change at no cost."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hetis.solver.advice import without
from hetis.solver.check import check_plan
from hetis.solver.plan import Objective, ObjectiveKind, Plan, ReplicaPlan
from hetis.solver.planning import solve_placement
from hetis.solver.problem import PlacementProblem
from hetis.solver.replanning.change import HALF_DONE, ChangeCosts, Fate, ReplanningProblem
from hetis.solver.replanning.replanning_check import check_replanning
from hetis.solver.workload import Workload
from tests.solver.best_replicas import Wanted, best_replica_of_need
from tests.solver.claimed_plans import claimed, plan_of
from tests.solver.device_classes import DeviceClass, device_classes
from tests.solver.oracle import always, packable_sets, served_rate
from tests.solver.placement.test_classes import TRAFFIC, workload
from tests.solver.replanning.test_replanning import AT_ONCE, fleet, left_over, replanned

EXAMPLES = settings().max_examples
Classes = tuple[str, ...]


def best_by_enumeration(running: Plan, problem: PlacementProblem, costs: ChangeCosts) -> float:
    """Return the best net goodput over every set of running replicas that stays, for any classes, and all new ones."""
    there = {device.name for device in problem.cluster.devices()}
    whole = [replica for replica in running.replicas if set(replica.devices()) <= there]
    shares, goodput, best = problem.workload.shares, problem.assumptions.planned_utilisation, 0.0
    kept_rates, new_rates = [rates_of(replica, problem) for replica in whole], new_rates_of(problem)
    for size in range(len(whole) + 1):
        for kept in itertools.combinations(range(len(whole)), size):
            left = left_over(problem.cluster, {device for i in kept for device in whole[i].devices()})
            stopped = [replica for i, replica in enumerate(whole) if i not in kept]
            dropped = sum(HALF_DONE * replica.planned_seats for replica in stopped) / costs.horizon_s
            news = [dict[Classes, float]()] if left is None else pools_on(replace(problem, cluster=left), *new_rates)
            for labels in itertools.product(*(kept_rates[i] for i in kept)):
                for new in news:
                    rates = {names: costs.served_share(costs.restart_s) * rate for names, rate in new.items()}
                    for i, names in zip(kept, labels, strict=True):
                        rates[names] = rates.get(names, 0.0) + kept_rates[i][names]
                    best = max(best, goodput * (served(shares, rates) - dropped))
    return best


def served(shares: Mapping[str, float], rates: Mapping[Classes, float]) -> float:
    def of(name: str) -> float:
        able = {names: rate for names, rate in rates.items() if not names or name in names}
        return sum(rate / sum(shares[each] for each in names or shares) for names, rate in able.items())

    return min(map(of, shares))


def rates_of(replica: ReplicaPlan, problem: PlacementProblem) -> dict[Classes, float]:
    """Return the rate of a replica as it is for each range of classes whose requests fit in its memory."""
    found = dict[Classes, float]()
    for names in problem.ranges():
        own = problem.of_classes(names)
        again = claimed(replace(replica, classes=()), own)
        if check_plan(plan_of(own, again), own) == ():
            found[names] = again.rate
    return found


Nodes = dict[DeviceClass, int]


def new_rates_of(problem: PlacementProblem) -> tuple[Nodes, dict[Wanted, float], dict[Wanted, Classes]]:
    """Return the nodes, and the rate and the classes of the best new replica of every need."""
    nodes, rates, ranges = device_classes(problem.cluster), dict[Wanted, float](), dict[Wanted, Classes]()
    for number, names in enumerate(problem.ranges()):
        for wanted, rate in best_replica_of_need(problem.of_classes(names), nodes, always).items():
            marked = replace(wanted, exchange=(*wanted.exchange, *["range"] * number))
            rates[marked], ranges[marked] = rate, names
    return nodes, rates, ranges


def pools_on(
    problem: PlacementProblem, nodes: Nodes, rates: dict[Wanted, float], ranges: dict[Wanted, Classes]
) -> list[dict[Classes, float]]:
    """Return the rates by classes of every set of new replicas that fits into what is left of nodes of one GPU each."""
    left = device_classes(problem.cluster)
    assert left.keys() <= nodes.keys()
    return [
        {
            names: served_rate(problem, [one for one in chosen if ranges[one] == names], rates)
            for names in problem.ranges()
        }
        for chosen in packable_sets(list(rates), {each: left.get(each, 0) for each in nodes})
    ]


@settings(max_examples=max(6, EXAMPLES // 4), suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    lost=st.sampled_from(["a-0", "b-0", "b-2", ""]),
    traffic=TRAFFIC,
    before=TRAFFIC,
    horizon_s=st.sampled_from([25.0, 100.0, 1e4]),
)
def test_the_answer_is_the_best_by_enumeration(
    lost: str, traffic: Workload, before: Workload, horizon_s: float
) -> None:
    """A node may be lost, and the traffic may be another one."""
    problem = replace(fleet(2, 3), workload=traffic)
    running = solve_placement(replace(problem, workload=before))
    left = replace(problem, cluster=without(problem.cluster, [lost])) if lost else problem
    costs = replace(AT_ONCE, horizon_s=horizon_s)
    found, best = replanned(running, left, costs), best_by_enumeration(running, left, costs)
    assert found.value == pytest.approx(best, rel=1e-4)
    assert found.bound >= best * (1.0 - 1e-6)


MIX = workload(50, 1000, (2, 40), 0.9)


def test_replicas_keep_running_for_other_classes_where_the_mix_has_changed() -> None:
    """An engine does not know which requests its router sends: nothing restarts, and no request is dropped."""
    problem = replace(fleet(2, 4), workload=MIX)
    running = solve_placement(problem)
    assert {one.classes for one in running.replicas} == {("short",), ("long",)}
    same = replanned(running, problem)
    assert same.plan.replicas == running.replicas
    assert not same.transition.steps
    found = replanned(running, replace(problem, workload=workload(50, 1000, (2, 40), 0.97)), max_moves=0)
    assert {(known.fate, known.start_s) for known in found.continued} == {(Fate.KEPT, 0.0)}
    olds = [running.replicas[known.old or 0] for known in found.continued]
    assert any(one.classes != old.classes for one, old in zip(found.plan.replicas, olds, strict=True))
    assert found.transition.after > 1.5 * found.transition.before
    assert found.transition.lowest == found.transition.before


@pytest.mark.parametrize("kind", [ObjectiveKind.COST, ObjectiveKind.GPUS])
def test_the_least_cost_of_a_demand_keeps_the_pools_that_serve_it(kind: ObjectiveKind) -> None:
    most = solve_placement(replace(fleet(4, 2), workload=MIX)).result.value
    goal = Objective(kind=kind, ttft_limit_s=None, tpot_limit_s=None, demand_rps=0.7 * most)
    problem = replace(fleet(4, 2, objective=goal), workload=MIX)
    running = solve_placement(problem)
    steady = replanned(running, problem)
    assert steady.plan.replicas == running.replicas
    lost = running.replicas[0].devices()[0].partition("/")[0]
    left = replace(problem, cluster=without(problem.cluster, [lost]))
    found = replanned(running, left)
    assert found.plan.planned_rate() >= 0.7 * most * (1.0 - 1e-9)
    assert found.bound <= found.value * (1.0 + 1e-9)


def test_pools_of_traffic_without_classes_serve_all_requests_from_now_on() -> None:
    problem = replace(fleet(4, 2), workload=MIX)
    running = solve_placement(problem)
    found = replanned(running, problem.of_classes())
    assert {one.classes for one in found.plan.replicas} == {()}
    posed = ReplanningProblem(running=running, problem=problem, costs=AT_ONCE)
    wrong = replanned(running, problem)
    assert check_replanning(posed, replace(wrong, value=1.01 * wrong.value))
