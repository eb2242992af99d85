"""Serving groups: every GPU in one, fast links inside, memory shared out, and no single exchange improves on them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis.solver.placement.replicas.tables import FloatArray
from hetis.solver.published.hexgen2 import coarsened, refine, spectral_partition
from hetis.solver.published.replicas import Part
from tests.solver.published.graphs import bipartitions, cliques, cut_between, graphs


def cut_weight(weights: FloatArray, parts: list[Part]) -> float:
    """Return the total weight of the edges between different parts."""
    return float(coarsened(weights, parts).sum()) / 2


def exchanges(parts: list[Part]) -> list[list[Part]]:
    """Yield the partitions that differ in one pair of vertices."""
    found = []
    for i, j in itertools.combinations(range(len(parts)), 2):
        for u, v in itertools.product(parts[i], parts[j]):
            changed = list(parts)
            changed[i] = tuple(sorted({*parts[i], v} - {u}))
            changed[j] = tuple(sorted({*parts[j], u} - {v}))
            found.append(changed)
    return found


@given(graphs(), st.integers(1, 8), st.data())
def test_every_vertex_is_in_one_part(weights: FloatArray, parts: int, data: st.DataObject) -> None:
    sizes = np.array(data.draw(st.lists(st.integers(1, 9), min_size=len(weights), max_size=len(weights))), dtype=float)
    found = spectral_partition(weights, sizes, min(parts, len(weights)))
    assert len(found) == min(parts, len(weights))
    assert all(found)
    assert sorted(v for part in found for v in part) == list(range(len(weights)))


@pytest.mark.parametrize("sizes", [(4, 4), (2, 2, 2, 2), (3, 3), (1, 1, 1)])
def test_nodes_stay_whole_where_links_between_them_are_slow(sizes: tuple[int, ...]) -> None:
    weights = cliques(*sizes)
    starts = np.cumsum([0, *sizes])
    nodes = [tuple(range(a, b)) for a, b in itertools.pairwise(starts.tolist())]
    found = refine(weights, np.ones(len(weights)), spectral_partition(weights, np.ones(len(weights)), len(sizes)), 1.0)
    assert found == nodes


def test_memory_is_shared_out() -> None:
    """Four cards of 80 GB and eight of 20 GB on one switch: both halves get as much memory."""
    sizes = np.array([80.0] * 4 + [20.0] * 8)
    weights = cliques(*[1] * 12)
    first, second = spectral_partition(weights, sizes, 2)
    assert sizes[list(first)].sum() == sizes[list(second)].sum() == 240.0


@given(graphs(least=4))
def test_no_single_exchange_lowers_the_cut_after_refinement(weights: FloatArray) -> None:
    """Kernighan-Lin guarantees this: a pass starts with the best exchange and keeps it if nothing better follows."""
    sizes = np.ones(len(weights))
    start = spectral_partition(weights, sizes, 2)
    found = refine(weights, sizes, start, 1.0)
    cut = cut_weight(weights, found)
    assert cut <= cut_weight(weights, start)
    assert cut <= min(cut_weight(weights, other) for other in exchanges(found)) + 1e-9


@given(graphs(least=4))
def test_refinement_keeps_the_sizes_of_parts(weights: FloatArray) -> None:
    start = [tuple(range(2)), tuple(range(2, len(weights)))]
    assert [len(part) for part in refine(weights, np.ones(len(weights)), start, 1.0)] in (
        [len(part) for part in start],
        [len(part) for part in reversed(start)],
    )


@given(st.integers(2, 4), st.permutations(range(8)), st.data())
def test_two_halves_with_fast_links_inside_are_found(half: int, order: list[int], data: st.DataObject) -> None:
    """Links inside carry 10 to 20, between the halves at most 2: brute force would cut there, too."""
    size = 2 * half
    weights = np.zeros((size, size))
    for i, j in itertools.combinations(range(size), 2):
        inside = (i < half) == (j < half)
        weights[i, j] = weights[j, i] = data.draw(st.integers(10, 20) if inside else st.integers(0, 2))
    order = [v for v in order if v < size]
    shuffled = weights[np.ix_(order, order)]
    found = refine(shuffled, np.ones(size), spectral_partition(shuffled, np.ones(size), 2), 1.0)
    even = [pair for pair in bipartitions(size) if len(pair[0]) == half]
    assert cut_weight(shuffled, found) == min(cut_between(shuffled, *pair) for pair in even)


def test_an_exchange_that_leaves_too_little_memory_is_not_made() -> None:
    """Companions are 0 and 2, 1 and 3; an exchange would leave the first part 15 of the 20 that a replica needs."""
    weights = cliques(2, 2)[np.ix_([0, 2, 1, 3], [0, 2, 1, 3])]
    start: list[Part] = [(0, 1), (2, 3)]
    sizes = np.array([10.0, 10.0, 5.0, 5.0])
    assert refine(weights, sizes, start, 10.0) == [(0, 2), (1, 3)]
    assert refine(weights, sizes, start, 20.0) == start


@given(graphs(), st.permutations(range(8)))
def test_the_cut_counts_every_edge_between_parts_once(weights: FloatArray, order: list[int]) -> None:
    order = [v for v in order if v < len(weights)]
    parts = [tuple(sorted(order[:1])), tuple(sorted(order[1:]))]
    expected = sum(weights[i, j] for i, j in itertools.product(*parts))
    assert cut_weight(weights, parts) == pytest.approx(expected)
