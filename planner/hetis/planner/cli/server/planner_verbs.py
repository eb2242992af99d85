"""Verbs that read or change the planner's resources."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hetis.commands.terminal import WIDE, OutputFormat, Terminal, in_use
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.cli.failures import refuse
from hetis.planner.cli.parameters import options, requests
from hetis.planner.cli.parameters.options import group, option
from hetis.planner.cli.server.server_verb import (
    IN_CLUSTER,
    KINDS,
    InCluster,
    chosen_cluster,
    collection,
    fetched,
    full_name,
    server_verb,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

    from hetis.planner.client import Client


GetFormat = Literal["table", "wide", "json", "yaml", "name"]  # `OutputFormat`, and ``name``, which is for lists only


@group
class ShownOptions(InCluster):
    form: GetFormat = option("--output -o: Output format.", "table")


@server_verb(prints_data=False)
def get(
    terminal: Terminal,
    client: Client,
    kind: Annotated[str, typer.Argument(metavar="KIND[/NAME]", help=f"One of {', '.join(KINDS)}.")],
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Only the resource of this name. Default: all.")
    ] = None,
    *,
    shown: ShownOptions,
) -> ExitCode:
    """Show resources: clusters, nodes, plans, replicas, re-dispatches, profiles.

    A full name contains both kind and name: `get plans/night`, `get clusters/paper/nodes/a100-0`.
    """
    what, form = collection(kind), shown.form
    terminal = replace(terminal, output=OutputFormat(form) if form in ("json", "yaml") else OutputFormat.TABLE)
    in_use.set(terminal)  # for failures
    wanted = kind if "/" in kind else name
    parent = None
    if what in IN_CLUSTER and not (wanted or "").startswith("clusters/"):
        parent = chosen_cluster(client, shown.cluster)
    if wanted:
        found = [fetched(client, what, full_name(what, wanted, parent))]
    else:
        found = listed(client, what, parent or (full_name("clusters", shown.cluster) if shown.cluster else ""))
    _show(terminal, what, found, form, wanted, of_standby=client.has_standby_answered)
    return ExitCode.OK


def _show(
    terminal: Terminal, what: str, found: list[Any], form: GetFormat, wanted: str | None, *, of_standby: bool
) -> None:
    from hetis.planner.cli.server.resource_views import list_data, resource_data, resource_table

    if form == "name":
        if found:
            terminal.emit(list, lambda: "\n".join(one.name for one in found), width=WIDE)
        return
    terminal.emit(
        lambda: (
            resource_data(found[0], of_standby=of_standby)
            if wanted
            else list_data(f"{KINDS[what]}List", found, of_standby=of_standby)
        ),
        lambda: resource_table(what, found, wide=form == "wide", of_standby=of_standby),
        width=WIDE if form == "wide" else None,
    )


def listed(client: Client, what: str, cluster: str) -> list[Any]:
    """Read all resources of a kind, or only those of one cluster if ``cluster`` is not empty."""
    match what:
        case "clusters":
            return [one for one in client.list_clusters() if cluster in ("", one.name)]
        case "plans":
            return list(client.list_plans(cluster=cluster))
        case "profiles":
            return list(client.list_profiles())
    return list(getattr(client, f"list_{what}")(cluster))


# --- watch

MAX_DIFFERENCES = 20  # differences shown one by one; a fleet that is not there yet has thousands


@server_verb()
def watch(
    terminal: Terminal,
    client: Client,
    what: Annotated[
        str, typer.Argument(metavar="PLAN|CLUSTER", help="A plan, `plans/night` or `night`, or `clusters/paper`.")
    ],
) -> ExitCode:
    """Follow a plan until it reaches a stable state, or everything in a cluster until Ctrl-C.

    A plan is followed on stderr and printed at its end. A cluster is printed line by line as things happen, with
    `-o json` one JSON object per line. Both go on after a lost connection.
    """
    from hetis.planner.cli.server.waiting import outcome, show_plan, wait_for_plan
    from hetis.v1 import plan_pb2

    if what.startswith("clusters/"):
        return _watch_cluster(terminal, client, what)
    plan = wait_for_plan(terminal, client, full_name("plans", what), exists=False)
    show_plan(terminal, plan)
    return outcome(terminal, client, plan, activated=plan.activation != plan_pb2.ACTIVATION_STATE_INACTIVE)


def _watch_cluster(terminal: Terminal, client: Client, name: str) -> ExitCode:
    import json

    from hetis.planner.cli.server.resource_views import lines_of_event, resource_data

    for event in client.watch_cluster(name):
        if terminal.output is OutputFormat.JSON:
            print(json.dumps(resource_data(event)), flush=True)
        elif terminal.output is OutputFormat.YAML:
            print("---", flush=True)
            terminal.emit(lambda event=event: resource_data(event), lambda: "")  # type: ignore[misc]
        else:
            for said in lines_of_event(event):
                terminal.emit(dict, lambda said=said: said, width=WIDE)  # type: ignore[misc]
    return ExitCode.OK  # the watch of a cluster ends with Ctrl-C or an error


@server_verb()
def agents(terminal: Terminal, client: Client, *, where: InCluster) -> ExitCode:
    """Show nodes and their agents: state, last report, and each GPU's KV, clock and health."""
    from hetis.planner.cli.server.resource_views import list_data, node_table
    from hetis.v1 import cluster_service_pb2

    parent = chosen_cluster(client, where.cluster)
    nodes = list(client.list_nodes(parent))
    request = cluster_service_pb2.GetInventoryRequest(name=f"{parent}/inventory")
    differences = client.clusters.GetInventory(request).inventory.differences
    terminal.emit(lambda: list_data("NodeList", nodes), lambda: node_table(nodes))
    for difference in differences[:MAX_DIFFERENCES]:
        terminal.warn(difference.message)
    if len(differences) > MAX_DIFFERENCES:
        terminal.warn(f"... and {len(differences) - MAX_DIFFERENCES:,} more differences")
    return ExitCode.OK


@server_verb()
def status(terminal: Terminal, client: Client) -> ExitCode:
    """Show whether the planner is serving, its clusters, plans being solved or in force, and pending proposals.

    Exits 6 if the planner is unreachable or not serving.
    """
    from hetis.planner.cli.server.resource_views import resource_data
    from hetis.v1 import plan_pb2

    serving = client.is_serving()
    if not serving:
        return refuse(terminal, ExitCode.UNREACHABLE, "the planner is not serving: it is starting or draining")
    clusters = list(client.list_clusters())
    working = list(client.list_plans(states=[plan_pb2.PLAN_STATE_QUEUED, plan_pb2.PLAN_STATE_SOLVING]))
    active = [fetched(client, "plans", name, basic=True) for one in clusters if (name := one.active_plan)]
    proposals = [
        plan
        for plan in client.list_plans(states=[plan_pb2.PLAN_STATE_READY])
        if plan.origin == plan_pb2.PLAN_ORIGIN_PROPOSAL
        and plan.activation == plan_pb2.ACTIVATION_STATE_INACTIVE
        and not plan.HasField("activate_time")
    ]

    of_standby = client.has_standby_answered

    def document() -> dict[str, Any]:
        parts = {"clusters": clusters, "active_plans": active, "working_plans": working, "proposals": proposals}
        return {
            "apiVersion": "hetis/v1",
            "kind": "PlannerStatus",
            "serving": serving,
            **{name: [resource_data(one, of_standby=of_standby) for one in found] for name, found in parts.items()},
        }

    terminal.emit(document, lambda: _page(clusters, [*active, *working, *proposals], of_standby=of_standby))
    for plan in proposals:
        terminal.say(f"proposed: {plan.proposal_reason}; hetis-plan apply --activate {plan.name}")
    return ExitCode.OK


def _page(clusters: list[Any], plans: list[Any], *, of_standby: bool) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    from hetis.planner.cli.server.resource_views import resource_table

    parts: list[RenderableType] = [
        Text.assemble("The planner ", ("serves", "bold green"), "."),
        Text(),
        resource_table("clusters", clusters, wide=False, of_standby=of_standby),
    ]
    if plans:
        parts += [Text(), resource_table("plans", plans, wide=False, of_standby=of_standby)]
    return Group(*parts)


# --- apply, rollback, cancel


APPLY_EXAMPLES = """Examples:\n
  hetis-plan apply cluster.yaml l4-profile.yaml\n
  hetis-plan apply -c cluster.yaml -m Llama-3.1-70B -w 8000/300 --activate\n
  hetis-plan apply --plan plan.json --activate\n
  hetis-plan apply --activate plans/night"""


@server_verb()
def apply(
    terminal: Terminal,
    client: Client,
    what: Annotated[
        list[str] | None,
        typer.Argument(metavar="FILE|PLAN", help="Cluster and Profile files to apply, or a plan to activate."),
    ] = None,
    *,
    request: requests.ApplyOptions,
    given: options.ApplyOptions,
) -> ExitCode:
    """Create or update clusters and profiles, solve on the planner, import plans, activate plans.

    Ctrl-C while waiting stops no search and no activation, and prints how to follow the plan. A plan that is still
    being solved is then neither activated nor saved; how to do that once it is solved is printed, too.
    """
    from hetis.planner.cli.server.applying import Applying, PlacementOptions

    request.check()
    return Applying(terminal=terminal, client=client, requested=given).run(what or [], PlacementOptions(request))


@group
class RollbackOptions(InCluster):
    dry_run: bool = options.check_only_option()
    no_wait: bool = options.no_wait_option()


@server_verb()
def rollback(
    terminal: Terminal,
    client: Client,
    plan: Annotated[
        str | None,
        typer.Argument(metavar="PLAN", show_default="the cluster's", help="The plan in force, which is rolled back."),
    ] = None,
    *,
    how: RollbackOptions,
) -> ExitCode:
    """Activate the previous plan again and wait until it is in force.

    The request names the plan to roll back, so that repeating it does not roll back twice.
    """
    from hetis.planner.cli.server.waiting import outcome, show_plan, wait_for_plan
    from hetis.v1 import plan_service_pb2

    if plan is None:
        name = chosen_cluster(client, how.cluster)
        plan = fetched(client, "clusters", name).active_plan
        if not plan:
            return refuse(terminal, ExitCode.CONFLICT, f"{name} has no plan in force")
    request = plan_service_pb2.RollbackPlanRequest(name=full_name("plans", plan), validate_only=how.dry_run)
    answer = client.plans.RollbackPlan(request)
    earlier, waits = answer.plan, not (how.dry_run or how.no_wait)
    terminal.say("nothing was changed" if how.dry_run else f"rolling back from {request.name} to {earlier.name}")
    if waits:
        earlier = wait_for_plan(terminal, client, earlier.name)
    show_plan(terminal, earlier, answer.steps)
    return outcome(terminal, client, earlier, activated=waits)


@server_verb()
def cancel(
    terminal: Terminal,
    client: Client,
    plan: Annotated[str, typer.Argument(metavar="PLAN", help="The plan whose search or activation to cancel.")],
) -> ExitCode:
    """Cancel a plan's search; its best plan so far becomes the result. A finished search is not changed.

    Also withdraws a plan in force, if there is no earlier plan to roll back to and nothing serves.
    """
    from hetis.planner.cli.server.waiting import outcome, show_plan, wait_for_plan
    from hetis.v1 import plan_pb2, plan_service_pb2

    request = plan_service_pb2.CancelPlanRequest(name=full_name("plans", plan))
    ended = client.plans.CancelPlan(request).plan
    if ended.activation not in (plan_pb2.ACTIVATION_STATE_INACTIVE, plan_pb2.ACTIVATION_STATE_UNSPECIFIED):
        is_coming = ended.activation == plan_pb2.ACTIVATION_STATE_ACTIVATING
        is_what = "is still being activated" if is_coming else "stays in force"
        if earlier := fetched(client, "clusters", ended.cluster, basic=True).earlier_plan:
            why, way_out = f"{earlier} is an earlier plan", f"go back to it: hetis-plan rollback {ended.name}"
        else:
            why = f"replicas serve in {ended.cluster}, and there is no earlier plan"
            way_out = "activate another plan: hetis-plan apply --activate PLAN"
        otherwise = f"wait: hetis-plan watch {ended.name}" if is_coming else "or stop the agents first"
        return refuse(terminal, ExitCode.CONFLICT, f"{ended.name} {is_what}: {why}", [way_out, otherwise])
    ended = wait_for_plan(terminal, client, request.name)
    show_plan(terminal, ended)
    return outcome(terminal, client, ended)
