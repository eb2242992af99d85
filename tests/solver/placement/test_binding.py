"""The master's plans always bind to named GPUs, and no TP group leaves its node."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetis.solver.check import check_plan
from hetis.solver.cluster import GpuSlots
from hetis.solver.constraints import Exclude, Selection, Unit
from hetis.solver.errors import UnboundPlanError
from hetis.solver.placement.binding import bind
from hetis.solver.placement.replicas.kinds import Layout
from hetis.solver.placement.replicas.tabulation import build_cost_tables
from hetis.solver.placement.replicas.template import Template, TemplateStage, use_of
from hetis.solver.plan import Plan
from hetis.solver.planning import solve_placement
from tests.models import replace
from tests.solver.instances import SMALL_FAMILY, make_node, make_problem, make_profile

EXAMPLES = settings().max_examples


def assert_groups_stay_in_their_node(plan: Plan) -> None:
    for replica in plan.replicas:
        for stage in replica.stages:
            for start in range(0, len(stage.devices), stage.tp):
                nodes = {device.split("/")[0] for device in stage.devices[start : start + stage.tp]}
                assert len(nodes) == 1, f"TP group {stage.devices[start : start + stage.tp]}"
    devices = [device for replica in plan.replicas for device in replica.devices()]
    assert len(devices) == len(set(devices))


@pytest.mark.parametrize("gpus", [1, 2, 3, 5, 6, 7, 8])
@pytest.mark.parametrize("nodes", [1, 2, 3])
@pytest.mark.parametrize("tp_sizes", [(2,), (4,), (1, 2), (2, 4), (1, 2, 4)])
def test_nodes_of_any_size_hold_tp_groups(gpus: int, nodes: int, tp_sizes: tuple[int, ...]) -> None:
    if min(tp_sizes) > gpus:
        return
    family = replace(SMALL_FAMILY, tp_sizes=tp_sizes, micro_batches=(4,), max_pool=1)
    profiles = {"A": make_profile("A", usable_bytes=16_000_000)}
    problem = make_problem([make_node("a", "A", gpus=gpus, nodes=nodes)], family=family, profiles=profiles)
    plan = solve_placement(problem)
    assert check_plan(plan, problem) == ()
    assert_groups_stay_in_their_node(plan)


def test_gpus_have_the_indices_of_the_fleet_also_without_some_of_them() -> None:
    """Agents, launches and reports mean the GPU that the driver counts so; places in the list would be other GPUs."""
    slots = (GpuSlots(gpu="A", count=2), GpuSlots(gpu="C", count=1))
    node = replace(make_node("m", "A", nodes=2), gpus=slots, indices=(0, 2, 1))
    profiles = {"A": make_profile("A"), "C": make_profile("C", bytes_per_s=5e9, usable_bytes=12_000_000)}
    problem = make_problem([node], profiles=profiles)

    def types_in(plan: Plan) -> dict[str, str]:
        parts = [part for replica in plan.replicas for part in (*replica.stages, *replica.attention_workers)]
        return {device: part.gpu for part in parts for device in part.devices}

    types = {"m-0/0": "A", "m-0/1": "C", "m-0/2": "A", "m-1/0": "A", "m-1/1": "C", "m-1/2": "A"}
    assert {device.name: device.gpu for device in problem.cluster.devices()} == types
    whole = solve_placement(problem)
    assert check_plan(whole, problem) == ()
    assert types_in(whole).items() <= types.items()
    assert any(device.endswith("/2") for device in types_in(whole))
    out = replace(problem, constraints=(Exclude(gpus=Selection(unit=Unit.GPU, name="m-0/0")),))
    plan = solve_placement(out)
    assert check_plan(plan, out) == ()
    assert types_in(plan).items() <= types.items() - {("m-0/0", "A")}
    assert "m-0/2" in types_in(plan)


@pytest.mark.parametrize("order", ["ACA", "AAC", "CAA", "ACAC"])
def test_nodes_of_several_types_hand_out_the_right_cards(order: str) -> None:
    slots = tuple(GpuSlots(gpu=gpu, count=2) for gpu in order)
    node = replace(make_node("m", "A", nodes=2), gpus=slots)
    profiles = {"A": make_profile("A"), "C": make_profile("C", bytes_per_s=5e9, usable_bytes=12_000_000)}
    problem = make_problem([node, make_node("a", "A", gpus=2)], profiles=profiles)
    plan = solve_placement(problem)
    assert check_plan(plan, problem) == ()
    assert_groups_stay_in_their_node(plan)
    types = {f"m-{n}/{2 * i + j}": gpu for n in (0, 1) for i, gpu in enumerate(order) for j in (0, 1)}
    for replica in plan.replicas:
        for stage in (*replica.stages, *replica.attention_workers):
            assert all(types.get(device, "A") == stage.gpu for device in stage.devices)


Shape = tuple[int, int]  # (GPUs of a node, number of nodes)


@settings(max_examples=5 * EXAMPLES)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4)), min_size=1, max_size=2, unique_by=lambda shape: shape[0]),
    st.lists(st.sampled_from((1, 1, 2, 2, 4, 8)), min_size=1, max_size=40),
    st.integers(0, 2**16),
)
def test_whatever_the_packing_rows_admit_can_be_bound(shapes: list[Shape], sizes: list[int], seed: int) -> None:
    """TP groups of 1, 2, 4 and 8 drawn until the rows are full, several to a replica."""
    nodes = [make_node(f"n{i}", "A", gpus=gpus, nodes=count) for i, (gpus, count) in enumerate(shapes)]
    family = replace(SMALL_FAMILY, tp_sizes=(1, 2, 4, 8), micro_batches=(1,))
    problem = make_problem(nodes, family=family)
    costs = build_cost_tables(replace(problem, model=replace(problem.model, q_heads=8, head_dim=32)))
    drawn = random.Random(seed)
    left = costs.resources.limits.copy()
    templates = list[Template]()
    for tp in sizes:
        ranks = [s for s, (_, size) in enumerate(costs.ranks) if size == tp]
        if not ranks:
            continue
        stage = TemplateStage(rank=drawn.choice(ranks), layers=1)
        template = Template(0, 0, 0, (stage,), 1.0)
        if (use_of(costs, template) <= left).all():
            left -= use_of(costs, template)
            if templates and drawn.random() < 0.5:
                template = replace(template, stages=(*templates.pop().stages, stage))
            templates.append(template)
    bound = bind(costs, templates, seed=seed)
    assert bound == bind(costs, templates, seed=seed)
    devices = list[str]()
    for template, stages in zip(templates, bound, strict=True):
        for stage, place in zip(template.stages, stages, strict=True):
            assert len(place.devices) == costs.ranks[stage.rank][1]
            assert len({device.split("/")[0] for device in place.devices}) == 1
            devices += place.devices
    assert len(devices) == len(set(devices))
    assert set(devices) <= {device.name for device in problem.cluster.devices()}


def test_replica_that_fits_in_a_node_stays_in_it() -> None:
    problem = make_problem([make_node("a", "A", gpus=4, nodes=3)])
    costs = build_cost_tables(problem)
    one, two = (next(s for s, (_, tp) in enumerate(costs.ranks) if tp == size) for size in (1, 2))
    stages = (TemplateStage(rank=two, layers=2), TemplateStage(rank=one, layers=2), TemplateStage(rank=one, layers=2))
    bound = bind(costs, [Template(0, 0, 0, stages, 1.0)] * 3)
    for replica in bound:
        assert len({device.split("/")[0] for stage in replica for device in stage.devices}) == 1


def test_replicas_have_the_nodes_of_their_layouts_and_others_the_node_with_least_to_lose() -> None:
    costs = build_cost_tables(make_problem([make_node("a", "A", gpus=4, nodes=3)]))
    one, two = (next(s for s, (_, tp) in enumerate(costs.ranks) if tp == size) for size in (1, 2))
    pair, both = Template(0, 0, 0, (TemplateStage(rank=two, layers=6),), 1.0), TemplateStage(rank=one, layers=3)
    apart = Template(0, 0, 0, (both, both), 1.0)
    of_pair, halves = ((0, 1, ((0, 2),)),), ((0, 0, ((0, 1),)), (0, 2, ((0, 1),)))

    def nodes_of(layouts: list[Layout]) -> list[set[str]]:
        bound = bind(costs, [pair, pair, apart, pair], spreads=True, layouts=layouts)
        return [{device.split("/")[0] for stage in replica for device in stage.devices} for replica in bound]

    assert nodes_of([of_pair, of_pair, halves, ()]) == [{"a-1"}, {"a-1"}, {"a-0", "a-2"}, {"a-0"}]
    assert nodes_of([]) == [{"a-0"}, {"a-1"}, {"a-0"}, {"a-2"}]


def test_more_than_the_fleet_has_is_a_bug_and_says_so() -> None:
    costs = build_cost_tables(make_problem([make_node("a", "A", gpus=2)]))
    template = Template(0, 0, 0, (TemplateStage(rank=0, layers=6),), 1.0)
    with pytest.raises(UnboundPlanError, match=r"^no node has 1 free A for replica 2$"):
        bind(costs, [template] * 3)


@settings(max_examples=EXAMPLES)
@given(
    st.lists(st.lists(st.tuples(st.sampled_from("AC"), st.sampled_from((1, 2))), min_size=1, max_size=3), max_size=4),
    st.integers(1, 3),
)
def test_replicas_over_nodes_of_several_types_use_the_fewest_nodes(
    replicas: list[list[tuple[str, int]]], nodes: int
) -> None:
    """Every assignment of parts to nodes is tried beside the program."""
    slots = (GpuSlots(gpu="A", count=2), GpuSlots(gpu="C", count=2))
    profiles = {gpu: make_profile(gpu) for gpu in "AC"}
    problem = make_problem([replace(make_node("m", "A", nodes=nodes), gpus=slots)], profiles=profiles)
    costs = build_cost_tables(problem)
    index = {c.gpu: number for number, c in enumerate(costs.classes)}
    ranks = {rank: s for s, rank in enumerate(costs.ranks)}
    templates = [
        Template(0, 0, 0, tuple(TemplateStage(rank=ranks[index[gpu], tp], layers=1) for gpu, tp in stages), 1.0)
        for stages in replicas
    ]
    parts = [(r, gpu, tp) for r, stages in enumerate(replicas) for gpu, tp in stages]
    fewest = min(
        (
            len({(r, node) for (r, _, _), node in zip(parts, places, strict=True)})
            for places in itertools.product(range(nodes), repeat=len(parts))
            if all(
                sum(tp for (_, g, tp), place in zip(parts, places, strict=True) if (g, place) == (gpu, node)) <= 2
                for gpu in "AC"
                for node in range(nodes)
            )
        ),
        default=None,
    )
    if fewest is None:
        return
    bound = bind(costs, templates)
    used = {(r, device.split("/")[0]) for r, own in enumerate(bound) for stage in own for device in stage.devices}
    assert len(used) == fewest
