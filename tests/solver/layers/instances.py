"""Small random problems of layers, and every placement of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from hypothesis import strategies as st

from hetis.solver.layers.plan import LinkShare, PlacedNode
from hetis.solver.layers.problem import LayersProblem, Links, NodeType, TimeTable

SLOW = 30.0  # factor by which a type is slower that does more harm than good


@st.composite
def tables(draw: st.DrawFn, *, slower: float = 1.0) -> TimeTable:
    """Draw times that rise with the batch, convex or not."""
    sizes = sorted(draw(st.sets(st.integers(1, 60), min_size=1, max_size=4)))
    seconds = [draw(st.floats(1e-4, 5e-3))]
    for _ in sizes[1:]:
        seconds.append(seconds[-1] + draw(st.floats(1e-6, 5e-3)))
    return TimeTable(sizes=tuple(float(size) for size in sizes), seconds=tuple(slower * one for one in seconds))


@st.composite
def problems(draw: st.DrawFn, *, max_nodes: int = 3, max_layers: int = 4) -> LayersProblem:
    """Draw nodes with KV room over three decades, with and without batch times, one slow type or none, any links."""
    num_layers = draw(st.integers(1, max_layers))
    num_nodes = draw(st.integers(1, max_nodes))
    kinds: list[NodeType] = []
    slow = draw(st.integers(0, 3))  # index of the slow type, if there is one
    while num_nodes > 0:
        count = draw(st.integers(1, num_nodes))
        num_nodes -= count
        most = draw(st.integers(1, num_layers))
        room = 500 * 10 ** draw(st.floats(0, 3))
        slower = SLOW if slow == len(kinds) else 1.0
        timed = draw(st.booleans())
        kinds.append(
            NodeType(
                name="ABCDEF"[len(kinds)],
                count=count,
                tokens_per_s=tuple(draw(st.floats(1e3, 1e5)) / slower / k for k in range(1, most + 1)),
                kv_token_layers=tuple(room * (1 - 0.1 * k) for k in range(most)),
                prompt=draw(tables(slower=slower)) if timed else None,
                decode=draw(tables(slower=slower)) if timed else None,
            )
        )
    if sum(kind.count * min(len(kind.tokens_per_s), num_layers) for kind in kinds) < num_layers:
        whole = NodeType(name="W", count=1, tokens_per_s=(900.0,) * num_layers, kv_token_layers=(5e3,) * num_layers)
        kinds.append(whole)
    return LayersProblem(
        name="small",
        num_layers=num_layers,
        node_types=tuple(kinds),
        mean_prompt_tokens=draw(st.floats(1, 200)),
        mean_output_tokens=draw(st.floats(1, 100)),
        links=Links(
            bandwidth=draw(st.floats(1e6, 1e10)),
            latency_s=draw(st.floats(0, 0.01)),
            activation_bytes=draw(st.integers(0, 20_000)),
        ),
    )


def ranges(problem: LayersProblem) -> Iterator[tuple[PlacedNode, ...]]:
    """Yield every choice of ranges, without idle nodes."""
    choices = []
    for name, kind in problem.node_names():
        here: list[PlacedNode | None] = [None]
        for held in range(1, problem.most_layers(kind) + 1):
            for first in range(problem.num_layers - held + 1):
                here.append(PlacedNode(name=name, kind=kind.name, first_layer=first, num_layers=held))
        choices.append(here)
    for chosen in itertools.product(*choices):
        yield tuple(node for node in chosen if node is not None)


def paths(problem: LayersProblem, nodes: tuple[PlacedNode, ...]) -> list[tuple[PlacedNode, ...]]:
    """Yield every path from the first layer to the last; a node computes its layers beyond those of the one before."""
    done: list[tuple[PlacedNode, ...]] = []
    open_: list[tuple[PlacedNode, ...]] = [()]
    while open_:
        path = open_.pop()
        layer = path[-1].end_layer if path else 0
        if layer == problem.num_layers:
            done.append(path)
            continue
        open_ += [(*path, node) for node in nodes if node.first_layer <= layer < node.end_layer]
    return done


def links_of(routes: list[tuple[tuple[PlacedNode, ...], float]]) -> tuple[LinkShare, ...]:
    """Return the links of paths that carry these shares of all requests."""
    shares: dict[tuple[str | None, str | None], float] = {}
    for path, share in routes:
        names = [None, *(node.name for node in path), None]
        for pair in itertools.pairwise(names):
            shares[pair] = shares.get(pair, 0.0) + share
    return tuple(LinkShare(source=a, target=b, share=share) for (a, b), share in shares.items() if share > 0)


def splits(parts: int, steps: int) -> Iterator[tuple[float, ...]]:
    """Yield every way to distribute ``steps`` equal pieces of one over ``parts``."""
    for bars in itertools.combinations(range(steps + parts - 1), parts - 1):
        cuts = (-1, *bars, steps + parts - 1)
        yield tuple((b - a - 1) / steps for a, b in itertools.pairwise(cuts))
