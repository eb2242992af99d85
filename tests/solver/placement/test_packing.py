"""Replicas on as few nodes as possible: compared with all assignments, and properties of every packing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetis.solver.placement.nodes import Packing, pack

EXAMPLES = settings().max_examples
Replicas = list[list[int]]


def packed(replicas: Replicas, node_size: int, num_nodes: int) -> Packing | None:
    return pack(replicas, node_size=node_size, num_nodes=num_nodes, time_limit_s=60.0, seed=0)


def every_way(replicas: Replicas, node_size: int, num_nodes: int) -> Iterator[list[set[int]]]:
    """Yield the nodes of every replica, for every way to put each part into some node."""
    parts = [(replica, size) for replica, sizes in enumerate(replicas) for size in sizes]
    free, homes = [node_size] * num_nodes, [Counter[int]() for _ in replicas]

    def put(position: int) -> Iterator[list[set[int]]]:
        if position == len(parts):
            yield [set(+home) for home in homes]
            return
        replica, size = parts[position]
        for node in range(num_nodes):
            if free[node] >= size:
                free[node] -= size
                homes[replica][node] += 1
                yield from put(position + 1)
                free[node] += size
                homes[replica][node] -= 1

    return put(0)


@settings(max_examples=2 * EXAMPLES)
@given(
    st.lists(st.lists(st.sampled_from((1, 1, 2)), min_size=1, max_size=3), min_size=1, max_size=3),
    st.integers(2, 4),
    st.integers(1, 3),
)
def test_no_packing_is_on_fewer_nodes(replicas: Replicas, node_size: int, num_nodes: int) -> None:
    least = min((sum(map(len, way)) for way in every_way(replicas, node_size, num_nodes)), default=None)
    found = packed(replicas, node_size, num_nodes)
    if least is None:
        assert found is None
    else:
        assert found is not None
        assert found.num_pieces == found.least == least


@settings(max_examples=3 * EXAMPLES)
@given(
    st.lists(
        st.tuples(st.sampled_from((1, 2, 4, 8)), st.integers(1, 12), st.integers(1, 9)).map(
            lambda drawn: [[drawn[0]] * drawn[1]] * drawn[2]
        ),
        min_size=1,
        max_size=4,
    ),
    st.integers(4, 9),
)
def test_every_part_has_room_and_the_bound_holds(kinds: list[Replicas], node_size: int) -> None:
    replicas = [replica for kind in kinds for replica in kind if max(replica) <= node_size]
    num_nodes = sum(-(-len(replica) // (node_size // replica[0])) for replica in replicas) or 1
    found = packed(replicas, node_size, num_nodes)
    assert found is not None  # one node per piece is enough
    used = Counter[int]()
    for replica, nodes in zip(replicas, found.nodes, strict=True):
        assert len(nodes) == len(replica)
        for size, node in zip(replica, nodes, strict=True):
            assert 0 <= node < num_nodes
            used[node] += size
    assert max(used.values(), default=0) <= node_size
    assert found.least <= found.num_pieces == sum(len(set(nodes)) for nodes in found.nodes)


def test_a_full_fleet_is_packed_where_first_fit_cuts_replicas() -> None:
    """Six nodes of 8: replicas of 5 and 3 fill them in pairs; placing the largest first would put two of 3 together."""
    replicas = [[1] * 5] * 6 + [[1] * 3] * 6
    found = packed(replicas, 8, 6)
    assert found is not None
    assert (found.num_pieces, found.least) == (12, 12)


def test_what_cannot_lie_in_one_node_is_cut_as_little_as_can_be() -> None:
    """Four replicas of 6 fill three nodes of 8: two that are cut once, or one that is cut twice."""
    found = packed([[2, 2, 2]] * 4, 8, 3)
    assert found is not None
    assert (found.num_pieces, found.least) == (6, 6)


def test_a_replica_of_many_nodes_fills_them() -> None:
    found = packed([[4] * 5], 8, 3)
    assert found is not None
    assert sorted(Counter(found.nodes[0]).values()) == [1, 2, 2]


@pytest.mark.parametrize("num_nodes", [1, 2])
def test_what_does_not_fit_is_not_packed(num_nodes: int) -> None:
    assert packed([[4, 4], [4, 4], [4]], 8, num_nodes) is None


def test_a_fleet_of_thousands_of_nodes_is_a_small_program() -> None:
    found = packed([[1] * 6] * 3000 + [[2]] * 2000 + [[1] * 3] * 1000, 8, 3500)
    assert found is not None
    assert found.num_pieces == found.least == 6000
