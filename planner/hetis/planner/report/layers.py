"""A placement of layers on one screen: rate and proof, what limits it, its stages, and the max-flow placement."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.text import Text

from hetis.planner.report.dispatch import and_more, facts_table, plain_table
from hetis.planner.report.figures import bar, digits, percent, plural, seconds
from hetis.planner.report.plan import section
from hetis.planner.use_cases.layers import Layered, Stage, stages
from hetis.solver.layers.plan import Limit

MAX_STAGES = 60  # shown; -o json has all
BAR_WIDTH = 6


def render_layers(found: Layered) -> RenderableType:
    """Return the table view, at most 80 columns wide if the names allow it."""
    return Group(*_sections(found))


def limit_sentence(found: Layered) -> str:
    """Return a sentence on what limits the plan's rate."""
    judgement = found.plan.judgement
    match judgement.limit:
        case Limit.ROUND_TRIP:
            return (
                f"KV room and round trip: {judgement.limit_node} is full, and each of "
                f"{digits(judgement.in_flight)} requests in flight makes a token in {seconds(judgement.round_trip_s)}"
            )
        case Limit.COMPUTE:
            return f"compute: {judgement.limit_node} never rests"
        case Limit.LINK:
            return f"link: the card of {judgement.limit_node} never rests"


def _sections(found: Layered) -> Iterator[RenderableType]:
    problem, plan = found.problem, found.plan
    yield Text.assemble(
        (problem.name, "bold"),
        f": {plural(problem.num_layers, 'layer')} on {len(plan.nodes)} of {plural(problem.num_nodes, 'node')}, "
        f"{plural(len(list(stages(plan))), 'stage')}",
    )
    yield facts_table(list(_facts(found)))
    yield section("Stages", _stage_table(found))
    if plan.idle:
        idle = Counter(name.rpartition("-")[0] for name in plan.idle)
        yield Text(f"\nidle: {', '.join(f'{count} {kind}' for kind, count in idle.items())}", style="dim")


def _facts(found: Layered) -> Iterator[tuple[str, Text | str]]:
    plan = found.plan
    rate = f"{digits(plan.rate_rps)} requests/s, {digits(found.output_tokens_per_s)} output tokens/s"
    yield "Rate", Text(rate, style="bold green")
    proof = "nothing serves more" if plan.gap < 1e-4 else f"proven: the best serves at most {percent(plan.gap)} more"
    stopped = ", search stopped early" if plan.stopped else ""
    yield "Bound", f"{digits(plan.bound_rps)} requests/s  gap {percent(plan.gap)}, {proof}{stopped}"
    yield "Limit", limit_sentence(found)
    if found.max_flow is not None:
        other = found.max_flow
        flow = other.flow_rps * found.problem.tokens_per_request
        yield (
            "Max-flow",
            f"the placement of most flow ({digits(flow)} tokens/s) serves {digits(other.rate_rps)} requests/s: "
            f"{digits(other.judgement.in_flight)} in flight, {seconds(other.judgement.round_trip_s)} per round trip",
        )


def _stage_table(found: Layered) -> RenderableType:
    table = plain_table(
        ("layers", "right"),
        ("nodes", "left"),
        ("requests", "right"),
        ("visit", "right"),
        ("KV", "left"),
        ("compute", "right"),
        ("link", "right"),
        ("of trip", "right"),
    )
    every = list(stages(found.plan))
    for stage in every[:MAX_STAGES]:
        table.add_row(*_stage_row(stage, found))
    return table if len(every) <= MAX_STAGES else Group(table, and_more(len(every) - MAX_STAGES, "stage"))


def _stage_row(stage: Stage, found: Layered) -> tuple[str | Text, ...]:
    kinds = Counter(load.node.kind for load in stage.loads)
    fill = max(load.kv_fill for load in stage.loads)
    visit_s = stage.round_trip_s / stage.visits
    return (
        f"{stage.first_layer}-{stage.first_layer + stage.num_layers - 1}",
        Text(" + ".join(f"{count} {kind}" for kind, count in kinds.items())),
        f"{stage.visits:.0%}",
        seconds(visit_s),
        f"{bar(fill, BAR_WIDTH)} {fill:.0%}",
        f"{max(load.compute_load for load in stage.loads):.0%}",
        f"{max(load.link_load for load in stage.loads):.0%}",
        f"{stage.round_trip_s / found.plan.judgement.round_trip_s:.0%}",
    )
