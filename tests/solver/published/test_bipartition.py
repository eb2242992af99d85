"""Prefill and decode sides: a large cut, close to the largest."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given

from hetis.solver.placement.replicas.tables import FloatArray
from hetis.solver.published.hexgen2 import coarsened, maximum_cut
from tests.solver.published.graphs import bipartitions, cliques, cut_between, graphs


@given(graphs(least=2))
def test_the_cut_has_half_of_the_weight_and_nine_tenths_of_the_best(weights: FloatArray) -> None:
    """Any cut that no single exchange or change of sides improves has at least half of all edges' weight."""
    first, second = maximum_cut(weights)
    assert sorted((*first, *second)) == list(range(len(weights)))
    assert first
    assert second
    cut = cut_between(weights, first, second)
    best = max(cut_between(weights, *pair) for pair in bipartitions(len(weights)))
    assert cut >= 0.5 * weights.sum() / 2 - 1e-9
    assert cut >= 0.9 * best - 1e-9


@given(graphs(least=3))
def test_no_exchange_of_two_groups_raises_the_cut(weights: FloatArray) -> None:
    first, second = maximum_cut(weights)
    cut = cut_between(weights, first, second)
    for u, v in itertools.product(first, second):
        a, b = tuple({*first, v} - {u}), tuple({*second, u} - {v})
        assert cut_between(weights, a, b) <= cut + 1e-9


def test_two_groups_are_on_two_sides() -> None:
    assert maximum_cut(np.array([[0.0, 3.0], [3.0, 0.0]])) == ((0,), (1,))


def test_fast_links_lead_from_one_side_to_the_other() -> None:
    """Groups 0 and 2 have a fast link, 1 and 3 as well: no side holds both ends of one."""
    weights = np.ones((4, 4))
    weights[0, 2] = weights[2, 0] = weights[1, 3] = weights[3, 1] = 50.0
    np.fill_diagonal(weights, 0.0)
    first, second = maximum_cut(weights)
    assert (0 in first) != (2 in first)
    assert (1 in first) != (3 in first)
    assert len(first) == len(second)


def test_a_coarse_edge_adds_up_the_links_between_two_groups() -> None:
    coarse = coarsened(cliques(2, 2, 1), [(0, 1), (2, 3), (4,)])
    assert coarse == pytest.approx(np.array([[0, 4, 2], [4, 0, 2], [2, 2, 0]]))
