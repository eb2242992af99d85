"""``hetis-plan cancel``: end a search and keep the best plan so far."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from hetis.formats.command_line.terminal import Terminal
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.cli.server_verb import server_verb

if TYPE_CHECKING:
    from hetis.planner.client import Client


@server_verb()
def cancel(
    terminal: Terminal,
    client: Client,
    plan: Annotated[str, typer.Argument(help="The plan whose search is to end.")],
) -> ExitCode:
    """End a plan's search; the best plan so far is its answer. A search that is over stays as it is."""
    from hetis.planner.cli.resource_data import resource_data
    from hetis.planner.cli.resource_names import full_name
    from hetis.planner.cli.resource_tables import plan_summary
    from hetis.planner.cli.waiting import outcome, wait_for_plan
    from hetis.v1 import plan_service_pb2

    request = plan_service_pb2.CancelPlanRequest(name=full_name("plans", plan))
    client.plans.CancelPlan(request)
    ended = wait_for_plan(terminal, client, request.name)
    terminal.emit(lambda: resource_data(ended), lambda: plan_summary(ended))
    return outcome(terminal, ended)
