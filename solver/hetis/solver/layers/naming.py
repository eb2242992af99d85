"""Conversion of arrays to named nodes, and of shares at every layer to flows on links."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from hetis.solver.layers.annealing import LayerPlacement, weights
from hetis.solver.layers.plan import LinkShare, PlacedNode
from hetis.solver.layers.problem import LayersProblem
from hetis.solver.layers.sweep import SweepRoom, share_requests
from hetis.solver.layers.tables import IntArray, LayerTables

MOST_MIXED = 4096  # links at one layer; with more of them, nodes are joined by the fewest
_NOTHING = 1e-12  # shares of all requests below this are rounding

Placed = tuple[tuple[PlacedNode, ...], tuple[LinkShare, ...], tuple[str, ...]]


def named(
    problem: LayersProblem,
    placement: LayerPlacement,
    kind: IntArray,
    sweep: SweepRoom,
    tables: LayerTables,
    *,
    flow_only: bool = False,
) -> Placed:
    """Return nodes by first layer, links, and names of idle nodes, which are those that no request enters."""
    weight = np.ones(len(kind))
    weights(placement, kind, tables, flow_only, weight)
    assert share_requests(placement.first, placement.held, weight, sweep), "every layer is on some node"
    names = dict(enumerate(problem.node_names()))
    used = [i for i in names if sweep.entries[i] > 0]
    used.sort(key=lambda i: (placement.first[i], placement.held[i], i))
    nodes = {
        i: PlacedNode(
            name=names[i][0],
            kind=names[i][1].name,
            first_layer=int(placement.first[i]),
            num_layers=int(placement.held[i]),
        )
        for i in used
    }
    links = tuple(_links(problem.num_layers, nodes, sweep))
    idle = tuple(name for i, (name, _) in names.items() if i not in nodes)
    return tuple(nodes.values()), links, idle


def _links(num_layers: int, nodes: dict[int, PlacedNode], sweep: SweepRoom) -> Iterator[LinkShare]:
    """Yield the links at every layer where requests leave nodes and enter others."""
    visits = {i: float(sweep.share[i, : sweep.entries[i]].sum()) for i in nodes}
    for layer in range(num_layers + 1):
        leaving: list[tuple[str | None, float]] = [(None, 1.0)]
        if layer > 0:
            leaving = [(nodes[i].name, visits[i]) for i in nodes if nodes[i].end_layer == layer]
        if layer == num_layers:
            yield from (LinkShare(source=name, target=None, share=share) for name, share in leaving)
            return
        entering = [
            (nodes[i].name, float(sweep.share[i, e]))
            for i in nodes
            for e in range(sweep.entries[i])
            if sweep.entry[i, e] == layer
        ]
        join = _mixed if len(leaving) * len(entering) <= MOST_MIXED else _fewest
        yield from join(leaving, entering)


def _mixed(sources: Sequence[tuple[str | None, float]], targets: Sequence[tuple[str, float]]) -> Iterator[LinkShare]:
    """Yield a link from every source to every target, in proportion to what enters the targets.

    All sources together use the room of all targets: with fewer links, a target that is full by chance holds up those
    who may only go there, beside others with room.
    """
    total = sum(share for _, share in targets)
    for source, there in sources:
        for target, share in targets:
            if there * share / max(total, _NOTHING) > _NOTHING:
                yield LinkShare(source=source, target=target, share=there * share / total)


def _fewest(sources: Sequence[tuple[str | None, float]], targets: Sequence[tuple[str, float]]) -> Iterator[LinkShare]:
    """Yield the fewest links: what leaves the sources is assigned, in order, to the targets."""
    leaving = list(sources)
    for target, share in targets:
        left = share
        while left > _NOTHING and leaving:
            source, there = leaving[0]
            moved = min(left, there)
            yield LinkShare(source=source, target=target, share=moved)
            left -= moved
            leaving[0] = (source, there - moved)
            if there - moved <= _NOTHING:
                leaving.pop(0)
