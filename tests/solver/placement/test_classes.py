"""Pools of one class of requests: plans equal those of brute force, and are never below plans without classes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetis.solver import mixes
from hetis.solver.advice import worst_node
from hetis.solver.check import Rule, check_plan
from hetis.solver.check.losses import StatedLoss, check_losses
from hetis.solver.check.rederive import Rederivation
from hetis.solver.check.replica_shapes import Fleet, ReplicaShape, replica_shape
from hetis.solver.check.waiting import request_queue
from hetis.solver.engine_rules import EngineRules, Family
from hetis.solver.errors import InvalidProblemError
from hetis.solver.placement.families import run_by
from hetis.solver.placement.outcome import Outcome, rate_bound
from hetis.solver.placement.replicas.equal_stages import uniform_templates
from hetis.solver.placement.replicas.tabulation import build_cost_tables
from hetis.solver.placement.waits import retuned
from hetis.solver.plan import Lanes, Objective, ObjectiveKind, Plan, ReplicaPlan, StagePlan, served_with_classes
from hetis.solver.planning import solve_placement
from hetis.solver.problem import Assumptions, PlacementProblem
from hetis.solver.queueing import RequestQueue
from hetis.solver.workload import LengthBin, RequestClass, Workload
from tests.solver.best_replicas import Wanted, best_replica_of_need
from tests.solver.claimed_plans import claimed, plan_of, unclaimed
from tests.solver.device_classes import device_classes
from tests.solver.instances import SMALL_FAMILY, make_node, make_problem, problems
from tests.solver.oracle import always, packable_sets, served_rate, value_of
from tests.solver.searching import plan_or_none, worth

EXAMPLES = settings().max_examples
KINDS = tuple(ObjectiveKind)
CUT = 60


def workload(short: int, long: int, outputs: tuple[int, int], share: float, **limits: float) -> Workload:
    lengths = [(short, outputs[0], share), (long, outputs[1], 1.0 - share)]
    bins = tuple(LengthBin(prompt_tokens=p, output_tokens=o, weight=w) for p, o, w in lengths)
    classes = RequestClass(name="short", max_prompt_tokens=CUT, **limits), RequestClass(name="long")
    return Workload(name="two lengths", bins=bins, classes=classes)


TRAFFIC = st.builds(
    workload,
    st.integers(1, CUT),
    st.integers(CUT + 1, 1000),
    st.tuples(st.integers(2, 40), st.integers(2, 40)),
    st.floats(0.05, 0.95),
)


def best_value_by_brute_force(problem: PlacementProblem) -> float:
    """Return the value of the best plan whose replicas each serve one class, or all."""
    nodes, rates = device_classes(problem.cluster), dict[Wanted, float]()
    ranges = dict[Wanted, tuple[str, ...]]()
    for number, names in enumerate(problem.ranges()):
        for wanted, rate in best_replica_of_need(problem.of_classes(names), nodes, always).items():
            marked = replace(wanted, exchange=(*wanted.exchange, *["range"] * number))
            rates[marked], ranges[marked] = rate, names
    best = 0.0 if problem.objective.maximises else math.inf
    for chosen in packable_sets(list(rates), nodes):
        of_class = dict.fromkeys(problem.workload.shares, 0.0)
        for names in problem.ranges():
            pool = [wanted for wanted in chosen if ranges[wanted] == names]
            rate = served_rate(problem, pool, rates)
            own = names or tuple(of_class)
            for name in own:
                of_class[name] += rate / sum(problem.workload.shares[each] for each in own)
        value = value_of(problem, nodes, [wanted.need for wanted in chosen], min(of_class.values()))
        best = max(best, value) if problem.objective.maximises else min(best, value)
    return best


@settings(max_examples=EXAMPLES // 2)
@given(problems(max_gpus=3, kinds=KINDS, family=SMALL_FAMILY, num_zones=1), TRAFFIC)
def test_the_search_finds_the_optimum_of_brute_force(problem: PlacementProblem, traffic: Workload) -> None:
    problem = replace(problem, workload=traffic)
    best, plan = best_value_by_brute_force(problem), plan_or_none(problem)
    assert worth(plan, problem) == pytest.approx(best, rel=1e-6)
    if plan is not None:
        assert check_plan(plan, problem) == ()


@settings(max_examples=EXAMPLES // 2)
@given(problems(max_gpus=5, kinds=KINDS, family=SMALL_FAMILY), TRAFFIC)
def test_a_plan_is_never_below_the_plan_without_classes(problem: PlacementProblem, traffic: Workload) -> None:
    problem = replace(problem, workload=traffic)
    without = problem.of_classes()
    sign = 1.0 if problem.objective.maximises else -1.0
    plan, other = plan_or_none(problem), plan_or_none(without)
    assert sign * worth(plan, problem) >= sign * worth(other, without) * (1.0 - sign * 1e-6)
    if plan is not None:
        assert check_plan(plan, problem) == ()
        assert plan.served_rate() <= rate_bound(build_cost_tables(problem)) * (1.0 + 1e-6)
        if (lost := worst_node(plan, problem)) is not None:
            stated = StatedLoss(place="node", name=lost.name, left=lost.rate, whole=lost.whole)
            assert check_losses(plan, problem, [stated]) == ()


def test_what_pools_serve_is_limited_by_the_class_that_gets_least() -> None:
    shares = {"short": 0.8, "long": 0.2}
    # 10/s of all, 8/s of short ones are those of 10/s in all, 1/s of long ones are those of 5/s.
    assert served_with_classes(shares, {(): 10.0, ("short",): 8.0, ("long",): 1.0}) == pytest.approx(15.0)
    assert served_with_classes(shares, {("short",): 8.0}) == 0.0
    assert served_with_classes({}, {(): 3.0}) == 3.0


FLEET = [make_node("A", gpu="A", gpus=2), make_node("B", gpu="B", gpus=2)]


def two_kinds() -> tuple[PlacementProblem, Plan]:
    """Return a problem whose best plan has pools for each class, and the plan."""
    problem = replace(
        make_problem(FLEET),
        workload=workload(10, 900, (40, 2), 0.9),
    )
    plan = plan_or_none(problem)
    assert plan is not None
    return problem, plan


def test_a_class_keeps_its_own_limits() -> None:
    traffic = workload(10, 900, (40, 2), 0.9, ttft_limit_s=0.01)
    problem = replace(make_problem(FLEET), workload=traffic)
    assert problem.of_classes(("short",)).objective.ttft_limit_s == 0.01
    assert problem.of_classes(("long",)).objective == problem.objective
    assert problem.of_classes().objective.ttft_limit_s == 0.01  # replicas for all keep the strictest


def test_other_iterations_keep_the_limit_of_a_class_on_tpot() -> None:
    """Requests of a class have fewer iterations than those of all together, in which prompts delay their tokens."""
    traffic, limit_s = workload(CUT, 2_000, (400, 40), 0.5), 0.0011
    problem = replace(waiting_problem(1.0), workload=traffic, objective=Objective(tpot_limit_s=limit_s))
    problem = replace(problem, family=replace(problem.family, chunk_tokens=(64, 512)))
    costs, few = build_cost_tables(problem), np.zeros(0)
    number = 0
    for template in uniform_templates(costs):
        chosen = Outcome(((template, 1),), 1.0, 1.0, few, few, np.zeros((0, 0)))
        own = costs.of_scope(template.scope)
        for ((other, _),) in (one.chosen for one in retuned(costs, chosen)):
            m = problem.family.in_flight[other.in_flight_index]
            each = mixes.tpot_per_interval(problem.model, own.mixes[other.mix], m)
            assert each * other.interval_s <= limit_s * (1.0 + 1e-9)
            number += bool(own is not costs)
    assert number


def test_the_checker_finds_wrong_classes() -> None:
    problem, plan = two_kinds()
    assert check_plan(plan, problem) == ()
    for wrong in (
        replace(plan, classes=()),
        replace(plan, classes=(replace(plan.classes[0], share=0.5), plan.classes[1])),
        replace(plan, classes=(replace(plan.classes[0], max_prompt_tokens=61), plan.classes[1])),
        replace(plan, replicas=tuple(replace(one, classes=("huge",)) for one in plan.replicas)),
        replace(plan, replicas=tuple(replace(one, classes=("short", "long")) for one in plan.replicas)),
    ):
        assert Rule.CLASSES in {violation.rule for violation in check_plan(wrong, problem)}
    other = {"short": "long", "long": "short"}
    for number, one in enumerate(plan.replicas):
        served = tuple(other[name] for name in one.classes) or ("short",)
        replicas = list(plan.replicas)
        replicas[number] = replace(one, classes=served)
        swapped = replace(plan, replicas=tuple(replicas))
        assert {Rule.RATE, Rule.VALUE, Rule.ROUTE} & {violation.rule for violation in check_plan(swapped, problem)}


def test_an_empty_class_is_refused() -> None:
    problem = make_problem([make_node("A", gpu="A")])
    classes = RequestClass(name="short", max_prompt_tokens=1), RequestClass(name="long")
    with pytest.raises(InvalidProblemError, match=r"class short of workload .* has no requests"):
        replace(problem, workload=replace(problem.workload, classes=classes))


# --- the utilisation of pools

MOST, PRECISE, NEARLY = 0.98, 0.005, 0.95


def waiting_problem(limit_s: float, **limits: float) -> PlacementProblem:
    """Return a problem of two replicas of one GPU each, whose long prompts make others wait."""
    family = Family(tp_sizes=(1,), micro_batches=(1, 8), in_flight=(1,), chunk_tokens=(64,), max_pool=0)
    return make_problem(
        [make_node("node", "A", nodes=2)],
        workload=workload(40, 1000, (20, 20), 0.9, **limits),
        objective=Objective(ttft_limit_s=limit_s, tpot_limit_s=None),
        family=run_by(family, EngineRules(name="vllm", max_stages=1)),
        assumptions=Assumptions(),
    )


def most_kept(problem: PlacementProblem, pair: Sequence[tuple[tuple[str, ...], int]]) -> float:
    """Return the highest rate that two replicas for these classes keep, by the checker's formulas."""
    replicas, deriving = list[ReplicaPlan](), list[tuple[PlacementProblem, ReplicaShape]]()
    for node, (names, micro_batch) in enumerate(pair):
        own = problem.of_classes(names)
        stage = StagePlan(
            gpu="A", tp=1, copies=1, first_layer=0, num_layers=own.model.num_layers, devices=(f"node-{node}/0",),
            kv_head_groups_kept=own.model.head_groups,
        )  # fmt: skip
        bare = replace(unclaimed(stage, in_flight=1), micro_batch=micro_batch, classes=names)
        replicas.append(claimed(bare, own))
        deriving.append((own, replica_shape(bare, problem, Fleet.of(problem.cluster))))
    plan = replace(plan_of(problem, *replicas), classes=problem.class_shares())
    if not plan.served_rate():
        return 0.0
    queues = {name: request_queue(plan, problem, name) for name in problem.limits_of_classes()}

    def keeps(share: float) -> bool:
        for (names, _), (own, shape) in zip(pair, deriving, strict=True):
            lanes = Lanes(unified=[each for each, _ in pair].count(names))
            derived, limit_s = Rederivation(own.at(share, lanes)).of(shape), own.objective.ttft_limit_s
            if limit_s is None or derived.ttft_s(derived.t_s) > limit_s:
                return False
        return all(
            queues[name].ttft_p95_s(share * plan.served_rate()) <= limit_s  # type: ignore[union-attr,operator]
            for name, limit_s in problem.limits_of_classes().items()
        )

    low, high = 0.0, MOST
    while high - low > PRECISE:
        middle = (low + high) / 2
        low, high = (middle, high) if keeps(middle) else (low, middle)
    return low * plan.served_rate()


@pytest.mark.parametrize(
    ("limit_s", "limits"), [(0.05, {}), (0.5, {}), (0.5, {"ttft_limit_s": 0.05}), (0.5, {"ttft_limit_s": 0.02})]
)
def test_what_pools_keep_is_what_brute_force_finds(limit_s: float, limits: dict[str, float]) -> None:
    problem = waiting_problem(limit_s, **limits)
    some = [(names, micro_batch) for names in problem.ranges() for micro_batch in problem.family.micro_batches]
    best = max(most_kept(problem, pair) for pair in itertools.combinations_with_replacement(some, 2))
    plan = solve_placement(problem)
    assert not check_plan(plan, problem)
    assert best > 0.0
    assert plan.result.value >= NEARLY * best
    assert plan.result.bound >= best * (1.0 - 1e-9)


def test_pools_that_claim_too_short_waits_or_miss_the_limit_of_a_class_are_refused() -> None:
    problem = waiting_problem(0.5, ttft_limit_s=0.02)
    plan = solve_placement(problem)
    queued_s = plan.result.queued_ttft_s
    assert queued_s is not None
    assert any(one.classes for one in plan.replicas)
    shorter = replace(plan, result=replace(plan.result, queued_ttft_s=0.5 * queued_s))
    assert {each.rule for each in check_plan(shorter, problem)} == {Rule.TTFT}
    tighter = waiting_problem(0.5, ttft_limit_s=0.005)
    assert Rule.TTFT_LIMIT in {each.rule for each in check_plan(plan, tighter)}


def test_a_pool_waits_with_the_requests_that_its_router_gives_it() -> None:
    problem = waiting_problem(0.5).of_classes()
    found = request_queue(solve_placement(problem), problem)
    assert found is not None
    queue = found.arrivals[0].queue
    shares, parts = {"a": 0.6, "b": 0.4}, {"a": {(): 0.25, ("a",): 0.75}, "b": {(): 1.0}}

    def arrivals(counted: str) -> list[float]:
        pools = RequestQueue.of_pools({(): [queue], ("a",): [queue]}, shares, parts, counted).arrivals
        assert [one.of_all for one in pools] == pytest.approx([0.55, 0.45])
        return [one.counted for one in pools]

    assert arrivals("") == pytest.approx([0.55, 0.45])
    assert arrivals("a") == pytest.approx([0.25, 0.75])
    assert arrivals("b") == [1.0, 0.0]
