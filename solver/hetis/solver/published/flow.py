"""Step B of HexGen-2: a maximum flow of requests from the coordinator through prefill and decode replicas and back.

There is one commodity, in requests/s. Every replica is an arc with its rate as capacity. KV goes from prefill to decode
replicas of the same zone, and over a link between zones if the prefill replica may send there. KV arcs inside a zone
need no capacity of their own, because a replica's rate includes what it can send or receive (`docs/cost-model.md`, the
wire of a layer).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

STEPS = 1 << 40  # OR-Tools counts whole units, of which the largest rate has this many


@dataclass(frozen=True, slots=True, kw_only=True)
class Station:
    """A replica of one role: its rate, its zone, and for prefill whether KV may leave the zone."""

    rate: float
    zone: str
    is_wide: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """A maximum flow in requests/s: its value, and the flow of every station and every pair that exchanges KV."""

    value: float
    prefill: tuple[float, ...]
    decode: tuple[float, ...]
    routes: Mapping[tuple[int, int], float]  # (prefill, decode)


def maximum_flow(
    prefill: Sequence[Station], decode: Sequence[Station], link_rates: Mapping[tuple[str, str], float]
) -> Flow:
    """Return the largest flow through one prefill and one decode station each, by preflow-push (OR-Tools).

    Args:
        link_rates: requests/s whose KV the link from one zone to another carries; pairs that are not listed carry none.

    Rates are rounded down to whole units, so no station and no link is overdrawn.
    """
    from ortools.graph.python import max_flow

    largest = max((s.rate for s in (*prefill, *decode)), default=0.0)
    if largest <= 0.0:
        return Flow(value=0.0, prefill=(0.0,) * len(prefill), decode=(0.0,) * len(decode), routes={})
    unit = largest / STEPS
    solver = max_flow.SimpleMaxFlow()
    source, sink = 0, 1
    p_node = range(2, 2 + len(prefill))
    d_node = range(2 + len(prefill), 2 + len(prefill) + len(decode))
    next_node = d_node.stop
    enters = [solver.add_arc_with_capacity(source, p_node[i], int(s.rate / unit)) for i, s in enumerate(prefill)]
    leaves = [solver.add_arc_with_capacity(d_node[j], sink, int(s.rate / unit)) for j, s in enumerate(decode)]
    direct = {
        (i, j): solver.add_arc_with_capacity(p_node[i], d_node[j], 2 * STEPS)
        for i, p in enumerate(prefill)
        for j, d in enumerate(decode)
        if p.zone == d.zone
    }
    over: list[tuple[dict[int, int], dict[int, int]]] = []  # per link: arcs into it by prefill, out of it by decode
    for (here, there), rate in link_rates.items():
        senders = [i for i, s in enumerate(prefill) if s.zone == here and s.is_wide]
        receivers = [j for j, s in enumerate(decode) if s.zone == there]
        if here == there or not senders or not receivers:
            continue
        head, tail = next_node, next_node + 1
        next_node += 2
        solver.add_arc_with_capacity(head, tail, min(int(rate / unit), 2 * STEPS))
        into = {i: solver.add_arc_with_capacity(p_node[i], head, 2 * STEPS) for i in senders}
        out = {j: solver.add_arc_with_capacity(tail, d_node[j], 2 * STEPS) for j in receivers}
        over.append((into, out))
    status = solver.solve(source, sink)
    assert status == solver.OPTIMAL, f"maximum flow ended with {status}"
    routes = {pair: int(solver.flow(arc)) for pair, arc in direct.items()}
    for into, out in over:
        for pair, units in _paired(
            {i: int(solver.flow(arc)) for i, arc in into.items()}, {j: int(solver.flow(arc)) for j, arc in out.items()}
        ).items():
            routes[pair] = routes.get(pair, 0) + units
    return Flow(
        value=solver.optimal_flow() * unit,
        prefill=tuple(solver.flow(arc) * unit for arc in enters),
        decode=tuple(solver.flow(arc) * unit for arc in leaves),
        routes={pair: units * unit for pair, units in sorted(routes.items()) if units > 0},
    )


def _paired(sent: Mapping[int, int], received: Mapping[int, int]) -> dict[tuple[int, int], int]:
    """Return what each sender of a link sends to each of its receivers, first come, first served."""
    pairs: dict[tuple[int, int], int] = {}
    waiting = [[j, units] for j, units in received.items() if units > 0]
    for i, left in sent.items():
        while left > 0:
            j, open_units = waiting[0]
            units = min(left, open_units)
            pairs[i, j] = units
            left -= units
            waiting[0][1] -= units
            if waiting[0][1] == 0:
                waiting.pop(0)
    return pairs
