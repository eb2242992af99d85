"""Verbs that change what a planner has: ``apply``, ``rollback``, ``cancel`` and ``disconnect``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from hetis.formats.command_line.terminal import Terminal
from hetis.planner.cli import options
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.cli.options import group
from hetis.planner.cli.server_verb import InCluster, chosen_cluster, fetched, full_name, server_verb

if TYPE_CHECKING:
    from hetis.planner.client import Client

APPLY_EXAMPLES = """Examples:\n
  hetis-plan apply cluster.yaml l4-profile.yaml\n
  hetis-plan apply -c cluster.yaml -m Llama-2-70B -w 8000/300 --activate\n
  hetis-plan apply --plan plan.json --activate\n
  hetis-plan apply --activate plans/night"""


@group
class VerificationOptions:
    """What a plan survives, and whether its limits are tried in simulated traffic."""

    survive: options.Survived | None = options.survive_option()
    verify: bool = options.verify_option()


@server_verb()
def apply(
    terminal: Terminal,
    client: Client,
    what: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FILE|PLAN]...", help="Cluster and Profile files; a plan to activate."),
    ] = None,
    *,
    inputs: options.OptionalInputOptions,
    goal: options.GoalOptions,
    held_to: options.ServiceLevelOptions,
    promise: VerificationOptions,
    family: options.FamilyOptions,
    replicas: options.ReplicaOptions,
    search: options.SearchOptions,
    asked: options.ApplyOptions,
) -> ExitCode:
    """Create or update clusters and profiles, solve on the planner, import plans, put plans in force.

    Ctrl-C while waiting stops nothing: the plan goes on, and how to come back to it is said.
    """
    from hetis.planner.cli.applying import Applying, FileProblem

    options.engine_rules(family.engine, family.strategy, replicas.limits)
    problem = FileProblem(
        inputs=inputs, goal=goal, held_to=held_to, survive=promise.survive, verify=promise.verify, family=family,
        replicas=replicas, search=search,
    )  # fmt: skip
    return Applying(terminal=terminal, client=client, asked=asked).run(files=what or [], problem=problem)


@group
class RollbackOptions(InCluster):
    dry_run: bool = options.check_only_option()
    no_wait: bool = options.no_wait_option()


@server_verb()
def rollback(
    terminal: Terminal,
    client: Client,
    plan: Annotated[
        str | None, typer.Argument(show_default="that of the cluster", help="The plan in force, to go back from.")
    ] = None,
    *,
    how: RollbackOptions,
) -> ExitCode:
    """Put the earlier plan in force again and wait until it is.

    It names the plan to go back from, so that repeating it does not go back twice.
    """
    from hetis.planner.cli.resource_views import outcome, plan_summary, resource_data, wait_for_plan
    from hetis.v1 import plan_service_pb2

    if plan is None:
        name = chosen_cluster(client, how.cluster)
        plan = fetched(client, "clusters", name).active_plan
        if not plan:
            terminal.error(f"{name} has no plan in force")
            return ExitCode.CONFLICT
    request = plan_service_pb2.RollbackPlanRequest(name=full_name("plans", plan), validate_only=how.dry_run)
    answer = client.plans.RollbackPlan(request)
    earlier, waits = answer.plan, not (how.dry_run or how.no_wait)
    terminal.say("nothing was changed" if how.dry_run else f"going back from {request.name} to {earlier.name}")
    if waits:
        earlier = wait_for_plan(terminal, client, earlier.name)
    terminal.emit(lambda: resource_data(earlier), lambda: plan_summary(earlier, answer.steps))
    return outcome(terminal, earlier, activated=waits)


@server_verb()
def cancel(
    terminal: Terminal, client: Client, plan: Annotated[str, typer.Argument(help="The plan whose search is to end.")]
) -> ExitCode:
    """End a plan's search; the best plan so far is its answer. A search that is over stays as it is."""
    from hetis.planner.cli.resource_views import outcome, plan_summary, resource_data, wait_for_plan
    from hetis.v1 import plan_service_pb2

    request = plan_service_pb2.CancelPlanRequest(name=full_name("plans", plan))
    client.plans.CancelPlan(request)
    ended = wait_for_plan(terminal, client, request.name)
    terminal.emit(lambda: resource_data(ended), lambda: plan_summary(ended))
    return outcome(terminal, ended)


@server_verb()
def disconnect(
    terminal: Terminal,
    client: Client,
    node: Annotated[str, typer.Argument(help="The node whose agent is to go.")],
    *,
    where: InCluster,
) -> ExitCode:
    """End the stream of the agent that is connected as a node; the next agent is let in. Needs role admin.

    For a node whose credentials somebody else uses: take those back first, or the same agent comes again.
    """
    from hetis.planner.cli.resource_views import resource_data
    from hetis.v1 import cluster_service_pb2

    parent = None if node.startswith("clusters/") else chosen_cluster(client, where.cluster)
    request = cluster_service_pb2.DisconnectNodeRequest(name=full_name("nodes", node, parent))
    found = client.clusters.DisconnectNode(request).node
    terminal.emit(lambda: resource_data(found), lambda: f"the agent of {found.name} was disconnected")
    return ExitCode.OK
