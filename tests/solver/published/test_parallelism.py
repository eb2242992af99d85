"""Replicas of a group: the best split of layers by enumeration, every shape of the group, the published preferences."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis.solver.mixes import Regime
from hetis.solver.placement.replicas.tabulation import build_cost_tables
from hetis.solver.plan import Role
from hetis.solver.problem import PlacementProblem
from hetis.solver.published.replicas import Pipeline, ReplicaSearch, best_split, duty_of
from tests.solver.instances import NO_LIMITS, SMALL_FAMILY, make_node, make_problem, make_profile


@st.composite
def pipelines(draw: st.DrawFn) -> Pipeline:
    """One mix, one number in flight, up to 3 stages and 6 layers; half of them with shared cards."""
    stages = draw(st.integers(1, 3))
    seconds = st.floats(0.1, 5.0)
    shared = draw(st.booleans())
    layer_s = np.array([[draw(seconds) for _ in range(stages)]])
    return Pipeline(
        num_layers=draw(st.integers(stages, 6)),
        cut_floor=np.arange(7),
        layer_s=layer_s,
        fixed_s=np.array([[draw(seconds) for _ in range(stages)]]),
        room=np.array([[[draw(st.integers(0, 6)) for _ in range(stages)]]]),
        chunk_layer_s=layer_s * draw(st.floats(0.1, 0.5)),
        chunk_fixed_s=np.zeros((1, stages)),
        card_s=np.array([[draw(seconds) if shared else 0.0 for _ in range(stages)]]),
        card_share=np.zeros((1, 1, stages)),
        prefix_layers=0,
        in_flight=np.array([draw(st.sampled_from((1, 3, 8)))]),
        t_cap=np.array([[np.inf]]),
        trip_cap=np.array([[np.inf]]),
        iterations=np.array([10.0]),
        chunk_iterations=np.array([2.0]),
        without_chunk=np.array([[0.1]]),
        full=Regime(0.02, 0.28),
        tight=Regime(0.12, 0.8),
    )


def intervals(p: Pipeline) -> list[float]:
    """Return the seconds between completions of every split of the layers, by the document's formulas."""
    stages, m = p.layer_s.shape[1], int(p.in_flight[0])
    if 1 < m < stages:
        return []
    regime = Regime(0.0, 0.0) if m == 1 else p.full if m >= 2 * stages else p.tight
    # Of ten iterations two carry a chunk.
    plain = (p.layer_s[0] - 2 * p.chunk_layer_s[0]) / 8
    longest = p.chunk_layer_s[0] - (p.chunk_layer_s[0] - plain) * 0.1
    slack = np.maximum(regime.least, regime.unevenness * (longest / (p.layer_s[0] / 10) - 1))
    found = []
    for layers in itertools.product(*(range(1, int(room) + 1) for room in p.room[0, 0])):
        if sum(layers) == p.num_layers:
            seconds = (1 + slack) * (np.array(layers) * p.layer_s[0] + p.fixed_s[0])
            card = (1 + regime.least) * float(np.array(layers) @ p.card_s[0])
            found.append(max(seconds.max(), card, seconds.sum() / m))
    return found


@given(pipelines())
def test_a_split_is_found_wherever_there_is_one(p: Pipeline) -> None:
    split = best_split(p)
    assert np.isfinite(split.interval_s) == bool(intervals(p))
    if np.isfinite(split.interval_s):
        assert split.layers.sum() == p.num_layers
        assert split.interval_s == pytest.approx(min(intervals(p), key=lambda t: abs(t - split.interval_s)))


@given(pipelines())
def test_no_split_is_quicker_where_the_slowest_stage_or_the_sum_decides(p: Pipeline) -> None:
    p = p._replace(card_s=np.zeros_like(p.card_s))
    if p.in_flight[0] > 1:
        p = p._replace(in_flight=np.array([1000]))  # so full that the sum never decides
    found = intervals(p)
    if found:
        assert best_split(p).interval_s == pytest.approx(min(found))


def test_an_interval_or_a_round_trip_above_its_cap_is_refused() -> None:
    p = Pipeline(
        num_layers=2, cut_floor=np.arange(3), layer_s=np.ones((1, 1)), fixed_s=np.ones((1, 1)),
        chunk_layer_s=np.full((1, 1), 2.0), chunk_fixed_s=np.ones((1, 1)), trip_cap=np.array([[5.0]]),
        room=np.full((1, 1, 1), 9), card_s=np.zeros((1, 1)), card_share=np.zeros((1, 1, 1)), prefix_layers=0,
        in_flight=np.array([1]), t_cap=np.array([[3.0]]),
        iterations=np.ones(1), chunk_iterations=np.ones(1), without_chunk=np.zeros((1, 1)), full=Regime(0.0, 0.0),
        tight=Regime(0.0, 0.0),
    )  # fmt: skip
    assert best_split(p).interval_s == 3.0
    assert best_split(p._replace(t_cap=np.array([[2.9]]))).x == -1
    assert best_split(p._replace(trip_cap=np.array([[4.9]]))).x == -1


def test_shared_cards_may_be_full_before_the_stages_are() -> None:
    p = Pipeline(
        num_layers=4, cut_floor=np.arange(5), layer_s=np.ones((1, 2)), fixed_s=np.zeros((1, 2)),
        chunk_layer_s=np.zeros((1, 2)), chunk_fixed_s=np.zeros((1, 2)), trip_cap=np.array([[np.inf]]),
        room=np.full((1, 1, 2), 9), card_s=np.zeros((1, 2)), card_share=np.full((1, 1, 2), 0.25), prefix_layers=0,
        in_flight=np.array([4]), t_cap=np.array([[np.inf]]),
        iterations=np.ones(1), chunk_iterations=np.ones(1), without_chunk=np.zeros((1, 1)), full=Regime(0.0, 0.0),
        tight=Regime(0.0, 0.0),
    )  # fmt: skip
    assert best_split(p).layers.tolist() == [2, 2]
    assert best_split(p._replace(card_share=np.full((1, 1, 2), 0.26))).x == -1


def test_forbidden_cuts_are_not_made() -> None:
    """Five layers on two equal stages would be cut after 3, but the model only allows 2 and 4."""
    p = Pipeline(
        num_layers=5, cut_floor=np.array([0, 0, 2, 2, 4, 5]), layer_s=np.ones((1, 2)), fixed_s=np.zeros((1, 2)),
        chunk_layer_s=np.zeros((1, 2)), chunk_fixed_s=np.zeros((1, 2)), trip_cap=np.array([[np.inf]]),
        room=np.full((1, 1, 2), 9), card_s=np.zeros((1, 2)), card_share=np.zeros((1, 1, 2)), prefix_layers=0,
        in_flight=np.array([4]), t_cap=np.array([[np.inf]]),
        iterations=np.ones(1), chunk_iterations=np.ones(1), without_chunk=np.zeros((1, 1)), full=Regime(0.0, 0.0),
        tight=Regime(0.0, 0.0),
    )  # fmt: skip
    assert best_split(p).layers.tolist() == [2, 3]


def two_types() -> PlacementProblem:
    nodes = [make_node("a", "A", gpus=2), make_node("b", "B", gpus=3)]
    profiles = {"A": make_profile("A", flops=4e12), "B": make_profile("B", flops=1e12)}
    return make_problem(nodes, profiles=profiles, objective=NO_LIMITS, family=replace(SMALL_FAMILY))


def test_shapes_use_every_gpu_of_the_group() -> None:
    """Two A on one node, three B on another: TP 1 or 2 each, what is left of a node alone, both orders of the types."""
    search = ReplicaSearch(build_cost_tables(two_types()))
    shapes = [[search.costs.ranks[rank] for rank in shape] for shape in search.shapes(((0, (2,)), (1, (3,))))]
    of_a, of_b = [[(0, 1)] * 2, [(0, 2)]], [[(1, 1)] * 3, [(1, 2), (1, 1)]]
    expected = [a + b for a in of_a for b in of_b] + [b + a for b in of_b for a in of_a]
    assert sorted(shapes) == sorted(expected)


def test_prefill_takes_the_lowest_latency_and_decode_the_highest_rate() -> None:
    costs = build_cost_tables(two_types())
    search, group = ReplicaSearch(costs), ((0, (2,)),)
    prefill, decode = (duty_of(costs, role, "default") for role in (Role.PREFILL, Role.DECODE))
    quickest = min(search.shapes(group), key=lambda shape: search._latency_s(shape, prefill))
    found = search.best_replica(group, prefill)
    assert found is not None
    assert tuple(stage.rank for stage in found.stages) == quickest
    best = search.best_replica(group, decode)
    others = [search.at_best_setting(shape, decode) for shape in search.shapes(group)]
    assert best is not None
    assert best.rate == max(other.rate for other in others if other is not None)


def test_a_group_too_small_for_the_model_has_no_replica() -> None:
    tiny = replace(two_types(), profiles={gpu: make_profile(gpu, usable_bytes=3_000_000) for gpu in "AB"})
    costs = build_cost_tables(tiny)
    assert ReplicaSearch(costs).best_replica(((0, (1,)),), duty_of(costs, Role.DECODE, "default")) is None
