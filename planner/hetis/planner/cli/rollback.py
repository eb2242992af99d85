"""``hetis-plan rollback``: back to the plan that was in force before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from hetis.formats.command_line.terminal import Terminal
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.cli.get import ClusterNameOption
from hetis.planner.cli.server_verb import server_verb

if TYPE_CHECKING:
    from hetis.planner.client import Client

NoWaitOption = Annotated[bool, typer.Option("--no-wait", help="Return at once; `watch` shows how it goes on.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Check everything and show it, change nothing.")]


@server_verb()
def rollback(
    terminal: Terminal,
    client: Client,
    plan: Annotated[
        str | None, typer.Argument(show_default="that of the cluster", help="The plan in force, to go back from.")
    ] = None,
    *,
    cluster: ClusterNameOption = None,
    dry_run: DryRunOption = False,
    no_wait: NoWaitOption = False,
) -> ExitCode:
    """Put the earlier plan in force again and wait until it is.

    It names the plan to go back from, so that repeating it does not go back twice.
    """
    from hetis.planner.cli.resource_data import resource_data
    from hetis.planner.cli.resource_names import chosen_cluster, full_name
    from hetis.planner.cli.resource_tables import plan_summary
    from hetis.planner.cli.waiting import outcome, wait_for_plan
    from hetis.v1 import cluster_service_pb2, plan_service_pb2

    if plan is None:
        name = chosen_cluster(client, cluster)
        present = client.clusters.GetCluster(cluster_service_pb2.GetClusterRequest(name=name)).cluster
        if not present.active_plan:
            terminal.error(f"{name} has no plan in force")
            return ExitCode.CONFLICT
        plan = present.active_plan
    request = plan_service_pb2.RollbackPlanRequest(name=full_name("plans", plan), validate_only=dry_run)
    answer = client.plans.RollbackPlan(request)
    earlier = answer.plan
    if dry_run:
        terminal.say("nothing was changed")
    else:
        terminal.say(f"going back from {request.name} to {earlier.name}")
    if not (dry_run or no_wait):
        earlier = wait_for_plan(terminal, client, earlier.name)
    terminal.emit(lambda: resource_data(earlier), lambda: plan_summary(earlier, answer.steps))
    return outcome(terminal, earlier, activated=not (dry_run or no_wait))
