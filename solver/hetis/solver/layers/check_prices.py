"""A second derivation of what the prices of a plan's bound prove, without code of `hetis.solver.layers.bound`.

The greatest convex function below a time table is taken as the highest of all lines below it, and the cheapest share of
a node is found by golden section; the bound itself has hulls and closed forms.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hetis.solver.layers.plan import LayersPlan, PricedInterval
from hetis.solver.layers.problem import LayersProblem, TimeTable
from hetis.solver.layers.tables import FloatArray

_TOLERANCE = 1e-6  # relative
_GOLDEN = (math.sqrt(5) - 1) / 2
_SECTIONS = 50


def check_prices(problem: LayersProblem, plan: LayersPlan) -> Iterator[str]:
    """Yield what keeps the prices from proving the bound: gaps between intervals, and intervals that allow more."""
    kept = problem.mean_prompt_tokens + 2 * problem.mean_output_tokens
    room = sum(kind.count * max(kind.kv_token_layers[: problem.most_layers(kind)]) for kind in problem.node_types)
    most = room / (kept * problem.num_layers)
    reached = 0.0
    for interval in plan.bound.intervals:
        if not interval.least <= reached * (1 + _TOLERANCE):
            yield f"nothing is proved for {reached} to {interval.least} requests in flight"
        reached = max(reached, interval.most)
    if not reached >= most * (1 - _TOLERANCE):
        yield f"nothing is proved for {reached} to {most} requests in flight"
    if not plan.bound.beyond_rps <= plan.bound.rate_rps:
        yield f"only placements beyond {plan.bound.beyond_rps} are looked at, the bound is {plan.bound.rate_rps}"
    shapes = _Shapes.of(problem, plan.bound.beyond_rps)
    for interval in plan.bound.intervals:
        allowed = interval.most / (problem.mean_output_tokens * shapes.round_trip_s(interval))
        if not allowed <= plan.bound.rate_rps * (1 + _TOLERANCE):
            yield (
                f"{interval.least} to {interval.most} requests in flight may serve {allowed}, "
                f"the bound is {plan.bound.rate_rps}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shapes:
    """Every node type with every number of layers it can hold, as arrays of shape [E]; lines [E, lines]."""

    problem: LayersProblem
    kind: list[int]
    held: FloatArray
    kv: FloatArray  # requests in flight, times layers
    cap: FloatArray
    prompt_s: FloatArray  # per output token and layer
    first_s: FloatArray
    card_s: FloatArray
    level: FloatArray
    slope: FloatArray

    @classmethod
    def of(cls, problem: LayersProblem, served: float) -> _Shapes:
        """Return the shapes for plans that serve more than ``served``, for which the bound holds."""
        prompt, output = problem.mean_prompt_tokens, problem.mean_output_tokens
        tokens = prompt + output
        shapes = [
            (number, kind, held)
            for number, kind in enumerate(problem.node_types)
            for held in range(1, problem.most_layers(kind) + 1)
        ]
        held = np.array([k for _, _, k in shapes], np.float64)
        prompt_s = np.array([kind.prompt_table(k).at(prompt) / output for _, kind, k in shapes])
        card_s = np.where(held < problem.num_layers, problem.links.activation_bytes / problem.links.bandwidth, 0.0)
        one_s = np.array([_least_of_one(kind.decode_table(k)) for _, kind, k in shapes])
        # The time that a request takes of a node that computes all requests is at most 1 / served.
        busy_s = np.maximum(
            np.maximum(tokens * card_s, held * output * (one_s + prompt_s)),
            [tokens / kind.tokens_per_s[k - 1] for _, kind, k in shapes],
        )
        lines = [_lines_below(kind.decode_table(k)) for _, kind, k in shapes]
        longest = max(len(known) for known in lines)
        padded = np.array([(known * longest)[:longest] for known in lines])
        return cls(
            problem=problem,
            kind=[number for number, _, _ in shapes],
            held=held,
            kv=np.array([kind.kv_token_layers[k - 1] for _, kind, k in shapes]) / (prompt + 2 * output),
            cap=np.minimum(1.0, 1 / np.maximum(busy_s * served, 1e-300)),
            prompt_s=prompt_s,
            first_s=np.array([kind.decode_table(k).at(1) / 2 for _, kind, k in shapes]),
            card_s=card_s,
            level=padded[:, :, 0],
            slope=padded[:, :, 1],
        )

    def round_trip_s(self, interval: PricedInterval) -> float:
        """Return the least round trip that the interval's price proves, or infinity if there is no room for so many."""
        in_flight = max(interval.least, 1e-12)
        cap = np.minimum(self.cap, self.kv / (in_flight * self.held))
        if math.isinf(interval.price_s):
            layers = -self._least_of_kinds(-self.held * cap)
            return math.inf if layers < self.problem.num_layers else 1e-300
        costs = self._least_costs(in_flight, interval.price_s, cap)
        found = interval.price_s * self.problem.num_layers + self._least_of_kinds(np.minimum(costs, 0.0))
        return found if math.isnan(found) else max(found, 1e-300)

    def _least_of_kinds(self, values: FloatArray) -> float:
        """Return the sum over all nodes, each with the least value of its type."""
        least = [math.inf] * len(self.problem.node_types)
        for number, value in zip(self.kind, values, strict=True):
            least[number] = min(least[number], float(value))
        return sum(kind.count * value for kind, value in zip(self.problem.node_types, least, strict=True))

    def _least_costs(self, in_flight: float, price_s: float, cap: FloatArray) -> FloatArray:
        """Return seconds of round trip minus the price of the layers, at the best share of each shape, shape [E]."""
        prompts = self.problem.mean_prompt_tokens / self.problem.mean_output_tokens

        def cost(share: FloatArray) -> FloatArray:
            batch = in_flight * share / 2
            decode_s = (self.level + self.slope * batch[:, None]).max(axis=1)
            layer_s = self.first_s + decode_s + (1 + batch) * self.prompt_s - price_s
            hop_s = self.problem.links.latency_s + self.card_s * (batch + (1 + batch) * prompts)
            return np.asarray(share * (self.held * layer_s + hop_s))

        low, high = np.zeros_like(cap), cap.copy()
        for _ in range(_SECTIONS):
            left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
            falls = cost(left) > cost(right)
            low, high = np.where(falls, left, low), np.where(falls, high, right)
        return np.minimum(cost((low + high) / 2), cost(cap))


def _least_of_one(table: TimeTable) -> float:
    """Return the least seconds that one of a batch of sequences takes, at a measured size or in an infinite batch."""
    endless = (table.at(1e9 * table.sizes[-1] + 1e9) - table.seconds[-1]) / (1e9 * table.sizes[-1] + 1e9)
    known = [table.at(size) / size for size in table.sizes if size > 0]
    return min([endless, *known])


def _lines_below(table: TimeTable) -> list[tuple[float, float]]:
    """Return lines (value at 0, slope) that are nowhere above a table and touch it once or twice."""
    corners = [(0.0, table.at(0)), *((size, table.at(size)) for size in table.sizes if size > 0)]
    far = 2 * table.sizes[-1] + 2
    endless = (table.at(2 * far) - table.at(far)) / far
    slopes = {(a, (b[1] - a[1]) / (b[0] - a[0])) for a, b in itertools.combinations(corners, 2)}
    slopes |= {(corner, endless) for corner in corners}
    lines = [(corner[1] - slope * corner[0], slope) for corner, slope in slopes if slope <= endless * (1 + 1e-12)]
    above = 1e-9 * max(seconds for _, seconds in corners)
    return [
        (level, slope)
        for level, slope in lines
        if all(level + slope * size <= seconds + above for size, seconds in corners)
    ]
