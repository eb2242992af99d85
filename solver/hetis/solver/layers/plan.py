"""Plans of layers: ranges of layers, the flow on every link, the rate in the model, and an upper bound on any rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from hetis.solver.layers.problem import BATCH_SHARE, WAIT_SHARE, LayersProblem


class Limit(StrEnum):
    """The limit that keeps a plan from serving more."""

    ROUND_TRIP = "round trip"  # KV room is full, and a request in flight produces a token per round trip
    COMPUTE = "compute"  # a node computes all the time
    LINK = "link"  # the network card of a node sends all the time


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedNode:
    """Node ``name`` of type ``kind``, which holds layers ``first_layer`` to ``end_layer - 1``, counted from 0."""

    name: str
    kind: str
    first_layer: int
    num_layers: int

    @property
    def end_layer(self) -> int:
        return self.first_layer + self.num_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkShare:
    """The share of all requests that go from ``source`` to ``target``; None is the coordinator, at both ends.

    A target computes the layers that it holds after the last one of the source.
    """

    source: str | None
    target: str | None
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeLoad:
    """The load of one node under a plan.

    Attributes:
        visits: share of the requests that pass through the node.
        layer_share: share of the requests for which each held layer is computed here, in the order of layers.
        kv_fill: share of its KV room in use.
        compute_load, link_load: shares in use of its computing capacity and of its network card.
        visit_s: seconds that a decoding request spends here in one round trip, including the following hop.
    """

    node: PlacedNode
    visits: float
    layer_share: tuple[float, ...]
    kv_fill: float
    compute_load: float
    link_load: float
    visit_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """The value of ranges and shares.

    Attributes:
        rate_rps: requests per second.
        flow_rps: requests per second that measured token rates and cards alone would allow, a static flow.
        in_flight: requests for which there is KV room.
        round_trip_s: seconds per output token of a request in flight.
        limit: what limits the rate, at node ``limit_node``.
    """

    rate_rps: float
    flow_rps: float
    in_flight: float
    round_trip_s: float
    limit: Limit
    limit_node: str
    loads: tuple[NodeLoad, ...]


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class PricedInterval:
    """A price of ``price_s`` seconds of round trip per layer, for ``least`` to ``most`` requests in flight.

    With an infinite price, no placement that serves more has so many in flight.
    """

    least: float
    most: float
    price_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RateBound:
    """A proof that no placement serves more than ``rate_rps``, by prices for intervals that cover all of the KV room.

    `hetis.solver.layers.bound` explains how prices prove a rate. Capacities are counted for placements that serve more
    than ``beyond_rps``, which is at most ``rate_rps``.
    """

    rate_rps: float
    beyond_rps: float
    intervals: tuple[PricedInterval, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayersPlan:
    """A placement of layers, its value, and the proof of how good it is.

    Attributes:
        nodes: nodes that hold layers, by first layer.
        links: links that carry anything.
        bound: no placement in the model serves more; ``gap`` is its distance as a ratio to the rate.
        idle: names of nodes that hold nothing.
        solver_s: duration of the search, 0 without a clock.
        stopped: whether the search was cut short.
    """

    nodes: tuple[PlacedNode, ...]
    links: tuple[LinkShare, ...]
    judgement: Judgement
    bound: RateBound
    idle: tuple[str, ...] = ()
    solver_s: float = 0.0
    stopped: bool = False

    @property
    def rate_rps(self) -> float:
        return self.judgement.rate_rps

    @property
    def flow_rps(self) -> float:
        return self.judgement.flow_rps

    @property
    def bound_rps(self) -> float:
        return self.bound.rate_rps

    @property
    def gap(self) -> float:
        return self.bound_rps / self.rate_rps - 1


def judge(problem: LayersProblem, nodes: Sequence[PlacedNode], links: Sequence[LinkShare]) -> Judgement:
    """Return the sustained rate of a placement.

    Data       L layers, P prompt and O output tokens, H = P + 2 O KV tokens per request in flight, w card seconds per
               token, h latency; of node i: layers held k_i, tokens per second T_i, KV entries M_i, and the seconds of
               one layer p_i for a prompt and d_i(b) for b decoding sequences
    Shares     z_il of the requests compute layer l on node i; v_i of them visit node i
    In flight  N = min_i M_i / (H sum_l z_il)
    Batches    requests go round in two clumps: b_il = N z_il / 2 sequences, and a_i = N v_i / 2 on its card
    Visit      r_i = sum over l with z_il > 0 of [ d_i(1) / 2 + d_i(b_il) + (1 + b_il) p_i / O ]
                     + h + w [ a_i + (1 + a_i) P / O ]        seconds
    Round trip R = sum_i v_i r_i                              seconds per output token
    Computing  B_i = sum over l with z_il > 0 of [ O d_i(N z_il) / N + z_il p_i ]   seconds per request, at its largest
                                                              batch
    Rate       X = min( N / (O R),  1 / B_i,  T_i / ((P + O) v_i),  1 / (w (P + O) v_i) )    requests per second

    A node that holds all L layers sends only tokens, to the coordinator, so its w is 0.
    """
    by_name = {node.name: node for node in nodes}
    kinds = {kind.name: kind for kind in problem.node_types}
    prompt, output, both = problem.mean_prompt_tokens, problem.mean_output_tokens, problem.tokens_per_request
    shares = {node.name: [0.0] * node.num_layers for node in nodes}
    visits = dict.fromkeys(by_name, 0.0)
    for link in links:
        if link.target is not None:
            target = by_name[link.target]
            entered = by_name[link.source].end_layer if link.source is not None else 0
            visits[target.name] += link.share
            for layer in range(entered, target.end_layer):
                shares[target.name][layer - target.first_layer] += link.share
    room = {node.name: kinds[node.kind].kv_token_layers[node.num_layers - 1] for node in nodes}
    kept = {name: problem.tokens_in_flight * sum(own) for name, own in shares.items()}  # KV entries per request
    in_flight = min(room[name] / kept[name] for name in by_name if visits[name] > 0)
    fullest = max(by_name, key=lambda name: kept[name] / room[name], default="")

    found = []  # seconds of a visit; of computing, as measured, and of the card per request
    for node in nodes:
        kind, passing = kinds[node.kind], visits[node.name]
        decode = kind.decode_table(node.num_layers)
        prompt_s = kind.prompt_table(node.num_layers).at(prompt) / output  # per output token
        card_s = problem.links.token_s if node.num_layers < problem.num_layers else 0.0
        sent = BATCH_SHARE * in_flight * passing
        visit_s = problem.links.latency_s + card_s * (sent + (1 + sent) * prompt / output)
        batches_s = 0.0
        for share in shares[node.name]:
            if share > 0:
                batch = BATCH_SHARE * in_flight * share
                visit_s += WAIT_SHARE * decode.at(1) + decode.at(batch) + (1 + batch) * prompt_s
                batches_s += decode.at(in_flight * share) / in_flight + share * prompt_s
        measured_s = both * passing / kind.tokens_per_s[node.num_layers - 1]
        found.append((node, visit_s, max(measured_s, output * batches_s), measured_s, both * passing * card_s))
    round_trip_s = sum(visits[node.name] * visit_s for node, visit_s, *_ in found)
    rates = [(in_flight / (output * round_trip_s), Limit.ROUND_TRIP, fullest)]
    for node, _, compute_s, _, card_s in found:
        for limit, seconds in ((Limit.COMPUTE, compute_s), (Limit.LINK, card_s)):
            rates.append((1 / seconds if seconds else float("inf"), limit, node.name))
    rate, limit, limit_node = min(rates, key=lambda entry: entry[0])
    return Judgement(
        rate_rps=rate,
        flow_rps=min(1 / max(measured_s, card_s) for node, _, _, measured_s, card_s in found if visits[node.name] > 0),
        in_flight=in_flight,
        round_trip_s=round_trip_s,
        limit=limit,
        limit_node=limit_node,
        loads=tuple(
            NodeLoad(
                node=node,
                visits=visits[node.name],
                layer_share=tuple(shares[node.name]),
                kv_fill=in_flight * kept[node.name] / room[node.name],
                compute_load=rate * compute_s,
                link_load=rate * card_s,
                visit_s=visit_s,
            )
            for node, visit_s, compute_s, _, card_s in found
        ),
    )
