"""An explanation adds up: to the seconds and bytes that the checker derives, and to the memory of every card."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given

from hetis.formats.documents import load_cluster, load_model, load_workload
from hetis.profiler.roofline import modelled_profile
from hetis.solver.check import check_plan
from hetis.solver.check.rederive import Rederivation
from hetis.solver.check.replica_shapes import Fleet, kv_partners, replica_shape
from hetis.solver.check.setting import Setting
from hetis.solver.check.timing import stage_seconds, wire_seconds
from hetis.solver.cluster import Cluster
from hetis.solver.engine_rules import EngineRules, Family
from hetis.solver.errors import InvalidProblemError
from hetis.solver.model import DraftShape
from hetis.solver.placement.explanation import explain_plan
from hetis.solver.placement.explanation.facts import Explanation
from hetis.solver.placement.explanation.replica_view import replica_views
from hetis.solver.placement.families import run_by
from hetis.solver.plan import OTHER_TENANTS, ClassPrice, Objective, ObjectiveKind, Plan, Status
from hetis.solver.planning import solve_placement
from hetis.solver.problem import PlacementProblem
from tests.models import replace, shape_of
from tests.solver.check import test_roles as test_check_roles
from tests.solver.check.test_check import (
    A_ALONE,
    A_STAGE,
    B_STAGE,
    C_POOL,
    sound,
    the_problem,
)
from tests.solver.claimed_plans import claimed, plan_of, unclaimed
from tests.solver.instances import NO_LIMITS, SMALL_FAMILY, make_model, make_node, make_problem, make_profile, problems
from tests.solver.placement.test_search import KINDS_OF_LAYERS
from tests.solver.searching import plan_or_none

EXAMPLES = Path(__file__).parents[3] / "examples"


def assert_adds_up(plan: Plan, problem: PlacementProblem) -> Explanation:
    """Every total equals the checker's, and every bar is as long as its card's memory."""
    explanation = explain_plan(plan, problem)
    rederivation, fleet = Rederivation(problem), Fleet.of(problem.cluster)
    workload = problem.workload.clipped_to(problem.model.max_position)
    moments = workload.moments(block_tokens=problem.assumptions.block_tokens)
    numbers = list(dict.fromkeys(part.replica for part in explanation.stage_times))
    assert len(explanation.bottlenecks) == len(numbers)
    for number in numbers:
        shape = replica_shape(plan.replicas[number], problem, fleet, kv_partners(plan, fleet).get(number, ()))
        setting = Setting.of(problem, moments, shape)
        times = [part for part in explanation.stage_times if part.replica == number]
        last = len(shape.stages) - 1
        for i, (part, stage) in enumerate(zip(times, shape.stages, strict=True)):
            expected = stage_seconds(setting, stage, is_first=i == 0, is_last=i == last)
            assert part.total_s == pytest.approx(expected, rel=1e-9)
            assert part.total_s == pytest.approx(
                part.dense_s
                + part.all_reduce_s
                + part.prefill_attention_s
                + part.decode_attention_s
                + part.transfer_s
                + part.head_s
                + part.other_s
                + part.kv_wait_s
            )
            layers = stage.layers + (problem.model.prefix_layers if i == 0 else 0)
            layers += problem.model.draft_layers if i == last else 0
            assert part.kv_wire_s == pytest.approx(layers * wire_seconds(setting, stage))
            slowest_s = max(other.total_s / other.copies for other in times)
            assert part.is_bottleneck == (part.total_s / part.copies == slowest_s)
        bars = [bar for bar in explanation.memory if bar.replica == number]
        for bar, use in zip(bars, rederivation.of(shape).memory, strict=True):
            held = bar.reserve_bytes + bar.weight_bytes + bar.kv_bytes + bar.activation_bytes
            assert bar.unusable_bytes + held + bar.free_bytes == bar.nominal_bytes
            assert bar.nominal_bytes - bar.unusable_bytes == use.usable_bytes
            assert held == pytest.approx(use.num_bytes, abs=2)
    return explanation


def test_stages_copies_and_workers_add_up() -> None:
    problem = the_problem(objective=Objective(ttft_limit_s=5.0, tpot_limit_s=5.0))
    explanation = assert_adds_up(sound(problem), problem)
    assert [bar.role for bar in explanation.memory] == ["primary", "primary", "attention worker", "primary"]
    assert [bar.num_devices for bar in explanation.memory] == [2, 2, 2, 1]
    assert "1 of 2 head groups" in explanation.attention_workers


@given(problems(max_gpus=5, kinds=tuple(ObjectiveKind)))
def test_solved_plans_add_up(problem: PlacementProblem) -> None:
    plan = plan_or_none(problem, strategy=problem.family.name)
    if plan is None:
        return
    explanation = assert_adds_up(plan, problem)
    idle = {(p.gpu, p.zone): 0 for p in plan.prices if p.used < p.available}
    assert {(group.gpu, group.zone) for group in explanation.idle} == set(idle)
    assert all(len(group.reason) <= 400 for group in explanation.idle)


def test_equal_replicas_are_explained_once_under_the_first_number() -> None:
    problem = the_problem()
    alone = claimed(unclaimed(A_ALONE), problem)
    same = replace(alone, stages=(replace(A_ALONE, devices=("a-1/1",)),))
    pair = claimed(unclaimed(A_STAGE, B_STAGE, pools=(C_POOL,)), problem)
    explanation = assert_adds_up(plan_of(problem, alone, same, pair), problem)
    assert {part.replica for part in explanation.stage_times} == {0, 2}
    assert [sentence.split(":")[0] for sentence in explanation.bottlenecks] == ["replica 0", "replica 2"]


def test_sentence_names_the_limit_that_binds() -> None:
    lifted = the_problem()
    replica = claimed(unclaimed(A_ALONE), lifted)
    problem = the_problem(objective=Objective(ttft_limit_s=None, tpot_limit_s=replica.tpot_s * 1.01))
    (sentence,) = explain_plan(plan_of(problem, replica), problem).bottlenecks
    assert "a limit binds: mean TPOT" in sentence
    assert "p95 TTFT" not in sentence
    (free,) = explain_plan(plan_of(lifted, replica), lifted).bottlenecks
    assert "no limit is within 5%" in free


def test_replica_with_too_few_micro_batches_says_that_the_sum_counts() -> None:
    problem = the_problem()
    b_stage = replace(B_STAGE, copies=1, devices=("b-0/0",), kv_head_groups_kept=2)
    replica = claimed(unclaimed(A_STAGE, b_stage, in_flight=1), problem)
    (sentence,) = explain_plan(plan_of(problem, replica), problem).bottlenecks
    assert "one micro-batch passes through all 2 stages" in sentence


def test_idle_gpus_of_another_vendor_cannot_join() -> None:
    problem = the_problem()
    problem = replace(problem, family=run_by(problem.family, EngineRules(name="vllm")))
    price = ClassPrice(gpu="B", zone="east", gpus_per_node=2, available=4, used=0, as_attention_workers=0, dual=0.25)
    plan = replace(plan_of(problem, claimed(unclaimed(A_ALONE, in_flight=1), problem)), prices=(price,))
    types = problem.cluster.gpu_types
    of_two = replace(problem.cluster, gpu_types=types | {"B": replace(types["B"], vendor="AMD")})
    (alike,), (apart,) = (explain_plan(plan, replace(problem, cluster=one)).idle for one in (problem.cluster, of_two))
    says = "they are AMD's, and an engine's replica has GPUs of one vendor"
    assert says in apart.reason
    assert says not in alike.reason


def test_idle_gpus_hold_few_of_the_layers_after_leading_ones() -> None:
    moe = shape_of(num_experts=4, active_experts=2, expert_intermediate=256, first_dense_layers=1)
    nodes = [make_node("a", "A"), make_node("b", "B")]
    for model, layers in ((make_model(moe=moe), "the 5 layers after the first 1"), (make_model(), "6 layers")):
        size = int(model.params() * model.weight_bytes)
        profiles = {"A": make_profile("A", usable_bytes=20 * size), "B": make_profile("B", usable_bytes=size // 2)}
        problem = make_problem(nodes, profiles=profiles, model=model)
        (idle,) = explain_plan(solve_placement(problem), problem).idle
        assert idle.gpu == "B"
        assert re.search(rf"the 1 idle hold at most \d of {layers}, without KV", idle.reason)


def test_idle_class_with_a_price_says_what_it_is_worth_at_the_margin() -> None:
    problem = the_problem()
    price = ClassPrice(gpu="B", zone="east", gpus_per_node=2, available=4, used=0, as_attention_workers=0, dual=0.25)
    plan = replace(plan_of(problem, claimed(unclaimed(A_ALONE), problem)), prices=(price,))
    (idle,) = explain_plan(plan, problem).idle
    assert (idle.gpu, idle.zone, idle.count) == ("B", "east", 4)
    assert idle.reason.startswith("each is worth 0.25 requests/s at the margin, but ")


@pytest.mark.parametrize("gap", [0.0, 0.15])
def test_a_price_of_0_is_only_said_of_the_relaxation(gap: float) -> None:
    """Whole replicas may well use more of such GPUs, whether the bound is reached or not."""
    problem = the_problem()
    price = ClassPrice(gpu="B", zone="east", gpus_per_node=2, available=4, used=0, as_attention_workers=0, dual=0.0)
    plan = replace(plan_of(problem, claimed(unclaimed(A_ALONE), problem)), prices=(price,))
    result = replace(plan.result, bound=plan.result.value * (1 + gap), gap=gap, status=Status.FEASIBLE)
    (idle,) = explain_plan(replace(plan, result=result), problem).idle
    assert idle.reason.startswith(
        "their marginal price is 0: they are not scarce if fractions of replicas are allowed; "
    )
    assert "nothing" not in idle.reason
    assert idle.reason.endswith("a gap of 15% remains, so that a use for them may exist") is (gap > 0)


@pytest.mark.parametrize(("dual", "says"), [(0.0, "without prices"), (0.25, "each is worth 0.25 requests/s")])
def test_gpus_of_other_tenants_are_not_idle(dual: float, says: str) -> None:
    problem = the_problem()
    price = ClassPrice(gpu="B", zone="east", gpus_per_node=2, available=4, used=0, as_attention_workers=0, dual=dual)
    plan = replace(plan_of(problem, claimed(unclaimed(A_ALONE), problem)), prices=(price,))
    plan = replace(plan, result=replace(plan.result, bound=plan.result.value * 2, gap=1.0, status=Status.FEASIBLE))
    shared = replace(plan, inputs={OTHER_TENANTS: {"chat": ["b-0/0", "b-0/1"], "code": ["b-1/0"], "drafts": []}})
    (idle,) = explain_plan(shared, problem).idle
    assert idle.count == 1
    assert says in idle.reason
    assert "price is 0" not in idle.reason
    assert "gap" not in idle.reason, "the bound is that of the whole fleet to itself"
    full = replace(plan, inputs={OTHER_TENANTS: {"chat": ["b-0/0", "b-0/1", "b-1/0", "b-1/1"]}})
    assert explain_plan(full, problem).idle == ()
    for unreadable in (None, 5, {"chat": 5}):
        (alone,) = explain_plan(replace(plan, inputs={OTHER_TENANTS: unreadable}), problem).idle
        assert alone == explain_plan(plan, problem).idle[0]


@pytest.mark.parametrize("kind", [ObjectiveKind.GOODPUT, ObjectiveKind.THROUGHPUT, ObjectiveKind.COST])
def test_idle_gpus_are_not_needed_for_a_demand_only_if_the_plan_meets_it(kind: ObjectiveKind) -> None:
    problem = the_problem(objective=Objective(kind=kind, ttft_limit_s=None, tpot_limit_s=None, demand_rps=1.0))
    price = ClassPrice(gpu="B", zone="east", gpus_per_node=2, available=4, used=0, as_attention_workers=0, dual=0.25)
    plan = replace(plan_of(problem, claimed(unclaimed(A_ALONE), problem)), prices=(price,))
    promised_rps = plan.result.value if plan.objective.maximises else 1.0
    for demand_rps, is_met in ((promised_rps, True), (1.1 * promised_rps, kind is ObjectiveKind.COST)):
        asked = replace(problem.objective, demand_rps=demand_rps)
        (idle,) = explain_plan(replace(plan, objective=asked), replace(problem, objective=asked)).idle
        assert (f"by the model, the demand of {demand_rps:g} requests/s is met without them" in idle.reason) is is_met


@pytest.mark.parametrize("kind", [ObjectiveKind.COST, ObjectiveKind.GPUS])
@pytest.mark.parametrize("strategy", ["hetis", "hexgen"])
def test_the_cost_of_a_shape_that_was_not_chosen_is_that_of_its_gpus(kind: ObjectiveKind, strategy: str) -> None:
    prices = {"A": 1.0, "B": 3.0} if kind is ObjectiveKind.COST else {"A": 1.0, "B": 1.0}
    nodes = [make_node("a", "A", gpus=2, nodes=4), make_node("b", "B", nodes=4)]
    asked = replace(NO_LIMITS, kind=kind, demand_rps=2000.0)
    plan = solve_placement(make_problem(nodes, usd_per_hour=prices, objective=asked), strategy=strategy)
    taken = plan.result.value / sum(one.rate for one in plan.replicas)
    assert plan.runners_up
    for one in plan.runners_up:
        said = re.fullmatch(r"(\S+) (?:USD/h|GPUs) per request/s, where (.*) (\S+)", one.reason)
        if said is None:
            assert "worth its GPUs" in one.reason
            continue
        gpus = re.findall(r"([AB]) TP(\d) x(\d)", one.shape)
        each = sum(prices[gpu] * int(tp) * int(copies) for gpu, tp, copies in gpus) / one.rate
        assert float(said[1]) == pytest.approx(each, rel=1e-3)
        if one.shape.startswith(("prefill", "decode")):
            assert said[2] == f"{one.shape.split()[0].rstrip(':')} work is worth"
            assert float(said[3]) < taken, "the other half costs the rest"
        else:
            assert said[2] == "the plan takes"
            assert float(said[3]) == pytest.approx(taken, rel=1e-3)


def test_strategy_without_attention_workers_says_so() -> None:
    problem = the_problem(max_pool=0)
    plan = plan_of(problem, claimed(unclaimed(A_ALONE), problem))
    assert explain_plan(plan, problem).attention_workers == "None: strategy hetis does not use them."
    of_engine = replace(problem, family=run_by(problem.family, EngineRules(name="vllm")))
    plan = plan_of(of_engine, claimed(unclaimed(A_ALONE, in_flight=1), of_engine))
    assert explain_plan(plan, of_engine).attention_workers == "None: vllm does not have them."


@pytest.mark.parametrize("kind", [*KINDS_OF_LAYERS, "drafted states"])
def test_layers_of_several_kinds_add_up(kind: str) -> None:
    drafted = replace(KINDS_OF_LAYERS["states"], draft=DraftShape(tokens=2, acceptance=0.7))
    model = KINDS_OF_LAYERS.get(kind, drafted)
    problem = make_problem([make_node("a", "A", nodes=2, gpus=2)], model=model, family=SMALL_FAMILY)
    plan = solve_placement(problem)
    assert_adds_up(plan, problem)
    for part in explain_plan(plan, problem).stage_times:
        assert {type(value) for value in asdict(part).values()} == {int, str, float, bool}  # none of numpy, for JSON
    if kind == "drafted states":
        why = "layers keep state other than the KV of single heads and layers verify drafts"
        assert f"No head can be computed elsewhere: {why}." in explain_plan(plan, problem).attention_workers


def test_layers_whose_heads_cannot_move_are_told_apart_from_ranks_that_share_them() -> None:
    windows = replace(make_model(), sliding_window=64, sliding_layers=3)
    problem = make_problem([make_node("a", "A", gpus=1)], model=windows, family=SMALL_FAMILY)
    said = explain_plan(solve_placement(problem), problem).attention_workers
    assert "No head can be computed elsewhere: windows free the KV of some layers only." in said
    assert "share head groups" not in said


@pytest.mark.parametrize(
    ("factor", "says"), [(2.5, " (2.5 times that beside a chunk);"), (None, "per layer and iteration;")]
)
def test_the_factor_of_mixed_batches_is_said_where_there_is_one(factor: float | None, says: str) -> None:
    profiles = {"A": make_profile("A", mixed_factor=factor)}
    problem = make_problem([make_node("a", "A", gpus=1)], profiles=profiles, family=SMALL_FAMILY)
    assert says in assert_adds_up(solve_placement(problem), problem).attention_workers


def test_a_pool_that_only_pays_beside_chunks_is_said_to_make_the_stage_faster() -> None:
    """Decode attention alone is as long as on idle cards: only that beside a chunk is worth moving."""
    changes = []
    for factor in (None, 100.0):
        problem = the_problem()
        profiles = {**problem.profiles, "A": make_profile("A", mixed_factor=factor)}
        problem = replace(problem, profiles=profiles)
        said = explain_plan(plan_of(problem, claimed(unclaimed(A_ALONE), problem)), problem).attention_workers
        found = re.findall(r"makes the stage ([\d.]+)% (slower|faster)", said)
        changes.append([float(percent) * (1 if word == "slower" else -1) for percent, word in found])
    summed, mixed = changes
    assert summed
    assert min(mixed) < min(summed) - 5
    assert min(mixed) < 0


def test_plan_without_replicas_is_explained() -> None:
    problem = the_problem()
    explanation = explain_plan(replace(sound(problem), replicas=()), problem)
    assert (explanation.memory, explanation.stage_times, explanation.bottlenecks) == ((), (), ())


def test_a_replica_is_explained_without_listing_the_fleet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planner looks at one replica after another: thousands of replicas times thousands of GPUs took minutes."""
    problem = test_check_roles.the_problem()
    plan = test_check_roles.sound(problem)
    expected = replica_views(plan, problem)
    monkeypatch.setattr(Cluster, "devices", lambda _: pytest.fail("all GPUs are listed"))
    assert [(view.shape, view.fleet.zones) for view in replica_views(plan, problem)] == [
        (view.shape, view.fleet.zones) for view in expected
    ]


@pytest.mark.parametrize("node", ["l4", "l4-", "l4-3", "l4-00", "l4-+1", "l4-²", "l4-" + "9" * 5000, "other-1", ""])
def test_a_node_of_another_name_is_in_no_group(node: str) -> None:
    group = make_node("l4", "L4", nodes=3)
    assert [group.index_of(group.node_name(index)) for index in range(3)] == [0, 1, 2]
    assert group.index_of(node) is None
    assert make_node("l4", "L4").index_of("l4") == 0
    assert make_node("l4", "L4").index_of("l4-0") is None


def test_plan_with_an_unknown_device_is_refused() -> None:
    problem = the_problem()
    replica = claimed(unclaimed(A_ALONE), problem)
    broken = replace(replica, stages=(replace(A_ALONE, devices=("nowhere/0",)),))
    size = problem.cluster.num_gpus()
    message = f"replica 0 stage 1: device nowhere/0 is not among the {size} devices of the cluster (known_device)"
    with pytest.raises(InvalidProblemError, match=f"^{re.escape(f'plan cannot be explained: {message}')}$"):
        explain_plan(plan_of(problem, broken), problem)
    assert message in map(str, check_plan(plan_of(problem, broken), problem))


def example_problem(cluster: str, model: str, workload: str, objective: Objective) -> PlacementProblem:
    fleet, spec = load_cluster(str(EXAMPLES / cluster)), load_model(model)
    return PlacementProblem(
        cluster=fleet,
        model=spec,
        workload=load_workload(workload).clipped_to(spec.max_position),
        profiles={name: modelled_profile(gpu) for name, gpu in fleet.gpu_types.items()},
        objective=objective,
        family=run_by(Family(), EngineRules(name="vllm-hetis")),
    )


def test_the_cluster_of_the_paper_adds_up() -> None:
    problem = example_problem("paper.yaml", "Llama-2-70B", "azure_conv_2023", Objective(ttft_limit_s=4.0))
    explanation = assert_adds_up(solve_placement(problem), problem)
    assert {group.gpu for group in explanation.idle} == {"P100-PCIe-12GB"}
    assert "P100-PCIe-12GB" in explanation.attention_workers


def test_attention_workers_that_pay_add_up() -> None:
    objective = Objective(ttft_limit_s=None, tpot_limit_s=0.05)
    problem = example_problem("h100-p100.yaml", "Llama-3.1-70B", "8000/300", objective)
    explanation = assert_adds_up(solve_placement(problem), problem)
    assert "attention worker" in {bar.role for bar in explanation.memory}
    assert "KV would not fit" in explanation.attention_workers
    assert "mean TPOT" in explanation.bottlenecks[0]
