"""``hetis-plan status``: whether the planner serves, its clusters, and the plans in force."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hetis.formats.command_line.terminal import Terminal
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.cli.server_verb import server_verb

if TYPE_CHECKING:
    from rich.console import RenderableType

    from hetis.planner.client import Client


@server_verb()
def status(terminal: Terminal, client: Client) -> ExitCode:
    """Show whether the planner serves, its clusters, plans at work and in force, proposals that wait.

    Exits 6 when the planner is not reached or does not serve.
    """
    from hetis.planner.cli.resource_data import resource_data
    from hetis.v1 import plan_pb2

    serving = client.is_serving()
    if not serving:
        terminal.error("the planner does not serve: it starts or drains")
        return ExitCode.UNREACHABLE
    clusters = list(client.list_clusters())
    working = list(client.list_plans(states=[plan_pb2.PLAN_STATE_QUEUED, plan_pb2.PLAN_STATE_SOLVING]))
    active = {name: _plan(client, name) for cluster in clusters if (name := cluster.active_plan)}
    proposals = [
        plan
        for plan in client.list_plans(states=[plan_pb2.PLAN_STATE_READY])
        if plan.origin == plan_pb2.PLAN_ORIGIN_PROPOSAL
        and plan.activation == plan_pb2.ACTIVATION_STATE_INACTIVE
        and not plan.HasField("activate_time")
    ]

    def document() -> dict[str, Any]:
        return {
            "apiVersion": "hetis/v1",
            "kind": "PlannerStatus",
            "serving": serving,
            "clusters": [resource_data(cluster) for cluster in clusters],
            "active_plans": [resource_data(plan) for plan in active.values()],
            "working_plans": [resource_data(plan) for plan in working],
            "proposals": [resource_data(plan) for plan in proposals],
        }

    terminal.emit(document, lambda: _page(clusters, [*active.values(), *working, *proposals]))
    for plan in proposals:
        terminal.say(f"proposed: {plan.proposal_reason}; hetis-plan apply --activate {plan.name}")
    return ExitCode.OK


def _plan(client: Client, name: str) -> Any:
    from hetis.v1 import plan_service_pb2, view_pb2

    return client.plans.GetPlan(plan_service_pb2.GetPlanRequest(name=name, view=view_pb2.VIEW_BASIC)).plan


def _page(clusters: list[Any], plans: list[Any]) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    from hetis.planner.cli.resource_tables import resource_table

    parts: list[RenderableType] = [
        Text.assemble("The planner ", ("serves", "bold green"), "."),
        Text(),
        resource_table("clusters", clusters, wide=False),
    ]
    if plans:
        parts += [Text(), resource_table("plans", plans, wide=False)]
    return Group(*parts)
