"""Conversion of arrays to named nodes, and of shares at every layer to flows on links."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hetis.solver.layers.annealing import LayerPlacement, weights
from hetis.solver.layers.plan import LinkShare, PlacedNode
from hetis.solver.layers.problem import LayersProblem
from hetis.solver.layers.sweep import SweepRoom, share_requests
from hetis.solver.layers.tables import IntArray, LayerTables

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
    """Yield the fewest links: requests that leave at a layer are assigned, in order, to the nodes they enter there."""
    visits = {i: float(sweep.share[i, : sweep.entries[i]].sum()) for i in nodes}
    for layer in range(num_layers + 1):
        leaving = [(i, visits[i]) for i in nodes if nodes[i].end_layer == layer] if layer else [(-1, 1.0)]
        if layer == num_layers:
            yield from (LinkShare(source=nodes[i].name, target=None, share=share) for i, share in leaving)
            return
        for i in nodes:
            for e in range(sweep.entries[i]):
                left = float(sweep.share[i, e]) if sweep.entry[i, e] == layer else 0.0
                while left > _NOTHING and leaving:
                    source, there = leaving[0]
                    moved = min(left, there)
                    name = None if source < 0 else nodes[source].name
                    yield LinkShare(source=name, target=nodes[i].name, share=moved)
                    left -= moved
                    leaving[0] = (source, there - moved)
                    if there - moved <= _NOTHING:
                        leaving.pop(0)
