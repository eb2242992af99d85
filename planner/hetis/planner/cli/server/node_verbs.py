"""Verbs that act on one node."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from hetis.commands.terminal import Terminal
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.cli.server.server_verb import InCluster, chosen_cluster, full_name, server_verb

if TYPE_CHECKING:
    from hetis.planner.client import Client


@server_verb()
def drain(
    terminal: Terminal,
    client: Client,
    node: Annotated[str, typer.Argument(help="The node to drain.")],
    *,
    where: InCluster,
) -> ExitCode:
    """Let no new work go to a node, as before its maintenance; requests that run there finish.

    Head groups move away from its attention workers. Replicas with a stage on the node go on serving: to stop them,
    activate a plan without it, which the planner proposes if the cluster's policy says so.
    """
    from hetis.planner.cli.server.resource_views import resource_data
    from hetis.v1 import cluster_service_pb2

    name = _node_name(client, node, where)
    found = client.clusters.DrainNode(cluster_service_pb2.DrainNodeRequest(name=name)).node
    drained = f"{name} drains"
    terminal.emit(lambda: resource_data(found), lambda: drained)
    terminal.say(
        f"what is on it: hetis-plan agents; plans without it: hetis-plan get plans; undo: hetis-plan undrain {name}"
    )
    return ExitCode.OK


@server_verb()
def undrain(
    terminal: Terminal,
    client: Client,
    node: Annotated[str, typer.Argument(help="The node that may take work again.")],
    *,
    where: InCluster,
) -> ExitCode:
    """Let work go to a node again that was drained."""
    from hetis.planner.cli.server.resource_views import resource_data
    from hetis.v1 import cluster_service_pb2

    name = _node_name(client, node, where)
    found = client.clusters.UndrainNode(cluster_service_pb2.UndrainNodeRequest(name=name)).node
    terminal.emit(lambda: resource_data(found), lambda: f"{name} takes work again")
    return ExitCode.OK


@server_verb()
def disconnect(
    terminal: Terminal,
    client: Client,
    node: Annotated[str, typer.Argument(help="The node whose agent to disconnect.")],
    *,
    where: InCluster,
) -> ExitCode:
    """Disconnect the agent that is connected as a node, so that another one can connect. Needs role admin.

    Use this if a node's credentials are misused: revoke them first, or the same agent will reconnect.
    """
    from hetis.planner.cli.server.resource_views import resource_data
    from hetis.v1 import cluster_service_pb2

    request = cluster_service_pb2.DisconnectNodeRequest(name=_node_name(client, node, where))
    found = client.clusters.DisconnectNode(request).node
    terminal.emit(lambda: resource_data(found), lambda: f"the agent of {found.name} was disconnected")
    return ExitCode.OK


def _node_name(client: Client, node: str, where: InCluster) -> str:
    parent = None if node.startswith("clusters/") else chosen_cluster(client, where.cluster)
    return full_name("nodes", node, parent)
