"""The value of a placement: the sustained rate of given ranges and shares, in the model of `docs/layers.md`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hetis.solver.layers.plan import Judgement, Limit, LinkShare, NodeLoad, PlacedNode
from hetis.solver.layers.problem import BATCH_SHARE, WAIT_SHARE, LayersProblem, NodeType


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
    shares = {node.name: [0.0] * node.num_layers for node in nodes}
    visits = dict.fromkeys(by_name, 0.0)
    for link in links:
        if link.target is None:
            continue
        target = by_name[link.target]
        entered = by_name[link.source].end_layer if link.source is not None else 0
        visits[target.name] += link.share
        for layer in range(entered, target.end_layer):
            shares[target.name][layer - target.first_layer] += link.share
    in_flight = min(
        kinds[node.kind].kv_token_layers[node.num_layers - 1] / (problem.tokens_in_flight * sum(shares[node.name]))
        for node in nodes
        if visits[node.name] > 0
    )
    views = [
        _NodeView.of(problem, kinds[node.kind], node, tuple(shares[node.name]), visits[node.name], in_flight)
        for node in nodes
    ]
    round_trip_s = sum(view.visits * view.visit_s for view in views)
    rates = [(in_flight / (problem.mean_output_tokens * round_trip_s), Limit.ROUND_TRIP, _fullest(views).node.name)]
    for view in views:
        rates.append((1 / view.compute_s if view.compute_s else float("inf"), Limit.COMPUTE, view.node.name))
        rates.append((1 / view.card_s if view.card_s else float("inf"), Limit.LINK, view.node.name))
    rate, limit, limit_node = min(rates, key=lambda entry: entry[0])
    return Judgement(
        rate_rps=rate,
        flow_rps=min(1 / max(view.measured_s, view.card_s) for view in views if view.visits > 0),
        in_flight=in_flight,
        round_trip_s=round_trip_s,
        limit=limit,
        limit_node=limit_node,
        loads=tuple(
            NodeLoad(
                node=view.node,
                visits=view.visits,
                layer_share=view.shares,
                kv_fill=view.kv_fill,
                compute_load=rate * view.compute_s,
                link_load=rate * view.card_s,
                visit_s=view.visit_s,
            )
            for view in views
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _NodeView:
    """One node at N requests in flight: seconds per visit, and seconds of computing and sending per request."""

    node: PlacedNode
    shares: tuple[float, ...]
    visits: float
    kv_fill: float
    visit_s: float
    measured_s: float  # by the measured tokens per second
    compute_s: float
    card_s: float

    @classmethod
    def of(
        cls,
        problem: LayersProblem,
        kind: NodeType,
        node: PlacedNode,
        shares: tuple[float, ...],
        visits: float,
        in_flight: float,
    ) -> _NodeView:
        held = node.num_layers
        prompt_tokens, output_tokens = problem.mean_prompt_tokens, problem.mean_output_tokens
        decode = kind.decode_table(held)
        prompt_s = kind.prompt_table(held).at(prompt_tokens) / output_tokens  # per output token
        card_token_s = problem.links.token_s if held < problem.num_layers else 0.0
        sent = BATCH_SHARE * in_flight * visits
        visit_s = problem.links.latency_s + card_token_s * (sent + (1 + sent) * prompt_tokens / output_tokens)
        batches_s = 0.0
        for share in shares:
            if share > 0:
                batch = BATCH_SHARE * in_flight * share
                visit_s += WAIT_SHARE * decode.at(1) + decode.at(batch) + (1 + batch) * prompt_s
                batches_s += decode.at(in_flight * share) / in_flight + share * prompt_s
        tokens = problem.tokens_per_request * visits
        return cls(
            node=node,
            shares=shares,
            visits=visits,
            kv_fill=in_flight * problem.tokens_in_flight * sum(shares) / kind.kv_token_layers[held - 1],
            visit_s=visit_s,
            measured_s=tokens / kind.tokens_per_s[held - 1],
            compute_s=max(tokens / kind.tokens_per_s[held - 1], output_tokens * batches_s),
            card_s=tokens * card_token_s,
        )


def _fullest(views: Sequence[_NodeView]) -> _NodeView:
    return max(views, key=lambda view: view.kv_fill)
