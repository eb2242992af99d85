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
    name = _acted(terminal, client, node, where, "DrainNode", "{} drains")
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
    _acted(terminal, client, node, where, "UndrainNode", "{} takes work again")
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
    _acted(terminal, client, node, where, "DisconnectNode", "the agent of {} was disconnected")
    return ExitCode.OK


def _acted(terminal: Terminal, client: Client, node: str, where: InCluster, method: str, said: str) -> str:
    """Call a method of a node, show the node as the planner returns it, and return its name."""
    from hetis.planner.cli.server.resource_views import resource_data
    from hetis.v1 import cluster_service_pb2

    parent = None if node.startswith("clusters/") else chosen_cluster(client, where.cluster)
    request = getattr(cluster_service_pb2, f"{method}Request")(name=full_name("nodes", node, parent))
    found = getattr(client.clusters, method)(request).node
    terminal.emit(lambda: resource_data(found), lambda: said.format(request.name))
    return str(request.name)
