"""The utilisation is a decision: what plans keep is that of brute force, and the checker derives the waits again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetis.solver.budget import SearchSettings
from hetis.solver.check import Rule, check_plan
from hetis.solver.check.rederive import Rederivation
from hetis.solver.check.replica_shapes import Fleet, replica_shape
from hetis.solver.check.waiting import request_queue
from hetis.solver.engine_rules import EngineRules, Family
from hetis.solver.placement import solve
from hetis.solver.placement.families import run_by
from hetis.solver.placement.replicas.tables import CostTables
from hetis.solver.placement.replicas.tabulation import build_cost_tables
from hetis.solver.placement.rungs import Known
from hetis.solver.placement.search import equal_stages
from hetis.solver.placement.waits import kept_by, own_rate, saturated_rate
from hetis.solver.plan import KvRoute, Lanes, Objective, ObjectiveKind, Plan, ReplicaPlan, Role, StagePlan
from hetis.solver.planning import solve_placement
from hetis.solver.problem import Assumptions, PlacementProblem
from tests.solver.claimed_plans import claimed, plan_of, unclaimed
from tests.solver.instances import make_node, make_problem, make_workload

MOST = 0.98
PRECISE = 0.002  # of a utilisation that brute force finds
NEARLY = 0.97  # of what brute force finds: the search sets a hundredth of the limit aside, and knows a few utilisations
FAMILY = Family(tp_sizes=(1,), micro_batches=(1, 2, 4, 8, 16), in_flight=(1,), chunk_tokens=(16, 64), max_pool=0)
WORKLOADS = (make_workload(), make_workload((300, 20), (60, 60)), make_workload(*[(40, 20)] * 19, (1500, 20)))


def one_stage(
    limit_s: float, num_gpus: int = 2, workload: int = 0, burstiness: float = 1.0, **objective: object
) -> PlacementProblem:
    """A problem of replicas of one GPU each."""
    goal = Objective(**{"ttft_limit_s": limit_s, "tpot_limit_s": None, **objective})  # type: ignore[arg-type]
    return make_problem(
        [make_node("node", "A", nodes=num_gpus)],
        workload=replace(WORKLOADS[workload], burstiness=burstiness),
        objective=goal,
        family=run_by(FAMILY, EngineRules(name="vllm", max_stages=1)),
        assumptions=Assumptions(),
    )


def plans_of(problem: PlacementProblem, num_gpus: int) -> list[Plan]:
    """Every plan of equal replicas on so many GPUs, with engines that run as many requests as planned, or more."""
    found = list[Plan]()
    layers = problem.model.num_layers
    for number in range(1, num_gpus + 1):
        for b in problem.family.micro_batches:
            for chunk in problem.family.chunk_tokens:
                for seats in problem.family.micro_batches:
                    if seats < b:
                        continue
                    replicas = []
                    for node in range(number):
                        name = f"node-{node}/0"
                        stage = StagePlan(
                            gpu="A", tp=1, copies=1, first_layer=0, num_layers=layers, devices=(name,),
                            kv_head_groups_kept=problem.model.head_groups,
                        )  # fmt: skip
                        bare = replace(unclaimed(stage, in_flight=1), micro_batch=b, chunk_tokens=chunk)
                        replicas.append(claimed(bare, problem))
                    larger = replace(bare, micro_batch=seats)
                    derived = Rederivation(problem).of(replica_shape(larger, problem, Fleet.of(problem.cluster)))
                    if derived.fits:
                        more = [replace(one, max_num_seqs=seats if seats > b else 0) for one in replicas]
                        found.append(plan_of(problem, *more))
    return found


def most_kept(problem: PlacementProblem, plan: Plan) -> float:
    """Return the highest rate of a plan that keeps the limit, by the checker's formulas."""
    limit_s, queue, rate = problem.objective.ttft_limit_s, request_queue(plan, problem), plan.served_rate()
    assert limit_s is not None
    assert queue is not None
    shape = replica_shape(plan.replicas[0], problem, Fleet.of(problem.cluster))

    def keeps(share: float) -> bool:
        derived = Rederivation(problem.at(share, Lanes(unified=len(plan.replicas)))).of(shape)
        return derived.ttft_s(derived.t_s) <= limit_s and queue.ttft_p95_s(share * rate) <= limit_s

    low, high = 0.0, MOST
    if keeps(high):
        return high * rate
    while high - low > PRECISE:  # waits grow with the rate
        middle = (low + high) / 2
        low, high = (middle, high) if keeps(middle) else (low, middle)
    return low * rate


def check_against_best(problem: PlacementProblem, best: float) -> None:
    """Check the plan that is found for a problem by what brute force finds to be kept at most, if anything is."""
    if best == 0.0:
        return
    plan = solve_placement(problem)
    assert not check_plan(plan, problem)
    assert plan.result.value >= NEARLY * best
    assert plan.result.bound >= best * (1 - 1e-9)


@pytest.mark.parametrize(("workload", "burstiness"), [(0, 1.0), (0, 2.0), (1, 1.0), (2, 1.0)])
@pytest.mark.parametrize("limit_s", [0.02, 0.05, 0.5])
def test_what_is_kept_is_what_brute_force_finds(workload: int, burstiness: float, limit_s: float) -> None:
    problem = one_stage(limit_s, workload=workload, burstiness=burstiness)
    best = max(most_kept(problem, plan) for plan in plans_of(problem, 2))
    check_against_best(problem, best)


def apart(limit_s: float, num_gpus: int) -> PlacementProblem:
    """A problem of replicas of one GPU each that prefill or decode."""
    problem = one_stage(limit_s, num_gpus, workload=1)
    return replace(problem, family=replace(problem.family, roles=(Role.PREFILL, Role.DECODE)))


def most_apart(problem: PlacementProblem, num_gpus: int) -> float:
    """Return the highest rate of equal prefill and equal decode replicas, each side at a utilisation of its own."""
    best, layers, fleet = 0.0, problem.model.num_layers, Fleet.of(problem.cluster)
    limit_s = problem.objective.ttft_limit_s
    assert limit_s is not None

    def replica(node: int, role: Role, micro_batch: int, chunk: int) -> ReplicaPlan:
        stage = StagePlan(
            gpu="A", tp=1, copies=1, first_layer=0, num_layers=layers, devices=(f"node-{node}/0",),
            kv_head_groups_kept=problem.model.head_groups,
        )  # fmt: skip
        zones = problem.cluster.zones() if role is Role.PREFILL else ()
        bare = unclaimed(stage, in_flight=1, role=role, kv_zones=zones)
        return claimed(replace(bare, micro_batch=micro_batch, chunk_tokens=chunk), problem)

    for senders in range(1, num_gpus):
        for chunk in problem.family.chunk_tokens:
            for b in problem.family.micro_batches:
                sending = [replica(node, Role.PREFILL, 0, chunk) for node in range(senders)]
                receiving = [replica(node, Role.DECODE, b, 0) for node in range(senders, num_gpus)]
                total = min(sum(one.rate for one in sending), sum(one.rate for one in receiving))
                each = total / senders / (num_gpus - senders)
                routes = tuple(
                    KvRoute(prefill=i, decode=j, rate=each)
                    for i in range(senders) for j in range(senders, num_gpus)
                )  # fmt: skip
                plan = plan_of(problem, *sending, *receiving, routes=routes)
                shape = replica_shape(receiving[0], problem, fleet)
                queue = request_queue(plan, problem)
                if queue is None or not Rederivation(problem).of(shape).fits:
                    continue
                shape, prompts_rps = replica_shape(sending[0], problem, fleet), sum(one.rate for one in sending)

                def keeps(rate: float) -> bool:
                    lanes = Lanes(prefill=senders)  # noqa: B023
                    derived = Rederivation(problem.at(rate / prompts_rps, lanes)).of(shape)  # noqa: B023
                    return derived.ttft_s(derived.t_s) <= limit_s and queue.ttft_p95_s(rate) <= limit_s  # noqa: B023

                low, high = 0.0, MOST * total
                if keeps(high):
                    low = high
                while high - low > PRECISE * total:
                    middle = (low + high) / 2
                    low, high = (middle, high) if keeps(middle) else (low, middle)
                best = max(best, low)
    return best


@pytest.mark.parametrize("num_gpus", [2, 3, 5])
@pytest.mark.parametrize("limit_s", [0.02, 0.03, 0.1])
def test_prefill_and_decode_replicas_have_utilisations_of_their_own(limit_s: float, num_gpus: int) -> None:
    problem = apart(limit_s, num_gpus)
    best = most_apart(problem, num_gpus)
    check_against_best(problem, best)


def test_routes_send_no_more_than_the_load_of_a_prefill_replica() -> None:
    problem = apart(0.1, 3)
    plan = solve_placement(problem)
    less = replace(plan, result=replace(plan.result, prefill_load=0.01))
    assert Rule.ROUTE_RATE in {each.rule for each in check_plan(less, problem)}
    none = replace(plan, result=replace(plan.result, prefill_load=1.5))
    assert Rule.VALUE in {each.rule for each in check_plan(none, problem)}


@settings(max_examples=8)
@given(limit_s=st.floats(0.02, 2.0), workload=st.integers(0, 2), num_gpus=st.integers(1, 4))
def test_looser_limits_and_more_gpus_keep_no_less(limit_s: float, workload: int, num_gpus: int) -> None:
    def bound(limit_s: float, num_gpus: int) -> float:
        try:
            found = solve_placement(one_stage(limit_s, num_gpus, workload))
        except Exception:
            return 0.0
        assert found.result.bound >= found.result.value
        return found.result.bound

    here = bound(limit_s, num_gpus)
    assert bound(2 * limit_s, num_gpus) >= here * (1 - 1e-6)
    assert bound(limit_s, num_gpus + 1) >= here * (1 - 1e-6)


def test_a_known_plan_of_a_smaller_family_is_the_answer_unless_more_is_kept() -> None:
    problem = one_stage(0.05)
    poorer = replace(problem, family=replace(problem.family, micro_batches=(1, 2)))
    little, best = solve_placement(poorer), solve_placement(problem)
    assert little.result.value < best.result.value
    beaten = solve_placement(problem, known=Known(little, poorer.family))
    assert (beaten.result.value, beaten.replicas) == (best.result.value, best.replicas)
    again = solve_placement(problem, known=Known(best, poorer.family))
    assert again.replicas == best.replicas
    assert again.result.value == best.result.value <= again.result.bound == pytest.approx(best.result.bound)
    assert not check_plan(again, problem)


def test_equal_stages_take_no_bounds_at_several_utilisations(monkeypatch: pytest.MonkeyPatch) -> None:
    bound_of, asked = solve.bound_of, list[CostTables]()

    def bound(tables: CostTables, settings: SearchSettings) -> float:
        asked.append(tables)
        return bound_of(tables, settings)

    monkeypatch.setattr(solve, "bound_of", bound)
    assert solve.equal_stages_value(one_stage(0.05), SearchSettings())
    assert len(asked) == 1


def test_bursts_keep_less_of_a_tight_limit() -> None:
    calm, bursts = (solve_placement(one_stage(0.05, burstiness=cv)).result.value for cv in (1.0, 3.0))
    assert bursts < calm


def test_a_demand_is_served_by_no_more_gpus_than_keep_it() -> None:
    most = solve_placement(one_stage(0.05, 4)).result.value
    demand = {"kind": ObjectiveKind.GPUS, "demand_rps": 0.95 * most}
    problem = one_stage(0.05, 4, **demand)
    plan = solve_placement(problem)
    assert not check_plan(plan, problem)
    assert plan.planned_rate() >= 0.95 * most * (1 - 1e-9)
    assert plan.result.bound <= plan.result.value <= 4


def test_a_plan_that_claims_too_short_waits_or_too_high_a_share_is_refused() -> None:
    problem = one_stage(0.05)
    plan = solve_placement(problem)
    queued_s = plan.result.queued_ttft_s
    assert queued_s is not None
    assert not check_plan(plan, problem)

    def broken(**changes: float) -> set[Rule]:
        return {each.rule for each in check_plan(replace(plan, result=replace(plan.result, **changes)), problem)}

    assert broken(queued_ttft_s=0.5 * queued_s) == {Rule.TTFT}
    assert broken(queued_ttft_s=0.051) == {Rule.TTFT_LIMIT}
    assert Rule.VALUE in broken(utilisation=0.5 * plan.result.utilisation)
    assert Rule.VALUE in broken(unified_lanes=3)


@pytest.mark.parametrize("workload", range(len(WORKLOADS)))
@pytest.mark.parametrize("limit_s", [0.03, 0.05, 0.2])
def test_a_rate_to_exceed_changes_no_plan_that_exceeds_it(limit_s: float, workload: int) -> None:
    costs = build_cost_tables(one_stage(limit_s, 4, workload))
    outcome = equal_stages(costs, SearchSettings())
    if outcome is None:
        return
    kept, rate = kept_by(costs, outcome, MOST), saturated_rate(costs, outcome)
    for share in np.linspace(0.1, 1.2, 12):
        again = kept_by(costs, outcome, MOST, above=float(share) * kept.utilisation * rate)
        assert again == kept if share < 0.99 else again.utilisation <= kept.utilisation


def test_a_quick_search_chooses_by_what_replicas_are_rated_among_their_like() -> None:
    goal = Objective(ttft_limit_s=0.1, tpot_limit_s=None)
    family = run_by(replace(FAMILY, tp_sizes=(1, 2), in_flight=(1, 2)), EngineRules(name="vllm", max_stages=2))
    nodes = [make_node("node", "A", gpus=2, nodes=2)]
    costs = build_cost_tables(make_problem(nodes, objective=goal, family=family, assumptions=Assumptions()))
    for stages in (1, 2):
        found = equal_stages(costs, SearchSettings(), lambda each, n, of=stages: float(n * (len(each.stages) == of)))
        assert found is not None
        assert {len(template.stages) for template, _ in found.chosen} == {stages}
        (template, _), *_ = found.chosen
        together = own_rate(costs, MOST, template, 2)
        assert 0.0 < own_rate(costs, MOST, template, 1) <= together <= MOST * template.rate
