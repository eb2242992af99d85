"""An upper bound on the rate of any placement: nodes priced separately, over all numbers of requests in flight.

**Relaxation.** Take N requests in flight and ignore where layers are. Node i holds k_i layers and computes a share u_i
of the requests' work on them, the mean of its z_il, and all nodes together compute every layer: sum_i k_i u_i = L. Let
d^ be the greatest convex function below d. By Jensen, and because at least u_i of the requests visit a node,

    R >= sum_i [ k_i u_i ( d_i(1) / 2 + d^_i(N u_i / 2) + (1 + N u_i / 2) p_i / O )
                 + u_i ( h + w P / O ) + u_i^2 (N / 2) w (1 + P / O) ]

and u_i is at most 1, M_i / (H N k_i) by its KV room, and, in a placement that serves X or more, 1 / (X w (P + O)),
(T_i / (P + O)) / X and 1 / (X k_i O (c_i + p_i / O)), where c_i = min_b d_i(b) / b. Chains, meshes and partial overlaps
all satisfy this.

**Price.** For a price pi of a layer, R >= pi L + sum_i min(0, min over k, u of [cost - pi k u]). This has a closed form
for every node type and is maximised over pi by bisection. Any pi gives a valid bound.

**All N.** R never falls as N grows, so placements with N1 <= N <= N2 serve at most N2 / (O R(N1)). The interval that
allows most is halved until halving no longer helps.
"""

from __future__ import annotations

import heapq
import itertools
import math
from typing import NamedTuple

import numpy as np

from hetis.solver.layers.annealing import FloatArray, LayerTables
from hetis.solver.layers.plan import PricedInterval, RateBound

_PRECISION = 5e-4  # ratio of an interval's width to its end at which halving stops
_INTERVALS = 600  # most intervals; if in-flight requests neither help nor harm, most are needed and the bound is looser
_MARGIN = 1e-5  # ratio above the rate served; no placement beyond it may just reach a capacity
_DEAREST = 1e4  # limit on a layer's price, as a ratio to the most that it costs itself; higher prices lose digits
_ROUNDS = 60  # rounds of bisection


def rate_bound(tables: LayerTables, *, served: float) -> RateBound:
    """Return requests per second that no placement exceeds, at least ``served``, which one is known to serve.

    Capacities are counted for placements that serve more than ``served``.
    """
    beyond = served * (1 + _MARGIN)
    nodes = _nodes_of(tables, beyond)
    intervals = [(-np.inf, PricedInterval(least=0.0, most=nodes.most_in_flight(), price_s=0.0))]
    while True:
        allowed, widest = intervals[0]
        low, high = widest.least, widest.most
        if -allowed <= beyond or high - low <= _PRECISION * high or len(intervals) >= _INTERVALS:
            priced = sorted((interval for _, interval in intervals), key=lambda one: one.least)
            return RateBound(rate_rps=max(beyond, -allowed), beyond_rps=beyond, intervals=tuple(priced))
        heapq.heappop(intervals)
        # Geometric while the interval is wide; the first one begins at 0.
        middle = 0.5 * (low + high) if high < 4 * low else max(math.sqrt(low * high), 1e-3 * high)
        for begin, end in ((low, middle), (middle, high)):
            price_s, round_trip_s = nodes.shortest_round_trip(begin)
            rate = end / (tables.output_tokens * round_trip_s)
            heapq.heappush(intervals, (-rate, PricedInterval(least=begin, most=end, price_s=price_s)))


class _Nodes(NamedTuple):
    """Node types, layers held and pieces of their time tables, flattened to arrays of shape [E] with one entry each."""

    num_layers: int
    counts: FloatArray  # [T]
    kind: FloatArray  # [E] as integers
    held: FloatArray
    kv: FloatArray
    cap: FloatArray  # limit on the share, regardless of the number in flight
    flat: FloatArray  # seconds per request and layer of any batch, including the piece's constant
    slope: FloatArray  # seconds per sequence of a batch
    begin: FloatArray  # sequences at which the piece begins and ends
    end: FloatArray
    hop: FloatArray  # seconds per visit
    hop_slope: FloatArray  # seconds per visit and sequence

    def most_in_flight(self) -> float:
        """Return the KV room of all nodes, each with as few layers as are best for it."""
        room = np.zeros_like(self.counts)
        np.maximum.at(room, self.kind.astype(np.int64), self.kv)
        return float(room @ self.counts) / self.num_layers

    def shortest_round_trip(self, in_flight: float) -> tuple[float, float]:
        """Return the price, and the lower bound that it proves on the round trip with at least ``in_flight`` requests.

        Both are infinite if the nodes cannot compute all layers for that many requests.
        """
        half = max(in_flight, 1e-12) / 2
        cap = np.minimum(self.cap, self.kv / (2 * half * self.held))
        low, high = self.begin / half, np.minimum(self.end / half, cap)
        usable = low <= high
        square = half * (self.held * self.slope + self.hop_slope)
        linear = self.held * self.flat + self.hop
        top, divisor = np.maximum(low, high), np.maximum(2 * square, 1e-300)
        starts = np.flatnonzero(np.diff(self.kind, prepend=-1.0))  # first entry of each type
        lengths = np.diff(starts, append=len(self.kind))

        def relaxed(price: float) -> tuple[float, float]:
            """Return the bound at a price, and the layers that nodes would compute in excess of the existing ones."""
            worth = price * self.held - linear
            wanted = np.minimum(np.maximum(worth / divisor, low), top)
            gain = np.where(usable, (worth - square * wanted) * wanted, 0.0)
            best = np.maximum(np.maximum.reduceat(gain, starts), 0.0)
            chosen = usable & (gain > 0) & (gain == np.repeat(best, lengths))
            layers = np.maximum.reduceat(np.where(chosen, self.held * wanted, 0.0), starts)
            value = price * self.num_layers - float(self.counts @ best)
            surplus = float(self.counts @ layers) - self.num_layers
            return value, surplus

        room = np.maximum.reduceat(np.where(usable, self.held * high, 0.0), starts)
        if room @ self.counts < self.num_layers * (1 - 1e-9):
            return math.inf, math.inf
        least, most = 0.0, float(np.max(linear / self.held))
        dearest = _DEAREST * most
        while relaxed(most)[1] < 0 and most < dearest:
            least, most = most, 2 * most
        best = (0.0, 0.0)
        for _ in range(_ROUNDS):
            price = 0.5 * (least + most)
            value, surplus = relaxed(price)
            best = max(best, (value, price))
            least, most = (price, most) if surplus < 0 else (least, price)
            if most - least <= 1e-6 * most:
                break
        return best[1], best[0]


def _nodes_of(tables: LayerTables, served: float) -> _Nodes:
    rows = []
    tokens, prompts = tables.prompt_tokens + tables.output_tokens, tables.prompt_tokens / tables.output_tokens
    for t, most in enumerate(tables.most):
        for column in range(most):
            held, prompt_s, kv = column + 1, tables.prompt_s[t, column], tables.kv[t, column]
            sizes, seconds = tables.decode_at[t, column], tables.decode_s[t, column]
            card_s = tables.card_s if held < tables.num_layers else 0.0
            computing_s = held * tables.output_tokens * (_least_per_sequence(sizes, seconds) + prompt_s)
            busy_s = max(tables.rate_s[t, column], card_s * tokens, computing_s)
            cap = min(1.0, 1 / (served * busy_s)) if served * busy_s > 0 else 1.0
            hops = tables.latency_s + card_s * prompts, card_s * (1 + prompts)
            for begin, end, level, slope in _convex_pieces(sizes, seconds):
                flat = tables.wait_s[t, column] + prompt_s + level
                rows.append((t, held, kv, cap, flat, slope + prompt_s, begin, end, *hops))
    return _Nodes(tables.num_layers, np.bincount(tables.kind).astype(np.float64), *np.array(rows, np.float64).T)


def _least_per_sequence(sizes: FloatArray, seconds: FloatArray) -> float:
    """Return the least seconds that one of a batch of sequences takes."""
    last = (seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2])
    known = sizes > 0
    return float(min(last, np.min(seconds[known] / sizes[known])))


def _convex_pieces(sizes: FloatArray, seconds: FloatArray) -> list[tuple[float, float, float, float]]:
    """Return the pieces of the greatest convex function below a time table: (begin, end, line's value at 0, slope)."""
    points = [(0.0, float(seconds[0])), *((float(x), float(y)) for x, y in zip(sizes, seconds, strict=True) if x > 0)]
    hull: list[tuple[float, float]] = []
    for point in points:
        while len(hull) >= 2 and _slope(hull[-2], point) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    # The last slope continues for ever: the line of any earlier piece with a steeper slope would end above it.
    last = _slope(points[-2], points[-1])
    while len(hull) >= 2 and _slope(hull[-2], hull[-1]) >= last:
        hull.pop()
    pieces = [(a[0], b[0], a[1] - _slope(a, b) * a[0], _slope(a, b)) for a, b in itertools.pairwise(hull)]
    begin, level = hull[-1]
    return [*pieces, (begin, float("inf"), level - last * begin, last)]


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
