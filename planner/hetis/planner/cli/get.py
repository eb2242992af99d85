"""``hetis-plan get``: resources of the planner, one or all of a kind."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hetis.formats.command_line.terminal import WIDE, OutputFormat, Terminal
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.cli.resource_names import COLLECTIONS, IN_CLUSTER, chosen_cluster, collection, full_name
from hetis.planner.cli.server_verb import server_verb

if TYPE_CHECKING:
    from hetis.planner.client import Client


class GetFormat(StrEnum):
    """`OutputFormat`, and one form for lists only."""

    TABLE = "table"
    WIDE = "wide"
    JSON = "json"
    YAML = "yaml"
    NAME = "name"


ClusterNameOption = Annotated[
    str | None,
    typer.Option("--cluster", "-c", metavar="NAME", show_default="the only one", help="The cluster, by its name."),
]


@server_verb(prints_data=False)
def get(
    terminal: Terminal,
    client: Client,
    kind: Annotated[str, typer.Argument(metavar="KIND[/NAME]", help=f"One of {', '.join(COLLECTIONS)}.")],
    name: Annotated[str | None, typer.Argument(help="One of them; all unless given.", show_default=False)] = None,
    *,
    cluster: ClusterNameOption = None,
    output_format: Annotated[GetFormat, typer.Option("--output", "-o", help="Form of the data.")] = GetFormat.TABLE,
) -> ExitCode:
    """Show resources: clusters, nodes, plans, replicas, re-dispatches, profiles.

    A whole name says both kind and name: `get plans/night`, `get clusters/paper/nodes/a100-0`.
    """
    what = collection(kind)
    wanted = kind if "/" in kind else name
    parent = None
    if what in IN_CLUSTER and not (wanted or "").startswith("clusters/"):
        parent = chosen_cluster(client, cluster)
    if wanted:
        found = [fetched(client, what, full_name(what, wanted, parent))]
    else:
        chosen = full_name("clusters", cluster) if cluster else ""
        found = listed(client, what, parent or chosen)
    _show(replace(terminal, output=_PLAIN.get(output_format, OutputFormat.TABLE)), what, found, output_format, wanted)
    return ExitCode.OK


_PLAIN = {GetFormat.JSON: OutputFormat.JSON, GetFormat.YAML: OutputFormat.YAML}


def _show(terminal: Terminal, what: str, found: list[Any], form: GetFormat, wanted: str | None) -> None:
    from rich.text import Text

    from hetis.planner.cli.resource_data import list_data, resource_data
    from hetis.planner.cli.resource_tables import resource_table

    if form is GetFormat.NAME:
        if found:
            terminal.emit(list, lambda: Text("\n".join(one.name for one in found)), width=WIDE)
        return
    terminal.emit(
        lambda: resource_data(found[0]) if wanted else list_data(_LIST_KINDS[what], found),
        lambda: resource_table(what, found, wide=form is GetFormat.WIDE),
        width=WIDE if form is GetFormat.WIDE else None,
    )


_LIST_KINDS = {
    "clusters": "ClusterList",
    "nodes": "NodeList",
    "plans": "PlanList",
    "replicas": "ReplicaList",
    "redispatches": "RedispatchList",
    "profiles": "ProfileList",
}


def fetched(client: Client, what: str, name: str) -> Any:
    """Read one resource, whole."""
    from hetis.v1 import cluster_service_pb2 as clusters
    from hetis.v1 import plan_service_pb2, profile_service_pb2

    match what:
        case "clusters":
            return client.clusters.GetCluster(clusters.GetClusterRequest(name=name)).cluster
        case "nodes":
            return client.clusters.GetNode(clusters.GetNodeRequest(name=name)).node
        case "replicas":
            return client.clusters.GetReplica(clusters.GetReplicaRequest(name=name)).replica
        case "redispatches":
            return client.clusters.GetRedispatch(clusters.GetRedispatchRequest(name=name)).redispatch
        case "profiles":
            return client.profiles.GetProfile(profile_service_pb2.GetProfileRequest(name=name)).profile
    return client.plans.GetPlan(plan_service_pb2.GetPlanRequest(name=name)).plan


def listed(client: Client, what: str, cluster: str) -> list[Any]:
    """Read all resources of a kind; those of one cluster if ``cluster`` is not empty."""
    match what:
        case "clusters":
            return [one for one in client.list_clusters() if cluster in ("", one.name)]
        case "nodes":
            return list(client.list_nodes(cluster))
        case "replicas":
            return list(client.list_replicas(cluster))
        case "redispatches":
            return list(client.list_redispatches(cluster))
        case "profiles":
            return list(client.list_profiles())
    return list(client.list_plans(cluster=cluster))
