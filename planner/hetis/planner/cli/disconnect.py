"""``hetis-plan disconnect``: end the stream of an agent that should not be there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from hetis.formats.command_line.terminal import Terminal
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.cli.get import ClusterNameOption
from hetis.planner.cli.server_verb import server_verb

if TYPE_CHECKING:
    from hetis.planner.client import Client


@server_verb()
def disconnect(
    terminal: Terminal,
    client: Client,
    node: Annotated[str, typer.Argument(help="The node whose agent is to go.")],
    *,
    cluster: ClusterNameOption = None,
) -> ExitCode:
    """End the stream of the agent that is connected as a node; the next agent is let in. Needs role admin.

    For a node whose credentials somebody else uses: take those back first, or the same agent comes again.
    """
    from rich.text import Text

    from hetis.planner.cli.resource_data import resource_data
    from hetis.planner.cli.resource_names import chosen_cluster, full_name
    from hetis.v1 import cluster_service_pb2

    parent = None if node.startswith("clusters/") else chosen_cluster(client, cluster)
    request = cluster_service_pb2.DisconnectNodeRequest(name=full_name("nodes", node, parent))
    found = client.clusters.DisconnectNode(request).node
    terminal.emit(lambda: resource_data(found), lambda: Text(f"the agent of {found.name} was disconnected"))
    return ExitCode.OK
