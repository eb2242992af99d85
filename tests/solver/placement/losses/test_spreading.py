"""Exchanges between nodes leave more after the worst loss, and every replica as many GPUs in as many nodes."""

from __future__ import annotations

import random
from collections import Counter, defaultdict

from hypothesis import given
from hypothesis import strategies as st

from hetis.solver.placement.losses.spreading import ClassNode, Piece, Rates, spread_out
from hetis.solver.plan import Role

GPUS = 8


def node_of(pieces: dict[int, int]) -> ClassNode:
    return ClassNode(GPUS - sum(pieces.values()), {r: Piece(size, (r,) * size) for r, size in pieces.items()})


def left_of(nodes: list[ClassNode], rates: list[float], roles: list[Role]) -> list[float]:
    """Return what is left without each node, in increasing order."""
    found = []
    for node in nodes:
        left = defaultdict[Role, float](float)
        for replica, role in enumerate(roles):
            left[role] += rates[replica] * (replica not in node.pieces)
        found.append(left[Role.UNIFIED] + min(left[Role.PREFILL], left[Role.DECODE]))
    return sorted(found)


def test_a_node_with_a_part_of_every_prefill_replica_exchanges_half_of_them_for_a_decode_replica() -> None:
    nodes = [node_of({0: 4, 1: 4}), node_of({2: 4, 3: 4}), node_of(dict.fromkeys(range(4, 12), 1))]
    rates, roles = [8.0] * 4 + [4.0] * 8, [Role.DECODE] * 4 + [Role.PREFILL] * 8
    assert left_of(nodes, rates, roles) == [0.0, 16.0, 16.0]
    after = spread_out(nodes, Rates(rates, roles))
    assert left_of(after, rates, roles) == [16.0, 16.0, 16.0]
    assert sorted(sorted(node.pieces) for node in after)[1:] == [[1, 4, 5, 6, 7], [2, 3]]


def test_nodes_that_lose_little_stay_as_they_are() -> None:
    nodes = [node_of({0: 8}), node_of({1: 8}), node_of({})]
    assert spread_out(nodes, Rates([1.0, 1.0], [Role.UNIFIED] * 2)) == nodes


@given(st.integers(0, 10_000))
def test_losses_never_take_more_and_replicas_keep_their_pieces(seed: int) -> None:
    drawn = random.Random(seed)
    num = drawn.randint(1, 12)
    rates, roles = [drawn.choice((1.0, 2.5, 4.0)) for _ in range(num)], drawn.choices(list(Role), k=num)
    nodes = [node_of({}) for _ in range(drawn.randint(1, 5))]
    for replica in range(num):
        for _ in range(drawn.randint(1, 2)):
            node, size = drawn.choice(nodes), drawn.choice((1, 2, 4))
            if replica not in node.pieces and size <= node.free:
                node.free -= size
                node.pieces[replica] = Piece(size, (replica,) * size)

    def pieces(of: list[ClassNode]) -> Counter[tuple[int, Piece]]:
        return Counter(pair for node in of for pair in node.pieces.items())

    after = spread_out(nodes, Rates(rates, roles))
    assert left_of(after, rates, roles) >= left_of(nodes, rates, roles)
    assert pieces(after) == pieces(nodes)
    assert all(node.free == GPUS - sum(piece.size for piece in node.pieces.values()) >= 0 for node in after)
    assert left_of(spread_out(after, Rates(rates, roles)), rates, roles) == left_of(after, rates, roles)
