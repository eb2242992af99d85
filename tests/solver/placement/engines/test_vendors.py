"""Plans over GPUs of several vendors and in several precisions: the best, with KV only where both sides read it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hetis.solver.check import check_plan
from hetis.solver.cluster import Link, Network
from hetis.solver.constraints import Duty, Exclude, RestrictRole, Selection, Unit
from hetis.solver.errors import InfeasibleError
from hetis.solver.model import GpuPrecision
from hetis.solver.placement.families import STRATEGIES
from hetis.solver.plan import Role
from hetis.solver.planning import solve_placement
from hetis.solver.problem import APART, PlacementProblem
from tests.solver.instances import (
    make_node,
    make_problem,
    make_profile,
)
from tests.solver.oracle import best_plan_value
from tests.solver.placement.engines.families import (
    EXAMPLES,
    PLAIN,
    REL,
    a_plan,
    a_problem,
    value_of,
)

OF_B = Selection(unit=Unit.TYPE, name="B")
TWO_ZONES = Network(default=Link(bytes_per_s=5e8, latency_s=1e-5), zone_default=Link(bytes_per_s=5e8, latency_s=1e-3))
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


def test_an_engines_workers_keep_no_8_bit_kv() -> None:
    _, problem = a_plan()
    wide = with_precisions(problem, precision("A", weight_bytes=1.0))
    narrow = with_precisions(problem, precision("A", weight_bytes=1.0, kv_bytes=1.0))
    plan = solve_placement(narrow, strategy="hetis", gap_target=0.0)
    pooled = {s.gpu for r in plan.replicas if r.attention_workers for s in r.stages}
    assert "A" not in pooled
    found = check_plan(solve_placement(wide, strategy="hetis", gap_target=0.0), narrow)
    assert any("has attention workers and KV of 1 bytes an element" in str(violation) for violation in found)
