"""Plans for engines: the search that lists all pipelines finds the best of them, and proves it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hetis.solver.budget import Budget
from hetis.solver.check import check_plan
from hetis.solver.check.replica_shapes import Fleet
from hetis.solver.check.structure import check_engine
from hetis.solver.cluster import Link, Network
from hetis.solver.constraints import Duty, Exclude, RestrictRole, Selection, Unit
from hetis.solver.engine_rules import EngineRules, Family
from hetis.solver.errors import InfeasibleError, InvalidProblemError, NoPlanFoundError
from hetis.solver.model import DraftShape, GpuPrecision
from hetis.solver.placement.candidates import Evaluator, candidates_of
from hetis.solver.placement.columns import Columns
from hetis.solver.placement.families import ENGINES, STRATEGIES, beyond, run_by
from hetis.solver.placement.master import Master
from hetis.solver.placement.replicas.tables import CostTables
from hetis.solver.placement.replicas.tabulation import build_cost_tables
from hetis.solver.plan import AttentionWorkerPool, ObjectiveKind, Plan, Role, Status
from hetis.solver.planning import solve_placement
from hetis.solver.problem import APART, PlacementProblem
from tests.solver.instances import (
    ENGINE,
    NO_LIMITS,
    PLUGIN,
    make_model,
    make_node,
    make_problem,
    make_profile,
    problems,
)
from tests.solver.oracle import best_plan_value
from tests.solver.searching import plan_or_none, worth

REL = 1e-6
OF_B = Selection(unit=Unit.TYPE, name="B")
TWO_ZONES = Network(default=Link(bytes_per_s=5e8, latency_s=1e-5), zone_default=Link(bytes_per_s=5e8, latency_s=1e-3))
EXAMPLES = settings().max_examples
WITH_WORKERS = run_by(
    Family(max_pool=2, tp_sizes=(1, 2), micro_batches=(1, 4, 16), chunk_tokens=(64,)),
    EngineRules(name="vllm-hetis", max_stages=3, max_pooled_stages=2),
)
FEW_GPUS = replace(WITH_WORKERS, engine=EngineRules(name="vllm-hetis", max_stages=3, max_gpus=2))
PLAIN = replace(WITH_WORKERS, max_pool=0, engine=EngineRules(name="vllm", max_stages=3))
LARGE_STAGES = replace(
    WITH_WORKERS, engine=EngineRules(name="vllm-hetis", max_stages=3, max_pooled_stages=2, min_layers=2)
)
WITH_MORE_STAGES = run_by(
    Family(max_pool=2, tp_sizes=(1, 2), micro_batches=(4,), chunk_tokens=(64,)),
    EngineRules(name="vllm-hetis", max_stages=5),
)
CHARGED = run_by(replace(WITH_WORKERS, engine=None), replace(ENGINE, max_stages=3, max_pooled_stages=2, plugin=PLUGIN))
SLOW = replace(PLUGIN, local_s=10.0)
FAMILIES = (WITH_WORKERS, CHARGED, PLAIN, FEW_GPUS, LARGE_STAGES)


def value_of(problem: PlacementProblem, strategy: str = "hetis") -> float:
    """Return the value of the plan found, which the checker accepts and which is proved the best."""
    plan = plan_or_none(problem, strategy=strategy, gap_target=0.0)
    if plan is None:
        return worth(None, problem)
    assert check_plan(plan, problem) == ()
    assert plan.result.status is Status.OPTIMAL
    return plan.result.value


def a_problem(data: st.DataObject) -> PlacementProblem:
    """Draw a problem of any family and objective, whose model may be cut anywhere."""
    family = data.draw(st.sampled_from(FAMILIES))
    problem = data.draw(problems(max_gpus=5, kinds=tuple(ObjectiveKind), family=family))
    assume(not problem.model.forbidden_cuts)
    return problem


@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_the_plan_found_is_the_best_that_brute_force_finds(data: st.DataObject) -> None:
    problem = a_problem(data)
    best = best_plan_value(problem)
    assert value_of(problem) == pytest.approx(best, rel=REL)


WEIGHTS, KV = (2.0, 1.0, 0.5), (2.0, 1.0)


def in_precisions(data: st.DataObject, problem: PlacementProblem) -> PlacementProblem:
    """Draw the problem with separate precisions for some GPU types."""
    gpus = sorted(problem.profiles)
    own = tuple(
        GpuPrecision(
            gpu=gpu,
            weights=f"{gpu}'s" if data.draw(st.booleans()) else "",
            weight_bytes=data.draw(st.sampled_from(WEIGHTS)),
            kv_bytes=data.draw(st.sampled_from(KV)),
        )
        for gpu in data.draw(st.lists(st.sampled_from(gpus), min_size=1, unique=True))
    )
    return replace(problem, model=replace(problem.model, precisions=own))


@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_the_plan_found_is_the_best_in_the_precision_of_every_gpu_type(data: st.DataObject) -> None:
    problem = a_problem(data)
    problem = in_precisions(data, problem)
    assert value_of(problem) == pytest.approx(best_plan_value(problem), rel=REL)


@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_the_plan_found_is_the_best_with_gpus_of_several_vendors(data: st.DataObject) -> None:
    problem = a_problem(data)
    assume(len(problem.cluster.gpu_types) > 1)
    problem = with_vendors(problem, A="AMD", C="AMD")
    if data.draw(st.booleans()):
        problem = in_precisions(data, problem)
    strategy = data.draw(st.sampled_from(["hetis", "splitwise"]))
    problem = replace(problem, family=STRATEGIES[strategy].restrict(problem.family))
    assert value_of(problem, strategy) == pytest.approx(best_plan_value(problem), rel=REL)


@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_the_plan_found_is_the_best_where_kv_goes_between_vendors(data: st.DataObject) -> None:
    problem = a_problem(data)
    assume(len(problem.cluster.gpu_types) > 1)
    family = replace(problem.family, roles=(Role.PREFILL, Role.DECODE), max_pool=0)
    problem = replace(with_vendors(problem, A="AMD", C="AMD"), family=family)
    apart = value_of(problem)
    across = with_kv_between(problem, *data.draw(st.sampled_from([("NVIDIA", "AMD"), ("NVIDIA", "Intel")])))
    if data.draw(st.booleans()):
        across = in_precisions(data, across)
        assert value_of(across) == pytest.approx(best_plan_value(across), rel=REL)
        return
    value = value_of(across)
    assert value == pytest.approx(best_plan_value(across), rel=REL)
    assert value >= apart * (1 - REL) if problem.objective.maximises else value <= apart * (1 + REL)


def test_kv_goes_from_one_vendor_and_zone_to_another() -> None:
    """Each zone has a GPU that is for one role only, so nothing is served unless KV goes between them."""
    nodes = [make_node("a", "A", zone="east"), make_node("b", "B", zone="west")]
    apart = replace(PLAIN, roles=(Role.PREFILL, Role.DECODE))
    problem = with_vendors(make_problem(nodes, family=apart, network=TWO_ZONES), B="AMD")
    assert value_of(problem) == 0
    across = with_kv_between(problem, "NVIDIA", "AMD")
    assert value_of(across) == pytest.approx(best_plan_value(across), rel=REL)
    assert value_of(across) > 0
    assert APART not in across.describe_family()
    assert "KV also from one to another of NVIDIA, AMD" in across.describe_family()
    eight_bits = replace(across, model=replace(across.model, kv_bytes=1.0))
    assert value_of(eight_bits) == 0, "FP8 differs between vendors"


def with_kv_between(problem: PlacementProblem, *vendors: str) -> PlacementProblem:
    engine = problem.family.engine
    assert engine is not None
    return replace(problem, family=replace(problem.family, engine=replace(engine, kv_vendors=vendors)))


def with_vendors(problem: PlacementProblem, **vendors: str) -> PlacementProblem:
    types = problem.cluster.gpu_types
    changed = {name: replace(gpu, vendor=vendors.get(name, gpu.vendor)) for name, gpu in types.items()}
    return replace(problem, cluster=replace(problem.cluster, gpu_types=changed))


def test_a_model_that_fits_on_two_vendors_together_fits_on_neither() -> None:
    profiles = {name: make_profile(name, usable_bytes=9_000_000) for name in "AB"}
    problem = make_problem([make_node("a", "A"), make_node("b", "B")], profiles=profiles, family=PLAIN)
    mixed = with_vendors(problem, B="AMD")
    assert len(solve_placement(problem, strategy="hetis").replicas[0].stages) == 2
    with pytest.raises(InfeasibleError):
        solve_placement(mixed, strategy="hetis")


def test_roles_on_one_gpu_type_each_are_planned_on_the_second_vendor() -> None:
    """The GPUs of the first vendor have no room for the model."""
    profiles = {"A": make_profile("A", usable_bytes=1_000_000), "B": make_profile("B")}
    family = STRATEGIES["splitwise"].restrict(PLAIN)
    nodes = [make_node("a", "A", nodes=2), make_node("b", "B", nodes=2)]
    problem = with_vendors(make_problem(nodes, profiles=profiles, family=family), B="AMD")
    assert value_of(problem, "splitwise") == pytest.approx(best_plan_value(problem), rel=REL)
    plan = solve_placement(problem, strategy="splitwise")
    assert {stage.gpu for replica in plan.replicas for stage in replica.stages} == {"B"}


def test_a_vendor_that_computes_no_layers_keeps_no_kv_in_its_zone() -> None:
    nodes = [make_node("a", "A", zone="east"), make_node("w", "A", zone="west"), make_node("b", "B", zone="east")]
    apart = replace(PLAIN, roles=(Role.PREFILL, Role.DECODE))
    problem = with_vendors(make_problem(nodes, family=apart, network=TWO_ZONES), B="AMD")
    alone = replace(problem, constraints=(Exclude(gpus=OF_B),))
    as_worker = replace(problem, constraints=(RestrictRole(gpus=OF_B, duty=Duty.PRIMARY, only=False),))
    assert value_of(as_worker) == value_of(alone) > 0
    assert value_of(problem) == 0, "KV of several builds stays in a zone, and each has one GPU of a kind"
    plan = solve_placement(as_worker, strategy="hetis")
    assert APART not in plan.family
    assert APART in problem.describe_family()
    for named in (Selection(unit=Unit.NODE, name="b"), Selection(unit=Unit.GPU, name="b/0")):
        assert APART not in replace(problem, constraints=(Exclude(gpus=named),)).describe_family()
    two = make_problem([*nodes[:2], make_node("b", "B", nodes=2, zone="east")], family=apart, network=TWO_ZONES)
    of_one = Exclude(gpus=Selection(unit=Unit.NODE, name="b-1"))
    assert APART in replace(with_vendors(two, B="AMD"), constraints=(of_one,)).describe_family()


def with_twin_zone(problem: PlacementProblem) -> PlacementProblem:
    """Return the problem with every node duplicated in another zone."""
    groups = [replace(group, zone="east") for group in problem.cluster.node_groups]
    twins = [replace(group, name=f"twin-{group.name}", zone="west") for group in groups]
    return replace(problem, cluster=replace(problem.cluster, node_groups=(*groups, *twins)))


@settings(max_examples=EXAMPLES)
@given(
    problem=problems(max_gpus=4, family=WITH_WORKERS, num_zones=1),
    shares=st.lists(st.tuples(st.floats(0.0, 1.0), st.floats(0.5, 2.0)), min_size=1, max_size=3),
)
def test_what_is_learned_of_a_replica_holds_in_every_zone_and_at_every_utilisation_that_share_it(
    problem: PlacementProblem, shares: list[tuple[float, float]]
) -> None:
    tables = build_cost_tables(with_twin_zone(problem))
    for reserved, share in shares:
        check_what_is_learned(tables.at(0.9 * (1.0 - reserved), reserved=reserved), share)


def check_what_is_learned(costs: CostTables, share: float) -> None:
    """Check that each evaluator knows what one without earlier results finds, up to a share of the best interval."""
    without, others = candidates_of(costs)
    candidates = [*without, *others]
    assume(candidates)
    assert len({id(each.evaluator) for each in candidates}) < len(candidates) or len(costs.scopes) < 2
    for each in candidates:
        alone = Evaluator(costs, each.shape, each.evaluator.mixes, each.workers)
        every, least_s = np.arange(len(each.fits)), alone.shortest_s.copy()
        alone.evaluate(every, np.full(len(every), np.inf))
        best_s = np.where(alone.is_known, alone.shortest_s, np.inf)
        assert np.all(best_s >= least_s * (1 - REL)), "an interval below the shortest conceivable"
        shared = each.evaluator
        shared.evaluate(every, np.where(np.isfinite(best_s), best_s * share, 1.0))
        assert np.all(shared.shortest_s <= best_s * (1 + REL)), "more is ruled out than was looked at"
        assert shared.shortest_s[shared.is_known] == pytest.approx(best_s[shared.is_known], rel=REL)
        assert np.all(shared.is_known[np.isfinite(best_s) & (best_s * share > best_s)])
        for c in np.flatnonzero(shared.is_known)[:3]:
            template = each.template(int(c))
            assert template.interval_s == pytest.approx(best_s[c], rel=1e-5)
            assert template.scope == each.shape.scope


@given(data=st.data(), num=st.integers(1, 12), num_rows=st.integers(1, 3))
def test_columns_are_left_out_only_where_another_does_as_much_with_no_more(
    data: st.DataObject, num: int, num_rows: int
) -> None:
    few = st.integers(0, 2)
    uses = np.array(
        data.draw(st.lists(st.lists(few, min_size=num_rows, max_size=num_rows), min_size=num, max_size=num))
    )
    rates = np.array(data.draw(st.lists(few.map(float), min_size=num, max_size=num)))
    sides = np.array(data.draw(st.lists(st.integers(0, 1), min_size=num, max_size=num)))
    columns = Columns(rates, uses.sum(axis=1).astype(float), uses, sides)
    kept = columns.undominated().tolist()

    def is_outdone(i: int, j: int) -> bool:
        return bool(sides[i] == sides[j] and rates[j] >= rates[i] and np.all(uses[j] <= uses[i]))

    for i in range(num):
        others = [j for j in kept if j != i and is_outdone(i, j)]
        assert (i in kept) == (not others)


def a_plan(**changes: object) -> tuple[Plan, PlacementProblem]:
    """Two stages, each with a worker, and their problem."""
    slow, fast = make_profile("B", usable_bytes=6_000_000), make_profile("A", usable_bytes=9_000_000)
    problem = make_problem(
        [make_node("a", "A", nodes=2), make_node("b", "B", nodes=4)],
        profiles={"A": fast, "B": slow},
        model=make_model(num_layers=6),
        family=WITH_WORKERS,
    )
    return solve_placement(problem, strategy="hetis"), replace(problem, **changes)  # type: ignore[arg-type]


def precision(gpu: str, *, weight_bytes: float = 2.0, kv_bytes: float = 2.0) -> GpuPrecision:
    return GpuPrecision(gpu=gpu, weights=f"{gpu}'s", weight_bytes=weight_bytes, kv_bytes=kv_bytes)


def with_precisions(problem: PlacementProblem, *own: GpuPrecision) -> PlacementProblem:
    return replace(problem, model=replace(problem.model, precisions=own))


def test_workers_keep_the_kv_of_primaries_in_another_precision() -> None:
    _, problem = a_plan()
    alone = with_precisions(problem, precision("A", weight_bytes=1.0))
    both = with_precisions(problem, precision("A", weight_bytes=1.0), precision("B", weight_bytes=4.0, kv_bytes=1.0))
    for one in (alone, both):
        plan = solve_placement(one, strategy="hetis", gap_target=0.0)
        assert [({s.gpu for s in r.stages}, {w.gpu for w in r.attention_workers}) for r in plan.replicas] == [
            ({"A"}, {"B"}), ({"A"}, {"B"})
        ]  # fmt: skip
        assert check_plan(plan, one) == ()
    assert value_of(both) == pytest.approx(value_of(alone), rel=REL)


def test_a_link_between_zones_carries_kv_in_the_precision_of_the_gpus_that_compute() -> None:
    # Prompts in one zone and outputs in the other, of a single type of GPU with half the bytes of the model's own KV.
    nodes = [make_node("e", "A", nodes=2, zone="east"), make_node("w", "A", nodes=2, zone="west")]
    link = Link(bytes_per_s=2e6, latency_s=1e-4)
    network = Network(default=Link(bytes_per_s=1e9, latency_s=1e-5), zone_default=link)
    duties = tuple(
        RestrictRole(gpus=Selection(unit=Unit.ZONE, name=zone), duty=duty, only=True)
        for zone, duty in (("east", Duty.PREFILL), ("west", Duty.DECODE))
    )
    wide = replace(make_problem(nodes, family=PLAIN, network=network), constraints=duties)
    narrow = with_precisions(wide, precision("A", kv_bytes=1.0))
    assert value_of(narrow) == pytest.approx(2 * value_of(wide), rel=REL), "the link is the narrowest part"
    assert value_of(narrow) == pytest.approx(value_of(replace(wide, model=replace(wide.model, kv_bytes=1.0))), rel=REL)


@given(problem=problems(max_gpus=4, family=CHARGED))
def test_an_engine_with_workers_is_never_worse_than_without_and_pays_only_where_it_has_some(
    problem: PlacementProblem,
) -> None:
    charged, free = (value_of(replace(problem, family=family)) for family in (CHARGED, WITH_WORKERS))
    stock = value_of(replace(problem, family=PLAIN))
    assert stock * (1 - REL) <= charged <= free * (1 + REL)
    costly = replace(CHARGED, engine=replace(ENGINE, max_stages=3, max_pooled_stages=2, plugin=SLOW))
    assert value_of(replace(problem, family=costly)) == pytest.approx(stock, rel=REL, abs=0.1)


def test_an_engines_workers_keep_no_8_bit_kv() -> None:
    _, problem = a_plan()
    wide = with_precisions(problem, precision("A", weight_bytes=1.0))
    narrow = with_precisions(problem, precision("A", weight_bytes=1.0, kv_bytes=1.0))
    plan = solve_placement(narrow, strategy="hetis", gap_target=0.0)
    pooled = {s.gpu for r in plan.replicas if r.attention_workers for s in r.stages}
    assert "A" not in pooled
    found = check_plan(solve_placement(wide, strategy="hetis", gap_target=0.0), narrow)
    assert any("has attention workers and KV of 1 bytes an element" in str(violation) for violation in found)


def test_the_checker_knows_what_an_engine_does_not_run() -> None:
    plan, problem = a_plan()
    assert check_plan(plan, problem) == ()
    replica = plan.replicas[0]
    broken = [
        replace(replica, in_flight=replica.in_flight % 3 + 1),
        replace(replica, stages=tuple(replace(stage, copies=2) for stage in replica.stages)),
    ]
    if replica.attention_workers:
        broken.append(replace(replica, role=Role.DECODE))
        broken.append(replace(replica, attention_workers=replica.attention_workers[:1]))
    for one in broken:
        found = check_plan(replace(plan, replicas=(one, *plan.replicas[1:])), problem)
        assert any("vllm-hetis" in violation.message for violation in found), one


def test_uneven_workers_are_not_an_engines() -> None:
    plan, problem = a_plan()
    replica = plan.replicas[0]
    pools = (
        AttentionWorkerPool(stage=0, gpu="B", devices=("b-0/0",), kv_head_groups=1),
        AttentionWorkerPool(stage=1, gpu="B", devices=("b-1/0", "b-2/0"), kv_head_groups=2),
    )
    stages = tuple(replace(replica.stages[0], devices=(f"a-{i}/0",), tp=1) for i in range(2))
    uneven = replace(replica, stages=stages, attention_workers=pools, in_flight=2)
    messages = [v.message for v in check_plan(replace(plan, replicas=(uneven,)), problem)]
    assert any("different numbers" in message for message in messages)
    assert any("different head groups" in message for message in messages)


@settings(max_examples=EXAMPLES)
@given(problem=problems(max_gpus=5, family=WITH_MORE_STAGES))
def test_what_an_engine_lacks_is_what_the_checker_finds(problem: PlacementProblem) -> None:
    """The plans are for longer pipelines; the checker derives the same independently, replica by replica."""
    plan = plan_or_none(problem, strategy="hetis")
    if plan is None:
        assume(False)
    rules = EngineRules(name="vllm-hetis", max_stages=3, max_pooled_stages=2, max_gpus=4, min_layers=2)
    held, fleet = replace(problem, family=run_by(problem.family, rules)), Fleet.of(problem.cluster)
    for replica in plan.replicas:
        found = list(check_engine(replica, held, fleet))
        assert bool(found) == bool(beyond([replica], rules, problem.cluster, problem.model)), (found, replica)
        without = beyond([replica], replace(rules, name="vllm"), problem.cluster, problem.model)
        assert ("attention workers" in without) == bool(replica.attention_workers)


@settings(max_examples=EXAMPLES)
@given(problem=problems(max_gpus=5, family=PLAIN), fewest=st.integers(1, 4))
def test_more_layers_to_a_stage_never_serve_more(problem: PlacementProblem, fewest: int) -> None:
    assume(not problem.model.forbidden_cuts)
    few, more = (
        replace(problem, family=replace(PLAIN, engine=EngineRules(name="vllm", max_stages=3, min_layers=layers)))
        for layers in (fewest, fewest + 1)
    )
    better = (lambda a, b: a >= b * (1 - REL)) if problem.objective.maximises else (lambda a, b: a <= b * (1 + REL))
    assert better(value_of(few), value_of(more))


@pytest.mark.parametrize("strategy", ["hetis", "uniform"])
@pytest.mark.parametrize("limit", [{"max_gpus": 2}, {"min_layers": 3}, {"max_stages": 2}])
def test_limits_of_a_replica_hold_for_every_strategy(strategy: str, limit: dict[str, int]) -> None:
    groups = [make_node("a", "A", nodes=3), make_node("b", "B", nodes=4)]
    family = STRATEGIES[strategy].restrict(Family(max_pool=2, tp_sizes=(1, 2), micro_batches=(4,), chunk_tokens=(64,)))
    rules = EngineRules(name="vllm", **limit)
    problem = make_problem(groups, model=make_model(num_layers=8), family=run_by(family, rules))
    plan = solve_placement(problem, strategy=strategy)
    assert plan.replicas
    assert check_plan(plan, problem) == ()
    assert beyond(plan.replicas, rules, problem.cluster, problem.model) == ()
    nine = replace(problem, family=replace(problem.family, engine=replace(rules, min_layers=9)))
    assert any("must have at least 9" in violation.message for violation in check_plan(plan, nine))


def test_what_an_engine_lacks_is_said_once_and_in_words() -> None:
    plan, problem = a_plan()
    one = plan.replicas[0]
    copies = replace(one, stages=tuple(replace(stage, copies=2) for stage in one.stages))
    sizes = replace(one, stages=(replace(one.stages[0], tp=1), replace(one.stages[0], tp=2)), in_flight=5)
    small = EngineRules(name="vllm", max_stages=1)
    assert beyond([copies, copies], EngineRules(name="vllm-hetis"), problem.cluster, problem.model) == ("stage copies",)
    assert beyond([copies, sizes], EngineRules(name="vllm-hetis"), problem.cluster, problem.model)[:3] == (
        "stage copies",
        "several TP sizes in a replica",
        "more batches in flight than stages",
    )
    assert "replicas of over 1 stages" in beyond([sizes], small, problem.cluster, problem.model)


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_says_its_rules_and_where_they_come_from(name: str) -> None:
    family = run_by(Family(), EngineRules(name=name))
    assert name in family.describe()
    assert ENGINES[name].source
    assert ENGINES[name].version


def test_vllm_hands_no_kv_over_from_several_stages_if_a_layer_drafts() -> None:
    drafting = replace(make_model(), draft=DraftShape(tokens=1, acceptance=0.5))
    for name, most in (("vllm", 1), ("sglang", 3)):
        rules = EngineRules(name=name, max_stages=3)
        assert rules.stages_of(Role.PREFILL, drafting) == most
        assert rules.stages_of(Role.PREFILL, make_model()) == 3
    assert EngineRules(name="vllm", max_stages=3).stages_of(Role.UNIFIED, drafting) == 3


def test_what_no_engine_runs_is_refused() -> None:
    with pytest.raises(InvalidProblemError, match="not one of vllm-hetis, vllm, sglang"):
        run_by(Family(), EngineRules(name="none"))
    with pytest.raises(InvalidProblemError, match="no engine ran its plans: plan for vllm-hetis"):
        run_by(Family(), EngineRules(name="any"))
    with pytest.raises(InvalidProblemError, match="strategy hetis plans for an engine: give the family its rules"):
        solve_placement(make_problem([make_node("a", "A")], family=Family()))
    with pytest.raises(InvalidProblemError, match="one for each stage"):
        Family(engine=EngineRules(name="vllm"))
    with pytest.raises(InvalidProblemError, match="max_stages is 0"):
        EngineRules(name="vllm", max_stages=0)
    with pytest.raises(InvalidProblemError, match="min_layers is 0"):
        EngineRules(name="vllm", min_layers=0)
    with pytest.raises(InvalidProblemError, match="must be at most 64"):
        EngineRules(name="vllm", max_stages=2**31 - 1)  # no list of this length is built


def test_forbidden_cuts_are_refused_but_by_equal_stages() -> None:
    model = make_model(forbidden_cuts=frozenset({2}))
    problem = make_problem([make_node("a", "A", nodes=2)], model=model, family=PLAIN)
    with pytest.raises(InvalidProblemError, match="only strategy uniform"):
        solve_placement(problem, strategy="hetis")


def test_a_search_without_time_says_so() -> None:
    problem = make_problem([make_node("a", "A", nodes=2)], family=WITH_WORKERS)
    with pytest.raises(NoPlanFoundError):
        solve_placement(problem, strategy="hetis", budget=Budget(time_limit_s=0.0))


@pytest.mark.parametrize(("is_settled", "error"), [(False, NoPlanFoundError), (True, InfeasibleError)])
def test_whole_counts_that_found_nothing_prove_nothing_unless_they_came_to_their_end(
    monkeypatch: pytest.MonkeyPatch, is_settled: bool, error: type[Exception]
) -> None:
    """If HiGHS gave up on plans that meet the demand, "no plan exists" would be false: the relaxation has one."""
    fleet = [make_node("a", "BIG", gpus=2)]
    most = value_of(make_problem(fleet, family=PLAIN))
    objective = replace(NO_LIMITS, kind=ObjectiveKind.GPUS, demand_rps=most / 2)
    problem = make_problem(fleet, objective=objective, family=PLAIN)
    assert solve_placement(problem, strategy="hetis").replicas
    monkeypatch.setattr(Master, "solve_milp", lambda *_args, **_options: (None, is_settled))
    with pytest.raises(error):
        solve_placement(problem, strategy="hetis")
