"""A derivation of every number of a plan from its nodes, links and prices alone, without code of the search.

Comparisons state what must hold and are negated, so that NaN never passes.

The model is that of `docs/layers.md`. Nothing that a plan says of itself is trusted.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator

from hetis.solver.layers.check_prices import check_prices
from hetis.solver.layers.plan import LayersPlan
from hetis.solver.layers.problem import LayersProblem

TOLERANCE = 1e-6  # relative, for rates and shares


def check_layers_plan(problem: LayersProblem, plan: LayersPlan) -> tuple[str, ...]:
    """Return what is wrong with a plan, one sentence each, or nothing if it is sound."""
    broken = tuple(_structure(problem, plan))
    return broken or (*_flow(problem, plan), *_rate(problem, plan), *check_prices(problem, plan))


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


def _flow(problem: LayersProblem, plan: LayersPlan) -> Iterator[str]:
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
    """Yield wrong claims on requests per second, derived layer by layer as in the docs."""
    kinds = {kind.name: kind for kind in problem.node_types}
    nodes = {node.name: node for node in plan.nodes}
    here: dict[tuple[str, int], float] = defaultdict(float)  # share of requests that compute a layer on a node
    visits: dict[str, float] = defaultdict(float)
    for link in plan.links:
        if link.target is not None:
            begin = 0 if link.source is None else nodes[link.source].first_layer + nodes[link.source].num_layers
            visits[link.target] += link.share
            for layer in range(begin, nodes[link.target].first_layer + nodes[link.target].num_layers):
                here[link.target, layer] += link.share
    for layer in range(problem.num_layers):
        computed = sum(here[name, layer] for name in nodes)
        if not abs(computed - 1) <= TOLERANCE:
            yield f"layer {layer} is computed for {computed} of the requests"
    prompt, output = problem.mean_prompt_tokens, problem.mean_output_tokens
    kept = prompt + 2 * output
    entries = {name: kept * sum(here[name, layer] for layer in range(problem.num_layers)) for name in nodes}
    room = {name: kinds[node.kind].kv_token_layers[node.num_layers - 1] for name, node in nodes.items()}
    in_flight = min(room[name] / entries[name] for name in nodes if entries[name] > 0)
    trip_s = 0.0
    rates = []
    for name, node in nodes.items():
        kind, passing = kinds[node.kind], visits[name]
        decode, prompts = kind.decode_table(node.num_layers), kind.prompt_table(node.num_layers)
        prompt_s = prompts.at(prompt)
        card_s = 0.0 if node.num_layers == problem.num_layers else problem.links.activation_bytes
        card_s /= problem.links.bandwidth
        visit_s = problem.links.latency_s + card_s * (in_flight * passing / 2)
        visit_s += card_s * (1 + in_flight * passing / 2) * prompt / output
        request_s = 0.0
        for layer in range(problem.num_layers):
            sequences = in_flight * here[name, layer]
            if sequences > 0:
                visit_s += decode.at(1) / 2 + decode.at(sequences / 2) + (1 + sequences / 2) * prompt_s / output
                request_s += output * decode.at(sequences) / in_flight + here[name, layer] * prompt_s
        trip_s += passing * visit_s
        rates += [1 / seconds for seconds in (request_s, (prompt + output) * card_s * passing) if seconds > 0]
        if passing > 0:
            rates.append(kind.tokens_per_s[node.num_layers - 1] / ((prompt + output) * passing))
    rate = min([in_flight / (output * trip_s), *rates])
    claims = [
        ("serves", plan.judgement.rate_rps, rate),
        ("has in flight", plan.judgement.in_flight, in_flight),
        ("takes for a round trip", plan.judgement.round_trip_s, trip_s),
    ]
    for what, claimed, found in claims:
        if not math.isclose(claimed, found, rel_tol=TOLERANCE):
            yield f"the plan says that it {what} {claimed}, it is {found}"
    if not plan.bound.rate_rps >= rate * (1 - TOLERANCE):
        yield f"the plan serves {rate}, more than its bound {plan.bound.rate_rps}"
