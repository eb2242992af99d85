"""A placement of layers as JSON values. Layers count from 0; null is the coordinator, which sends requests."""

from __future__ import annotations

import math
from typing import Any

from hetis.formats.fields import API_VERSION
from hetis.planner.use_cases.layers import Layered
from hetis.solver.layers.plan import LayersPlan


def layers_document(found: Layered) -> dict[str, Any]:
    """Return the document of ``kind: LayersPlan``."""
    problem, plan = found.problem, found.plan
    return {
        "apiVersion": API_VERSION,
        "kind": "LayersPlan",
        "name": problem.name,
        "num_layers": problem.num_layers,
        "result": {
            "stopped": plan.stopped,
            "rate_rps": plan.rate_rps,
            "bound_rps": plan.bound_rps,
            "gap": plan.gap,
            "output_tokens_per_s": found.output_tokens_per_s,
            "in_flight": plan.judgement.in_flight,
            "round_trip_s": plan.judgement.round_trip_s,
            "limit": plan.judgement.limit.value,
            "limit_node": plan.judgement.limit_node,
            "solver_s": plan.solver_s,
        },
        "nodes": [
            {
                "name": load.node.name,
                "type": load.node.kind,
                "first_layer": load.node.first_layer,
                "num_layers": load.node.num_layers,
                "visits": load.visits,
                "kv_fill": load.kv_fill,
                "compute_load": load.compute_load,
                "link_load": load.link_load,
                "visit_s": load.visit_s,
            }
            for load in plan.judgement.loads
        ],
        "idle": list(plan.idle),
        "links": _links(found, plan),
        "max_flow": None if found.max_flow is None else _max_flow(found, found.max_flow),
        "proof": [
            [interval.least, interval.most, interval.price_s if math.isfinite(interval.price_s) else None]
            for interval in plan.bound.intervals
        ],
    }


def _links(found: Layered, plan: LayersPlan) -> list[dict[str, Any]]:
    tokens_per_s = plan.rate_rps * found.problem.tokens_per_request
    return [
        {"from": link.source, "to": link.target, "share": link.share, "tokens_per_s": link.share * tokens_per_s}
        for link in plan.links
    ]


def _max_flow(found: Layered, plan: LayersPlan) -> dict[str, Any]:
    return {
        "rate_rps": plan.rate_rps,
        "flow_tokens_per_s": plan.flow_rps * found.problem.tokens_per_request,
        "in_flight": plan.judgement.in_flight,
        "round_trip_s": plan.judgement.round_trip_s,
        "nodes": [
            {"name": node.name, "type": node.kind, "first_layer": node.first_layer, "num_layers": node.num_layers}
            for node in plan.nodes
        ],
        "links": _links(found, plan),
    }
