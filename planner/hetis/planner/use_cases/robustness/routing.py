"""The traffic that fits between prefill and decode replicas of a fixed plan whose rates are not as planned."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Mapping

Node = tuple[str, ...]
SOURCE: Node = ("source",)
SINK: Node = ("sink",)


def most_routed(
    prefill: Mapping[tuple[str, tuple[str, ...]], float],
    decode: Mapping[str, float],
    links: Mapping[tuple[str, str], float],
) -> float:
    """Return the highest rate in requests/s, as a maximum flow (Edmonds and Karp).

    KV may take other routes than planned.

    Args:
        prefill: rate of the prefill replicas by their zone and the zones they may send to.
        decode: rate of the decode replicas by their zone.
        links: requests/s whose KV a link carries, by its zones from and to; links within a zone are not looked up.
    """
    room: defaultdict[Node, dict[Node, float]] = defaultdict(dict)  # residual capacity of edges, in both directions

    def edge(start: Node, end: Node, rate: float) -> None:
        room[start][end] = room[start].get(end, 0.0) + rate
        room[end].setdefault(start, 0.0)

    for (zone, allowed), rate in prefill.items():
        sender = ("prefill", zone, *allowed)
        edge(SOURCE, sender, rate)
        for there in allowed:
            if there in decode:  # senders of several kinds in a zone share its link, so each pair of zones has a node
                link = ("link", zone, there)
                edge(sender, link, math.inf)
                room[link][("decode", there)] = math.inf if there == zone else links.get((zone, there), 0.0)
                room[("decode", there)].setdefault(link, 0.0)
    for zone, rate in decode.items():
        edge(("decode", zone), SINK, rate)
    total = 0.0
    while (path := _shortest(room)) is not None:
        amount = min(room[start][end] for start, end in path)
        for start, end in path:
            room[start][end] -= amount
            room[end][start] += amount
        total += amount
    return total


def _shortest(room: Mapping[Node, Mapping[Node, float]]) -> list[tuple[Node, Node]] | None:
    """Return the edges of a shortest path with capacity from the source to the sink, or None."""
    came_from: dict[Node, Node] = {SOURCE: SOURCE}
    queue = deque([SOURCE])
    while queue:
        here = queue.popleft()
        for there, left in room.get(here, {}).items():
            if left > 0 and there not in came_from:
                came_from[there] = here
                queue.append(there)
    if SINK not in came_from:
        return None
    path, end = list[tuple[Node, Node]](), SINK
    while end != SOURCE:
        path.append((came_from[end], end))
        end = came_from[end]
    return path[::-1]
