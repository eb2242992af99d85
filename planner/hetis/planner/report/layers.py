"""A placement of layers on one screen and as JSON: rate, proof, limit, stages, and max-flow's placement."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from hetis.planner.report.figures import bar, digits, percent, plural, seconds
from hetis.planner.report.tables import as_group, facts, first_rows, section, table_of
from hetis.planner.use_cases.json_values import document, fields_of
from hetis.planner.use_cases.layers import Layered, stages
from hetis.solver.layers.plan import LayersPlan, Limit, PlacedNode

MAX_STAGES = 60  # stages shown; -o json has all
BAR_WIDTH = 6


@as_group
def render_layers(found: Layered) -> Iterator[RenderableType]:
    problem, plan = found.problem, found.plan
    yield Text.assemble(
        (problem.name, "bold"),
        f": {plural(problem.num_layers, 'layer')} on {len(plan.nodes)} of {plural(problem.num_nodes, 'node')}, "
        f"{plural(len(list(stages(plan))), 'stage')}",
    )
    yield facts(_facts(found))
    yield section("Stages", _stage_table(found))
    if plan.idle:
        idle = _counted(name.rpartition("-")[0] for name in plan.idle)
        yield Text(f"\nidle: {', '.join(idle)}", style="dim")


def limit_sentence(found: Layered) -> str:
    judgement = found.plan.judgement
    match judgement.limit:
        case Limit.ROUND_TRIP if not found.has_room_for_a_request:
            return (
                f"KV room: {judgement.limit_node} has none for a whole mean request. The rate is that of "
                f"{digits(judgement.in_flight)} requests in flight, because the model counts parts of them"
            )
        case Limit.ROUND_TRIP:
            return (
                f"KV room and round trip: {judgement.limit_node} is full, and each of "
                f"{digits(judgement.in_flight)} requests in flight generates a token every "
                f"{seconds(judgement.round_trip_s)}"
            )
        case Limit.COMPUTE:
            return f"compute: {judgement.limit_node} is always busy"
        case Limit.LINK:
            return f"link: the card of {judgement.limit_node} is always busy"


def _facts(found: Layered) -> Iterator[tuple[str, Text | str]]:
    plan = found.plan
    rate = f"{digits(plan.rate_rps)} requests/s, {digits(found.output_tokens_per_s)} output tokens/s"
    yield "Rate", Text(rate, style="bold green")
    proof = (
        "no placement serves more" if plan.gap < 1e-4 else f"proven: the best serves at most {percent(plan.gap)} more"
    )
    stopped = ", search stopped early" if plan.stopped else ""
    yield "Bound", f"{digits(plan.bound_rps)} requests/s  gap {percent(plan.gap)}, {proof} in the model{stopped}"
    yield "Limit", limit_sentence(found)
    if found.max_flow is not None:
        other = found.max_flow
        flow = other.flow_rps * found.problem.tokens_per_request
        yield (
            "Max-flow",
            f"the placement with the highest flow ({digits(flow)} tokens/s) serves {digits(other.rate_rps)} "
            "requests/s: "
            f"{digits(other.judgement.in_flight)} in flight, {seconds(other.judgement.round_trip_s)} per round trip",
        )


def _stage_table(found: Layered) -> RenderableType:
    every = list(stages(found.plan))
    trip_s = found.plan.judgement.round_trip_s
    made = table_of(
        every[:MAX_STAGES],
        ("layers", lambda stage: f"{stage.first_layer}-{stage.first_layer + stage.num_layers - 1}"),
        ("'nodes", lambda stage: Text(" + ".join(_counted(load.node.kind for load in stage.loads)))),
        ("requests", lambda stage: f"{stage.visits:.0%}"),
        ("visit", lambda stage: seconds(stage.round_trip_s / stage.visits)),
        ("'KV", lambda stage: _filled(max(load.kv_fill for load in stage.loads))),
        ("compute", lambda stage: f"{max(load.compute_load for load in stage.loads):.0%}"),
        ("link", lambda stage: f"{max(load.link_load for load in stage.loads):.0%}"),
        ("of trip", lambda stage: f"{stage.round_trip_s / trip_s:.0%}"),
    )
    return first_rows(made, len(every), MAX_STAGES, "stage")


def _counted(kinds: Iterable[str]) -> Iterator[str]:
    return (f"{count} {kind}" for kind, count in Counter(kinds).items())


def _filled(share: float) -> str:
    return f"{bar(share, BAR_WIDTH)} {share:.0%}"


def layers_document(found: Layered) -> dict[str, Any]:
    problem, plan = found.problem, found.plan
    return document(
        "LayersPlan",
        name=problem.name,
        num_layers=problem.num_layers,
        result={
            **fields_of(plan, "stopped", "rate_rps", "bound_rps", "gap"),
            "output_tokens_per_s": found.output_tokens_per_s,
            **fields_of(plan.judgement, "in_flight", "round_trip_s", "limit", "limit_node"),
            "solver_s": plan.solver_s,
        },
        nodes=[
            _node(load.node) | fields_of(load, "visits", "kv_fill", "compute_load", "link_load", "visit_s")
            for load in plan.judgement.loads
        ],
        idle=plan.idle,
        links=_links(found, plan),
        max_flow=found.max_flow and _max_flow(found, found.max_flow),
        proof=[[interval.least, interval.most, interval.price_s] for interval in plan.bound.intervals],
    )


def _node(node: PlacedNode) -> dict[str, Any]:
    return {"name": node.name, "type": node.kind, **fields_of(node, "first_layer", "num_layers")}


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
        **fields_of(plan.judgement, "in_flight", "round_trip_s"),
        "nodes": [_node(node) for node in plan.nodes],
        "links": _links(found, plan),
    }
