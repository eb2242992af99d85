"""A derivation of every number of a plan from its nodes, links and prices alone, without code of the search.

Comparisons state what must hold and are negated, so that NaN never passes. The rate is that of `judge`, the model's
definition, which the search computes by a sweep of its own. The bound that prices prove is derived a second time: the
greatest convex function below a time table is taken as the highest of all lines below it, and the cheapest share of a
node is found by golden section; `hetis.solver.layers.bound` has hulls and closed forms.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from hetis.solver.layers.plan import LayersPlan, PricedInterval, judge
from hetis.solver.layers.problem import LayersProblem, TimeTable

TOLERANCE = 1e-6  # relative, for rates and shares
_GOLDEN = (math.sqrt(5) - 1) / 2
_SECTIONS = 50


def check_layers_plan(problem: LayersProblem, plan: LayersPlan) -> tuple[str, ...]:
    """Return the errors of a plan, one sentence each; empty if it is sound."""
    broken = tuple(_structure(problem, plan)) or tuple(_flow(plan))
    return broken or (*_rate(problem, plan), *_prices(problem, plan))


def _structure(problem: LayersProblem, plan: LayersPlan) -> Iterator[str]:
    if not plan.nodes:
        yield "no node holds a layer"
    known = dict(problem.node_names())
    for name, times in Counter([*(node.name for node in plan.nodes), *plan.idle]).items():
        if name not in known:
            yield f"there is no node {name}"
        elif times > 1:
            yield f"{name} is used {times} times"
    for name in known.keys() - {node.name for node in plan.nodes} - set(plan.idle):
        yield f"{name} is neither used nor idle"
    for node in plan.nodes:
        if node.name in known and known[node.name].name != node.kind:
            yield f"{node.name} is of type {known[node.name].name}, not {node.kind}"
        elif node.name in known and not 1 <= node.num_layers <= problem.most_layers(known[node.name]):
            yield f"{node.name} holds {node.num_layers} layers, can hold 1 to {problem.most_layers(known[node.name])}"
        if node.first_layer < 0 or node.first_layer + node.num_layers > problem.num_layers:
            yield f"{node.name} holds layers outside of 0 to {problem.num_layers - 1}"
    ranges = {node.name: range(node.first_layer, node.first_layer + node.num_layers) for node in plan.nodes}
    for link in plan.links:
        ends = [name for name in (link.source, link.target) if name is not None]
        if not ends or any(name not in ranges for name in ends):
            yield f"a link from {link.source} to {link.target} joins nodes that hold nothing"
            continue
        done = 0 if link.source is None else ranges[link.source].stop
        if link.target is None:
            if done != problem.num_layers:
                yield f"{link.source} answers after layer {done - 1}, the last is {problem.num_layers - 1}"
        elif done not in ranges[link.target]:
            yield f"{link.target} does not hold layer {done}, which comes next after {link.source or 'the coordinator'}"
        if not link.share > 0:
            yield f"the link from {link.source} to {link.target} carries {link.share} of the requests"


def _flow(plan: LayersPlan) -> Iterator[str]:
    balance: dict[str | None, float] = defaultdict(float)
    for link in plan.links:
        balance[link.source] -= link.share
        balance[link.target] += link.share
    entering = sum(link.share for link in plan.links if link.source is None)
    if not abs(entering - 1) <= TOLERANCE:
        yield f"{entering} of the requests enter"
    for name, rest in balance.items():
        if not abs(rest) <= TOLERANCE:
            yield f"{name or 'the coordinator'} receives {rest} of the requests more than it sends"


def _rate(problem: LayersProblem, plan: LayersPlan) -> Iterator[str]:
    """Yield wrong claims about requests per second."""
    found = judge(problem, plan.nodes, plan.links)
    computed: dict[int, float] = defaultdict(float)
    for load in found.loads:
        for layer, share in enumerate(load.layer_share, start=load.node.first_layer):
            computed[layer] += share
    for layer in range(problem.num_layers):
        if not abs(computed[layer] - 1) <= TOLERANCE:
            yield f"layer {layer} is computed for {computed[layer]} of the requests"
    for what, claimed, value in (
        ("serves", plan.judgement.rate_rps, found.rate_rps),
        ("has in flight", plan.judgement.in_flight, found.in_flight),
        ("takes for a round trip", plan.judgement.round_trip_s, found.round_trip_s),
    ):
        if not math.isclose(claimed, value, rel_tol=TOLERANCE):
            yield f"the plan says that it {what} {claimed}, it is {value}"
    if not plan.bound.rate_rps >= found.rate_rps * (1 - TOLERANCE):
        yield f"the plan serves {found.rate_rps}, more than its bound {plan.bound.rate_rps}"


def _prices(problem: LayersProblem, plan: LayersPlan) -> Iterator[str]:
    """Yield what prevents the prices from proving the bound: gaps between intervals, and intervals that allow more."""
    kept = problem.mean_prompt_tokens + 2 * problem.mean_output_tokens
    room = sum(kind.count * max(kind.kv_token_layers[: problem.most_layers(kind)]) for kind in problem.node_types)
    most = room / (kept * problem.num_layers)
    reached, bound = 0.0, plan.bound
    for interval in bound.intervals:
        if not interval.least <= reached * (1 + TOLERANCE):
            yield f"nothing is proved for {reached} to {interval.least} requests in flight"
        reached = max(reached, interval.most)
    if not reached >= most * (1 - TOLERANCE):
        yield f"nothing is proved for {reached} to {most} requests in flight"
    if not bound.beyond_rps <= bound.rate_rps:
        yield f"only placements beyond {bound.beyond_rps} are looked at, the bound is {bound.rate_rps}"
    least_round_trip_s = _round_trips(problem, bound.beyond_rps)
    for interval in bound.intervals:
        allowed = interval.most / (problem.mean_output_tokens * least_round_trip_s(interval))
        if not allowed <= bound.rate_rps * (1 + TOLERANCE):
            in_flight = f"{interval.least} to {interval.most} requests in flight"
            yield f"{in_flight} may serve {allowed}, the bound is {bound.rate_rps}"


def _round_trips(problem: LayersProblem, served: float) -> Callable[[PricedInterval], float]:
    """Return the function from an interval to the least round trip that its price proves.

    It applies to plans that serve more than ``served``, and is infinite if there is no room for so many in flight.
    Arrays have shape [E]: every node type with every number of layers it can hold.
    """
    prompt, output, links = problem.mean_prompt_tokens, problem.mean_output_tokens, problem.links
    types = problem.node_types
    shapes = [(t, types[t], k) for t in range(len(types)) for k in range(1, problem.most_layers(types[t]) + 1)]
    tables = [kind.decode_table(k) for _, kind, k in shapes]
    held = np.array([k for *_, k in shapes], np.float64)
    room = np.array([kind.kv_token_layers[k - 1] for _, kind, k in shapes]) / (prompt + 2 * output)
    prompt_s = np.array([kind.prompt_table(k).at(prompt) / output for _, kind, k in shapes])  # per output token
    first_s = np.array([table.at(1) / 2 for table in tables])
    card_s = np.where(held < problem.num_layers, links.activation_bytes / links.bandwidth, 0.0)
    one_s = np.array([_least_of_one(table) for table in tables])
    measured_s = np.array([(prompt + output) / kind.tokens_per_s[k - 1] for _, kind, k in shapes])
    # A request occupies a node that computes all requests for at most 1 / served.
    busy_s = np.maximum(np.maximum((prompt + output) * card_s, held * output * (one_s + prompt_s)), measured_s)
    most_share = np.minimum(1.0, 1 / np.maximum(busy_s * served, 1e-300))
    lines = [_lines_below(table) for table in tables]
    longest = max(map(len, lines))
    level, slope = np.moveaxis(np.array([(known * longest)[:longest] for known in lines]), 2, 0)

    def least_of_types(values: NDArray[np.float64]) -> float:
        """Return the sum over all nodes, each with the least value of its type."""
        least = [math.inf] * len(types)
        for (t, *_), value in zip(shapes, values.tolist(), strict=True):
            least[t] = min(least[t], value)
        return sum(kind.count * value for kind, value in zip(types, least, strict=True))

    def least_round_trip_s(interval: PricedInterval) -> float:
        in_flight = max(interval.least, 1e-12)
        cap = np.minimum(most_share, room / (in_flight * held))
        if math.isinf(interval.price_s):
            return math.inf if -least_of_types(-held * cap) < problem.num_layers else 1e-300

        def cost(share: NDArray[np.float64]) -> NDArray[np.float64]:
            """Return seconds of round trip minus the price of the layers."""
            batch = in_flight * share / 2
            decode_s = (level + slope * batch[:, None]).max(axis=1)
            layer_s = first_s + decode_s + (1 + batch) * prompt_s - interval.price_s
            hop_s = links.latency_s + card_s * (batch + (1 + batch) * prompt / output)
            return np.asarray(share * (held * layer_s + hop_s))

        low, high = np.zeros_like(cap), cap.copy()
        for _ in range(_SECTIONS):
            left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
            falls = cost(left) > cost(right)
            low, high = np.where(falls, left, low), np.where(falls, high, right)
        costs = np.minimum(np.minimum(cost((low + high) / 2), cost(cap)), 0.0)
        found = interval.price_s * problem.num_layers + least_of_types(costs)
        return found if math.isnan(found) else max(found, 1e-300)

    return least_round_trip_s


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
    return [line for line in lines if all(line[0] + line[1] * size <= seconds + above for size, seconds in corners)]
